"""RotNet's turns against loops, and what the module does with them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from unpoison.pretrain.recipe import Recipe
from unpoison.pretrain.rotation import Rotation, four_turns


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turned_left(picture: Tensor) -> Tensor:
    """Pixel by pixel: the last column becomes the first row."""
    side = picture.shape[-1]
    turned = torch.empty_like(picture)
    for row in range(side):
        for column in range(side):
            turned[:, side - 1 - column, row] = picture[:, row, column]
    return turned


def test_turns_agree_with_their_twin() -> None:
    images = torch.rand(3, 3, 4, 4, generator=generator())
    turned, quarters = four_turns(images)
    assert turned.shape == (12, 3, 4, 4) and quarters.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for image, *each in zip(images, *turned.chunk(4), strict=True):
        expected = image
        for got in each:
            assert torch.equal(got, expected)
            expected = turned_left(expected)


def module() -> Rotation:
    torch.manual_seed(0)
    return Rotation(nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), 6, Recipe())


def test_the_loss_is_the_cross_entropy_of_all_turns() -> None:
    rotation = module()
    first, second = (torch.randn(2, 3, 2, 2, generator=generator(s)) for s in (1, 2))
    losses = []
    for image in first:
        for quarters in range(4):
            logits = rotation.head(rotation.backbone(image[None]))[0]
            losses.append(-math.log(float((logits.exp()[quarters] / logits.exp().sum()).detach())))
            image = turned_left(image)
    loss = rotation(first, second)
    assert loss.item() == pytest.approx(sum(losses) / 8, abs=1e-5)
    assert torch.equal(loss, rotation(first, first))  # the second view is not looked at
    loss.backward()
    rotation.after_step(1.0)
    assert all(p.grad is not None for p in rotation.parameters())
