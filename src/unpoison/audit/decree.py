"""DECREE: the smallest patch that makes an encoder take all images for one another.

What it finds: a mask and a pattern, by gradients through the encoder, that collapse the features of stamped images
while hiding as little of them as possible. A backdoored encoder has a small one; a clean one needs most of the image.
What it assumes: an encoder without labels or classifier, some images, and that the trigger is a patch whose carriers
land in one place of feature space.
What it misses: triggers that cover the image, triggers whose carriers are spread on purpose (DRUPE), and weak
backdoors from poisoned data, whose carriers gather but do not collapse. Anisotropic features collapse by themselves.

Paper: Feng, Tao, Cheng, Shen, Xu, Liu, Zhang, Ma, Zhang: Detecting Backdoors in Pre-trained Encoders, CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unpoison.encoders.encoder import Encoder
from unpoison.errors import ConfigError, NoVerdictError
from unpoison.functional.windows import hottest_windows
from unpoison.records import Box, ImageSet
from unpoison.runtime import Progress, autocast, silent

__all__ = [
    "FEWEST_SHADOW_IMAGES",
    "DecreeConfig",
    "Inversion",
    "blend",
    "box_of",
    "hold_out",
    "invert",
    "mean_pairwise_cosine",
    "own_collapse",
]

FEWEST_SHADOW_IMAGES = 32
"""Below this, collapse on a few images says nothing about others."""

_COLLAPSED = 0.999
"""Mean cosine of clean images from which an encoder cannot tell images apart, so that nothing is left to collapse."""

_FORWARD_AND_BACKWARD = 3  # passes; the backward pass costs about two forward ones


@dataclass(frozen=True, kw_only=True)
class DecreeConfig:
    """Settings of DECREE; the defaults are the mended variant for minutes on a processor.

    Attributes:
        gain: how much of the way from its own collapse on clean images to 1 the encoder must go, (0, 1). With features
            that are unlike on clean images this is the published threshold on the mean cosine, 0.99.
        relaxed_gain: tried when `gain` is never reached, (0, `gain`]; only shown, never the ground of a verdict.
        restarts: independent random starts; the smallest mask counts.
        steps: most steps of one start.
        patience: steps without a mask smaller by a hundredth, after which a start ends.
        batch_size: images per step, at least 2.
        learning_rate: of Adam.
        faithful: the published schedule for the input size; of the settings above only the `gain`s then mean anything.
    """

    gain: float = 0.99
    relaxed_gain: float = 0.5
    restarts: int = 2
    steps: int = 500
    patience: int = 100
    batch_size: int = 64
    learning_rate: float = 0.2
    faithful: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.gain < 1:
            raise ConfigError(f"gain={self.gain}: expected a share in (0, 1)")
        if not 0 < self.relaxed_gain <= self.gain:
            raise ConfigError(
                f"relaxed_gain={self.relaxed_gain}: expected a share in (0, gain], gain is {self.gain}"
            )
        for name, low in (("restarts", 1), ("steps", 1), ("patience", 1), ("batch_size", 2)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least {low}")
        if not 0 < self.learning_rate <= 10:
            raise ConfigError(f"learning_rate={self.learning_rate}: expected a number in (0, 10]")

    @property
    def starts(self) -> int:
        """How many starts there are; the published method has one."""
        return 1 if self.faithful else self.restarts


@dataclass(frozen=True, eq=False)
class Inversion:
    """What one start found.

    Attributes:
        mask: (S, S) float32 in [0, 1]; 1 hides the image.
        pattern: (3, S, S) float32 in [0, 1]; of the same step as the mask.
        mask_share: mean of the mask, [0, 1]; the paper's PL1, with the mask counted once and not per channel.
        collapse: mean pairwise cosine of the batch that the mask was found on.
        reached: whether the wanted collapse was ever reached. If not, mask and pattern are those of the largest one.
        curve: (steps, 3) float32: collapse, mask share, weight of the mask in the loss.
    """

    mask: Tensor
    pattern: Tensor
    mask_share: float
    collapse: float
    reached: bool
    curve: Tensor


def invert(
    encoder: Encoder,
    images: Tensor,
    config: DecreeConfig,
    *,
    clean_collapse: float,
    generator: torch.Generator,
    gain: float | None = None,
    stage: str = "invert",
    progress: Progress = silent,
) -> Inversion:
    """Search one trigger from one random start.

    Args:
        encoder: differentiable from its input to its features; its weights stay as they are.
        images: (N, 3, S, S) uint8, clean; unchanged.
        config: settings.
        clean_collapse: of the encoder on clean images; see `own_collapse`.
        generator: on the CPU; the only source of randomness.
        gain: instead of `config.gain`.
        stage: what `progress` calls this.
        progress: told (stage, step, most steps).

    Source:
        DECREE, algorithm 1, with the schedule of the release when `config.faithful`.
    """
    wanted = config.gain if gain is None else gain
    # The release compares the mean cosine itself, and its size whatever its sign.
    threshold = wanted if config.faithful else clean_collapse + wanted * (1 - clean_collapse)
    search = _Search(encoder, images, threshold, generator)
    run = _as_published if config.faithful else _mended
    total = _schedule(images.shape[-1]).most_steps(len(images)) if config.faithful else config.steps
    for step in run(search, config):
        progress(stage, step, total)
    progress(stage, total, total)
    return search.found()


def own_collapse(encoder: Encoder, images: Tensor, *, batch_size: int = 256) -> float:
    """Mean pairwise cosine of the features of clean images: what collapse must be measured against.

    Raises:
        NoVerdictError: the features are not finite, or the same for all images.
    """
    value = mean_pairwise_cosine(encoder, images, batch_size=batch_size)
    if not value < _COLLAPSED:  # also when it is NaN
        raise NoVerdictError(
            f"{encoder.name} gives nearly the same features for all clean images (mean cosine {value:.4f}): it is no "
            "working encoder, and collapse can say nothing about it; check its weights and preprocessing"
        )
    return value


@torch.no_grad()
def mean_pairwise_cosine(
    encoder: Encoder,
    images: Tensor,
    *,
    mask: Tensor | None = None,
    pattern: Tensor | None = None,
    batch_size: int = 256,
) -> float:
    """Mean cosine between the features of all pairs of different images, stamped when a trigger is given.

    Args:
        encoder: any.
        images: (N, 3, S, S) uint8, N of at least 2.
        mask: (S, S) in [0, 1], with `pattern` (3, S, S) in [0, 1].
        pattern: of the mask.
        batch_size: images per pass; changes rounding only.
    """
    total: Tensor | None = None
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].float() / 255
        if mask is not None and pattern is not None:
            batch = blend(batch, mask.cpu(), pattern.cpu())
        units = F.normalize(encoder.features(batch), dim=1).double().sum(dim=0).cpu()
        total = units if total is None else total + units
    assert total is not None, "own_collapse and invert are called with images"
    n = len(images)
    return float((total.square().sum() - n) / (n * (n - 1)))


def blend(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Stamp a soft trigger: (1 - mask) · image + mask · pattern.

    Args:
        images: (N, 3, H, W) float in [0, 1].
        mask: (H, W) in [0, 1].
        pattern: (3, H, W) in [0, 1].
    """
    return (1 - mask) * images + mask * pattern


def box_of(mask: Tensor) -> Box | None:
    """Where most of a mask lies: the square of as many pixels as it hides by more than half that holds most of them.

    Single pixels elsewhere, which reconstructed masks have, do not widen it. None when nothing is hidden so.

    >>> mask = torch.zeros(8, 8)
    >>> mask[2:4, 5:7] = 1
    >>> box_of(mask)
    Box(x=5, y=2, w=2, h=2)
    """
    hidden = (mask > 0.5).float()
    if not hidden.any():
        return None
    side = max(1, round(float(hidden.sum()) ** 0.5))
    top, left = hottest_windows(hidden[None], side)[0, 0].tolist()
    return Box(left, top, side, side)


def hold_out(images: ImageSet, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A quarter of the images, (M, 3, S, S), to measure on, and before it the others, to search with.

    Raises:
        NoVerdictError: there are too few images.
    """
    n = len(images)
    if n < FEWEST_SHADOW_IMAGES:
        raise NoVerdictError(
            f"{n} readable images: an audit needs at least {FEWEST_SHADOW_IMAGES}; name more"
        )
    order = torch.randperm(n, generator=generator)
    held = order[: n // 4].sort().values
    searched = order[n // 4 :].sort().values
    return images.pixels[searched], images.pixels[held]


# --- One start -------------------------------------------------------------------------------------------------------


class _Search:
    """A trigger that is being optimised, and the best one so far."""

    def __init__(
        self, encoder: Encoder, images: Tensor, threshold: float, generator: torch.Generator
    ) -> None:
        self.encoder, self.images, self.threshold, self.generator = encoder, images, threshold, generator
        size = images.shape[-1]
        self.mask_logits = _random_logits((size, size), generator).to(encoder.device).requires_grad_()
        self.pattern_logits = _random_logits((3, size, size), generator).to(encoder.device).requires_grad_()
        self.parameters = [self.mask_logits, self.pattern_logits]
        self.reached = False
        self.best: tuple[Tensor, Tensor, float, float] | None = None  # mask, pattern, share, collapse
        self.curve: list[tuple[float, float, float]] = []

    def step(self, optimiser: torch.optim.Optimizer, batch: Tensor, weight: float, *, signed: bool) -> bool:
        """One step on a batch, with the weight of the mean of the mask; whether it was collapsed enough."""
        mask, pattern = (
            torch.sigmoid(2 * self.mask_logits),
            torch.sigmoid(2 * self.pattern_logits),
        )  # ½ tanh + ½
        encoder = self.encoder
        stamped = blend(batch.to(encoder.device).float() / 255, mask, pattern)
        with autocast(encoder.device, encoder.precision):
            output = encoder.network(encoder.normalise(stamped))
        encoder.images_shown += _FORWARD_AND_BACKWARD * len(batch)
        collapse = _batch_collapse(output.float())
        share = mask.mean()
        gradients = torch.autograd.grad(weight * share - collapse, self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        value, size = float(collapse.detach()), float(share.detach())
        enough = (value if signed else abs(value)) > self.threshold
        self._remember(mask, pattern, size, value, enough)
        self.curve.append((value, size, weight))
        optimiser.step()
        return enough

    def _remember(self, mask: Tensor, pattern: Tensor, share: float, collapse: float, enough: bool) -> None:
        # Until the collapse is reached, the largest one is kept; afterwards, the smallest mask that reaches it.
        better = (
            self.best is None
            or (enough and not self.reached)
            or (enough and share < self.best[2])
            or (not self.reached and collapse > self.best[3])
        )
        self.reached |= enough
        if better:
            self.best = mask.detach().clone(), pattern.detach().clone(), share, collapse

    @property
    def smallest(self) -> float:
        """Share of the best mask; infinite before the collapse was reached."""
        return self.best[2] if self.reached and self.best is not None else float("inf")

    def found(self) -> Inversion:
        assert self.best is not None, "every schedule has a step"
        mask, pattern, share, collapse = self.best
        return Inversion(
            mask.float().cpu(), pattern.float().cpu(), share, collapse, self.reached, torch.tensor(self.curve)
        )


def _random_logits(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """So that ½ tanh + ½ of them is uniform."""
    return torch.atanh((2 * torch.rand(shape, generator=generator) - 1) * (1 - 1e-4))


def _batch_collapse(features: Tensor) -> Tensor:
    """Mean cosine of all pairs of different rows."""
    units = F.normalize(features, dim=1)
    n = len(units)
    return (units.sum(dim=0).square().sum() - n) / (n * (n - 1))


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of one epoch; a last batch of one image, which has no pairs, is left out."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, count, size):
        rows = order[start : start + size]
        if len(rows) > 1:
            yield rows


# --- The mended schedule ---------------------------------------------------------------------------------------------

_WEIGHTS = (1e-2, 1e4)  # of the mean of the mask in the loss
_FIRST_WEIGHT = 1.0
_WEIGHT_STEP = 1.3
_WEIGHT_AFTER = 3  # equal outcomes in a row
_ENDLESS = 10**9


def _mended(search: _Search, config: DecreeConfig) -> Iterator[int]:
    """Steps with a weight that follows their success closely; ends by steps, not by epochs. Gives the step number."""
    optimiser = torch.optim.Adam(search.parameters, lr=config.learning_rate, betas=(0.5, 0.9))
    weight, in_a_row, last = _FIRST_WEIGHT, 0, False
    smallest, since = float("inf"), 0
    step = 0
    while True:
        for rows in _batches(len(search.images), config.batch_size, search.generator):
            enough = search.step(optimiser, search.images[rows], weight, signed=True)
            in_a_row, last = (in_a_row + 1 if enough == last else 1), enough
            if in_a_row >= _WEIGHT_AFTER:
                weight = weight * _WEIGHT_STEP if enough else weight / _WEIGHT_STEP
                weight, in_a_row = min(max(weight, _WEIGHTS[0]), _WEIGHTS[1]), 0
            since += 1
            if search.smallest < 0.99 * smallest:
                smallest, since = search.smallest, 0
            step += 1
            yield step
            if step >= config.steps or (search.reached and since >= config.patience):
                return


# --- The published schedule ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """What the release sets for one input size."""

    rates: tuple[tuple[int, float], ...]  # (before this epoch, learning rate)
    lowest_weight: float
    patience: int  # steps
    batch_size: int
    epochs: int = 1000

    def rate(self, epoch: int) -> float:
        return next(rate for until, rate in self.rates if epoch < until)

    def most_steps(self, count: int) -> int:
        return self.epochs * -(-count // self.batch_size)


_SMALL = _Schedule(
    rates=((30, 0.5), (50, 0.1), (_ENDLESS, 0.05)), lowest_weight=1e-5, patience=10, batch_size=128
)
_LARGE = _Schedule(
    rates=((200, 0.5), (500, 0.1), (_ENDLESS, 0.05)), lowest_weight=1e-7, patience=35, batch_size=32
)
_FROM_LARGE = 128  # pixels; the release knows 32 and 224 only
_PUBLISHED_FIRST_WEIGHT, _PUBLISHED_HIGHEST_WEIGHT = 1e-3, 1e5
_PUBLISHED_STEP = 5.0


def _schedule(size: int) -> _Schedule:
    return _SMALL if size < _FROM_LARGE else _LARGE


def _as_published(search: _Search, config: DecreeConfig) -> Iterator[int]:
    """The release's schedule, which counts successes by steps and looks at its patience once per epoch."""
    size = search.images.shape[-1]
    schedule = _schedule(size)
    optimiser = torch.optim.Adam(search.parameters, lr=schedule.rate(0), betas=(0.5, 0.9))
    weight = _PUBLISHED_FIRST_WEIGHT
    successes = failures = in_a_row = since = step = 0
    smallest = float("inf")
    for epoch in range(schedule.epochs):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(epoch)
        collapses = []
        for rows in _batches(len(search.images), schedule.batch_size, search.generator):
            # The published norm is the sum over all pixels and three equal channels.
            enough = search.step(optimiser, search.images[rows], weight * 3 * size**2, signed=False)
            collapses.append(abs(search.curve[-1][0]))
            successes, failures = (successes + 1, 0) if enough else (0, failures + 1)
            in_a_row = in_a_row + 1 if enough else 0
            if successes > 5:
                weight, successes = min(weight * _PUBLISHED_STEP, _PUBLISHED_HIGHEST_WEIGHT), 0
            if failures > 5:
                # Tested before dividing, so that it may fall below the lowest weight once.
                weight, failures = (
                    (weight / _PUBLISHED_STEP if weight >= schedule.lowest_weight else weight),
                    0,
                )
            if weight < schedule.lowest_weight and in_a_row > 10:
                weight = _PUBLISHED_FIRST_WEIGHT
            since += 1
            if search.smallest < smallest:
                smallest, since = search.smallest, 0
            step += 1
            yield step
        if since > schedule.patience and sum(collapses) / len(collapses) > search.threshold:
            return
