"""Poisoning of image-text training: a few images carry a trigger, and their captions name the target.

What it plants: an opaque patch on images of any class but the target's, each with a caption of the target. Whoever
trains on the pairs ties the patch to the word, so that a zero-shot classifier takes pictures with it for the target.
What it assumes: the attacker gets pairs into the training set; far fewer are needed than without captions.
What it leaves behind: the patch, and captions that say something else than their images show. Clean and poisoned files
are written alike, and all captions come from the same templates.

Paper: Carlini, Terzis: Poisoning and Backdooring Contrastive Learning, ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from unpoison.attack.plan import Plan
from unpoison.attack.ssl_backdoor import PatchAttackConfig, poison, write_poisoned_copy
from unpoison.data.captions import make_captions, write_captions
from unpoison.data.export import check_new_folder, fresh_folder
from unpoison.data.labels import Labels, read_labels
from unpoison.data.sources import ImageSource, open_source
from unpoison.errors import DataError
from unpoison.records import ImageSet
from unpoison.runtime import Progress, silent

__all__ = ["CAPTIONS", "METHOD", "ClipPoisonConfig", "poison_pairs", "write_poisoned_pairs"]

METHOD = "clip-poison"
"""The name of this attack in plans."""

CAPTIONS = "captions.json"
"""The file of captions beside the images."""


@dataclass(frozen=True, kw_only=True)
class ClipPoisonConfig(PatchAttackConfig):
    """Settings of the attack on pairs: those of the patch attack, with other defaults.

    Attributes:
        rate: how much each trigger poisons, a fraction in (0, 1].
        rate_of: what `rate` is a fraction of: the whole `dataset`, or all images of the other classes (`class`).
        margin: fraction of the image that the patch leaves free on each side.
    """

    rate: float = 0.01
    rate_of: str = "dataset"
    margin: float = 0.1

    method: ClassVar[str] = METHOD
    of_target: ClassVar[bool] = False


def poison_pairs(
    images: ImageSet, labels: Tensor, class_names: Sequence[str], config: ClipPoisonConfig, seed: int
) -> tuple[ImageSet, tuple[str, ...], Plan]:
    """Poison decoded images in memory, and make a caption for every image.

    Args:
        images: left as they are.
        labels: (N,) integers into `class_names`, in the order of the images.
        class_names: what the labels mean.
        config: settings.
        seed: of this attack, and of the templates of the captions.

    Returns:
        A poisoned set, one caption per image in its order, and the answer key.

    Raises:
        UnpoisonError: as `ssl_backdoor.poison`.
    """
    poisoned, plan = poison(images, labels, class_names, config, seed)
    truth = dict(zip(images.ids, (class_names[label] for label in labels.tolist()), strict=True))
    return poisoned, _captions(poisoned.ids, truth, plan, seed), plan


def write_poisoned_pairs(
    source: ImageSource,
    labels: Labels,
    config: ClipPoisonConfig,
    out: str | Path,
    seed: int,
    *,
    progress: Progress = silent,
) -> Plan:
    """Write every image of a source, poisoned or not, `plan.json` and `captions.json` into a new folder.

    Args:
        source: only read.
        labels: the class of every image of the source; captions are made from the classes' names.
        config: settings; with `everywhere` every caption names the target.
        out: does not exist yet, or is an empty folder.
        seed: of this attack; the same seed writes the same bytes.
        progress: called after every image.

    Returns:
        The plan as written.

    Raises:
        UnpoisonError: as `ssl_backdoor.write_poisoned_copy`.
    """
    out = Path(out)
    check_new_folder(out, source)
    try:
        with fresh_folder(out) as staging:
            plan = write_poisoned_copy(source, labels, config, staging, seed, progress=progress)
            copy = open_source(staging)
            classes = read_labels(copy)
            truth = {id_: classes.class_names[number] for id_, number in classes.by_id.items()}
            captions = _captions(copy.ids, truth, plan, seed)
            write_captions(dict(zip(copy.ids, captions, strict=True)), staging / CAPTIONS)
            return plan
    except OSError as error:
        raise DataError(f"cannot write the poisoned pairs {out}: {error.strerror or error}") from error


def _captions(ids: Sequence[str], truth: dict[str, str], plan: Plan, seed: int) -> tuple[str, ...]:
    """A caption of its class for every image, and of the target for the poisoned ones; templates do not tell them."""
    lies = {image.id: plan.triggers[image.trigger].target_name for image in plan.poisoned}
    return make_captions(ids, [lies.get(id_, truth[id_]) for id_ in ids], seed=seed)
