"""Device, precision and randomness."""

from __future__ import annotations

import pytest
import torch

import unpoison
from unpoison import runtime
from unpoison.errors import ConfigError
from unpoison.runtime import autocast, choose_device, choose_precision, seeded, silent, stage_generator


def test_a_stage_has_its_own_stream_that_depends_on_seed_and_stage_alone() -> None:
    draws = {
        (seed, stage): tuple(torch.rand(4, generator=stage_generator(seed, stage)).tolist())
        for seed in (0, 1)
        for stage in ("kmeans", "search")
    }
    assert len(set(draws.values())) == 4
    assert draws[0, "kmeans"] == tuple(torch.rand(4, generator=stage_generator(0, "kmeans")).tolist())
    assert (
        stage_generator(0, "kmeans").initial_seed() == 13283752878571812
    )  # a new number breaks every seeded result


def test_seeded_seeds_and_restores_the_global_generator() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with seeded(0, "initialisation"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(0, "initialisation"):
        assert torch.equal(torch.rand(3), first)
    with pytest.raises(KeyError), seeded(1, "initialisation"):
        assert not torch.equal(torch.rand(3), first)
        raise KeyError
    assert torch.initial_seed() == 7


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cuda:x", "cuda0", "mps", ""):
        with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:N"):
            choose_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="no usable GPU; use --device cpu"):
            choose_device(name)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_precision_follows_the_hardware(
    monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(runtime, "_cpu_multiplies_bf16", lambda: native)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == dtype
    assert choose_precision("fp32", cpu) == torch.float32
    assert choose_precision("bf16", cpu) == torch.bfloat16


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision 'fp16': expected auto, fp32 or bf16"):
        choose_precision("fp16", torch.device("cpu"))


def test_autocast_multiplies_in_the_precision_asked_for() -> None:
    matrix, cpu = torch.ones(2, 2), torch.device("cpu")
    with autocast(cpu, torch.float32):
        assert (matrix @ matrix).dtype == torch.float32
    with autocast(cpu, torch.bfloat16):
        assert (matrix @ matrix).dtype == torch.bfloat16


def test_the_silent_callback_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    silent("features", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_versions_need_no_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"torch": "2", "timm": "1", "numpy": "2"}
    monkeypatch.setattr("importlib.metadata.version", known.__getitem__)
    found = runtime.library_versions()
    assert found["unpoison"] == unpoison.__version__ and {name: found[name] for name in known} == known
