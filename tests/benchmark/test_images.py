import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unpoison.benchmark.images import choose, data_root, first_of_each_class, load
from unpoison.benchmark.task import DataConfig
from unpoison.errors import DataError


@pytest.fixture
def shapes(tmp_path, monkeypatch, picture):
    """Three classes in Hugging Face-schema parquet below UNPOISON_DATA."""
    folder = tmp_path / "data" / "shapes"
    folder.mkdir(parents=True)
    for split, count in (("train", 36), ("val", 18)):
        rows = []
        for index in range(count):
            buffer = io.BytesIO()
            picture(index + 1000 * len(split), 16, 16).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": f"{index}.png"})
        table = pa.table({"image": rows, "label": [index % 3 for index in range(count)]})
        features = {"info": {"features": {"label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}}}
        meta = {"huggingface": json.dumps(features)}
        pq.write_table(table.replace_schema_metadata(meta), folder / f"{split}-0.parquet")
    monkeypatch.setenv("UNPOISON_DATA", str(tmp_path / "data"))
    return DataConfig(folder="shapes", test_split="val", size=16, classes=2, train=10, test=5)


def test_a_folder_gives_the_first_classes_balanced(shapes):
    train, test = load(shapes, Path())
    assert train.class_names == ("cat", "dog") and train.labels.bincount().tolist() == [10, 10]
    assert test.labels.bincount().tolist() == [5, 5] and not set(train.images.ids) & set(test.images.ids)
    assert data_root().name == "data" and len(choose(shapes, Path()).train) == 20


def test_what_is_lacking_is_said(shapes):
    def complaint(**changes):
        settings = {"folder": "shapes", "test_split": "val", "size": 16, **changes}
        with pytest.raises(DataError) as caught:
            choose(DataConfig(**settings), Path())
        return str(caught.value)

    assert "class 'cat' has only 12 training images: expected at least 13" in complaint(train=13)
    assert "class 'cat' has only 6 test images: expected at least 7" in complaint(test=7)
    assert "the images have 3 classes: expected at least 4" in complaint(classes=4)
    assert "has no shards test-*: expected train-* and TEST_SPLIT-*" in complaint(test_split="test")
    assert "set UNPOISON_DATA to the folder that holds 'forms'" in complaint(folder="forms")


def test_embedded_images_are_split_by_their_ids_alone():
    data = DataConfig(embedded="digits", classes=4, train=30, test=10)
    chosen = choose(data, Path())
    assert (len(chosen.train), len(chosen.test), chosen.class_names) == (120, 40, ("0", "1", "2", "3"))
    assert not set(chosen.train) & set(chosen.test)
    train, _ = load(data, Path())
    assert train.images.ids == chosen.train and train.labels.bincount().tolist() == [30] * 4


def test_test_images_may_number_their_classes_differently(tmp_path, picture):
    for split, names in (("train", ("ant", "bee", "cat")), ("test", ("bee", "cat"))):
        for number, name in enumerate(names):
            for index in range(3):
                path = tmp_path / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(number * 10 + index + len(split), 16, 16).save(path)
    data = DataConfig(images="train", test_images="test", size=16)
    with pytest.raises(DataError, match="class 'ant' has only 0 test images"):
        choose(data, tmp_path)
    (tmp_path / "test" / "ant").mkdir()
    picture(99, 16, 16).save(tmp_path / "test" / "ant" / "0.png")
    _, test = load(data, tmp_path)
    assert [test.class_names[label] for label in test.labels] == [
        id_.split("/")[0] for id_ in test.images.ids
    ]
    (tmp_path / "test" / "dog").mkdir()
    picture(98, 16, 16).save(tmp_path / "test" / "dog" / "0.png")
    with pytest.raises(
        DataError, match="the test images have the class 'dog', which the training images lack"
    ):
        choose(data, tmp_path)


def test_all_of_a_class_without_a_limit():
    assert first_of_each_class("abc", {"a": 0, "b": 0}, {0, 1}, None) == (("a", "b"), {0: 0, 1: 1})
