import json

from fakes import fake_result


def test_the_page_is_rendered_again(run, replace_module, tmp_path):
    (tmp_path / "verdict.json").write_text("{}")
    replace_module("runs", load_result=lambda folder: fake_result())
    done = run("report", tmp_path)
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == f"poisoned: see {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").is_file() and (tmp_path / "triggers/trigger-1.png").is_file()
    assert json.loads(run("report", tmp_path, "--json").stdout)["verdict"] == "poisoned"


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
    done = run("report", tmp_path)
    assert done.exit_code == 2 and "holds no verdict.json: expected the folder of a finished" in done.stderr
