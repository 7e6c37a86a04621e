"""Recipes name optimisers that train what they shall."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from unpoison.pretrain.loop import METHODS
from unpoison.pretrain.recipe import OPTIMISERS, Recipe

UNUSED = {"moco-v2": (), "msf": (), "rotation": ("queue_size", "head_hidden", "head_out")}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).requires_grad_(False))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_matrices_decay_biases_and_norms_do_not_and_frozen_weights_are_left_out(name: str) -> None:
    module = network()
    optimiser = OPTIMISERS[name](module, Recipe(learning_rate=0.2, weight_decay=0.3, momentum=0.6))
    decayed, others = optimiser.param_groups
    assert [id(p) for p in decayed["params"]] == [id(module[0].weight)]
    assert [id(p) for p in others["params"]] == [id(p) for p in (module[0].bias, *module[1].parameters())]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {group["lr"] for group in optimiser.param_groups} == {0.2}
    assert (decayed["betas"][0] if name == "adamw" else decayed["momentum"]) == 0.6


def test_the_optimisers_are_the_named_ones() -> None:
    kinds = {name: type(make(network(), Recipe())) for name, make in OPTIMISERS.items()}
    assert kinds == {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    still = OPTIMISERS["sgd"](network(), Recipe(momentum=0.0))
    assert not still.param_groups[0]["nesterov"]  # which torch refuses without momentum


def test_every_method_names_an_optimiser() -> None:
    assert {kind.RECIPE.optimiser for kind in METHODS.values()} <= set(OPTIMISERS)


def test_the_documented_settings_are_the_recipes() -> None:
    text = (Path(__file__).parents[2] / "docs/pretraining.md").read_text(encoding="utf-8")
    header, _, *rows = text.split("## Settings")[1].split("\n\n")[2].splitlines()
    methods = [cell.strip() for cell in header.strip("|").split("|")[1:]]
    assert methods == list(METHODS)
    documented: dict[str, list[str]] = {}
    for row in rows:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        documented[name.strip("`")] = cells
    assert list(documented) == [field.name for field in dataclasses.fields(Recipe)]
    for name, cells in documented.items():
        for method, cell in zip(methods, cells, strict=True):
            value = getattr(METHODS[method].RECIPE, name)
            unused = name in UNUSED.get(method, ("queue_size",))
            assert cell == ("–" if value is None or unused else str(value)), (name, method)
