"""The projection head."""

from __future__ import annotations

import torch

from unpoison.pretrain.heads import projection_head


def test_the_head_has_two_layers_and_the_sizes_asked_for() -> None:
    head = projection_head(6, 8, 4)
    assert head(torch.randn(5, 6)).shape == (5, 4)
    assert [tuple(p.shape) for p in head.parameters()] == [(8, 6), (8,), (8,), (4, 8), (4,)]
