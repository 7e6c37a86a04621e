"""Does a patch flip images, or not? A sequential test on counts, with stated error rates.

Most windows flip next to nothing and most triggers flip many images, so the first few images usually tell. After
every batch the likelihood of the hits seen so far under "a share `rate` of the images flips" is divided by that under
"a share `null_rate`". A candidate is dropped once this ratio has fallen to beta, and kept once it has risen to 1/alpha.

The ratio is an e-value: where the null rate is the true one its average is 1 at every moment, so it ever reaches
1/alpha with probability at most alpha, whenever one looks (Ville's inequality); its reciprocal is one for the other
rate. Wald's own limits, ln((1-β)/α) and ln(β/(1-α)), hold only approximately; these hold exactly, in any batches.

Flip images are drawn from a set of F without replacement. Then the counts are hypergeometric, the ratio knows how many
flips can still come, and the error rates are about what the whole set would have said.

Sources: Wald, Sequential Tests of Statistical Hypotheses, 1945; Ville, Étude critique de la notion de collectif, 1939.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unpoison.errors import ConfigError, ShapeError

__all__ = ["DROPPED", "KEPT", "OPEN", "SequentialTest", "e_benjamini_hochberg"]

DROPPED, OPEN, KEPT = -1, 0, 1
"""What a look decides of a candidate."""


@dataclass(frozen=True, kw_only=True)
class SequentialTest:
    """A test of "few images flip" against "many do", looked at after every batch.

    Attributes:
        null_rate: share of images that a harmless patch flips at the most, [0, rate).
        rate: share that a patch worth keeping flips at the least, (null_rate, 1).
        alpha: probability with which a patch of the null rate or below is ever kept, [0, 1); 0 = never keep early.
        beta: probability with which a patch of the rate or above is ever dropped, [0, 1); 0 = never drop.
        batch: images between two looks.
    """

    null_rate: float = 0.01
    rate: float = 0.1
    alpha: float = 0.001
    beta: float = 0.02
    batch: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.null_rate < self.rate < 1:
            raise ConfigError(
                f"null_rate={self.null_rate}, rate={self.rate}: expected shares, 0 <= null_rate < rate < 1"
            )
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected an error rate in [0, 1)")
        if self.batch < 1:
            raise ConfigError(f"batch={self.batch}: expected at least 1 image between two looks")

    def looks(self, population: int) -> list[int]:
        """Numbers of images after which one looks, below the whole set of `population` images.

        >>> SequentialTest(batch=32).looks(96)
        [32, 64]
        """
        if self.beta == 0 and self.alpha == 0:
            return []
        return list(range(self.batch, population, self.batch))

    def log_e_value(self, hits: Tensor, trials: int, population: int | None = None) -> Tensor:
        """Logarithm of the likelihood of the hits at `rate`, divided by that at `null_rate`.

        Args:
            hits: (n,) integers, 0..trials, of each candidate.
            trials: images so far, the same for all candidates.
            population: images in the set that they are drawn from, without replacement; None draws them
                independently. The rates are then rounded to whole images: the null rate down, the rate up.

        Returns:
            (n,) float64, -inf where the hits are impossible at `rate`, inf where they are at `null_rate` only.

        Raises:
            ShapeError: a count lies outside 0..trials, or more images were drawn than there are.
        """
        if trials < 0 or (population is not None and trials > population):
            raise ShapeError(f"trials must be 0..{population or 'any'}, got {trials}")
        if len(hits) and (int(hits.min()) < 0 or int(hits.max()) > trials):
            raise ShapeError(f"hits must be 0..{trials}, got {int(hits.min())}..{int(hits.max())}")
        count = hits.double()
        if population is None:
            return _log_binomial(count, trials, self.rate) - _log_binomial(count, trials, self.null_rate)
        # A hair's breadth keeps 0.1 · 30 = 3.0000000000000004 at three images.
        many = min(population, math.ceil(self.rate * population - 1e-9))
        few = min(many - 1, math.floor(self.null_rate * population + 1e-9))
        above, below = (_log_hypergeometric(count, trials, marked, population) for marked in (many, few))
        # Counts that neither share can give, nearly at the end of the set, speak for the one that they lie beyond.
        neither = torch.where(count > few, torch.where(count < many, 0.0, torch.inf), -torch.inf)
        return torch.where(above.isinf() & below.isinf(), neither, above - below)

    def decide(self, hits: Tensor, trials: int, population: int | None = None) -> Tensor:
        """What one look says: (n,) int8, `DROPPED`, `OPEN` or `KEPT`; arguments as in `log_e_value`."""
        ratio = self.log_e_value(hits, trials, population)
        decision = torch.full(ratio.shape, OPEN, dtype=torch.int8, device=ratio.device)
        if self.beta > 0:
            decision[ratio <= math.log(self.beta)] = DROPPED
        if self.alpha > 0:
            decision[ratio >= -math.log(self.alpha)] = KEPT
        return decision

    def most_hits_dropped(self, trials: int, population: int | None = None) -> int:
        """With so many hits or fewer a look after `trials` images drops a candidate; -1 where it drops none.

        >>> SequentialTest(rate=0.1, beta=0.02).most_hits_dropped(32, 96)
        0
        """
        decisions = self.decide(torch.arange(trials + 1), trials, population)
        return int((decisions == DROPPED).sum()) - 1


def e_benjamini_hochberg(e_values: Tensor, level: float) -> Tensor:
    """Which of many candidates to call triggers, so that at most a share `level` of those called is none.

    Holds for e-values that depend on each other in any way, as those of candidates pasted on the same images do.

    Args:
        e_values: (n,) float ≥ 0.
        level: allowed false-discovery rate, (0, 1).

    Returns:
        (n,) bool.

    Source:
        Wang and Ramdas, False discovery rate control with e-values, JRSS B 2022.

    >>> e_benjamini_hochberg(torch.tensor([100.0, 30.0, 1.0, 0.2]), 0.1).tolist()
    [True, True, False, False]
    """
    if not 0 < level < 1:
        raise ConfigError(f"level={level}: expected a false-discovery rate between 0 and 1")
    n = len(e_values)
    largest = e_values.sort(descending=True).values
    passing = (largest * torch.arange(1, n + 1, device=e_values.device) * level >= n).nonzero().flatten()
    if len(passing) == 0:
        return torch.zeros(n, dtype=torch.bool, device=e_values.device)
    return e_values >= largest[passing[-1]]


def _log_binomial(hits: Tensor, trials: int, rate: float) -> Tensor:
    """Of hits and misses in a given order: the factor that counts orders cancels in a ratio."""
    share = torch.tensor(rate, dtype=torch.float64, device=hits.device)
    return torch.xlogy(hits, share) + torch.xlogy(trials - hits, 1 - share)


def _log_hypergeometric(hits: Tensor, trials: int, marked: int, population: int) -> Tensor:
    """Of `hits` marked images among `trials` drawn from `population`, less a constant that cancels in a ratio."""
    total = torch.tensor(float(marked), dtype=torch.float64, device=hits.device)
    other = torch.tensor(float(population - marked), dtype=torch.float64, device=hits.device)
    possible = (hits <= total) & (trials - hits <= other)
    value = _log_choose(total, hits.clamp(max=marked)) + _log_choose(
        other, (trials - hits).clamp(max=population - marked)
    )
    return torch.where(possible, value, -torch.inf)


def _log_choose(total: Tensor, chosen: Tensor) -> Tensor:
    return torch.lgamma(total + 1) - torch.lgamma(chosen + 1) - torch.lgamma(total - chosen + 1)
