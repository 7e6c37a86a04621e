"""One table of all detectors, one set of promises."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from scipy.stats import binom
from torch import Tensor, nn

from toys import planted_encoder, planted_images, planted_pattern
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import CheckpointError, ConfigError, NoVerdictError, ShapeError
from unpoison.functional.global_triggers import apply_global
from unpoison.records import Geometry, ImageSet, Skipped
from unpoison.scan.backdoor_ids import BackdoorIdsConfig
from unpoison.scan.cross_encoder import CrossEncoderConfig
from unpoison.scan.dede import DedeConfig
from unpoison.scan.detector import (
    METHODS,
    Calibration,
    Detector,
    DetectorConfig,
    calibrate,
    detect,
    fit_detector,
    load_detector,
    restore_detector,
)
from unpoison.scan.spectral_dct import SpectralDctConfig

CONFIGS: dict[str, DetectorConfig] = {
    "backdoor-ids": BackdoorIdsConfig(steps=12, cells=8, least=2),
    "cross-encoder": CrossEncoderConfig(),
    "dede": DedeConfig(
        cells=4, width=24, heads=2, encoder_depth=1, decoder_depth=1, epochs=25, batch_size=64
    ),
    "spectral-dct": SpectralDctConfig(),
}
FPR = 0.05
every_method = pytest.mark.parametrize("method", sorted(METHODS))


def suspect() -> Encoder:
    return planted_encoder()


def second() -> Encoder:
    return planted_encoder(planted=False)


def encoders(method: str) -> dict[str, Encoder]:
    given = {} if method == "spectral-dct" else {"encoder": suspect()}
    return {**given, "other": second()} if method == "cross-encoder" else given


def clean(count: int, skip: int = 0) -> Tensor:
    """Images of the same eight kinds, other ones for another `skip`."""
    return planted_images(skip + count, 0, torch.Generator().manual_seed(1))[0].pixels[skip:]


def triggered(method: str, images: Tensor) -> Tensor:
    """The images with what the method is there to find: waves in the chroma, or the encoder's own trigger."""
    if method == "spectral-dct":
        return apply_global(images, "ctrl", 100.0, torch.zeros(3, 1, 1, dtype=torch.uint8))
    changed = images.clone()
    changed[:, :, 12:20, 12:20] = planted_pattern()
    return changed


def auxiliary(method: str, images: Tensor) -> Tensor:
    """The images, half of kind 0 poisoned for the method that must know where the trigger leads."""
    changed = images.clone()
    if method == "cross-encoder":
        changed[:96:8] = triggered(method, changed[:96:8])
    return changed


@pytest.fixture(scope="module")
def fitted() -> dict[str, Detector]:
    images = clean(300)
    return {
        method: fit_detector(
            method,
            auxiliary(method, images[:200]),
            **encoders(method),
            config=CONFIGS[method],
            calibration=images[200:],
            false_positive_rate=FPR,
        )
        for method in METHODS
    }


def test_the_table_holds_every_method() -> None:
    assert set(CONFIGS) == set(METHODS)


@every_method
def test_the_planted_trigger_scores_highest(fitted: dict[str, Detector], method: str) -> None:
    images = clean(64, skip=400)[torch.arange(64) % 8 != 0]  # kind 0 is where the trigger leads
    innocent, guilty = (fitted[method].score(x) for x in (images, triggered(method, images)))
    assert innocent.dtype == torch.float32 and innocent.shape == (56,) and innocent.device.type == "cpu"
    auroc = (guilty[:, None] > innocent).float().mean()
    assert auroc > 0.9
    flagged = fitted[method].flags(triggered(method, images)).float().mean()
    # The threshold of DeDe is that of the busiest kind of images, which costs it most of its power on these.
    assert flagged > (2 * FPR if method == "dede" else 0.5)


@every_method
def test_innocent_images_are_flagged_no_more_often_than_stated(
    fitted: dict[str, Detector], method: str
) -> None:
    n = 80
    flagged = int(fitted[method].flags(clean(n, skip=400)).sum())
    assert fitted[method].calibration.p_value(flagged, n) > 0.001


@every_method
def test_an_encoder_without_backdoor_makes_no_suspect(method: str) -> None:
    if method == "spectral-dct":
        pytest.skip("asks no encoder")
    if method == "dede":
        pytest.skip("its error also counts that a pasted square is hard to draw")
    images = clean(200)
    given = {name: second() for name in encoders(method)}
    detector = fit_detector(
        method,
        images[:100],
        **given,
        config=CONFIGS[method],
        calibration=images[100:],
        false_positive_rate=FPR,
    )
    assert detector.flags(triggered(method, clean(40, skip=400))).float().mean() < 0.5


@every_method
def test_a_score_depends_on_no_other_image_and_on_no_batch(fitted: dict[str, Detector], method: str) -> None:
    images = clean(40, skip=400)
    together = fitted[method].score(images)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fitted[method].score(images[order]), together[order], rtol=1e-3, atol=1e-5)
    assert torch.allclose(fitted[method].score(images, batch_size=7), together, rtol=1e-3, atol=1e-5)
    assert fitted[method].score(images[:0]).shape == (0,)


@every_method
def test_scoring_changes_nothing(fitted: dict[str, Detector], method: str) -> None:
    images = clean(8, skip=400)
    before, state = images.clone(), torch.random.get_rng_state()
    first = fitted[method].score(images)
    assert torch.equal(images, before) and torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(fitted[method].score(images), first)


@every_method
def test_threads_may_share_a_detector(fitted: dict[str, Detector], method: str) -> None:
    batches = [clean(6, skip=400 + 6 * i) for i in range(8)]
    alone = [fitted[method].score(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert all(
            torch.equal(a, b) for a, b in zip(pool.map(fitted[method].score, batches), alone, strict=True)
        )


@every_method
def test_the_same_seed_gives_the_same_detector(method: str) -> None:
    images = clean(100)
    state = torch.random.get_rng_state()
    quick = CONFIGS[method]
    if isinstance(quick, DedeConfig):
        quick = DedeConfig(cells=4, width=8, heads=1, encoder_depth=1, decoder_depth=1, epochs=1)
    pair = [
        fit_detector(method, images, **encoders(method), config=quick, false_positive_rate=FPR, seed=3)
        for _ in range(2)
    ]
    assert pair[0].calibration == pair[1].calibration
    assert torch.equal(torch.random.get_rng_state(), state)


@every_method
def test_a_saved_detector_gives_the_same_scores(
    fitted: dict[str, Detector], method: str, tmp_path: Path
) -> None:
    path = tmp_path / "detector.safetensors"
    fitted[method].save(path)
    again = load_detector(path, **encoders(method))
    images = clean(20, skip=400)
    assert torch.equal(again.score(images), fitted[method].score(images))
    assert again.calibration == fitted[method].calibration
    again.save(tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@every_method
def test_damaged_files_are_refused(fitted: dict[str, Detector], method: str, tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"
    fitted[method].save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)

    def refused(message: str, tensors: dict[str, Tensor] = tensors, **changed: object) -> None:
        described = {**metadata, **{name: json.dumps(value) for name, value in changed.items()}}
        safetensors.torch.save_file(tensors, path, described)
        with pytest.raises(CheckpointError, match=message):
            load_detector(path, **encoders(method))

    refused("schema 'other', expected 'unpoison/detector/2'", schema="other")
    refused("method 'guess', this version knows backdoor-ids", method="guess")
    refused(
        "settings and those of .* differ in 'unknown'",
        config={**json.loads(metadata["config"]), "unknown": 1},
    )
    refused("detector holds", {**tensors, "more": torch.zeros(2)})
    refused(
        "calibration.*false_positive_rate=0.9",
        calibration={**json.loads(metadata["calibration"]), "false_positive_rate": 0.9},
    )
    refused(
        "its threshold is inf", calibration={**json.loads(metadata["calibration"]), "threshold": float("inf")}
    )
    if tensors:
        name = sorted(tensors)[0]
        refused("holds NaN or infinite", {**tensors, name: tensors[name] * float("nan")})
        refused("detector holds", {k: v for k, v in tensors.items() if k != name})
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_detector(path, **encoders(method))


def test_a_function_without_a_name_has_no_detector_to_load(tmp_path: Path) -> None:
    def features(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :8]

    unnamed = Encoder(features, suspect().preprocessing, device="cpu", precision="fp32")
    path = tmp_path / "detector.safetensors"
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    fit_detector("backdoor-ids", images, unnamed, false_positive_rate=0.1).save(path)
    with pytest.raises(ConfigError, match="a function without a fingerprint"):
        load_detector(path, unnamed)


def test_a_detector_goes_with_its_encoder(fitted: dict[str, Detector], tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"
    fitted["backdoor-ids"].save(path)
    known = suspect()
    stranger = Encoder(
        known.network, known.preprocessing, device="cpu", precision="fp32", fingerprint="another"
    )
    with pytest.raises(ConfigError, match="made for another encoder"):
        load_detector(path, stranger)
    larger = Encoder(
        nn.Flatten(),
        Preprocessing(geometry=Geometry(64, 64)),
        device="cpu",
        precision="fp32",
        fingerprint="toy",
    )
    with pytest.raises(ConfigError, match="made for images of 32 pixels, but the encoder takes 64"):
        load_detector(path, larger)
    with pytest.raises(ConfigError, match="no such file"):
        load_detector(tmp_path / "nowhere.safetensors", suspect())
    with pytest.raises(ConfigError, match="end the name so"):
        fitted["backdoor-ids"].save(tmp_path / "detector.pt")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="the detector cannot be written"):
        fitted["backdoor-ids"].save(tmp_path / "file" / "detector.safetensors")


# ── the threshold ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("poisoned", [0.0, 0.01])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_the_stated_rate_holds_on_average(rate: float, poisoned: float) -> None:
    """Also when one in a hundred calibration images is poisoned and scores high."""
    generator = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(300):
        scores = torch.randn(400, generator=generator)
        scores[: int(poisoned * 400)] += 100
        threshold = calibrate(scores, rate).threshold
        rates.append(float((torch.randn(2000, generator=generator) > threshold).float().mean()))
    mean = sum(rates) / len(rates)
    assert mean <= rate * 1.05
    if not poisoned:
        assert mean >= rate * 0.8


def test_setting_poison_aside_restores_power_and_costs_what_it_says() -> None:
    scores = torch.arange(1.0, 1001.0)
    scores[-10:] += 1e6
    assert calibrate(scores, 0.01).threshold > 1e6  # no more than a hundredth may lie above: no poison either
    aside = calibrate(scores, 0.02, poison_share=0.01)
    assert aside.threshold == 972 and aside.n_trusted == 990
    assert aside.bound == pytest.approx(0.03 / 0.99)
    # If none was poisoned after all, 28 of 1000 lie above: within the bound.
    assert (torch.arange(1.0, 1001.0) > aside.threshold).float().mean() <= aside.bound


def test_p_values_are_those_of_few_calibration_images() -> None:
    """Twin: draw the calibration and the judged images again and again."""
    generator = torch.Generator().manual_seed(0)
    found = calibrate(torch.rand(40, generator=generator), 0.1)
    draws = torch.rand(20_000, 40, generator=generator).sort(dim=1).values[:, found.rank - 1]
    judged = torch.rand(20_000, 30, generator=generator)
    flagged = (judged > draws[:, None]).sum(dim=1)
    for count in (0, 3, 8, 12):
        assert found.p_value(count, 30) == pytest.approx(float((flagged >= count).float().mean()), abs=0.01)
    # Many calibration images: the plain binomial.
    many = Calibration(threshold=0.0, false_positive_rate=0.1, poison_share=0.0, n_images=10**6)
    assert many.p_value(6, 30) == pytest.approx(binom.sf(5, 30, 0.1), abs=1e-3)


def test_thresholds_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="98 calibration images: .* 0.01 needs at least 99"):
        calibrate(torch.rand(98), 0.01)
    assert calibrate(torch.arange(99.0), 0.01).threshold == 98
    with pytest.raises(ConfigError, match=r"false_positive_rate=0: expected a share in \(0, 0.5\]"):
        calibrate(torch.rand(9), 0)
    with pytest.raises(ConfigError, match=r"poison_share=0.5: expected a share in \[0, 0.5\)"):
        calibrate(torch.rand(9), 0.2, poison_share=0.5)
    with pytest.raises(NoVerdictError, match="1 of 2 scores are NaN or infinite"):
        calibrate(torch.tensor([1.0, float("nan")]), 0.5)


# ── a set of images ──────────────────────────────────────────────────────────────────────────────────────────────────


def as_set(pixels: Tensor) -> ImageSet:
    ids = tuple(f"{i:03d}" for i in range(len(pixels)))
    return ImageSet(ids, pixels, (Skipped("broken", "no image"),), "print")


def test_a_poisoned_set_is_called_so_and_an_innocent_one_is_not(fitted: dict[str, Detector]) -> None:
    detector = fitted["backdoor-ids"]
    innocent, mixed = clean(60, skip=400), clean(60, skip=400)
    mixed[:20] = triggered("backdoor-ids", mixed[:20])
    said = detect(as_set(mixed), suspect(), "backdoor-ids", detector=detector)
    assert said.verdict == "poisoned" and said.p_value is not None and said.p_value < 0.01
    table = said.findings
    assert len(table) == 61 and set(table["id"]) == {*as_set(mixed).ids, "broken"}
    assert table.loc[:19, "flagged"].mean() > 0.5 and table.loc[20:, "flagged"].mean() < 0.2
    last = table.iloc[-1]
    assert not last["scored"] and not last["flagged"] and last["skip_reason"] == "no image"
    assert table["poison_score"].isna().sum() == 1 and table["box_x"].isna().all()

    said = detect(as_set(innocent), suspect(), "backdoor-ids", detector=detector)
    assert said.verdict == "no_evidence" and not said.findings["flagged"].any()


def test_a_detector_made_on_the_images_themselves_gives_an_order_and_no_verdict() -> None:
    images = clean(80)
    images[:10] = triggered("backdoor-ids", images[:10])
    config = CONFIGS["backdoor-ids"]
    said = detect(
        as_set(images), suspect(), "backdoor-ids", config=config
    )  # 40 images could not calibrate 1 %
    assert said.verdict == "inconclusive" and "calibrated on these very images" in said.reason
    assert said.p_value is None and not said.findings["flagged"].any()
    first = set(said.findings["poison_score"].nlargest(10).index)
    assert len(first & set(range(10))) >= 8


def test_the_spectral_screen_needs_no_other_images() -> None:
    images = clean(200)
    images[:30] = triggered("spectral-dct", images[:30])
    said = detect(as_set(images), None, "spectral-dct")
    assert said.verdict == "poisoned" and said.p_value is not None and said.p_value < 1e-3
    assert said.findings.loc[:29, "flagged"].all() and said.findings.loc[30:, "flagged"].sum() <= 4
    innocent = detect(as_set(clean(200)), None, "spectral-dct")
    assert innocent.verdict == "no_evidence" and not innocent.findings["flagged"].any()


def test_auxiliary_images_fit_and_calibrate(fitted: dict[str, Detector]) -> None:
    images, auxiliary_images = clean(60, skip=400), clean(300)
    images[:20] = triggered("spectral-dct", images[:20])
    said = detect(as_set(images), None, "spectral-dct", auxiliary=auxiliary_images)
    assert said.verdict == "poisoned" and said.findings.loc[:19, "flagged"].all()
    assert "20 of 60 images score above the threshold" in said.rule and "150 of the calibration" in said.rule


@every_method
def test_a_detector_comes_back_from_the_cache_of_a_run(fitted: dict[str, Detector], method: str) -> None:
    detector = fitted[method]
    given = encoders(method)
    again = restore_detector(
        detector.scorer.config,
        detector.to_tensors(),
        given.get("encoder"),
        other=given.get("other"),
        false_positive_rate=FPR,
    )
    images = clean(10, skip=400)
    assert again.calibration == detector.calibration and again.size == detector.size
    assert torch.equal(again.score(images), detector.score(images))
    assert again.fingerprint() == detector.fingerprint()


@every_method
def test_findings_stay_with_their_ids_and_depend_on_no_batch(
    fitted: dict[str, Detector], method: str
) -> None:
    """One image at a time, in any order: the same score, flag and verdict for each id."""
    images = clean(24, skip=400)
    images[::3] = triggered(method, images[::3])
    given = {"detector": fitted[method], "other": encoders(method).get("other"), "alpha": 0.05}
    whole = detect(as_set(images), encoders(method).get("encoder"), method, **given)  # type: ignore[arg-type]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = detect(
        dataclasses.replace(as_set(images).select(order), skipped=as_set(images).skipped),
        encoders(method).get("encoder"),
        method,
        batch_size=1,
        **given,  # type: ignore[arg-type]
    )
    assert mixed.verdict == whole.verdict and mixed.p_value == whole.p_value
    one, other = (said.findings.set_index("id").sort_index() for said in (whole, mixed))
    assert (one["flagged"] == other["flagged"]).all()
    assert torch.allclose(
        *(torch.tensor(t["poison_score"].to_numpy()) for t in (one, other)), 1e-3, 1e-5, True
    )  # type: ignore[arg-type]


def test_complaints(fitted: dict[str, Detector]) -> None:
    images = clean(60)
    with pytest.raises(ConfigError, match="method 'guess': expected one of backdoor-ids"):
        fit_detector("guess", images)
    with pytest.raises(ConfigError, match="spectral-dct takes no encoder: leave it out"):
        fit_detector("spectral-dct", images, suspect())
    with pytest.raises(ConfigError, match="dede takes the encoder that it judges: give one"):
        fit_detector("dede", images)
    with pytest.raises(ConfigError, match="cross-encoder takes a second encoder: give one"):
        fit_detector("cross-encoder", images, suspect())
    with pytest.raises(ConfigError, match="dede takes no second encoder: leave it out"):
        fit_detector("dede", images, suspect(), other=second())
    with pytest.raises(ConfigError, match="dede takes a DedeConfig, got a SpectralDctConfig"):
        fit_detector("dede", images, suspect(), config=SpectralDctConfig())
    with pytest.raises(ShapeError, match=r"images must be \(N, 3, 32, 32\) uint8, got"):
        fit_detector("dede", images.float(), suspect())
    with pytest.raises(ShapeError, match=r"images must be \(N, 3, 32, 32\) uint8, got \(1, 3, 9, 9\)"):
        fitted["dede"].score(torch.zeros(1, 3, 9, 9, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="batch_size=0: expected at least 1"):
        fitted["dede"].score(images, batch_size=0)
    with pytest.raises(ConfigError, match="but the detector is one of dede: leave one of them out"):
        detect(as_set(images), suspect(), "backdoor-ids", detector=fitted["dede"])
    with pytest.raises(ConfigError, match=r"alpha=0.7: expected a rate in \(0, 0.5\)"):
        detect(as_set(images), suspect(), "dede", alpha=0.7)
