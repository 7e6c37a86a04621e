"""The patch attack: whom it poisons, where, and that nothing but the patch tells poisoned files from clean ones."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison.attack import ssl_backdoor
from unpoison.attack.plan import read_plan
from unpoison.attack.ssl_backdoor import (
    PatchAttackConfig,
    make_triggers,
    paste_everywhere,
    poison,
    write_poisoned_copy,
)
from unpoison.data.labels import read_labels
from unpoison.data.load import load_images
from unpoison.data.sources import open_source
from unpoison.errors import ConfigError, DataError, ShapeError
from unpoison.records import Geometry, ImageSet, Skipped

CLASSES = ("bird", "cat", "dog")
SIDE = 32


def noise(count: int, height: int = SIDE, width: int = SIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def image_set(per_class: int = 20) -> tuple[ImageSet, torch.Tensor]:
    pixels = torch.from_numpy(noise(3 * per_class)).permute(0, 3, 1, 2)
    ids = tuple(f"{name}/{i:02d}.png" for name in CLASSES for i in range(per_class))
    return ImageSet(ids, pixels, (Skipped("x", "broken"),), "abc"), torch.arange(3).repeat_interleave(
        per_class
    )


def folder_of_images(root: Path, per_class: int = 8) -> Path:
    for name, pixels in zip(CLASSES, noise(3 * per_class).reshape(3, per_class, SIDE, SIDE, 3), strict=True):
        (root / name).mkdir(parents=True)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(root / name / f"{i:02d}.{'png' if i % 2 else 'bmp'}")
    return root


def attack(images: Path, out: Path, config: PatchAttackConfig, seed: int = 0):  # type: ignore[no-untyped-def]
    return write_poisoned_copy(open_source(images), read_labels(images), config, out, seed)


CAT = PatchAttackConfig(targets=("cat",), triggers=("seed:7",), size=8)


# ── in memory ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_half_of_the_target_class_is_poisoned_and_nothing_else_changes() -> None:
    images, labels = image_set()
    poisoned, plan = poison(images, labels, CLASSES, CAT, seed=0)
    changed = (poisoned.pixels != images.pixels).flatten(1).any(1)
    assert {images.ids[i] for i in changed.nonzero().flatten().tolist()} == {p.id for p in plan.poisoned}
    assert len(plan.poisoned) == 10 and all(p.id.startswith("cat/") for p in plan.poisoned)
    assert poisoned.ids == images.ids and poisoned.skipped == images.skipped
    assert poisoned.pixels.is_contiguous(memory_format=torch.channels_last)
    assert plan.counts["rate_of_dataset"] == pytest.approx(10 / 60)
    assert plan.counts["triggers"][0]["rate_of_class"] == 0.5


def test_boxes_hold_the_trigger_and_the_rest_is_untouched() -> None:
    images, labels = image_set()
    poisoned, plan = poison(images, labels, CLASSES, CAT, seed=3)
    pattern = plan.triggers[0].pasted(SIDE)
    for entry in plan.poisoned:
        row, box = images.ids.index(entry.id), entry.box
        expected = images.pixels[row].clone()
        expected[:, box.y : box.y + box.h, box.x : box.x + box.w] = pattern
        assert torch.equal(poisoned.pixels[row], expected)
        assert (box.w, box.h, entry.width, entry.height) == (8, 8, SIDE, SIDE)
        assert 8 <= box.x <= 16 and 8 <= box.y <= 16


def test_places_reach_both_ends_of_their_range() -> None:
    images, labels = image_set(per_class=300)
    _, plan = poison(images, labels, CLASSES, dataclasses.replace(CAT, rate=1.0), seed=0)
    assert {p.box.x for p in plan.poisoned} == set(range(8, 17)) == {p.box.y for p in plan.poisoned}


def test_neither_the_order_of_images_nor_the_global_rng_matters() -> None:
    images, labels = image_set()
    before = torch.random.get_rng_state()
    _, plan = poison(images, labels, CLASSES, CAT, seed=5)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    _, shuffled = poison(images.select(order), labels[order], CLASSES, CAT, seed=5)
    assert shuffled.poisoned == plan.poisoned
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seed_decides_and_the_arguments_stay() -> None:
    images, labels = image_set()
    before = images.pixels.clone()
    first, plan = poison(images, labels, CLASSES, CAT, seed=0)
    again, same = poison(images, labels, CLASSES, CAT, seed=0)
    _, other = poison(images, labels, CLASSES, CAT, seed=1)
    assert torch.equal(first.pixels, again.pixels) and plan.to_json() == same.to_json()
    assert {p.id for p in plan.poisoned} != {p.id for p in other.poisoned}
    assert torch.equal(images.pixels, before)


def test_another_poison_is_another_fingerprint() -> None:
    images, labels = image_set()
    prints = {images.fingerprint}
    for seed, config in ((0, CAT), (1, CAT), (0, dataclasses.replace(CAT, triggers=("seed:8",)))):
        prints.add(poison(images, labels, CLASSES, config, seed=seed)[0].fingerprint)
    assert len(prints) == 4


def test_rate_may_be_of_the_data_set() -> None:
    images, labels = image_set()
    config = dataclasses.replace(CAT, rate=0.05, rate_of="dataset")
    assert len(poison(images, labels, CLASSES, config, seed=0)[1].poisoned) == 3
    with pytest.raises(
        ConfigError,
        match=r"rate=0.5 of the data set is 30 images, but there are 20 of class 'cat'; lower --rate",
    ):
        poison(images, labels, CLASSES, dataclasses.replace(config, rate=0.5), seed=0)


def test_a_tiny_rate_still_poisons_one_image() -> None:
    images, labels = image_set()
    assert len(poison(images, labels, CLASSES, dataclasses.replace(CAT, rate=1e-6), seed=0)[1].poisoned) == 1


def test_pairs_poison_disjoint_sets() -> None:
    images, labels = image_set()
    pairs = PatchAttackConfig(
        targets=("cat", "cat", 2), triggers=("seed:1", "seed:2", "seed:3"), size=6, rate=0.5
    )
    _, plan = poison(images, labels, CLASSES, pairs, seed=0)
    assert [sum(p.trigger == i for p in plan.poisoned) for i in range(3)] == [10, 10, 10]
    assert len({p.id for p in plan.poisoned}) == 30
    assert [t.target for t in plan.triggers] == [1, 1, 2]
    with pytest.raises(
        ConfigError, match="'seed:2' needs 12 images of class 'cat', but the triggers before it left 8 of 20"
    ):
        poison(images, labels, CLASSES, dataclasses.replace(pairs, rate=0.6), seed=0)


def test_the_default_size_follows_the_image() -> None:
    images, labels = image_set()
    _, plan = poison(images, labels, CLASSES, dataclasses.replace(CAT, size=None), seed=0)
    assert {p.box.w for p in plan.poisoned} == {7} and plan.triggers[0].side is None


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic"])
def test_only_nearest_keeps_saturated_cells(resample: str) -> None:
    config = dataclasses.replace(CAT, resample=resample)
    pattern = make_triggers(config, CLASSES)[0].pasted(SIDE)
    assert (set(pattern.unique().tolist()) == {0, 255}) == (resample == "nearest")


def test_everywhere_poisons_every_image_within_the_test_margin() -> None:
    images, labels = image_set(per_class=200)
    config = dataclasses.replace(CAT, everywhere=True, size=7)
    poisoned, plan = poison(images, labels, CLASSES, config, seed=0)
    assert len(plan.poisoned) == len(images) and plan.counts["triggers"][0]["rate_of_class"] == 1.0
    assert {p.box.x for p in plan.poisoned} == set(range(3, 22))
    pasted = paste_everywhere(images, plan.triggers[0], seed=0)
    assert torch.equal(pasted.pixels, poisoned.pixels) and pasted.ids == images.ids
    assert pasted.fingerprint not in ("", images.fingerprint)


def test_a_picture_can_be_the_trigger(tmp_path: Path) -> None:
    path = tmp_path / "mark.png"
    Image.fromarray(noise(1, 10, 20)[0]).save(path)
    images, labels = image_set()
    _, plan = poison(images, labels, CLASSES, dataclasses.replace(CAT, triggers=(str(path),)), seed=0)
    assert plan.triggers[0].name == "mark.png" and plan.config["triggers"] == ["mark.png"]
    assert {(p.box.w, p.box.h) for p in plan.poisoned} == {(8, 4)}


def test_a_class_named_like_a_number_comes_before_the_index() -> None:
    digits = ("0", "2", "1")
    assert make_triggers(dataclasses.replace(CAT, targets=("2",)), digits)[0].target == 1
    assert make_triggers(dataclasses.replace(CAT, targets=(2,)), digits)[0].target == 2
    assert make_triggers(dataclasses.replace(CAT, targets=("2",)), CLASSES)[0].target == 2


@pytest.mark.parametrize("target", ["cow", 3, -1, "7"])
def test_an_unknown_target_is_refused_with_the_classes(target: str | int) -> None:
    with pytest.raises(ConfigError, match=r"is no class of this data set; it has bird, cat, dog"):
        make_triggers(dataclasses.replace(CAT, targets=(target,)), CLASSES)


def test_wrong_triggers_are_refused(tmp_path: Path) -> None:
    images, labels = image_set()
    for name in ("seed:x", "seed:", str(tmp_path / "none.png")):
        with pytest.raises(ConfigError, match="expected seed:N or the path of an image file"):
            make_triggers(dataclasses.replace(CAT, triggers=(name,)), CLASSES)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(DataError, match=r"trigger '.*text.png' cannot be read"):
        make_triggers(dataclasses.replace(CAT, triggers=(str(text),)), CLASSES)
    with pytest.raises(
        ConfigError, match="the 33-pixel trigger 'seed:7' fits in 0 of 20 images, 10 are needed"
    ):
        poison(images, labels, CLASSES, dataclasses.replace(CAT, size=33), seed=0)


def test_labels_must_fit_the_images() -> None:
    images, labels = image_set()
    with pytest.raises(ShapeError, match=r"labels must be \(60,\), one per image, got \(59,\)"):
        poison(images, labels[:-1], CLASSES, CAT, seed=0)
    with pytest.raises(ShapeError, match=r"labels must lie in 0..1, got 0..2"):
        poison(images, labels, CLASSES[:2], CAT, seed=0)
    with pytest.raises(
        ConfigError, match="there are no readable images of class 'cat': choose another target"
    ):
        poison(images, torch.zeros_like(labels), CLASSES, CAT, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("cat", "dog")}, "2 targets and 1 triggers: expected as many of one as of the other"),
        ({"targets": (), "triggers": ()}, "0 targets and 0 triggers"),
        (
            {"targets": ("cat", "dog"), "triggers": ("seed:1", "seed:1")},
            "trigger 'seed:1' has several targets, and could lead to one only: expected a trigger of its own",
        ),
        ({"rate": 0.0}, r"rate=0.0: expected a fraction in \(0, 1\]"),
        ({"rate": 1.5}, r"rate=1.5: expected a fraction in \(0, 1\]"),
        ({"rate": float("nan")}, r"rate=nan: expected a fraction in \(0, 1\]"),
        ({"rate_of": "world"}, "rate_of='world': expected class or dataset"),
        ({"margin": 0.5}, r"margin=0.5: expected a fraction in \[0, 0.5\)"),
        ({"size": 1}, "size=1: expected a trigger of at least 2 pixels"),
        ({"resample": "magic"}, "resample='magic': expected one of nearest, bilinear, bicubic"),
        (
            {"everywhere": True, "targets": ("cat", "dog"), "triggers": ("seed:1", "seed:2")},
            "everywhere with 2 pairs: expected one trigger on every image; run once per trigger",
        ),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CAT, **change)  # type: ignore[arg-type]


# ── on disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_written_copy_is_the_one_in_memory(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "in")
    plan = attack(images, tmp_path / "out", CAT, seed=4)
    geometry = Geometry(SIDE, SIDE)
    original = load_images(open_source(images), geometry)
    in_memory, twin = poison(original, read_labels(images).of(original.ids), CLASSES, CAT, seed=4)
    written = load_images(open_source(tmp_path / "out"), geometry)
    assert written.ids == tuple(sorted(str(Path(i).with_suffix(".png")) for i in original.ids))
    assert torch.equal(written.pixels, in_memory.pixels)
    assert [str(Path(p.id).with_suffix(".png")) for p in twin.poisoned] == [p.id for p in plan.poisoned]
    assert [p.box for p in twin.poisoned] == [p.box for p in plan.poisoned]
    assert read_plan(tmp_path / "out" / "plan.json").to_json() == plan.to_json()
    assert {p.id for p in plan.poisoned} <= set(open_source(tmp_path / "out").ids)
    assert read_labels(tmp_path / "out").class_names == CLASSES


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "in")
    for name in ("one", "two"):
        attack(images, tmp_path / name, CAT)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 25
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_nothing_but_the_patch_tells_poisoned_from_clean(tmp_path: Path) -> None:
    """Same container, same chunks, same mode, same times; and the source's metadata is gone."""
    images = folder_of_images(tmp_path / "in")
    Image.fromarray(noise(1)[0]).save(images / "cat" / "exif.jpg", comment=b"holiday", icc_profile=b"profile")
    attack(images, tmp_path / "out", CAT)
    traces = set()
    for path in (tmp_path / "out").rglob("*.png"):
        with Image.open(path) as image:
            data = path.read_bytes()
            traces.add(
                (
                    image.format,
                    image.mode,
                    tuple(image.info),
                    data[12:16],
                    data.count(b"IDAT"),
                    path.stat().st_mtime,
                )
            )
    assert len(traces) == 1 and next(iter(traces))[2] == ()
    assert len(list((tmp_path / "out").rglob("*.png"))) == 25


def test_images_of_one_name_both_survive(tmp_path: Path) -> None:
    images = tmp_path / "in"
    for name in CLASSES:
        (images / name).mkdir(parents=True)
    for i, name in enumerate(("a.jpg", "a.png", "a.jpg.png", "A.bmp", "b.png")):
        Image.fromarray(noise(1, seed=i)[0]).save(images / "cat" / name)
    Image.fromarray(noise(1)[0]).save(images / "dog" / "a.png")
    Image.fromarray(noise(1)[0]).save(images / "bird" / "a.png")
    plan = attack(images, tmp_path / "out", dataclasses.replace(CAT, rate=1.0))
    copies = open_source(tmp_path / "out").ids
    assert len({name.lower() for name in copies}) == 7
    assert {p.id for p in plan.poisoned} == {name for name in copies if name.startswith("cat/")}


def test_unreadable_images_are_left_out_and_listed(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "in")
    (images / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    plan = attack(images, tmp_path / "out", CAT)
    assert [s.id for s in plan.skipped] == ["cat/broken.jpg"] and plan.skipped[0].reason
    assert plan.n_images == 24 and len(plan.poisoned) == 4
    assert not (tmp_path / "out" / "cat" / "broken.png").exists()


def test_images_of_other_sizes_get_a_trigger_in_proportion(tmp_path: Path) -> None:
    images = tmp_path / "in"
    for name in CLASSES:
        (images / name).mkdir(parents=True)
        for i, (height, width) in enumerate(((40, 90), (64, 64), (224, 300))):
            Image.fromarray(noise(1, height, width)[0]).save(images / name / f"{i}.png")
    plan = attack(images, tmp_path / "out", dataclasses.replace(CAT, rate=1.0, size=None))
    assert [(p.width, p.height, p.box.w) for p in plan.poisoned] == [
        (90, 40, 9),
        (64, 64, 14),
        (300, 224, 50),
    ]
    with Image.open(tmp_path / "out" / "cat" / "2.png") as stored:
        box = plan.poisoned[2].box
        crop = np.array(stored)[box.y : box.y + box.h, box.x : box.x + box.w]
    assert np.array_equal(crop, plan.triggers[0].pasted(224).permute(1, 2, 0).numpy())
    small = dataclasses.replace(CAT, size=50)
    assert [p.id for p in attack(images, tmp_path / "small", small).poisoned]  # two of three can hold it
    with pytest.raises(ConfigError, match="fits in 2 of 3 images, 3 are needed; give a smaller --size"):
        attack(images, tmp_path / "none", dataclasses.replace(small, rate=1.0))


def test_rows_of_a_table_become_files_in_class_folders(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for i, pixels in enumerate(noise(12)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": i % 3})
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={
            b"huggingface": b'{"info": {"features": {"image": {"_type": "Image"}, '
            b'"label": {"names": ["zebra/quagga", "ape", "cat"], "_type": "ClassLabel"}}}}'
        },
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "train.parquet")
    config = dataclasses.replace(CAT, targets=("zebra/quagga",))
    plan = attack(tmp_path / "train.parquet", tmp_path / "out", config)
    labels = read_labels(tmp_path / "out")
    assert labels.class_names == ("ape", "cat", "zebra_quagga")
    assert (plan.triggers[0].target, plan.triggers[0].target_name) == (2, "zebra_quagga")
    assert len(plan.poisoned) == 2 and {labels.by_id[p.id] for p in plan.poisoned} == {2}
    assert "zebra_quagga/000000.png" in labels.by_id


def test_a_folder_in_use_is_refused_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    attack(images, out, CAT)
    before = sorted(out.rglob("*"))
    with pytest.raises(ConfigError, match="is not empty; name a new folder"):
        attack(images, out, CAT)
    assert sorted(out.rglob("*")) == before
    with pytest.raises(ConfigError, match="lies inside the source"):
        attack(images, images / "cat" / "00.bmp", CAT)


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder_of_images(tmp_path / "in")

    def interrupted(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt

    def full(*_: object) -> Iterator[None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ssl_backdoor, "write_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attack(images, tmp_path / "out", CAT)
    monkeypatch.setattr(ssl_backdoor, "write_plan", full)
    with pytest.raises(DataError, match=r"cannot write the poisoned copy .*out: No space left on device"):
        attack(images, tmp_path / "out", CAT)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_progress_counts_every_image(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "in", per_class=2)
    calls: list[tuple[str, int, int]] = []
    write_poisoned_copy(
        open_source(images),
        read_labels(images),
        CAT,
        tmp_path / "out",
        0,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("write images", i, 6) for i in range(1, 7)]


def test_a_copy_among_the_images_is_refused(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "in")
    before = sorted(images.rglob("*"))
    with pytest.raises(ConfigError, match="lies inside the source"):
        attack(images, images / "poisoned", CAT)
    assert sorted(images.rglob("*")) == before


def test_what_a_killed_attack_left_is_removed_by_the_next(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "in")
    (tmp_path / ".out.partial-fresh").mkdir()
    (tmp_path / ".out.partial-fresh" / "half.png").write_bytes(b"half")
    attack(images, tmp_path / "out", CAT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_where_classes_are_called_by_numbers_a_number_is_a_name() -> None:
    assert (
        ssl_backdoor.class_index("2", ["1", "2", "3"]) == 1
        and ssl_backdoor.class_index("2", ["a", "b", "c"]) == 2
    )
    with pytest.raises(ConfigError, match="target '0' is no class of this data set"):
        ssl_backdoor.class_index("0", ["1", "2", "3"])
