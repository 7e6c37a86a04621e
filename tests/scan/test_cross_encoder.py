"""The comparison of two encoders."""

from __future__ import annotations

import pytest
import torch

from toys import planted_encoder, planted_images
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import ConfigError
from unpoison.records import Geometry
from unpoison.scan.cross_encoder import CrossEncoderConfig, fit_cross_encoder


def images(count: int = 60) -> torch.Tensor:
    return planted_images(count, 0, torch.Generator().manual_seed(0))[0].pixels


def test_an_encoder_agrees_with_itself() -> None:
    encoder = planted_encoder()
    detector = fit_cross_encoder(images(), encoder, planted_encoder())
    assert torch.allclose(detector.score(images(10)), torch.zeros(10), atol=1e-5)


def test_the_score_is_the_formula() -> None:
    encoder, other = planted_encoder(), planted_encoder(planted=False)
    network = other.network
    other.network = lambda x: network(x).flip(1).cumsum(1)
    detector = fit_cross_encoder(images(), encoder, other, CrossEncoderConfig(neighbors=4))
    unit = torch.nn.functional.normalize
    reference = [unit(each.features(images()), dim=1) for each in (encoder, other)]
    for row, score in enumerate(detector.score(images(70)[60:]).tolist()):
        query = images(70)[60 + row : 61 + row]
        mine, theirs = (
            (unit(each.features(query), dim=1) @ known.T)[0]
            for each, known in zip((encoder, other), reference, strict=True)
        )
        best = theirs.sort(descending=True).values[:4].mean()
        given = theirs[mine.argsort(descending=True)[:4]].mean()
        assert score == pytest.approx(float((best - given) / (best - theirs.mean())), abs=1e-4)


def test_complaints() -> None:
    with pytest.raises(ConfigError, match="neighbors=5, references=5: expected at least one neighbour"):
        CrossEncoderConfig(neighbors=5, references=5)
    with pytest.raises(ConfigError, match="10 reference images: expected more than neighbors=10"):
        fit_cross_encoder(images(10), planted_encoder(), planted_encoder())
    larger = Encoder(torch.nn.Flatten(), Preprocessing(geometry=Geometry(64, 64)), device="cpu")
    with pytest.raises(ConfigError, match="the encoders take images of 32 and 64 pixels"):
        fit_cross_encoder(images(), planted_encoder(), larger)
