"""Features of many images."""

from __future__ import annotations

import pytest
import torch

from toys import planted_encoder, planted_images
from unpoison.encoders.extract import extract_features, raw_features
from unpoison.errors import NoVerdictError


def test_features_have_unit_length_and_do_not_depend_on_the_batch_size() -> None:  # invariant 14
    images, _ = planted_images(50, 4, torch.Generator().manual_seed(0))
    encoder = planted_encoder()
    seen: list[tuple[str, int, int]] = []
    whole = extract_features(encoder, images, progress=lambda *at: seen.append(at))
    parts = extract_features(encoder, images, batch_size=7, progress=lambda *at: seen.append(at))
    assert whole.ids == images.ids and encoder.images_shown == 100
    torch.testing.assert_close(whole.values.norm(dim=1), torch.ones(50))
    torch.testing.assert_close(whole.values, parts.values, atol=1e-6, rtol=0)
    assert seen[0] == ("features", 50, 50) and seen[1:3] == [("features", 7, 50), ("features", 14, 50)]
    assert seen[-1] == ("features", 50, 50)
    raw = raw_features(encoder, images.pixels)
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=1), whole.values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_features_that_cannot_be_compared_are_refused(bad: float) -> None:
    images, _ = planted_images(10, 0, torch.Generator().manual_seed(0))
    encoder = planted_encoder()
    encoder.network = lambda x: torch.ones(len(x), 4) * bad
    with pytest.raises(
        NoVerdictError, match="toy gives NaN, infinite or zero features for 10 of 10 images; check"
    ):
        extract_features(encoder, images)


def test_no_images_give_no_features() -> None:
    assert raw_features(planted_encoder(), torch.empty(0, 3, 32, 32, dtype=torch.uint8)).shape == (0, 0)


def test_an_encoder_that_says_the_same_of_all_images_is_refused() -> None:
    images, _ = planted_images(10, 0, torch.Generator().manual_seed(0))
    encoder = planted_encoder()
    encoder.network = lambda x: torch.ones(len(x), 4)
    with pytest.raises(
        NoVerdictError, match="toy gives the same features for all 10 images: it is no working"
    ):
        extract_features(encoder, images)
    assert extract_features(encoder, images.select([0])).values.shape == (1, 4)  # nothing to compare
