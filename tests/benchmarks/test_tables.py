import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import tables

ABOUT = {
    "case": "digits",
    "seed": 0,
    "command": "python benchmarks/clean.py",
    "machine": {"cpu": "a processor", "gpu": None, "threads": 1},
    "versions": {"torch": "2", "timm": "1"},
}
SCAN = {"verdict": "no_evidence", "p_value": 0.4, "n_flagged": 0, "seconds": 5.0}
CLEAN = {"seeds": [0], "rows": [{**ABOUT, "scans": {"mask": SCAN}}]}
FIGURES = {"accuracy": 90.0, "patched_accuracy": 20.0, "attack_success": 60.0, "untriggered_rate": 1.0}
FIGURES |= {"knn_patched_accuracy": 30.0}
TOLD = {"control": FIGURES, "backdoored": FIGURES, "cleaned": FIGURES, "verdict": "poisoned"}
DEMO = {
    "seeds": [0],
    "rows": [
        {**ABOUT, "demo_seconds": 60, "result": {**TOLD, "top20": 1.0, "recall": 1.0, "precision": 0.9}}
    ],
}
SPEED = {
    "case": "resnet10, width 32",
    "pretrain_per_second": 2000.0,
    "bare_per_second": [9000.0, 8000.0],
    "scan_per_second": 7000.0,
    "scan_seconds": 5.0,
    "classifier_seconds": 1.5,
    "share_inside_encoder": 0.9,
}


def test_the_table_stands_between_its_markers_and_can_be_replaced():
    text = "before\n<!-- clean -->\nold\n<!-- /clean -->\nafter\n"
    once = tables.filled(text, {"clean": CLEAN})
    assert "old" not in once and "| digits | mask | 1 | 1 × no_evidence | 0.4 | 0 | 5 |" in once
    assert "`python benchmarks/clean.py`" in once and "a processor, 1 thread" in once
    assert once.startswith("before\n") and once.endswith("after\n")
    assert tables.filled(once, {"clean": CLEAN}) == once


def test_missing_markers_are_an_error():
    with pytest.raises(ValueError, match="no markers for clean"):
        tables.filled("nothing", {"clean": CLEAN})


def test_every_benchmark_has_markers_and_a_script():
    text = tables.README.read_text(encoding="utf-8")
    for name in tables.TABLES:
        assert f"<!-- {name} -->\n" in text and f"<!-- /{name} -->" in text
        assert (tables.README.parent / f"{name}.py").is_file() and f"{name}.py" in text


def test_the_tables_of_demo_and_throughput():
    assert "| after cleaning | 90.0 | 20.0 | 30.0 | 60.0 | 1.0 |" in tables.TABLES["demo"](DEMO)
    trained = {**SPEED, "case": "tiny", "train_seconds": 61.2}
    text = tables.TABLES["throughput"]({"rows": [{**ABOUT, **SPEED}, {**ABOUT, **trained}]})
    assert "8000 … 9000 | – | 7000 | 5.0 | 1.5 | 90 |" in text and "| tiny | 61 | " in text
    compiled = {**ABOUT, **SPEED, "compiled_per_second": 9500.2, "compile_seconds": 21.4}
    assert "| 9500 (21) | 7000 |" in tables.TABLES["throughput"]({"rows": [compiled]})


def test_the_readme_holds_what_the_results_say():
    assert tables.main(["--check"]) == 0
