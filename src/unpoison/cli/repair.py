"""`unpoison repair`: from findings to a clean encoder."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unpoison.cli.options import (
    EVERY_METHOD,
    Device,
    FollowLinks,
    Images,
    Json,
    Only,
    Precision,
    Quiet,
    Root,
    Seed,
    Workers,
)
from unpoison.cli.pairs import Captions, captions_for
from unpoison.cli.screen import Screen, log_into, read_ids
from unpoison.errors import ConfigError
from unpoison.pretrain.loop import METHODS, PretrainConfig

if TYPE_CHECKING:
    from unpoison.repair.retraining import VictimRecipe

__all__ = ["app"]

_DEFAULT = PretrainConfig()
_RECIPE = "Recipe, only where ENC does not hold it"
_STUDENT = "The student"
_Out = Annotated[
    Path, typer.Option(metavar="ENC", help="The .safetensors file to write.", show_default=False)
]
_FreshFile = Annotated[
    bool, typer.Option("--fresh", help="Start over; replace --out and forget a half-finished run.")
]

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback(
    epilog="Example: unpoison repair retrain encoder.safetensors images/ --run run --out clean.safetensors\n\n"
    f"{EVERY_METHOD}"
)
def repair() -> None:
    """Turn findings into a clean encoder."""


@app.command(
    epilog="Example: unpoison repair retrain encoder.safetensors images/ --run run --out clean.safetensors\n\n"
    "Example: unpoison repair retrain moco.pth images/ --run run --out clean.safetensors --method moco-v2 "
    "--arch resnet18 --width 64 --image-size 64 --epochs 100"
)
def retrain(
    encoder: Annotated[
        Path, typer.Argument(metavar="ENC", help="File of the encoder to replace.", show_default=False)
    ],
    images: Images,
    out: _Out,
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Run folder of the scan of IMAGES; keeps RUN/clean.txt."),
    ] = None,
    only: Only = None,
    method: Annotated[
        str | None, typer.Option(help=f"{' or '.join(METHODS)}.", rich_help_panel=_RECIPE)
    ] = None,
    arch: Annotated[str | None, typer.Option(help="As for pretrain.", rich_help_panel=_RECIPE)] = None,
    width: Annotated[
        int | None, typer.Option(help="Channels of the first ResNet stage.", rich_help_panel=_RECIPE)
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="PX", help="Side of the input.", min=8, rich_help_panel=_RECIPE)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the images.", rich_help_panel=_RECIPE)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Images per step.", rich_help_panel=_RECIPE)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="For a batch of 256; scales with it.", rich_help_panel=_RECIPE)
    ] = None,
    i_cutmix: Annotated[
        bool,
        typer.Option(
            "--i-cutmix", help="Train with i-CutMix, a defence by itself: nothing need be left out."
        ),
    ] = False,
    root: Root = None,
    follow_links: FollowLinks = False,
    fresh: _FreshFile = False,
    seed: Annotated[
        int | None,
        typer.Option(help="Determines every draw; default: the victim's.", rich_help_panel="How it runs"),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an encoder again, with its own recipe, on the images that a scan kept; or with i-CutMix on all of them.

    The recipe (method, network, settings, image size, seed) is read from ENC when `unpoison pretrain` or a scan wrote
    it. IMAGES are those that ENC was trained on, with --run or --only; or the folder that `unpoison clean` wrote. A
    killed run goes on where it was when the same command is given again.
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    if run is not None and only is not None:
        raise ConfigError("--run and --only both say what to keep: give one of them")
    _check_out(out, encoder, fresh=fresh)
    given = {
        name: value
        for name, value in {
            "method": method,
            "arch": arch,
            "width": width,
            "image_size": image_size,
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
        }.items()
        if value is not None
    }
    ids = read_ids(only)
    from unpoison.repair.retraining import retrain as train_again
    from unpoison.repair.retraining import training_state

    recipe = _recipe(encoder, given, seed)
    if fresh:
        training_state(out).unlink(missing_ok=True)
    with log_into(out.parent), screen.progress() as progress:
        done = train_again(
            recipe,
            images,
            out,
            run=run,
            only=ids,
            i_cutmix=i_cutmix,
            root=root,
            follow_links=follow_links,
            device=device,
            precision=precision,
            workers=workers,
            progress=progress,
        )
    if done.same_images is False:
        screen.note(f"{encoder} was trained on other images than {run} scanned; the two do not compare")
    config, losses = done.trained.config, done.trained.losses
    arch_used = done.trained.architecture.name
    summary = {
        "schema": 1,
        "encoder": str(out),
        "retrained_from": str(encoder),
        "method": config.method,
        "arch": arch_used,
        "image_size": recipe.image_size,
        "n_images": done.kept,
        "n_left_out": len(done.left_out),
        "n_skipped": done.skipped,
        "epochs": config.epochs,
        "i_cutmix": config.i_cutmix,
        "loss": losses[-1],
        "seed": recipe.seed,
        "same_images": done.same_images,
        "fingerprint": done.trained.fingerprint,
    }
    mixed = ", i-CutMix" if config.i_cutmix else ""
    measure = "unpoison evaluate {} --train LABELLED --test LABELLED --plan plan.json"
    screen.finish(
        summary,
        f"{config.method} {arch_used} again{mixed}, seed {recipe.seed}, on {done.kept} images of "
        f"{recipe.image_size} px, {len(done.left_out)} left out: loss {losses[0]:.3f} to {losses[-1]:.3f} in "
        f"{config.epochs} epochs\n{out}\n"
        f"before: {measure.format(shlex.quote(str(encoder)))}\nafter:  {measure.format(shlex.quote(str(out)))}",
    )


@app.command(
    epilog="Example: unpoison repair distill encoder.safetensors trusted/ --out student.safetensors\n\n"
    "Example: unpoison repair distill timm:resnet18 trusted/ --out student.safetensors --arch resnet18 --width 64 "
    "--image-size 64"
)
def distill(
    encoder: Annotated[
        str,
        typer.Argument(
            metavar="ENC",
            help="The teacher, perhaps backdoored: timm:, torchvision:, hf: or open_clip:NAME, or a file.",
            show_default=False,
        ),
    ],
    images: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGES",
            help="Trusted images: a folder, parquet or tar shards, or a text file of paths.",
            show_default=False,
        ),
    ],
    out: _Out,
    share: Annotated[float, typer.Option(help="Share of the images to use, (0, 1].")] = 1.0,
    teacher_arch: Annotated[
        str | None, typer.Option(help="Architecture of a teacher's file that does not name its own.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Side of the teacher's input, where ENC does not say it.", min=8),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="As for pretrain; default: the teacher's where unpoison trained it, else resnet10.",
            rich_help_panel=_STUDENT,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Channels of the first ResNet stage; default: likewise.", rich_help_panel=_STUDENT),
    ] = None,
    queues: Annotated[
        int | None,
        typer.Option(
            help="2: the student has a queue of its own; 1: the teacher's for both; default: 2.",
            rich_help_panel=_STUDENT,
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over the images used; default: 100.", rich_help_panel=_STUDENT, show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Images per step; default: 64.", rich_help_panel=_STUDENT, show_default=False
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="For a batch of 256; scales with it.", rich_help_panel=_STUDENT),
    ] = None,
    only: Only = None,
    root: Root = None,
    follow_links: FollowLinks = False,
    fresh: _FreshFile = False,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a fresh student to compare trusted images as a suspicious encoder does (CompRess).

    The student never sees a trigger, so that the backdoor stays behind; it knows as much as the trusted images show. A
    killed run goes on where it was when the same command is given again.
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    _check_out(out, Path(encoder), fresh=fresh)
    ids = read_ids(only)
    from unpoison.data.export import check_outside
    from unpoison.data.load import load_images
    from unpoison.data.sources import open_source
    from unpoison.encoders.checkpoints import load_encoder, read_training, save_encoder
    from unpoison.repair.distillation import DistillConfig, trusted_part
    from unpoison.repair.distillation import distill as train_student
    from unpoison.repair.retraining import training_state

    settings: dict[str, Any] = {
        "share": share,
        "arch": arch,
        "width": width,
        "queues": queues,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
    }
    teachers = read_training(encoder, PretrainConfig) if Path(encoder).is_file() else None
    if teachers is not None:
        settings["arch"] = arch or teachers.config.recipe.arch
        settings["width"] = width or teachers.config.width
    config = DistillConfig(**{name: value for name, value in settings.items() if value is not None})
    state = training_state(out)
    if fresh:
        state.unlink(missing_ok=True)
    teacher = load_encoder(
        encoder, arch=teacher_arch, image_size=image_size, device=device, precision=precision
    )
    source = open_source(images, root=root, follow_links=follow_links, only=ids)
    check_outside(out, source)
    with log_into(out.parent), screen.progress() as progress:
        pixels = load_images(
            source, teacher.preprocessing.geometry, workers=workers, seed=seed, progress=progress
        )
        student = train_student(teacher, pixels, config, seed=seed, checkpoint=state, progress=progress)
        used = len(trusted_part(pixels, config.share, seed))
        origin = {"teacher": teacher.name, "weights": teacher.fingerprint, "n_images": used}
        save_encoder(student, out, distilled=origin)
    summary = {
        "schema": 1,
        "encoder": str(out),
        "distilled_from": encoder,
        "teacher_fingerprint": teacher.fingerprint,
        "method": student.config.method,
        "arch": student.architecture.name,
        "image_size": student.architecture.image_size,
        "n_images": used,
        "n_skipped": len(pixels.skipped),
        "share": share,
        "queues": config.queues,
        "epochs": config.epochs,
        "loss": student.losses[-1],
        "seed": seed,
        "fingerprint": student.fingerprint,
    }
    screen.finish(
        summary,
        f"{student.architecture.name} distilled from {teacher.name} on {used} images of "
        f"{student.architecture.image_size} px: loss {student.losses[0]:.3f} to {student.losses[-1]:.3f} in "
        f"{config.epochs} epochs\n{out}",
    )


@app.command(
    epilog="Example: unpoison repair cleanclip clip.safetensors clean/ --out repaired.safetensors\n\n"
    "Then: unpoison evaluate repaired.safetensors --zero-shot --test test/ --plan pairs/plan.json"
)
def cleanclip(
    encoder: Annotated[
        Path,
        typer.Argument(
            metavar="ENC",
            help="Image tower that `pretrain clip` wrote, perhaps backdoored.",
            show_default=False,
        ),
    ],
    images: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGES",
            help="Clean images: a folder, parquet or tar shards, or a text file of paths.",
            show_default=False,
        ),
    ],
    out: _Out,
    captions: Captions = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the images; default: 10.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Images per step; default: 64.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="For a batch of 256; scales with it.", show_default=False)
    ] = None,
    weight: Annotated[
        float | None,
        typer.Option(
            help="Of self-supervision beside CLIP's own loss; default: 4, published: 1.", show_default=False
        ),
    ] = None,
    only: Only = None,
    root: Root = None,
    follow_links: FollowLinks = False,
    fresh: _FreshFile = False,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune both towers on clean pairs until the trigger loses its word (CleanCLIP).

    Beside CLIP's loss each tower learns from two views of an image, and from two wordings of a caption. A killed run
    goes on where it was when the same command is given again.
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    _check_out(out, encoder, fresh=fresh)
    ids = read_ids(only)
    from unpoison.data.export import check_outside
    from unpoison.data.load import load_images
    from unpoison.data.sources import open_source
    from unpoison.encoders.image_text import load_image_text, save_image_text, words_file
    from unpoison.repair.cleanclip import CleanClipConfig
    from unpoison.repair.cleanclip import cleanclip as fine_tune
    from unpoison.repair.retraining import training_state

    _check_out(words_file(out), words_file(encoder), fresh=fresh)
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight": weight,
    }
    config = CleanClipConfig(**{name: value for name, value in settings.items() if value is not None})
    state = training_state(out)
    if fresh:
        state.unlink(missing_ok=True)
    pair = load_image_text(encoder, device=device, precision=precision)
    source = open_source(images, root=root, follow_links=follow_links, only=ids)
    check_outside(out, source)
    with log_into(out.parent), screen.progress() as progress:
        pixels = load_images(
            source, pair.encoder.preprocessing.geometry, workers=workers, seed=seed, progress=progress
        )
        texts = captions_for(source, pixels.ids, captions, seed)
        done = fine_tune(pair, pixels, texts, config, seed=seed, checkpoint=state, progress=progress)
        save_image_text(done.trained, done.words, done.vocabulary, out)
    losses = done.trained.losses
    summary = {
        "schema": 1,
        "encoder": str(out),
        "words": str(words_file(out)),
        "repaired_from": str(encoder),
        "method": done.trained.config.method,
        "arch": done.trained.architecture.name,
        "image_size": done.trained.architecture.image_size,
        "n_images": len(pixels),
        "n_skipped": len(pixels.skipped),
        "epochs": config.epochs,
        "loss": losses[-1],
        "seed": seed,
        "fingerprint": done.trained.fingerprint,
    }
    screen.finish(
        summary,
        f"{encoder.name} fine-tuned on {len(pixels)} clean pairs: loss {losses[0]:.3f} to {losses[-1]:.3f} in "
        f"{config.epochs} epochs\n{out}",
    )


def _check_out(out: Path, encoder: Path, *, fresh: bool) -> None:
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")
    if out.resolve() == encoder.resolve():
        raise ConfigError(f"--out {out} is the encoder to replace, which is kept: name another file")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file")
    if out.exists() and not fresh:
        raise ConfigError(f"{out} exists and is not overwritten: name another --out, or add --fresh")


def _recipe(encoder: Path, given: dict[str, Any], seed: int | None) -> VictimRecipe:
    """The victim's own recipe; or, of a file that does not hold it, what the options say."""
    from unpoison.encoders.checkpoints import read_training
    from unpoison.repair.retraining import VictimRecipe, read_recipe

    if read_training(encoder, PretrainConfig) is None and {"method", "arch", "image_size"} <= given.keys():
        size = given.pop("image_size")
        config = dataclasses.replace(_DEFAULT, **given)
        return VictimRecipe(config=config, image_size=size, seed=seed or 0, of=encoder.name)
    recipe = read_recipe(encoder)
    if given:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise ConfigError(
            f"{encoder} says how it was trained, and {option} says it too: leave it out, or use `unpoison pretrain` "
            "with --only RUN/clean.txt for another recipe"
        )
    return recipe if seed is None else dataclasses.replace(recipe, seed=seed)
