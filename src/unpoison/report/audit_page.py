"""An audit told to a person: one HTML file, one picture, a few lines for a terminal.

The words are made once, in `make_audit_report`; the page, the picture and the lines only lay them out. Names come from
strangers: they are made printable here, and escaped again by the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unpoison.audit.result import AuditResult
from unpoison.data.export import atomic_file
from unpoison.data.sources import escape
from unpoison.records import Verdict
from unpoison.report.as_html import page_environment
from unpoison.report.document import Fact, Step
from unpoison.report.pictures import Picture, Pixels, as_pixels, data_uri, enlarge

__all__ = [
    "AuditReport",
    "audit_as_html",
    "audit_as_text",
    "audit_picture",
    "make_audit_report",
    "write_audit_report",
]

_TILE = 96  # smallest side of a shown image, pixels
_GAP, _PAPER = 4, 238  # of the picture: pixels between tiles, grey behind them
_MOST_POINTS = 300  # of a curve

_Tile = tuple[str, Picture]


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditReport:
    """What a person should read about an audit.

    Attributes:
        verdict: as in verdict.json.
        headline, meaning: the answer, and what it means for the reader.
        key_figures: the most important numbers.
        next_steps: what to do now.
        trigger: mask, pattern and both together, with captions.
        examples: images before and after.
        collapse: mean cosine before and after, [-1, 1].
        curves: collapse and mask share by step, as points of an SVG of 600 × 160.
        shares: mask shares of clean encoders, ascending; may be empty.
        share: of this encoder, [0, 1].
        starts: per start, what it found.
        needed: per cluster, the mask that carries other images there; empty without a second opinion.
        tested, untested: sentences.
        cost, settings, versions: tables.
    """

    verdict: Verdict
    headline: str
    meaning: str
    key_figures: tuple[Fact, ...]
    next_steps: tuple[Step, ...]
    trigger: tuple[_Tile, ...]
    examples: tuple[tuple[Picture, Picture], ...]
    collapse: tuple[float, float]
    curves: tuple[str, str]
    n_steps: int
    shares: tuple[float, ...]
    share: float
    starts: tuple[Fact, ...]
    needed: tuple[Fact, ...]
    tested: tuple[str, ...]
    untested: tuple[str, ...]
    cost: tuple[Fact, ...]
    settings: tuple[Fact, ...]
    versions: tuple[Fact, ...]


_WORDS: dict[str, str] = {
    "poisoned": "Backdoor found",
    "no_evidence": "No evidence",
    "inconclusive": "Inconclusive",
}


def make_audit_report(result: AuditResult) -> AuditReport:
    """Words and pictures for an audit."""
    summary = result.summary
    size = result.found.mask.shape[-1]
    mask = result.found.mask.expand(3, size, size)
    trigger = (
        ("mask: white hides the image", _shown(mask)),
        ("pattern", _shown(result.found.pattern)),
        ("pattern where the mask shows it", _shown(mask * result.found.pattern)),
    )
    return AuditReport(
        verdict=result.verdict,
        headline=_headline(result),
        meaning=_meaning(result),
        key_figures=_key_figures(result),
        next_steps=_next_steps(result),
        trigger=trigger,
        examples=tuple(
            (enlarge(as_pixels(before), _TILE), enlarge(as_pixels(after), _TILE))
            for before, after in zip(result.examples, result.stamped, strict=True)
        ),
        collapse=(summary["collapse_before"], summary["collapse_after"]),
        curves=(_points(result.found.curve[:, 0]), _points(result.found.curve[:, 1])),
        n_steps=len(result.found.curve),
        shares=result.reference_shares,
        share=result.mask_share,
        starts=tuple(
            Fact(
                f"start {number}",
                f"mask {_percent(one['mask_share'])}" if one["reached"] else "did not reach the collapse",
                f"collapse {one['collapse']:.3f}, {one['steps']} steps",
            )
            for number, one in enumerate(summary["starts"], start=1)
        ),
        needed=_needed(summary["second_opinion"]),
        tested=tuple(summary["scope"]["tested"]),
        untested=tuple(summary["scope"]["not_tested"]),
        cost=(
            Fact("encoder passes", f"{summary['encoder_passes']:,}".replace(",", " ")),
            Fact("time", f"{summary['seconds']:.1f} s"),
            *(Fact(escape(name), f"{seconds:.1f} s") for name, seconds in summary["stages"].items()),
        ),
        settings=(
            Fact("encoder", escape(summary["encoder"])),
            Fact("family", escape(summary["family"])),
            Fact("input", f"{summary['image_size']} pixels"),
            Fact("images", escape(summary["location"])),
            Fact("reference", escape(summary["reference"] or "that comes along")),
            Fact("seed", str(summary["seed"])),
            *(Fact(name, str(value)) for name, value in summary["config"].items()),
        ),
        versions=tuple(Fact(name, escape(str(value))) for name, value in summary["versions"].items()),
    )


def audit_as_html(report: AuditReport) -> str:
    """The page; a pure function of the record. It holds no script, loads nothing, and escapes every string."""
    environment = page_environment()
    environment.filters["picture"] = _as_image
    return environment.get_template("audit.html").render(report=report, word=_WORDS[report.verdict])


def audit_as_text(report: AuditReport) -> str:
    """A few lines for a terminal."""
    lines = [report.headline, ""]
    lines += [f"  {fact.name:<26} {fact.value:>10}   {fact.note}".rstrip() for fact in report.key_figures]
    lines += ["", report.meaning, "", "Next:"]
    for step in report.next_steps:
        lines += [f"  - {step.text}"] + ([f"      {step.command}"] if step.command else [])
    return "\n".join(lines)


def audit_picture(result: AuditResult) -> Pixels:
    """Mask, pattern and both in the first row; below them images before, and after; (H, W, 3) uint8."""
    report = make_audit_report(result)
    rows = [
        [picture for _, picture in report.trigger],
        [before for before, _ in report.examples],
        [after for _, after in report.examples],
    ]
    side = report.trigger[0][1].pixels.shape[0]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (side + _GAP) + _GAP, columns * (side + _GAP) + _GAP, 3), _PAPER, np.uint8)
    for index, row in enumerate(rows):
        top = _GAP + index * (side + _GAP)
        for column, picture in enumerate(row):
            left = _GAP + column * (side + _GAP)
            sheet[top : top + side, left : left + side] = picture.pixels
    return sheet


def write_audit_report(folder: Path, result: AuditResult) -> Path:
    """Write `trigger.png` and `report.html` into a run folder; existing ones are replaced.

    Returns:
        The path of the page.
    """
    with atomic_file(folder / "trigger.png") as file:
        Image.fromarray(audit_picture(result)).save(file, format="PNG")
    page = folder / "report.html"
    with atomic_file(page) as file:
        file.write(audit_as_html(make_audit_report(result)).encode("utf-8", "backslashreplace"))
    return page


def _headline(result: AuditResult) -> str:
    if result.verdict == "poisoned":
        return f"A patch on {_percent(result.mask_share)} of the image makes this encoder take all images for one"
    if result.verdict == "no_evidence":
        return "No patch collapses this encoder more easily than clean ones of its family"
    return "There are figures for this encoder, and no ground for a verdict"


def _meaning(result: AuditResult) -> str:
    summary = result.summary
    others = len(result.reference_shares)
    if result.verdict == "poisoned":
        return (
            f"Of {others} clean encoders of the same family, hardly one collapses under so small a mask "
            f"(p = {summary['p_value']:.3g}). What the mask shows is a reconstruction: it does what the planted "
            "trigger does, and need not look like it."
        )
    if result.verdict == "no_evidence":
        return (
            f"Its smallest collapsing mask lies among those of {others} clean encoders "
            f"(p = {summary['p_value']:.3g}). That is no proof of innocence: it speaks about small patches that make "
            "images alike, and about nothing else."
        )
    return f"{summary['reason'][:1].upper()}{summary['reason'][1:]}."


def _key_figures(result: AuditResult) -> tuple[Fact, ...]:
    summary = result.summary
    reached = summary["reached"]
    side = "below" if summary["below_paper_threshold"] else "not below"
    figures = [
        Fact(
            "smallest mask (PL1)",
            _percent(result.mask_share) if reached else "none",
            f"of the image, {side} the 10 % of the paper" if reached else "no mask made all images alike",
        ),
        Fact("collapse before", f"{summary['collapse_before']:.3f}", "mean cosine of clean images"),
        Fact("collapse after", f"{summary['collapse_after']:.3f}", "the same images with the trigger"),
        Fact(
            "p-value",
            "–" if summary["p_value"] is None else f"{summary['p_value']:.3g}",
            f"rank among {len(result.reference_shares)} clean encoders",
        ),
    ]
    extent = summary.get("extent")  # runs of earlier versions have none
    if extent is not None:
        figures.append(
            Fact(
                "whole trigger",
                _percent(extent["mask_share"]),
                "of the image: the smallest mask that does all that an opaque patch there can; it is the one shown",
            )
        )
    relaxed = summary["relaxed"]
    if relaxed is not None:
        figures.append(
            Fact(
                "mask of the relaxed search",
                _percent(relaxed["mask_share"]) if relaxed["reached"] else "none",
                f"for {relaxed['gain']:.0%} of the way to full collapse; no part of the verdict",
            )
        )
    opinion = summary["second_opinion"]
    if opinion is not None:
        side = "above" if opinion["outlier"] else "not above"
        figures.append(
            Fact(
                "anomaly index",
                f"{opinion['anomaly_index']:.1f}",
                f"second opinion (SSL-Cleanse), {side} its {opinion['threshold']:g}; no part of the verdict",
            )
        )
    return tuple(figures)


def _needed(opinion: Mapping[str, Any] | None) -> tuple[Fact, ...]:
    if opinion is None:
        return ()
    return tuple(
        Fact(
            f"cluster {number + 1}",
            f"mask {_percent(share)}" if share < 1 else "never reached",
            "needs least" if number == opinion["cluster"] else "",
        )
        for number, share in enumerate(opinion["mask_shares"])
    )


def _next_steps(result: AuditResult) -> tuple[Step, ...]:
    if result.verdict == "poisoned":
        return (
            Step("Do not use this encoder. Look at the trigger below, and ask where the weights came from."),
            Step(
                "If the training images are at hand, find the poison in them.",
                "unpoison scan IMAGES --out scan",
            ),
        )
    if result.verdict == "no_evidence":
        return (
            Step(
                "If the training images are at hand, scan them too: poisoned images leave weaker backdoors than this "
                "audit can see.",
                "unpoison scan IMAGES --out scan",
            ),
        )
    return (
        Step(
            "Audit clean encoders of the same network, input size and training, with the same images and settings, and "
            "collect their figures; then audit this one again with --reference.",
            "unpoison audit CLEAN_ENCODER --out RUN --add-to-reference reference.json",
        ),
        Step("Look at the trigger: a compact patch that turns every image into one is worth a question."),
    )


def _shown(values: Tensor) -> Picture:
    return enlarge(as_pixels((values.clamp(0, 1) * 255).round().to(torch.uint8)), _TILE)


def _as_image(picture: Picture) -> dict[str, str | int]:
    height, width = picture.pixels.shape[:2]
    return {"uri": data_uri(picture.pixels), "width": width, "height": height}


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(values: Tensor) -> str:
    """A line of an SVG of 600 × 160 units, for values in [0, 1]; others are drawn at the rim."""
    n = len(values)
    step = max(1, -(-n // _MOST_POINTS))
    chosen: Sequence[int] = range(0, n, step)
    return " ".join(
        f"{600 * row / max(1, n - 1):.1f},{160 * (1 - min(1.0, max(0.0, float(values[row])))):.1f}"
        for row in chosen
    )
