import json
from dataclasses import asdict, replace

import pytest
import torch

from fakes import fake_result
from unpoison import demo
from unpoison.data.views import ViewConfig
from unpoison.errors import ConfigError, DataError, NothingToScanError
from unpoison.pretrain.loop import PretrainConfig
from unpoison.runs import RunFolder

MINI = replace(
    demo.DIGITS, victim=PretrainConfig(epochs=1, batch_size=256, width=8, queue_size=256, views=ViewConfig())
)


@pytest.fixture
def scan(monkeypatch):
    """A scan that flags the poison (and nothing else), counted."""
    calls = []

    def fake(images, encoder, *, out, seed, device, command, progress):
        calls.append(out)
        plan = json.loads((images / "plan.json").read_text())
        bad = {image["id"] for image in plan["poisoned"]}
        ids = sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))
        ids.sort(key=lambda id_: id_ not in bad)
        pixels = torch.zeros(len(ids), 3, 32, 32, dtype=torch.uint8)
        result = fake_result(n_flagged=len(bad), ids=ids, pixels=pixels, seed=seed)
        RunFolder(out, {"seed": seed}).save(result)
        return result

    monkeypatch.setattr(demo, "scan", fake)
    return calls


def test_the_digits_are_all_there_and_always_the_same():
    images, labels, names = demo.embedded_digits()
    again = demo.embedded_digits()[0]
    assert len(images) == 1797 and images.size == 32 and len(names) == 10
    assert list(images.ids) == sorted(images.ids) and images.ids[0] == "0/00000.png"
    assert torch.equal(images.pixels, again.pixels) and labels.bincount().min() > 170
    assert all(id_.startswith(f"{label}/") for id_, label in zip(images.ids, labels.tolist(), strict=True))


def test_photos_without_scikit_image_are_one_clear_line(monkeypatch):
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name)
    )
    with pytest.raises(ConfigError, match="needs scikit-image.*pip install scikit-image"):
        demo.embedded_photos()


def test_photos_are_crops_of_ten_pictures():
    pytest.importorskip("skimage")
    images, labels, names = demo.embedded_photos(3)
    assert len(images) == 30 and len(names) == 10 and labels.bincount().tolist() == [3] * 10


def test_a_split_holds_out_a_share_of_every_class():
    labels = torch.arange(5).repeat_interleave(10)
    ids = tuple(f"{row:03d}" for row in range(50))
    train, test = demo.split_rows(ids, labels, seed=1)
    assert sorted(train + test) == list(range(50)) and labels[test].bincount().tolist() == [3] * 5
    assert test != demo.split_rows(ids, labels, seed=2)[1]


def test_the_story_in_miniature(scan, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    told = demo.run_demo(None, out, seed=3, device="cpu", data="digits", settings=MINI)
    assert told.planted == told.found == told.flagged and told.recall == told.precision == told.top20 == 1
    assert told.control.poison == told.cleaned.poison == 0 < told.backdoored.poison == told.planted
    assert told.cleaned.trained_on == told.n_train - told.planted and told.verdict == "poisoned"
    assert [row[0] for row in told.table] == ["encoder", "never saw poison", "backdoored", "after cleaning"]
    assert len({len(row) for row in told.table}) == 1 and "recall 100.0 %" in told.sentence
    made = {path.name for path in out.iterdir()}
    assert {"demo.json", "poisoned", "encoders", "images", "verdict.json", "clean.txt", "report.html"} <= made
    assert "scan.partial" not in made and (out / "poisoned" / "plan.json").is_file()
    assert len(list((out / "poisoned").rglob("*.png"))) == told.n_train
    assert {path.name for path in (out / "encoders").iterdir()} == {
        f"{who}.safetensors" for who in ("control", "backdoored", "cleaned")
    }
    json.dumps(asdict(told), allow_nan=False)

    # Entered again, it shows what is there; killed after the scan, it comes to the same end.
    monkeypatch.setattr(demo, "pretrain", None)
    assert (
        demo.run_demo(None, out, seed=3, device="cpu", data="digits", settings=MINI) == told
        and len(scan) == 1
    )
    # So it does where another version wrote less.
    marker = json.loads((out / "demo.json").read_text())
    for result in (None, {**marker["result"], "control": {"accuracy": 90.0}}):
        (out / "demo.json").write_text(json.dumps({**marker, "result": result}))
        again = demo.run_demo(None, out, seed=3, device="cpu", data="digits", settings=MINI)
        assert replace(again, seconds=told.seconds) == told and len(scan) == 1

    with pytest.raises(ConfigError, match="holds a demo with seed 3, not 4.*--fresh"):
        demo.run_demo(None, out, seed=4, device="cpu", data="digits", settings=MINI)


def test_one_s_own_images_need_classes_and_enough_of_them(image_folder, tmp_path):
    with pytest.raises(NothingToScanError, match="at least 200 readable images in 2 classes.*got 6 in 2"):
        demo.run_demo(image_folder, tmp_path / "out", device="cpu")
    with pytest.raises(DataError, match="holds no labels"):
        demo.run_demo(image_folder / "cat", tmp_path / "other", device="cpu")
    with pytest.raises(ConfigError, match="no such file or folder"):
        demo.run_demo(tmp_path / "nowhere", tmp_path / "third", device="cpu")
    assert not {"out", "other", "third"} & {
        path.name for path in tmp_path.iterdir()
    }  # the next try is not refused


def test_one_s_own_images_are_attacked_in_the_largest_class(scan, picture, tmp_path):
    folder = tmp_path / "mine"
    for name, count in (("cats & dogs", 90), ("owls", 130)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture(index + count, 40, 32).save(folder / name / f"{index}.png")
    mini = replace(MINI, attack=replace(MINI.attack, targets=(1,)))
    told = demo.run_demo(folder, tmp_path / "out", device="cpu", settings=mini)
    assert told.target == "owls" and told.planted == 91 and told.n_test == 66
    assert not (tmp_path / "out" / "images").exists() and len(list(folder.rglob("*.png"))) == 220
    loaded, labels, names = demo._own_images(folder, None, 0, demo.silent)
    chosen = demo._settings_for(loaded, labels)
    assert chosen.attack.targets == (1,) and chosen.image_size == 32 and names == ("cats _ dogs", "owls")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_foreign_folder_is_never_touched(tmp_path, fresh):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "demo.json").write_text('{"mine": true}')
    with pytest.raises(ConfigError, match="was not made by this demo"):
        demo.run_demo(None, tmp_path, fresh=fresh)
    with pytest.raises(ConfigError, match="is a file: expected a folder"):
        demo.run_demo(None, tmp_path / "thesis.txt", fresh=fresh)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_unknown_data_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match="data='cats': expected digits or photos"):
        demo.run_demo(None, tmp_path / "out", data="cats")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path):
    pytest.importorskip("skimage")
    told = demo.run_demo(None, tmp_path / "demo", device="cpu", data="photos")
    control, bad, cleaned = told.control, told.backdoored, told.cleaned
    assert bad.attack_success >= 5 * max(bad.untriggered_rate, 1)
    assert bad.patched_accuracy <= bad.accuracy - 20
    assert told.verdict == "poisoned" and told.top20 >= 0.95 and told.recall >= 0.95
    assert abs(cleaned.attack_success - control.attack_success) <= 3
    # By kNN: two linear probes of clean encoders may differ by five points on a patch that neither saw.
    assert abs(cleaned.knn_patched_accuracy - control.knn_patched_accuracy) <= 3


def test_starting_over_removes_what_a_demo_wrote_and_nothing_else(scan, tmp_path):
    out = tmp_path / "demo"
    told = demo.run_demo(None, out, seed=3, device="cpu", data="digits", settings=MINI)
    (out / "notes.txt").write_text("mine")
    (out / "poisoned" / "old.png").write_text("of the earlier demo")
    again = demo.run_demo(None, out, seed=3, device="cpu", data="digits", settings=MINI, fresh=True)
    assert replace(again, seconds=told.seconds) == told and len(scan) == 2
    assert (out / "notes.txt").read_text() == "mine" and not (out / "poisoned" / "old.png").exists()


def test_a_demo_does_not_write_among_the_images(image_folder):
    with pytest.raises(ConfigError, match="lies inside the source"):
        demo.run_demo(image_folder, image_folder / "demo", device="cpu")
    assert not (image_folder / "demo").exists()
