"""From a scan to the kept images; the copy itself is tested in tests/data/test_export.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import unpoison
from fakes import fake_result
from unpoison.data.load import load_images
from unpoison.errors import DataError
from unpoison.records import Geometry, ScanResult
from unpoison.repair.filtering import clean, read_kept_list


@pytest.fixture
def result(image_folder: Path) -> ScanResult:
    """A scan of `image_folder` that flagged one image and could not read another."""
    images = load_images(unpoison.open_source(image_folder), Geometry(16, 16))
    found = fake_result(n_images=6, n_flagged=1)
    findings = found.findings.iloc[:6].assign(id=images.ids, flagged=False, skip_reason=None)
    findings.loc[5, "flagged"] = True
    findings.loc[0, "skip_reason"] = "the file is empty"
    summary = found.summary | {"images_fingerprint": images.fingerprint}
    return dataclasses.replace(found, findings=findings, summary=summary)


def test_a_result_in_memory_is_as_good_as_a_run_folder(
    result: ScanResult, image_folder: Path, tmp_path: Path
) -> None:
    done = clean(image_folder, result, tmp_path / "cleaned")
    assert (done.kept, done.removed, done.flagged, done.skipped, done.verdict) == (4, 2, 1, 1, "poisoned")
    kept = sorted(
        p.relative_to(tmp_path / "cleaned").as_posix() for p in (tmp_path / "cleaned").rglob("*.png")
    )
    assert kept == ["cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png"]
    assert unpoison.clean is clean


def test_a_list_without_its_root_is_told_from_changed_images(
    result: ScanResult, image_folder: Path, tmp_path: Path
) -> None:
    names = tmp_path / "elsewhere" / "list.txt"
    names.parent.mkdir()
    names.write_text("".join(f"{id_}\n" for id_ in result.findings["id"]))
    with pytest.raises(DataError, match=r"5 of the 6 images .* cannot be read below .*elsewhere, .* --root"):
        clean(names, result, tmp_path / "cleaned")
    assert not (tmp_path / "cleaned").exists()
    assert clean(names, result, tmp_path / "cleaned", root=image_folder).kept == 4


def test_images_that_changed_since_are_refused(
    result: ScanResult, image_folder: Path, tmp_path: Path
) -> None:
    (image_folder / "cat/1.png").write_bytes((image_folder / "cat/2.png").read_bytes())
    with pytest.raises(DataError, match=r"changed since the scan: same names, other bytes; scan them again"):
        clean(image_folder, result, tmp_path / "cleaned")


def test_what_someone_took_back_or_dropped_counts(result: ScanResult, tmp_path: Path) -> None:
    """clean.txt has the last word over the column `flagged`."""
    from unpoison.data.export import write_json_atomically

    write_json_atomically(tmp_path / "verdict.json", result.summary)
    write_json_atomically(tmp_path / "run.json", {"images": {"signature": "s"}})
    result.findings.to_parquet(tmp_path / "findings.parquet")
    (tmp_path / "clean.txt").write_text("cat/1.png\ndog/2.png\n")
    kept = read_kept_list(tmp_path)
    assert (kept.keep, kept.flagged, kept.skipped) == (("cat/1.png", "dog/2.png"), (), ("cat/0.png",))
    assert len(kept.examined) == 6 and kept.signature == "s"
