"""What a scan found, turned into a clean data set: the kept images, written anew, and nothing else.

Keeps exactly what the scan's list of clean images names: not what it flagged, and not what it could not read, because
what was never examined must not end up in a folder called clean. For the same reason the images must be the very ones
that were scanned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from unpoison.data.export import CleanCopy, CopyMode, clean_copy
from unpoison.data.load import fingerprint_of
from unpoison.data.sources import ImageSource, open_source
from unpoison.errors import ConfigError, DataError
from unpoison.records import ScanResult
from unpoison.runtime import Progress, silent

__all__ = ["Cleaned", "KeptList", "clean", "open_scanned", "read_kept_list"]


@dataclass(frozen=True, kw_only=True)
class KeptList:
    """What a finished scan says about every image that it was given.

    Attributes:
        name: of the scan, for messages.
        verdict: `poisoned`, `no_evidence` or `inconclusive`.
        examined: every id that the scan was given.
        keep: ids to keep.
        flagged: ids to leave out because the scan flagged them.
        skipped: ids to leave out because they could not be read.
        fingerprint: of the images, see `ImageSet`.
        signature: of the source, see `ImageSource.signature`; changes when a file was touched; empty when unknown.
    """

    name: str
    verdict: str
    examined: tuple[str, ...]
    keep: tuple[str, ...]
    flagged: tuple[str, ...]
    skipped: tuple[str, ...]
    fingerprint: str
    signature: str


@dataclass(frozen=True, kw_only=True)
class Cleaned(CleanCopy):
    """What a cleaned copy holds, and why the other images are missing.

    Attributes:
        verdict: of the scan; only after `poisoned` was anything flagged.
        flagged: images left out because the scan flagged them.
        skipped: images left out because they could not be read.
    """

    verdict: str
    flagged: int
    skipped: int


def clean(
    images: str | Path,
    run: str | Path | ScanResult,
    out: str | Path,
    *,
    mode: CopyMode = "copy",
    root: str | Path | None = None,
    follow_links: bool = False,
    progress: Progress = silent,
) -> Cleaned:
    """Write the images that a scan did not flag; the source is only read.

    Args:
        images: what was scanned: a folder, parquet or tar shards, or a list file.
        run: the scan's run folder, or its result.
        out: a folder that does not exist yet or is empty, outside the images.
        mode: `copy`, `link` or `list`; see `data.export.clean_copy`.
        root: see `data.sources.open_source`, as for `follow_links`.
        follow_links: whether links may leave the folder.
        progress: told (stage, done, total).

    Raises:
        ConfigError: `run` holds no finished scan, or `out` cannot be used.
        DataError: the images are not those that were scanned, or cannot be copied; nothing was written then.
    """
    kept = read_kept_list(run)
    source = open_scanned(images, kept, root=root, follow_links=follow_links)
    copy = clean_copy(source, kept.keep, out, mode, progress=progress)
    return Cleaned(**asdict(copy), verdict=kept.verdict, flagged=len(kept.flagged), skipped=len(kept.skipped))


def read_kept_list(run: str | Path | ScanResult) -> KeptList:
    """Read what a scan says to keep.

    Raises:
        ConfigError: the folder holds no finished scan.
        DataError: its files are damaged.
    """
    if isinstance(run, ScanResult):
        left_out = run.findings["flagged"].astype(bool) | run.findings["skip_reason"].notna()
        return _kept_list("the scan", run.summary, run.findings, tuple(run.findings.loc[~left_out, "id"]), "")
    folder = Path(run)
    needed = [folder / name for name in ("verdict.json", "findings.parquet", "clean.txt", "run.json")]
    missing = next((path for path in needed if not path.is_file()), None)
    if missing is not None:
        raise ConfigError(
            f"--run {folder} holds no {missing.name}: expected the folder of a finished `unpoison scan`"
        )
    try:
        summary = json.loads(needed[0].read_text(encoding="utf-8"))
        findings = pd.read_parquet(needed[1], columns=["id", "flagged", "skip_reason"])
        keep = tuple(line for line in needed[2].read_text(encoding="utf-8").split("\n") if line)
        settings = json.loads(needed[3].read_text(encoding="utf-8"))
        return _kept_list(str(folder), summary, findings, keep, str(settings["images"]["signature"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"--run {folder}: a file of the run is damaged; scan again with --fresh") from error


def _kept_list(
    name: str, summary: Mapping[str, Any], findings: pd.DataFrame, keep: tuple[str, ...], signature: str
) -> KeptList:
    # Someone may have looked at the images and edited clean.txt, which has the last word.
    out = findings[~findings["id"].isin(keep)]
    return KeptList(
        name=name,
        verdict=str(summary["verdict"]),
        examined=tuple(findings["id"]),
        keep=keep,
        flagged=tuple(out.loc[out["flagged"].astype(bool), "id"]),
        skipped=tuple(out.loc[out["skip_reason"].notna(), "id"]),
        fingerprint=str(summary["images_fingerprint"]),
        signature=signature,
    )


def open_scanned(
    images: str | Path, kept: KeptList, *, root: str | Path | None = None, follow_links: bool = False
) -> ImageSource:
    """Open the images of a scan, and refuse others.

    Raises:
        ConfigError: as `open_source`.
        DataError: ids are missing or new, or the files changed since the scan.
    """
    source = open_source(images, root=root, follow_links=follow_links)
    here = {*source.ids, *(entry.id for entry in source.refused)}
    examined = set(kept.examined)
    new, gone = here - examined, examined - here
    if gone:
        raise DataError(
            f"{kept.name} is the scan of other images: it knows {len(gone)} that {source.location} lacks, such as "
            f"{min(gone)!r}; name the images that were scanned, or scan these"
        )
    if new:
        raise DataError(
            f"{kept.name} never examined {len(new)} of the {len(here)} images of {source.location}, such as "
            f"{min(new)!r}; scan all of them, then clean"
        )
    # Same names, sizes and times: the same images. Otherwise only their bytes can tell.
    if source.signature() != kept.signature and fingerprint_of(source) != kept.fingerprint:
        readable = examined - set(kept.skipped)
        lost = [raw.id for raw in source.stream() if raw.data is None and raw.id in readable]
        if lost:
            raise DataError(
                f"{len(lost)} of the {len(examined)} images that {kept.name} examined cannot be read below "
                f"{source.root}, such as {min(lost)!r}; a list needs the --root that it was scanned with"
            )
        raise DataError(
            f"the images of {source.location} changed since {kept.name}: same names, other bytes; scan them again"
        )
    return source
