"""The encoder: shapes, counting, normalisation, precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import ConfigError, ShapeError
from unpoison.records import Geometry

HALF = Preprocessing(geometry=Geometry(8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def means(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3))


def encoder(network: object = means, precision: str = "fp32") -> Encoder:
    return Encoder(network, HALF, device="cpu", precision=precision)  # type: ignore[arg-type]


def pixels(n: int = 5, side: int = 8) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_it_counts_every_image_that_it_is_shown() -> None:
    shown = encoder()
    shown.features(pixels(5))
    shown.features(pixels(2))
    assert shown.images_shown == 7


def test_bytes_and_floats_give_the_same_features_and_stay_unchanged() -> None:
    images = pixels()
    before = images.clone()
    from_bytes = encoder().features(images)
    floats = images.float() / 255
    kept = floats.clone()
    assert torch.equal(from_bytes, encoder().features(floats))
    assert torch.equal(images, before) and torch.equal(floats, kept)


def test_normalisation_agrees_with_its_twin() -> None:
    images = pixels(1)
    seen = encoder().normalise(images)
    for c in range(3):
        expected = (images[0, c].double() / 255 - HALF.mean[c]) / HALF.std[c]
        torch.testing.assert_close(seen[0, c].double(), expected, atol=1e-5, rtol=0)


def test_features_are_float32_in_every_precision() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    exact = encoder(network).features(pixels())
    rounded = encoder(network, "bf16").features(pixels())
    assert exact.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(exact, rounded, atol=0.05, rtol=0.05)
    assert not torch.equal(exact, rounded)


def test_a_module_is_put_in_evaluation_mode_without_gradients() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    frozen = encoder(network)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    statistics = network[1].running_mean.clone()
    assert not frozen.features(pixels()).requires_grad
    assert torch.equal(network[1].running_mean, statistics)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 9, 9), (1, 8, 8, 3)])
def test_images_of_another_shape_are_refused_and_not_counted(shape: tuple[int, ...]) -> None:
    refusing = encoder()
    with pytest.raises(ShapeError, match=r"images must be \(N, 3, 8, 8\), got \("):
        refusing.features(torch.zeros(shape, dtype=torch.uint8))
    assert refusing.images_shown == 0


@pytest.mark.parametrize(
    ("network", "got"),
    [
        (lambda x: x, r"\(5, 3, 8, 8\)"),
        (lambda x: [x], "list"),
        (lambda x: x.mean(dim=(2, 3))[:2], r"\(2, 3\)"),
    ],
)
def test_a_network_that_gives_no_feature_vectors_is_refused(network: object, got: str) -> None:
    with pytest.raises(
        ShapeError, match=rf"one feature vector per image, \(5, D\), got {got}; pass the pooled output"
    ):
        encoder(network).features(pixels())


def test_wrong_statistics_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected three positive numbers"):
        Preprocessing(geometry=Geometry(8, 8), std=(0.1, 0.0, 0.1))
    for mean in ((0.5, 0.5, 123.7), (-0.1, 0.5, 0.5)):
        with pytest.raises(ConfigError, match=r"expected three numbers in \[0, 1\]; divide by 255"):
            Preprocessing(geometry=Geometry(8, 8), mean=mean)


class Small:
    """A device with room for so many images."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return means(images)


def test_a_batch_that_does_not_fit_is_halved_and_so_are_the_next() -> None:
    network = Small(3)
    small = encoder(network)
    torch.testing.assert_close(small.features(pixels(16)), encoder().features(pixels(16)), rtol=0, atol=0)
    assert network.batches == [16, 8, 4, *[2] * 8] and small.largest_batch == 2
    network.batches.clear()
    small.features(pixels(5))
    assert network.batches == [2, 2, 1]
    assert small.images_shown == 21


def test_one_image_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        encoder(Small(0)).features(pixels(4))


def test_a_compiled_network_is_shown_the_images_and_the_plain_one_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())

    class Compiled:
        """As a compiled ResNet, whose truth value cannot be asked for."""

        def __call__(self, images: Tensor) -> Tensor:
            return network(images) + 1  # type: ignore[no-any-return]

        def __len__(self) -> int:
            raise TypeError("ResNet does not support len()")

    monkeypatch.setattr(torch, "compile", lambda module: Compiled())
    plain, compiled = encoder(network), encoder(network).compile()
    assert torch.equal(compiled.features(pixels()), plain.features(pixels()) + 1)
    assert compiled.network is network and compiled.images_shown == 5


def test_a_compiler_that_fails_costs_a_warning_and_no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(images: Tensor) -> Tensor:
        raise OSError("no C++ compiler\nmore")

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    monkeypatch.setattr(torch, "compile", lambda module: broken)
    compiled = encoder(network).compile()
    with pytest.warns(
        UserWarning, match=r"^torch.compile failed, the plain network goes on: no C\+\+ compiler$"
    ):
        seen = compiled.features(pixels())
    assert torch.equal(seen, encoder(network).features(pixels()))
    assert torch.equal(compiled.features(pixels()), seen)  # without another warning
    with pytest.raises(ConfigError, match=r"only an nn.Module can be compiled"):
        encoder().compile()


@pytest.mark.slow
def test_compiled_features_are_those_of_the_plain_network_in_batches_of_any_size() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    plain, compiled = encoder(network), encoder(network).compile()
    for n in (5, 5, 3, 1):
        torch.testing.assert_close(compiled.features(pixels(n)), plain.features(pixels(n)))


def test_what_is_in_memory_is_known_by_its_weights_and_a_function_by_its_name_alone() -> None:
    def module(bias: float) -> nn.Module:
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        torch.nn.init.constant_(network[1].weight, 1.0)
        torch.nn.init.constant_(network[1].bias, bias)
        return network

    one, same, other = encoder(module(0.0)), encoder(module(0.0)), encoder(module(1.0))
    assert len(one.fingerprint) == 64 and one.identity() == same.identity() != other.identity()
    unnamed = encoder()
    assert unnamed.fingerprint == "" and unnamed.identity() != unnamed.identity()
    named = Encoder(means, unnamed.preprocessing, device="cpu", precision="fp32", fingerprint="mine")
    assert named.identity() == {"name": "encoder", "weights": "mine"}
