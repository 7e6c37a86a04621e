import json
import subprocess
import sys

import pytest


def written(folder, text):
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_give_way_to_the_file_and_the_file_to_the_command_line(run, tmp_path):
    settings = written(tmp_path, '[doctor]\nencoder = "from-the-file.safetensors"\n')
    assert "safetensors:" not in run("doctor").output
    assert "from-the-file.safetensors': no such file" in run("doctor", "--config", settings).output
    done = run("doctor", "--config", settings, "--encoder", "from-the-line.safetensors")
    assert "from-the-line.safetensors': no such file" in done.output and "from-the-file" not in done.output
    done = run("audit", "timm:resnet18", "--config", settings)  # a table of another verb
    assert done.exit_code == 2 and "Missing option '--out'" in done.stderr


def test_a_file_may_serve_several_verbs_and_hold_arguments_and_lists(run, tmp_path):
    settings = written(
        tmp_path,
        """
        quiet = true
        [attack.patch]
        images = "no-such-images"
        out = "poisoned"
        target = ["cat", "dog"]
        trigger = ["seed:1", "seed:2"]
        rate = 0.5
        [scan]
        alpha = 0.02
        """,
    )
    done = run("attack", "patch", "--config", settings)
    assert done.exit_code == 2 and "no-such-images: no such file or folder" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpah = 0.1", "unpoison scan has no option 'alpah'; did you mean alpha?"),
        ("[scan]\nxyzzy = 1", "unpoison scan has no option 'xyzzy'; see unpoison scan --help"),
        ("alpha = [0.1]", "alpha = [0.1]: expected one value"),
        ("alpha = 2020-01-01", "expected one value"),
        ("[scna]\nalpha = 0.1", "[scna] is no verb; expected one of demo, scan,"),
        ("scan = 3", "scan is a verb; expected a table [scan]"),
        ("alpha = ", "no TOML: Invalid value"),
        ("config = 'x'", "has no option 'config'"),
        ("alpha = 'high'", "Invalid value for '--alpha'"),
    ],
)
def test_a_mistake_in_the_file_is_said(run, tmp_path, text, message):
    done = run("scan", tmp_path, "--out", tmp_path / "run", "--config", written(tmp_path, text))
    assert done.exit_code == 2 and message in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


def test_tables_are_read_however_the_program_is_called(tmp_path):
    settings = written(tmp_path, '[doctor]\nencoder = "from-the-file.safetensors"\n')
    command = [sys.executable, "-m", "unpoison", "doctor", "--config", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "from-the-file.safetensors': no such file" in done.stdout + done.stderr


def test_a_misspelt_verb_of_a_group_is_said(run, tmp_path):
    done = run("attack", "patch", "--config", written(tmp_path, "[attack.pacth]\nrate = 0.1"))
    assert done.exit_code == 2 and "[pacth] is no verb; expected one of" in done.stderr


def test_a_missing_or_endless_file_is_said(run, tmp_path):
    done = run("schema", "verdict", "--config", tmp_path / "no.toml")
    assert done.exit_code == 2 and "no.toml: no such file; expected TOML" in done.stderr
    done = run("schema", "verdict", "--config", written(tmp_path, "#" * 2**21))
    assert done.exit_code == 2 and "has more than 1 MiB" in done.stderr


PROBE = """
import socket, sys
from unpoison.cli.main import app
try:
    app(["schema", "verdict", *sys.argv[1:]], standalone_mode=False)
finally:
    for family, address in ((socket.AF_INET, ("127.0.0.1", 9)), (socket.AF_INET6, ("::1", 9))):
        try:
            socket.socket(family).connect(address)
        except OSError as error:
            print(str(error), file=sys.stderr)
    try:
        socket.getaddrinfo("localhost", 80)
        print("resolved", file=sys.stderr)
    except OSError as error:
        print(error, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "variable", "closed"),
    [(["--offline"], "0", True), ([], "1", True), ([], "yes", True), ([], "0", False), ([], "2", False)],
)
def test_offline_closes_the_door(monkeypatch, arguments, variable, closed):
    monkeypatch.setenv("HF_HUB_OFFLINE", variable)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr.count("--offline: no network is used") == (3 if closed else 0)
    assert json.loads(done.stdout)["title"] == "verdict.json"
