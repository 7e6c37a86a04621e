"""Both probes against twins written the obvious way."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unpoison.errors import ConfigError, NoVerdictError, ShapeError
from unpoison.evaluate.probes import LinearProbeConfig, fit_linear_probe, knn, linear_probe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int, *, classes: int = 4, dimensions: int = 16, scale: float = 1.0, seed: int = 0):  # type: ignore[no-untyped-def]
    """Non-negative features, like those after a ReLU and average pooling, around one centre per class."""
    centres = torch.rand(classes, dimensions, generator=generator(99))
    labels = torch.randint(classes, (count,), generator=generator(seed))
    noise = 0.15 * torch.randn(count, dimensions, generator=generator(seed + 1))
    return scale * (centres[labels] + noise).clamp(min=0), labels


def probe_naively(
    features: torch.Tensor, labels: torch.Tensor, classes: int, config: LinearProbeConfig
) -> nn.Linear:
    rng = generator(5)
    layer = nn.Linear(features.shape[1], classes)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(classes, features.shape[1], generator=rng))
        layer.bias.zero_()
    batch = min(config.batch_size, len(features))
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=config.learning_rate * batch / 256, momentum=config.momentum
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(features), generator=rng).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(layer(features[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
    return layer


@pytest.mark.parametrize(("count", "batch"), [(300, 64), (50, 256), (1, 256)])
def test_the_linear_probe_agrees_with_a_module_and_an_optimizer(count: int, batch: int) -> None:
    features, labels = blobs(count)
    config = LinearProbeConfig(batch_size=batch, epochs=7)
    got = fit_linear_probe(features, labels, n_classes=4, config=config, generator=generator(5))
    expected = probe_naively(features, labels, 4, config)
    torch.testing.assert_close(got.weight, expected.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.bias, expected.bias.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, 1.0, 10.0])
def test_raw_features_of_ordinary_size_train_sanely(scale: float) -> None:
    features, labels = blobs(1200, scale=scale)
    queries, truth = blobs(400, scale=scale, seed=7)
    predicted = linear_probe(features, labels, queries, n_classes=4, generator=generator())
    assert (predicted == truth).float().mean() > 0.95


def test_the_probe_is_deterministic_and_leaves_its_arguments() -> None:
    features, labels = blobs(100)
    before, state = features.clone(), torch.random.get_rng_state()
    first = fit_linear_probe(features, labels, n_classes=4, generator=generator(1))
    second = fit_linear_probe(features, labels, n_classes=4, generator=generator(1))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(features, before) and torch.equal(torch.random.get_rng_state(), state)


def test_a_probe_that_diverges_says_so() -> None:
    features, labels = blobs(100, scale=1e30)
    with pytest.raises(
        NoVerdictError, match=r"the linear probe diverged on features of mean norm .*; check the encoder"
    ):
        fit_linear_probe(features, labels, n_classes=4, generator=generator())


def vote_naively(
    features: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    classes: int,
    k: int,
    temperature: float,
) -> list[int]:
    predictions = []
    for query in queries:
        similarities = [float(F.cosine_similarity(query, row, dim=0)) for row in features]
        nearest = sorted(range(len(features)), key=lambda row: -similarities[row])[:k]
        votes = [0.0] * classes
        for row in nearest:
            votes[int(labels[row])] += math.exp(similarities[row] / temperature)
        predictions.append(max(range(classes), key=lambda label: votes[label]))
    return predictions


@pytest.mark.parametrize(("neighbors", "temperature"), [(1, 0.1), (7, 0.1), (200, 0.1), (20, 0.5)])
def test_knn_agrees_with_a_loop(neighbors: int, temperature: float) -> None:
    features, labels = blobs(60, dimensions=4)
    queries, _ = blobs(30, dimensions=4, seed=3)
    for chunk in (7, 4096):
        got = knn(
            features, labels, queries, n_classes=4, neighbors=neighbors, temperature=temperature, chunk=chunk
        )
        assert got.tolist() == vote_naively(features, labels, queries, 4, neighbors, temperature)


def test_knn_does_not_feel_the_length_of_features() -> None:
    features, labels = blobs(60)
    queries, _ = blobs(30, seed=3)
    expected = knn(features, labels, queries, n_classes=4)
    assert torch.equal(knn(100 * features, labels, 0.01 * queries, n_classes=4), expected)


def test_a_tiny_temperature_does_not_overflow() -> None:
    features, labels = blobs(60)
    assert (knn(features, labels, features, n_classes=4, temperature=1e-6) == labels).all()


def test_no_queries_no_predictions() -> None:
    features, labels = blobs(10)
    assert knn(features, labels, features[:0], n_classes=4).tolist() == []


def test_wrong_arguments_are_refused() -> None:
    features, labels = blobs(10)
    for probe in (
        lambda x, y: fit_linear_probe(x, y, n_classes=4, generator=generator()),
        lambda x, y: knn(x, y, x, n_classes=4),
    ):
        with pytest.raises(
            ShapeError, match=r"a probe needs features \(N, D\) and labels \(N,\), N > 0, got"
        ):
            probe(features, labels[:-1])
        with pytest.raises(ShapeError, match=r"a probe needs features"):
            probe(features[:0], labels[:0])
        with pytest.raises(ShapeError, match=r"labels must be integers in 0..3"):
            probe(features, labels + 4)
        with pytest.raises(ShapeError, match=r"labels must be integers in 0..3"):
            probe(features, labels - 9)
        with pytest.raises(NoVerdictError, match="the features to fit hold NaN or infinite values"):
            probe(features / 0, labels)
    with pytest.raises(ConfigError, match=r"neighbors=0, temperature=0\.1: expected positive numbers"):
        knn(features, labels, features, n_classes=4, neighbors=0)
    with pytest.raises(ConfigError, match="neighbors=200, temperature=0: expected positive numbers"):
        knn(features, labels, features, n_classes=4, temperature=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs=0, batch_size=256: expected at least 1 of each"),
        ({"batch_size": 0}, "epochs=30, batch_size=0: expected at least 1 of each"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: expected a positive number"),
        ({"momentum": 1.0}, r"momentum=1.0: expected a fraction in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinearProbeConfig(**setting)  # type: ignore[arg-type]
