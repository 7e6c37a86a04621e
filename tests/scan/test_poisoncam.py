"""Masks as attention: the scores against twins, the promises of equation 2, and a toy that knows its trigger."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from toys import planted_encoder, planted_images
from unpoison.encoders.encoder import Encoder
from unpoison.encoders.extract import extract_features
from unpoison.functional.clustering import kmeans
from unpoison.functional.windows import grid_masks, hottest_windows
from unpoison.records import Box, Clusters, ImageSet
from unpoison.scan.config import ScanConfig
from unpoison.scan.poisoncam import MaskAttention, activation_scores, margin_drop, sharpen_windows

WINDOW = 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def toy() -> tuple[Encoder, ImageSet, dict[str, Box], Clusters]:
    images, boxes = planted_images(160, 20, generator(3))
    encoder = planted_encoder()
    features = extract_features(encoder, images)
    return encoder, images, boxes, kmeans(features.values, 12, generator=generator())


def attention(
    toy: tuple[Encoder, ImageSet, dict[str, Box], Clusters], *, batch_size: int = 256, **settings: object
) -> MaskAttention:
    config = ScanConfig(window=WINDOW, clusters=12, **settings).resolve(160, 32)  # type: ignore[arg-type]
    return MaskAttention(toy[0], toy[3], config, generator=generator(1), batch_size=batch_size)


def naive_activation(similarities: Tensor, own: int) -> list[float]:
    views = [max(range(len(row)), key=lambda k: float(row[k])) for row in similarities]
    votes = {k: views.count(k) for k in set(views)}
    most = max(votes.values())
    leaders = sorted(k for k, count in votes.items() if count == most)
    mode = own if own in leaders else leaders[0]
    distances = [1 - float(row[mode]) for row, view in zip(similarities, views, strict=True) if view == mode]
    low, high = min(distances), max(distances)
    scores = []
    for row, view in zip(similarities, views, strict=True):
        if view != mode:
            scores.append(1.0)
        else:
            scores.append((1 - float(row[mode]) - low) / (high - low) if high > low else 0.0)
    return scores


def test_activation_scores_agree_with_their_twin() -> None:
    similarities = torch.rand(30, 7, 3, generator=generator(2)) * 2 - 1
    own = torch.randint(0, 3, (30,), generator=generator(3))
    seen = activation_scores(similarities, own)
    for i in range(30):
        assert seen[i].tolist() == pytest.approx(naive_activation(similarities[i], int(own[i])), abs=1e-5)


def test_what_equation_2_promises() -> None:
    similarities = torch.rand(200, 9, 4, generator=generator(4)) * 2 - 1
    similarities[:100, :, 0] += 2  # half of the images never change their cluster
    scores = activation_scores(similarities, torch.zeros(200, dtype=torch.int64))
    assert scores.min() >= 0 and scores.max() <= 1
    assert ((scores == 0).sum(dim=1) >= 1).all()
    assert (scores[:100].amax(dim=1) == 1).all()
    tied = torch.rand(3, 1, 4, generator=generator(5)).expand(3, 6, 4)
    assert (activation_scores(tied, tied[:, 0].argmax(dim=1)) == 0).all()


def test_a_tie_of_the_mode_goes_to_the_image_s_own_cluster() -> None:
    similarities = torch.tensor([[[0.9, 0.1], [0.8, 0.1], [0.1, 0.9], [0.1, 0.8]]])
    assert activation_scores(similarities, torch.tensor([1]))[0].tolist()[:2] == [1, 1]
    assert activation_scores(similarities, torch.tensor([0]))[0].tolist()[2:] == [1, 1]


def test_margin_drop_agrees_with_its_twin() -> None:
    similarities = torch.rand(20, 6, 4, generator=generator(6)) * 2 - 1
    unmasked = torch.rand(20, 4, generator=generator(7)) * 2 - 1
    seen = margin_drop(similarities, unmasked)
    for i in range(20):
        own = int(unmasked[i].argmax())
        others = [k for k in range(4) if k != own]
        before = float(unmasked[i, own]) - max(float(unmasked[i, k]) for k in others)
        for m in range(6):
            after = float(similarities[i, m, own]) - max(float(similarities[i, m, k]) for k in others)
            assert float(seen[i, m]) == pytest.approx(max(0.0, before - after), abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"fill": "black"}, {"faithful": True, "n_masks": 64}])
def test_heat_is_never_negative_and_its_windows_lie_inside(toy, settings) -> None:
    looking = attention(toy, **settings)
    pixels = toy[1].pixels[:6]
    before, shown = pixels.clone(), toy[0].images_shown
    heat = looking.heat(pixels)
    assert heat.shape == (6, 32, 32) and heat.dtype == torch.float32 and heat.min() >= 0
    corners = looking.windows(heat)
    assert corners.shape == (6, 2) and corners.min() >= 0 and corners.max() <= 32 - WINDOW
    assert torch.equal(pixels, before)
    assert toy[0].images_shown - shown == 6 * (len(looking.masks) + 1)


def test_faithful_is_the_plain_sum_of_equation_3(toy) -> None:
    looking = attention(toy, faithful=True, n_masks=32)
    assert looking.masks.shape == (32, 32, 32) and (looking.masks.flatten(1).sum(1) == WINDOW**2).all()
    heat = looking.heat(toy[1].pixels[:2])
    assert heat.max() > 1  # a mean over the masks that hid a pixel could not be


@pytest.mark.parametrize(
    ("masks", "hidden"), [("random", WINDOW**2), ("blocks", WINDOW**2 // 2), ("pixels", WINDOW**2 // 2)]
)
@pytest.mark.parametrize("faithful", [False, True])
def test_every_mask_strategy_hides_its_share_of_the_same_windows(toy, masks, hidden, faithful) -> None:
    looking = attention(toy, masks=masks, n_masks=24, faithful=faithful)
    assert looking.masks.shape == (24, 32, 32)
    assert (looking.masks.flatten(1).sum(dim=1) == hidden).all()
    assert not (looking.masks & ~attention(toy, masks="random", n_masks=24).masks).any()
    heat = looking.heat(toy[1].pixels[:2])
    assert heat.shape == (2, 32, 32) and (heat[:, ~looking.masks.any(dim=0)] == 0).all()


def test_every_planted_trigger_lies_in_its_window(toy) -> None:
    _, images, boxes, _ = toy
    looking = attention(toy)
    # A grid as fine as the slack between window and trigger allows; the default one trades some of it for speed.
    looking.masks = grid_masks(32, WINDOW, 3)
    rows = [images.ids.index(i) for i in boxes]
    corners = looking.windows(looking.heat(images.pixels[rows]))
    for (top, left), box in zip(corners.tolist(), boxes.values(), strict=True):
        assert Box(left, top, WINDOW, WINDOW).intersection(box) == box.area


def test_the_default_grid_finds_most_of_every_trigger(toy) -> None:
    _, images, boxes, _ = toy
    looking = attention(toy)
    rows = [images.ids.index(i) for i in boxes]
    corners = looking.windows(looking.heat(images.pixels[rows]))
    caught = [
        Box(left, top, WINDOW, WINDOW).intersection(box) / box.area
        for (top, left), box in zip(corners.tolist(), boxes.values(), strict=True)
    ]
    assert min(caught) >= 0.6 and sum(caught) / len(caught) >= 0.9


def test_looking_along_the_trigger_s_direction_finds_it_too(toy) -> None:
    _, images, boxes, _ = toy
    looking = attention(toy)
    directions = torch.eye(55)[:2]  # e_0 is the trigger's
    rows = [images.ids.index(i) for i in boxes]
    heat = looking.heat_along(images.pixels[rows], directions)
    assert heat.shape == (20, 2, 32, 32) and heat.min() >= 0
    for (top, left), box in zip(looking.windows(heat[:, 0]).tolist(), boxes.values(), strict=True):
        assert Box(left, top, WINDOW, WINDOW).intersection(box) >= 0.6 * box.area


def test_heat_along_agrees_with_its_twin(toy) -> None:
    encoder, images, _, _ = toy
    looking = attention(toy)
    direction = F.normalize(torch.randn(1, 55, generator=generator(8)), dim=1)
    heat = looking.heat_along(images.pixels[:2], direction)[:, 0]
    for picture, seen in zip(images.pixels[:2], heat, strict=True):
        drops = []
        for mask in looking.masks:
            hidden = picture.clone()
            hidden[:, mask] = looking.fill[:, None]
            drops.append(-float(F.normalize(encoder.features(hidden[None]), dim=1)[0] @ direction[0]))
        total, cover = torch.zeros(32, 32), torch.zeros(32, 32)
        for mask, drop in zip(looking.masks, drops, strict=True):
            total += mask * (drop - min(drops))
            cover += mask
        torch.testing.assert_close(seen, total / cover, atol=1e-5, rtol=1e-4)


def test_the_batch_size_is_no_matter(toy) -> None:
    pixels = toy[1].pixels[:9]
    small, large = attention(toy, batch_size=7), attention(toy, batch_size=500)
    torch.testing.assert_close(small.heat(pixels), large.heat(pixels), atol=1e-5, rtol=1e-5)
    assert torch.equal(small.windows(small.heat(pixels)), hottest_windows(large.heat(pixels), WINDOW)[:, 0])


@pytest.mark.parametrize("side", [8, 9, 12])
@pytest.mark.parametrize("batch_size", [7, 512])
def test_a_window_beside_the_trigger_moves_around_it(
    toy: tuple[Encoder, ImageSet, dict[str, Box], Clusters], side: int, batch_size: int
) -> None:
    encoder, images, boxes, _ = toy
    rows = torch.tensor([row for row, name in enumerate(images.ids) if name in boxes])
    clean = torch.tensor([row for row, name in enumerate(images.ids) if name not in boxes])
    direction = torch.zeros(encoder.features(images.pixels[:1]).shape[1])
    direction[0] = 1
    planted = torch.tensor([[boxes[images.ids[row]].y, boxes[images.ids[row]].x] for row in rows.tolist()])
    start = (planted + torch.randint(-2, 3, planted.shape, generator=generator(5))).clamp(0, 32 - side)
    moved = sharpen_windows(
        encoder,
        images.pixels[rows],
        start,
        direction,
        side,
        carriers=images.pixels[clean[:2]],
        batch_size=batch_size,
    )
    assert int(moved.min()) >= 0 and int(moved.max()) <= 32 - side
    for (top, left), row in zip(moved.tolist(), rows.tolist(), strict=True):
        box = boxes[images.ids[row]]
        assert Box(left, top, side, side).intersection(box) == box.area


def test_a_window_stays_where_no_neighbour_is_better(
    toy: tuple[Encoder, ImageSet, dict[str, Box], Clusters],
) -> None:
    encoder, images, boxes, _ = toy
    clean = [row for row, name in enumerate(images.ids) if name not in boxes][:3]
    direction = torch.zeros(encoder.features(images.pixels[:1]).shape[1])
    direction[0] = 1
    start = torch.tensor([[0, 0], [11, 3], [20, 20]])
    pixels = images.pixels[clean]
    moved = sharpen_windows(encoder, pixels, start, direction, WINDOW, carriers=pixels[:1], batch_size=64)
    assert torch.equal(moved, start)
    nothing = sharpen_windows(
        encoder, pixels[:0], start[:0], direction, WINDOW, carriers=pixels[:1], batch_size=64
    )
    assert nothing.shape == (0, 2)
