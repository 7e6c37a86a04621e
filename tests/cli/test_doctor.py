import json

import unpoison


def test_versions_and_references_are_shown(run, image_folder):
    done = run("doctor", "--images", image_folder, "--json")
    value = json.loads(done.stdout)
    assert done.exit_code == 0 and value["unpoison"] == unpoison.__version__ and value["problems"] == []
    assert value["images"]["named"] == 6 and value["packages"]["torch"] and value["device"]["chosen"]


def test_what_does_not_resolve_is_a_problem(run, tmp_path):
    done = run("doctor", "--images", tmp_path / "missing")
    assert done.exit_code == 3 and "images: " in done.stdout and "no such file or folder" in done.stdout
