"""A report's files in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unpoison.data.export import atomic_file
from unpoison.records import ImageSet, ScanResult
from unpoison.report.as_html import as_html
from unpoison.report.document import make_report
from unpoison.report.pictures import write_trigger_sheets

__all__ = ["write_report"]


def write_report(
    folder: Path,
    result: ScanResult,
    *,
    images: ImageSet | None = None,
    location: str | None = None,
) -> Path:
    """Write `triggers/`, `benign/` and `report.html` into a run folder; existing files are replaced.

    Args:
        folder: of the run.
        result: what the scan said.
        images: the pixels that were scanned; see `make_report`.
        location: of the images; default: `location` or `images` of the summary.

    Returns:
        The path of the page.
    """
    place = location or _text(result.summary, "location", "images") or "IMAGES"
    command = _text(result.summary, "command")
    report = make_report(result, images=images, location=place, run=str(folder), command=command)
    write_trigger_sheets(result.triggers, folder, result.benign_patterns)
    page = folder / "report.html"
    with atomic_file(page) as file:
        file.write(as_html(report).encode("utf-8", "backslashreplace"))
    return page


def _text(summary: dict[str, Any], *keys: str) -> str:
    return next((value for key in keys if isinstance(value := summary.get(key), str) and value), "")
