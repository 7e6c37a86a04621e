"""Grad-CAM: where in a picture a scalar of the features comes from.

Paper: Selvaraju et al., "Grad-CAM", ICCV 2017. The releases of PatchSearch attach the scalar to a layer that a vision
transformer never runs through, and reshape its tokens to a fixed 14×14 grid; here the scalar is a function of the
features themselves, and the grid is the model's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.errors import ConfigError, ShapeError

__all__ = ["choose_layer", "grad_cam"]


def grad_cam(
    network: nn.Module, layer: nn.Module, images: Tensor, target: Callable[[Tensor], Tensor]
) -> Tensor:
    """Heat maps of what raises a scalar.

    The network may have its gradients switched off, and may be called inside `torch.no_grad` or
    `torch.inference_mode`: the graph begins at the layer's output, whose gradient is all that is needed.

    Args:
        network: in evaluation mode, from normalised images to (N, D) features; no parameter's gradient changes.
        layer: a module inside it whose output is a map (N, C, H, W) or tokens (N, T, C); (N, H, W, C) in networks
            that say so, timm's `output_fmt`.
        images: (N, 3, S, S) float, normalised, on the network's device; unchanged.
        target: from the (N, D) features to one scalar per image, (N,).

    Returns:
        (N, S, S) float32 in [0, 1] on the images' device: negative evidence dropped, each map scaled to its own
        range, then enlarged bilinearly. A map without any positive evidence is 0 everywhere.

    Raises:
        ShapeError: the layer does not run or its output is no map, or `target` does not give (N,) scalars that
            depend on the layer.

    Source:
        Grad-CAM, equations 1 and 2.
    """
    seen: list[Tensor] = []

    def begin_graph(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(f"Grad-CAM needs a layer that gives (N, C, H, W) or (N, T, C), got {got}")
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()  # later layers may work in place, which a leaf does not allow

    # Tensors made in inference mode can never carry a gradient, hence the copy.
    with torch.inference_mode(False), torch.enable_grad():
        handle = layer.register_forward_hook(begin_graph)
        try:
            features = network(images.clone())
        finally:
            handle.remove()
        if not seen:
            raise ShapeError("the layer did not run when the network did; pass a module of this network")
        scalars = target(features)
        if scalars.shape != (len(images),):
            raise ShapeError(
                f"target must give one scalar per image, ({len(images)},), got {tuple(scalars.shape)}"
            )
        if not scalars.requires_grad:
            raise ShapeError(
                "target does not depend on the layer; it must be a differentiable function of the features"
            )
        (gradient,) = torch.autograd.grad(scalars.float().sum(), seen[-1])
    activation, gradient = (_as_map(v.detach().float(), network, images.shape) for v in (seen[-1], gradient))
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    heat = (weights * activation).sum(dim=1).clamp_min(0)
    low, high = heat.amin(dim=(1, 2), keepdim=True), heat.amax(dim=(1, 2), keepdim=True)
    span = high - low
    heat = torch.where(span > 0, (heat - low) / span.clamp_min(torch.finfo(heat.dtype).tiny), 0)
    size = list(images.shape[2:])
    return F.interpolate(heat[:, None], size, mode="bilinear", align_corners=False)[:, 0].clamp(0, 1)


def _as_map(output: Tensor, network: nn.Module, images: torch.Size) -> Tensor:
    """Tokens as a map: prefix tokens dropped, the others on their grid; maps with channels first."""
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if _channels_last(network) else output
    n, tokens, channels = output.shape
    rows, columns = _token_grid(network, tokens, images)
    return output[:, tokens - rows * columns :].transpose(1, 2).reshape(n, channels, rows, columns)


def _token_grid(network: nn.Module, tokens: int, images: torch.Size) -> tuple[int, int]:
    """Rows and columns of the patch tokens; class and register tokens come before them."""
    transformer = next((m for m in network.modules() if hasattr(m, "patch_embed")), network)
    patch = getattr(getattr(transformer, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and len(patch) == 2:
        rows, columns = images[2] // patch[0], images[3] // patch[1]
        if tokens - rows * columns == getattr(transformer, "num_prefix_tokens", tokens - rows * columns) >= 0:
            return rows, columns
    prefix = getattr(transformer, "num_prefix_tokens", None)
    side = math.isqrt(tokens - prefix if isinstance(prefix, int) else tokens)
    if isinstance(prefix, int) and side * side != tokens - prefix:
        raise ShapeError(f"{tokens} tokens, {prefix} of them no patches: the others form no square grid")
    return side, side


def choose_layer(network: nn.Module, image_size: int, minimum_side: int = 8) -> nn.Module:
    """The deepest layer whose map is still fine enough to show a small trigger.

    Args:
        network: a vision transformer of timm or torchvision, bare or inside another module (then the norm before its
            last attention is taken: every patch token is visible there, and its output still decides the features), a
            ResNet, or any network with maps.
        image_size: S, side of the images in pixels.
        minimum_side: of the map, in cells, where the network has such a map at all; else its finest one is taken.

    Returns:
        A module of the network.

    Raises:
        ConfigError: no module of the network gives a map.
    """
    norm = _norm_before_last_attention(network)
    if norm is not None:
        return norm
    stages = [getattr(network, f"layer{i}", None) for i in range(1, 5)]
    resnet = all(isinstance(stage, nn.Module) for stage in stages)
    row = getattr(network, "layers", None)
    if _channels_last(network) and isinstance(row, nn.Module):
        # Of all its maps these alone are sure to be (N, H, W, C).
        candidates = list(row.children())
    elif resnet:
        candidates = [stage for stage in stages if isinstance(stage, nn.Module)]
    else:
        candidates = list(network.modules())[1:]
    maps = _map_sides(network, candidates, image_size)
    if not maps:
        raise ConfigError(
            "Grad-CAM finds no layer with a map (N, C, H, W) in this network; use --attention mask"
        )
    fine = [module for module, side in maps if side >= minimum_side]
    return fine[-1] if fine else max(maps, key=lambda pair: pair[1])[0]


def _norm_before_last_attention(network: nn.Module) -> nn.Module | None:
    """Of a vision transformer with one row of equal blocks; None for any other network."""
    for module in network.modules():
        if hasattr(module, "patch_embed"):
            blocks, name = getattr(module, "blocks", None), "norm1"  # timm
        elif hasattr(module, "conv_proj"):
            blocks, name = getattr(getattr(module, "encoder", None), "layers", None), "ln_1"  # torchvision
        else:
            continue
        norm = getattr(blocks[-1], name, None) if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
        if isinstance(norm, nn.Module):
            return norm
    return None


def _channels_last(network: nn.Module) -> bool:
    """Whether the network lays its maps out as (N, H, W, C), as timm's Swin transformers do."""
    return str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")


def _map_sides(
    network: nn.Module, candidates: list[nn.Module], image_size: int
) -> list[tuple[nn.Module, int]]:
    """Candidates that give a map of more than one cell, and its shorter side, in the order they finish."""
    sides: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            side = min(output.shape[1:3] if _channels_last(network) else output.shape[2:])
            if side > 1:
                sides.append((module, side))

    training = {module: module.training for module in network.modules()}
    weight = next(itertools.chain(network.parameters(), network.buffers()), torch.empty(0))
    handles = [module.register_forward_hook(note) for module in candidates]
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, image_size, image_size, device=weight.device))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return sides
