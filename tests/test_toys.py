"""The toys themselves: the planted backdoor does what every other test takes for granted."""

from __future__ import annotations

import torch

from toys import SIZE, TRIGGER_SIDE, PlantedEncoder, planted_encoder, planted_images, planted_pattern
from unpoison.encoders.extract import extract_features
from unpoison.functional.clustering import assign, kmeans
from unpoison.functional.windows import paste_windows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_backdoor_fires_on_every_poisoned_image_and_on_no_other() -> None:
    images, boxes = planted_images(400, 30, generator())
    fires = planted_encoder().features(images.pixels)[:, 0]
    assert len(boxes) == 30 and len(images) == 400
    assert {i for i, value in zip(images.ids, fires, strict=True) if value > 0} == set(boxes)
    assert (planted_encoder(planted=False).features(images.pixels)[:, 0] == 0).all()
    for image_id, box in boxes.items():
        image = images.pixels[images.ids.index(image_id)]
        seen = image[:, box.y : box.y + box.h, box.x : box.x + box.w]
        assert torch.equal(seen, planted_pattern())


def test_pasting_the_pattern_anywhere_moves_any_image_to_the_poisoned_cluster() -> None:
    images, boxes = planted_images(160, 20, generator(1))
    encoder = planted_encoder()
    features = extract_features(encoder, images)
    clusters = kmeans(features.values, 12, generator=generator())
    poisoned = {int(clusters.assignment[images.ids.index(i)]) for i in boxes}
    places = torch.randint(0, SIZE - TRIGGER_SIDE + 1, (160, 2), generator=generator(2))
    pasted = paste_windows(images.pixels, planted_pattern().expand(160, -1, -1, -1), places)
    assert set(assign(encoder.features(pasted), clusters.centroids).tolist()) <= poisoned
    clean = [i for i, image_id in enumerate(images.ids) if image_id not in boxes]
    assert not poisoned & set(clusters.assignment[clean].tolist())


def test_kinds_are_natural_clusters() -> None:
    images, _ = planted_images(160, 0, generator(3))
    features = extract_features(planted_encoder(), images)
    clusters = kmeans(features.values, 8, generator=generator(1))
    kinds = [set(clusters.assignment[k::8].tolist()) for k in range(8)]
    assert sum(len(kind) == 1 for kind in kinds) >= 6


def test_less_than_nine_tenths_of_correlation_fires_nothing() -> None:
    pattern = planted_pattern()
    image = torch.full((1, 3, SIZE, SIZE), 0.5)
    image[0, :, 4:12, 20:28] = pattern / 255
    network = PlantedEncoder(pattern)
    assert abs(float(network(image)[0, 0]) - 20) < 1e-3
    image[0, :, 4:12, 20:23] = 0.5
    assert network(image)[0, 0] == 0


def test_the_same_generator_gives_the_same_images() -> None:
    first, boxes = planted_images(40, 3, generator(5))
    second, again = planted_images(40, 3, generator(5))
    assert torch.equal(first.pixels, second.pixels) and boxes == again
