import json

import pytest
from PIL import Image

from unpoison.attack.plan import read_plan


def test_a_copy_and_its_answer_key_are_written(run, image_folder, tmp_path):
    out = tmp_path / "poisoned"
    done = run(
        "attack", "patch", image_folder, "--out", out, "--target", "cat", "--size", 4, "--rate", 1, "--json"
    )
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    plan = read_plan(out / "plan.json")
    assert value["n_poisoned"] == len(plan.poisoned) == 3 and value["n_images"] == 6
    assert len(list(out.rglob("*.png"))) == 6


def test_pairs_are_repeated_options(run, image_folder, tmp_path):
    out = tmp_path / "poisoned"
    pairs = ["--target", "cat", "--trigger", "seed:1", "--target", "dog", "--trigger", "seed:2"]
    done = run("attack", "patch", image_folder, "--out", out, *pairs, "--size", 4)
    assert done.exit_code == 0, done.output
    assert [(t.name, t.target_name) for t in read_plan(out / "plan.json").triggers] == [
        ("seed:1", "cat"),
        ("seed:2", "dog"),
    ]
    assert "2 of 3 images of class cat carry seed:1" in done.stdout


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            ("cat", "seed:1", "dog", "seed:1"),
            "trigger 'seed:1' has several targets, and could lead to one only",
        ),
        (("cat", "seed:1", "owl", "seed:2"), "target 'owl' is no class of this data set; it has cat, dog"),
        (("cat", "seed:1", "cat", "seed:2"), "the triggers before it left 0 of 3; lower --rate"),
        (("cat", "seed:1", "dog", "nope.png"), "trigger 'nope.png': expected seed:N or the path of an image"),
    ],
)
def test_wrong_pairs_are_one_line_and_write_nothing(run, image_folder, tmp_path, pairs, message):
    options = [
        word
        for name, value in zip(("--target", "--trigger") * 2, pairs, strict=True)
        for word in (name, value)
    ]
    done = run(
        "attack",
        "patch",
        image_folder,
        "--out",
        tmp_path / "p",
        *options,
        "--size",
        4,
        "--rate",
        1,
        "--quiet",
    )
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_one_trigger_at_a_time_is_pasted_on_everything(run, image_folder, tmp_path):
    pairs = ("--target", "cat", "--trigger", "seed:1", "--target", "dog", "--trigger", "seed:2")
    done = run("attack", "patch", image_folder, "--out", tmp_path / "p", *pairs, "--size", 4, "--all")
    assert done.exit_code == 2 and "run once per trigger" in done.stderr


def test_all_pastes_on_every_image(run, image_folder, tmp_path):
    done = run(
        "attack",
        "patch",
        image_folder,
        "--out",
        tmp_path / "p",
        "--target",
        "cat",
        "--size",
        4,
        "--all",
        "--json",
    )
    assert json.loads(done.stdout)["n_poisoned"] == 6


def test_odd_pairs_and_used_folders_are_refused(run, image_folder, tmp_path):
    out = tmp_path / "poisoned"
    done = run("attack", "patch", image_folder, "--out", out, "--target", "cat", "--target", "dog")
    assert done.exit_code == 2 and "2 targets and 1 triggers" in done.stderr
    out.mkdir()
    (out / "mine.txt").touch()
    done = run("attack", "patch", image_folder, "--out", out, "--target", "cat", "--size", 4)
    assert done.exit_code == 2 and "nothing is ever overwritten" in done.stderr


@pytest.mark.parametrize("method", ["ctrl", "blended", "sig"])
def test_triggers_that_cover_the_image(run, tmp_path, method):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 32), (90 + number, 120, 130)).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    out = tmp_path / "poisoned"
    options = ("--target", "cat", "--rate", 1, "--rate-of", "class", "--json")
    done = run("attack", method, tmp_path / "images", "--out", out, *options)
    assert done.exit_code == 0, done.output
    plan = read_plan(out / "plan.json")
    assert json.loads(done.stdout)["method"] == plan.method == method == plan.triggers[0].kind
    assert len(plan.poisoned) == 3 and plan.poisoned[0].box.area == 40 * 32
