"""Captions for the verbs that train on images with texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unpoison.errors import DataError

if TYPE_CHECKING:
    from unpoison.data.sources import ImageSource

__all__ = ["Captions", "captions_for"]

Captions = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        help="A caption for every image, as `attack clip` writes them; default: made from the names of the classes.",
    ),
]


def captions_for(source: ImageSource, ids: Sequence[str], file: Path | None, seed: int) -> tuple[str, ...]:
    """The captions of these images, in their order: from a file, or made from labels.

    Raises:
        DataError: an image has no caption, or no label to make one from.
    """
    from unpoison.data.captions import make_captions, read_captions
    from unpoison.data.labels import read_labels

    if file is None:
        labels = read_labels(source)
        return make_captions(
            ids, [labels.class_names[number] for number in labels.of(ids).tolist()], seed=seed
        )
    captions = read_captions(file)
    missing = [id_ for id_ in ids if id_ not in captions]
    if missing:
        raise DataError(
            f"{file} has no caption for {len(missing)} of {len(ids)} images, the first is {missing[0]!r}; "
            "expected the captions of these images"
        )
    return tuple(captions[id_] for id_ in ids)
