"""A clean encoder the plain way: train again, with the victim's own recipe, on the images that a scan kept.

An encoder that saw the poison keeps its backdoor, whatever happens to the images afterwards. Our encoder files say how
they were trained, so that the new one differs from the victim in what it was shown and in nothing else: method,
network, settings, image size and seed are the victim's. Mean and standard deviation are measured again, on the kept
images. With i-CutMix the new encoder is also trained in another way, which alone is a defence: then nothing need be
left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from unpoison.data.export import check_outside
from unpoison.data.load import load_images
from unpoison.data.sources import ImageSource, open_source
from unpoison.encoders.checkpoints import Training, read_training, save_encoder
from unpoison.errors import ConfigError
from unpoison.pretrain.loop import PretrainConfig, TrainedEncoder, pretrain
from unpoison.records import Geometry
from unpoison.repair.filtering import KeptList, open_scanned, read_kept_list
from unpoison.runtime import Progress, silent

__all__ = ["Retrained", "VictimRecipe", "read_recipe", "retrain", "training_state"]


@dataclass(frozen=True, kw_only=True)
class VictimRecipe:
    """How an encoder is trained.

    Attributes:
        config: method and settings.
        image_size: side of the images, pixels.
        seed: of every draw.
        of: name of the victim's file.
        weights: digest of it; empty when its recipe was not read from it.
        fingerprint: of the images that the victim was trained on; empty likewise.
    """

    config: PretrainConfig
    image_size: int
    seed: int
    of: str
    weights: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, eq=False)
class Retrained:
    """A new encoder, already written, and what it was not shown.

    Attributes:
        trained: the encoder and its training.
        kept: images that it was trained on.
        left_out: ids that were left out.
        skipped: images that could not be read now.
        same_images: whether the victim was trained on the very images that were scanned; None when nobody knows.
    """

    trained: TrainedEncoder
    kept: int
    left_out: tuple[str, ...] = field(repr=False)
    skipped: int
    same_images: bool | None


def read_recipe(encoder: str | Path) -> VictimRecipe:
    """The recipe that an encoder file of ours holds.

    Raises:
        ConfigError: no such file, or it is no file of ours and does not say how it was trained.
        CheckpointError: the file is damaged.
    """
    training: Training | None = read_training(encoder, PretrainConfig)
    if training is None:
        raise ConfigError(
            f"{encoder} does not say how it was trained, because unpoison did not train it on images alone: give "
            "--method, --arch and --image-size, and --epochs, --batch-size, --learning-rate and --width where they "
            "differ from the defaults"
        )
    return VictimRecipe(
        config=training.config,
        image_size=training.image_size,
        seed=training.seed,
        of=Path(encoder).name,
        weights=training.weights,
        fingerprint=training.fingerprint,
    )


def retrain(
    recipe: VictimRecipe,
    images: str | Path,
    out: Path,
    *,
    run: str | Path | None = None,
    only: tuple[str, ...] | None = None,
    i_cutmix: bool = False,
    root: str | Path | None = None,
    follow_links: bool = False,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    progress: Progress = silent,
) -> Retrained:
    """Train again without the flagged images, and write the new encoder.

    Args:
        recipe: the victim's, see `read_recipe`.
        images: what the victim was trained on; or what `clean` left of it, then without `run` and `only`.
        out: the .safetensors file to write. Its metadata say under `retrained` which file it replaces and which images
            it was not shown. The state of the training is kept beside it, so that the same call goes on after a kill.
        run: run folder of the scan of `images`; what its clean.txt names is kept.
        only: ids to keep, instead of `run`.
        i_cutmix: train with i-CutMix, whether or not the victim was; see `pretrain.i_cutmix`.
        root: see `data.sources.open_source`, as for `follow_links`.
        follow_links: whether links may leave the folder.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.
        workers: decoding threads.
        progress: told (stage, done, total).

    Raises:
        ConfigError: `out` lies among the images; nothing would be left out or changed, so that the new encoder would be
            the victim again; or the victim's method cannot mix images.
        DataError: the images are not those that were scanned.
        NoVerdictError: the training diverged or collapsed.
    """
    kept = read_kept_list(run) if run is not None else None
    config = replace(recipe.config, i_cutmix=True) if i_cutmix else recipe.config
    as_before = config == recipe.config
    source, left_out = _without_flagged(images, kept, only, root, follow_links, must_leave_out=as_before)
    check_outside(out, source)
    geometry = Geometry(recipe.image_size, recipe.image_size)
    pixels = load_images(source, geometry, workers=workers, progress=progress)
    if as_before and pixels.fingerprint == recipe.fingerprint:
        raise ConfigError(
            f"{recipe.of} was trained on exactly these {len(pixels)} images: say what to leave out with --run or "
            "--only, or name the folder that `unpoison clean` wrote"
        )
    trained = pretrain(
        pixels,
        config,
        seed=recipe.seed,
        device=device,
        precision=precision,
        checkpoint=training_state(out),
        progress=progress,
    )
    origin = {
        "from": recipe.of,
        "weights": recipe.weights,
        "fingerprint": recipe.fingerprint,
        "verdict": kept.verdict if kept else None,
        "n_kept": len(pixels),
        "left_out": list(left_out),
    }
    save_encoder(trained, out, retrained=origin)
    same = kept.fingerprint == recipe.fingerprint if kept and recipe.fingerprint else None
    return Retrained(trained, len(pixels), left_out, len(pixels.skipped), same)


def training_state(out: Path) -> Path:
    """The file that holds the state of a training which did not end yet."""
    return out.with_name(f".{out.name}.state")


def _without_flagged(
    images: str | Path,
    kept: KeptList | None,
    only: tuple[str, ...] | None,
    root: str | Path | None,
    follow_links: bool,
    *,
    must_leave_out: bool,
) -> tuple[ImageSource, tuple[str, ...]]:
    if kept is not None:
        source = open_scanned(images, kept, root=root, follow_links=follow_links)
        stay = {*kept.keep, *kept.skipped}
        left_out = tuple(id for id in kept.examined if id not in stay)
        if must_leave_out and not left_out:
            raise ConfigError(
                f"{kept.name} flagged nothing (verdict {kept.verdict}), so there is nothing to leave out: "
                "an encoder trained again would be the same"
            )
        return source.select(kept.keep), left_out
    source = open_source(images, root=root, follow_links=follow_links)
    if only is None:
        return source, ()
    chosen = set(only)
    return source.select(only), tuple(id for id in source.ids if id not in chosen)
