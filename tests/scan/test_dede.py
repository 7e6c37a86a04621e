"""DeDe: what is visible, what is drawn, and what settings mean."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from toys import planted_encoder, planted_images
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import ConfigError, NoVerdictError
from unpoison.records import Geometry
from unpoison.scan.dede import Dede, DedeConfig, _to_cells, _to_images, _weights, fit_dede

TINY = DedeConfig(width=8, heads=1, encoder_depth=1, decoder_depth=1, epochs=2, batch_size=32)


def images(count: int = 64) -> torch.Tensor:
    return planted_images(count, 0, torch.Generator().manual_seed(0))[0].pixels


def test_the_published_ratio_shows_nothing_and_is_deterministic() -> None:
    """Invariant: 32 pixels in cells of 4, 99 % hidden: no cell is visible, so all draws are the same."""
    config = DedeConfig()
    assert 32 // config.cells == 4 and config.visible(0.99) == 0 and config.visible(0.9) == 6
    detector = fit_dede(images(), planted_encoder(), TINY)
    pixels = images(4)
    drawn = [detector.reconstruct(pixels, draw) for draw in range(3)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert torch.equal(detector.score(pixels), detector.score(pixels))


def test_the_score_is_the_error_of_the_hidden_cells() -> None:
    for hidden in (0.99, 0.5):
        detector = fit_dede(
            images(), planted_encoder(), dataclasses.replace(TINY, test_hidden=hidden, draws=2)
        )
        pixels = images(3)
        truth = detector.encoder.normalise(pixels)
        for row in range(3):
            errors = []
            for draw in range(2):
                error = (detector.reconstruct(pixels, draw) - truth)[row].square()
                cells = {(cell // 8, cell % 8) for cell in detector._visible(draw, 1)[0].tolist()}
                assert len(cells) == detector.config.visible(hidden)
                for y, x in cells:
                    error[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 0
                errors.append(float(error.sum()))
            assert float(detector.score(pixels)[row]) == pytest.approx(sum(errors) / 2, rel=1e-4)


def test_cells_are_cut_in_rows_and_put_back() -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    cells = _to_cells(pixels, 4)
    assert cells.shape == (2, 16, 12)
    assert torch.equal(cells[1, 6].view(3, 2, 2), pixels[1, :, 2:4, 4:6])
    assert torch.equal(_to_images(cells, 4), pixels)


def test_training_learns_to_draw() -> None:
    pixels = images(128)
    scores = [
        fit_dede(pixels, planted_encoder(), dataclasses.replace(TINY, width=24, epochs=epochs))
        .score(pixels)
        .mean()
        for epochs in (1, 15)
    ]
    assert scores[1] < 0.9 * scores[0]


@pytest.mark.parametrize("change", [{"shuffle": False}, {"alike": 0.999}, {"standardise": False}])
def test_every_mended_setting_does_something(change: dict[str, float]) -> None:
    given = images()[:40]
    pair: list[Dede] = [
        fit_dede(given, planted_encoder(), dataclasses.replace(TINY, batch_size=16, **each))  # type: ignore[arg-type]
        for each in ({"alike": 0.5}, {"alike": 0.5, **change})
    ]
    assert not torch.equal(pair[0].score(given), pair[1].score(given))


def test_a_crowd_of_alike_embeddings_counts_less_than_one_image() -> None:
    """Twin: one image at a time."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 8, generator=generator)
    features[:6] = torch.randn(8, generator=generator) + 0.05 * torch.randn(6, 8, generator=generator)
    weights = _weights(features, 0.9)
    for row in range(30):
        cosines = torch.nn.functional.cosine_similarity(features[row][None], features)
        assert float(weights[row]) == pytest.approx(1 / int((cosines >= 0.9).sum()) ** 2)
    assert float(weights[:6].sum()) == pytest.approx(1 / 6) and float(weights[6:].min()) == 1.0
    assert torch.equal(_weights(features, 1.0), torch.ones(30))


def test_the_published_settings() -> None:
    config = DedeConfig.published()
    assert (config.width, config.encoder_depth, config.decoder_depth) == (192, 12, 4)
    assert not config.shuffle and config.alike == 1 and config.epochs == 200


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("cells", 1, "cells=1: expected 2 to 64"),
        ("train_hidden", 1, r"train_hidden=1: expected a share in \(0, 1\)"),
        ("width", 10, "width=10: expected a multiple of heads=3"),
        ("learning_rate", 0, "learning_rate=0, weight_decay=1e-06: expected a positive number"),
        ("alike", 0.0, r"alike=0\.0: expected a cosine"),
    ],
)
def test_settings_are_checked(setting: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DedeConfig(**{setting: value})  # type: ignore[arg-type]


def test_complaints() -> None:
    with pytest.raises(ConfigError, match="1 auxiliary images: expected at least 2"):
        fit_dede(images(1), planted_encoder(), TINY)
    with pytest.raises(ConfigError, match="cells=5: expected a divisor of the image's side, 32 pixels"):
        fit_dede(images(), planted_encoder(), dataclasses.replace(TINY, cells=5))
    with pytest.raises(NoVerdictError, match="the decoder diverged in epoch"):
        fit_dede(images(), planted_encoder(), dataclasses.replace(TINY, learning_rate=1e30))
    broken = Encoder(
        lambda x: x.flatten(1) * float("nan"),
        Preprocessing(geometry=Geometry(32, 32)),
        device="cpu",
        precision="fp32",
    )
    with pytest.raises(NoVerdictError, match="NaN or infinite features"):
        fit_dede(images(), broken, TINY)
