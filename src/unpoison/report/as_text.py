"""A Report as plain lines for a terminal; no colour, no control characters."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from unpoison.report.document import BenignSection, Report, percent

__all__ = ["as_text"]

_FEW = 5


def as_text(report: Report, *, width: int = 100) -> str:
    """The report in a dozen lines.

    Args:
        report: of one scan.
        width: longest line, in characters; names and commands are never broken.
    """
    lines = [report.headline, ""]
    lines += [f"  {fact.name:<20} {fact.value:>10}   {fact.note}".rstrip() for fact in report.key_figures]
    for trigger in report.triggers:
        lines += ["", *_paragraph(f"Trigger {trigger.number}. {trigger.sentence}", width)]
        lines += [f"  in {trigger.n_sources} images, such as {trigger.sources[0]}"] if trigger.sources else []
    lines += _benign(report.benign_patterns, width)
    if report.n_skipped:
        lines += ["", f"Skipped, which is not the same as clean ({report.n_skipped}):"]
        lines += [f"  {fact.name}: {fact.value}" for fact in report.skipped[:_FEW]]
        if report.n_skipped > _FEW:
            lines += [f"  and {report.n_skipped - _FEW} more; see findings.parquet"]
    if report.verdict != "poisoned":
        lines += ["", *_paragraph(report.meaning, width)]
    lines += ["", "Next:"]
    for step in report.next_steps:
        lines += _paragraph(step.text, width, "  - ")
        lines += [f"      {step.command}"] if step.command else []
    return "\n".join(lines)


def _benign(patterns: Sequence[BenignSection], width: int) -> list[str]:
    """What recurs and is no attack; only the first of those that steer nothing at length."""
    idle = [pattern for pattern in patterns if not pattern.steers]
    lines = []
    for pattern in [*(pattern for pattern in patterns if pattern.steers), *idle[:1]]:
        lines += ["", *_paragraph(f"No alarm: recurring pattern {pattern.number}. {pattern.sentence}", width)]
        lines += [f"  such as {pattern.sources[0]}"]
    if more := idle[1:]:
        said = (
            f"{len(more)} more like it, each in at most {max(p.n_sources for p in more)} of the images: pasted they "
            f"moved at most {percent(max(p.flip_rate for p in more))}, and shuffled "
            f"{percent(max(p.control_rate for p in more))}."
        )
        lines += ["", *_paragraph(said, width), f"  such as {', '.join(p.sources[0] for p in more[:_FEW])}"]
    return lines


def _paragraph(text: str, width: int, start: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
