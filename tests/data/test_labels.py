from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unpoison.data.labels import Labels, read_labels
from unpoison.data.sources import open_source
from unpoison.errors import DataError


def write_parquet(path: Path, labels: object, names: list[str] | None = None) -> Path:
    images = pa.array(
        [{"bytes": b"x", "path": None}] * len(labels),
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": images, "label": labels})
    if names is not None:
        info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path)
    return path


def test_folders_are_classes(image_folder):
    (image_folder / "cat/0.png").rename(image_folder / "loose.png")
    labels = read_labels(image_folder)
    assert labels.class_names == ("cat", "dog")
    assert labels.of(["dog/1.png", "cat/2.png"]).tolist() == [1, 0]
    assert "loose.png" not in labels.by_id
    with pytest.raises(
        DataError, match=r"1 of 2 images have no label, the first is 'loose.png'; expected one folder"
    ):
        labels.of(["cat/1.png", "loose.png"])


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("10", "9", "a", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    assert read_labels(tmp_path).class_names == ("2", "9", "10", "a")


def test_a_list_and_an_open_source(image_folder):
    (image_folder / "list.txt").write_text("cat/0.png\ndog/1.png\n")
    expected = Labels(("cat", "dog"), {"cat/0.png": 0, "dog/1.png": 1})
    assert read_labels(image_folder / "list.txt") == expected
    assert read_labels(open_source(image_folder, only=["cat/0.png", "dog/1.png"])) == expected


def test_no_labels(tmp_path):
    (tmp_path / "x.png").touch()
    with pytest.raises(
        DataError, match=r"holds no labels; expected one folder per class, as in ROOT/CLASS/image.png"
    ):
        read_labels(tmp_path)


def test_parquet_names_come_from_the_metadata(tmp_path):
    write_parquet(tmp_path / "a.parquet", [1, 0, None], ["ant", "bee", "cow"])
    write_parquet(tmp_path / "b.parquet", [2, -1], ["ant", "bee", "cow"])
    labels = read_labels(tmp_path)
    assert labels.class_names == ("ant", "bee", "cow")
    assert labels.by_id == {"a.parquet:0": 1, "a.parquet:1": 0, "b.parquet:0": 2}


def test_parquet_without_names_uses_the_values(tmp_path):
    assert read_labels(write_parquet(tmp_path / "a.parquet", [10, 9, 10])) == Labels(
        ("9", "10"), {"a.parquet:0": 1, "a.parquet:1": 0, "a.parquet:2": 1}
    )
    assert read_labels(write_parquet(tmp_path / "a.parquet", ["b", "a"])).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ([None, -1], None, "every value of the column 'label' is null"),
        ([0, 5], ["ant"], "label 5 has no name; 1 classes are named"),
        ([0.5], None, "expected whole numbers or names as labels, found 0.5"),
    ],
)
def test_unusable_label_columns(tmp_path, values, names, message):
    with pytest.raises(DataError, match=message):
        read_labels(write_parquet(tmp_path / "a.parquet", values, names))


def test_parquet_without_a_label_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", [1])
    pq.write_table(pq.read_table(tmp_path / "a.parquet").drop_columns("label"), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="expected a column 'label', found image"):
        read_labels(tmp_path)


def test_shards_that_disagree_about_names(tmp_path):
    write_parquet(tmp_path / "a.parquet", [0], ["ant"])
    write_parquet(tmp_path / "b.parquet", [0], ["bee"])
    with pytest.raises(DataError, match=r"b.parquet names its classes differently"):
        read_labels(tmp_path)


def test_tar_classes_are_siblings(tmp_path):
    members = [
        ("d/1.png", b""),
        ("d/1.cls", b"7\n"),
        ("d/2.left.png", b""),
        ("d/2.CLS", b"11"),
        ("d/3.png", b""),
        ("1.cls", b"5"),
    ]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    assert read_labels(tmp_path) == Labels(("7", "11"), {"x.tar:d/1.png": 0, "x.tar:d/2.left.png": 1})


def test_tar_without_classes(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match=r"holds no labels; expected a .cls member beside each image"):
        read_labels(tmp_path)


def test_real_data_is_labelled(shared_data):
    labels = read_labels(shared_data / "cifar10/test-00000-of-00001.parquet")
    assert labels.class_names[3] == "cat"
    assert len(labels.by_id) == 10_000
