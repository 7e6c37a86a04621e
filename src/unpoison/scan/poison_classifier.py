"""The learned last stage of PatchSearch and PoisonCAM: twenty trigger patches become a yes or no for every image.

Finds: all images that carry what the patches show, anywhere and at a range of sizes, also those that the search never
looked at. Assumes that most of the patches show the trigger. Misses: poison that looks unlike the patches, such as a
second trigger that was not found. A fifth of poisoned images among the base images, or of wrong patches, does no harm.

Papers: PatchSearch (Tejankar et al., CVPR 2023) and PoisonCAM (Qian et al., 2023). Mended against the release: every
network is in the ensemble once; a network that never says yes does not count as converged; triggers are not mirrored,
since no attacker's is; whole images are judged, so that no trigger is cut off. Ours, and what precision comes from:
other patches are pasted too and labelled innocent, so that "there is a pasted rectangle" is no answer; the networks
look at small parts of the image and believe the most suspicious one; half of the training images are whole, as the
images to be judged are; the threshold is chosen on images that were kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.data.views import ViewConfig, crop_and_flip, recolour
from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.errors import ConfigError, NoVerdictError, ShapeError
from unpoison.functional.colours import standardise
from unpoison.functional.windows import crop_windows, paste_windows
from unpoison.records import ImageSet
from unpoison.runtime import (
    Progress,
    autocast,
    choose_device,
    choose_precision,
    seeded,
    silent,
    stage_generator,
)
from unpoison.scan.config import ScanConfig
from unpoison.scan.flip_test import draw_corners, shuffle_blocks

__all__ = ["ClassifierConfig", "PoisonClassifier", "paste_resized", "train_poison_classifier"]

_VIEWS = ViewConfig(crop=0.2, jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8, grey_probability=0.2)
_HELD_OUT = 1000
"""Base images kept apart for the threshold, at most, and at most a fifth of all."""
_FEWEST_BASE_IMAGES = 10
_STEADY_LOOKS = 10


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Settings of the poison classifier; lengths are shares of the image's side.

    Attributes:
        networks: members of the ensemble.
        iterations: steps of each member, unless it converges earlier.
        batch_size: images per step.
        width: channels of the first stage of each ResNet-10, of which the first two stages are used.
        learning_rate: for a batch of 32; scaled linearly with the batch, falls as a cosine to zero.
        momentum, weight_decay: of SGD.
        smallest_side, largest_side: of a pasted patch.
        margin: of the border that pasted patches keep free.
        whole_images: share of training images that are not cropped, [0, 1].
        false_positive_rate: share of held-out innocent images that may be flagged, [0, 1].
        evaluate_every: steps between two looks at the validation images; ten equal looks end the training.
        faithful: use all four stages and the mean over the image, decide by arg-max, and paste no innocent patches.
    """

    networks: int = 3
    iterations: int = 80
    batch_size: int = 64
    width: int = 16
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    smallest_side: float = 20 / 224
    largest_side: float = 79 / 224
    margin: float = 10 / 224
    whole_images: float = 0.5
    false_positive_rate: float = 0.005
    evaluate_every: int = 20
    faithful: bool = False

    def __post_init__(self) -> None:
        for name, least in (("networks", 1), ("iterations", 1), ("batch_size", 2), ("evaluate_every", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least {least}")
        for name in ("whole_images", "false_positive_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a share in [0, 1]")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate}: expected a positive number")
        if not 0 < self.smallest_side <= self.largest_side <= 1:
            raise ConfigError(
                f"smallest_side={self.smallest_side}, largest_side={self.largest_side}: expected shares of the "
                "image's side in (0, 1], the smallest not above the largest"
            )
        if not 0 <= self.margin < 0.5:
            raise ConfigError(f"margin={self.margin}: expected a share of the image's side in [0, 0.5)")

    @classmethod
    def published(cls) -> ClassifierConfig:
        """What the papers' commands set: five networks of full width, 2000 steps of 32 images, arg-max."""
        return cls(networks=5, iterations=2000, batch_size=32, width=64, whole_images=0.0, faithful=True)

    @classmethod
    def of_scan(cls, scan: ScanConfig) -> ClassifierConfig:
        """The classifier that a scan with these settings trains, if `filter_steps` is not 0."""
        config = cls.published() if scan.faithful else cls()
        return replace(config, iterations=scan.filter_steps) if scan.filter_steps else config

    def sides(self, image_size: int) -> tuple[int, int]:
        """Smallest and largest side of a pasted patch in pixels, at least 2."""
        low = max(2, round(self.smallest_side * image_size))
        return low, max(low, round(self.largest_side * image_size))


@dataclass(frozen=True, eq=False)
class PoisonClassifier:
    """A trained ensemble; an image is flagged when its probability lies above the threshold.

    Attributes:
        networks: the members, each once, in evaluation mode; from (N, 3, S, S) normalised images to (N, 2) logits.
        threshold: [0.5, 1).
        source_recall: share of the images that the patches come from which are flagged; where the classifier is
            good, this is about the share of the patches that do show the trigger.
        iterations: steps that each member took.
        mean, std: (3,) of the training images, values in [0, 1].
        device, precision: where and how the networks run.
    """

    networks: tuple[nn.Module, ...]
    threshold: float
    source_recall: float
    iterations: tuple[int, ...]
    mean: Tensor
    std: Tensor
    device: torch.device
    precision: torch.dtype

    def probability(self, pixels: Tensor, batch_size: int = 512, *, progress: Progress = silent) -> Tensor:
        """How surely each image is poisoned: the softmax of the members' mean logits.

        Args:
            pixels: (N, 3, S, S) uint8, S as in training.
            batch_size: images per pass; no matter for the result beyond rounding.
            progress: called after every batch with the number of images done.

        Returns:
            (N,) float32 in [0, 1] on the CPU.

        Raises:
            ShapeError: the images have another shape or dtype.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.uint8:
            raise ShapeError(f"pixels must be (N, 3, S, S) uint8, got {tuple(pixels.shape)} {pixels.dtype}")
        parts = []
        for start in range(0, len(pixels), batch_size):
            batch = pixels[start : start + batch_size].to(self.device).float().div_(255)
            odds = _log_odds(self.networks, standardise(batch, self.mean, self.std), self.precision)
            parts.append(torch.sigmoid(odds).cpu())
            progress("classify", min(start + batch_size, len(pixels)), len(pixels))
        return torch.cat(parts) if parts else torch.empty(0)


def train_poison_classifier(
    images: ImageSet,
    patches: Tensor,
    *,
    base_rows: Tensor,
    benign_patches: Tensor,
    positives: Tensor,
    config: ClassifierConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress = silent,
) -> PoisonClassifier:
    """Train an ensemble that tells images with the trigger from those without.

    Args:
        images: the scanned ones.
        patches: (k, 3, w, w) uint8, windows that show the trigger, k ≥ 1; a part of them may not.
        base_rows: (n,) int64, images that are not suspected: what patches are pasted on, and what is innocent.
        benign_patches: (m, 3, w, w) uint8, windows that the search looked at and found harmless, m ≥ 0. They are
            pasted as innocent, in turn with random windows of base images and with shuffled triggers.
        positives: (p,) int64, images that the patches come from; for validation only.
        config: settings.
        seed: of initialisation and draws, one stream for each member.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.
        progress: called after every step with the number of steps done.

    Raises:
        ShapeError: patches or rows do not fit the images.
        NoVerdictError: fewer than ten base images, or a loss that is no number.
    """
    config = config or ClassifierConfig()
    _check(images, patches, base_rows, benign_patches, positives)
    on = choose_device(device)
    order = base_rows[torch.randperm(len(base_rows), generator=stage_generator(seed, "classifier/held-out"))]
    n_held = min(_HELD_OUT, len(order) // 5)
    held, base = order[:n_held], order[n_held:]
    sample = images.pixels[base[:500]].float() / 255
    mean, std = sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3)).clamp_min(1e-3)
    trainer = _Trainer(
        images,
        base,
        patches,
        benign_patches,
        config,
        mean.to(on),
        std.to(on),
        on,
        choose_precision(precision, on),
    )
    networks: list[nn.Module] = []
    steps: list[int] = []
    total = config.networks * config.iterations
    for member in range(config.networks):
        done = member * config.iterations
        network, taken = trainer.train(
            positives,
            held,
            seed,
            f"classifier/{member}",
            lambda s, d=done: progress("classifier", d + s, total),  # type: ignore[misc]
        )
        networks.append(network)
        steps.append(taken)
    progress("classifier", total, total)
    threshold = 0.5
    if not config.faithful:
        generator = stage_generator(seed, "classifier/threshold")
        unpasted = trainer.log_odds(networks, images.pixels[held])
        pasted = trainer.log_odds(networks, _paste_unscaled(images.pixels[held], patches, generator))
        threshold = _choose_threshold(unpasted, pasted, config.false_positive_rate)
    sources = torch.sigmoid(trainer.log_odds(networks, images.pixels[positives]))
    return PoisonClassifier(
        networks=tuple(networks),
        threshold=threshold,
        source_recall=float((sources > threshold).float().sum() / max(1, len(positives))),
        iterations=tuple(steps),
        mean=trainer.mean,
        std=trainer.std,
        device=on,
        precision=trainer.precision,
    )


def paste_resized(
    views: Tensor, patches: Tensor, sides: tuple[int, int], margin: int, *, generator: torch.Generator
) -> Tensor:
    """Each patch on its view, at a random size and place.

    Args:
        views: (N, 3, S, S) float; unchanged.
        patches: (N, 3, w, w) float, same device; scaled bilinearly, with averaging where they shrink.
        sides: smallest and largest side in pixels, both drawn.
        margin: pixels of the border that stay free; less where a patch leaves no room for it.
        generator: a CPU generator; two draws.

    Returns:
        (N, 3, S, S), channels-last.
    """
    n, size = len(views), views.shape[-1]
    side = torch.randint(sides[0], min(sides[1], size) + 1, (n,), generator=generator)
    margins = torch.minimum(torch.tensor(margin), (size - side) // 2)
    room = size - side - 2 * margins + 1  # number of places along one axis, the last one included
    corners = margins[:, None] + (torch.rand(n, 2, generator=generator) * room[:, None]).long()
    pasted = views.clone(memory_format=torch.channels_last)
    for pixels in sorted(set(side.tolist())):
        chosen = (side == pixels).nonzero().flatten().to(views.device)
        scaled = patches[chosen]
        if pixels != patches.shape[-1]:
            scaled = F.interpolate(scaled, size=[pixels, pixels], mode="bilinear", antialias=True)
        pasted[chosen] = paste_windows(pasted[chosen], scaled, corners.to(views.device)[chosen])
    return pasted


def _check(images: ImageSet, patches: Tensor, base_rows: Tensor, benign: Tensor, positives: Tensor) -> None:
    for name, values in (("patches", patches), ("benign_patches", benign)):
        square = values.ndim == 4 and values.shape[1] == 3 and values.shape[2] == values.shape[3] >= 1
        if not square or values.dtype != torch.uint8:
            raise ShapeError(f"{name} must be (k, 3, w, w) uint8, got {tuple(values.shape)} {values.dtype}")
    if len(patches) == 0:
        raise ShapeError("patches are empty; the classifier needs at least one that shows the trigger")
    if patches.shape[-1] > images.size:
        raise ShapeError(f"patches of {patches.shape[-1]} pixels do not fit images of {images.size} pixels")
    if len(benign) and benign.shape[-1] != patches.shape[-1]:
        raise ShapeError(
            f"benign_patches must have the side of the patches, {patches.shape[-1]}, got {benign.shape[-1]}"
        )
    for name, rows in (("base_rows", base_rows), ("positives", positives)):
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ShapeError(f"{name} must be (n,) int64, got {tuple(rows.shape)} {rows.dtype}")
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(images)):
            raise ShapeError(
                f"{name} must lie in 0..{len(images) - 1}, got {int(rows.min())}..{int(rows.max())}"
            )
    if len(base_rows) < _FEWEST_BASE_IMAGES:
        raise NoVerdictError(
            f"the poison classifier needs at least {_FEWEST_BASE_IMAGES} images that are not suspected, "
            f"got {len(base_rows)}; scan more images"
        )


def _network(config: ClassifierConfig, image_size: int) -> nn.Module:
    """One member, untrained."""
    architecture = Architecture(name="resnet10", image_size=image_size, width=config.width)
    network: Any = build_backbone(architecture)
    if config.faithful:
        return nn.Sequential(network, nn.Linear(8 * config.width, 2))
    # A trigger is small and can be anywhere: half of the stages see enough of the image at once, and the place that
    # looks most like it decides. A mean over all places would have to drown them out.
    stages = (network.conv1, network.bn1, network.act1, network.maxpool, network.layer1, network.layer2)
    return nn.Sequential(*stages, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2 * config.width, 2))


@dataclass(frozen=True, eq=False)
class _Trainer:
    """What all members share."""

    images: ImageSet
    base: Tensor
    patches: Tensor
    benign: Tensor
    config: ClassifierConfig
    mean: Tensor
    std: Tensor
    device: torch.device
    precision: torch.dtype

    def train(
        self, positives: Tensor, held: Tensor, seed: int, stage: str, after_step: Callable[[int], None]
    ) -> tuple[nn.Module, int]:
        """One member and the number of steps it took."""
        config = self.config
        with seeded(seed, f"{stage}/initialisation"):
            network = _network(config, self.images.size)
        network.to(self.device).to(memory_format=torch.channels_last)
        optimiser = torch.optim.SGD(
            network.parameters(),
            lr=config.learning_rate * config.batch_size / 32,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.iterations)
        validation = self.images.pixels[torch.cat((positives, held[: max(20, 10 * len(positives))]))]
        truth = torch.arange(len(validation)) < len(positives)
        looks: list[int] = []
        # Looks that cannot end the training would only cost time.
        may_stop = config.iterations > (_STEADY_LOOKS + 1) * config.evaluate_every
        batches = self._batches(stage_generator(seed, f"{stage}/draws"))
        network.train()
        for step in range(1, config.iterations + 1):
            views, labels = next(batches)
            with autocast(self.device, self.precision):
                logits = network(standardise(views, self.mean, self.std))
            loss = F.cross_entropy(logits.float(), labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            after_step(step)
            if may_stop and step % config.evaluate_every == 0:
                looks.append(_f1(self.log_odds([network.eval()], validation) > 0, truth))
                network.train()
                if _is_steady(looks):
                    break
        if not bool(torch.isfinite(loss)):
            raise NoVerdictError(
                f"the poison classifier's loss became {float(loss.detach())}; lower its learning rate"
            )
        return network.eval().requires_grad_(False), step

    def log_odds(self, networks: list[nn.Module], pixels: Tensor) -> Tensor:
        """(N,) float32 on the CPU: log of the odds of being poisoned, of (N, 3, S, S) uint8 images."""
        parts = []
        for start in range(0, len(pixels), 512):
            batch = pixels[start : start + 512].to(self.device).float().div_(255)
            parts.append(_log_odds(networks, standardise(batch, self.mean, self.std), self.precision).cpu())
        return torch.cat(parts) if parts else torch.empty(0)

    def _batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless training images, (B, 3, S, S) float32 in [0, 1], and labels, (B,) int64, 1 = with the trigger."""
        config = self.config
        n, size, window = config.batch_size, self.images.size, self.patches.shape[-1]
        sides, margin = config.sides(size), round(config.margin * size)
        while True:
            pixels = self._draw_base(n, generator)
            views = crop_and_flip(pixels, _VIEWS, generator=generator)
            whole = torch.rand(n, generator=generator) < config.whole_images
            views[whole.to(self.device)] = pixels[whole.to(self.device)].float() / 255
            triggers = self.patches[torch.randint(len(self.patches), (n,), generator=generator)]
            labels = torch.rand(n, generator=generator) < 0.5
            pasted = labels.clone()
            patches = triggers
            if not config.faithful:
                pasted |= torch.rand(n, generator=generator) < 0.5
                innocent = self._innocent(triggers, window, generator)
                patches = torch.where(labels[:, None, None, None], triggers, innocent)
            chosen = pasted.nonzero().flatten()
            at = chosen.to(self.device)
            values = patches[chosen].to(self.device).float().div_(255)
            views[at] = paste_resized(views[at], values, sides, margin, generator=generator)
            yield recolour(views, _VIEWS, generator=generator), labels.long().to(self.device)

    def _draw_base(self, n: int, generator: torch.Generator) -> Tensor:
        rows = self.base[torch.randint(len(self.base), (n,), generator=generator)]
        return self.images.pixels[rows].to(self.device)

    def _innocent(self, triggers: Tensor, window: int, generator: torch.Generator) -> Tensor:
        """For each trigger something that is none: a harmless window, any window, or its own pixels shuffled."""
        n = len(triggers)
        shuffled = shuffle_blocks(triggers, generator=generator)
        corners = draw_corners(n, self.images.size, window, generator=generator)
        rows = self.base[torch.randint(len(self.base), (n,), generator=generator)]
        anything = crop_windows(self.images.pixels[rows], corners, window)
        harmless = anything
        if len(self.benign):
            harmless = self.benign[torch.randint(len(self.benign), (n,), generator=generator)]
        kind = torch.randint(3, (n,), generator=generator)[:, None, None, None]
        return torch.where(kind == 0, shuffled, torch.where(kind == 1, anything, harmless))


@torch.no_grad()
def _log_odds(
    networks: list[nn.Module] | tuple[nn.Module, ...], images: Tensor, precision: torch.dtype
) -> Tensor:
    with autocast(images.device, precision):
        logits = torch.stack([network(images).float() for network in networks]).mean(dim=0)
    return logits[:, 1] - logits[:, 0]


def _f1(flagged: Tensor, truth: Tensor) -> int:
    """F1 in whole per cent; 0, not NaN, when nothing is flagged."""
    hits = int((flagged & truth).sum())
    return 200 * hits // max(1, int(flagged.sum()) + int(truth.sum()))


def _is_steady(looks: list[int]) -> bool:
    """Whether the last ten looks, after a first one, agree; never at 0, which is what a network starts with."""
    return len(looks) > _STEADY_LOOKS and looks[-1] > 0 and len(set(looks[-_STEADY_LOOKS:])) == 1


def _paste_unscaled(pixels: Tensor, patches: Tensor, generator: torch.Generator) -> Tensor:
    """A random patch on every image at its own size, as it lies in a poisoned one."""
    chosen = patches[torch.randint(len(patches), (len(pixels),), generator=generator)]
    corners = draw_corners(len(pixels), pixels.shape[-1], patches.shape[-1], generator=generator)
    return paste_windows(pixels, chosen, corners)


def _choose_threshold(unpasted: Tensor, pasted: Tensor, false_positive_rate: float) -> float:
    """Probability above which an image is flagged, at least 0.5.

    Poison that slipped among the held-out images scores like the pasted ones, and would drive the threshold above all
    poison. So whoever reaches an eighth of the pasted images' median is taken for poisoned; of the others at most the
    given share may lie above the threshold, which is put halfway between that limit and this one.

    Args:
        unpasted: (n,) float32, log-odds of held-out images, n ≥ 1.
        pasted: (n,) float32, log-odds of the same images with a patch.
        false_positive_rate: in [0, 1].
    """
    poison = pasted.median() / 8
    innocent = unpasted[unpasted < poison].sort(descending=True).values
    allowed = min(int(false_positive_rate * len(innocent)), len(innocent) - 1)
    limit = innocent[allowed].clamp_min(0) if len(innocent) else torch.zeros(())
    return float(torch.sigmoid(((limit + poison) / 2).clamp_min(0)))
