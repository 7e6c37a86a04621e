"""CompRess's loss against loops, what the module does with it, and a distillation that goes on after a kill."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from unpoison.encoders.checkpoints import load_encoder, read_training, save_encoder
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import ConfigError, NothingToScanError, ShapeError
from unpoison.pretrain.loop import PretrainConfig
from unpoison.records import Geometry, ImageSet
from unpoison.repair.distillation import Compress, DistillConfig, distill, similarity_gap, trusted_part

CONFIG = DistillConfig(width=8, epochs=3, batch_size=16, queue_size=24, warmup_epochs=1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(n: int, width: int, seed: int) -> Tensor:
    return normalize(torch.randn(n, width, generator=generator(seed)), dim=1)


def naive_gap(t: Tensor, s: Tensor, t_queue: Tensor, s_queue: Tensor, temperature: float) -> float:
    total = 0.0
    for i in range(len(t)):
        p, q = (
            [math.exp(float(row[i] @ old) / temperature) for old in queue]
            for row, queue in ((t.double(), t_queue.double()), (s.double(), s_queue.double()))
        )
        total += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return total / len(t)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.04, 0.2, 1.0])
def test_the_loss_agrees_with_its_twin(n: int, temperature: float) -> None:
    tensors = unit(n, 5, 1), unit(n, 3, 2), unit(9, 5, 3), unit(9, 3, 4)
    expected = naive_gap(*tensors, temperature)
    assert float(similarity_gap(*tensors, temperature)) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the loss stays in float32
        assert float(similarity_gap(*tensors, temperature)) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_student_that_compares_alike_costs_nothing() -> None:
    features, queue = unit(4, 5, 1), unit(9, 5, 2)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator(3))).Q
    assert float(similarity_gap(features, features @ turn, queue, queue @ turn, 0.04)) == pytest.approx(
        0, abs=1e-5
    )
    assert float(similarity_gap(features, unit(4, 5, 4), queue, queue, 0.04)) > 1


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """48 smooth pictures of 16 pixels."""
    coarse = torch.rand(48, 3, 3, 3, generator=generator())
    smooth = torch.nn.functional.interpolate(coarse, 16, mode="bilinear", align_corners=False)
    pixels = (smooth * 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return ImageSet(tuple(f"{i:02}" for i in range(48)), pixels, fingerprint="pictures")


@pytest.fixture(scope="module")
def teacher() -> Encoder:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    preprocessing = Preprocessing(geometry=Geometry(16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))
    return Encoder(network, preprocessing, device="cpu", precision="fp32", name="toy", fingerprint="abc")


def module(teacher: Encoder, queues: int) -> Compress:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.BatchNorm1d(6))
    recipe = replace(Compress.RECIPE, key_momentum=0.75, queue_size=9)
    return Compress(backbone, 6, recipe, teacher=teacher, teacher_size=128, queues=queues)


def views() -> tuple[Tensor, Tensor]:
    first, second = (torch.randn(4, 3, 16, 16, generator=generator(s)) for s in (1, 2))
    return first, second


@torch.no_grad()
@pytest.mark.parametrize("queues", [1, 2])
def test_both_networks_see_the_first_view_and_the_second_fills_the_queues(
    teacher: Encoder, queues: int
) -> None:
    compress = module(teacher, queues).eval()
    first, second = views()
    theirs, wanted, newest = (
        compress.teacher_queue.rows.clone(),
        *(normalize(teacher.network(v), dim=1) for v in (first, second)),
    )
    if queues == 1:
        seen, own = normalize(compress.projector(compress.backbone(first)), dim=1), theirs
    else:
        for parameter in compress.key_backbone.parameters():  # so that key and student differ
            parameter.mul_(1.5)
        seen, own = normalize(compress.backbone(first), dim=1), compress.student_queue.rows.clone()
        key = normalize(compress.key_backbone(second), dim=1)
    expected = naive_gap(wanted, seen, theirs, own, 0.04)
    assert float(compress(first, second)) == pytest.approx(expected, rel=1e-4)
    compress.after_step(0.5)
    torch.testing.assert_close(compress.teacher_queue.rows, torch.cat((newest, theirs[4:])))
    if queues == 2:
        torch.testing.assert_close(compress.student_queue.rows, torch.cat((key, own[4:])))


@pytest.mark.parametrize("queues", [1, 2])
def test_the_student_alone_learns(teacher: Encoder, queues: int) -> None:
    compress = module(teacher, queues)
    compress.train()
    compress(*views()).backward()
    learning = {name.split(".")[0] for name, p in compress.named_parameters() if p.grad is not None}
    assert learning == ({"backbone", "projector"} if queues == 1 else {"backbone"})
    assert not any(name.startswith("teacher.") for name in compress.state_dict())
    network = teacher.network
    assert isinstance(network, nn.Module)
    assert not network.training and all(p.grad is None for p in network.parameters())


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("queues", [1, 2])
def test_a_killed_distillation_goes_on(
    teacher: Encoder, images: ImageSet, tmp_path: Path, queues: int
) -> None:
    run = partial(distill, teacher, images, replace(CONFIG, queues=queues), seed=0)
    whole, state = run(), tmp_path / "state.pt"

    def kill(stage: str, done: int, total: int) -> None:
        if done > 60:
            raise KilledError

    with pytest.raises(KilledError):
        run(checkpoint=state, progress=kill)
    stranger = Encoder(
        teacher.network, teacher.preprocessing, device="cpu", precision="fp32", fingerprint="x"
    )
    with pytest.raises(ConfigError, match="belongs to a run with other settings or images"):
        distill(stranger, images, replace(CONFIG, queues=queues), seed=0, checkpoint=state)
    resumed = run(checkpoint=state)
    assert resumed.losses == whole.losses
    torch.testing.assert_close(
        resumed.encoder.features(images.pixels), whole.encoder.features(images.pixels), rtol=0, atol=0
    )


def test_a_student_comes_to_compare_as_its_teacher_does(teacher: Encoder, images: ImageSet) -> None:
    student = distill(teacher, images, replace(CONFIG, queues=1, epochs=10, learning_rate=1.0), seed=0)
    assert student.losses[-1] < 0.7 * student.losses[1]
    assert student.encoder.preprocessing == teacher.preprocessing
    assert (student.config.method, student.seed, student.fingerprint) == ("compress", 0, "pictures")


def test_the_share_is_drawn_by_seed_and_id_alone(images: ImageSet) -> None:
    part = trusted_part(images, 0.25, seed=3)
    assert len(part) == 12 and list(part.ids) == sorted(part.ids)
    backwards = images.select(range(47, -1, -1))
    assert set(trusted_part(backwards, 0.25, seed=3).ids) == set(part.ids)
    assert set(trusted_part(images, 0.25, seed=4).ids) != set(part.ids)
    assert set(part.ids) < set(trusted_part(images, 0.5, seed=3).ids)
    assert (
        len(trusted_part(images, 1e-6, seed=0)) == 2 and trusted_part(images, 1.0, seed=0).ids == images.ids
    )


def test_the_file_names_the_teacher_and_is_no_recipe(
    teacher: Encoder, images: ImageSet, tmp_path: Path
) -> None:
    student = distill(teacher, images, replace(CONFIG, epochs=1), seed=0)
    path = tmp_path / "student.safetensors"
    save_encoder(student, path, distilled={"teacher": "toy", "weights": "abc"})
    loaded = load_encoder(path, device="cpu", precision="fp32")
    torch.testing.assert_close(
        loaded.features(images.pixels), student.encoder.features(images.pixels), rtol=0, atol=0
    )
    assert read_training(path, PretrainConfig) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"queues": 3}, "queues=3: expected 1 or 2"),
        ({"share": 0.0}, r"share=0.0: expected a share in \(0, 1\]"),
        ({"share": float("nan")}, "share=nan: expected a share"),
        ({"method": "byol"}, "method 'byol': expected compress"),
        ({"i_cutmix": True}, "i_cutmix: compress cannot mix images"),
        ({"epochs": 0}, "epochs=0: expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**wrong)  # type: ignore[arg-type]


def test_images_that_do_not_serve_are_refused(teacher: Encoder, images: ImageSet) -> None:
    large = ImageSet(("a", "b"), torch.zeros(2, 3, 32, 32, dtype=torch.uint8), fingerprint="large")
    with pytest.raises(ShapeError, match="images must have the teacher's 16 pixels a side, got 32"):
        distill(teacher, large, CONFIG, seed=0)
    with pytest.raises(NothingToScanError, match="needs at least 2 images, got 1"):
        distill(teacher, images.select([0]), CONFIG, seed=0)
