import json
from dataclasses import asdict

import pytest
import torch

from fakes import fake_result
from unpoison.attack.plan import Plan, PoisonedImage, Trigger
from unpoison.records import Box
from unpoison.report.schemas import SCHEMAS

KINDS = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "object": dict,
    "array": list,
}


def fits(value, schema) -> bool:
    """A validator for the few words that our schemas use."""
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return False
    kinds = schema.get("type", list(KINDS))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    right = any(
        isinstance(value, KINDS[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds
    )
    if not right:
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        return set(schema.get("required", ())) <= set(value) and all(
            fits(entry, known[name]) for name, entry in value.items() if name in known
        )
    if isinstance(value, list):
        return len(value) >= schema.get("minItems", 0) and all(
            fits(v, schema.get("items", {})) for v in value
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return True


@pytest.mark.parametrize("verdict", ["poisoned", "no_evidence", "inconclusive"])
def test_a_verdict_fits_its_schema(verdict):
    value = fake_result(verdict).summary
    assert fits(value, SCHEMAS["verdict"])
    assert not fits({**value, "verdict": "clean"}, SCHEMAS["verdict"])
    assert not fits({key: value[key] for key in value if key != "scope"}, SCHEMAS["verdict"])


def test_findings_fit_their_schema():
    rows = json.loads(fake_result(skipped={"x.png": "truncated"}).findings.to_json(orient="records"))
    assert rows and all(fits(row, SCHEMAS["findings"]) for row in rows)
    assert set(rows[0]) == set(SCHEMAS["findings"]["properties"])


def test_a_plan_fits_its_schema():
    trigger = Trigger(torch.zeros(3, 4, 4, dtype=torch.uint8), "seed:0", 0, "cat")
    image = PoisonedImage("a.png", 0, Box(1, 1, 4, 4), 32, 32)
    plan = Plan("ssl-backdoor", 0, {"rate": 0.5}, (trigger,), (image,), 10, (5,))
    assert fits(plan.to_json(), SCHEMAS["plan"])
    assert not fits({**plan.to_json(), "poisoned": [asdict(image) | {"width": 0}]}, SCHEMAS["plan"])
    assert not fits({**plan.to_json(), "triggers": []}, SCHEMAS["plan"])
