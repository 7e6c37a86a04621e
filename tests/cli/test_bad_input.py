"""Bad input through the real command line: one clear line, the documented exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from PIL import Image
from typer.testing import Result

from unpoison.encoders.checkpoints import save_encoder
from unpoison.pretrain.loop import PretrainConfig, pretrain
from unpoison.records import ImageSet

N_GOOD = 60
FILES = "run.json verdict.json findings.parquet clean.txt flagged.txt evidence.safetensors report.html cache"
OPTIONS = ["--clusters", "4", "--device", "cpu", "--precision", "fp32", "--workers", "1"]

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder file, hardly trained."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    pixels = torch.randint(0, 256, (32, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = ImageSet(tuple(map(str, range(32))), pixels.to(torch.uint8))
    config = PretrainConfig(epochs=1, width=4, batch_size=16)
    save_encoder(pretrain(images, config, seed=0, device="cpu", precision="fp32"), path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., Image.Image]) -> Path:
    """60 good images; not to be changed."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(N_GOOD):
        picture(number, 16, 16).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def scan(run: Run, encoder: Path, out: Path) -> Run:
    """scan(images, *options): with the tiny encoder, quietly, into `out`."""

    def invoke(images: Path, *options: object, **kept: Any) -> Result:
        given = [] if "--encoder" in options else ["--encoder", encoder]
        return run("scan", images, *given, "--out", out, *OPTIONS, "--quiet", *options, **kept)

    return invoke


def says(done: Result, code: int, message: str) -> None:
    """One line, on stderr, with the reason; no traceback."""
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("unpoison: error: ") or done.stderr.startswith("error: "), done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- Images ----------------------------------------------------------------------------------------------------------


def test_a_missing_path(scan: Run, tmp_path: Path, out: Path) -> None:
    says(scan(tmp_path / "nowhere"), 2, "nowhere: no such file or folder; expected images")
    assert not out.exists()


def test_an_empty_folder(scan: Run, tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    says(scan(tmp_path / "empty"), 4, "holds no images")
    assert not out.exists()


def test_one_image(scan: Run, tmp_path: Path, pictures: Path, out: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(pictures / "00.png", tmp_path / "one")
    says(scan(tmp_path / "one"), 4, "1 images: a scan needs at least 50")
    assert not out.exists()


def test_too_few_that_can_be_read(scan: Run, tmp_path: Path, pictures: Path, out: Path) -> None:
    shutil.copytree(pictures, tmp_path / "few")
    for number in range(11):
        (tmp_path / "few" / f"{number:02}.png").write_bytes(b"")
    says(
        scan(tmp_path / "few"), 4, f"{N_GOOD - 11} readable images (11 unreadable): a scan needs at least 50"
    )
    assert not out.exists()


def test_the_image_itself_instead_of_its_folder(scan: Run, pictures: Path, out: Path) -> None:
    says(scan(pictures / "00.png"), 2, "is a single image; name the folder that holds it")
    assert not out.exists()


def test_fewer_images_than_clusters(scan: Run, pictures: Path, out: Path) -> None:
    says(scan(pictures, "--clusters", "61"), 2, "clusters=61: there are 60 readable images")
    assert not out.exists()


def test_only_text_files_named_png(scan: Run, tmp_path: Path, out: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(N_GOOD):
        (tmp_path / "texts" / f"{number}.png").write_text("no picture")
    says(scan(tmp_path / "texts"), 4, "none of the 60 images")
    assert not out.exists()


@pytest.fixture
def mixed(
    tmp_path: Path,
    pictures: Path,
    picture: Callable[..., Image.Image],
    encoded: Callable[..., bytes],
    png_header: Callable[[int, int], bytes],
) -> Path:
    """60 good images, three that cannot be read, and one of a single pixel, which can."""
    folder = tmp_path / "mixed"
    shutil.copytree(pictures, folder)
    (folder / "huge.png").write_bytes(png_header(20_000, 20_000))
    (folder / "pixel.png").write_bytes(encoded(picture(99, 1, 1)))
    (folder / "text.png").write_text("no picture")
    jpeg = encoded(picture(98, 64, 64), "JPEG")
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    return folder


def test_a_scan_goes_on_without_images_that_cannot_be_read_but_does_not_call_the_set_clean(
    scan: Run, mixed: Path, out: Path
) -> None:
    done = scan(mixed)
    assert (done.exit_code, done.output) == (4, "")  # 61 of 64 readable: inconclusive
    findings = pandas.read_parquet(out / "findings.parquet").set_index("id")
    reasons = findings["skip_reason"].dropna()
    assert set(reasons.index) == {"huge.png", "text.png", "truncated.jpg"} and len(findings) == 64
    assert "pixels" in reasons["huge.png"]
    assert "not a picture" in reasons["text.png"] and reasons["truncated.jpg"]
    assert not findings.loc[reasons.index, "flagged"].any()
    clean = (out / "clean.txt").read_text().splitlines()
    assert "pixel.png" in clean and len(clean) == 61 and not set(clean) & set(reasons.index)


def reason_of(done: Result, out: Path) -> str:
    """Why a scan is inconclusive."""
    assert (done.exit_code, done.output) == (4, "")
    return str(json.loads((out / "verdict.json").read_text())["reason"])


def test_a_lower_coverage_may_be_asked_for(scan: Run, mixed: Path, run: Run, out: Path) -> None:
    assert "of the images could be read" in reason_of(scan(mixed), out)
    done = scan(mixed, "--min-coverage", "0.9", "--fresh")
    # So few images are no answer all the same, for another reason.
    assert "no amount of poison would have been found" in reason_of(done, out)
    # The same command shows the result, in the words of the first time.
    shown = scan(mixed, "--min-coverage", "0.9")
    assert (shown.exit_code, shown.output) == (done.exit_code, "")


def test_a_coverage_that_is_no_share(scan: Run, pictures: Path, out: Path) -> None:
    says(scan(pictures, "--min-coverage", "99"), 2, "min_coverage=99.0: expected a share between 0 and 1")
    assert not out.exists()


# --- Encoders --------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickled by an unwary loader, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_an_encoder_that_is_a_pickle_bomb(scan: Run, pictures: Path, tmp_path: Path, out: Path) -> None:
    bomb, crater = tmp_path / "encoder.pth", tmp_path / "crater"
    torch.save({"state_dict": Trap(crater)}, bomb)
    says(scan(pictures, "--encoder", bomb), 3, "it would run code when loaded")
    says(scan(pictures, "--encoder", bomb, "--arch", "resnet10"), 3, "it would run code when loaded")
    assert not crater.exists() and not out.exists()
    torch.load(bomb, weights_only=False)  # the trap is real
    assert crater.exists()


def test_an_encoder_that_is_missing_or_no_encoder(
    scan: Run, pictures: Path, tmp_path: Path, out: Path
) -> None:
    missing = scan(pictures, "--encoder", tmp_path / "missing.pth")
    says(missing, missing.exit_code, "missing.pth")
    assert missing.exit_code in (2, 3)
    (tmp_path / "text.safetensors").write_text("no weights")
    says(scan(pictures, "--encoder", tmp_path / "text.safetensors"), 3, "text.safetensors")
    assert not out.exists()


# --- The run folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--fresh"]])
def test_a_folder_with_other_files_is_left_alone(
    scan: Run, pictures: Path, out: Path, more: list[str]
) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    says(scan(pictures, *more), 2, "exists and holds no unpoison run; choose another --out")
    assert contents(out) == {"thesis.tex": b"mine"}


def test_a_file_as_run_folder_is_left_alone(scan: Run, pictures: Path, out: Path) -> None:
    out.write_text("mine")
    says(scan(pictures), 2, "is a file; --out names a folder")
    assert out.read_text() == "mine"


def test_the_same_command_shows_the_result_another_one_is_refused_and_fresh_starts_over(
    scan: Run, run: Run, pictures: Path, encoder: Path, out: Path
) -> None:
    command = ("scan", pictures, "--encoder", encoder, "--out", out, *OPTIONS)
    first = run(*command)
    # Sixty images are too few for `no_evidence`.
    assert first.exit_code == 4 and first.stdout.splitlines()[-1].startswith("inconclusive: see ")
    assert {p.name for p in out.iterdir()} >= set(FILES.split())
    before = contents(out)

    again = run(*command)
    assert (again.exit_code, again.stdout) == (4, first.stdout)
    assert contents(out) == before

    says(scan(pictures, "--seed", "1"), 2, "holds a run with other settings: seed was 0, now 1; choose")
    says(scan(pictures, "--clusters", "5"), 2, "config.clusters was 4, now 5")
    says(scan(pictures, "--limit", "55"), 2, "images.limit was None, now 55")
    assert contents(out) == before

    (out / "notes.txt").write_text("mine")
    done = scan(pictures, "--seed", "1", "--fresh")
    assert (done.exit_code, done.output) == (4, "")
    assert (out / "notes.txt").read_text() == "mine"
    assert b'"seed": 1' in (out / "verdict.json").read_bytes()
