"""Boxes and shares of i-CutMix, and every method's mixed loss, against loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.pretrain.byol import BYOL, prediction_error
from unpoison.pretrain.i_cutmix import UNMIXED, CutMix, draw_mixture
from unpoison.pretrain.moco import MoCoV2, info_nce
from unpoison.pretrain.moco_v3 import MoCoV3
from unpoison.pretrain.simclr import SimCLR


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, n: int = 5) -> Tensor:
    return torch.randn(n, 3, 4, 4, generator=generator(seed))


MIXTURE = CutMix(torch.tensor([2, 0, 1, 4, 3]), (1, 0, 3, 3), 1 - 6 / 16)


def test_the_box_comes_from_the_partner_and_all_else_stays() -> None:
    views = images(1)
    before, mixed = views.clone(), MIXTURE.mix(views)
    for i in range(5):
        for row in range(4):
            for column in range(4):
                source = int(MIXTURE.partner[i]) if 1 <= row < 3 and column < 3 else i
                assert torch.equal(mixed[i, :, row, column], views[source, :, row, column])
    assert torch.equal(views, before)


@pytest.mark.parametrize("side", [8, 32])
def test_the_share_is_what_the_box_leaves(side: int) -> None:
    shares = []
    for seed in range(200):
        mixture = draw_mixture(6, side, generator=generator(seed))
        hidden = torch.zeros(side, side)
        top, left, bottom, right = mixture.box
        hidden[top:bottom, left:right] = 1
        assert mixture.share == pytest.approx(1 - float(hidden.mean()))
        assert sorted(mixture.partner.tolist()) == list(range(6))
        shares.append(mixture.share)
    assert min(shares) >= 0.5 and max(shares) <= 1 and 0.75 < sum(shares) / 200 < 0.95
    assert len({draw_mixture(6, side, generator=generator(s)).box for s in range(50)}) > 20


def test_the_same_generator_draws_the_same_mixture() -> None:
    one, two = (draw_mixture(4, 16, generator=generator(3)) for _ in range(2))
    assert (one.box, one.share) == (two.box, two.share) and torch.equal(one.partner, two.partner)


def module(kind: type, **settings: float) -> nn.Module:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6))
    return kind(backbone, 6, replace(kind.RECIPE, head_hidden=8, head_out=4, **settings)).eval()


OTHER = CutMix(torch.tensor([1, 2, 3, 4, 0]), (0, 2, 2, 4), 1 - 4 / 16)


@torch.no_grad()
def test_moco_v3_finds_both_keys_in_proportion() -> None:
    """The formula as the fact sheet has it: λ CE(logits, i) + (1 - λ) CE(logits, π(i)), times 2T, for both views."""
    moco = module(MoCoV3)
    first, second = images(1), images(2)
    expected = 0.0
    for view, other, mixture in ((first, second, MIXTURE), (second, first, OTHER)):
        query = F.normalize(moco.predictor(moco.projector(moco.backbone(mixture.mix(view)))), dim=1)
        key = F.normalize(moco.key_projector(moco.key_backbone(other)), dim=1)
        for i in range(5):
            log_p = (query[i] @ key.T / 0.2).log_softmax(0)
            own, partner = log_p[i], log_p[int(mixture.partner[i])]
            expected -= 2 * 0.2 * float(mixture.share * own + (1 - mixture.share) * partner) / 5
    assert float(moco(first, second, (MIXTURE, OTHER))) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_moco_v2_finds_both_keys_against_the_queue() -> None:
    moco = module(MoCoV2, queue_size=9)
    first, second = images(1), images(2)
    query = F.normalize(moco.projector(moco.backbone(MIXTURE.mix(first))), dim=1)
    key = F.normalize(moco.key_projector(moco.key_backbone(second)), dim=1)
    own, partner = (info_nce(query, k, moco.queue.rows, 0.2) for k in (key, key[MIXTURE.partner]))
    expected = MIXTURE.share * own + (1 - MIXTURE.share) * partner
    torch.testing.assert_close(moco(first, second, (MIXTURE, OTHER)), expected)
    moco.after_step(0.5)
    torch.testing.assert_close(moco.queue.rows[:5], key)  # whole images fill the queue


@torch.no_grad()
def test_byol_predicts_both_targets() -> None:
    byol = module(BYOL)
    first, second = images(1), images(2)
    expected = torch.zeros(())
    for view, other, mixture in ((first, second, MIXTURE), (second, first, OTHER)):
        prediction = byol.predictor(byol.projector(byol.backbone(mixture.mix(view))))
        target = byol.target_projector(byol.target_backbone(other))
        expected += mixture.share * prediction_error(prediction, target)
        expected += (1 - mixture.share) * prediction_error(prediction, target[mixture.partner])
    torch.testing.assert_close(byol(first, second, (MIXTURE, OTHER)), expected)


@torch.no_grad()
def test_simclr_mixes_the_first_view_and_has_two_partners() -> None:
    simclr = module(SimCLR)
    first, second = images(1), images(2)
    one = F.normalize(simclr.projector(simclr.backbone(MIXTURE.mix(first))), dim=1)
    two = F.normalize(simclr.projector(simclr.backbone(second)), dim=1)
    both, expected = torch.cat((one, two)), 0.0
    sources = {int(p): i for i, p in enumerate(MIXTURE.partner)}
    for i in range(5):
        for row, own, partner in ((i, 5 + i, 5 + int(MIXTURE.partner[i])), (5 + i, i, sources[i])):
            others = [j for j in range(10) if j != row]
            log_p = (both[row] @ both[others].T / 0.5).log_softmax(0)
            terms = [float(log_p[others.index(j)]) for j in (own, partner)]
            expected -= (MIXTURE.share * terms[0] + (1 - MIXTURE.share) * terms[1]) / 10
    assert float(simclr(first, second, (MIXTURE, OTHER))) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", [MoCoV2, MoCoV3, BYOL, SimCLR])
@torch.no_grad()
def test_unmixed_is_the_plain_loss_and_so_is_an_empty_box(kind: type) -> None:
    first, second = images(1), images(2)
    plain = module(kind)(first, second)
    empty = CutMix(MIXTURE.partner, (2, 1, 2, 1), 1.0)
    assert torch.equal(module(kind)(first, second, UNMIXED), plain)
    torch.testing.assert_close(module(kind)(first, second, (empty, empty)), plain)
