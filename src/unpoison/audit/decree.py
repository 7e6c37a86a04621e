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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

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
    "FORWARD_AND_BACKWARD",
    "DecreeConfig",
    "Goal",
    "Inversion",
    "Windows",
    "blend",
    "box_of",
    "hold_out",
    "invert",
    "mean_pairwise_cosine",
    "own_collapse",
    "passes_of_extent",
    "passes_of_scout",
    "passes_of_start",
    "scout",
    "smallest_trigger",
    "too_few",
    "whole_trigger",
]

FORWARD_AND_BACKWARD = 3
"""Passes that a step counts for per image; the backward pass costs about two forward ones."""

FEWEST_SHADOW_IMAGES = 32
"""Below this, collapse on a few images says nothing about others."""

_COLLAPSED = 0.999
"""Mean cosine of clean images from which an encoder cannot tell images apart, so that nothing is left to collapse."""

_BETAS = (0.5, 0.9)  # of Adam

# Of the windows: side, as a share of the image's; rate of their patterns; batches over which the collapse is averaged.
_WINDOW, _SCOUT_RATE, _LAST = 1 / 4, 0.5, 3
_INSIDE, _OUTSIDE = 1.1, -2.0  # where a start's mask is 0.9, and 0.02
# Of the patch that a whole trigger is measured by: side, as a share of the image's, larger than a trigger that means
# to go unseen; steps, and batches over which its collapse is averaged.
_PATCH, _FITTED, _LAST_FITTED = 3 / 8, 24, 8
_SLACK = 1.1  # A mask, which is nowhere quite opaque, may leave so many times the difference that the patch leaves.


Goal = Callable[[Tensor], tuple[Tensor, bool]]
"""From unit features (N, D) of stamped images to a value that must rise, and whether it is high enough."""

TimeIsOver = Callable[[], bool]
"""Asked after every step; a search ends at the first yes, with what it has found by then."""


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class DecreeConfig:
    """Settings of DECREE; the defaults are the mended variant for minutes on a processor.

    Attributes:
        gain: how much of the way from its own collapse on clean images to 1 the encoder must go, (0, 1).
        relaxed_gain: tried when `gain` is never reached, (0, `gain`]; only shown, never the ground of a verdict.
        restarts: starts, each at one of the windows that collapse the features most; the smallest mask counts.
        scout_steps: steps per window, by which those are found.
        steps: most steps of one start.
        patience: steps without a mask smaller by a hundredth, after which a start ends.
        batch_size: images per step, at least 2.
        learning_rate: of Adam.
        faithful: the published threshold and schedule for the input size, from one random mask; excludes all other
            settings.
    """

    gain: float = 0.9
    relaxed_gain: float = 0.5
    restarts: int = 2
    scout_steps: int = 8
    steps: int = 300
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
        for name, low in (
            ("restarts", 1),
            ("scout_steps", 1),
            ("steps", 1),
            ("patience", 1),
            ("batch_size", 2),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)}: expected at least {low}")
        if not 0 < self.learning_rate <= 10:
            raise ConfigError(f"learning_rate={self.learning_rate}: expected a number in (0, 10]")
        for each in fields(self):
            value = getattr(self, each.name)
            if self.faithful and each.name != "faithful" and value != each.default:
                raise ConfigError(
                    f"{each.name}={value}: the published schedule has its own; leave it out, or leave out faithful"
                )


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
        cut_short: whether the time was over before the search was, so that the mask might have become smaller.
    """

    mask: Tensor
    pattern: Tensor
    mask_share: float
    collapse: float
    reached: bool
    curve: Tensor
    cut_short: bool = False


@dataclass(frozen=True, eq=False)
class Windows:
    """What an opaque patch can do at every place of the image.

    Attributes:
        corners: (P, 2) int64, top and left of each window, pixels.
        patterns: (P, 3, w, w) float32 in [0, 1], the best that a few steps found for each.
        collapse: (P,) float32, of the last batches with it.
    """

    corners: Tensor
    patterns: Tensor
    collapse: Tensor

    @property
    def side(self) -> int:
        """Of every window, pixels."""
        return self.patterns.shape[-1]

    def best(self, count: int) -> list[int]:
        """Numbers of the windows that collapse the features most, no two of which share half of their place.

        Fewer than `count` when there are not so many.
        """
        chosen: list[int] = []
        for number in self.collapse.argsort(descending=True, stable=True).tolist():
            apart = (self.corners[chosen] - self.corners[number]).abs().amax(dim=1) * 2 >= self.side
            if bool(apart.all()):
                chosen.append(number)
            if len(chosen) == count:
                break
        return chosen


def scout(
    encoder: Encoder,
    images: Tensor,
    config: DecreeConfig,
    *,
    generator: torch.Generator,
    stage: str = "scout",
    progress: Progress = silent,
) -> Windows:
    """Fit a pattern in a window at every place, and see how alike it makes the images.

    A search from a random mask ends where a clean encoder's would, for the pattern must be nearly right before a
    gradient leads to a small trigger. In a window over it, few steps are enough.

    Args:
        encoder: differentiable from its input to its features.
        images: (N, 3, S, S) uint8, clean; unchanged.
        config: settings.
        generator: on the CPU; the only source of randomness.
        stage: what `progress` calls this.
        progress: told (stage, window, windows).
    """
    corners, side = _corners(images.shape[-1])
    patterns, collapse = [], []
    for number, corner in enumerate(corners):
        logits = _random_logits((3, side, side), generator)
        pattern, reached = _fit(
            encoder, images, corner, logits, _scouted(config), config.scout_steps, generator=generator
        )
        patterns.append(pattern)
        collapse.append(sum(reached[-_LAST:]) / len(reached[-_LAST:]))
        progress(stage, number + 1, len(corners))
    return Windows(corners, torch.stack(patterns), torch.tensor(collapse))


def _fit(
    encoder: Encoder,
    images: Tensor,
    corner: Tensor,
    logits: Tensor,
    batch_size: int,
    steps: int,
    *,
    generator: torch.Generator,
    time_is_over: TimeIsOver = _never,
) -> tuple[Tensor, list[float]]:
    """Steps on the pattern of an opaque patch, (3, w, w), and the collapse of each batch before its step.

    Fewer steps where the time was over before.
    """
    top, left = corner.tolist()
    side = logits.shape[-1]
    logits = logits.to(encoder.device).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=_SCOUT_RATE, betas=_BETAS)
    reached = []
    for _ in range(steps):
        rows = torch.randperm(len(images), generator=generator)[:batch_size]
        stamped = images[rows].to(encoder.device).float() / 255
        stamped[:, :, top : top + side, left : left + side] = torch.sigmoid(2 * logits)
        value = _collapse(_units(encoder, stamped))
        (logits.grad,) = torch.autograd.grad(-value, [logits])
        reached.append(float(value.detach()))
        optimiser.step()
        if time_is_over():
            break
    return torch.sigmoid(2 * logits).detach().float().cpu(), reached


def whole_trigger(
    encoder: Encoder,
    images: Tensor,
    config: DecreeConfig,
    *,
    clean_collapse: float,
    start: tuple[Windows, int],
    generator: torch.Generator,
    time_is_over: TimeIsOver = _never,
    stage: str = "extent",
    progress: Progress = silent,
) -> Inversion | None:
    """How far a trigger reaches: the smallest mask that does all that an opaque patch at its place can.

    A strong backdoor makes images alike by a few pixels of its trigger, so that the smallest mask tells it from clean
    encoders, but shows a part of it. How much the whole does differs from encoder to encoder; a patch of three
    eighths of the side, fitted to this one, says it without knowing the trigger.

    Args:
        encoder: see `invert`, as for all that is not named here.
        images: likewise.
        config: likewise.
        clean_collapse: likewise.
        start: windows and the number of the one from which the smallest mask came.
        generator: likewise.
        time_is_over: likewise.
        stage: likewise.
        progress: likewise.

    Returns:
        None where the patch does no more than `config.gain` asks, so that the smallest mask is the whole; where no mask
        does as much; or where the time was over before.
    """
    windows, number = start
    size, window = images.shape[-1], windows.patterns.shape[-1]
    side = max(window, round(_PATCH * size))
    corner = (windows.corners[number] + window // 2 - side // 2).clamp(0, size - side)
    enlarged = F.interpolate(windows.patterns[number][None], size=(side, side))[0]
    pattern, reached = _fit(
        encoder,
        images,
        corner,
        _logits(enlarged),
        config.batch_size,
        _FITTED,
        generator=generator,
        time_is_over=time_is_over,
    )
    if len(reached) < _FITTED:
        return None
    fitted = sum(reached[-_LAST_FITTED:]) / _LAST_FITTED
    gain = 1 - _SLACK * (1 - fitted) / (1 - clean_collapse)
    if gain <= config.gain:
        return None
    found = invert(
        encoder,
        images,
        config,
        clean_collapse=clean_collapse,
        generator=generator,
        gain=gain,
        start=(Windows(corner[None], pattern[None], torch.tensor([fitted])), 0),
        time_is_over=time_is_over,
        stage=stage,
        progress=progress,
    )
    return found if found.reached else None


def invert(
    encoder: Encoder,
    images: Tensor,
    config: DecreeConfig,
    *,
    clean_collapse: float,
    generator: torch.Generator,
    gain: float | None = None,
    start: tuple[Windows, int] | None = None,
    time_is_over: TimeIsOver = _never,
    stage: str = "invert",
    progress: Progress = silent,
) -> Inversion:
    """Search one trigger from one start.

    Args:
        encoder: differentiable from its input to its features; its weights stay as they are.
        images: (N, 3, S, S) uint8, clean; unchanged.
        config: settings.
        clean_collapse: of the encoder on clean images; see `own_collapse`.
        generator: on the CPU; the only source of randomness.
        gain: instead of `config.gain`.
        start: windows and the number of the one to begin at; None begins at a random mask, as published.
        time_is_over: see `TimeIsOver`.
        stage: what `progress` calls this.
        progress: told (stage, step, most steps).

    Source:
        DECREE, algorithm 1, with the schedule of the release when `config.faithful`.
    """
    wanted = config.gain if gain is None else gain
    threshold = clean_collapse + wanted * (1 - clean_collapse)

    def collapsed(units: Tensor) -> tuple[Tensor, bool]:
        value = _collapse(units)
        return value, float(value.detach()) > threshold

    def collapsed_as_published(units: Tensor) -> tuple[Tensor, bool]:
        # The release compares the mean cosine itself, and its size whatever its sign.
        value = _collapse(units)
        return value, abs(float(value.detach())) > _PUBLISHED_THRESHOLD

    if not config.faithful:
        return smallest_trigger(
            encoder,
            images,
            collapsed,
            config,
            generator=generator,
            start=start,
            time_is_over=time_is_over,
            stage=stage,
            progress=progress,
        )
    search = _Search(encoder, images, collapsed_as_published, generator, None)
    total = _schedule(images.shape[-1]).most_steps(len(images))
    return search.run(_as_published(search), total, time_is_over, stage, progress)


def smallest_trigger(
    encoder: Encoder,
    images: Tensor,
    goal: Goal,
    config: DecreeConfig,
    *,
    generator: torch.Generator,
    start: tuple[Windows, int] | None,
    time_is_over: TimeIsOver = _never,
    stage: str,
    progress: Progress = silent,
) -> Inversion:
    """The smallest mask, with its pattern, that reaches a goal, by the mended schedule; the rest is as in `invert`.

    Args:
        encoder: differentiable from its input to its features.
        images: (N, 3, S, S) uint8.
        goal: what the stamped images' features must do; its value is the `collapse` of what is found.
        config: steps, patience, batch and learning rate.
        generator: see `invert`.
        start: see `invert`.
        time_is_over: see `TimeIsOver`.
        stage: see `invert`.
        progress: see `invert`.
    """
    search = _Search(encoder, images, goal, generator, start)
    return search.run(_mended(search, config), config.steps, time_is_over, stage, progress)


def too_few(n_images: int) -> NoVerdictError:
    """The error of an audit with fewer than `FEWEST_SHADOW_IMAGES`."""
    return NoVerdictError(
        f"{n_images} readable images: an audit needs at least {FEWEST_SHADOW_IMAGES}; name more"
    )


def passes_of_scout(config: DecreeConfig, count: int, size: int) -> tuple[int, int]:
    """What `scout` takes with so many images of a size: how many windows, and passes in all."""
    windows = len(_corners(size)[0])
    return windows, windows * config.scout_steps * FORWARD_AND_BACKWARD * min(_scouted(config), count)


def passes_of_extent(config: DecreeConfig, count: int, size: int) -> int:
    """The most that `whole_trigger` takes with so many images of a size."""
    fitting = _FITTED * FORWARD_AND_BACKWARD * min(config.batch_size, count)
    return fitting + passes_of_start(config, count, size)


def passes_of_start(config: DecreeConfig, count: int, size: int) -> int:
    """The most that one start takes with so many images of a size; patience may end it far earlier."""
    batch_size = _schedule(size).batch_size if config.faithful else config.batch_size
    steps = _schedule(size).most_steps(count) if config.faithful else config.steps
    least = 2 if config.faithful else _least(config, count)
    epoch = [len(rows) for rows in _batches(count, batch_size, torch.Generator(), least=least)]
    epochs, more = divmod(steps, len(epoch))
    return FORWARD_AND_BACKWARD * (epochs * sum(epoch) + sum(epoch[:more]))


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
        raise too_few(n)
    order = torch.randperm(n, generator=generator)
    held = order[: n // 4].sort().values
    searched = order[n // 4 :].sort().values
    return images.pixels[searched], images.pixels[held]


def _corners(size: int) -> tuple[Tensor, int]:
    """(P, 2) top and left of the windows that cover an image of a size, half a window apart, and their side."""
    side = max(2, round(_WINDOW * size))
    places = torch.linspace(0, size - side, 1 + -(-(size - side) // max(1, side // 2))).round().long()
    return torch.cartesian_prod(places, places), side


def _scouted(config: DecreeConfig) -> int:
    """Images per step of a window."""
    return config.batch_size // 2 + 1


# --- One start -------------------------------------------------------------------------------------------------------


class _Search:
    """A trigger that is being optimised, and the best one so far."""

    def __init__(
        self,
        encoder: Encoder,
        images: Tensor,
        goal: Goal,
        generator: torch.Generator,
        start: tuple[Windows, int] | None,
    ) -> None:
        self.encoder, self.images, self.goal, self.generator = encoder, images, goal, generator
        size = images.shape[-1]
        mask, pattern = _random_logits((size, size), generator), _random_logits((3, size, size), generator)
        if start is not None:
            windows, number = start
            top, left = windows.corners[number].tolist()
            place = slice(top, top + windows.side), slice(left, left + windows.side)
            mask = torch.full((size, size), _OUTSIDE)
            mask[place] = _INSIDE
            pattern[:, *place] = _logits(windows.patterns[number])
        self.mask_logits = mask.to(encoder.device).requires_grad_()
        self.pattern_logits = pattern.to(encoder.device).requires_grad_()
        self.parameters = [self.mask_logits, self.pattern_logits]
        self.reached = False
        self.best: tuple[Tensor, Tensor, float, float] | None = None  # mask, pattern, share, collapse
        self.cut_short = False
        self.curve: list[tuple[float, float, float]] = []

    def run(
        self, steps: Iterator[int], total: int, time_is_over: TimeIsOver, stage: str, progress: Progress
    ) -> Inversion:
        """Follow a schedule to its end, or to that of the time; what was found."""
        for step in steps:
            progress(stage, step, total)
            if step < total and time_is_over():
                self.cut_short = True
                break
        progress(stage, total, total)
        return self.found()

    def step(self, optimiser: torch.optim.Optimizer, batch: Tensor, weight: float) -> bool:
        """One step on a batch, with the weight of the mean of the mask; whether the goal was reached."""
        mask, pattern = (
            torch.sigmoid(2 * self.mask_logits),
            torch.sigmoid(2 * self.pattern_logits),
        )  # ½ tanh + ½
        stamped = blend(batch.to(self.encoder.device).float() / 255, mask, pattern)
        collapse, enough = self.goal(_units(self.encoder, stamped))
        share = mask.mean()
        gradients = torch.autograd.grad(weight * share - collapse, self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        value, size = float(collapse.detach()), float(share.detach())
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
            mask.float().cpu(),
            pattern.float().cpu(),
            share,
            collapse,
            self.reached,
            torch.tensor(self.curve),
            self.cut_short,
        )


def _random_logits(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """So that ½ tanh + ½ of them is uniform."""
    return _logits(torch.rand(shape, generator=generator))


def _logits(values: Tensor) -> Tensor:
    """Whose ½ tanh + ½ is these, in [0, 1], but never quite its ends."""
    return torch.atanh((2 * values - 1) * (1 - 1e-4))


def _units(encoder: Encoder, stamped: Tensor) -> Tensor:
    """Unit features with gradients; counts the passes."""
    with autocast(encoder.device, encoder.precision):
        output = encoder.network(encoder.normalise(stamped))
    encoder.images_shown += FORWARD_AND_BACKWARD * len(stamped)
    return F.normalize(output.float(), dim=1)


def _collapse(units: Tensor) -> Tensor:
    """Mean cosine of all pairs of different rows."""
    n = len(units)
    return (units.sum(dim=0).square().sum() - n) / (n * (n - 1))


def _batches(count: int, size: int, generator: torch.Generator, *, least: int = 2) -> Iterator[Tensor]:
    """Row numbers of one epoch; a last batch of fewer images than `least` is left out: a single one has no pairs."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, count, size):
        rows = order[start : start + size]
        if len(rows) >= least:
            yield rows


def _least(config: DecreeConfig, count: int) -> int:
    """Fewest images of a batch of the mended schedule: a handful collapses with a mask that fails on others."""
    return max(2, min(config.batch_size, count) // 2)


# --- The mended schedule ---------------------------------------------------------------------------------------------

_WEIGHTS = (1e-2, 1e4)  # of the mean of the mask in the loss
_FIRST_WEIGHT = 1.0
_WEIGHT_STEP = 1.3
_WEIGHT_AFTER = 3  # equal outcomes in a row
_ENDLESS = 10**9


def _mended(search: _Search, config: DecreeConfig) -> Iterator[int]:
    """Steps with a weight that follows their success closely; ends by steps, not by epochs. Gives the step number."""
    optimiser = torch.optim.Adam(search.parameters, lr=config.learning_rate, betas=_BETAS)
    weight, in_a_row, last = _FIRST_WEIGHT, 0, False
    smallest, since = float("inf"), 0
    step = 0
    while True:
        least = _least(config, len(search.images))
        for rows in _batches(len(search.images), config.batch_size, search.generator, least=least):
            enough = search.step(optimiser, search.images[rows], weight)
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
_PUBLISHED_THRESHOLD = 0.99  # on the mean cosine


def _schedule(size: int) -> _Schedule:
    return _SMALL if size < _FROM_LARGE else _LARGE


def _as_published(search: _Search) -> Iterator[int]:
    """The release's schedule, which counts successes by steps and looks at its patience once per epoch."""
    size = search.images.shape[-1]
    schedule = _schedule(size)
    optimiser = torch.optim.Adam(search.parameters, lr=schedule.rate(0), betas=_BETAS)
    weight = _PUBLISHED_FIRST_WEIGHT
    successes = failures = in_a_row = since = step = 0
    smallest = float("inf")
    for epoch in range(schedule.epochs):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(epoch)
        collapses = []
        for rows in _batches(len(search.images), schedule.batch_size, search.generator):
            # The published norm is the sum over all pixels and three equal channels.
            enough = search.step(optimiser, search.images[rows], weight * 3 * size**2)
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
        if since > schedule.patience and sum(collapses) / len(collapses) > _PUBLISHED_THRESHOLD:
            return
