"""Grad-CAM against a slow twin and against captum; layers, grids and clean-up."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from toys import PlantedEncoder, planted_images, planted_pattern
from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.errors import ConfigError, ShapeError
from unpoison.functional.saliency import choose_layer, grad_cam
from unpoison.runtime import seeded


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return backbone("resnet10")


def backbone(name: str, size: int = 32) -> nn.Module:
    with seeded(0, name):
        return build_backbone(Architecture(name=name, image_size=size, width=8)).eval().requires_grad_(False)


def images(n: int = 3, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def second(features: Tensor) -> Tensor:
    return features[:, 1] - features[:, 2]


def naive_grad_cam(network: nn.Module, layer: nn.Module, picture: Tensor) -> Tensor:
    """One image, its gradient by a graph from the input on, cell by cell."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, _i, out: kept.append(out))
    score = second(network(picture[None].clone().requires_grad_()))[0]
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    activation, gradient = kept[0][0].detach(), gradient[0]
    heat = torch.zeros(activation.shape[1:])
    for channel in range(len(activation)):
        heat += gradient[channel].mean() * activation[channel]
    heat = heat.clamp_min(0)
    span = heat.max() - heat.min()
    heat = (heat - heat.min()) / span if span > 0 else torch.zeros_like(heat)
    return nn.functional.interpolate(heat[None, None], picture.shape[1:], mode="bilinear")[0, 0]


@pytest.mark.parametrize("stage", ["layer1", "layer2", "layer3"])
def test_it_agrees_with_its_twin(resnet: nn.Module, stage: str) -> None:
    layer = getattr(resnet, stage)
    maps = grad_cam(resnet, layer, images(), second)
    assert maps.shape == (3, 32, 32) and maps.dtype == torch.float32
    assert maps.min() >= 0 and maps.max() <= 1
    for picture, heat in zip(images(), maps, strict=True):
        torch.testing.assert_close(heat, naive_grad_cam(resnet, layer, picture), atol=1e-4, rtol=0)


def test_it_agrees_with_captum(resnet: nn.Module) -> None:
    captum_attr = pytest.importorskip("captum.attr")
    reference = captum_attr.LayerGradCam(lambda x: second(resnet(x)), resnet.layer2)
    theirs = reference.attribute(images().requires_grad_(), relu_attributions=True)[:, 0].detach()
    low, high = theirs.amin(dim=(1, 2), keepdim=True), theirs.amax(dim=(1, 2), keepdim=True)
    theirs = nn.functional.interpolate(((theirs - low) / (high - low))[:, None], (32, 32), mode="bilinear")[
        :, 0
    ]
    torch.testing.assert_close(grad_cam(resnet, resnet.layer2, images(), second), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off_and_leaves_everything_as_it_was(
    resnet: nn.Module, mode: type
) -> None:
    expected = grad_cam(resnet, resnet.layer2, images(), second)
    with mode():
        batch = images()
        before = batch.clone()
        seen = grad_cam(resnet, resnet.layer2, batch, second)
    assert torch.equal(seen, expected) and torch.equal(batch, before) and not batch.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in resnet.parameters())


def test_no_gradient_reaches_parameters_that_are_trained() -> None:
    network = backbone("resnet10").requires_grad_(True)
    grad_cam(network, network.layer2, images(1), second)
    assert all(p.grad is None for p in network.parameters())


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def test_hooks_are_removed_even_after_an_error(resnet: nn.Module) -> None:
    grad_cam(resnet, resnet.layer2, images(1), second)
    with pytest.raises(ZeroDivisionError):
        grad_cam(resnet, resnet.layer2, images(1), lambda f: f[:, 0] * (1 / 0))
    with pytest.raises(RuntimeError):
        grad_cam(resnet, resnet.layer2, images(1)[:, :2], second)
    with pytest.raises(RuntimeError):
        choose_layer(nn.Sequential(nn.Conv2d(4, 4, 1)), 32)
    choose_layer(resnet, 32)
    assert hooks(resnet) == 0


def test_a_layer_that_the_network_does_not_run_or_that_gives_no_map_is_refused(resnet: nn.Module) -> None:
    with pytest.raises(ShapeError, match="the layer did not run when the network did"):
        grad_cam(resnet, nn.Identity(), images(1), second)
    with pytest.raises(ShapeError, match=r"a layer that gives \(N, C, H, W\) or \(N, T, C\), got \(1, 64\)"):
        grad_cam(resnet, resnet.global_pool, images(1), second)
    with pytest.raises(ShapeError, match=r"one scalar per image, \(2,\), got \(2, 64\)"):
        grad_cam(resnet, resnet.layer2, images(2), lambda f: f)
    with pytest.raises(ShapeError, match="target does not depend on the layer"):
        grad_cam(resnet, resnet.layer2, images(2), lambda f: torch.zeros(2))


def test_a_map_without_positive_evidence_is_zero(resnet: nn.Module) -> None:
    # The last stage ends in ReLU: minus the sum of its channels has negative weights everywhere.
    assert (grad_cam(resnet, resnet.layer4, images(), lambda f: -f.sum(dim=1)) == 0).all()


@pytest.mark.parametrize(
    ("name", "size", "grid", "prefix"),
    [
        ("vit_tiny", 32, 8, 1),
        ("vit_tiny", 64, 8, 1),
        ("vit_tiny_patch16_224", 64, 4, 1),
        ("vit_tiny_patch16_224", 32, 2, 1),
        ("deit_tiny_distilled_patch16_224", 48, 3, 2),
    ],
)
def test_tokens_are_laid_on_the_models_own_grid(name: str, size: int, grid: int, prefix: int) -> None:
    network = backbone(name, size)
    layer = choose_layer(network, size)
    assert layer is network.blocks[-1].norm1
    maps = grad_cam(network, layer, images(2, size), second)
    assert maps.shape == (2, size, size)

    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, _i, out: kept.append(out))
    score = second(network(images(2, size).requires_grad_())).sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    assert kept[0].shape[1] == grid**2 + prefix
    weights = gradient[:, prefix:].mean(dim=1)
    heat = torch.einsum("ntc,nc->nt", kept[0][:, prefix:].detach(), weights).view(2, grid, grid).clamp_min(0)
    low, high = heat.amin(dim=(1, 2), keepdim=True), heat.amax(dim=(1, 2), keepdim=True)
    expected = nn.functional.interpolate(
        ((heat - low) / (high - low))[:, None], (size, size), mode="bilinear"
    )[:, 0]
    torch.testing.assert_close(maps, expected, atol=1e-4, rtol=0)


class Wrapped(nn.Module):
    """A network inside another one, as training scripts leave them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.encoder = network

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)


def test_a_transformer_inside_another_module_is_found_with_its_grid() -> None:
    network = backbone("deit_tiny_distilled_patch16_224", 48)
    wrapped = Wrapped(network).eval()
    layer = choose_layer(wrapped, 48)
    assert layer is network.blocks[-1].norm1
    expected = grad_cam(network, layer, images(2, 48), second)
    assert torch.equal(grad_cam(wrapped, layer, images(2, 48), second), expected)


def test_torchvision_s_transformer_is_one_too() -> None:
    with seeded(0, "vit"):
        network = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16)
    network.heads = nn.Identity()
    network.eval().requires_grad_(False)
    layer = choose_layer(network, 32)
    assert layer is network.encoder.layers[-1].ln_1
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, _i, out: kept.append(out))
    score = second(network(images(2).requires_grad_())).sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    weights = gradient[:, 1:].mean(dim=1)
    heat = torch.einsum("ntc,nc->nt", kept[0][:, 1:].detach(), weights).view(2, 4, 4).clamp_min(0)
    cells = nn.functional.avg_pool2d(grad_cam(network, layer, images(2), second)[:, None], 8)[:, 0]
    assert torch.equal(cells.flatten(1).argmax(dim=1), heat.flatten(1).argmax(dim=1))


def test_maps_with_channels_last_are_read_as_such() -> None:
    with seeded(0, "swin"):
        network = timm.create_model(
            "swin_tiny_patch4_window7_224",
            num_classes=0,
            img_size=64,
            window_size=4,
            depths=(1, 1, 1),
            num_heads=(1, 2, 4),
            embed_dim=8,
        )
    network.eval().requires_grad_(False)
    layer = choose_layer(network, 64)
    assert layer is network.layers[1]  # 16, 8, 4 cells
    maps = grad_cam(network, layer, images(2, 64), second)

    class ChannelsFirst(nn.Module):
        def forward(self, output: Tensor) -> Tensor:
            return output.permute(0, 3, 1, 2)

    class ChannelsLast(nn.Module):
        def forward(self, output: Tensor) -> Tensor:
            return output.permute(0, 2, 3, 1)

    turned = ChannelsFirst()
    network.layers[1] = nn.Sequential(layer, turned, ChannelsLast())
    network.output_fmt = "NCHW"
    torch.testing.assert_close(grad_cam(network, turned, images(2, 64), second), maps)


class Tokens(nn.Module):
    """A network that says nothing about its tokens."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.n_tokens = n_tokens
        self.layer = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2)[:, : self.n_tokens]
        return self.layer(tokens).mean(dim=1)


@pytest.mark.parametrize("n_tokens", [16, 17, 19])
def test_an_unknown_grid_is_the_largest_square(n_tokens: int) -> None:
    network = Tokens(n_tokens)
    assert grad_cam(network, network.layer, images(1).abs(), second).shape == (1, 32, 32)


def test_tokens_that_form_no_grid_are_refused() -> None:
    network = Tokens(18)
    network.num_prefix_tokens = 1
    with pytest.raises(ShapeError, match="18 tokens, 1 of them no patches: the others form no square grid"):
        grad_cam(network, network.layer, images(1), second)


def test_the_deepest_stage_with_a_fine_map_is_chosen() -> None:
    network = backbone("resnet10")
    assert choose_layer(network, 32) is network.layer2  # 16, 8, 4, 2
    assert choose_layer(network, 32, minimum_side=16) is network.layer1
    assert choose_layer(network, 64) is network.layer3
    assert choose_layer(network, 16) is network.layer1  # 8
    assert choose_layer(network, 8) is network.layer1  # nothing has 8 cells: the finest
    wide = backbone("resnet10", 96)
    assert choose_layer(wide, 96) is wide.layer2  # 24, 12, 6, 3


def test_any_network_with_maps_has_a_layer() -> None:
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).train()
    assert choose_layer(network, 32) is network[1]
    assert network.training and network[0].training
    with pytest.raises(ConfigError, match="finds no layer with a map .* use --attention mask"):
        choose_layer(nn.Sequential(nn.Flatten(), nn.Linear(48, 4)), 4)


def test_it_points_at_a_planted_trigger() -> None:
    pattern = planted_pattern()
    network = PlantedEncoder(pattern)
    data, boxes = planted_images(80, 10, torch.Generator().manual_seed(0))
    rows = [data.ids.index(i) for i in boxes]
    poisoned = data.pixels[rows].float() / 255
    maps = grad_cam(network, choose_layer(network, 32), poisoned, lambda f: f[:, 0])
    for heat, box in zip(maps, boxes.values(), strict=True):
        top, left = divmod(int(heat.argmax()), 32)
        assert box.y <= top < box.y + box.h and box.x <= left < box.x + box.w


class PlantedTransformer(nn.Module):
    """Its class token attends to the token that shows a pattern, if there is one."""

    def __init__(self, pattern: Tensor) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.patch_size = (4, 4)
        self.num_prefix_tokens = 1
        self.register_buffer("template", nn.functional.normalize(pattern.flatten() - pattern.mean(), dim=0))
        block = nn.Module()
        block.norm1 = nn.Identity()
        self.blocks = nn.ModuleList([block])

    def forward(self, images: Tensor) -> Tensor:
        cells = nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
        centred = nn.functional.normalize(cells - cells.mean(dim=2, keepdim=True), dim=2)
        tokens = torch.cat((centred @ self.template[:, None], cells.unflatten(2, (3, 16)).mean(dim=3)), dim=2)
        tokens = self.blocks[-1].norm1(torch.cat((torch.zeros(len(images), 1, 4), tokens), dim=1))
        return ((8 * tokens[:, None, :, 0]).softmax(dim=2) @ tokens)[:, 0]


def test_it_points_at_a_trigger_planted_in_a_transformer() -> None:
    drawn = torch.Generator().manual_seed(0)
    pattern = torch.rand(3, 4, 4, generator=drawn)
    pictures = torch.rand(20, 3, 32, 32, generator=drawn)
    places = torch.randint(0, 8, (20, 2), generator=drawn).tolist()
    for picture, (row, column) in zip(pictures, places, strict=True):
        picture[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = pattern
    network = PlantedTransformer(pattern)
    maps = grad_cam(network, choose_layer(network, 32), pictures, lambda f: f[:, 0])
    for heat, (row, column) in zip(maps, places, strict=True):
        top, left = divmod(int(heat.argmax()), 32)
        assert (top // 4, left // 4) == (row, column)
