"""JSON schemas of what unpoison writes; additive within a schema number."""

from __future__ import annotations

from typing import Any

__all__ = ["SCHEMAS"]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _object(properties: dict[str, Any], *, optional: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": properties, **more}


def _said(kind: str | list[str], description: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "description": description, **more}


def _count(description: str, **more: Any) -> dict[str, Any]:
    return _said("integer", description, minimum=0, **more)


def _share(description: str) -> dict[str, Any]:
    return _said("number", description, minimum=0, maximum=1)


_VERDICT = _object(
    {
        "schema": {"const": 1},
        "verdict": {"enum": ["poisoned", "no_evidence", "inconclusive"]},
        "method": _said("string", "The method that searched."),
        "alpha": _said("number", "Allowed false-alarm rate.", exclusiveMinimum=0, exclusiveMaximum=0.5),
        "p_value": _said(
            ["number", "null"],
            "Compares with alpha: of the best finalist, of a detector, or of the patch search and its screens "
            "together; null when nothing was tested.",
        ),
        "n_images": _count("All images that the source named: n_scored + n_unscored + n_skipped."),
        "n_scored": _count("Examined one by one."),
        "n_unscored": _count("Readable, but never a candidate; not the same as innocent."),
        "n_skipped": _count("Could not be read."),
        "n_flagged": _count("On the list to remove."),
        "triggers": {
            "type": "array",
            "items": _object(
                {
                    "target_cluster": _count("Where most images go that carry the patch."),
                    "target_clusters": {
                        "type": "array",
                        "description": "All clusters where they go.",
                        "items": {"type": "integer", "minimum": 0},
                    },
                    "flip_rate": _share("Of images that the search never saw."),
                    "control_rate": _share("The same for the shuffled patch."),
                    "tau": _said(
                        "number", "Share that patch without control must move more than.", minimum=0
                    ),
                    "p_value": _share("Of this trigger, corrected for the number of finalists."),
                    "concentration": _said(
                        ["number", "null"],
                        "How much more often two of its images share a group of clusters, once it is hidden, than two "
                        "other images do; null where too few are left.",
                    ),
                    "n_sources": _count("Distinct images that carry it."),
                    "n_confirmation": _count("Images it was pasted on."),
                    "n_flagged": _count("Flagged images that carry it, as far as the scan can tell."),
                    "image": _said("string", "Picture, relative to the run folder."),
                    "list": _said("string", "Ids of those images, one a line, relative to the run folder."),
                },
                optional=("tau", "p_value", "concentration", "n_confirmation", "n_flagged", "list"),
            ),
        },
        "benign_patterns": {
            "type": "array",
            "description": "The same pixels in several images, which are no attack; no alarm.",
            "items": _object(
                {
                    "flip_rate": _share("Of the search's images, moved to the cluster that gains most."),
                    "control_rate": _share("The same for the shuffled patches."),
                    "steers": _said(
                        "boolean",
                        "Whether the encoder obeys it; it lies on images of all kinds then, and the rates are of the "
                        "confirmation half.",
                    ),
                    "concentration": _said(
                        ["number", "null"], "As a trigger's; null where it steers nothing, too."
                    ),
                    "n_sources": _count("Distinct images, among those examined, that carry it."),
                    "sources": {"type": "array", "items": {"type": "string"}, "description": "Their ids."},
                    "image": _said("string", "Picture, relative to the run folder."),
                }
            ),
        },
        "finalists": {
            "type": "array",
            "description": "Patterns that recur and went into the confirmation; absent for a detector.",
            "items": _object(
                {
                    "n_sources": _count("Distinct images, among those examined, that carry it."),
                    "flip_rate": _share("Of held-out images that it moves to one place."),
                    "control_rate": _share("Of those that its shuffled pixels move there."),
                    "tau": _share("Rate that it had to exceed."),
                    "p_value": _share("After Holm, of the patch search alone."),
                    "n_confirmation": _count("Held-out images that it was pasted on."),
                    "aimed": _said("boolean", "Whether its images look alike without it, as a target's do."),
                }
            ),
        },
        "scope": {"description": "What was and what was not tested."},
        "screens": {
            "type": "array",
            "description": "Cheap tests beside the patch search; absent when it ran alone.",
            "items": _object(
                {
                    "method": _said("string", "spectral-dct."),
                    "verdict": {"enum": ["poisoned", "no_evidence"]},
                    "p_value": _share("Of the screen alone; compares with its own alpha."),
                    "alpha": _said("number", "Its share of the scan's alpha.", minimum=0, maximum=1),
                    "n_flagged": _count(
                        "Images flagged by it; `trigger` is null for those that only it flags."
                    ),
                    "frequencies": {
                        "type": "array",
                        "description": "channel (0 U, 1 V), row and column of each coefficient that passes.",
                        "items": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    },
                }
            ),
        },
        "rule": _said(
            "string",
            "What the p-value of a detector compares; absent for a patch search, and without a p-value.",
        ),
        "detector": _said("object", "Threshold, calibration and settings of a detector; absent otherwise."),
        "reason": _said("string", "Why the verdict is inconclusive; absent otherwise."),
        "location": _said("string", "Where the images came from."),
        "coverage": _share("Of the named images that could be read."),
        "encoder": _said("string", "Its name; empty when the method takes none."),
        "encoder_fingerprint": _said("string", "Digest of its weights; empty likewise."),
        "images_fingerprint": _said("string", "Digest of ids and file bytes."),
        "precision": _said("string", "In which the encoder ran; absent without one."),
        "stages": _said("object", "Seconds per stage."),
        "encoder_passes": _count("Images that the encoder was shown."),
        "passes": _said("object", "Per stage: expected, most and actual passes."),
        "seconds": _said("number", "Wall clock.", minimum=0),
        "expected_seconds": _said(
            "number", "Of the expected passes, at the rate of the features.", minimum=0
        ),
        "power": _said("object", "Smallest poison that would have been caught; absent when poisoned."),
        "budget": _said("object", "What a budget took from the search; absent without one."),
        "config": _said("object", "Resolved settings."),
        "pretrained": _said(
            "object", "Recipe of the encoder that the scan trained; absent where one was given."
        ),
        "seed": _said("integer", "Determines every draw."),
        "versions": _said("object", "Of unpoison and its libraries."),
        "other_encoder": _said("string", "Name of the second one of cross-encoder; absent otherwise."),
        "command": _said("string", "Line that repeats the scan; absent where Python called it."),
    },
    optional=(
        "other_encoder",
        "command",
        "screens",
        "rule",
        "detector",
        "finalists",
        "pretrained",
        "benign_patterns",
        "reason",
        "location",
        "coverage",
        "encoder",
        "encoder_fingerprint",
        "images_fingerprint",
        "precision",
        "stages",
        "passes",
        "expected_seconds",
        "power",
        "budget",
    ),
)

_FINDINGS = _object(
    {
        "id": _said("string", "Relative path, or shard:row."),
        "cluster": _said(["integer", "null"], "k-means cluster; null when skipped."),
        "scored": _said("boolean", "Whether it was examined one by one."),
        "poison_score": _said(["number", "null"], "Higher is more suspicious; null when not scored."),
        "box_x": _said(["integer", "null"], "Left edge of the window, encoder-input pixels."),
        "box_y": _said(["integer", "null"], "Top edge."),
        "box_w": _said(["integer", "null"], "Width."),
        "box_h": _said(["integer", "null"], "Height."),
        "poison_probability": _said(["number", "null"], "Of the classifier; null when it was not trained."),
        "flagged": _said("boolean", "On the list to remove."),
        "trigger": _said(
            ["integer", "null"],
            "Which trigger of verdict.json, from 1, a flagged image carries; null otherwise.",
        ),
        "skip_reason": _said(["string", "null"], "Why it could not be examined."),
    }
)

_BOX = _object({name: _count(f"{name}, pixels of the stored image") for name in ("x", "y", "w", "h")})

_PLAN = _object(
    {
        "schema": {"enum": [1, 2]},
        "method": _said("string", "Name of the attack."),
        "seed": _said("integer", "Determines every draw."),
        "config": _said("object", "The attack's settings."),
        "counts": _object({"n_images": _count("Images in the poisoned set.")}),
        "triggers": {
            "type": "array",
            "minItems": 1,
            "items": _object(
                {
                    "name": _said("string", "seed:N, or a file name."),
                    "target": _object(
                        {"name": _said("string", "Target class."), "index": _count("Its number.")}
                    ),
                    "side": _said(
                        ["integer", "null"], "Paste width in pixels; null = 50/224 of the short side."
                    ),
                    "resample": {"enum": ["nearest", "bilinear", "bicubic"]},
                    "png": _said("string", "The pattern, PNG in base64."),
                    "n_class": _count("Images of the target class."),
                    "kind": _said(
                        "string", "corner, ctrl, blended or sig; absent from a patch at a free place."
                    ),
                    "strength": _said(
                        "number", "Of a trigger that changes the whole image; absent from others."
                    ),
                },
                optional=("kind", "strength"),
            ),
        },
        "poisoned": {
            "type": "array",
            "items": _object(
                {
                    "id": _said("string", "As the poisoned source names it."),
                    "trigger": _count("Index into triggers."),
                    "box": _BOX,
                    "width": _said("integer", "Of the stored image.", minimum=1),
                    "height": _said("integer", "Of the stored image.", minimum=1),
                }
            ),
        },
        "skipped": {
            "type": "array",
            "items": _object({"id": _said("string", "Id."), "reason": _said("string", "Why.")}),
        },
    }
)

_MEASUREMENT = _object(
    {
        "measure": _said("string", "Name of the measure, see docs/benchmarks.md."),
        "probe": _said(["string", "null"], "linear or knn, for measures of an encoder."),
        "trigger": _said(["integer", "null"], "Index of the trigger, where each has a value.", minimum=0),
        "at": _said(["number", "null"], "k of a top-k measure, or a false-positive rate.", minimum=0),
        "value": _said(["number", "null"], "In `unit`; null where the measure is undefined."),
        "unit": {"enum": ["%", "share", "images", "passes", "triggers"]},
    }
)

_CELL_NAMES = {
    "data": _said("string", "Name in the task file, like the three that follow."),
    "attack": _said("string", "Attack."),
    "victim": _said("string", "Recipe of the encoders."),
    "defence": _said("string", "What was done about the poison."),
    "seed": _count("Seed of everything in the cell."),
}

_BENCHMARK = _object(
    {
        "schema": {"const": 1},
        "benchmark": _said("string", "Name of the task."),
        "title": _said("string", "What it asks."),
        "seeds": {"type": "array", "minItems": 1, "items": _count("A seed.")},
        "n_cells": _count("Cells of the task."),
        "n_done": _count("Finished ones."),
        "cells": {
            "type": "array",
            "items": _object(
                {
                    **_CELL_NAMES,
                    "key": _said("string", "Digest of everything that the numbers depend on."),
                    "settings": _said("object", "Resolved settings."),
                    "measurements": {"type": "array", "items": _MEASUREMENT},
                    "seconds": _said(
                        "object", "Wall clock by stage; of training that was shared, the whole."
                    ),
                    "machine": _said("object", "Where it was computed."),
                    "versions": _said("object", "Of unpoison and its libraries."),
                    "source": _said("string", "Digest of the source code that computed it."),
                }
            ),
        },
        "failed": {
            "type": "array",
            "items": _object({**_CELL_NAMES, "reason": _said("string", "What went wrong.")}),
        },
        "left_out": {
            "type": "array",
            "items": _object(
                {"what": _said("string", "What is not computed."), "reason": _said("string", "Why.")}
            ),
        },
        "published": {
            "type": "array",
            "items": _object(
                {
                    "where": _said("object", "Axis or setting to the values whose rows it stands beside."),
                    "values": _said("object", "Measure to the figure."),
                    "source": _said("string", "Where it is printed."),
                }
            ),
        },
        "tables": {
            "type": "array",
            "items": _object(
                {
                    "title": _said("string", "Above it."),
                    "rows": {
                        "type": "array",
                        "items": _said("object", "Keys, and mean, deviation, n by measure."),
                    },
                }
            ),
        },
    }
)

_AUDIT = _object(
    {
        "schema": {"const": 1},
        "verdict": {"enum": ["poisoned", "no_evidence", "inconclusive"]},
        "method": {"const": "decree"},
        "alpha": _said("number", "Allowed false-alarm rate.", exclusiveMinimum=0, exclusiveMaximum=0.5),
        "p_value": _said(["number", "null"], "Rank among clean encoders; null without a fitting reference."),
        "mask_share": _share("Mean of the smallest mask that collapses the features; 1 when none does."),
        "reached": _said("boolean", "Whether any mask collapsed them as wanted."),
        "below_paper_threshold": _said(
            "boolean", "Whether mask_share lies below 0.1; no part of the verdict."
        ),
        "collapse_before": _said("number", "Mean pairwise cosine of clean images that the search never saw."),
        "collapse_after": _said("number", "The same with the trigger."),
        "relaxed": _said(
            ["object", "null"], "gain, reached, mask_share of the relaxed search; null without one."
        ),
        "extent": _said(
            ["object", "null"],
            "mask_share, collapse and steps of the whole trigger, which picture and box then show; null where the "
            "smallest mask is all of it.",
        ),
        "box": _said(["object", "null"], "x, y, w, h of where most of the mask lies, encoder-input pixels."),
        "image": _said("string", "Picture, relative to the run folder."),
        "starts": {
            "type": "array",
            "minItems": 1,
            "items": _object(
                {
                    "mask_share": _share("Of its mask."),
                    "collapse": _said("number", "Of the batch that it was found on."),
                    "reached": _said("boolean", "Whether it collapsed the features as wanted."),
                    "steps": _count("Steps taken."),
                }
            ),
        },
        "second_opinion": _said(
            ["object", "null"],
            "What SSL-Cleanse says: anomaly_index, threshold, outlier, cluster, mask_shares by cluster, box; "
            "no part of the verdict, null with --faithful.",
        ),
        "reference": _said(["string", "null"], "Name of the reference file; null when only ours was used."),
        "reference_shares": {
            "type": "array",
            "description": "mask_share of the clean encoders, ascending.",
            "items": _share("Of one."),
        },
        "reason": _said("string", "Why the verdict is inconclusive; absent otherwise."),
        "family": _said("string", "Kind and size of the network."),
        "image_size": _said("integer", "Side of its input, pixels.", minimum=1),
        "scope": {"description": "What was and what was not tested."},
        "location": _said("string", "Where the images came from, or that they were generated."),
        "encoder": _said("string", "Its name."),
        "encoder_fingerprint": _said("string", "Digest of its weights; empty when unknown."),
        "preprocessing_assumed": _said("boolean", "Whether normalisation or input size is a guess."),
        "images_fingerprint": _said("string", "Digest of the pixels."),
        "precision": _said("string", "In which the encoder ran."),
        "stages": _said("object", "Seconds per stage."),
        "n_images": _count("n_searched + n_held_out + n_skipped."),
        "n_searched": _count("Images that the trigger was searched on."),
        "n_held_out": _count("Images that collapse_before and collapse_after were measured on."),
        "n_skipped": _count("Could not be read."),
        "max_seconds": _said(["number", "null"], "Allowed to the search; null without a limit."),
        "cut_short": _said("boolean", "Whether that time was over before the search was."),
        "encoder_passes": _count("Images that the encoder was shown; a backward pass counts as two."),
        "seconds": _said("number", "Of all stages.", minimum=0),
        "config": _said("object", "Settings."),
        "seed": _said("integer", "Determines every draw."),
        "versions": _said("object", "Of unpoison and its libraries."),
    },
    optional=(
        "reason",
        "encoder",
        "encoder_fingerprint",
        "preprocessing_assumed",
        "images_fingerprint",
        "precision",
        "stages",
    ),
)

SCHEMAS: dict[str, dict[str, Any]] = {
    name: {"$schema": _DIALECT, "title": title, **schema}
    for name, title, schema in (
        ("verdict", "verdict.json", _VERDICT),
        ("findings", "One row of findings.parquet", _FINDINGS),
        ("plan", "plan.json", _PLAN),
        ("benchmark", "results.json of a benchmark", _BENCHMARK),
        ("audit", "verdict.json of an audit", _AUDIT),
    )
}
"""Name to schema, JSON Schema draft 2020-12."""
