"""MoCo v3's loss against loops, its fixed patches and positions, and what the module does with them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.errors import ConfigError
from unpoison.pretrain.moco_v3 import MoCoV3, contrast, fix_patches, sine_cosine_positions
from unpoison.pretrain.moving_average import rising_momentum


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_contrast(query: Tensor, key: Tensor, temperature: float) -> float:
    losses = []
    keys = [k / k.norm() for k in key.double()]
    for i, q in enumerate(query.double()):
        each = [math.exp(float(q / q.norm() @ k) / temperature) for k in keys]
        losses.append(-math.log(each[i] / sum(each)))
    return 2 * temperature * sum(losses) / len(losses)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_the_loss_agrees_with_its_twin(n: int, temperature: float) -> None:
    query, key = (3 * torch.randn(n, 5, generator=generator(s)) for s in (1, 2))
    expected = naive_contrast(query, key, temperature)
    assert float(contrast(query, key, temperature)) == pytest.approx(expected, abs=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the loss stays in float32
        assert float(contrast(query, key, temperature)) == pytest.approx(expected, abs=1e-5)


def test_the_loss_agrees_with_lightly() -> None:
    """With the other keys of the batch as its memory, lightly's loss of one query is ours, but for the factor 2T."""
    lightly = pytest.importorskip("lightly.loss")
    query, key = (torch.randn(6, 5, generator=generator(s)) for s in (1, 2))
    losses = []
    for i in range(6):
        theirs = lightly.NTXentLoss(temperature=0.2, memory_bank_size=(5, 5))
        others = torch.cat((key[:i], key[i + 1 :]))
        theirs.memory_bank.bank = nn.functional.normalize(others, dim=1)
        theirs.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.int64)
        losses.append(theirs(query[i : i + 1], key[i : i + 1]))
    torch.testing.assert_close(contrast(query, key, 0.2), 2 * 0.2 * torch.stack(losses).mean())


def test_positions_agree_with_their_twin() -> None:
    positions = sine_cosine_positions(2, 3, 8)
    assert positions.shape == (6, 8) and positions.dtype == torch.float32
    for row in range(2):
        for column in range(3):
            frequencies = [1 / 10_000 ** (i / 2) for i in range(2)]
            expected = [
                wave(place * f)
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for f in frequencies
            ]
            torch.testing.assert_close(positions[3 * row + column], torch.tensor(expected))


def test_positions_agree_with_lightly() -> None:
    lightly = pytest.importorskip("lightly.models.utils")
    theirs = lightly.get_2d_sine_cosine_positional_embedding(16, 4, cls_token=False)
    torch.testing.assert_close(sine_cosine_positions(4, 4, 16), torch.tensor(theirs, dtype=torch.float32))


def test_positions_need_a_multiple_of_four() -> None:
    with pytest.raises(ConfigError, match="a multiple of 4 features per patch, got 6; choose another --arch"):
        sine_cosine_positions(2, 2, 6)


@pytest.mark.parametrize("name", ["vit_tiny", "vit_tiny_patch16_224"])
def test_patches_are_drawn_anew_and_frozen_and_positions_are_fixed(name: str) -> None:
    torch.manual_seed(0)
    network = build_backbone(Architecture(name=name, image_size=32, width=8))
    assert isinstance(network, nn.Module)
    fix_patches(network)
    projection = network.patch_embed.proj
    bound = math.sqrt(6 / (3 * math.prod(projection.kernel_size) + projection.out_channels))
    assert 0.9 * bound < float(projection.weight.abs().max()) <= bound
    assert not projection.bias.any()
    grid = math.isqrt(network.pos_embed.shape[1] - 1)
    assert not network.pos_embed[0, 0].any()
    torch.testing.assert_close(
        network.pos_embed[0, 1:], sine_cosine_positions(grid, grid, network.pos_embed.shape[2])
    )
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_a_network_without_patches_is_left_as_it_is() -> None:
    network = build_backbone(Architecture(name="resnet10", image_size=16, width=4))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fix_patches(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())


def module() -> MoCoV3:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6))
    return MoCoV3(backbone, 6, replace(MoCoV3.RECIPE, key_momentum=0.5, head_hidden=8, head_out=4))


def views() -> tuple[Tensor, Tensor]:
    first, second = (torch.randn(4, 3, 2, 2, generator=generator(s)) for s in (1, 2))
    return first, second


@torch.no_grad()
def test_each_view_predicts_the_key_of_the_other() -> None:
    moco = module().eval()
    for parameter in moco.key_backbone.parameters():  # so that key and query network differ
        parameter.add_(0.3)
    first, second = views()
    expected = 0.0
    for seen, hidden in ((first, second), (second, first)):
        query = moco.predictor(moco.projector(moco.backbone(seen)))
        expected += naive_contrast(query, moco.key_projector(moco.key_backbone(hidden)), 0.2)
    assert float(moco(first, second)) == pytest.approx(expected, abs=1e-5)
    assert float(moco(second, first)) == pytest.approx(expected, abs=1e-5)


def test_gradients_reach_the_query_network_only() -> None:
    moco = module()
    moco(*views()).backward()
    query = [*moco.backbone.parameters(), *moco.projector.parameters(), *moco.predictor.parameters()]
    keys = [*moco.key_backbone.parameters(), *moco.key_projector.parameters()]
    assert all(p.grad is not None for p in query)
    assert all(p.grad is None and not p.requires_grad for p in keys)


def test_the_key_network_follows_and_stands_still_at_the_end() -> None:
    moco = module()
    with torch.no_grad():
        for parameter in (*moco.backbone.parameters(), *moco.projector.parameters()):
            parameter.add_(1)
    before = moco.key_backbone[1].weight.clone()
    moco.after_step(0.5)
    torch.testing.assert_close(moco.key_backbone[1].weight, before + (1 - rising_momentum(0.5, 0.5)))
    moved = moco.key_projector[0].weight.clone()
    moco.after_step(1.0)
    assert torch.equal(moco.key_projector[0].weight, moved)
