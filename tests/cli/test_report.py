import json

from fakes import fake_result


def test_the_page_is_rendered_again(run, replace_module, tmp_path):
    (tmp_path / "verdict.json").write_text("{}")
    replace_module("runs", load_result=lambda folder: fake_result())
    done = run("report", tmp_path)
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == f"poisoned: see {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").is_file() and (tmp_path / "triggers/trigger-1.png").is_file()
    assert json.loads(run("report", tmp_path, "--json").stdout)["verdict"] == "poisoned"


def test_other_formats_are_written_beside_the_page(run, replace_module, tmp_path):
    (tmp_path / "verdict.json").write_text("{}")
    replace_module("runs", load_result=lambda folder: fake_result())
    assert run("report", tmp_path, "--format", "json", "--format", "html").exit_code == 0
    assert not (tmp_path / "report.sarif").exists() and not (tmp_path / "report.txt").exists()
    assert run("report", tmp_path, "--format", "sarif,json", "--format", "text").exit_code == 0
    assert json.loads((tmp_path / "report.sarif").read_text())["version"] == "2.1.0"
    assert "These images are poisoned" in (tmp_path / "report.txt").read_text(encoding="utf-8")
    done = run("report", tmp_path, "--format", "pdf")
    assert done.exit_code == 2 and "--format pdf: expected html, json, sarif or text" in done.stderr


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
    done = run("report", tmp_path)
    assert done.exit_code == 2 and "holds no verdict.json: expected the folder of a finished" in done.stderr
