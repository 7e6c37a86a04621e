import json

import pytest

import unpoison


def test_versions_and_references_are_shown(run, image_folder):
    done = run("doctor", "--images", image_folder, "--json")
    value = json.loads(done.stdout)
    assert done.exit_code == 0 and value["unpoison"] == unpoison.__version__ and value["problems"] == []
    assert value["images"]["named"] == 6 and value["packages"]["torch"] and value["device"]["chosen"]


def test_what_does_not_resolve_is_a_problem(run, tmp_path):
    done = run("doctor", "--images", tmp_path / "missing")
    assert done.exit_code == 3 and "images: " in done.stdout and "no such file or folder" in done.stdout


def test_optional_libraries_are_shown_and_missing_ones_are_no_problem(run, monkeypatch):
    monkeypatch.setattr("unpoison.cli.doctor._OPTIONAL", {"no-such-library": "extra"})
    assert json.loads(run("doctor", "--json").stdout)["optional"] == {"no-such-library": None}
    done = run("doctor")
    assert done.exit_code == 0 and "no-such-library not installed, optional: unpoison[extra]" in done.stdout


def test_an_encoder_from_a_folder_of_its_library_resolves(run, tmp_path):
    library = pytest.importorskip("transformers", reason="the extra hf is not installed")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    library.ViTModel(library.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    library.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    done = run("doctor", "--encoder", f"hf:{tmp_path}", "--json")
    found = json.loads(done.stdout)["encoder"]
    assert (found["image_size"], found["mean"], found["preprocessing_assumed"]) == (16, [0.5] * 3, False)
