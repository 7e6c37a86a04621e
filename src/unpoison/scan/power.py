"""What would this scan have caught? The smallest poison that it finds with a stated probability.

"No evidence" says little unless one knows what would have been. A scan finds a trigger when three of the images that
its rounds score show it, for these lead the second look to the others, when five of those that it looks at show it, too
(without a second look, five in the rounds), and when its patch then passes the confirmation.
The probabilities follow from the settings, given what an attack is like; the assumptions stand beside the number,
because it is no better than they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from unpoison.scan.config import MOST_FINALISTS, ScanConfig, held_out_count
from unpoison.scan.confirm import MIN_SOURCES, SMALLEST_RATE, binomial_tail
from unpoison.scan.flip_test import RACE
from unpoison.scan.search import FEWEST_SUPPORTERS

__all__ = ["Attack", "Power", "detection_probability", "power_statement"]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """The attack that a power statement is about.

    Attributes:
        localised: share of the poisoned images whose window frames the trigger, so that the patch works elsewhere.
        moved: share of other images that such a patch moves to the target, and its control does not.
    """

    localised: float = 0.5
    moved: float = 0.2


@dataclass(frozen=True, kw_only=True)
class Power:
    """The power statement.

    Attributes:
        smallest_count: poisoned images from which a scan catches them with `probability`; None when no number of
            them, up to all, is caught so surely.
        share: the same as a share of the readable images.
        probability: of catching so many.
        attack: what was assumed of the attack.
        sentence: all of it in words.
        why: where there is no number: what stands in the way.
    """

    smallest_count: int | None
    share: float | None
    probability: float
    attack: Attack
    sentence: str
    why: str


def power_statement(
    config: ScanConfig,
    n_images: int,
    image_size: int,
    *,
    tau: float = SMALLEST_RATE,
    probability: float = 0.95,
    attack: Attack | None = None,
) -> Power:
    """The smallest poison that a scan with these settings catches with this probability.

    Args:
        config: resolved settings.
        n_images: readable images.
        image_size: side of the encoder's input, pixels.
        tau: rate that the confirmation asks a patch to exceed.
        probability: wanted, (0, 1).
        attack: what to assume.
    """
    attack = attack or Attack()

    def caught(count: int) -> bool:
        return detection_probability(count, config, n_images, tau=tau, attack=attack) >= probability

    smallest = None
    if caught(n_images):
        low, high = 0, n_images
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if caught(middle) else (middle, high)
        smallest = high
    why = ""
    side = f"an opaque patch of up to about {config.window} of {image_size} pixels per side"
    if smallest is None:
        why = f"there are too few images to confirm a patch that moves {attack.moved:.0%} of them"
        if _confirmation_power(held_out_count(n_images), config.alpha, tau, attack.moved) >= probability:
            why = (
                "so small a search comes across too few of its images; allow more passes, or name more images"
            )
        if tau >= attack.moved:
            why = (
                f"a patch had to move more than {tau:.0%} of the images to stand out from innocent windows, and "
                f"{attack.moved:.0%} are assumed"
            )
        sentence = (
            f"No amount of poison with {side} would have been caught with a probability of {probability:.0%}, at best "
            f"with {detection_probability(n_images, config, n_images, tau=tau, attack=attack):.0%}: {why}"
        )
    else:
        sentence = (
            f"Poison with {side} would have been caught with a probability of at least {probability:.0%} in "
            f"{smallest} images ({smallest / n_images:.2%}) or more, if the encoder learned from it so far that the "
            f"patch moves {attack.moved:.0%} of other images, if the search framed it in {attack.localised:.0%} of the "
            "images that carry it, and if these gather in clusters of their own or of average size"
        )
    return Power(
        smallest_count=smallest,
        share=None if smallest is None else smallest / n_images,
        probability=probability,
        attack=attack,
        sentence=sentence,
        why=why,
    )


def detection_probability(
    count: int,
    config: ScanConfig,
    n_images: int,
    *,
    tau: float = SMALLEST_RATE,
    attack: Attack | None = None,
) -> float:
    """Probability that a scan catches `count` poisoned images of one trigger, [0, 1].

    The poison fills clusters of average size, and shares one with other images where it is too little for that. A
    cluster in which no trigger was framed is dropped with probability `prune` after each round, one in which
    one was is never dropped.

    Source:
        Extends the miss probability of the published search, P = r q / (1 - (1 - r) q), q = (1 - h)^s, to several hits,
        several clusters and a limited number of rounds; h = purity · `localised`.
    """
    assert config.clusters is not None, "the config is resolved before its power is computed"
    attack = attack or Attack()
    held_out = held_out_count(n_images)
    searched = 1 - held_out / n_images
    per_cluster = searched * n_images / config.clusters
    full, rest = divmod(count * searched, per_cluster)
    rounds = min(_rounds(config), max(1, int(per_cluster) // config.samples))
    # A second look finds the other images; without one, the rounds themselves must have found enough.
    needed = FEWEST_SUPPORTERS if config.score == "directed" else MIN_SOURCES
    shown = attack.localised * (1 - RACE.beta if config.race else 1)  # a race drops some
    pure = _hits_of_a_cluster(shown, config, rounds, needed)
    hits = _hits_of_a_cluster(rest / per_cluster * shown, config, rounds, needed)
    for _ in range(min(int(full), config.clusters, 64)):  # more clusters only make it surer
        hits = _add(hits, pure)
    gathered = 1.0
    if config.score == "directed":
        looked_at = min(config.exploit, int(count * searched))
        gathered = binomial_tail(MIN_SOURCES, looked_at, attack.localised)
    return hits[needed] * gathered * _confirmation_power(held_out, config.alpha, tau, attack.moved)


def _rounds(config: ScanConfig) -> int:
    """Rounds of the search."""
    assert config.clusters is not None, "the config is resolved before its power is computed"
    alive, rounds = config.clusters, 1
    while dropped := int(config.prune * alive):
        alive, rounds = alive - dropped, rounds + 1
    return rounds


def _hits_of_a_cluster(hit: float, config: ScanConfig, rounds: int, needed: int) -> list[float]:
    """Probabilities of 0, 1, … and at least `needed` images of a cluster that show the trigger; `hit` of one image."""
    one = [1 - hit, hit, *([0.0] * (needed - 1))]
    drawn = [1.0, *([0.0] * needed)]
    for _ in range(config.samples):
        drawn = _add(drawn, one)
    alive, dropped = [1.0, *([0.0] * needed)], 0.0
    for number in range(rounds):
        alive = _add(alive, drawn)
        if number < rounds - 1:
            dropped += config.prune * alive[0]
            alive[0] *= 1 - config.prune
    return [alive[0] + dropped, *alive[1:]]


def _add(first: list[float], second: list[float]) -> list[float]:
    """Distribution of the sum of two numbers of hits; the last entry means "so many or more"."""
    most = len(first) - 1
    total = [0.0] * (most + 1)
    for i, p in enumerate(first):
        for j, q in enumerate(second):
            total[min(i + j, most)] += p * q
    return total


def _confirmation_power(n: int, alpha: float, tau: float, moved: float) -> float:
    """Probability that a patch which moves this share passes both tests, beside as many finalists as there may be."""
    level = alpha / MOST_FINALISTS
    passing = next(
        (
            hits
            for hits in range(1, n + 1)
            if binomial_tail(hits, n, tau) <= level and binomial_tail(hits, hits, 0.5) <= level
        ),
        None,
    )
    return 0.0 if passing is None else binomial_tail(passing, n, moved)
