import json

import pytest

TASK = """
name = "tiny"
[data.digits]
embedded = "digits"
classes = 2
train = 20
test = 10
[attack.patch]
size = 8
[victim.resnet]
epochs = 1
width = 4
batch_size = 20
[defence.none]
kind = "none"
[defence.control]
kind = "clean-trained"
[[table]]
rows = ["defence"]
columns = ["accuracy"]
"""


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TASK)
    return path


def test_a_dry_run_lists_the_cells_and_writes_nothing(run, task, tmp_path):
    done = run("benchmark", task, "--out", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0 and "2 cells, 0 done" in done.stdout and not (tmp_path / "out").exists()
    value = json.loads(run("benchmark", task, "--out", tmp_path / "out", "--dry-run", "--json").stdout)
    assert (value["n_cells"], value["n_done"], value["training_images"]) == (2, 0, 80)
    assert value["cells"][0]["defence"] == "none" and not value["cells"][0]["done"]


def test_a_study_prints_its_tables_and_shows_them_again(run, task, tmp_path):
    done = run("benchmark", task, "--out", tmp_path / "out", "--device", "cpu")
    assert done.exit_code == 0 and "ACC clean %" in done.stdout and "2 of 2 cells" in done.stdout
    again = run("benchmark", task, "--out", tmp_path / "out", "--device", "cpu", "--json")
    value = json.loads(again.stdout)
    assert value["n_done"] == 2 and value["tables"][0]["rows"][0]["row"] == {"defence": "none"}
    assert again.stderr.count("finished earlier") == 2
    planned = json.loads(run("benchmark", task, "--out", tmp_path / "out", "--dry-run", "--json").stdout)
    assert planned["n_done"] == 2 and planned["training_images"] == planned["encoder_passes"] == 0
    quiet = run("benchmark", task, "--out", tmp_path / "out", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_failed_cells_are_exit_code_3(run, task, tmp_path):
    task.write_text(TASK.replace("size = 8", "size = 99"))
    done = run("benchmark", task, "--out", tmp_path / "out", "--device", "cpu")
    assert done.exit_code == 3 and "cell 1 of 2 failed: the 99-pixel trigger" in done.stderr


def test_a_wrong_task_is_wrong_usage(run, task, tmp_path):
    task.write_text(TASK.replace("epochs", "epoch"))
    done = run("benchmark", task, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr == (
        "unpoison: error: tiny.toml: victim.resnet.epoch: unknown setting; did you mean 'epochs'?\n"
    )
    task.write_text(TASK)
    done = run("benchmark", task, "--out", tmp_path / "out", "--seed", 9)
    assert done.exit_code == 2 and "seed 9: expected one of the task's, 0" in done.stderr
