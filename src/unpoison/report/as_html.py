"""A Report as one HTML file that opens offline: no script, nothing from outside, every string escaped."""

from __future__ import annotations

from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from unpoison.report.document import Report
from unpoison.report.pictures import Picture, Pixels, colour_map, data_uri

__all__ = ["as_html", "page_environment"]

_THUMBNAIL = 96  # pixels


def page_environment() -> Environment:
    """What renders our pages: their templates share one style, and every string is escaped."""
    return Environment(
        loader=PackageLoader("unpoison.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def as_html(report: Report) -> str:
    """The report as a page; a pure function of the record."""
    environment = page_environment()
    environment.filters["picture"] = _picture
    environment.filters["thumbnail"] = _thumbnail
    return environment.get_template("report.html").render(
        report=report, word=_WORDS[report.verdict], scale=data_uri(_colour_bar())
    )


_WORDS: dict[str, str] = {
    "poisoned": "Poisoned",
    "no_evidence": "No evidence",
    "inconclusive": "Inconclusive",
}


def _picture(picture: Picture) -> dict[str, Any]:
    """Address and size of a picture; enlarged ones are kept without loss, which would smear their pixels."""
    height, width = picture.pixels.shape[:2]
    return {"uri": data_uri(picture.pixels, lossless=picture.scale > 1), "width": width, "height": height}


def _thumbnail(picture: Picture) -> dict[str, Any]:
    if max(picture.pixels.shape[:2]) < 2 * _THUMBNAIL:
        return _picture(picture)
    small = Image.fromarray(picture.pixels)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    return _picture(Picture(np.asarray(small)))


def _colour_bar() -> Pixels:
    return np.repeat(colour_map()[None], 8, axis=0)
