"""What a method trains with unless the caller says otherwise, and the optimisers that the recipes name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["OPTIMISERS", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method's own settings; each has its namesake in `pretrain.loop.PretrainConfig`, which overrules it when given.

    Attributes:
        arch: see `encoders.backbones.Architecture`.
        optimiser: a name in `OPTIMISERS`.
        learning_rate: for a batch of 256; scaled linearly with the batch.
        momentum: of SGD (Nesterov's); the first beta of AdamW.
        weight_decay: of kernels and matrices.
        warmup_epochs: length of the linear warm-up.
        temperature: T of the contrastive loss; None where the loss has none.
        key_momentum: of the moving average that makes the other network, at the start where it rises; None where
            there is no other network.
        queue_size: number of old keys, where there is a queue.
        head_hidden, head_out: sizes of the heads on the backbone.
    """

    arch: str = "resnet10"
    optimiser: str = "sgd"
    learning_rate: float = 0.3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = 2.0
    temperature: float | None = None
    key_momentum: float | None = None
    queue_size: int = 2048
    head_hidden: int = 512
    head_out: int = 128


def _sgd(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        _decay_groups(module, recipe.weight_decay),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )


def _adamw(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        _decay_groups(module, recipe.weight_decay), lr=recipe.learning_rate, betas=(recipe.momentum, 0.999)
    )


OPTIMISERS: dict[str, Callable[[nn.Module, Recipe], torch.optim.Optimizer]] = {"sgd": _sgd, "adamw": _adamw}
"""Name to a function from the trained module and its recipe to the optimiser of what requires gradients."""


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and kernels only; biases and normalisation go without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
