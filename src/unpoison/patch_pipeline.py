"""The patch search in code: what happens to images and their encoder on the way to confirmed triggers.

images, encoder → features → clusters → search → confirmation → classifier → findings
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pandas
import torch
from torch import Tensor

from unpoison.encoders.encoder import Encoder
from unpoison.encoders.extract import extract_features
from unpoison.errors import ConfigError, NoVerdictError
from unpoison.functional.clustering import kmeans
from unpoison.functional.matching import clearest_match
from unpoison.functional.recurrence import recurring_places
from unpoison.records import (
    BenignPattern,
    Box,
    Clusters,
    Evidence,
    Features,
    ImageSet,
    ScanResult,
    TriggerFinding,
    Verdict,
)
from unpoison.runs import Stages
from unpoison.runtime import Progress, library_versions, stage_generator
from unpoison.scan.candidates import Candidates
from unpoison.scan.config import MOST_PLACES, PICTURES, SHARING, TRIALS, ScanConfig, held_out_count
from unpoison.scan.confirm import (
    MANY_SOURCES,
    MIN_SOURCES,
    SMALLEST_RATE,
    BenignFinding,
    Confirmation,
    Finalist,
    confirm,
    find_benign_patterns,
    find_finalists,
)
from unpoison.scan.cost import ScanCost, expected_cost, fit_budget, fit_second_look
from unpoison.scan.flip_test import FlipTest, nearest_rows
from unpoison.scan.patchsearch import GradCamAttention
from unpoison.scan.poison_classifier import ClassifierConfig, train_poison_classifier
from unpoison.scan.poisoncam import MaskAttention
from unpoison.scan.power import Power, power_statement
from unpoison.scan.search import Attention, Searcher, directed_scores, elect, vote

__all__ = ["GLOBAL_TRIGGERS", "PatchBench", "by_coverage", "coverage", "search_patches"]

Cached = Callable[[str, Callable[[], Candidates]], Candidates]

GLOBAL_TRIGGERS = "triggers that cover the whole image (frequency, blended, warping)"
"""What a patch search never finds; a sentence of the scope."""

_SECOND_LOOK_STEP = 100
_SHARE_IN_ENCODER = 0.7
"""Of the seconds that `max_seconds` leaves after the clusters; cutting, pasting and the report take the others."""

_SHARE_OF_THE_SECOND_LOOK = 0.85
"""Of the seconds that the rounds leave; cutting and pasting are in their rate already, the report is not."""

_SHOWN, _MATCHED_AT_ONCE = 8, 256
"""Windows of a trigger that flagged images are compared with, and images at once."""


@dataclass(frozen=True, eq=False)
class PatchBench:
    """What every stage of one patch search needs.

    Attributes:
        images: what is searched.
        location: where they came from, for people.
        encoder: the suspect.
        config: resolved settings; `alpha` is the search's own.
        run: keeps the stages.
        seed: of every draw.
        batch_size: images per pass.
        progress: told (stage, done, total).
        asked: resolved settings, before a budget made the search smaller.
    """

    images: ImageSet
    location: str
    encoder: Encoder
    config: ScanConfig
    run: Stages
    seed: int
    batch_size: int
    progress: Progress
    asked: ScanConfig

    def generator(self, stage: str) -> torch.Generator:
        """Of this stage alone, from the seed."""
        return stage_generator(self.seed, f"scan/{stage}")

    def passes(self) -> int:
        """Images that the encoder was shown so far."""
        return self.encoder.images_shown


@dataclass(frozen=True, eq=False)
class _Search:
    """What the search found."""

    candidates: Candidates
    scores: Tensor
    directions: Tensor
    attention: Attention
    flip_test: FlipTest
    held_out: Tensor
    places: tuple[Tensor, ...]


def search_patches(bench: PatchBench, min_coverage: float, started: float) -> ScanResult:
    """Search, confirm, classify: the findings, and everything that verdict.json says of them.

    Args:
        bench: images, encoder, settings.
        min_coverage: share of readable images below which the verdict is `inconclusive`.
        started: by `time.perf_counter`, when the scan began.

    Raises:
        NoVerdictError: features are not finite, or no time is left for the smallest search.
    """
    features = _features(bench)
    clusters = _clusters(bench, features)
    bench = _within_seconds(bench, started)
    bench, search = _search(bench, features, clusters, started)
    finalists = find_finalists(search.candidates, search.scores, bench.images, search.directions)
    confirmations = _confirm(bench, clusters, search, finalists)
    steering = [
        (finalist, said)
        for finalist, said in zip(finalists, confirmations, strict=True)
        if said.p_value <= bench.config.alpha
    ]
    steering.sort(key=lambda pair: pair[1].flip_rate, reverse=True)
    accepted = [(finalist, said) for finalist, said in steering if said.aimed]
    search = _rank_by_confirmed(search, [finalist for finalist, _ in accepted])
    probability, threshold = _classify(bench, clusters, search, [finalist for finalist, _ in accepted])
    triggers = tuple(_trigger(bench, search, finalist, said) for finalist, said in accepted)
    verdict, reason = _judge(bench, finalists, confirmations, bool(triggers), min_coverage)
    harmless = [
        BenignFinding(finalist.members, said.flip_rate, said.control_rate, True, said.concentration)
        for finalist, said in steering
        if not said.aimed
    ]
    harmless += find_benign_patterns(
        search.candidates, bench.images, [finalist for finalist, _ in steering], search.places
    )
    benign = tuple(_benign_pattern(bench, search, found) for found in harmless)
    patterns = [search.candidates.patches[finalist.core[:_SHOWN]] for finalist, _ in accepted]
    findings = _findings(bench, clusters, search, triggers, patterns, probability, threshold)
    evidence = _evidence(bench, search)
    summary = _summary(
        bench, search, verdict, reason, findings, triggers, accepted, finalists, confirmations, started
    )
    summary["benign_patterns"] = [
        {
            "flip_rate": pattern.flip_rate,
            "control_rate": pattern.control_rate,
            "steers": pattern.steers,
            "concentration": pattern.concentration,
            "n_sources": pattern.n_sources,
            "sources": list(pattern.source_ids),
            "image": f"benign/pattern-{number}.png",
        }
        for number, pattern in enumerate(benign, start=1)
    ]
    return ScanResult(verdict, findings, triggers, evidence, summary, benign)


def _judge(
    bench: PatchBench,
    finalists: list[Finalist],
    confirmations: list[Confirmation],
    confirmed: bool,
    min_coverage: float,
) -> tuple[Verdict, str]:
    """The verdict, and what kept it from being a plain one."""
    alpha = bench.config.alpha
    if confirmed:
        return "poisoned", ""
    for finalist, said in zip(finalists, confirmations, strict=True):
        if said.p_value <= alpha:
            return "inconclusive", (
                f"one pattern recurs in {len(finalist.members)} images and moves {said.flip_rate:.0%} of other images, "
                "but it lies on images of all kinds, as a watermark does and an attack on one class does not; look at "
                "these images in the report"
            )
        if said.steering_p_value <= alpha and len(finalist.members) >= MANY_SOURCES:
            return "inconclusive", (
                f"one pattern recurs in {len(finalist.members)} images and moves {said.flip_rate:.0%} of other images, "
                f"but its shuffled pixels move {said.control_rate:.0%} too: the encoder obeys a colour, planted or "
                "natural; look at these images in the report"
            )
    verdict, reason = by_coverage(bench.images, min_coverage)
    lacking = _lacking_power(bench, confirmations)
    if verdict == "no_evidence" and lacking:
        return "inconclusive", lacking
    return verdict, reason


def _lacking_power(bench: PatchBench, confirmations: list[Confirmation]) -> str:
    """Why "nothing found" is no answer of this scan; empty where it is one."""
    config, n_images = bench.config, len(bench.images)
    power = _power_of(bench, config, confirmations)
    smallest = power.smallest_count
    if smallest is None:
        return f"nothing was found, but no amount of poison would have been found surely: {power.why}"
    wanted = config.smallest_poison(n_images)
    if wanted is not None and smallest > wanted:
        return (
            f"nothing was found, but poison is found surely in {smallest} images or more, not yet in the {wanted} that "
            f"min_poison asks for; ask for {smallest}, or scan with another encoder"
        )
    return ""


def by_coverage(images: ImageSet, min_coverage: float) -> tuple[Verdict, str]:
    """The verdict where nothing was found, and its reason: enough of the images must have been read."""
    covered = coverage(images)
    if covered >= min_coverage:
        return "no_evidence", ""
    return "inconclusive", (
        f"{covered:.1%} of the images could be read, less than the {min_coverage:.1%} asked for; repair them, "
        "or lower --min-coverage"
    )


def coverage(images: ImageSet) -> float:
    """Share of the named images that could be read."""
    return len(images) / (len(images) + len(images.skipped))


def _features(bench: PatchBench) -> Features:
    def compute() -> dict[str, Tensor]:
        found = extract_features(
            bench.encoder, bench.images, batch_size=bench.batch_size, progress=bench.progress
        )
        return {"values": found.values}

    return Features(bench.images.ids, bench.run.stage("features", compute, passes=bench.passes)["values"])


def _clusters(bench: PatchBench, features: Features) -> Clusters:
    def compute() -> dict[str, Tensor]:
        assert bench.config.clusters is not None
        found = kmeans(
            features.values.to(bench.encoder.device),
            bench.config.clusters,
            generator=bench.generator("kmeans"),
            progress=lambda done, total: bench.progress("cluster", done, total),
        )
        return {"centroids": found.centroids.cpu(), "assignment": found.assignment.cpu()}

    return Clusters(**bench.run.stage("clusters", compute))


def _within_seconds(bench: PatchBench, started: float) -> PatchBench:
    """The bench with a search that fits what is left of `max_seconds`, at the rate of the features."""
    seconds = bench.config.max_seconds
    if seconds is None:
        return bench
    n_images = len(bench.images)

    def compute() -> dict[str, Tensor]:
        left = max(0.0, seconds - (time.perf_counter() - started)) * _SHARE_IN_ENCODER
        rate = n_images / max(bench.run.seconds["features"], 1e-9)
        return {"passes": torch.tensor(n_images + int(left * rate))}

    # A stage, so that a resumed run goes on with the search that it began with.
    granted = int(bench.run.stage("budget", compute)["passes"])
    try:
        config = fit_budget(bench.config, n_images, bench.images.size, granted)
    except ConfigError as error:
        raise NoVerdictError(
            f"max_seconds={seconds}: too little for the smallest search on this machine; raise it, or scan fewer "
            "images with --sample"
        ) from error
    return replace(bench, config=config)


def _within_what_is_left(bench: PatchBench, n_directions: int, started: float) -> PatchBench:
    """The bench with a second look that fits what the rounds left of a budget, at the rate that they had."""
    config = bench.config
    if n_directions == 0 or (config.max_passes is None and config.max_seconds is None):
        return bench

    def compute() -> dict[str, Tensor]:
        used = bench.run.passes + (config.n_flips or 0)
        left = math.inf if config.max_passes is None else float(config.max_passes - used)
        if config.max_seconds is not None:
            seconds = config.max_seconds - (time.perf_counter() - started)
            rate = bench.run.passes / max(sum(bench.run.seconds.values()), 1e-9)
            left = min(left, _SHARE_OF_THE_SECOND_LOOK * seconds * rate)
        fitted = fit_second_look(config, len(bench.images), bench.images.size, n_directions, int(left))
        return {"exploit": torch.tensor(fitted.exploit)}

    exploit = int(bench.run.stage("left", compute)["exploit"])
    return replace(bench, config=replace(config, exploit=exploit))


def _search(
    bench: PatchBench, features: Features, clusters: Clusters, started: float
) -> tuple[PatchBench, _Search]:
    """Explore as published; then, unless another score is wanted, vote, and look again along the elected directions.

    The bench that comes back has a second look that fits what a budget has left.
    """
    config = bench.config
    assert config.score is not None, "the config is resolved before the search"
    searcher, held_out = _prepare(bench, features, clusters)
    cached = partial(_cached, bench)
    candidates = searcher.explore(cached)
    directions = torch.empty(0, features.values.shape[1])
    places: tuple[Tensor, ...] = ()
    if config.score == "directed":
        directions = _directions(searcher, candidates, cached)
        bench = _within_what_is_left(bench, len(directions), started)
        candidates = _second_look(searcher, candidates, directions, bench.config.exploit, cached)
        candidates, places = _with_shared_places(bench, searcher, candidates, directions, cached)
        scores = directed_scores(candidates, directions)
    else:
        scores = candidates.flips.score(config.score, candidates.own)
    return bench, _Search(
        candidates, scores, directions, searcher.attention, searcher.flip_test, held_out, places
    )


def _cached(bench: PatchBench, name: str, compute: Callable[[], Candidates]) -> Candidates:
    return Candidates.from_tensors(bench.run.stage(name, lambda: compute().to_tensors(), passes=bench.passes))


def _prepare(bench: PatchBench, features: Features, clusters: Clusters) -> tuple[Searcher, Tensor]:
    """The parts of the search, and the images that it must not touch."""
    config = bench.config
    assert config.window is not None and config.n_flips is not None, (
        "the config is resolved before the search"
    )
    n_images = len(bench.images)
    held_out = torch.randperm(n_images, generator=bench.generator("split"))[: held_out_count(n_images)]
    allowed = torch.ones(n_images, dtype=torch.bool)
    allowed[held_out] = False
    rows = nearest_rows(
        features.values, clusters, allowed, config.n_flips, generator=bench.generator("flip set")
    )
    flip_test = FlipTest.draw(
        bench.encoder,
        bench.images,
        clusters,
        rows,
        config.window,
        generator=bench.generator("flip corners"),
        with_control=not config.faithful,
        batch_size=bench.batch_size,
    )
    attention: Attention
    if config.attention == "gradcam":
        attention = GradCamAttention(bench.encoder, clusters, config, batch_size=bench.batch_size)
    else:
        attention = MaskAttention(
            bench.encoder, clusters, config, generator=bench.generator("masks"), batch_size=bench.batch_size
        )
    searcher = Searcher(
        bench.images, clusters, attention, flip_test, config, allowed, bench.generator, bench.progress
    )
    return searcher, held_out


def _directions(searcher: Searcher, explored: Candidates, cached: Cached) -> Tensor:
    """Where the strongest candidates push, tried on windows found by looking along each direction."""
    directions = vote(explored)
    if len(directions) == 0:
        return directions
    strongest = explored.flips.score("concentrated", explored.own).argsort(descending=True, stable=True)
    rows = explored.rows[strongest[:TRIALS]]
    trials = [
        cached(f"trial-{number}", partial(searcher.look_again, rows, direction[None], f"trial/{number}"))
        for number, direction in enumerate(directions)
    ]
    return elect(trials, directions)


def _second_look(
    searcher: Searcher, explored: Candidates, directions: Tensor, exploit: int, cached: Cached
) -> Candidates:
    """Images of the clusters that push along the directions, scored by the windows that carry these."""
    rows = searcher.exploit_rows(explored, directions, exploit)
    found = []
    for start in range(0, len(rows), _SECOND_LOOK_STEP):
        part = rows[start : start + _SECOND_LOOK_STEP]
        name = f"exploit-{start // _SECOND_LOOK_STEP:02d}"
        found.append(cached(name, partial(searcher.look_again, part, directions, name)))
        searcher.progress("search again", start + len(part), len(rows))
    seen_once = explored.take((~torch.isin(explored.rows, rows)).nonzero().flatten())
    return Candidates.concatenate([*found, seen_once])


def _with_shared_places(
    bench: PatchBench, searcher: Searcher, candidates: Candidates, directions: Tensor, cached: Cached
) -> tuple[Candidates, tuple[Tensor, ...]]:
    """The candidates, with windows at which pictures share pixels; and which of them share each place.

    A search by clusters comes across few of these images where they are rare: a logo, or a trigger in a fixed corner.
    """
    side = searcher.config.window
    assert side is not None, "the config is resolved before the search"

    def compute() -> dict[str, Tensor]:
        last = bench.images.size - side
        chosen: dict[int, tuple[int, int, int]] = {}  # an image that shares two places is tried at the first
        for number, place in enumerate(
            recurring_places(
                bench.images.pixels,
                searcher.allowed.nonzero().flatten(),
                max(4, side // 2),
                least=MIN_SOURCES,
                most=MOST_PLACES,
            )
        ):
            middle = ((place.top + place.bottom - side) // 2, (place.left + place.right - side) // 2)
            top, left = (min(max(start, 0), last) for start in middle)
            chosen = dict.fromkeys(place.rows[:SHARING].tolist(), (top, left, number)) | chosen
        where = torch.tensor(list(chosen.values()), dtype=torch.int64).view(-1, 3)
        return {
            "rows": torch.tensor(list(chosen), dtype=torch.int64),
            "corners": where[:, :2],
            "place": where[:, 2],
        }

    found = bench.run.stage("recurrence", compute)
    if len(found["rows"]) == 0:
        return candidates, ()
    shared = cached("places", partial(searcher.try_places, found["rows"], found["corners"], "places"))
    # Of an image that is a candidate already, the window that carries a direction further; without one, what it shares.
    before = {row: number for number, row in enumerate(candidates.rows.tolist())}
    scores, shared_scores = directed_scores(candidates, directions), directed_scores(shared, directions)
    better = torch.tensor(
        [
            len(directions) == 0 or row not in before or bool(shared_scores[number] >= scores[before[row]])
            for number, row in enumerate(shared.rows.tolist())
        ]
    )
    shared, place = shared.take(better.nonzero().flatten()), found["place"][better]
    others = (~torch.isin(candidates.rows, shared.rows)).nonzero().flatten()
    places = tuple(
        len(others) + (place == number).nonzero().flatten() for number in sorted(set(place.tolist()))
    )
    return Candidates.concatenate([candidates.take(others), shared]), places


def _confirm(
    bench: PatchBench, clusters: Clusters, search: _Search, finalists: list[Finalist]
) -> list[Confirmation]:
    said: list[Confirmation] = []

    def compute() -> dict[str, Tensor]:
        said.extend(
            confirm(
                bench.encoder,
                bench.images,
                clusters,
                search.candidates,
                finalists,
                search.held_out,
                search.flip_test,
                alpha=bench.config.alpha,
                generator=bench.generator("confirm"),
                batch_size=bench.batch_size,
            )
        )
        rows = [
            [
                c.flip_rate,
                c.control_rate,
                c.tau,
                c.p_value,
                c.n_images,
                c.steering_p_value,
                math.nan if c.concentration is None else c.concentration,
                c.aimed,
            ]
            for c in said
        ]
        return {"confirmations": torch.tensor(rows, dtype=torch.float64).view(-1, 8)}

    rows = bench.run.stage("confirm", compute, passes=bench.passes)["confirmations"].tolist()
    return [
        Confirmation(r[0], r[1], r[2], r[3], int(r[4]), r[5], None if math.isnan(r[6]) else r[6], bool(r[7]))
        for r in rows
    ]


def _rank_by_confirmed(search: _Search, finalists: list[Finalist]) -> _Search:
    """Scores along the directions of confirmed triggers only.

    A benign window can push harder than a trigger (a pen stroke makes another digit); once it is known which patterns
    are triggers, only their push is evidence of poison.
    """
    if not finalists or len(search.directions) == 0:
        return search
    shift = search.candidates.flips.shift
    pushes = torch.stack([shift[f.members].mean(dim=0) for f in finalists]) - shift.mean(dim=0)
    directions = torch.nn.functional.normalize(pushes, dim=1)
    return replace(search, directions=directions, scores=directed_scores(search.candidates, directions))


def _classify(
    bench: PatchBench, clusters: Clusters, search: _Search, finalists: list[Finalist]
) -> tuple[Tensor | None, float]:
    """Every image's probability of carrying a confirmed trigger; nothing is trained when nothing is confirmed."""
    if not finalists or bench.config.filter_steps == 0:
        return None, 1.0
    candidates = search.candidates
    members = torch.cat([finalist.members for finalist in finalists])
    # Each trigger sends its strongest windows, in turn, until there are top_k.
    turns = [
        int(f.members[place])
        for place in range(max(len(f.members) for f in finalists))
        for f in finalists
        if place < len(f.members)
    ][: bench.config.top_k]
    chosen = torch.tensor(turns)
    suspected = torch.zeros(len(clusters.centroids), dtype=torch.bool)
    suspected[candidates.own[members]] = True
    base = (~suspected[clusters.assignment]).nonzero().flatten()
    if len(base) < 0.2 * len(
        bench.images
    ):  # poison everywhere: leave out only what carries a confirmed trigger
        innocent = torch.ones(len(bench.images), dtype=torch.bool)
        innocent[candidates.rows[members]] = False
        base = innocent.nonzero().flatten()
    harmless = search.scores.argsort(stable=True)[: max(20, len(candidates) // 4)]
    harmless = harmless[~torch.isin(harmless, members)]

    def compute() -> dict[str, Tensor]:
        classifier = train_poison_classifier(
            bench.images,
            candidates.patches[chosen],
            base_rows=base,
            benign_patches=candidates.patches[harmless],
            positives=candidates.rows[chosen],
            config=ClassifierConfig.of_scan(bench.config),
            seed=bench.seed,
            device=str(bench.encoder.device),
            precision="bf16" if bench.encoder.precision == torch.bfloat16 else "fp32",
            progress=bench.progress,
        )
        probability = classifier.probability(bench.images.pixels)
        return {
            "probability": probability,
            "threshold": torch.tensor(classifier.threshold, dtype=torch.float64),
        }

    found = bench.run.stage("classifier", compute)
    return found["probability"], float(found["threshold"])


def _trigger(bench: PatchBench, search: _Search, finalist: Finalist, said: Confirmation) -> TriggerFinding:
    side = search.candidates.patches.shape[-1]
    rows = search.candidates.rows[finalist.members].tolist()
    corners = search.candidates.corners[finalist.members].tolist()
    return TriggerFinding(
        target_cluster=finalist.target_cluster,
        target_clusters=tuple(finalist.attractors.tolist()),
        flip_rate=said.flip_rate,
        control_rate=said.control_rate,
        p_value=said.p_value,
        n_sources=len(rows),
        source_ids=tuple(bench.images.ids[row] for row in rows),
        boxes=tuple(Box(left, top, side, side) for top, left in corners),
        patches=search.candidates.patches[finalist.members],
    )


def _benign_pattern(bench: PatchBench, search: _Search, found: BenignFinding) -> BenignPattern:
    carriers = search.candidates.take(found.members)
    side = carriers.patches.shape[-1]
    return BenignPattern(
        flip_rate=found.flip_rate,
        control_rate=found.control_rate,
        steers=found.steers,
        concentration=found.concentration,
        n_sources=len(carriers),
        source_ids=tuple(bench.images.ids[row] for row in carriers.rows.tolist()),
        boxes=tuple(Box(left, top, side, side) for top, left in carriers.corners.tolist()),
        patches=carriers.patches,
    )


def _carried(
    images: ImageSet, flagged: Tensor, triggers: tuple[TriggerFinding, ...], patterns: Sequence[Tensor]
) -> Tensor:
    """The trigger that each flagged image shows most clearly: (N,) int64 from 1, 0 for the others.

    Not the one whose clusters are nearest: those of two triggers can lie side by side.
    """
    carried = torch.zeros(len(images), dtype=torch.int64)
    if not triggers:
        return carried
    rows = flagged.nonzero().flatten()
    carried[rows] = 1
    if len(triggers) > 1:
        for part in torch.split(rows, _MATCHED_AT_ONCE):
            shown = torch.stack([clearest_match(images.pixels[part], pattern) for pattern in patterns])
            carried[part] = shown.argmax(dim=0) + 1
    row_of = {id_: row for row, id_ in enumerate(images.ids)}
    for number, trigger in enumerate(triggers, start=1):
        carried[[row_of[source] for source in trigger.source_ids]] = number
    return carried


def _findings(
    bench: PatchBench,
    clusters: Clusters,
    search: _Search,
    triggers: tuple[TriggerFinding, ...],
    patterns: Sequence[Tensor],
    probability: Tensor | None,
    threshold: float,
) -> pandas.DataFrame:
    """One row for every image that the source named; what was not examined is empty, not zero."""
    images, candidates = bench.images, search.candidates
    table = pandas.DataFrame({"id": list(images.ids), "cluster": clusters.assignment.numpy()})
    table["scored"] = False
    rows = candidates.rows.numpy()
    table.loc[rows, "scored"] = True
    scores = pandas.Series(search.scores.double().numpy(), index=rows)
    table["poison_score"] = scores.reindex(table.index)
    side = candidates.patches.shape[-1]
    for name, values in (
        ("box_x", candidates.corners[:, 1]),
        ("box_y", candidates.corners[:, 0]),
        ("box_w", torch.full((len(rows),), side)),
        ("box_h", torch.full((len(rows),), side)),
    ):
        table[name] = pandas.Series(values.numpy(), index=rows, dtype="Int32").reindex(table.index)
    sources = {source for trigger in triggers for source in trigger.source_ids}
    if probability is None:
        table["poison_probability"] = float("nan")
        table["flagged"] = table["id"].isin(sources)
    else:
        table["poison_probability"] = probability.double().numpy()
        table["flagged"] = (table["poison_probability"] > threshold) | table["id"].isin(sources)
    flagged = torch.tensor(table["flagged"].to_numpy(dtype=bool))
    carried = _carried(images, flagged, triggers, patterns)
    table["trigger"] = pandas.Series(carried.numpy(), dtype="Int32").where(table["flagged"])
    table["skip_reason"] = None
    skipped = pandas.DataFrame(
        {"id": [s.id for s in images.skipped], "skip_reason": [s.reason for s in images.skipped]}
    )
    if len(skipped):
        skipped["scored"] = skipped["flagged"] = False
        table = pandas.concat([table.astype({"cluster": "Int32"}), skipped], ignore_index=True)
    return table.astype(
        {
            "cluster": "Int32",
            "scored": bool,
            "poison_score": float,
            "box_x": "Int32",
            "box_y": "Int32",
            "box_w": "Int32",
            "box_h": "Int32",
            "poison_probability": float,
            "flagged": bool,
            "trigger": "Int32",
            "skip_reason": "string",  # not str, which would make a word of None before pandas 3
        }
    )


def _evidence(bench: PatchBench, search: _Search) -> Evidence:
    """The highest-scored images with the map that chose their window."""
    best = search.scores.argsort(descending=True, stable=True)[:PICTURES]
    pixels = bench.images.pixels[search.candidates.rows[best]]

    def compute() -> dict[str, Tensor]:
        if len(search.directions):
            heat = search.attention.heat_along(pixels, search.directions[:1])[:, 0]
        else:
            heat = search.attention.heat(pixels)
        heat = heat - heat.amin(dim=(1, 2), keepdim=True)
        return {"attention": heat / heat.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)}

    heat = bench.run.stage("evidence", compute, passes=bench.passes)["attention"]
    ids = tuple(bench.images.ids[row] for row in search.candidates.rows[best].tolist())
    return Evidence(ids, pixels, heat)


def _summary(
    bench: PatchBench,
    search: _Search,
    verdict: Verdict,
    reason: str,
    findings: pandas.DataFrame,
    triggers: tuple[TriggerFinding, ...],
    accepted: list[tuple[Finalist, Confirmation]],
    finalists: list[Finalist],
    confirmations: list[Confirmation],
    started: float,
) -> dict[str, Any]:
    """The content of verdict.json."""
    config, encoder, images = bench.config, bench.encoder, bench.images
    n_scored = int(findings["scored"].sum())
    summary: dict[str, Any] = {
        "schema": 1,
        "verdict": verdict,
        "method": config.method,
        "alpha": config.alpha,
        "p_value": min((said.p_value for said in confirmations), default=None),
        "n_images": len(findings),
        "n_scored": n_scored,
        "n_unscored": len(images) - n_scored,
        "n_skipped": len(images.skipped),
        "n_flagged": int(findings["flagged"].sum()),
        "triggers": [
            {
                "target_cluster": trigger.target_cluster,
                "target_clusters": list(trigger.target_clusters),
                "flip_rate": trigger.flip_rate,
                "control_rate": trigger.control_rate,
                "tau": said.tau,
                "p_value": trigger.p_value,
                "concentration": said.concentration,
                "n_sources": trigger.n_sources,
                "n_confirmation": said.n_images,
                "n_flagged": int((findings["trigger"] == number).sum()),
                "image": f"triggers/trigger-{number}.png",
                "list": f"triggers/trigger-{number}.txt",
            }
            for number, (trigger, (_, said)) in enumerate(zip(triggers, accepted, strict=True), start=1)
        ],
        "finalists": [
            {
                "n_sources": len(finalist.members),
                "flip_rate": said.flip_rate,
                "control_rate": said.control_rate,
                "tau": said.tau,
                "p_value": said.p_value,
                "n_confirmation": said.n_images,
                "aimed": said.aimed,
            }
            for finalist, said in zip(finalists, confirmations, strict=True)
        ],
        "scope": _scope(bench),
        "coverage": coverage(images),
        "location": bench.location,
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "images_fingerprint": images.fingerprint,
        "encoder_passes": bench.run.passes + len(search.flip_test.flip_set.pixels),
        "passes": _passes(bench, len(search.flip_test.flip_set.pixels)),
        "seconds": round(time.perf_counter() - started, 3),
        "expected_seconds": round(
            _cost(bench).expected * bench.run.seconds["features"] / max(len(images), 1), 3
        ),
        "stages": {name: round(seconds, 3) for name, seconds in bench.run.seconds.items()},
        "precision": str(encoder.precision).removeprefix("torch."),
        "config": asdict(config),
        "seed": bench.seed,
        "versions": library_versions(),
    }
    if reason:
        summary["reason"] = reason
    if verdict != "poisoned":
        summary["power"] = _power(bench, config, confirmations)
    budget = _budget(bench, confirmations)
    if budget:
        summary["budget"] = budget
    return summary


def _cost(bench: PatchBench) -> ScanCost:
    return expected_cost(bench.config, len(bench.images), bench.images.size)


def _passes(bench: PatchBench, flip_images: int) -> dict[str, dict[str, int]]:
    """Expected passes of each stage beside the real ones; every run draws its flip set outside of the stages."""
    actual = {**bench.run.stage_passes, "flip set": flip_images}
    return {
        stage.name: {"expected": stage.expected, "most": stage.most, "actual": actual.get(stage.name, 0)}
        for stage in _cost(bench).stages
    }


def _largest_tau(confirmations: list[Confirmation]) -> float:
    return max((said.tau for said in confirmations), default=SMALLEST_RATE)


def _power_of(bench: PatchBench, config: ScanConfig, confirmations: list[Confirmation]) -> Power:
    tau = _largest_tau(confirmations)
    return power_statement(config, len(bench.images), bench.images.size, tau=tau)


def _power(bench: PatchBench, config: ScanConfig, confirmations: list[Confirmation]) -> dict[str, Any]:
    """The power statement of a search with these settings, for verdict.json."""
    power = _power_of(bench, config, confirmations)
    return {
        "smallest_count": power.smallest_count,
        "share": power.share,
        "probability": power.probability,
        **asdict(power.attack),
        "tau": _largest_tau(confirmations),
        "sentence": power.sentence,
    }


def _budget(bench: PatchBench, confirmations: list[Confirmation]) -> dict[str, Any]:
    """What a budget took from the search, and from its power; empty where there was none."""
    config, asked = bench.config, bench.asked
    if config.max_passes is None and config.max_seconds is None:
        return {}
    changed = {
        name: [getattr(asked, name), getattr(config, name)]
        for name in _SHRINKS
        if getattr(asked, name) != getattr(config, name)
    }
    counts = [_power(bench, c, confirmations)["smallest_count"] for c in (asked, config)]
    return {
        "max_passes": config.max_passes,
        "max_seconds": config.max_seconds,
        "changed": changed,
        "smallest_count_unlimited": counts[0],
        "smallest_count": counts[1],
        "sentence": _budget_sentence(changed, *counts),
    }


_SHRINKS = {
    "exploit": "images looked at again",
    "n_flips": "images that a patch is pasted on",
    "samples": "images per cluster and round",
    "prune": "share of the clusters dropped per round",
}
"""What a budget makes smaller, or in the last case larger, in words."""


def _budget_sentence(changed: dict[str, list[Any]], unlimited: int | None, smallest: int | None) -> str:
    if not changed:
        return "The budget sufficed for the whole search"
    what = ", ".join(
        f"{_SHRINKS[name]}: {before} became {after}" for name, (before, after) in changed.items()
    )
    if smallest == unlimited:
        cost = "which raises no number above"
    else:
        now, before = ("no number" if n is None else f"{n} images" for n in (smallest, unlimited))
        cost = f"so that {now} instead of {before} would have been caught surely"
    return f"To keep the budget, the search was made smaller ({what}), {cost}"


def _scope(bench: PatchBench) -> dict[str, list[str]]:
    config, size = bench.config, bench.encoder.preprocessing.geometry.size
    tested = [
        f"opaque patches of up to about {config.window} of {size} pixels per side, anywhere in the image",
        "patches that steer other images to one place in this encoder's feature space",
    ]
    not_tested = [
        GLOBAL_TRIGGERS,
        "several copies of a trigger in one image, and triggers much larger than the window",
        "poison that this encoder has not learned from",
        "images that no cluster's sample reached: the search scores a part of the images only",
    ]
    if bench.images.skipped:
        not_tested.append(f"{len(bench.images.skipped)} images that could not be read")
    if bench.encoder.preprocessing.assumed:
        not_tested.append("whether the encoder's normalisation is right: mean, std or size had to be assumed")
    return {"tested": tested, "not_tested": not_tested}
