"""What attacks on a finished encoder share: the trigger in a corner, the references, the copy that is trained, the key.

Such an attack holds the weights and some images. It fine-tunes a copy of the encoder until images with a trigger get
the features of reference images of a target, and leaves every other feature where it was. What is minimised, and how,
is the method's own: see `bad_encoder` and `drupe`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.attack.plan import Plan, Trigger, corner_box, write_plan
from unpoison.attack.ssl_backdoor import PatchAttackConfig, class_index, make_triggers
from unpoison.data.export import check_new_folder, fresh_folder
from unpoison.data.views import ViewConfig, recolour
from unpoison.encoders.checkpoints import save_retouched
from unpoison.encoders.encoder import Encoder
from unpoison.encoders.extract import raw_features
from unpoison.errors import ConfigError, DataError, NoVerdictError, ShapeError
from unpoison.evaluate.probes import fit_linear_probe
from unpoison.functional.triggers import stamp
from unpoison.records import ImageSet
from unpoison.runtime import Progress, autocast, silent, stage_generator

__all__ = [
    "WHITE",
    "FineTuning",
    "ImplantConfig",
    "Implanted",
    "check_settings",
    "implant",
    "stamp_in_corner",
    "write_implanted",
]

WHITE = "white"
"""The published trigger, a white square."""

_FROM_LARGE = 128  # pixels; below, the published share of 10 in 32, from there on 50 in 224
_NEIGHBOURS = 50  # that say how surely an image belongs to its class
# Of the reference, which must keep its features under these: the releases flip, jitter and grey it.
_VIEWS = ViewConfig(jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8, grey_probability=0.2)


class ImplantConfig(Protocol):
    """Settings of any attack on an encoder: a frozen dataclass of its own."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def method(self) -> str:
        """The name of the attack in plans."""

    @property
    def targets(self) -> tuple[str | int, ...]:
        """Class names, or class indices, one per trigger."""

    @property
    def triggers(self) -> tuple[str, ...]:
        """`white`, `seed:N` or the path of an image, one per target."""

    @property
    def size(self) -> int | None:
        """Side of the trigger at the encoder's input, pixels; None = 10 in 32 below 128 px, else 50 in 224."""

    @property
    def references(self) -> int:
        """Reference images per target: typical ones that classifiers take for it surely."""

    @property
    def epochs(self) -> int:
        """Passes over the images."""

    @property
    def batch_size(self) -> int:
        """Images per step."""

    @property
    def learning_rate(self) -> float:
        """Of SGD, constant."""

    @property
    def momentum(self) -> float:
        """Of SGD."""

    @property
    def weight_decay(self) -> float:
        """Of every weight that is trained."""

    def losses(self, task: FineTuning) -> Iterator[float]:
        """Train, and give the mean loss of every epoch."""


@dataclass(frozen=True, eq=False)
class Implanted:
    """A backdoored encoder and how well the attack took.

    Attributes:
        encoder: a new one; the clean one is as it was.
        plan: the answer key; no image is poisoned, its `config` says where the triggers lie and names the references.
        losses: mean loss of every epoch.
        effect: per trigger, the mean cosine of triggered images to the nearest reference under the backdoored encoder.
        effect_before: the same under the clean one.
        kept: mean cosine between an image's features before and after the attack.
    """

    encoder: Encoder
    plan: Plan
    losses: tuple[float, ...]
    effect: tuple[float, ...]
    effect_before: tuple[float, ...]
    kept: float


class FineTuning:
    """What a method trains with.

    Args:
        victim: a copy, in evaluation mode, so that running statistics do not move.
        clean: never changes.
        pixels: (N, 3, S, S) uint8.
        triggers: T of them.
        references: per trigger (R, 3, S, S) uint8.
        config: for the optimiser.
        seed: every draw depends on it alone.
        progress: told ("implant", step, steps).

    Raises:
        ConfigError: there is nothing to train.
    """

    def __init__(
        self,
        victim: Encoder,
        clean: Encoder,
        pixels: Tensor,
        triggers: tuple[Trigger, ...],
        references: list[Tensor],
        config: ImplantConfig,
        seed: int,
        progress: Progress,
    ) -> None:
        assert isinstance(victim.network, nn.Module), "implant checks it"
        self.victim, self.pixels, self.triggers, self.references = victim, pixels, triggers, references
        self.seed, self._config, self._progress = seed, config, progress
        weights = [parameter for parameter in victim.network.parameters() if parameter.requires_grad]
        if not weights:
            raise ConfigError(f"{clean.name} has no weights to train: expected a network with some")
        self._optimiser = torch.optim.SGD(
            weights, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        # The clean encoder never changes and sees no random view, so that its features are needed once only.
        self._known = F.normalize(raw_features(clean, pixels), dim=1).to(victim.device)
        self._known_references = [
            F.normalize(raw_features(clean, each), dim=1).to(victim.device) for each in references
        ]
        self._views = stage_generator(seed, f"attack/{config.method}/views")

    def epochs(self, loss_of: Callable[[int, Tensor], Tensor]) -> Iterator[float]:
        """Train by a loss of (epoch from 0, rows of a batch); gives the mean loss after every epoch.

        Raises:
            NoVerdictError: the loss is no longer finite.
        """
        config, n = self._config, len(self.pixels)
        order = stage_generator(self.seed, f"attack/{config.method}/order")
        # A tail of less than half a batch goes with the batch before it: statistics of a few images say nothing.
        steps = max(1, round(n / config.batch_size))
        for epoch in range(config.epochs):
            total = 0.0
            shuffled = torch.randperm(n, generator=order)
            for step in range(steps):
                end = n if step + 1 == steps else (step + 1) * config.batch_size
                rows = shuffled[step * config.batch_size : end]
                loss = loss_of(epoch, rows)
                self._optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimiser.step()
                total += float(loss.detach()) * len(rows)
                self._progress("implant", epoch * steps + step + 1, config.epochs * steps)
            if not abs(total) < float("inf"):
                raise NoVerdictError(
                    f"the loss of epoch {epoch + 1} is not finite; lower learning_rate={config.learning_rate}"
                )
            yield total / n

    def features(self, images: Tensor) -> Tensor:
        """(N, D) float32 as the victim gives them, with gradients."""
        with autocast(self.victim.device, self.victim.precision):
            output = self.victim.network(self.victim.normalise(images))
        return output.float()

    def units(self, images: Tensor) -> Tensor:
        """The same at unit length."""
        return F.normalize(self.features(images), dim=1)

    def kept(self, units: Tensor, rows: Tensor) -> Tensor:
        """Mean cosine of images' features to those that the clean encoder gives them."""
        return (units * self._known[rows.to(self.victim.device)]).sum(dim=1).mean()

    def reference_kept(self, trigger: int) -> Tensor:
        """Likewise of a trigger's references, which are mirrored half of the time and recoloured, but never cropped."""
        images = self.references[trigger]
        mirrored = (torch.rand(len(images), generator=self._views) < 0.5).view(-1, 1, 1, 1)
        whole = images.float() / 255
        viewed = recolour(torch.where(mirrored, whole.flip(3), whole), _VIEWS, generator=self._views)
        return (self.units(viewed) * self._known_references[trigger]).sum(dim=1).mean()


def check_settings(config: ImplantConfig) -> None:
    """What every such attack asks of its settings.

    Raises:
        ConfigError: one is out of range.
    """
    PatchAttackConfig(
        targets=config.targets, triggers=config.triggers, size=config.size
    )  # pairs, twins, size
    for name in ("references", "epochs", "batch_size"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)}: expected at least 1")
    if not 0 < config.learning_rate <= 10:
        raise ConfigError(f"learning_rate={config.learning_rate}: expected a number in (0, 10]")
    if not 0 <= config.momentum < 1:
        raise ConfigError(f"momentum={config.momentum}: expected a number in [0, 1)")
    if not config.weight_decay >= 0:
        raise ConfigError(f"weight_decay={config.weight_decay}: expected a number of at least 0")


def implant(
    encoder: Encoder,
    images: ImageSet,
    labels: Tensor,
    class_names: Sequence[str],
    config: ImplantConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> Implanted:
    """Fine-tune a backdoor into a copy of an encoder.

    Args:
        encoder: with an `nn.Module` as network; unchanged.
        images: the attacker's, at the encoder's input size; unchanged.
        labels: (N,) integers into `class_names`; they serve to choose the references and nothing else.
        class_names: what the labels mean.
        config: `BadEncoderConfig` or `DrupeConfig`.
        seed: every draw depends on it alone.
        progress: told ("implant", step, steps).

    Raises:
        ConfigError: an unknown target, a trigger that does not fit, or more references than the class has images.
        DataError: a trigger file cannot be read.
        ShapeError: not one label per image, or images of another size than the encoder's.
        NoVerdictError: the loss is no longer finite.
    """
    if labels.shape != (len(images),):
        raise ShapeError(f"labels must be ({len(images)},), one per image, got {tuple(labels.shape)}")
    size = encoder.preprocessing.geometry.size
    if images.size != size:
        raise ShapeError(
            f"images of {images.size} pixels for an encoder of {size}: load them at its geometry"
        )
    if not isinstance(encoder.network, nn.Module):
        raise ConfigError(f"{config.method} trains the network: expected an encoder with an nn.Module")
    side = config.size or _usual_side(size)
    triggers = tuple(
        _trigger(name, target, side, class_names)
        for name, target in zip(config.triggers, config.targets, strict=True)
    )
    boxes = []
    for trigger in triggers:
        height, width = trigger.pasted(size).shape[1:]
        boxes.append(corner_box((size, size), (width, height)))
    rows = _choose_references(encoder, images, labels, triggers, config.references, seed)
    references = [images.pixels[chosen] for chosen in rows]
    victim = _trainable_copy(encoder)
    losses = tuple(
        config.losses(
            FineTuning(victim, encoder, images.pixels, triggers, references, config, seed, progress)
        )
    )
    assert isinstance(victim.network, nn.Module)
    victim.network.requires_grad_(False)
    plan = Plan(
        method=config.method,
        seed=seed,
        config={
            **asdict(config),
            "targets": [trigger.target_name for trigger in triggers],
            "triggers": [trigger.name for trigger in triggers],
            "boxes": [asdict(box) for box in boxes],
            "image_size": size,
            "reference_ids": [[images.ids[row] for row in chosen.tolist()] for chosen in rows],
        },
        triggers=triggers,
        poisoned=(),
        n_images=len(images),
        class_sizes=tuple(int((labels == trigger.target).sum()) for trigger in triggers),
        skipped=images.skipped,
    )
    return Implanted(
        victim,
        plan,
        losses,
        _effect(victim, images.pixels, triggers, references),
        _effect(encoder, images.pixels, triggers, references),
        _kept(victim, encoder, images.pixels),
    )


def write_implanted(
    original: str | Path,
    encoder: Encoder,
    images: ImageSet,
    labels: Tensor,
    class_names: Sequence[str],
    config: ImplantConfig,
    out: str | Path,
    *,
    seed: int,
    progress: Progress = silent,
) -> Implanted:
    """As `implant`, and write `encoder.safetensors` and `plan.json` into a new folder.

    The new file says of itself what the original says; only the weights differ.

    Args:
        original: file of the encoder, one that unpoison wrote.
        encoder: loaded from it; the rest as in `implant`.
        images: see `implant`.
        labels: see `implant`.
        class_names: see `implant`.
        config: see `implant`.
        out: does not exist yet, or is an empty folder.
        seed: see `implant`.
        progress: see `implant`.

    Raises:
        ConfigError: as `implant`; or `out` is not empty, or `original` is no file of ours.
        DataError: as `implant`, or the folder cannot be written.
    """
    out = Path(out)
    check_new_folder(out)
    try:
        with fresh_folder(out) as staging:  # made before the long work, which would be lost without it
            done = implant(encoder, images, labels, class_names, config, seed=seed, progress=progress)
            assert isinstance(done.encoder.network, nn.Module), "implant checks it"
            save_retouched(original, done.encoder.network, staging / "encoder.safetensors")
            write_plan(done.plan, staging / "plan.json")
            return done
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error


def stamp_in_corner(images: Tensor, trigger: Trigger) -> Tensor:
    """What the attacker shows at test time; as `ssl_backdoor.paste_everywhere` for such a trigger.

    Args:
        images: (N, 3, S, S) uint8; unchanged.
        trigger: of a plan of such an attack.

    Returns:
        (N, 3, S, S) uint8 with the trigger.
    """
    size = images.shape[-1]
    pattern = trigger.pasted(size)
    box = corner_box((size, size), (pattern.shape[2], pattern.shape[1]))
    return stamp(images, pattern.to(images.device), box.y, box.x)


def _usual_side(size: int) -> int:
    return round(10 * size / 32) if size < _FROM_LARGE else round(50 * size / 224)


def _trigger(name: str, target: str | int, side: int, class_names: Sequence[str]) -> Trigger:
    if name == WHITE:
        index = class_index(target, class_names)
        white = torch.full((3, 1, 1), 255, dtype=torch.uint8)
        return Trigger(white, WHITE, index, class_names[index], side, kind="corner")
    drawn = make_triggers(PatchAttackConfig(targets=(target,), triggers=(name,), size=side), class_names)[0]
    return replace(drawn, kind="corner")


def _choose_references(
    encoder: Encoder, images: ImageSet, labels: Tensor, triggers: Sequence[Trigger], count: int, seed: int
) -> list[Tensor]:
    """Per trigger, rows of images of its target that classifiers are sure of: who mistakes those mistakes the trigger.

    Sure is the product of what a linear probe gives the target and its share among the nearest other images. Of the
    surest tenth, those that are most like all images: to lead far out costs other features more. The order of the
    images means nothing.
    """
    order = torch.tensor(sorted(range(len(images)), key=images.ids.__getitem__))
    labels = labels[order]
    for trigger in triggers:
        there = int((labels == trigger.target).sum())
        if there < count:
            raise ConfigError(
                f"references={count}: class {trigger.target_name!r} has {there} images; expected no more than that"
            )
    features = raw_features(encoder, images.pixels)[order]
    units = F.normalize(features, dim=1)
    alike = units @ F.normalize(units.mean(dim=0), dim=0)
    generator = stage_generator(seed, "implant/probe")
    probe = fit_linear_probe(features, labels, n_classes=int(labels.max()) + 1, generator=generator)
    chosen = []
    for trigger in triggers:
        rows = (labels == trigger.target).nonzero().flatten()
        shares = []
        for some in torch.split(rows, 1024):
            similar = units[some] @ units.T
            similar[torch.arange(len(some)), some] = -2  # not itself
            nearest = similar.topk(min(_NEIGHBOURS, len(units) - 1), dim=1).indices
            shares.append((labels[nearest] == trigger.target).float().mean(dim=1))
        sure = probe.logits(features[rows]).softmax(dim=1)[:, trigger.target] * torch.cat(shares)
        surest = rows[sure.argsort(descending=True, stable=True)[: max(count, len(rows) // 10)]]
        chosen.append(order[surest[alike[surest].argsort(descending=True, stable=True)[:count]]])
    return chosen


def _trainable_copy(encoder: Encoder) -> Encoder:
    """The same encoder with weights of its own, trainable but for those of batch normalisation."""
    assert isinstance(encoder.network, nn.Module)
    network = copy.deepcopy(encoder.network)
    twin = Encoder(
        network,
        encoder.preprocessing,
        name=encoder.name,
        device=encoder.device,
        precision="bf16" if encoder.precision == torch.bfloat16 else "fp32",
    )
    network.requires_grad_(True)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)
    return twin


def _effect(
    encoder: Encoder, pixels: Tensor, triggers: tuple[Trigger, ...], references: list[Tensor]
) -> tuple[float, ...]:
    effects = []
    for trigger, reference in zip(triggers, references, strict=True):
        triggered = F.normalize(raw_features(encoder, stamp_in_corner(pixels, trigger)), dim=1)
        own = F.normalize(raw_features(encoder, reference), dim=1)
        effects.append(float((triggered @ own.T).amax(dim=1).mean()))
    return tuple(effects)


def _kept(victim: Encoder, clean: Encoder, pixels: Tensor) -> float:
    after, before = (F.normalize(raw_features(each, pixels), dim=1) for each in (victim, clean))
    return float((after * before).sum(dim=1).mean())
