import json

from unpoison.runs import RunFolder


def begin(path, *, complete):
    RunFolder(path, {"seed": 0})
    (path / "cache" / "features.safetensors").write_bytes(bytes(3 * 2**19))
    if complete:
        (path / "verdict.json").write_text("{}")


def test_caches_are_listed_and_only_those_of_finished_runs_removed(run, tmp_path):
    begin(tmp_path / "done", complete=True)
    begin(tmp_path / "killed", complete=False)
    listed = run("cache", "list", tmp_path)
    assert listed.exit_code == 0 and "unfinished" in listed.stdout and "3.0 MiB" in listed.stdout
    said = json.loads(run("cache", "list", tmp_path, "--json").stdout)
    assert said["bytes"] == 3 * 2**20 and [c["complete"] for c in said["caches"]] == [True, False]

    cleared = run("cache", "clear", tmp_path)
    assert cleared.exit_code == 0 and "removed 1 caches, 1.5 MiB; kept 1 of unfinished runs" in cleared.stdout
    assert (tmp_path / "done" / "verdict.json").exists() and not (tmp_path / "done" / "cache").exists()
    assert (tmp_path / "killed" / "cache" / "features.safetensors").exists()

    said = json.loads(run("cache", "clear", tmp_path, "--unfinished", "--json").stdout)
    assert said["bytes"] == 3 * 2**19 and said["kept"] == 0
    assert f"no run in {tmp_path} has a cache" in run("cache", "list", tmp_path).stdout


def test_a_folder_that_is_not_there_is_wrong_usage(run, tmp_path):
    done = run("cache", "clear", tmp_path / "missing")
    assert done.exit_code == 2 and "there is no such folder" in done.stderr
    assert run("cache", "clear").exit_code == 2
