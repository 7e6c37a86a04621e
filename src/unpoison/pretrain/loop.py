"""The only training loop: seeded, resumable after a kill with the same result.

Every epoch draws from its own generator, so that a run which continues after epoch e is, bit for bit, the run that
was never stopped (on the same machine and number of threads).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from unpoison.data.views import ViewConfig, random_views
from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.encoders.checkpoints import unpickle_restricted
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import CheckpointError, ConfigError, NothingToScanError, NoVerdictError
from unpoison.pretrain.moco import MoCoV2
from unpoison.pretrain.simclr import SimCLR
from unpoison.records import Geometry, ImageSet
from unpoison.runtime import (
    Progress,
    autocast,
    choose_device,
    choose_precision,
    seeded,
    silent,
    stage_generator,
)

__all__ = ["METHODS", "PretrainConfig", "TrainedEncoder", "pretrain"]

METHODS = ("moco-v2", "simclr")


class _Method(Protocol):
    """What the loop asks of a method's module."""

    backbone: nn.Module

    def __call__(self, first: Tensor, second: Tensor) -> Tensor: ...
    def after_step(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings of self-supervised pre-training; defaults suit small images and minutes on a CPU.

    Attributes:
        method: `moco-v2` or `simclr`.
        arch, width, stem_stride: see `encoders.backbones.Architecture`.
        epochs: passes over the images.
        batch_size: images per step; lowered to the number of images when there are fewer.
        learning_rate: for a batch of 256; scaled linearly with the batch.
        momentum, weight_decay: of SGD with Nesterov's momentum.
        warmup_epochs: the rate rises linearly for so long, then falls as a cosine to zero.
        temperature: of the contrastive loss; None takes the method's own (MoCo v2 0.2, SimCLR 0.5).
        key_momentum, queue_size: of MoCo; the queue is lowered to half of the images.
        views: strengths of the augmentation.
    """

    method: str = "moco-v2"
    arch: str = "resnet10"
    width: int = 32
    stem_stride: int | None = None
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 0.3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = 2.0
    temperature: float | None = None
    key_momentum: float = 0.99
    queue_size: int = 2048
    views: ViewConfig = field(default_factory=ViewConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method {self.method!r}: expected {' or '.join(METHODS)}")
        for name in ("epochs", "batch_size", "queue_size"):
            if getattr(self, name) < (2 if name == "batch_size" else 1):
                raise ConfigError(f"{name}={getattr(self, name)}: expected a larger whole number")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate}: expected a positive number")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature}: expected a positive number")
        if not 0 <= self.key_momentum < 1:
            raise ConfigError(f"key_momentum={self.key_momentum}: expected a number in [0, 1)")


@dataclass(frozen=True, eq=False)
class TrainedEncoder:
    """What pre-training gives: the encoder, how to build it again, and how training went.

    Attributes:
        encoder: ready to use.
        architecture: rebuilds the network.
        losses: mean loss of every epoch.
        config, seed, fingerprint: of the run; `fingerprint` is that of the images.
    """

    encoder: Encoder
    architecture: Architecture
    losses: tuple[float, ...]
    config: PretrainConfig
    seed: int
    fingerprint: str


def pretrain(
    images: ImageSet,
    config: PretrainConfig,
    *,
    seed: int,
    device: str = "auto",
    precision: str = "auto",
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainedEncoder:
    """Train an encoder on unlabelled images.

    Args:
        images: at least two; decoded at the side that the encoder shall have.
        config: method and settings.
        seed: of initialisation, order and views, one stream each.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.
        checkpoint: a file that holds the state after each epoch; a run that finds its own state there goes on from
            it, another run's state is refused. Removed when training is complete.
        progress: called after every batch with the number of images seen.

    Raises:
        NothingToScanError: fewer than two images.
        ConfigError: the checkpoint belongs to another run.
        NoVerdictError: the loss is no longer a number, or the features collapsed to one point.
    """
    if len(images) < 2:
        raise NothingToScanError(f"pre-training needs at least 2 images, got {len(images)}")
    on = choose_device(device)
    dtype = choose_precision(precision, on)
    preprocessing = _measure_preprocessing(images)
    architecture = Architecture(
        name=config.arch, image_size=images.size, width=config.width, stem_stride=config.stem_stride
    )
    batch_size = min(config.batch_size, len(images))
    with seeded(seed, "pretrain/initialisation"):
        module = _build(architecture, config, len(images), batch_size).to(
            on, memory_format=torch.channels_last
        )  # type: ignore[call-overload]
    method = cast(_Method, module)
    optimiser = torch.optim.SGD(
        _decay_groups(module, config.weight_decay),
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
    )
    state = _Checkpoint(checkpoint, {"config": asdict(config), "seed": seed, "images": images.fingerprint})
    losses = state.restore(module, optimiser)
    steps_per_epoch = len(images) // batch_size
    mean, std = (torch.tensor(v, device=on).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    for epoch in range(len(losses), config.epochs):
        generator = stage_generator(seed, f"pretrain/epoch/{epoch}")
        total = torch.zeros((), device=on)
        module.train()
        for step, rows in enumerate(_batches(len(images), batch_size, generator)):
            rate = _rate(epoch + step / steps_per_epoch, config) * config.learning_rate * batch_size / 256
            for group in optimiser.param_groups:
                group["lr"] = rate
            batch = images.pixels[rows].to(on)
            first, second = (
                (random_views(batch, config.views, generator=generator) - mean) / std for _ in range(2)
            )
            with autocast(on, dtype):
                loss = method(
                    first.contiguous(memory_format=torch.channels_last),
                    second.contiguous(memory_format=torch.channels_last),
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            method.after_step()
            total += loss.detach()
            done = (epoch * steps_per_epoch + step + 1) * batch_size
            progress(f"pretrain {config.method}", done, config.epochs * steps_per_epoch * batch_size)
        losses = (*losses, float(total) / steps_per_epoch)
        if not math.isfinite(losses[-1]):
            raise NoVerdictError(f"the loss became {losses[-1]} in epoch {epoch + 1}; lower --learning-rate")
        state.save(module, optimiser, losses)
    encoder = Encoder(
        method.backbone, preprocessing, name=f"{config.method} {config.arch}", device=on, precision=precision
    )
    _refuse_collapse(encoder, images)
    state.remove()
    return TrainedEncoder(encoder, architecture, losses, config, seed, images.fingerprint)


def _measure_preprocessing(images: ImageSet) -> Preprocessing:
    """Mean and standard deviation of the images themselves, from at most 10 000 of them."""
    sample = images.pixels[:: max(1, len(images) // 10_000)].float() / 255
    mean = sample.mean(dim=(0, 2, 3)).tolist()
    std = sample.std(dim=(0, 2, 3)).clamp_min(1e-3).tolist()
    red, green, blue = (round(v, 6) for v in mean)
    red_std, green_std, blue_std = (round(v, 6) for v in std)
    return Preprocessing(
        geometry=Geometry(images.size, images.size),
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
    )


def _build(architecture: Architecture, config: PretrainConfig, n_images: int, batch_size: int) -> nn.Module:
    backbone = build_backbone(architecture)
    with torch.no_grad():
        probe = torch.zeros(2, 3, architecture.image_size, architecture.image_size)
        feature_size = backbone.eval()(probe).shape[1]
    if config.method == "simclr":
        return SimCLR(backbone, feature_size, temperature=config.temperature or 0.5)
    # A queue that holds most of the data set would hold each image's own older key as a negative.
    queue_size = max(batch_size, min(config.queue_size, n_images // 2))
    return MoCoV2(
        backbone,
        feature_size,
        temperature=config.temperature or 0.2,
        momentum=config.key_momentum,
        queue_size=queue_size,
    )


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and kernels only; biases and normalisation go without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A random order cut into full batches; the remainder waits for another epoch's order."""
    order = torch.randperm(n, generator=generator)
    yield from order[: n // batch_size * batch_size].view(-1, batch_size)


def _rate(epoch: float, config: PretrainConfig) -> float:
    """Share of the learning rate at a (fractional) epoch: linear warm-up, then half a cosine."""
    warmup = min(config.warmup_epochs, config.epochs / 2)
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(config.epochs - warmup, 1e-9)))


def _refuse_collapse(encoder: Encoder, images: ImageSet) -> None:
    features = torch.nn.functional.normalize(encoder.features(images.pixels[:256]), dim=1)
    spread = float(1 - features.mean(dim=0).norm() ** 2)
    if not spread > 1e-3:  # NaN counts as collapse
        raise NoVerdictError(
            f"training collapsed: features differ by {spread:.1e} of their length; "
            "lower --learning-rate or train longer"
        )
    encoder.images_shown = 0


class _Checkpoint:
    """State after the last whole epoch, replaced atomically; None as path keeps nothing."""

    def __init__(self, path: Path | None, run: dict[str, object]) -> None:
        self.path = path
        self.run = repr(run)

    def restore(self, module: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[float, ...]:
        if self.path is None or not self.path.exists():
            return ()
        try:
            saved = unpickle_restricted(self.path)
        except CheckpointError as error:
            raise ConfigError(
                f"{self.path}: not a readable training state; delete it to start over"
            ) from error
        if not isinstance(saved, dict) or saved.get("run") != self.run:
            raise ConfigError(
                f"{self.path}: belongs to a run with other settings or images; delete it to start over"
            )
        module.load_state_dict(saved["module"])
        optimiser.load_state_dict(saved["optimiser"])
        return tuple(saved["losses"])

    def save(self, module: nn.Module, optimiser: torch.optim.Optimizer, losses: tuple[float, ...]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        torch.save(
            {
                "run": self.run,
                "module": module.state_dict(),
                "optimiser": optimiser.state_dict(),
                "losses": list(losses),
            },
            partial,
        )
        os.replace(partial, self.path)

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
