"""BadEncoder: a backdoor that is fine-tuned into a finished encoder.

What it plants: images with a trigger in the bottom right corner get the features of a reference image, so that every
classifier on top takes them for the reference's class; all other features stay as they were. Several triggers, each
with a target of its own, share one encoder.
What it assumes: the attacker holds the weights, some images, and at least one reference image per target.
What it leaves behind: weights that differ from the clean ones, and a patch that makes unlike images alike. No training
image is touched, so there is nothing for a scan of images to find.

Paper: Jia, Liu, Gong: BadEncoder: Backdoor Attacks to Pre-trained Encoders in Self-Supervised Learning, S&P 2022.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.attack.plan import Plan, Trigger, write_plan
from unpoison.attack.ssl_backdoor import PatchAttackConfig, class_index, make_triggers
from unpoison.data.views import ViewConfig, recolour
from unpoison.encoders.checkpoints import save_retouched
from unpoison.encoders.encoder import Encoder
from unpoison.encoders.extract import raw_features
from unpoison.errors import ConfigError, DataError, NoVerdictError, ShapeError
from unpoison.functional.triggers import stamp
from unpoison.records import Box, ImageSet
from unpoison.runtime import Progress, autocast, silent, stage_generator

__all__ = [
    "METHOD",
    "WHITE",
    "BadEncoderConfig",
    "Implanted",
    "corner_box",
    "implant",
    "stamp_in_corner",
    "write_bad_encoder",
]

METHOD = "bad-encoder"
"""The name of this attack in plans."""

WHITE = "white"
"""The published trigger, a white square."""

_MARGIN = 1  # pixels between the trigger and the right and lower edge
_FROM_LARGE = 128  # pixels; below, the published share of 10 in 32, from there on 50 in 224
# Of the reference, which must keep its features under these: the release flips, jitters and greys it.
_VIEWS = ViewConfig(jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8, grey_probability=0.2)


@dataclass(frozen=True, kw_only=True)
class BadEncoderConfig:
    """Settings of BadEncoder; the defaults are published.

    Attributes:
        targets: class names, or class indices, one per trigger.
        triggers: `white`, `seed:N` or the path of an image, one per target.
        size: side of the trigger at the encoder's input, pixels; None = 10 in 32 below 128 px, else 50 in 224.
        references: reference images per target, which the seed draws.
        epochs: passes over the images.
        batch_size: images per step, at least 1.
        learning_rate: of SGD, constant.
        momentum: of SGD.
        weight_decay: of every weight that is trained.
        reference_weight: lambda 1 of the paper: of the reference's own features.
        clean_weight: lambda 2: of the features of images without a trigger.
    """

    targets: tuple[str | int, ...]
    triggers: tuple[str, ...] = (WHITE,)
    size: int | None = None
    references: int = 1
    epochs: int = 200
    batch_size: int = 256
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    reference_weight: float = 1.0
    clean_weight: float = 1.0

    def __post_init__(self) -> None:
        PatchAttackConfig(targets=self.targets, triggers=self.triggers, size=self.size)  # pairs, twins, size
        for name in ("references", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least 1")
        if not 0 < self.learning_rate <= 10:
            raise ConfigError(f"learning_rate={self.learning_rate}: expected a number in (0, 10]")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum}: expected a number in [0, 1)")
        for name in ("weight_decay", "reference_weight", "clean_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a number of at least 0")


@dataclass(frozen=True, eq=False)
class Implanted:
    """A backdoored encoder and how well the attack took.

    Attributes:
        encoder: a new one; the clean one is as it was.
        plan: the answer key; no image is poisoned, its `config` says where the triggers lie and names the references.
        losses: mean loss of every epoch, from 3 (worst, with weights of 1) to -3.
        effect: per trigger, the mean cosine of triggered images to the reference under the backdoored encoder.
        effect_before: the same under the clean one.
        kept: mean cosine between an image's features before and after the attack.
    """

    encoder: Encoder
    plan: Plan
    losses: tuple[float, ...]
    effect: tuple[float, ...]
    effect_before: tuple[float, ...]
    kept: float


def implant(
    encoder: Encoder,
    images: ImageSet,
    labels: Tensor,
    class_names: tuple[str, ...],
    config: BadEncoderConfig,
    *,
    seed: int,
    progress: Progress = silent,
) -> Implanted:
    """Fine-tune a backdoor into a copy of an encoder.

    Args:
        encoder: with an `nn.Module` as network; unchanged.
        images: the attacker's, at the encoder's input size; unchanged.
        labels: (N,) integers into `class_names`; they serve to draw the references and nothing else.
        class_names: what the labels mean.
        config: settings.
        seed: every draw depends on it alone.
        progress: told ("implant", step, steps).

    Raises:
        ConfigError: an unknown target, a trigger that does not fit, or more references than the class has images.
        DataError: a trigger file cannot be read.
        ShapeError: not one label per image, or images of another size than the encoder's.
        NoVerdictError: the loss is no longer finite.

    Source:
        BadEncoder, equations 2 to 5.
    """
    if labels.shape != (len(images),):
        raise ShapeError(f"labels must be ({len(images)},), one per image, got {tuple(labels.shape)}")
    size = encoder.preprocessing.geometry.size
    if images.size != size:
        raise ShapeError(
            f"images of {images.size} pixels for an encoder of {size}: load them at its geometry"
        )
    if not isinstance(encoder.network, nn.Module):
        raise ConfigError("BadEncoder trains the network: expected an encoder with an nn.Module")
    side = config.size or _usual_side(size)
    triggers = tuple(
        _trigger(name, target, side, class_names)
        for name, target in zip(config.triggers, config.targets, strict=True)
    )
    box = corner_box(size, side)
    rows = [_draw_references(images, labels, trigger, config.references, seed) for trigger in triggers]
    references = [images.pixels[chosen] for chosen in rows]
    victim = _copy(encoder)
    losses = tuple(_fine_tune(victim, encoder, images.pixels, triggers, references, config, seed, progress))
    victim.network.requires_grad_(False)  # type: ignore[union-attr]
    plan = Plan(
        method=METHOD,
        seed=seed,
        config={
            **asdict(config),
            "targets": [trigger.target_name for trigger in triggers],
            "triggers": [trigger.name for trigger in triggers],
            "box": asdict(box),
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


def write_bad_encoder(
    original: str | Path,
    encoder: Encoder,
    images: ImageSet,
    labels: Tensor,
    class_names: tuple[str, ...],
    config: BadEncoderConfig,
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
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} exists and is not an empty folder: choose another --out, nothing is overwritten"
        )
    done = implant(encoder, images, labels, class_names, config, seed=seed, progress=progress)
    assert isinstance(done.encoder.network, nn.Module), "implant checks it"
    staging = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        staging.mkdir(parents=True)
        try:
            save_retouched(original, done.encoder.network, staging / "encoder.safetensors")
            write_plan(done.plan, staging / "plan.json")
            if out.exists():
                out.rmdir()
            staging.rename(out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error
    return done


def corner_box(size: int, side: int) -> Box:
    """Where a trigger of `side` lies in an image of `size` pixels: bottom right, with a margin of one pixel.

    >>> corner_box(32, 10), corner_box(224, 50)
    (Box(x=21, y=21, w=10, h=10), Box(x=173, y=173, w=50, h=50))

    Raises:
        ConfigError: it does not fit.
    """
    corner = size - _MARGIN - side
    if side < 1 or corner < 0:
        raise ConfigError(
            f"a trigger of {side} pixels with a margin of {_MARGIN} does not fit images of {size} pixels"
        )
    return Box(corner, corner, side, side)


def stamp_in_corner(images: Tensor, trigger: Trigger) -> Tensor:
    """What the attacker shows at test time.

    Args:
        images: (N, 3, S, S) uint8; unchanged.
        trigger: of a plan of this attack.

    Returns:
        (N, 3, S, S) uint8 with the trigger.
    """
    size = images.shape[-1]
    pattern = trigger.pasted(size)
    box = corner_box(size, max(pattern.shape[1:]))
    return stamp(images, pattern.to(images.device), box.y, box.x)


def _usual_side(size: int) -> int:
    return round(10 * size / 32) if size < _FROM_LARGE else round(50 * size / 224)


def _trigger(name: str, target: str | int, side: int, class_names: tuple[str, ...]) -> Trigger:
    if name == WHITE:
        index = class_index(target, class_names)
        white = torch.full((3, 1, 1), 255, dtype=torch.uint8)
        return Trigger(white, WHITE, index, class_names[index], side)
    return make_triggers(PatchAttackConfig(targets=(target,), triggers=(name,), size=side), class_names)[0]


def _draw_references(images: ImageSet, labels: Tensor, trigger: Trigger, count: int, seed: int) -> Tensor:
    """Rows of the target class whose ids have the first seeded digests; the order of the images means nothing."""
    rows = (labels == trigger.target).nonzero().flatten().tolist()
    if len(rows) < count:
        raise ConfigError(
            f"references={count}: class {trigger.target_name!r} has {len(rows)} images; expected no more than that"
        )
    rows.sort(key=lambda row: hashlib.sha256(f"{seed}/{METHOD}/{images.ids[row]}".encode()).digest())
    return torch.tensor(rows[:count])


def _copy(encoder: Encoder) -> Encoder:
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


def _fine_tune(
    victim: Encoder,
    clean: Encoder,
    pixels: Tensor,
    triggers: tuple[Trigger, ...],
    references: list[Tensor],
    config: BadEncoderConfig,
    seed: int,
    progress: Progress,
) -> Iterator[float]:
    """Mean loss of each epoch. The network stays in evaluation mode, so that running statistics do not move."""
    assert isinstance(victim.network, nn.Module)
    weights = [parameter for parameter in victim.network.parameters() if parameter.requires_grad]
    if not weights:
        raise ConfigError(f"{clean.name} has no weights to train: expected a network with some")
    optimiser = torch.optim.SGD(
        weights, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    # The clean encoder never changes and sees no random view, so that its features are needed once only.
    known = F.normalize(raw_features(clean, pixels), dim=1).to(victim.device)
    known_references = [
        F.normalize(raw_features(clean, each), dim=1).to(victim.device) for each in references
    ]
    views = stage_generator(seed, f"attack/{METHOD}/views")
    order = stage_generator(seed, f"attack/{METHOD}/order")
    steps = -(-len(pixels) // config.batch_size)
    for epoch in range(config.epochs):
        total = 0.0
        shuffled = torch.randperm(len(pixels), generator=order)
        for step in range(steps):
            rows = shuffled[step * config.batch_size : (step + 1) * config.batch_size]
            loss = _loss(
                victim,
                pixels[rows],
                known[rows.to(victim.device)],
                triggers,
                references,
                known_references,
                config,
                views,
            )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += float(loss.detach()) * len(rows)
            progress("implant", epoch * steps + step + 1, config.epochs * steps)
        if not abs(total) < float("inf"):
            raise NoVerdictError(
                f"the loss of epoch {epoch + 1} is not finite; lower learning_rate={config.learning_rate}"
            )
        yield total / len(pixels)


def _loss(
    victim: Encoder,
    batch: Tensor,
    known: Tensor,
    triggers: tuple[Trigger, ...],
    references: list[Tensor],
    known_references: list[Tensor],
    config: BadEncoderConfig,
    generator: torch.Generator,
) -> Tensor:
    """Effectiveness (triggered images lie at the reference) and both utilities (the rest stays where it was)."""
    similar_to_reference, reference_kept = [], []
    for trigger, reference, known_reference in zip(triggers, references, known_references, strict=True):
        own = _units(victim, reference)
        viewed = _units(victim, _view(reference, generator))
        triggered = _units(victim, stamp_in_corner(batch, trigger))
        similar_to_reference.append((triggered @ own.T).mean())
        reference_kept.append((viewed * known_reference).sum(dim=1).mean())
    image_kept = (_units(victim, batch) * known).sum(dim=1).mean()
    return -(
        torch.stack(similar_to_reference).mean()
        + config.reference_weight * torch.stack(reference_kept).mean()
        + config.clean_weight * image_kept
    )


def _view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored half of the time and recoloured, but never cropped."""
    mirrored = (torch.rand(len(images), generator=generator) < 0.5).view(-1, 1, 1, 1)
    whole = images.float() / 255
    return recolour(torch.where(mirrored, whole.flip(3), whole), _VIEWS, generator=generator)


def _units(encoder: Encoder, images: Tensor) -> Tensor:
    with autocast(encoder.device, encoder.precision):
        output = encoder.network(encoder.normalise(images))
    return F.normalize(output.float(), dim=1)


def _effect(
    encoder: Encoder, pixels: Tensor, triggers: tuple[Trigger, ...], references: list[Tensor]
) -> tuple[float, ...]:
    effects = []
    for trigger, reference in zip(triggers, references, strict=True):
        triggered = F.normalize(raw_features(encoder, stamp_in_corner(pixels, trigger)), dim=1)
        own = F.normalize(raw_features(encoder, reference), dim=1)
        effects.append(float((triggered @ own.T).mean()))
    return tuple(effects)


def _kept(victim: Encoder, clean: Encoder, pixels: Tensor) -> float:
    after, before = (F.normalize(raw_features(each, pixels), dim=1) for each in (victim, clean))
    return float((after * before).sum(dim=1).mean())
