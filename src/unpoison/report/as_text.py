"""A Report as plain lines for a terminal; no colour, no control characters."""

from __future__ import annotations

import textwrap

from unpoison.report.document import Report

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
    for pattern in report.benign_patterns:
        lines += ["", *_paragraph(f"No alarm: recurring pattern {pattern.number}. {pattern.sentence}", width)]
        lines += [f"  such as {pattern.sources[0]}"]
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


def _paragraph(text: str, width: int, start: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
