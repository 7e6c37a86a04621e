"""Truth: the class of each image, for planting poison and for measuring; never shown to a scanner.

Only `evaluate/`, `attack/` and `cli/` may import this module (tests/test_layers.py reads the imports).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from unpoison.data.sources import (
    FileSource,
    ImageSource,
    ParquetSource,
    TarSource,
    escape,
    open_source,
    sample_key,
    shown,
    tar_members,
)
from unpoison.errors import DataError

__all__ = ["Labels", "read_labels"]

_LONGEST_CLASS_NAME = 1024  # bytes of a `.cls` member; anything longer is no class name


@dataclass(frozen=True)
class Labels:
    """Class names in a fixed order, and the number of the class of each image that has one."""

    class_names: tuple[str, ...]
    by_id: dict[str, int]

    def of(self, ids: Sequence[str]) -> Tensor:
        """The classes of these images.

        Returns:
            (N,) int64, in the order of `ids`.

        Raises:
            DataError: an image has no label.

        >>> Labels(("cat", "dog"), {"a.png": 1, "b.png": 0}).of(["b.png", "a.png"])
        tensor([0, 1])
        """
        missing = [id for id in ids if id not in self.by_id]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(ids)} images have no label, the first is {missing[0]!r}; "
                "expected one folder per class, a label column, or a .cls member beside each image"
            )
        return torch.tensor([self.by_id[id] for id in ids], dtype=torch.int64)


def read_labels(
    images: str | Path | ImageSource, *, root: str | Path | None = None, follow_links: bool = False
) -> Labels:
    """The labels that an image source carries.

    Folder or list: the first folder of the path, classes sorted by name. Parquet: the `label` column, named by the
    Hugging Face metadata of the schema when it has names. Tar: the `.cls` member of the same WebDataset sample.

    Args:
        images: anything that `open_source` takes, or a source that is already open.
        root: as in `open_source`.
        follow_links: as in `open_source`.

    Raises:
        DataError: there are no labels at all, or shards disagree about the names of the classes.
    """
    source = images
    if not isinstance(source, ImageSource):
        source = open_source(source, root=root, follow_links=follow_links)
    if isinstance(source, ParquetSource):
        return _from_parquet(source)
    named = _from_tar(source) if isinstance(source, TarSource) else _from_folders(source)
    if not named:
        hint = (
            "a .cls member beside each image"
            if isinstance(source, TarSource)
            else "one folder per class, as in ROOT/CLASS/image.png"
        )
        raise DataError(f"{shown(source.location)} holds no labels; expected {hint}")
    class_names = tuple(sorted(set(named.values()), key=_numbers_in_order))
    number = {name: index for index, name in enumerate(class_names)}
    return Labels(class_names, {id: number[name] for id, name in named.items()})


def _numbers_in_order(name: str) -> tuple[int, str]:
    """Sort key: class names that are numbers by their value, then all others by their letters."""
    return (int(name) if name.isascii() and name.isdigit() else 2**63, name)


def _from_folders(source: ImageSource) -> dict[str, str]:
    assert isinstance(source, FileSource)
    return {id: id.split("/", 1)[0] for id in source.ids if "/" in id}


def _from_parquet(source: ParquetSource) -> Labels:
    names: tuple[str, ...] | None = None
    values: dict[str, Any] = {}
    for shard, rows in source.rows_by_shard():
        path = source.root / shard
        schema = pq.read_schema(path)
        if "label" not in schema.names:
            raise DataError(
                f"{shown(path)} holds no labels: expected a column 'label', "
                f"found {escape(', '.join(schema.names))[:200]}"
            )
        names_here = _names_in_metadata(schema)
        if names is not None and names_here != names:
            raise DataError(f"{shown(path)} names its classes differently from the shards before it")
        names = names_here
        try:
            column = pq.read_table(path, columns=["label"]).column("label").to_pylist()
        except (OSError, pa.ArrowException) as error:
            first = escape(str(error).strip().split("\n")[0])[:120]
            raise DataError(f"{shown(path)}: its labels cannot be read: {first}") from error
        values.update((f"{shard}:{row}", column[row]) for row in rows)
    return _numbered(
        source, names or (), {id: value for id, value in values.items() if value not in (None, -1)}
    )


def _names_in_metadata(schema: pa.Schema) -> tuple[str, ...]:
    """Class names that the `huggingface` entry of the schema gives for `label`; empty when it gives none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _numbered(source: ParquetSource, names: tuple[str, ...], values: dict[str, Any]) -> Labels:
    if not values:
        raise DataError(
            f"{shown(source.location)} holds no labels: every value of the column 'label' is null"
        )
    odd = next((value for value in values.values() if not isinstance(value, int | str)), None)
    if odd is not None:
        raise DataError(
            f"{shown(source.location)}: expected whole numbers or names as labels, found {odd!r:.60}"
        )
    if names and all(isinstance(value, int) for value in values.values()):
        beyond = next((value for value in values.values() if not 0 <= value < len(names)), None)
        if beyond is not None:
            raise DataError(
                f"{shown(source.location)}: label {beyond} has no name; {len(names)} classes are named"
            )
        return Labels(names, values)
    class_names = tuple(sorted({str(value) for value in values.values()}, key=_numbers_in_order))
    number = {name: index for index, name in enumerate(class_names)}
    return Labels(class_names, {id: number[str(value)] for id, value in values.items()})


def _from_tar(source: TarSource) -> dict[str, str]:
    named: dict[str, str] = {}
    for shard in source.shards:
        classes: dict[str, str] = {}
        with (source.root / shard).open("rb") as file:
            for header in tar_members(source.root / shard):
                if isinstance(header, str) or not header.isreg() or not header.name.lower().endswith(".cls"):
                    continue
                if header.size <= _LONGEST_CLASS_NAME:
                    file.seek(header.offset_data)
                    text = file.read(header.size).decode("utf-8", "replace").strip()
                    classes[sample_key(header.name)] = text
        for id in source.ids:
            inside, member = source.members[id]
            if inside == shard and (name := classes.get(sample_key(member.name))):
                named[id] = name
    return named
