import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    table: tuple[tuple[str, ...], ...]
    sentence: str


def test_the_demo_is_one_call_and_one_table(run, replace_module, tmp_path):
    calls = []

    def run_demo(images, out, **options):
        calls.append((images, out, options))
        return Result((("encoder", "ACC %", "ASR %"), ("poisoned", "93.9", "51.7")), "planted 65, found 64")

    replace_module("demo", run_demo=run_demo)
    done = run("demo", "--out", tmp_path / "demo", "--data", "photos", "--seed", 3)
    assert (
        done.exit_code == 0
        and "51.7" in done.stdout
        and "ASR %" in done.stdout
        and "planted 65" in done.stdout
    )
    images, out, options = calls[0]
    assert (images, out) == (None, tmp_path / "demo")
    assert (options["seed"], options["data"], options["fresh"], options["device"]) == (
        3,
        "photos",
        False,
        "auto",
    )
    value = json.loads(run("demo", "--out", tmp_path / "demo", "--json").stdout)
    assert value["table"][1][0] == "poisoned" and value["out"] == str(tmp_path / "demo")
