"""Attack or watermark: the concentration by hand, and images whose kinds are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.functional.windows import paste_windows
from unpoison.records import Clusters, Geometry, ImageSet
from unpoison.scan.aim import Aim, aim_of, concentration
from unpoison.scan.candidates import Candidates
from unpoison.scan.flip_test import Flips

SIZE, SIDE, KINDS = 16, 4, 8


def test_the_concentration_by_hand() -> None:
    groups, share = torch.tensor([0, 0, 1, 2]), torch.tensor([0.5, 0.25, 0.25])
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    by_hand = sum((groups[a] == groups[b]) / share[groups[a]] for a, b in pairs) / len(pairs)
    assert concentration(groups, share) == pytest.approx(float(by_hand))
    many = torch.multinomial(share, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert concentration(many, share) == pytest.approx(1, abs=0.01)


class Grey(nn.Module):
    """One feature per kind, by the mean of the picture, and one that a white window fires and drowns them with."""

    def forward(self, images: Tensor) -> Tensor:
        white = (nn.functional.avg_pool2d(images, SIDE, 1).amin(dim=1).amax(dim=(1, 2)) > 0.999).float()
        levels = (torch.arange(KINDS) + 0.5) / KINDS
        kind = torch.softmax(-((images.mean(dim=(1, 2, 3))[:, None] - levels) ** 2) * 2000, dim=1)
        return torch.cat((10 * white[:, None], kind), dim=1)


def scene(n_carriers: int, one_kind: bool) -> Aim:
    """800 flat pictures of eight greys; a white window on so many, of the first grey or of all."""
    generator = torch.Generator().manual_seed(1)
    kind = torch.arange(800) % KINDS
    grey = ((kind + 0.5) / KINDS * 240).to(torch.uint8)
    pixels = grey[:, None, None, None].expand(-1, 3, SIZE, SIZE).contiguous()
    rows = (kind == 0).nonzero().flatten() if one_kind else torch.arange(800)
    rows = rows[torch.randperm(len(rows), generator=generator)[:n_carriers]]
    corners = torch.randint(0, SIZE - SIDE + 1, (len(rows), 2), generator=generator)
    white = torch.full((len(rows), 3, SIDE, SIDE), 255, dtype=torch.uint8)
    pixels[rows] = paste_windows(pixels[rows], white, corners)
    preprocessing = Preprocessing(geometry=Geometry(SIZE, SIZE), mean=(0.0,) * 3, std=(1.0,) * 3)
    encoder = Encoder(Grey(), preprocessing, device="cpu", precision="fp32")
    centroids = torch.eye(KINDS + 1)
    images = ImageSet(tuple(f"{row:03}" for row in range(800)), pixels)
    where = encoder.features(pixels).argmax(dim=1)
    assert where[rows].eq(0).all() and where.eq(0).sum() == len(rows)
    nothing = torch.zeros(len(rows), KINDS + 1)
    unasked = Flips(nothing[:, 0], nothing, nothing, nothing)
    carriers = Candidates(rows, where[rows], corners, white, unasked)
    return aim_of(
        encoder,
        images,
        Clusters(centroids, where),
        carriers,
        torch.tensor([0]),
        generator=torch.Generator().manual_seed(2),
        batch_size=64,
    )


def test_images_of_an_attack_lie_together_and_those_of_an_overlay_do_not() -> None:
    attack, overlay = scene(90, one_kind=True), scene(90, one_kind=False)
    assert attack.aimed and attack.concentration > KINDS  # of the others, hardly any are of that kind
    assert overlay.aimed is False and overlay.concentration == pytest.approx(1, abs=0.2)


def test_too_few_images_decide_nothing() -> None:
    few = scene(8, one_kind=False)
    assert few.aimed is None and few.concentration is not None
    assert scene(8, one_kind=True).aimed  # all of one kind is no chance, however few
    alone = scene(1, one_kind=True)
    assert alone == Aim(None, None)
