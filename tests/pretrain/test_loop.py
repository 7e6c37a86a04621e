"""The training loop on pictures of 16 pixels: it learns, resumes bit for bit, and refuses what it must."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unpoison.data.views import ViewConfig
from unpoison.encoders.checkpoints import save_encoder
from unpoison.errors import ConfigError, NothingToScanError, NoVerdictError
from unpoison.pretrain import loop
from unpoison.pretrain.loop import METHODS, PretrainConfig, TrainedEncoder, pretrain
from unpoison.records import ImageSet

TINY = PretrainConfig(
    width=8, epochs=3, batch_size=16, queue_size=24, warmup_epochs=1.0, views=ViewConfig(crop=0.5)
)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """48 smooth pictures of 16 pixels."""
    coarse = torch.rand(48, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, 16, mode="bilinear", align_corners=False)
    pixels = (smooth * 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return ImageSet(tuple(f"{i:02}" for i in range(48)), pixels, fingerprint="pictures")


def train(
    images: ImageSet, config: PretrainConfig = TINY, seed: int = 0, **options: object
) -> TrainedEncoder:
    return pretrain(images, config, seed=seed, device="cpu", precision="fp32", **options)  # type: ignore[arg-type]


def weights(trained: TrainedEncoder) -> dict[str, torch.Tensor]:
    network = trained.encoder.network
    assert isinstance(network, torch.nn.Module)
    return network.state_dict()


def same(first: TrainedEncoder, second: TrainedEncoder) -> bool:
    a, b = weights(first), weights(second)
    return first.losses == second.losses and all(torch.equal(a[k], b[k]) for k in a)


class KilledError(Exception):
    """Stands for a kill."""


def kill_at(at: int) -> loop.Progress:
    def progress(stage: str, done: int, total: int) -> None:
        if done >= at:
            raise KilledError

    return progress


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_that_goes_on_equals_one_that_was_never_stopped(
    method: str, images: ImageSet, tmp_path: Path
) -> None:
    config = replace(TINY, method=method)
    whole = train(images, config)
    state = tmp_path / "sub" / "state.pt"
    with pytest.raises(KilledError):
        train(images, config, checkpoint=state, progress=kill_at(2 * 48 - 10))  # in the midst of epoch 2
    assert state.exists()
    seen: list[int] = []
    resumed = train(images, config, checkpoint=state, progress=lambda _s, done, _t: seen.append(done))
    assert same(whole, resumed)
    assert seen[0] == 48 + 16 and seen[-1] == 3 * 48  # epoch 1 was not trained again
    seen.clear()
    again = train(images, config, checkpoint=state, progress=lambda _s, done, _t: seen.append(done))
    assert same(whole, again) and not seen  # killed before the encoder was written: nothing is trained again
    save_encoder(again, tmp_path / "encoder.safetensors")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["encoder.safetensors"]


def test_the_same_seed_gives_the_same_encoder_and_another_one_another(images: ImageSet) -> None:
    state = torch.get_rng_state()
    first = train(images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert same(first, train(images))
    assert not same(first, train(images, seed=1))


def test_another_runs_state_is_refused(images: ImageSet, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    with pytest.raises(KilledError):
        train(images, checkpoint=state, progress=kill_at(60))
    kept = state.read_bytes()
    others = ImageSet(images.ids, images.pixels, fingerprint="others")
    for attempt in (
        lambda: train(images, replace(TINY, epochs=4), checkpoint=state),
        lambda: train(images, seed=1, checkpoint=state),
        lambda: train(others, checkpoint=state),
    ):
        with pytest.raises(ConfigError, match="belongs to a run with other settings or images; delete it"):
            attempt()
    assert state.read_bytes() == kept


@pytest.mark.parametrize(
    "content", [b"", b"no training state", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."]
)
def test_a_state_that_is_no_state_is_refused(images: ImageSet, tmp_path: Path, content: bytes) -> None:
    state = tmp_path / "state.pt"
    state.write_bytes(content)
    with pytest.raises(ConfigError, match="not a readable training state; delete it to start over"):
        train(images, checkpoint=state)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}])
def test_a_foreign_torch_file_is_refused_as_state(images: ImageSet, tmp_path: Path, content: object) -> None:
    state = tmp_path / "state.pt"
    torch.save(content, state)
    with pytest.raises(ConfigError, match="other settings or images; delete it"):
        train(images, checkpoint=state)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_goes_down_and_the_encoder_is_ready(method: str, images: ImageSet) -> None:
    rate = 3.0 if method == "simsiam" else {"sgd": 1.0, "adamw": 0.02}[METHODS[method].RECIPE.optimiser]
    trained = train(images, replace(TINY, method=method, epochs=10, learning_rate=rate))
    assert len(trained.losses) == 10
    assert trained.losses[-1] < trained.losses[1] - 0.1  # in MoCo's first epoch the queue is still noise
    features = {"resnet10": 64, "vit_tiny": 32}[METHODS[method].RECIPE.arch]
    encoder = trained.encoder
    assert encoder.images_shown == 0 and not any(p.requires_grad for p in encoder.network.parameters())
    assert encoder.features(images.pixels).shape == (48, features)
    assert encoder.preprocessing.geometry.size == 16 and not encoder.preprocessing.assumed
    expected = images.pixels.float().div(255).mean(dim=(0, 2, 3))
    torch.testing.assert_close(torch.tensor(encoder.preprocessing.mean), expected, atol=1e-5, rtol=0)
    assert (trained.seed, trained.fingerprint) == (0, "pictures")


def test_progress_counts_images_up_to_the_total(images: ImageSet) -> None:
    seen: list[tuple[str, int, int]] = []
    train(images, progress=lambda *at: seen.append(at))
    assert [done for _, done, _ in seen] == list(range(16, 145, 16))
    assert {(stage, total) for stage, _, total in seen} == {("pretrain moco-v2", 144)}


@pytest.mark.parametrize("method", METHODS)
def test_collapse_stops_the_run_in_its_epoch(
    method: str, images: ImageSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build = loop.build_backbone
    calls = 0

    def constant_later(_module: nn.Module, _inputs: object, features: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return features if calls < 12 else 0 * features + 1  # every image gives the same features

    def collapsing(architecture: loop.Architecture) -> nn.Module:
        network = build(architecture)
        network.register_forward_hook(constant_later)
        return network

    monkeypatch.setattr(loop, "build_backbone", collapsing)
    state = tmp_path / "state.pt"
    said = r"training collapsed in epoch \d+: features differ by .* directions; lower --learning-rate or train longer"
    with pytest.raises(NoVerdictError, match=said) as error:
        train(images, replace(TINY, method=method, epochs=20), checkpoint=state)
    assert "epoch 20" not in str(error.value) and "\n" not in str(error.value)


def test_a_loss_that_is_no_number_stops_the_run(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = loop.SimCLR.forward
    monkeypatch.setattr(loop.SimCLR, "forward", lambda self, a, b: forward(self, a, b) * float("nan"))
    with pytest.raises(NoVerdictError, match="the loss became nan in epoch 1; lower --learning-rate"):
        train(images, replace(TINY, method="simclr"))


def test_watching_for_collapse_changes_nothing(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = train(images)
    monkeypatch.setattr(loop, "_refuse_collapse", lambda *_: None)
    assert same(watched, train(images))


def test_a_second_kind_of_views_is_used(images: ImageSet) -> None:
    differing = replace(TINY, second_views=ViewConfig(crop=0.5, solarise_probability=1.0))
    assert not same(train(images), train(images, differing))
    assert same(train(images), train(images, replace(TINY, second_views=TINY.views)))


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.MIXES])
def test_training_with_i_cutmix_is_another_training_that_goes_on_too(
    method: str, images: ImageSet, tmp_path: Path
) -> None:
    config = replace(TINY, method=method, epochs=2, i_cutmix=True)
    whole = train(images, config)
    assert whole.config.i_cutmix and not same(whole, train(images, replace(config, i_cutmix=False)))
    state = tmp_path / "state.pt"
    with pytest.raises(KilledError):
        train(images, config, checkpoint=state, progress=kill_at(48 + 16))
    with pytest.raises(ConfigError, match="belongs to a run with other settings"):
        train(images, replace(config, i_cutmix=False), checkpoint=state)
    assert same(whole, train(images, config, checkpoint=state))


def test_patches_stay_as_they_were_drawn(images: ImageSet) -> None:
    short, long = (train(images, replace(TINY, method="moco-v3", epochs=n)) for n in (1, 3))
    a, b = weights(short), weights(long)
    fixed = {name for name in a if torch.equal(a[name], b[name])}
    assert fixed == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_too_few_images_are_refused(images: ImageSet) -> None:
    with pytest.raises(NothingToScanError, match="pre-training needs at least 2 images, got 1"):
        train(images.select([0]))


@pytest.mark.parametrize("n", [2, 5])
def test_fewer_images_than_a_batch_are_one_batch(n: int, images: ImageSet) -> None:
    trained = train(images.select(range(n)), replace(TINY, epochs=2))
    assert len(trained.losses) == 2


def test_the_rate_warms_up_and_falls_as_a_cosine() -> None:
    rates = [loop._rate(epoch, 10, 2.0) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert loop._rate(0.25, 1, 2.0) == 0.5  # half of a short run at most
    assert loop._rate(0.0, 3, 0.0) == 1.0


def test_what_is_not_given_comes_from_the_method() -> None:
    for method, kind in METHODS.items():
        assert PretrainConfig(method=method).recipe == kind.RECIPE
    given = PretrainConfig(method="moco-v3", arch="resnet18", learning_rate=0.5, head_out=64)
    assert given.recipe == replace(loop.MoCoV3.RECIPE, arch="resnet18", learning_rate=0.5, head_out=64)
    resolved = given.resolve()
    assert (resolved.optimiser, resolved.arch, resolved.temperature) == ("adamw", "resnet18", 0.2)
    assert resolved.second_views == given.views
    assert resolved.resolve() == resolved
    assert PretrainConfig(method="byol").resolve().temperature is None


def test_the_result_names_the_resolved_settings(images: ImageSet) -> None:
    config = train(images, replace(TINY, epochs=1)).config
    assert config == replace(TINY, epochs=1).resolve() and config.learning_rate == 0.3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"method": "dino"},
            "method 'dino': expected moco-v2 or simclr or moco-v3 or byol or simsiam or msf or rotation",
        ),
        ({"epochs": 0}, "epochs=0: expected at least 1"),
        ({"batch_size": 1}, "batch_size=1: expected at least 2"),
        ({"queue_size": 0}, "queue_size=0: expected at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: expected a positive number"),
        ({"temperature": 0.0}, "temperature=0.0: expected a positive number"),
        ({"key_momentum": 1.0}, r"key_momentum=1.0: expected a number in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum=-0.1: expected a number in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: expected a number of at least 0"),
        ({"warmup_epochs": float("nan")}, "warmup_epochs=nan: expected a number of at least 0"),
        ({"head_out": 1}, "head_out=1: expected at least 2"),
        ({"optimiser": "lars"}, "optimiser 'lars': expected sgd or adamw"),
        ({"method": "byol", "temperature": 0.2}, "temperature=0.2: byol has no such setting; leave it out"),
        ({"method": "simclr", "key_momentum": 0.9}, "key_momentum=0.9: simclr has no such setting; leave it"),
        (
            {"method": "rotation", "temperature": 0.2},
            "temperature=0.2: rotation has no such setting; leave it",
        ),
        (
            {"method": "msf", "i_cutmix": True},
            "i_cutmix: msf cannot mix images, expected one of moco-v2, simclr, moco-v3, byol; leave it out",
        ),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainConfig(**wrong)  # type: ignore[arg-type]


def test_a_single_step_trains(images: ImageSet) -> None:
    one = replace(TINY, epochs=1, batch_size=48)
    assert not same(train(images, one), train(images, replace(one, learning_rate=0.001)))


def test_a_state_of_images_of_another_side_is_refused(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(images, checkpoint=tmp_path / "state", progress=kill_at(60))
    smaller = ImageSet(images.ids, images.pixels[:, :, ::2, ::2].contiguous(), fingerprint=images.fingerprint)
    with pytest.raises(ConfigError, match="belongs to a run with other settings or images"):
        train(smaller, checkpoint=tmp_path / "state")
