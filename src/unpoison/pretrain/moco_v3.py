"""MoCo v3: two views predict each other's keys among the keys of the batch; made for vision transformers.

There is no queue: the negatives are the other images of the batch. A transformer's patch projection stays as it was
drawn and its positions are fixed, because the gradients of that first layer are what makes training unstable.

Paper: Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.errors import ConfigError
from unpoison.pretrain.heads import normalised_head
from unpoison.pretrain.i_cutmix import UNMIXED, Mixtures
from unpoison.pretrain.moving_average import follow, follower, rising_momentum
from unpoison.pretrain.recipe import Recipe

__all__ = ["MoCoV3", "contrast", "fix_patches", "sine_cosine_positions"]


def contrast(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """2T times the cross entropy of finding one's own key among the keys of the batch.

    Args:
        query: (N, D) float, any length.
        key: likewise; row i of both shows the same image.
        temperature: T > 0.

    Returns:
        Scalar float32.

    Source:
        MoCo v3, equation 1 and algorithm 1.
    """
    query, key = (F.normalize(v.float(), dim=1) for v in (query, key))
    with torch.autocast(query.device.type, enabled=False):  # differences of logits drown in bfloat16
        logits = query @ key.T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def sine_cosine_positions(rows: int, columns: int, size: int) -> Tensor:
    """Fixed two-dimensional positions of patches.

    Args:
        rows: of the grid of patches.
        columns: likewise.
        size: D, a multiple of 4.

    Returns:
        (rows * columns, D) float32, row by row: sines and cosines of the column, then of the row, at D / 4
        wavelengths from 2π to 10 000 · 2π.

    Raises:
        ConfigError: D is no multiple of 4.

    Source:
        MoCo v3, section 4.1; Vaswani et al., 2017, in two dimensions.
    """
    if size % 4:
        raise ConfigError(
            f"fixed positions need a multiple of 4 features per patch, got {size}; choose another --arch"
        )
    frequency = 10_000.0 ** -(torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten().double()[:, None] * frequency for place in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


@torch.no_grad()
def fix_patches(backbone: nn.Module) -> None:
    """Draw a transformer's patch projection anew and freeze it, and give it fixed positions; in place.

    A network without patch embedding, such as a ResNet, is left as it is; so are positions that are no table, such as
    rotary ones. Draws from torch's global generator; wrap the call in `runtime.seeded`.

    Source:
        MoCo v3, section 4 and its release (uniform projection, as Glorot for the flattened patch).
    """
    embed = getattr(backbone, "patch_embed", None)
    projection = getattr(embed, "proj", None)
    if embed is None or not isinstance(projection, nn.Conv2d):
        return
    bound = math.sqrt(6 / (projection.weight[0].numel() + projection.out_channels))
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)
    positions = getattr(backbone, "pos_embed", None)
    rows, columns = embed.grid_size
    if isinstance(positions, nn.Parameter) and positions.shape[1] >= rows * columns:
        positions.zero_()  # those of the class token stay 0
        positions[0, -rows * columns :] = sine_cosine_positions(rows, columns, positions.shape[2])
        positions.requires_grad_(False)


class MoCoV3(nn.Module):
    """The trained module of MoCo v3; `backbone` (the query's) is what remains.

    Args:
        backbone: (N, 3, S, S) normalised images to (N, `feature_size`); see `fix_patches` for what becomes of it.
        feature_size: D of the backbone.
        recipe: T of the loss, momentum of the moving average that makes the key network, at the start (it rises to
            1), sizes of the projection head (three layers) and the prediction head (two).
    """

    RECIPE: ClassVar[Recipe] = Recipe(
        arch="vit_tiny",
        optimiser="adamw",
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_epochs=4.0,
        temperature=0.2,
        key_momentum=0.99,
    )
    MIXES: ClassVar[bool] = True

    def __init__(self, backbone: nn.Module, feature_size: int, recipe: Recipe) -> None:
        super().__init__()
        assert recipe.temperature is not None and recipe.key_momentum is not None, "its own recipe has both"
        fix_patches(backbone)
        hidden, out = recipe.head_hidden, recipe.head_out
        self.backbone = backbone
        self.projector = normalised_head((feature_size, hidden, hidden, out))
        self.predictor = normalised_head((out, hidden, out))
        self.key_backbone = follower(backbone)
        self.key_projector = follower(self.projector)
        self.temperature = recipe.temperature
        self.momentum = recipe.key_momentum

    def forward(self, first: Tensor, second: Tensor, mixtures: Mixtures = UNMIXED) -> Tensor:
        """The symmetric loss of a batch of two normalised views, (N, 3, S, S) each."""
        mixture_one, mixture_two = mixtures
        one, two = (
            self.predictor(self.projector(self.backbone(mixture.mix(view))))
            for view, mixture in ((first, mixture_one), (second, mixture_two))
        )
        with torch.no_grad():
            key_of_one, key_of_two = (self.key_projector(self.key_backbone(view)) for view in (first, second))
        return mixture_one.loss(
            lambda key: contrast(one, key, self.temperature), key_of_two
        ) + mixture_two.loss(lambda key: contrast(two, key, self.temperature), key_of_one)

    def after_step(self, done: float) -> None:
        """Move the key network towards the query network."""
        momentum = rising_momentum(self.momentum, done)
        follow(self.key_backbone, self.backbone, momentum)
        follow(self.key_projector, self.projector, momentum)
