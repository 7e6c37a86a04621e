"""What do the features know? A linear probe and a nearest-neighbour vote, both on features of a frozen encoder.

Both work on features that were computed once, of images without augmentation: the release of PatchSearch re-embeds
randomly cropped images in each of its 30 epochs, which costs 30 times the passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison.errors import ConfigError, NoVerdictError, ShapeError

__all__ = ["LinearProbe", "LinearProbeConfig", "fit_linear_probe", "knn", "linear_probe"]


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig:
    """Settings of the linear probe; defaults follow the releases of PatchSearch and PoisonCAM ("protocol A")."""

    epochs: int = 30
    batch_size: int = 256
    learning_rate: float = 0.1  # for a batch of 256; scales with the batch; cosine to 0, one step per epoch
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(
                f"epochs={self.epochs}, batch_size={self.batch_size}: expected at least 1 of each"
            )
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate}: expected a positive number")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum}: expected a fraction in [0, 1)")


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A fitted linear classifier.

    Attributes:
        weight: (C, D) float32.
        bias: (C,) float32.
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(M, D) features to (M, C) float32, on the device of the features."""
        return features.float() @ self.weight.to(features.device).T + self.bias.to(features.device)

    def predict(self, features: Tensor) -> Tensor:
        """(M, D) features to (M,) int64 classes, on the device of the features."""
        return self.logits(features).argmax(dim=1)


def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    *,
    n_classes: int,
    config: LinearProbeConfig | None = None,
    generator: torch.Generator,
) -> LinearProbe:
    """Fit a linear classifier on raw features: softmax cross-entropy, SGD with momentum, no weight decay.

    The features enter as they are, neither normalised nor standardised, as in the releases. A learning rate of 0.1 then
    suits features whose entries are of the order of 1: with a mean norm beyond about 100 the loss may oscillate (the
    cosine schedule calms it at the end), and below about 0.1 thirty epochs may not suffice. Both are properties of the
    protocol and stay, because numbers are to be compared with the papers'; the kNN vote does not share them.

    Args:
        features: (N, D) float, as the encoder gives them.
        labels: (N,) integers in 0..n_classes - 1.
        n_classes: C.
        config: see `LinearProbeConfig`.
        generator: on the CPU; draws the first weights and the order of the images.

    Returns:
        The classifier after the last epoch (the releases evaluate the last, not the best).

    Raises:
        ShapeError: not one label per feature row, or a label out of range.
        NoVerdictError: a feature, or the fitted classifier, is not finite.
    """
    config = config or LinearProbeConfig()
    _check_labelled(features, labels, n_classes)
    x, targets = features.float(), F.one_hot(labels.long(), n_classes).float().to(features.device)
    weight = (0.01 * torch.randn(n_classes, x.shape[1], generator=generator)).to(x.device)
    bias = torch.zeros(n_classes, device=x.device)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    batch = min(config.batch_size, len(x))
    for epoch in range(config.epochs):
        rate = config.learning_rate * batch / 256 * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for start in range(0, len(x), batch):
            rows = order[start : start + batch]
            error = (torch.softmax(x[rows] @ weight.T + bias, dim=1) - targets[rows]) / len(rows)
            weight_velocity = config.momentum * weight_velocity + error.T @ x[rows]
            bias_velocity = config.momentum * bias_velocity + error.sum(0)
            weight = weight - rate * weight_velocity
            bias = bias - rate * bias_velocity
    if not bool(torch.isfinite(weight).all() & torch.isfinite(bias).all()):
        norm = float(x.norm(dim=1).mean())
        raise NoVerdictError(
            f"the linear probe diverged on features of mean norm {norm:.3g}; check the encoder"
        )
    return LinearProbe(weight, bias)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    n_classes: int,
    config: LinearProbeConfig | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Fit on (features, labels), and predict the class of each query.

    Args:
        features: (N, D) float, as the encoder gives them.
        labels: (N,) integers in 0..n_classes - 1.
        queries: (M, D) float.
        n_classes: number of classes.
        config: see `LinearProbeConfig`.
        generator: on the CPU.

    Returns:
        (M,) int64 classes.
    """
    return fit_linear_probe(
        features, labels, n_classes=n_classes, config=config, generator=generator
    ).predict(queries)


def knn(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    n_classes: int,
    neighbors: int = 200,
    temperature: float = 0.1,
    chunk: int = 4096,
) -> Tensor:
    """Vote of the nearest neighbours by cosine, each with weight exp(similarity / temperature).

    Args:
        features: (N, D) float, of any length; normalised here.
        labels: (N,) integers in 0..n_classes - 1.
        queries: (M, D) float, of any length; normalised here.
        n_classes: number of classes.
        neighbors: voters per query; all N if there are fewer.
        temperature: positive; small values let the nearest decide.
        chunk: queries per block; memory is chunk · N floats; the result does not depend on it.

    Returns:
        (M,) int64 classes; ties go to the lower class.

    Raises:
        ShapeError: not one label per feature row, or a label out of range.
        ConfigError: `neighbors` or `temperature` is not positive.

    Source:
        The kNN monitor of CTRL (Li et al., ICCV 2023), with its temperature, and of BadEncoder (Jia et al., S&P 2022).

    >>> knn(torch.eye(2), torch.tensor([1, 0]), torch.tensor([[9.0, 1.0]]), n_classes=2, neighbors=1).tolist()
    [1]
    """
    if neighbors < 1 or not temperature > 0:
        raise ConfigError(f"neighbors={neighbors}, temperature={temperature}: expected positive numbers")
    _check_labelled(features, labels, n_classes)
    bank, votes = F.normalize(features.float(), dim=1), labels.long().to(features.device)
    predictions = []
    for start in range(0, len(queries), chunk):
        block = F.normalize(queries[start : start + chunk].float(), dim=1)
        similarity, nearest = (block @ bank.T).topk(min(neighbors, len(bank)), dim=1)
        tally = torch.zeros(len(block), n_classes, device=block.device)
        # Relative to the best neighbour, so that a small temperature cannot overflow; the winner is the same.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        predictions.append(tally.scatter_add_(1, votes[nearest], weights).argmax(dim=1))
    return torch.cat(predictions) if predictions else torch.empty(0, dtype=torch.int64)


def _check_labelled(features: Tensor, labels: Tensor, n_classes: int) -> None:
    if features.ndim != 2 or len(features) == 0 or labels.shape != features.shape[:1]:
        raise ShapeError(
            f"a probe needs features (N, D) and labels (N,), N > 0, got "
            f"{tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise ShapeError(f"labels must be integers in 0..{n_classes - 1}, got {labels.min()}..{labels.max()}")
    if not bool(torch.isfinite(features).all()):
        raise NoVerdictError("the features to fit hold NaN or infinite values; check the encoder's weights")
