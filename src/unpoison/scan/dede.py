"""DeDe: draw the image again from its embedding; a backdoored image comes back as something else.

Finds: images whose embedding says what the image does not show. A decoder learns to invert the encoder from the
embedding and a few visible cells; where a trigger holds the embedding, it draws the target, and the error is large.
Needs: the encoder's embeddings (no gradients), and auxiliary images without labels, a few of which may be poisoned.
Scoring costs one pass of the encoder and one of a small network per image.
Misses: targets that look like the image, triggers that the decoder has learned to draw because the auxiliary images
held many of them, and encoders whose embedding says little about appearance. Flags wrongly: images unlike the auxiliary
ones, and busy images before plain ones.

Paper: Hou et al.: DeDe: Detecting Backdoor Samples for SSL Encoders via Decoders, CVPR 2025. Mended against the
release: batches are shuffled, the threshold comes from scores at the same mask ratio, and the encoder brings its own
normalisation. Images whose embeddings lie together as those of triggered images do count little in training (`alike`),
so that a few poisoned ones do not teach the decoder to draw them. `DedeConfig.published()` sets what the release sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.encoders.backbones import choose_attention_kernels
from unpoison.encoders.encoder import Encoder
from unpoison.encoders.extract import raw_features
from unpoison.errors import CheckpointError, ConfigError, NoVerdictError
from unpoison.runtime import Progress, autocast, seeded, silent, stage_generator

__all__ = ["Dede", "DedeConfig", "fit_dede"]


@dataclass(frozen=True, kw_only=True)
class DedeConfig:
    """Settings of DeDe.

    Attributes:
        cells: the image is cut into so many cells per side; its side must be a multiple. The release: 8 at 32 px.
        train_hidden: share of the cells that is hidden in training, (0, 1).
        test_hidden: share that is hidden when images are scored, for the threshold as for the score, (0, 1). Of 64
            cells the published 0.99 leaves none visible: the image is drawn from its embedding alone.
        width: of the tokens.
        heads: of the attention; divides the width.
        encoder_depth: blocks of the side encoder, which sees the visible cells.
        decoder_depth: blocks of the decoder.
        epochs: over the auxiliary images.
        batch_size: images per step.
        learning_rate: of Adam.
        weight_decay: of Adam.
        shuffle: whether each epoch has its own order.
        alike: cosine of embeddings from which auxiliary images count as alike, (0, 1]; one of n alike images has the
            weight 1 / n² in training. 1: all count the same.
        draws: random choices of visible cells over which a score is averaged, where any cell is visible.
        standardise: whether embeddings are brought to mean 0 over the auxiliary images, and divided by their deviation
            and a tenth of the mean deviation.
        seed: of initial weights, orders and masks.
    """

    cells: int = 8
    train_hidden: float = 0.9
    test_hidden: float = 0.99
    width: int = 96
    heads: int = 3
    encoder_depth: int = 4
    decoder_depth: int = 3
    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-6
    shuffle: bool = True
    alike: float = 0.9
    draws: int = 4
    standardise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        # The upper ends are there because settings also come from files, and files from strangers.
        for name, least, most in (
            ("cells", 2, 64),
            ("width", 1, 2048),
            ("heads", 1, 64),
            ("encoder_depth", 1, 48),
            ("decoder_depth", 1, 48),
            ("epochs", 1, 100_000),
            ("batch_size", 1, 100_000),
            ("draws", 1, 64),
        ):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)}: expected {least} to {most}")
        for name in ("train_hidden", "test_hidden"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a share in (0, 1)")
        if self.width % self.heads:
            raise ConfigError(f"width={self.width}: expected a multiple of heads={self.heads}")
        if not (self.learning_rate > 0 and self.weight_decay >= 0):
            raise ConfigError(
                f"learning_rate={self.learning_rate}, weight_decay={self.weight_decay}: expected a positive number and "
                "one that is not negative"
            )
        if not 0 < self.alike <= 1:
            raise ConfigError(f"alike={self.alike}: expected a cosine in (0, 1]")

    @classmethod
    def published(cls) -> DedeConfig:
        """What the release sets for 32-pixel images: larger, longer, never shuffled, nothing left out."""
        return cls(
            width=192,
            encoder_depth=12,
            decoder_depth=4,
            epochs=200,
            batch_size=256,
            shuffle=False,
            alike=1.0,
            standardise=False,
        )

    def visible(self, hidden: float) -> int:
        """Cells that stay visible at this share of hidden ones."""
        return int(self.cells**2 * (1 - hidden) + 1e-9)


class _Decoder(nn.Module):
    """Side encoder and decoder: visible cells and an embedding in, all cells out."""

    def __init__(self, config: DedeConfig, cell_size: int, n_features: int) -> None:
        super().__init__()
        count, width = config.cells**2, config.width
        self.embed = nn.Linear(cell_size, width)
        self.positions = nn.Parameter(torch.empty(count, width).normal_(std=0.02))
        self.class_token = nn.Parameter(torch.empty(1, width).normal_(std=0.02))
        self.side = nn.Sequential(*(Block(width, config.heads) for _ in range(config.encoder_depth)))
        self.side_norm = nn.LayerNorm(width)
        self.from_features = nn.Linear(n_features, width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, width).normal_(std=0.02))
        self.decoder_positions = nn.Parameter(torch.empty(count + 1, width).normal_(std=0.02))
        self.decoder = nn.Sequential(*(Block(width, config.heads) for _ in range(config.decoder_depth)))
        self.head = nn.Linear(width, cell_size)
        choose_attention_kernels((*self.side, *self.decoder))

    def forward(self, cells: Tensor, features: Tensor, visible: Tensor) -> Tensor:
        """All cells, drawn.

        Args:
            cells: (n, T, P) of the normalised images.
            features: (n, D).
            visible: (n, v) int64: the cells that may be seen; v may be 0.

        Returns:
            (n, T, P).
        """
        count, width = self.positions.shape
        tokens = self.mask_token.expand(len(cells), count, width)
        if visible.shape[1]:
            index = visible[:, :, None]
            seen = self.embed(cells.gather(1, index.expand(-1, -1, cells.shape[2]))) + self.positions[visible]
            first = self.class_token.expand(len(cells), 1, width)
            seen = self.side_norm(self.side(torch.cat((first, seen), dim=1)))[:, 1:]
            tokens = tokens.scatter(1, index.expand(-1, -1, width), seen)
        # The embedding takes the place of the class token's output, which is why that is dropped above.
        tokens = torch.cat((self.from_features(features)[:, None], tokens), dim=1) + self.decoder_positions
        drawn: Tensor = self.head(self.decoder(tokens)[:, 1:])
        return drawn


@dataclass(frozen=True, eq=False)
class Dede:
    """The trained detector; see `scan.detector.Scorer`.

    Attributes:
        config: its settings.
        encoder: the suspect.
        decoder: on the encoder's device, in evaluation mode.
        shift: (D,) float32, taken off every embedding.
        scale: (D,) float32, which every embedding is divided by.
    """

    config: DedeConfig
    encoder: Encoder
    decoder: nn.Module
    shift: Tensor
    scale: Tensor

    method: ClassVar[str] = "dede"

    def reconstruct(self, images: Tensor, draw: int = 0) -> Tensor:
        """What the decoder makes of each image, (N, 3, S, S) float32, normalised as the encoder's input.

        Args:
            images: (N, 3, S, S) uint8.
            draw: which of the random choices of visible cells; of no matter where none is visible.
        """
        cells, features = self._inputs(images)
        with torch.inference_mode():
            drawn = self.decoder(cells, features, self._visible(draw, len(cells)))
        return _to_images(drawn, self.config.cells)

    def score(self, images: Tensor) -> Tensor:
        """Squared error of the hidden cells, summed over pixels and channels of the normalised image.

        Args:
            images: (N, 3, S, S) uint8, S as the encoder takes them.

        Returns:
            (N,) float32, at least 0.
        """
        cells, features = self._inputs(images)
        any_visible = self.config.visible(self.config.test_hidden) > 0
        draws = self.config.draws if any_visible else 1
        total = torch.zeros(len(cells), device=cells.device)
        with torch.inference_mode():
            for draw in range(draws):
                visible = self._visible(draw, len(cells))
                errors = (self.decoder(cells, features, visible) - cells).square().sum(dim=2)
                total += errors.scatter(1, visible, 0.0).sum(dim=1) / draws
        return total.cpu()

    def _inputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = (self.encoder.features(images) - self.shift) / self.scale
        return _to_cells(self.encoder.normalise(images), self.config.cells), features

    def _visible(self, draw: int, count: int) -> Tensor:
        """(count, v) the same cells for every image, so that a score depends on no other image."""
        generator = stage_generator(self.config.seed, f"scan/dede/visible {draw}")
        order = torch.randperm(self.config.cells**2, generator=generator)
        kept = order[: self.config.visible(self.config.test_hidden)]
        return kept.to(self.encoder.device).expand(count, -1)

    def tensors(self) -> dict[str, Tensor]:
        """What a file must hold beside the settings."""
        weights = {f"decoder.{name}": tensor for name, tensor in self.decoder.state_dict().items()}
        return {**weights, "shift": self.shift, "scale": self.scale}

    @classmethod
    def restore(cls, config: DedeConfig, tensors: Mapping[str, Tensor], encoder: Encoder) -> Dede:
        """The detector of a file.

        Raises:
            CheckpointError: the file's tensors are not those of this method, its settings and this encoder.
        """
        scale = tensors.get("scale", torch.empty(0))
        with torch.device("meta"), seeded(config.seed, "scan/dede/weights"):
            # Shapes only: a file that lies about its size costs no memory.
            decoder = _Decoder(config, _cell_size(config, encoder), max(1, scale.numel()))
        expected = {f"decoder.{name}": tensor.shape for name, tensor in decoder.state_dict().items()}
        expected |= {"shift": scale.shape, "scale": scale.shape}
        found = {name: tensor.shape for name, tensor in tensors.items() if tensor.dtype == torch.float32}
        if (
            found != expected
            or len(tensors) != len(expected)
            or scale.ndim != 1
            or not bool((scale > 0).all())
        ):
            raise CheckpointError(
                "a dede detector holds the weights of its decoder, `shift` and `scale`, float32 and of the shapes that "
                "its settings and the encoder's image size give: get another copy, or give its encoder"
            )
        weights = {name.removeprefix("decoder."): tensors[name] for name in expected if "." in name}
        decoder.load_state_dict(weights, assign=True)
        decoder.eval().requires_grad_(False).to(encoder.device)
        return cls(
            config, encoder, decoder, *(tensors[name].to(encoder.device) for name in ("shift", "scale"))
        )


def fit_dede(
    images: Tensor, encoder: Encoder, config: DedeConfig | None = None, *, progress: Progress = silent
) -> Dede:
    """Train the decoder.

    Args:
        images: (N, 3, S, S) uint8: auxiliary images, S as the encoder takes them; embedded once.
        encoder: the suspect; it is not trained.
        config: see `DedeConfig`.
        progress: called after every epoch.

    Raises:
        ConfigError: the side of the images is no multiple of `cells`, or there are fewer than 2 images.
        NoVerdictError: the encoder gives features that are not finite, or training diverges.
    """
    config = config or DedeConfig()
    if len(images) < 2:
        raise ConfigError(f"{len(images)} auxiliary images: expected at least 2, better thousands")
    features = raw_features(encoder, images, progress=progress)
    if not bool(torch.isfinite(features).all()):
        raise NoVerdictError(
            f"{encoder.name} gives NaN or infinite features; check its weights and preprocessing"
        )
    shift, scale = torch.zeros(features.shape[1]), torch.ones(features.shape[1])
    if config.standardise:
        shift = features.mean(dim=0)
        # Features that hardly vary are not blown up: a backdoor may use one of them, thousands of times as large.
        deviation = features.std(dim=0)
        scale = deviation + 0.1 * deviation.mean() + 1e-6
    features = (features - shift) / scale
    with seeded(config.seed, "scan/dede/weights"):
        decoder = _Decoder(config, _cell_size(config, encoder), features.shape[1])
    decoder.to(encoder.device)
    _train(decoder, images, features, encoder, config, progress)
    decoder.eval().requires_grad_(False)
    return Dede(config, encoder, decoder, shift.to(encoder.device), scale.to(encoder.device))


def _train(
    decoder: _Decoder,
    images: Tensor,
    features: Tensor,
    encoder: Encoder,
    config: DedeConfig,
    progress: Progress,
) -> None:
    generator = stage_generator(config.seed, "scan/dede/training")
    optimiser = torch.optim.Adam(
        decoder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    count, cells = len(images), config.cells**2
    n_visible = config.visible(config.train_hidden)
    weights = _weights(features, config.alike)
    for epoch in range(config.epochs):
        order = torch.randperm(count, generator=generator) if config.shuffle else torch.arange(count)
        for start in range(0, count, config.batch_size):
            rows = order[start : start + config.batch_size]
            visible = torch.rand(len(rows), cells, generator=generator).argsort(dim=1)[:, :n_visible]
            visible = visible.to(encoder.device)
            target = _to_cells(encoder.normalise(images[rows]), config.cells)
            with autocast(encoder.device, encoder.precision):
                drawn = decoder(target, features[rows].to(encoder.device), visible).float()
            errors = (drawn - target).square().mean(dim=2).scatter(1, visible, 0.0)
            losses = errors.sum(dim=1) / (cells - n_visible)
            share = weights[rows].to(encoder.device)
            optimiser.zero_grad()
            ((losses * share).sum() / share.sum()).backward()
            optimiser.step()
        if not bool(torch.isfinite(losses).all()):
            raise NoVerdictError(f"the decoder diverged in epoch {epoch + 1}: give a lower learning_rate")
        progress("train the decoder", epoch + 1, config.epochs)


def _weights(features: Tensor, alike: float) -> Tensor:
    """(N,) float32: 1 / n² of images that are alike with n - 1 others; all 1 where nothing counts as alike."""
    if alike >= 1:
        return torch.ones(len(features))
    units = F.normalize(features, dim=1)
    counts = torch.cat([(part @ units.T >= alike).sum(dim=1) for part in torch.split(units, 1024)])
    return 1 / counts.clamp_min(1).float().square()


def _cell_size(config: DedeConfig, encoder: Encoder) -> int:
    side = encoder.preprocessing.geometry.size
    if side % config.cells:
        raise ConfigError(f"cells={config.cells}: expected a divisor of the image's side, {side} pixels")
    return int(3 * (side // config.cells) ** 2)


def _to_cells(images: Tensor, per_side: int) -> Tensor:
    """(N, 3, S, S) to (N, per_side², 3 · (S / per_side)²), cells in row-major order."""
    count, channels, size, _ = images.shape
    cut = images.reshape(count, channels, per_side, size // per_side, per_side, size // per_side)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _to_images(cells: Tensor, per_side: int) -> Tensor:
    """The inverse of `_to_cells`."""
    side = round((cells.shape[2] / 3) ** 0.5)
    cut = cells.view(len(cells), per_side, per_side, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(len(cells), 3, per_side * side, per_side * side)
