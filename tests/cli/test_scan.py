import json
import logging
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from fakes import fake_result
from unpoison.scan.config import ScanConfig


@pytest.fixture
def scanning(replace_module):
    """Make `unpoison.pipeline.scan` give a result, or raise; returns the calls that it got."""

    def prepare(outcome):
        calls = []

        def scan(images, encoder=None, **options):
            calls.append({"images": images, "encoder": encoder, **options})
            options["out"].mkdir(exist_ok=True)
            if isinstance(outcome, BaseException):
                raise outcome
            if "pretrain_config" in options:
                options["progress"]("pretrain moco-v2", 1, 2)
            options["progress"]("search", 1, 2)
            return outcome

        replace_module("pipeline", scan=scan)
        return calls

    return prepare


@pytest.mark.parametrize(
    ("verdict", "more", "code"),
    [
        ("no_evidence", [], 0),
        ("poisoned", [], 1),
        ("poisoned", ["--exit-zero"], 0),
        ("inconclusive", [], 4),
        ("inconclusive", ["--exit-zero"], 4),
    ],
)
def test_the_verdict_is_the_exit_code(run, scanning, image_folder, tmp_path, verdict, more, code):
    scanning(fake_result(verdict))
    done = run("scan", image_folder, "--out", tmp_path / "run", *more)
    assert done.exit_code == code
    assert done.stdout.splitlines()[-1] == f"{verdict}: see {tmp_path / 'run' / 'report.html'}"
    assert "unpoison: search: 1 of 2" in done.stderr


def test_json_is_alone_on_stdout(run, scanning, image_folder, tmp_path):
    scanning(fake_result())
    done = run("scan", image_folder, "--out", tmp_path / "run", "--json")
    value = json.loads(done.stdout)
    assert value["verdict"] == "poisoned" and value["report"] == str(tmp_path / "run" / "report.html")


def test_quiet_prints_nothing_at_all(run, scanning, image_folder, tmp_path):
    scanning(fake_result())
    done = run("scan", image_folder, "--out", tmp_path / "run", "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "")


def test_defaults_are_those_of_the_config(run, scanning, image_folder, tmp_path):
    calls = scanning(fake_result())
    run("scan", image_folder, "--out", tmp_path / "run")
    (call,) = calls
    assert call["config"] == ScanConfig()
    assert (call["images"], call["encoder"], call["seed"], call["device"]) == (image_folder, None, 0, "auto")
    assert call["batch_size"] is None and call["fresh"] is False and call["min_coverage"] == 0.99
    assert call["command"].split()[0] == "unpoison"


def test_every_option_reaches_the_scan(run, scanning, image_folder, tmp_path):
    calls = scanning(fake_result())
    only = tmp_path / "only.txt"
    only.write_text("cat/0.png\n")
    options = "--clusters 30 --window 9 --masks blocks --n-masks 64 --patches 3 --attention gradcam"
    options += " --score any --top-k 10"
    options += (
        " --alpha 0.05 --method patchsearch --root r --follow-links --limit 5 --min-coverage 0.5 --fresh"
    )
    options += " --seed 3 --device cpu --precision fp32 --batch-size 64 --workers 2"
    done = run("scan", image_folder, "--out", tmp_path / "run", *options.split(), "--only", only)
    assert done.exit_code == 1, done.output
    (call,) = calls
    assert call["config"] == ScanConfig(
        method="patchsearch",
        clusters=30,
        window=9,
        masks="blocks",
        n_masks=64,
        patches=3,
        attention="gradcam",
        score="any",
        top_k=10,
        alpha=0.05,
    )
    wanted = {
        "root": Path("r"),
        "follow_links": True,
        "limit": 5,
        "min_coverage": 0.5,
        "fresh": True,
        "seed": 3,
    }
    wanted |= {"device": "cpu", "precision": "fp32", "batch_size": 64, "workers": 2, "only": ("cat/0.png",)}
    assert {name: call[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "2"], "alpha=2.0: expected a false-alarm rate"),
        (["--method", "magic"], "method='magic': expected auto or poisoncam or patchsearch"),
        (["--batch-size", "few"], "--batch-size few: expected auto"),
        (["--compile"], "--compile is about the encoder that --encoder names; name one"),
        (["--arch", "resnet18"], "--arch resnet18 is about the encoder that --encoder names"),
        (
            ["--encoder", "a.pth", "--epochs", 7],
            "--epochs 7 is of the encoder that a scan trains: --encoder a.pth",
        ),
        (
            ["--method", "spectral-dct", "--epochs", 7],
            "a scan trains: spectral-dct trains none; leave it out",
        ),
        (["--only", "missing.txt"], "--only missing.txt cannot be read"),
    ],
)
def test_a_bad_setting_is_2_and_one_line(run, image_folder, tmp_path, options, message):
    done = run("scan", image_folder, "--out", tmp_path / "run", *options)
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_run_folder_is_required(run, image_folder):
    assert run("scan", image_folder).exit_code == 2


def test_an_unforeseen_error_is_logged_in_the_run_folder(run, scanning, image_folder, tmp_path):
    scanning(ZeroDivisionError("surprise"))
    done = run("scan", image_folder, "--out", tmp_path / "run")
    assert done.exit_code == 3 and str(tmp_path / "run" / "log.txt") in done.stderr
    assert "ZeroDivisionError: surprise" in (tmp_path / "run" / "log.txt").read_text()


def test_an_interrupt_is_130(run, scanning, image_folder, tmp_path):
    scanning(KeyboardInterrupt())
    assert run("scan", image_folder, "--out", tmp_path / "run").exit_code == 130


def test_ids_cannot_steer_the_terminal(run, scanning, image_folder, tmp_path):
    ids = ["\x1b[2J.png", *map(str, range(39))]
    scanning(fake_result(ids=ids, skipped={"\x9bx": "\x07"}))
    done = run("scan", image_folder, "--out", tmp_path / "run")
    assert all(c in "\n\u202f" or c.isprintable() for c in done.output)


def test_an_encoder_is_a_reference_and_is_loaded_here_only_when_it_needs_help(
    run, scanning, image_folder, tmp_path, monkeypatch
):
    calls = scanning(fake_result())
    loads = []
    monkeypatch.setattr(
        "unpoison.encoders.checkpoints.load_encoder",
        lambda name, **options: loads.append((name, options)) or "loaded",
    )
    run("scan", image_folder, "--out", tmp_path / "run", "--encoder", "timm:resnet18")
    run(
        "scan",
        image_folder,
        "--out",
        tmp_path / "run",
        "--encoder",
        "a.pth",
        "--arch",
        "resnet18",
        "--image-size",
        64,
    )
    assert [call["encoder"] for call in calls] == ["timm:resnet18", "loaded"]
    assert loads == [("a.pth", {"arch": "resnet18", "image_size": 64, "device": "auto", "precision": "auto"})]


def test_an_encoder_is_compiled_on_demand(run, scanning, image_folder, tmp_path, monkeypatch):
    calls, loaded = scanning(fake_result()), Mock()
    monkeypatch.setattr("unpoison.encoders.checkpoints.load_encoder", lambda name, **options: loaded)
    done = run("scan", image_folder, "--out", tmp_path / "run", "--encoder", "timm:resnet18", "--compile")
    assert done.exit_code == 1 and calls[0]["encoder"] is loaded
    loaded.compile.assert_called_once_with()


def test_without_an_encoder_it_says_that_it_trains_one(run, scanning, image_folder, tmp_path):
    calls = scanning(fake_result())
    done = run("scan", image_folder, "--out", tmp_path / "run", "--epochs", 7, "--image-size", 32)
    assert "no --encoder: training one on the images first" in done.stderr
    assert calls[0]["pretrain_config"].epochs == 7 and calls[0]["image_size"] == 32


def test_it_does_not_say_so_where_there_is_nothing_to_train_on(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for images in (tmp_path / "empty", tmp_path / "nowhere"):
        done = run("scan", images, "--out", tmp_path / "run")
        assert done.exit_code in (2, 4) and done.stderr.count("\n") == 1 and "training" not in done.stderr


def test_quiet_silences_warnings_for_one_run(run, replace_module, image_folder, tmp_path, caplog):
    def scan(images, encoder=None, **options):
        options["out"].mkdir(exist_ok=True)
        logging.getLogger("unpoison.encoders").warning("mean not given")
        return fake_result()

    replace_module("pipeline", scan=scan)
    run("scan", image_folder, "--out", tmp_path / "run", "--quiet")
    assert caplog.text == ""
    run("scan", image_folder, "--out", tmp_path / "run")
    assert "mean not given" in caplog.text


def test_a_detector_gets_its_parts_and_no_encoder_is_trained(run, scanning, image_folder, tmp_path):
    calls = scanning(fake_result("no_evidence"))
    options = [
        "--method",
        "cross-encoder",
        "--encoder",
        "timm:a",
        "--other",
        "timm:b",
        "--auxiliary",
        image_folder,
    ]
    done = run("scan", image_folder, "--out", tmp_path / "run", *options, "--false-positive-rate", 0.05)
    assert done.exit_code == 0, done.output
    assert calls[0]["config"] == ScanConfig(method="cross-encoder", false_positive_rate=0.05)
    assert (calls[0]["encoder"], calls[0]["other"], calls[0]["auxiliary"]) == (
        "timm:a",
        "timm:b",
        image_folder,
    )
    assert "detector" not in calls[0]

    file = tmp_path / "detector.safetensors"
    done = run(
        "scan", image_folder, "--out", tmp_path / "run", "--method", "spectral-dct", "--detector", file
    )
    assert "training one" not in done.stderr and calls[1]["encoder"] is None and calls[1]["detector"] == file


@pytest.fixture
def previewing(replace_module):
    """Make `unpoison.pipeline.preview` give a small scan's, with or without an encoder; returns its calls."""
    from unpoison.encoders.rate import Rate
    from unpoison.scan.cost import expected_cost

    def forbidden(*_, **__):
        raise AssertionError("nothing may run")

    def prepare(*, with_encoder=True):
        calls, rate = [], Rate(1000.0, 64, 2**30) if with_encoder else None

        def preview(images, encoder=None, **options):
            calls.append({"images": images, "encoder": encoder, **options})
            config = options["config"].resolve(1000, 32)
            seen = {
                "config": config,
                "n_images": 1000,
                "batch_size": 512,
                "rate": rate,
                "power": "A sentence",
            }
            seen |= {"cost": expected_cost(config, 1000, 32), "seconds": rate and 12.3}
            return SimpleNamespace(**seen, pretraining=0 if rate else 20_000)

        replace_module("pipeline", preview=preview, scan=forbidden)
        return calls

    return prepare


def test_a_dry_run_prints_the_cost_and_writes_nothing(run, previewing, image_folder, tmp_path):
    calls = previewing()
    out = tmp_path / "run"
    done = run("scan", image_folder, "--out", out, "--encoder", "timm:resnet18", "--dry-run", "--limit", 1000)
    assert done.exit_code == 0, done.output
    assert "Encoder passes for 1,000 images" in done.stdout and "about 12 s in the encoder" in done.stdout
    assert "memory of the device: 1,024 MiB" in done.stdout and "A sentence." in done.stdout
    assert not out.exists() and calls[0]["limit"] == 1000 and calls[0]["encoder"] == "timm:resnet18"


def test_a_dry_run_as_json(run, previewing, image_folder, tmp_path):
    previewing(with_encoder=False)
    done = run("scan", image_folder, "--out", tmp_path / "run", "--dry-run", "--json")
    value = json.loads(done.stdout)
    assert value["schema"] == 1
    assert value["expected_passes"] == sum(stage["expected"] for stage in value["passes"].values())
    assert value["expected_seconds"] is None and value["pretraining_images"] == 20_000
    assert value["config"]["clusters"] == 50


@pytest.mark.parametrize(("text", "value"), [("200", 200.0), ("0.002", 0.002), ("0.2%", 0.002)])
def test_the_smallest_poison_is_a_number_or_a_share(run, scanning, image_folder, tmp_path, text, value):
    calls = scanning(fake_result())
    more = ["--race", "--max-passes", 500_000, "--max-seconds", 60]
    run("scan", image_folder, "--out", tmp_path / "run", "--min-poison", text, *more)
    wanted = ScanConfig(min_poison=value, race=True, max_passes=500_000, max_seconds=60)
    assert calls[0]["config"] == wanted


def test_a_smallest_poison_that_is_no_number_is_refused(run, image_folder, tmp_path):
    done = run("scan", image_folder, "--out", tmp_path / "run", "--min-poison", "few")
    assert done.exit_code == 2 and "--min-poison few: expected a number of images" in done.stderr
