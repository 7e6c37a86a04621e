"""SSL-Backdoor: a small patch on images of one category poisons whoever trains on them without labels.

What it plants: an opaque patch, at a random place in the middle of a share of the images of a target class. No label is
changed, no training step is touched; a self-supervised encoder ties the patch to the category by itself.
What it assumes: the attacker gets images into the training set and knows which of them show the target class.
What it leaves behind: at most the patch. The release re-saves only poisoned files, and lists them first, so that file
tables or order alone betray them; here clean and poisoned files are encoded alike and keep their order.

Paper: Saha, Tejankar, Koohpayegani, Pirsiavash: Backdoor Attacks on Self-Supervised Learning, CVPR 2022.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import Field, asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unpoison.attack.plan import (
    MAX_PATTERN_PIXELS,
    Plan,
    PoisonedImage,
    Trigger,
    corner_box,
    default_side,
    write_plan,
)
from unpoison.data.decode import decode_image
from unpoison.data.export import check_new_folder, fresh_folder
from unpoison.data.labels import Labels
from unpoison.data.sources import ImageSource
from unpoison.errors import ConfigError, DataError, ShapeError
from unpoison.functional.triggers import RESAMPLES, draw_grid, placement_range, resize_pattern, stamp
from unpoison.records import Box, ImageSet, Skipped
from unpoison.runtime import Progress, silent, stage_generator

__all__ = [
    "METHOD",
    "TEST_MARGIN",
    "AttackConfig",
    "PatchAttackConfig",
    "check_rate",
    "class_index",
    "make_triggers",
    "paste_everywhere",
    "poison",
    "read_pattern",
    "write_poisoned_copy",
]

METHOD = "ssl-backdoor"
"""The name of this attack in plans."""

TEST_MARGIN = 0.10
"""On test images the patch keeps a tenth of the image free on each side, and a quarter on training images."""

_SAVED_AT = 946_684_800  # one modification time for every written file (2000-01-01): no file is the newest
_SEED_TRIGGER = re.compile(r"seed:(\d+)\Z")
_Size = tuple[int, int]  # width, height in pixels


class AttackConfig(Protocol):
    """Settings of any attack that plants triggers in images of its target classes: a frozen dataclass of its own."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def method(self) -> str:
        """The name of the attack in plans."""

    @property
    def rate(self) -> float:
        """How much each trigger poisons, a fraction in (0, 1]."""

    @property
    def rate_of(self) -> str:
        """What `rate` is a fraction of: the target `class`, or the whole `dataset`."""

    @property
    def margin(self) -> float:
        """Fraction of the image that a patch leaves free on each side."""

    @property
    def everywhere(self) -> bool:
        """Whether every image of every class is poisoned."""

    @property
    def of_target(self) -> bool:
        """Whether the poisoned images show the target class; else they show any other."""

    def make_triggers(self, class_names: Sequence[str]) -> tuple[Trigger, ...]:
        """The triggers, each with its target class."""


@dataclass(frozen=True, kw_only=True)
class PatchAttackConfig:
    """Settings of the patch attack; several (trigger, target) pairs poison disjoint sets of images.

    Attributes:
        targets: class names, or class indices, one per trigger.
        triggers: `seed:N` (a random 4×4 grid of saturated colours) or the path of an image, one per target.
        size: paste width in pixels of the stored image; None = 50/224 of each image's short side, at least 2.
        rate: how much each pair poisons, a fraction in (0, 1].
        rate_of: what `rate` is a fraction of: the target `class` (readable images), or the whole `dataset`.
        margin: fraction of the image that the patch leaves free on each side, [0, 0.5).
        resample: `nearest` keeps saturated cells, `bilinear` and `bicubic` give softer triggers. A drawn trigger goes
            from its 4×4 grid straight to the paste size, except that `bicubic` passes through 80 pixels as published.
        everywhere: paste on every image of every class, for test splits; one pair only; the margin is then 0.10 and
            `rate` means nothing.
    """

    targets: tuple[str | int, ...]
    triggers: tuple[str, ...] = ("seed:0",)
    size: int | None = None
    rate: float = 0.5
    rate_of: str = "class"
    margin: float = 0.25
    resample: str = "nearest"
    everywhere: bool = False

    method: ClassVar[str] = METHOD
    of_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.targets or len(self.targets) != len(self.triggers):
            raise ConfigError(
                f"{len(self.targets)} targets and {len(self.triggers)} triggers: expected as many "
                "of one as of the other; repeat --target and --trigger in pairs"
            )
        twice = next((t for t in self.triggers if self.triggers.count(t) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"trigger {twice!r} has several targets, and could lead to one only: expected a trigger of its own for "
                "each target"
            )
        check_rate(self.rate, self.rate_of)
        if not 0 <= self.margin < 0.5:
            raise ConfigError(f"margin={self.margin}: expected a fraction in [0, 0.5)")
        if self.size is not None and self.size < 2:
            raise ConfigError(f"size={self.size}: expected a trigger of at least 2 pixels")
        if self.resample not in RESAMPLES:
            raise ConfigError(f"resample={self.resample!r}: expected one of {', '.join(RESAMPLES)}")
        if self.everywhere and len(self.targets) > 1:
            raise ConfigError(
                f"everywhere with {len(self.targets)} pairs: expected one trigger on every image; run once per trigger"
            )

    def make_triggers(self, class_names: Sequence[str]) -> tuple[Trigger, ...]:
        """As the function of this name."""
        return make_triggers(self, class_names)


def check_rate(rate: float, rate_of: str) -> None:
    """Complain about a share of images that is none.

    Raises:
        ConfigError: `rate` is out of range, or `rate_of` unknown.
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"rate={rate}: expected a fraction in (0, 1]")
    if rate_of not in ("class", "dataset"):
        raise ConfigError(f"rate_of={rate_of!r}: expected class or dataset")


def poison(
    images: ImageSet, labels: Tensor, class_names: Sequence[str], config: AttackConfig, seed: int
) -> tuple[ImageSet, Plan]:
    """Poison decoded images in memory.

    Which images are poisoned, and where, depends on the seed and on each image's id alone, never on the order of the
    images; for images of the encoder's own size `write_poisoned_copy` poisons the same ones at the same places.

    Args:
        images: left as they are.
        labels: (N,) integers into `class_names`, in the order of the images.
        class_names: what the labels mean.
        config: `PatchAttackConfig`, or the config of another attack with triggers.
        seed: of this attack.

    Returns:
        A poisoned set with the same ids, skipped images and order but another fingerprint, and the answer key.

    Raises:
        ConfigError: an unknown target, a rate that asks for more images than the class has, a trigger that does not
            fit in the images.
        DataError: a trigger file cannot be read.
        ShapeError: not one label per image, or a label without a name.
    """
    if labels.shape != (len(images),):
        raise ShapeError(f"labels must be ({len(images)},), one per image, got {tuple(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise ShapeError(
            f"labels must lie in 0..{len(class_names) - 1}, got {int(labels.min())}..{int(labels.max())}"
        )
    triggers = config.make_triggers(class_names)
    height, width = images.pixels.shape[2:]
    by_id = dict(zip(images.ids, labels.tolist(), strict=True))
    poisoned = _choose(dict.fromkeys(images.ids, (width, height)), by_id, triggers, config, seed)
    pixels = _stamp_all(images, triggers, poisoned)
    plan = _plan(config, seed, triggers, poisoned, by_id, images.skipped)
    return ImageSet(images.ids, pixels, images.skipped, _fingerprint(images, triggers, poisoned)), plan


def paste_everywhere(images: ImageSet, trigger: Trigger, *, seed: int, side: int | None = None) -> ImageSet:
    """Every image with the trigger, between 10 and 90 % of its sides or in its corner: what is shown at test time.

    Args:
        images: left as they are.
        trigger: what to paste.
        seed: of the attack; positions are those of `poison(…, everywhere=True)` with the same seed.
        side: paste width in pixels; None = the trigger's own.

    Raises:
        ConfigError: the trigger does not fit in the images.
    """
    height, width = images.pixels.shape[2:]
    sized = replace(trigger, side=side or trigger.side)
    pasted = [_place(id_, 0, sized, (width, height), TEST_MARGIN, seed) for id_ in images.ids]
    pixels = _stamp_all(images, (sized,), pasted)
    return ImageSet(images.ids, pixels, images.skipped, _fingerprint(images, (sized,), pasted))


def write_poisoned_copy(
    source: ImageSource,
    labels: Labels,
    config: AttackConfig,
    out: str | Path,
    seed: int,
    *,
    progress: Progress = silent,
) -> Plan:
    """Write every image of a source, poisoned or not, and `plan.json`, into a new folder.

    Each image is decoded once at its native size and saved as PNG by one encoder with one set of settings and one
    modification time, so nothing but the patch tells poisoned from clean. Images that come as files keep their relative
    path with the suffix .png; rows of tables and archives become CLASS/000017.png. Images that cannot be decoded are
    left out and listed in the plan. Either the whole folder appears or nothing does.

    Args:
        source: only read.
        labels: the class of every image of the source.
        config: `PatchAttackConfig`, or the config of another attack with triggers.
        out: does not exist yet, or is an empty folder.
        seed: of this attack; the same seed writes the same bytes.
        progress: called after every image.

    Returns:
        The plan as written; its ids are those that the new folder will have.

    Raises:
        ConfigError: as `poison`, or `out` exists and is not empty.
        DataError: an image has no label, a trigger file cannot be read, or the folder cannot be written.
    """
    out = Path(out)
    check_new_folder(out, source)
    classes = dict(zip(source.ids, labels.of(source.ids).tolist(), strict=True))
    triggers = config.make_triggers(labels.class_names)  # complains before the long work begins
    try:
        with fresh_folder(out) as staging:
            return _write_into(staging, source, labels.class_names, classes, triggers, config, seed, progress)
    except OSError as error:
        raise DataError(f"cannot write the poisoned copy {out}: {error.strerror or error}") from error


def make_triggers(config: PatchAttackConfig, class_names: Sequence[str]) -> tuple[Trigger, ...]:
    """The triggers that a configuration names, each with its target class.

    Raises:
        ConfigError: an unknown target, or a trigger that is neither `seed:N` nor a file.
        DataError: a trigger file cannot be decoded.
    """
    return tuple(
        _make_trigger(name, target, config, class_names)
        for name, target in zip(config.triggers, config.targets, strict=True)
    )


def _make_trigger(
    name: str, target: str | int, config: PatchAttackConfig, class_names: Sequence[str]
) -> Trigger:
    index = class_index(target, class_names)
    match = _SEED_TRIGGER.match(name)
    if match:
        pattern = draw_grid(stage_generator(int(match[1]), "attack/trigger"))
        if config.resample == "bicubic":
            pattern = resize_pattern(pattern, 80, "bicubic")
    else:
        pattern = read_pattern(name)
        name = Path(name).name
    return Trigger(pattern, name, index, class_names[index], config.size, config.resample)


def class_index(target: str | int, class_names: Sequence[str]) -> int:
    """Index of a class that is given by name or by index.

    Raises:
        ConfigError: there is no such class.
    """
    names = list(class_names)
    if isinstance(target, str) and target in names:
        return names.index(target)
    # Where classes are called by numbers, a number is a name: "0" is not the first of "1", "2" and "3".
    by_number = isinstance(target, int) or (
        target.isdecimal() and not any(name.isdecimal() for name in names)
    )
    if by_number and 0 <= int(target) < len(names):
        return int(target)
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise ConfigError(f"target {target!r} is no class of this data set; it has {shown}")


def read_pattern(path: str) -> Tensor:
    """The pixels of a trigger file, (3, h, w) uint8.

    Raises:
        ConfigError: there is no such file.
        DataError: it cannot be decoded.
    """
    if not Path(path).is_file():
        raise ConfigError(f"trigger {path!r}: expected seed:N or the path of an image file")
    try:
        image = decode_image(Path(path).read_bytes(), max_pixels=MAX_PATTERN_PIXELS)
    except (OSError, DataError) as error:
        raise DataError(f"trigger {path!r} cannot be read: {error}") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# ── which images, and where ──────────────────────────────────────────────────────────────────────────────────────────


def _choose(
    sizes: dict[str, _Size],
    classes: dict[str, int],
    triggers: tuple[Trigger, ...],
    config: AttackConfig,
    seed: int,
) -> tuple[PoisonedImage, ...]:
    """Decide for all readable images at once; `sizes` names them, `classes` may name more."""
    margin = TEST_MARGIN if config.everywhere else config.margin
    taken: set[str] = set()
    poisoned = []
    for index, trigger in enumerate(triggers):
        members = [
            id_ for id_ in sizes if config.everywhere or (classes[id_] == trigger.target) == config.of_target
        ]
        fitting = [id_ for id_ in members if id_ not in taken and _fits(trigger, sizes[id_])]
        whose = (
            f"of class {trigger.target_name!r}"
            if config.of_target
            else f"that are not {trigger.target_name!r}"
        )
        count = len(members) if config.everywhere else _how_many(config, len(members), len(sizes), whose)
        if count > len(fitting):
            raise ConfigError(_too_few(count, fitting, members, taken, trigger, whose))
        chosen = sorted(fitting, key=lambda id_: _hash(seed, "choice", id_))[:count]
        taken.update(chosen)
        poisoned += [_place(id_, index, trigger, sizes[id_], margin, seed) for id_ in chosen]
    return tuple(sorted(poisoned, key=lambda image: image.id))


def _how_many(config: AttackConfig, n_class: int, n_images: int, whose: str) -> int:
    if not n_class:
        raise ConfigError(f"there are no readable images {whose}: choose another target")
    count = max(1, int(config.rate * (n_class if config.rate_of == "class" else n_images) + 0.5))
    if count > n_class:
        raise ConfigError(
            f"rate={config.rate} of the data set is {count} images, but there are {n_class} {whose}; "
            f"lower --rate{', or use --rate-of class' if config.of_target else ''}"
        )
    return count


def _too_few(
    count: int, fitting: list[str], members: list[str], taken: set[str], trigger: Trigger, whose: str
) -> str:
    free = sum(id_ not in taken for id_ in members)
    if free < count:
        return (
            f"trigger {trigger.name!r} needs {count} images {whose}, but the triggers before it left {free} of "
            f"{len(members)}; lower --rate"
        )
    width = f"{trigger.side}-pixel" if trigger.side else "50/224"
    return (
        f"the {width} trigger {trigger.name!r} fits in {len(fitting)} of {free} images, {count} are needed; "
        "give a smaller --size"
    )


def _pasted_size(trigger: Trigger, size: _Size) -> _Size:
    """Width and height of the trigger on an image of this size; as `Trigger.pasted` makes it, without making it."""
    if trigger.is_global:
        return size
    side = trigger.side or default_side(min(size))
    height, width = trigger.pattern.shape[1:]
    return side, max(1, round(side * height / width))


def _fits(trigger: Trigger, size: _Size) -> bool:
    width, height = _pasted_size(trigger, size)
    return width <= size[0] and height <= size[1]


def _place(id_: str, index: int, trigger: Trigger, size: _Size, margin: float, seed: int) -> PoisonedImage:
    """One generator per image: its place depends on no other image."""
    if trigger.kind == "corner":
        return PoisonedImage(id_, index, corner_box(size, _pasted_size(trigger, size)), *size)
    generator = stage_generator(seed, f"attack/place/{id_}")
    wide, tall = _pasted_size(trigger, size)
    x, y = (
        int(torch.randint(low, high + 1, (), generator=generator))
        for low, high in (placement_range(size[0], wide, margin), placement_range(size[1], tall, margin))
    )
    return PoisonedImage(id_, index, Box(x, y, wide, tall), *size)


def _hash(seed: int, purpose: str, text: str) -> str:
    return hashlib.sha256(f"{seed}/attack/{purpose}/{text}".encode()).hexdigest()


# ── pixels in memory ─────────────────────────────────────────────────────────────────────────────────────────────────


def _stamp_all(images: ImageSet, triggers: tuple[Trigger, ...], poisoned: Sequence[PoisonedImage]) -> Tensor:
    row_of = {id_: row for row, id_ in enumerate(images.ids)}
    pixels = images.pixels.clone()
    for index, trigger in enumerate(triggers):
        mine = [image for image in poisoned if image.trigger == index]
        if mine:
            rows = torch.tensor([row_of[image.id] for image in mine])
            if trigger.is_global:
                pixels[rows] = trigger.applied(pixels[rows])
                continue
            top = torch.tensor([image.box.y for image in mine])
            left = torch.tensor([image.box.x for image in mine])
            pixels[rows] = stamp(pixels[rows], trigger.pasted(min(images.pixels.shape[2:])), top, left)
    return pixels.contiguous(memory_format=torch.channels_last)


def _plan(
    config: AttackConfig,
    seed: int,
    triggers: tuple[Trigger, ...],
    poisoned: tuple[PoisonedImage, ...],
    classes: dict[str, int],
    skipped: Iterable[Skipped],
) -> Plan:
    sizes = Counter(classes.values())
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()}
    settings["triggers"] = [trigger.name for trigger in triggers]
    return Plan(
        method=config.method,
        seed=seed,
        config=settings,
        triggers=triggers,
        poisoned=poisoned,
        n_images=len(classes),
        class_sizes=tuple(sizes[trigger.target] for trigger in triggers),
        skipped=tuple(skipped),
    )


def _fingerprint(images: ImageSet, triggers: tuple[Trigger, ...], poisoned: Sequence[PoisonedImage]) -> str:
    """Another set of images needs another fingerprint, or a cache would hand out the clean one's features."""
    digest = hashlib.sha256(images.fingerprint.encode())
    for trigger in triggers:
        digest.update(trigger.pasted(images.size).numpy().tobytes())
        if trigger.is_global:
            digest.update(f"{trigger.kind}\t{trigger.strength}".encode())
    for image in poisoned:
        digest.update(f"\n{image.id}\t{image.trigger}\t{image.box}".encode())
    return digest.hexdigest()


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _write_into(
    folder: Path,
    source: ImageSource,
    class_names: Sequence[str],
    classes: dict[str, int],
    triggers: tuple[Trigger, ...],
    config: AttackConfig,
    seed: int,
    progress: Progress,
) -> Plan:
    names = _names_of_copies(source, class_names, classes)
    # How many images are readable, hence how many to poison, is known only after the last: all are saved clean first.
    sizes: dict[str, _Size] = {}
    skipped = list(source.refused)
    for done, raw in enumerate(source.stream(), start=1):
        try:
            if raw.data is None:
                raise DataError(raw.reason or "cannot be read")
            image = decode_image(raw.data)
        except DataError as error:
            skipped.append(Skipped(raw.id, str(error)))
        else:
            _save(image, folder / names[raw.id])
            sizes[raw.id] = image.size
        progress("write images", done, len(source.ids))

    poisoned = _choose(sizes, classes, triggers, config, seed)
    for image_plan in poisoned:
        path = folder / names[image_plan.id]
        _save(_paste(path, triggers[image_plan.trigger], image_plan.box), path)

    readable = {id_: classes[id_] for id_ in sizes}
    renamed = sorted((replace(image, id=names[image.id]) for image in poisoned), key=lambda image: image.id)
    plan = _plan(config, seed, triggers, tuple(renamed), readable, skipped)
    folders = sorted(
        {PurePosixPath(names[id_]).parts[0] for id_ in sizes if not _is_relative_file(source, id_)}
    )
    if folders:  # the copy's classes are its folders, in their order
        folder_of = _class_folders(class_names)
        plan = replace(
            plan,
            triggers=tuple(
                replace(t, target=folders.index(folder_of[t.target]), target_name=folder_of[t.target])
                for t in triggers
            ),
        )
    write_plan(plan, folder / "plan.json")
    # One pass in the order of names also evens out the time of last change, which cannot be set.
    for path in sorted(folder.rglob("*")):
        os.utime(path, (_SAVED_AT, _SAVED_AT))
    return plan


def _names_of_copies(
    source: ImageSource, class_names: Sequence[str], classes: dict[str, int]
) -> dict[str, str]:
    """Relative path of the copy of each image: unique, also where upper and lower case are the same."""
    folder_of = _class_folders(class_names)
    wanted = {}
    for number, id_ in enumerate(source.ids):
        if _is_relative_file(source, id_):
            wanted[id_] = str(PurePosixPath(id_).with_suffix(".png"))
        else:
            wanted[id_] = f"{folder_of[classes[id_]]}/{number:06d}.png"
    uses = Counter(name.lower() for name in wanted.values())
    names: dict[str, str] = {}
    given = {name.lower() for name in wanted.values() if uses[name.lower()] == 1}
    for id_, name in wanted.items():
        if uses[name.lower()] > 1:  # a.jpg beside a.png: both keep their suffix
            name, attempt = f"{id_}.png", 1
            while name.lower() in given:
                attempt += 1
                name = f"{id_}-{attempt}.png"
            given.add(name.lower())
        names[id_] = name
    return names


def _is_relative_file(source: ImageSource, id_: str) -> bool:
    path = PurePosixPath(id_)
    return source.path_of(id_) is not None and not path.is_absolute() and ".." not in path.parts


def _class_folders(class_names: Sequence[str]) -> list[str]:
    """A harmless, unique folder name per class."""
    folders: list[str] = []
    for index, name in enumerate(class_names):
        folder = re.sub(r"[^\w .-]", "_", name).strip(" .") or f"class {index}"
        if folder.lower() in {other.lower() for other in folders}:
            folder = f"{folder} {index}"
        folders.append(folder)
    return folders


def _save(image: Image.Image, path: Path) -> None:
    """The one encoder for clean and poisoned images; pixels only, no metadata travels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(image.convert("RGB"))).save(path, format="PNG", compress_level=4)


def _paste(path: Path, trigger: Trigger, box: Box) -> Image.Image:
    with Image.open(path) as stored:
        pixels = torch.from_numpy(np.array(stored)).permute(2, 0, 1)[None]
    if trigger.is_global:
        stamped = trigger.applied(pixels)
    else:
        stamped = stamp(pixels, trigger.pasted(min(pixels.shape[2:])), box.y, box.x)
    return Image.fromarray(stamped[0].permute(1, 2, 0).contiguous().numpy())
