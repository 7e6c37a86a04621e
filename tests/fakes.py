"""Scan results made by hand, for tests of what is done with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from unpoison.records import BenignPattern, Box, Evidence, ScanResult, TriggerFinding, Verdict


def fake_result(
    verdict: Verdict = "poisoned",
    *,
    n_images: int = 40,
    n_flagged: int = 6,
    size: int = 32,
    ids: list[str] | None = None,
    pixels: torch.Tensor | None = None,
    skipped: dict[str, str] | None = None,
    **summary: Any,
) -> ScanResult:
    """A result of noise images with a magenta square on the flagged ones, or of the given pixels."""
    generator = torch.Generator().manual_seed(0)
    window, corner = size // 4, size // 8
    if pixels is None:
        pixels = torch.randint(0, 256, (n_images, 3, size, size), generator=generator, dtype=torch.uint8)
        square = torch.tensor([230, 20, 180], dtype=torch.uint8).view(3, 1, 1)
        pixels[:n_flagged, :, corner : corner + window, corner : corner + window] = square
    n_images = len(pixels)
    ids = ids or [f"class/{row:04d}.png" for row in range(n_images)]
    skipped = skipped or {}
    found = n_flagged if verdict == "poisoned" else 0
    n_scored = min(n_images, 12)
    rows = range(n_images)
    none = [None] * len(skipped)
    findings = pd.DataFrame(
        {
            "id": ids + list(skipped),
            "cluster": pd.array([row % 5 for row in rows] + none, dtype="Int64"),
            "scored": [row < n_scored for row in rows] + [False] * len(skipped),
            "poison_score": pd.array(
                [1 - row / n_images if row < n_scored else None for row in rows] + none, dtype="Float64"
            ),
            **{
                f"box_{key}": pd.array(
                    [value if row < n_scored else None for row in rows] + none, dtype="Int64"
                )
                for key, value in (("x", corner), ("y", corner), ("w", window), ("h", window))
            },
            "poison_probability": pd.array(
                [0.99 if row < found else 0.01 for row in rows] + none, dtype="Float64"
            ),
            "flagged": [row < found for row in rows] + [False] * len(skipped),
            "trigger": pd.array([1 if row < found else None for row in rows] + none, dtype="Int64"),
            "skip_reason": [None] * n_images + list(skipped.values()),
        }
    )
    n_evidence = min(20, n_scored)
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).float()
    heat = torch.exp(-((grid - corner - window / 2) ** 2).sum(0) / (2 * window**2))
    evidence = Evidence(tuple(ids[:n_evidence]), pixels[:n_evidence], heat.repeat(n_evidence, 1, 1))
    triggers = ()
    if verdict == "poisoned":
        patches = pixels[:n_flagged, :, corner : corner + window, corner : corner + window]
        triggers = (
            TriggerFinding(
                target_cluster=7,
                target_clusters=(7,),
                flip_rate=0.714,
                control_rate=0.018,
                p_value=3.2e-41,
                n_sources=n_flagged,
                source_ids=tuple(ids[:n_flagged]),
                boxes=(Box(corner, corner, window, window),) * n_flagged,
                patches=patches,
                image="triggers/trigger-1.png",
            ),
        )
    content = {
        "schema": 1,
        "verdict": verdict,
        "method": "poisoncam",
        "alpha": 0.01,
        "p_value": 3.2e-41 if triggers else 0.62,
        "n_images": n_images + len(skipped),
        "n_scored": n_scored,
        "n_unscored": n_images - n_scored,
        "n_skipped": len(skipped),
        "n_flagged": found,
        "triggers": [
            {
                "target_cluster": 7,
                "target_clusters": [7],
                "flip_rate": 0.714,
                "control_rate": 0.018,
                "n_sources": n_flagged,
                "n_flagged": found,
                "image": trigger.image,
                "concentration": 3.31,
                "list": "triggers/trigger-1.txt",
                "n_confirmation": 500,
            }
            for trigger in triggers
        ],
        "scope": {
            "tested": ["square patches of 6 to 12 pixels that recur in at least 3 images"],
            "not_tested": [
                "triggers that cover the whole picture, such as CTRL's",
                "patches larger than the window",
            ],
        },
        "encoder_passes": 182_400,
        "seconds": 17.3,
        "stages": {"decode images": 1.1, "features": 2.0, "search": 9.8, "confirm": 3.1, "classifier": 1.3},
        "config": {
            "clusters": 50,
            "window": 9,
            "attention": "mask",
            "masks": "grid",
            "alpha": 0.01,
            "n_flips": None,
        },
        "seed": 0,
        "versions": {"unpoison": "0.1.0", "torch": "2.15.0", "python": "3.11.7"},
        **summary,
    }
    return ScanResult(verdict, findings, triggers, evidence, content)


def with_benign_pattern(result: ScanResult, n_sources: int = 7) -> ScanResult:
    """The same result with a flat square that recurs in its last images and steers nothing."""
    ids = tuple(result.findings.loc[result.findings["skip_reason"].isna(), "id"])[-n_sources:]
    pattern = BenignPattern(
        flip_rate=0.02,
        control_rate=0.01,
        steers=False,
        concentration=None,
        n_sources=n_sources,
        source_ids=ids,
        boxes=(Box(1, 2, 8, 8),) * n_sources,
        patches=torch.full((n_sources, 3, 8, 8), 200, dtype=torch.uint8),
        image="benign/pattern-1.png",
    )
    entry = {
        "flip_rate": 0.02,
        "control_rate": 0.01,
        "steers": False,
        "concentration": None,
        "n_sources": n_sources,
        "sources": list(ids),
    }
    summary = {**result.summary, "benign_patterns": [{**entry, "image": pattern.image}]}
    return replace(result, summary=summary, benign_patterns=(pattern,))


TINY_STUDY = """
name = "tiny"
title = "A tiny study"
seeds = [0, 1]

[data.digits]
embedded = "digits"
classes = 3
train = 20
test = 10

[attack.patch]
share_of_side = 0.25
rate = 1.0
margin = 0.03125

[victim.resnet]
epochs = 1
width = 4
batch_size = 20

[defence."no defence"]
kind = "none"

[defence.PoisonCAM]
n_flips = 8
exploit = 5
clusters = 4
window = 9
score = "concentrated"
masks = "random"
n_masks = 8

[defence."clean-trained"]
kind = "clean-trained"

[[table]]
title = "ACC and ASR"
rows = ["data", "defence"]
columns = ["accuracy", "attack_success", "knn.accuracy", "removed"]

[[plot]]
title = "Search"
x = "k"
y = ["top_accuracy"]

[[published]]
where = { defence = "PoisonCAM" }
values = { accuracy = 69.7, attack_success = 0.7 }
source = "PoisonCAM, Table I"
"""
