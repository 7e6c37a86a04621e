"""Standardised pixels against the formula, in every dtype and memory format."""

from __future__ import annotations

import pytest
import torch

from unpoison.functional.colours import standardise

MEAN, STD = torch.tensor([0.3, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_values_are_those_of_the_formula(dtype: torch.dtype, layout: torch.memory_format) -> None:
    drawn = torch.randint(0, 256, (5, 3, 6, 8), generator=torch.Generator().manual_seed(0))
    images = drawn.to(torch.uint8) if dtype == torch.uint8 else drawn / 255
    images = images.contiguous(memory_format=layout)
    before = images.clone()
    values = standardise(images, MEAN, STD)
    expected = (drawn / 255 - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    assert values.dtype == torch.float32 and values.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(values, expected, atol=1e-5)
    assert torch.equal(images, before)


def test_gradients_reach_the_images() -> None:
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    standardise(images, MEAN, STD).sum().backward()
    assert images.grad is not None
    assert torch.allclose(images.grad, (1 / STD).view(1, 3, 1, 1).expand(2, 3, 4, 4))
