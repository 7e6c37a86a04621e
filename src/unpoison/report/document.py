"""The Report record: everything a person should read about a scan, in words and pictures, before any layout.

The page and the terminal summary are two renderings of this one record, so a sentence is written once. Ids and paths
come from strangers: they are made printable here, and escaped again by whoever renders them.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from unpoison.data.sources import escape
from unpoison.records import BenignPattern, Box, Evidence, ImageSet, ScanResult, TriggerFinding, Verdict
from unpoison.report.pictures import Picture, as_pixels, enlarge, outline, overlay, trigger_sheet
from unpoison.scan.config import DETECTORS

__all__ = [
    "REPORT_SCHEMA",
    "BenignSection",
    "Candidate",
    "Fact",
    "FlaggedImage",
    "Report",
    "Stage",
    "Step",
    "TriggerSection",
    "make_report",
    "percent",
    "shorten",
]

REPORT_SCHEMA = 1
"""Version of the Report record; grows when a field changes its meaning or goes."""

MOST_THUMBNAILS = 1000
MOST_NAMES = 1000
MOST_CANDIDATES = 20
_THUMBNAIL, _PICTURE, _TRIGGER = 96, 144, 224  # smallest sides in pixels


_CANDIDATE_FACTS = (
    ("score", "poison_score", ".3g"),
    ("cluster", "cluster", "d"),
    ("probability", "poison_probability", ".0%"),
)


@dataclass(frozen=True)
class Fact:
    """One line of a table: a name, a value, and what the value means."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Step:
    """Something to do next, with the command that does it when there is one."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Stage:
    """What one stage of the run cost; `share` of all the seconds, [0, 1]."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True, eq=False)
class TriggerSection:
    """One confirmed trigger.

    Attributes:
        number: from 1; as in triggers/trigger-1.png.
        sentence: the test in words.
        flip_rate, control_rate: shares of images moved by the patch and by its shuffled pixels, [0, 1].
        facts: these two, then the other figures.
        patch: the strongest patch, enlarged.
        sheet: all patches beside each other.
        sources: ids that carry it, strongest first; shortened for display.
        n_sources: how many there are, shown or not.
    """

    number: int
    sentence: str
    flip_rate: float
    control_rate: float
    facts: tuple[Fact, ...]
    patch: Picture
    sheet: Picture
    sources: tuple[str, ...]
    n_sources: int


@dataclass(frozen=True, eq=False)
class BenignSection:
    """A pattern that recurs and is no attack.

    Attributes:
        number: from 1; as in benign/pattern-1.png.
        sentence: what was seen of it.
        steers: whether the encoder obeys it.
        flip_rate, control_rate: shares of images moved by the pattern and by its shuffled pixels, [0, 1].
        sheet: all patches beside each other.
        sources: ids that carry it; shortened for display.
        n_sources: how many there are, shown or not.
    """

    number: int
    sentence: str
    steers: bool
    flip_rate: float
    control_rate: float
    sheet: Picture
    sources: tuple[str, ...]
    n_sources: int


@dataclass(frozen=True, eq=False)
class Candidate:
    """One of the highest-scored images, with what the search saw in it.

    Attributes:
        id, label: as it is called, and shortened for display.
        picture: enlarged, the candidate window outlined.
        attention: the same picture coloured by attention; None where the method has none.
        facts: score, cluster and so on.
        flagged: whether it is on the list of images to remove.
    """

    id: str
    label: str
    picture: Picture
    attention: Picture | None
    facts: tuple[Fact, ...]
    flagged: bool


@dataclass(frozen=True, eq=False)
class FlaggedImage:
    """An image to remove; `picture` has the window outlined when there is one."""

    id: str
    label: str
    picture: Picture
    probability: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """A scan, told to a person.

    Attributes:
        schema: REPORT_SCHEMA.
        verdict: as in verdict.json.
        by_detector: whether images were judged one by one, and no pattern was searched.
        headline, meaning: the answer, and what it means for the reader.
        next_steps: what to do now.
        key_figures: the few numbers that belong beside the headline.
        triggers: empty unless the verdict is `poisoned`.
        benign_patterns: what recurs and is no attack; no alarm.
        candidates: the highest-scored images.
        flagged: those with a picture, most suspicious first; at most MOST_THUMBNAILS.
        flagged_names: labels of the flagged images without a picture; at most MOST_NAMES.
        n_flagged: all of them.
        tested, untested: the scope, a sentence each.
        skipped: name and reason; at most MOST_NAMES.
        n_skipped: all of them.
        cost, stages: encoder passes and time.
        settings, versions: to repeat the run.
        command: that repeats it; empty when unknown.
        method: sentences on how the answer was reached.
        limits: the sentence under what was not tested.
    """

    schema: int
    verdict: Verdict
    by_detector: bool
    headline: str
    meaning: str
    next_steps: tuple[Step, ...]
    key_figures: tuple[Fact, ...]
    triggers: tuple[TriggerSection, ...]
    benign_patterns: tuple[BenignSection, ...]
    candidates: tuple[Candidate, ...]
    flagged: tuple[FlaggedImage, ...]
    flagged_names: tuple[str, ...]
    n_flagged: int
    tested: tuple[str, ...]
    untested: tuple[str, ...]
    skipped: tuple[Fact, ...]
    n_skipped: int
    cost: tuple[Fact, ...]
    stages: tuple[Stage, ...]
    settings: tuple[Fact, ...]
    versions: tuple[Fact, ...]
    command: str
    method: tuple[str, ...]
    limits: str


def make_report(
    result: ScanResult,
    *,
    images: ImageSet | None = None,
    location: str = "IMAGES",
    run: str = "RUN",
    command: str = "",
) -> Report:
    """Put a scan into words and pictures.

    Args:
        result: of a scan that just ended, or loaded from its run folder.
        images: the pixels that were scanned, for thumbnails of every flagged image; without them only the images of
            the evidence have one, and the others appear by name.
        location: of the images, for the commands under "what to do next".
        run: the run folder, likewise.
        command: that repeats the scan.
    """
    summary = result.summary
    findings = result.findings
    flagged = _by_suspicion(findings[findings["flagged"].to_numpy(dtype="bool", na_value=False)])
    flagged_images, flagged_names = _flagged_images(flagged, result.evidence, images)
    skipped = findings[findings["skip_reason"].fillna("").astype(str) != ""]
    location, run = escape(location), escape(run)
    tested, untested = _scope(summary)
    return Report(
        schema=REPORT_SCHEMA,
        verdict=result.verdict,
        by_detector=_by_detector(summary),
        headline=_headline(result, len(flagged)),
        meaning=_meaning(result),
        next_steps=_next_steps(result, location, run),
        key_figures=_key_figures(summary, len(flagged)),
        triggers=tuple(_trigger_section(n, t, summary) for n, t in enumerate(result.triggers, start=1)),
        benign_patterns=tuple(_benign_section(n, p) for n, p in enumerate(result.benign_patterns, start=1)),
        candidates=_candidates(result.evidence, findings),
        flagged=flagged_images,
        flagged_names=flagged_names,
        n_flagged=len(flagged),
        tested=tested,
        untested=untested,
        skipped=tuple(
            Fact(shorten(str(id)), escape(str(reason)))
            for id, reason in zip(
                skipped["id"][:MOST_NAMES], skipped["skip_reason"][:MOST_NAMES], strict=True
            )
        ),
        n_skipped=len(skipped),
        cost=_cost(summary),
        stages=_stages(summary),
        settings=_facts(
            summary.get("config"), first={"seed": summary.get("seed"), "method": summary.get("method")}
        ),
        versions=_facts(summary.get("versions")),
        command=escape(command),
        method=_method(summary),
        limits=(
            "A detector speaks about what its method sees in single images, and about nothing else."
            if _by_detector(summary)
            else "A scan speaks about small patches that recur, and about nothing else but what is listed as tested."
        ),
    )


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _by_detector(summary: Mapping[str, Any]) -> bool:
    return summary.get("method") in DETECTORS


def _alarms(summary: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Screens beside the patch search that found poison."""
    screens = summary.get("screens")
    listed = screens if isinstance(screens, Sequence) and not isinstance(screens, str) else ()
    return tuple(s for s in listed if isinstance(s, Mapping) and s.get("verdict") == "poisoned")


def _headline(result: ScanResult, n_flagged: int) -> str:
    n_images = _count(result.summary.get("n_images", len(result.findings)))
    by_detector = _by_detector(result.summary)
    if result.verdict == "poisoned" and not result.triggers:
        what = (
            f"{escape(str(result.summary['method']))} finds more suspicious images than innocent ones explain"
            if by_detector
            else "waves that no picture has recur in their chroma"
        )
        return f"These images are poisoned: {what}, and {_count(n_flagged)} of {n_images} images are flagged."
    if result.verdict == "no_evidence" and by_detector:
        return f"No more suspicious images than innocent ones explain, among {n_images}."
    if result.verdict == "poisoned":
        n_triggers = len(result.triggers)
        found = "a planted trigger was" if n_triggers == 1 else f"{n_triggers} planted triggers were"
        flagged = f"{_count(n_flagged)} of {n_images} images are flagged"
        waves = ", waves that no picture has recur in the chroma" if _alarms(result.summary) else ""
        return f"These images are poisoned: {found} confirmed{waves}, and {flagged}."
    if result.verdict == "no_evidence":
        return f"No evidence of a planted trigger in {n_images} images."
    return f"No answer: the scan of {n_images} images is inconclusive."


def _power(summary: Mapping[str, Any]) -> str:
    """What would have been caught, and what a budget took from it."""
    parts = (summary.get(name) for name in ("power", "budget"))
    said = (part.get("sentence") for part in parts if isinstance(part, Mapping))
    return "".join(f" {escape(_sentence(each))}" for each in said if isinstance(each, str))


def _meaning(result: ScanResult) -> str:
    alpha = result.summary.get("alpha")
    rate = (
        f" On clean images such an alarm is raised in at most {percent(alpha)} of scans."
        if isinstance(alpha, float)
        else ""
    )
    if _by_detector(result.summary):
        return _meaning_by_detector(result, rate)
    waves = "".join(
        " Beside the patch search, a screen of the chroma found waves at single frequencies, with the same sign in "
        f"image after image, as CTRL plants them; {_count(alarm.get('n_flagged'))} images are flagged for it."
        for alarm in _alarms(result.summary)
    )
    if result.verdict == "poisoned" and not result.triggers:
        return (
            f"No patch that recurs was confirmed.{waves} Pictures carry such waves with either sign. An encoder "
            "trained on these images may have learned to obey them; an overlay at a fixed place can look like "
            f"them.{rate}"
        )
    if result.verdict == "poisoned":
        return (
            "A small patch recurs in the images below, and the encoder has learned to obey it: pasted on pictures that "
            "have nothing to do with it, the patch pulls them into one group. An encoder trained on these images "
            f"would hand that switch to whoever planted the patch.{waves}{rate}"
        )
    if result.verdict == "no_evidence":
        return (
            "The scan searched for a small patch that recurs in the images and that, pasted on other pictures, pulls "
            "them into one group of look-alikes. No patch passed that test, so nothing was flagged. This covers what "
            "is listed under “What was tested” and nothing else; it is no proof that the images are clean."
            f"{_power(result.summary)}"
        )
    reason = result.summary.get("reason")
    because = f"{escape(_sentence(reason))} " if isinstance(reason, str) and reason else ""
    return (
        f"{because}The scan ended without enough evidence for either answer. Do not read this as “clean”: nothing was "
        f"flagged, and nothing was ruled out.{_power(result.summary)}"
    )


def _meaning_by_detector(result: ScanResult, rate: str) -> str:
    rule, reason = (result.summary.get(key) for key in ("rule", "reason"))
    said = f" {escape(_sentence(rule))}" if isinstance(rule, str) and rule else ""
    if result.verdict == "poisoned":
        return f"Images were judged one by one.{said} The flagged ones are listed below, some of them in error.{rate}"
    if result.verdict == "no_evidence":
        return (
            f"Images were judged one by one, and nothing was flagged.{said} This covers what is listed under “What was "
            "tested” and nothing else; it is no proof that the images are clean."
        )
    because = f" {escape(_sentence(reason))}" if isinstance(reason, str) and reason else ""
    return f"Images were judged one by one.{because} Do not read this as “clean”: nothing was ruled out."


def _method(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """How the answer was reached."""
    if _by_detector(summary):
        return (
            "Every image got a score, from itself, the detector and its encoder alone; higher is more suspicious.",
            "The threshold was read off the scores of calibration images: of innocent images of their kind, no more "
            "than the stated share lies above it.",
            "The verdict compares how many images lie above it with how many innocent ones would, exactly. Only then "
            "are images flagged. A spectral-dct without calibration images tests the signs of large coefficients, "
            "which are fair coins in pictures.",
        )
    steps = (
        "The encoder turns every image into a point; images that it takes for alike form clusters.",
        "In the images that are most typical of each cluster, the scan finds the region that decides, by hiding one "
        "part after the other or from the network’s gradients. That region is cut out as a candidate.",
        "Each candidate is pasted on other images. An ordinary piece of a picture rarely changes what they look like "
        "to the encoder; a trigger changes it again and again, always to the same cluster.",
        "The best candidates are fixed, then tested once more on images that the search never touched, against their "
        "own pixels shuffled. Only what passes counts as a trigger, and only then is a classifier trained on it to "
        "find all of its copies.",
    )
    if not summary.get("screens"):
        return steps
    return (
        *steps,
        "Beside that, the screen for waves counts the signs of unusually large coefficients of the chroma. In pictures "
        "they are fair coins, since a picture is as likely as its mirror image; a wave that was added has one sign.",
    )


def _next_steps(result: ScanResult, location: str, run: str) -> tuple[Step, ...]:
    verdict = result.verdict
    if verdict == "poisoned":
        return (
            Step(
                "Look at the trigger below. A watermark or a logo can act like one; you can tell them apart by eye."
                if result.triggers
                else "Look at the flagged images below, enlarged; what they share may be too faint to see."
            ),
            Step(
                "Write the data set without the flagged images; the source is not touched.",
                f"unpoison clean {_quoted(location)} --run {_quoted(run)} --out CLEANED",
            ),
            Step(
                "Train again on the cleaned images. An encoder that saw the poison keeps its backdoor, so do not ship "
                "it. Then scan once more."
            ),
        )
    if verdict == "no_evidence":
        return (
            Step("Nothing needs to be removed."),
            Step(
                "Read what was not tested. Where the images come from strangers, scan again whenever they change."
            ),
        )
    if _by_detector(result.summary):
        return (
            Step(
                "Give other images of the same kind with --auxiliary, or a --detector that was made on such; the order "
                "of the images below holds either way."
            ),
        )
    return (
        Step("See below what was not examined, and why."),
        Step(
            "Scan more of the images, or with an encoder trained on them for longer; a weak encoder may not have "
            "learned the trigger yet."
        ),
    )


def _key_figures(summary: Mapping[str, Any], n_flagged: int) -> tuple[Fact, ...]:
    rest = "the rest through their cluster" if summary.get("n_unscored") else "all that could be read"
    figures = [
        Fact(
            "images",
            _count(summary.get("n_images")),
            f"{_count(summary.get('n_skipped', 0))} could not be read",
        ),
        Fact("examined one by one", _count(summary.get("n_scored")), rest),
        Fact("flagged", _count(n_flagged), "on the list to remove"),
    ]
    if _number(summary.get("p_value")):
        figures.append(
            Fact("p-value", _p_value(summary["p_value"]), f"alarm below {summary.get('alpha', '–')}")
        )
    figures.append(
        Fact(
            "time",
            _duration(summary.get("seconds")),
            f"{_count(summary.get('encoder_passes'))} encoder passes",
        )
    )
    return tuple(figures)


def _trigger_section(number: int, trigger: TriggerFinding, summary: Mapping[str, Any]) -> TriggerSection:
    listed = summary.get("triggers")
    entry = listed[number - 1] if isinstance(listed, Sequence) and len(listed) >= number else {}
    n_pasted = next((entry[key] for key in ("n_confirmation", "n_confirm", "n_pasted") if key in entry), None)
    onto = f"{_count(n_pasted)} images" if _number(n_pasted) else "images"
    moved = "none" if trigger.control_rate == 0 else percent(trigger.control_rate)
    where = f"cluster {trigger.target_cluster}"
    if len(trigger.target_clusters) > 1:
        where = f"{len(trigger.target_clusters)} clusters, most of those into {where}"
    sentence = (
        f"Pasted on {onto} that the search never saw, this patch moved {percent(trigger.flip_rate)} of them into "
        f"{where}. The same patch with its pixels shuffled, at the same places, moved {moved}."
    )
    facts = (
        Fact(
            "moved by the patch",
            percent(trigger.flip_rate),
            "share of other images that change to the cluster",
        ),
        Fact("moved by the control", percent(trigger.control_rate), "same pixels, shuffled"),
        Fact(
            "p-value", _p_value(trigger.p_value), "chance of this result if the patch had no effect of note"
        ),
        Fact("seen in", f"{_count(trigger.n_sources)} images", "distinct images that carry the patch"),
        *(
            [
                Fact(
                    "aimed",
                    f"{entry['concentration']:.1f} times",
                    "how much more often two of those, without the patch, lie together than two other images do",
                )
            ]
            if entry.get("concentration") is not None
            else []
        ),
        *(
            [
                Fact(
                    "flagged",
                    f"{_count(entry['n_flagged'])} images",
                    f"listed in {escape(str(entry['list']))}",
                )
            ]
            if "n_flagged" in entry and "list" in entry
            else []
        ),
    )
    strongest = enlarge(as_pixels(trigger.patches[0]), _TRIGGER)
    sheet = trigger_sheet(trigger.patches, columns=12, side=64, most=48)
    names = tuple(shorten(id) for id in trigger.source_ids[:MOST_NAMES])
    return TriggerSection(
        number=number,
        sentence=sentence,
        flip_rate=trigger.flip_rate,
        control_rate=trigger.control_rate,
        facts=facts,
        patch=strongest,
        sheet=sheet,
        sources=names,
        n_sources=trigger.n_sources,
    )


def _benign_section(number: int, pattern: BenignPattern) -> BenignSection:
    carriers = _count(pattern.n_sources)
    seen = f"The same pixels lie in {carriers} of the images that were examined. Pasted on other images "
    if pattern.steers:
        sentence = (
            f"{seen}they moved {percent(pattern.flip_rate)}, and shuffled {percent(pattern.control_rate)}: the encoder "
            "obeys the pattern. But without it those images scatter like any others, so that it is aimed at no kind of "
            "image, as an attack is. A watermark or a logo on images of all kinds does this. Look at it, and remove it "
            "from the images if it does not belong there."
        )
    else:
        sentence = (
            f"{seen}they moved {percent(pattern.flip_rate)} into one cluster, and shuffled "
            f"{percent(pattern.control_rate)}: the pattern steers nothing. So it is with a watermark, a logo or a "
            "frame, and with crops that overlap."
        )
    return BenignSection(
        number=number,
        sentence=sentence,
        steers=pattern.steers,
        flip_rate=pattern.flip_rate,
        control_rate=pattern.control_rate,
        sheet=trigger_sheet(pattern.patches, columns=12, side=64, most=48),
        sources=tuple(shorten(id) for id in pattern.source_ids[:MOST_NAMES]),
        n_sources=pattern.n_sources,
    )


def _scope(summary: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The scope as two lists of sentences, whatever form it has: a text, a list, or tested and not tested."""
    scope = summary.get("scope")
    if isinstance(scope, Mapping):
        no = [key for key in scope if str(key).replace(" ", "_") in ("not_tested", "untested", "excluded")]
        yes = [key for key in scope if str(key) in ("tested", "included")]
        other = [f"{_words(key)}: {_value(scope[key])}" for key in scope if key not in no + yes]
        return (
            tuple([line for key in yes for line in _lines(scope[key])] + [escape(line) for line in other]),
            tuple(line for key in no for line in _lines(scope[key])),
        )
    return _lines(scope), ()


def _cost(summary: Mapping[str, Any]) -> tuple[Fact, ...]:
    passes, n_images = summary.get("encoder_passes"), summary.get("n_images")
    facts = [Fact("encoder passes", _count(passes), "images that the encoder was shown")]
    stages = summary.get("passes")
    if isinstance(stages, Mapping):
        expected = sum(stage.get("expected", 0) for stage in stages.values())
        facts.append(
            Fact("expected passes", _count(expected), "counted from the settings, before the scan ran")
        )
    if isinstance(passes, int) and isinstance(n_images, int) and n_images:
        facts.append(Fact("passes per image", f"{passes / n_images:.1f}", "1 would be a plain embedding"))
    facts.append(Fact("time", _duration(summary.get("seconds"))))
    if "expected_seconds" in summary:
        facts.append(
            Fact(
                "expected time",
                _duration(summary["expected_seconds"]),
                "of these passes, at the speed of the first ones",
            )
        )
    return tuple(facts)


def _stages(summary: Mapping[str, Any]) -> tuple[Stage, ...]:
    stages = next((summary[key] for key in ("stages", "stage_seconds") if key in summary), None)
    if isinstance(stages, Mapping):
        pairs = [(str(name), value) for name, value in stages.items()]
    elif isinstance(stages, Sequence) and not isinstance(stages, str):
        pairs = [(str(s.get("name", "")), s.get("seconds")) for s in stages if isinstance(s, Mapping)]
    else:
        return ()
    known = [(escape(_words(name)), float(value)) for name, value in pairs if _number(value) and value >= 0]
    total = sum(seconds for _, seconds in known)
    return tuple(Stage(name, seconds, seconds / total if total else 0.0) for name, seconds in known)


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _candidates(evidence: Evidence, findings: pd.DataFrame) -> tuple[Candidate, ...]:
    rows = {row["id"]: row for row in findings[findings["id"].isin(evidence.ids)].to_dict("records")}
    candidates = []
    for index, id in enumerate(evidence.ids[:MOST_CANDIDATES]):
        plain = as_pixels(evidence.pixels[index])
        attention = evidence.attention[index].cpu().float().numpy()
        large = enlarge(plain, _PICTURE)
        large_heat = enlarge(overlay(plain, attention), _PICTURE) if attention.any() else None
        row = rows.get(id, {})
        box = _box(row)
        if box is not None:
            large = outline(large, box)
            large_heat = None if large_heat is None else outline(large_heat, box)
        facts = tuple(
            Fact(name, text) for name, key, style in _CANDIDATE_FACTS if (text := _cell(row, key, style))
        )
        flagged = bool(row.get("flagged", False))
        candidates.append(Candidate(id, shorten(id, 40), large, large_heat, facts, flagged))
    return tuple(candidates)


def _flagged_images(
    flagged: pd.DataFrame, evidence: Evidence, images: ImageSet | None
) -> tuple[tuple[FlaggedImage, ...], tuple[str, ...]]:
    rows = {id: (evidence.pixels, row) for row, id in enumerate(evidence.ids)}
    if images is not None:
        wanted = set(flagged["id"])
        rows |= {id: (images.pixels, row) for row, id in enumerate(images.ids) if id in wanted}
    shown: list[FlaggedImage] = []
    named: list[str] = []
    for id, row in zip(flagged["id"], flagged.to_dict("records"), strict=True):
        if id in rows and len(shown) < MOST_THUMBNAILS:
            pixels, index = rows[id]
            large = enlarge(as_pixels(pixels[index]), _THUMBNAIL)
            box = _box(row)
            picture = large if box is None else outline(large, box)
            shown.append(FlaggedImage(id, _tail(id), picture, _cell(row, "poison_probability", ".0%")))
        elif len(named) < MOST_NAMES:
            named.append(shorten(id))
    return tuple(shown), tuple(named)


def _by_suspicion(findings: pd.DataFrame) -> pd.DataFrame:
    return findings.sort_values(
        ["poison_score", "poison_probability"], ascending=False, na_position="last", kind="stable"
    )


def _box(row: Mapping[Any, Any]) -> Box | None:
    values = [row.get(name) for name in ("box_x", "box_y", "box_w", "box_h")]
    if any(not _number(value) for value in values):
        return None
    box = Box(*(int(value) for value in values))  # type: ignore[arg-type]
    return box if box.area > 0 else None


# ── values as text ───────────────────────────────────────────────────────────────────────────────────────────────────


def shorten(name: str, most: int = 96) -> str:
    """A printable name of at most `most` characters; the middle goes, because both ends tell names apart.

    >>> shorten("a" * 50 + "/cat.png", 16)
    'aaaaaaa…/cat.png'
    """
    text = escape(name)
    if len(text) <= most:
        return text
    tail = most // 2
    return f"{text[: most - tail - 1]}…{text[-tail:]}"


def _tail(name: str, most: int = 16) -> str:
    """The end of a name, which tells images of one folder or shard apart."""
    text = escape(name)
    return text if len(text) <= most else f"…{text[1 - most :]}"


def percent(share: float) -> str:
    """A share in [0, 1] as people write it.

    >>> percent(0.714), percent(0.004), percent(0.0), percent(0.9996)
    ('71%', '0.4%', '0%', '99.96%')
    """
    value = 100 * share
    if 0 < value < 1:
        return f"{value:.2g}%"
    return f"{value:.4g}%" if 99 < value < 100 else f"{value:.0f}%"


def _p_value(p: float) -> str:
    if p < 1e-12:
        return "< 10⁻¹²"
    if p < 1e-3:
        exponent = math.floor(math.log10(p))
        digits = str(abs(exponent)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{p / 10**exponent:.1f}·10⁻{digits}"
    return f"{p:.2g}"


def _duration(seconds: Any) -> str:
    if not _number(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _number(value: Any) -> bool:
    """Whether a cell or JSON value is a finite number; pandas' NA and NaN are not."""
    if value is None or isinstance(value, str | bytes | bool | Mapping | list | tuple):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _cell(row: Mapping[Any, Any], key: str, style: str) -> str:
    value = row.get(key)
    if not _number(value):
        return ""
    return format(int(value) if style == "d" else float(value), style)  # type: ignore[arg-type]


def _count(value: Any) -> str:
    return f"{int(value):,}".replace(",", "\u202f") if _number(value) else "–"


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)} {_value(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(entry) for entry in value) or "none"
    return escape(str(value))


def _lines(value: Any) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, Mapping):
        return tuple(escape(f"{_words(key)}: {_value(entry)}") for key, entry in value.items())
    entries: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    return tuple(escape(_sentence(str(entry))) for entry in entries)


def _facts(value: Any, first: Mapping[str, Any] | None = None) -> tuple[Fact, ...]:
    """A settings table, one level of nesting written with dots."""
    flat: dict[str, Any] = {key: entry for key, entry in (first or {}).items() if entry is not None}
    for key, entry in (value if isinstance(value, Mapping) else {}).items():
        if isinstance(entry, Mapping):
            flat.update({f"{key}.{inner}": deep for inner, deep in entry.items()})
        else:
            flat[str(key)] = entry
    return tuple(Fact(escape(name), _value(entry)) for name, entry in flat.items())


def _quoted(text: str) -> str:
    """As a shell word; placeholders and plain names stay as they are."""
    return shlex.quote(text)
