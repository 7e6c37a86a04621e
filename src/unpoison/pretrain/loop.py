"""The only training loop: seeded, resumable after a kill with the same result.

Every epoch draws from its own generator, so that a run which continues after epoch e is, bit for bit, the run that
was never stopped (on the same machine and number of threads).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn

from unpoison.data.views import ViewConfig, random_views
from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.encoders.weights import unpickle_restricted
from unpoison.errors import CheckpointError, ConfigError, NothingToScanError, NoVerdictError
from unpoison.functional.colours import standardise
from unpoison.pretrain.byol import BYOL
from unpoison.pretrain.collapse import measure_diversity
from unpoison.pretrain.i_cutmix import Mixtures, draw_mixture
from unpoison.pretrain.moco import MoCoV2
from unpoison.pretrain.moco_v3 import MoCoV3
from unpoison.pretrain.msf import MSF
from unpoison.pretrain.recipe import OPTIMISERS, Recipe
from unpoison.pretrain.rotation import Rotation
from unpoison.pretrain.simclr import SimCLR
from unpoison.pretrain.simsiam import SimSiam
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

__all__ = ["METHODS", "Method", "PretrainConfig", "TrainedEncoder", "pretrain", "train"]


class Method(Protocol):
    """What the loop asks of a method's module."""

    RECIPE: ClassVar[Recipe]
    MIXES: ClassVar[bool]  # whether it takes the mixtures of i-CutMix
    backbone: nn.Module

    def __call__(self, first: Tensor, second: Tensor, *more: Mixtures | Tensor) -> Tensor:
        """The loss of a batch of two normalised views, and of mixtures or companions where there are some."""

    def after_step(self, done: float) -> None:
        """What follows a step of the optimiser; `done` is the share of all steps, (0, 1]."""


class _Kind(Method, Protocol):
    def __init__(self, backbone: nn.Module, feature_size: int, recipe: Recipe) -> None:
        """The module around a backbone with `feature_size` features."""


METHODS: dict[str, type[_Kind]] = {
    "moco-v2": MoCoV2,
    "simclr": SimCLR,
    "moco-v3": MoCoV3,
    "byol": BYOL,
    "simsiam": SimSiam,
    "msf": MSF,
    "rotation": Rotation,
}
"""Name to what is trained; a method is added here."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings of self-supervised pre-training; None takes the method's own, which suits minutes on a CPU.

    Attributes:
        method: a name in `METHODS`.
        arch, width, stem_stride: see `encoders.backbones.Architecture`.
        epochs: passes over the images.
        batch_size: images per step; lowered to the number of images when there are fewer.
        optimiser: `sgd` or `adamw`.
        learning_rate: for a batch of 256; scaled linearly with the batch.
        momentum: of SGD (Nesterov's); the first beta of AdamW.
        weight_decay: of kernels and matrices.
        warmup_epochs: the rate rises linearly for so long, at most half of the training, then falls as a cosine to
            zero.
        temperature: of the contrastive loss; BYOL, SimSiam, MSF and rotation have none.
        key_momentum: of the moving average that makes MoCo's keys, and BYOL's and MSF's targets; it rises to 1 but
            for MoCo v2 and MSF. SimCLR, SimSiam and rotation have none.
        queue_size: of MoCo v2 and MSF; lowered to half of the images.
        head_hidden, head_out: sizes of the heads.
        views: strengths of the augmentation.
        second_views: of the second view, where it differs.
        i_cutmix: mix boxes of other images into the views, see `pretrain.i_cutmix`; for MoCo, BYOL and SimCLR.
    """

    KINDS: ClassVar[Mapping[str, type[Method]]] = METHODS

    method: str = "moco-v2"
    arch: str | None = None
    width: int = 32
    stem_stride: int | None = None
    epochs: int = 20
    batch_size: int = 256
    optimiser: str | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    warmup_epochs: float | None = None
    temperature: float | None = None
    key_momentum: float | None = None
    queue_size: int | None = None
    head_hidden: int | None = None
    head_out: int | None = None
    views: ViewConfig = field(default_factory=ViewConfig)
    second_views: ViewConfig | None = None
    i_cutmix: bool = False

    def __post_init__(self) -> None:
        if self.method not in self.KINDS:
            raise ConfigError(f"method {self.method!r}: expected {' or '.join(self.KINDS)}")
        if self.optimiser not in (*OPTIMISERS, None):
            raise ConfigError(f"optimiser {self.optimiser!r}: expected {' or '.join(OPTIMISERS)}")
        least = {"epochs": 1, "batch_size": 2, "queue_size": 1, "head_hidden": 1, "head_out": 2}
        for name, value in self._given(*least):
            if value < least[name]:
                raise ConfigError(f"{name}={value}: expected at least {least[name]}")
        for name, value in self._given("learning_rate", "temperature"):
            if not value > 0:
                raise ConfigError(f"{name}={value}: expected a positive number")
        for name, value in self._given("weight_decay", "warmup_epochs"):
            if not value >= 0:
                raise ConfigError(f"{name}={value}: expected a number of at least 0")
        for name, value in self._given("momentum", "key_momentum"):
            if not 0 <= value < 1:
                raise ConfigError(f"{name}={value}: expected a number in [0, 1)")
        for name, value in self._given("temperature", "key_momentum"):
            if getattr(self.KINDS[self.method].RECIPE, name) is None:
                raise ConfigError(f"{name}={value}: {self.method} has no such setting; leave it out")
        if self.i_cutmix and not self.KINDS[self.method].MIXES:
            able = ", ".join(name for name, kind in METHODS.items() if kind.MIXES)
            raise ConfigError(
                f"i_cutmix: {self.method} cannot mix images, expected one of {able}; leave it out"
            )

    def _given(self, *names: str) -> Iterator[tuple[str, float]]:
        """Those of these settings that are not left to the method."""
        for name in names:
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    @property
    def recipe(self) -> Recipe:
        """The method's own recipe, with what is given here in its place."""
        given = {f.name: getattr(self, f.name) for f in fields(Recipe) if getattr(self, f.name) is not None}
        return replace(self.KINDS[self.method].RECIPE, **given)

    def resolve(self) -> Self:
        """The same settings, with None only where the method has no such setting."""
        return replace(self, **asdict(self.recipe), second_views=self.second_views or self.views)


@dataclass(frozen=True, eq=False)
class TrainedEncoder:
    """What pre-training gives: the encoder, how to build it again, and how training went.

    Attributes:
        encoder: ready to use.
        architecture: rebuilds the network.
        losses: mean loss of every epoch.
        config, seed, fingerprint: of the run; `config` is resolved, `fingerprint` is that of the images.
        training_state: the checkpoint, if there was one. It lies there until `save_encoder` has written the encoder,
            so that a kill in between costs no training.
    """

    encoder: Encoder
    architecture: Architecture
    losses: tuple[float, ...]
    config: PretrainConfig
    seed: int
    fingerprint: str
    training_state: Path | None = None


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
            it, another run's state is refused. `save_encoder` removes it.
        progress: called after every batch with the number of images seen.

    Raises:
        NothingToScanError: fewer than two images.
        ConfigError: the checkpoint belongs to another run.
        NoVerdictError: after an epoch, the loss is no number, or the features collapsed to one point or one line.
    """
    return train(
        images,
        config,
        METHODS[config.method],
        seed=seed,
        device=device,
        precision=precision,
        checkpoint=checkpoint,
        progress=progress,
    )


def train(
    images: ImageSet,
    config: PretrainConfig,
    kind: Callable[[nn.Module, int, Recipe], Method],
    *,
    seed: int,
    companions: Tensor | None = None,
    preprocessing: Preprocessing | None = None,
    origin: str = "",
    device: str | torch.device = "auto",
    precision: str = "auto",
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> TrainedEncoder:
    """The loop itself, for any module; everything else as for `pretrain`.

    Args:
        images: see `pretrain`.
        config: likewise.
        kind: makes the module from a backbone, its number of features, and the recipe; may draw from torch's global
            generator.
        seed: see `pretrain`.
        companions: (N, …), what comes with each image, such as its caption; a batch's part goes to the module.
        preprocessing: mean and standard deviation of the encoder; None measures them.
        origin: what else the result depends on; a state with another one is refused.
        device: see `pretrain`, as for the rest.
        precision: likewise.
        checkpoint: likewise.
        progress: likewise.

    Raises:
        UnpoisonError: as `pretrain`.
    """
    if len(images) < 2:
        raise NothingToScanError(f"pre-training needs at least 2 images, got {len(images)}")
    config, recipe = config.resolve(), config.recipe
    on = choose_device(device) if isinstance(device, str) else device
    dtype = choose_precision(precision, on)
    preprocessing = preprocessing or _measure_preprocessing(images)
    architecture = Architecture(
        name=recipe.arch, image_size=images.size, width=config.width, stem_stride=config.stem_stride
    )
    batch_size = min(config.batch_size, len(images))
    # A queue that holds most of the data set would hold each image's own older key as a negative.
    recipe = replace(recipe, queue_size=max(batch_size, min(recipe.queue_size, len(images) // 2)))
    with seeded(seed, "pretrain/initialisation"):
        method = _build(architecture, kind, recipe)
    module = cast(nn.Module, method).to(on, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = OPTIMISERS[recipe.optimiser](module, recipe)
    run = {
        "config": asdict(config),
        "seed": seed,
        "images": images.fingerprint,
        "preprocessing": asdict(preprocessing),  # the same images decoded at another side are other images
        "origin": origin,
    }
    state = _Checkpoint(checkpoint, run)
    losses = state.restore(module, optimiser)
    steps_per_epoch = len(images) // batch_size
    steps = config.epochs * steps_per_epoch
    mean, std = (torch.tensor(v, device=on) for v in (preprocessing.mean, preprocessing.std))
    sample = images.pixels[:: max(1, len(images) // _SAMPLE)][:_SAMPLE]
    pixels = _near(images.pixels, on)
    for epoch in range(len(losses), config.epochs):
        generator = stage_generator(seed, f"pretrain/epoch/{epoch}")
        total = torch.zeros((), device=on)
        module.train()
        for step, rows in enumerate(
            _batches(len(images), batch_size, generator), start=epoch * steps_per_epoch
        ):
            # A single step would fall on the warm-up's zero, and train nothing.
            rate = _rate(step / steps_per_epoch if steps > 1 else 0.5, config.epochs, recipe.warmup_epochs)
            for group in optimiser.param_groups:
                group["lr"] = rate * recipe.learning_rate * batch_size / 256
            batch = pixels[rows.to(pixels.device)].to(on)
            first, second = (
                standardise(random_views(batch, views, generator=generator), mean, std)
                for views in (config.views, config.second_views or config.views)
            )
            more: tuple[Mixtures | Tensor, ...] = () if companions is None else (companions[rows].to(on),)
            if config.i_cutmix:
                one, two = (draw_mixture(batch_size, images.size, generator=generator) for _ in range(2))
                more = ((one, two),)
            with autocast(on, dtype):
                loss = method(first, second, *more)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            method.after_step((step + 1) / steps)
            total += loss.detach()
            progress(f"pretrain {config.method}", (step + 1) * batch_size, steps * batch_size)
        losses = (*losses, float(total) / steps_per_epoch)
        with autocast(on, dtype):
            _refuse_collapse(method.backbone, standardise(sample.to(on), mean, std), losses)
        state.save(module, optimiser, losses)
    encoder = Encoder(
        method.backbone,
        preprocessing,
        name=f"{config.method} {recipe.arch}",
        device=on,
        precision=precision,
        captioned=companions is not None,
    )
    return TrainedEncoder(encoder, architecture, losses, config, seed, images.fingerprint, checkpoint)


_SAMPLE = 256
"""Images whose features are looked at after each epoch."""


def _near(pixels: Tensor, device: torch.device) -> Tensor:
    """The images on the device where a quarter of its free memory holds them: gathering a batch there is free."""
    if device.type != "cuda" or pixels.nbytes > torch.cuda.mem_get_info(device)[0] // 4:
        return pixels
    return pixels.to(device)


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


def _build(
    architecture: Architecture, kind: Callable[[nn.Module, int, Recipe], Method], recipe: Recipe
) -> Method:
    backbone = build_backbone(architecture)
    with torch.no_grad():
        probe = torch.zeros(2, 3, architecture.image_size, architecture.image_size)
        feature_size = backbone.eval()(probe).shape[1]
    return kind(backbone, feature_size, recipe)


def _batches(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A random order cut into full batches; the remainder waits for another epoch's order."""
    order = torch.randperm(n, generator=generator)
    yield from order[: n // batch_size * batch_size].view(-1, batch_size)


def _rate(epoch: float, epochs: int, warmup_epochs: float) -> float:
    """Share of the learning rate at a (fractional) epoch: linear warm-up, then half a cosine."""
    warmup = min(warmup_epochs, epochs / 2)
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1e-9)))


@torch.no_grad()
def _refuse_collapse(backbone: nn.Module, images: Tensor, losses: tuple[float, ...]) -> None:
    """Stop a training from which no encoder can come, after the epoch in which it went wrong."""
    if not math.isfinite(losses[-1]):
        raise NoVerdictError(f"the loss became {losses[-1]} in epoch {len(losses)}; lower --learning-rate")
    diversity = measure_diversity(backbone.eval()(images))
    if diversity.collapsed:
        raise NoVerdictError(
            f"training collapsed in epoch {len(losses)}: {diversity}; lower --learning-rate or train longer"
        )


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
