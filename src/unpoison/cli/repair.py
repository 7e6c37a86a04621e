"""`unpoison repair`: from findings to a clean encoder."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unpoison.cli.options import Device, FollowLinks, Images, Json, Only, Precision, Quiet, Root, Workers
from unpoison.cli.screen import Screen, log_into, read_ids
from unpoison.errors import ConfigError
from unpoison.pretrain.loop import METHODS, PretrainConfig

if TYPE_CHECKING:
    from unpoison.repair.retraining import VictimRecipe

__all__ = ["app"]

_DEFAULT = PretrainConfig()
_RECIPE = "Recipe, only where ENC does not hold it"

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
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
    out: Annotated[
        Path, typer.Option(metavar="ENC", help="The .safetensors file to write.", show_default=False)
    ],
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
    root: Root = None,
    follow_links: FollowLinks = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; replace --out and forget a half-finished run.")
    ] = False,
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
    """Train an encoder again, with its own recipe, on the images that a scan kept.

    The recipe (method, network, settings, image size, seed) is read from ENC when `unpoison pretrain` or a scan wrote
    it. IMAGES are those that ENC was trained on, with --run or --only; or the folder that `unpoison clean` wrote. A
    killed run goes on where it was when the same command is given again.
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    if run is not None and only is not None:
        raise ConfigError("--run and --only both say what to keep: give one of them")
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")
    if out.resolve() == encoder.resolve():
        raise ConfigError(f"--out {out} is the encoder to replace, which is kept: name another file")
    if out.exists() and not fresh:
        raise ConfigError(f"{out} exists and is not overwritten: name another --out, or add --fresh")
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
            root=root,
            follow_links=follow_links,
            device=device,
            precision=precision,
            workers=workers,
            progress=progress,
        )
    if done.same_images is False:
        screen.note(f"{encoder} was trained on other images than {run} scanned; the two do not compare")
    config, losses = recipe.config, done.trained.losses
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
        "loss": losses[-1],
        "seed": recipe.seed,
        "same_images": done.same_images,
        "fingerprint": done.trained.fingerprint,
    }
    measure = "unpoison evaluate {} --train LABELLED --test LABELLED --plan plan.json"
    screen.finish(
        summary,
        f"{config.method} {arch_used} again, seed {recipe.seed}, on {done.kept} images of {recipe.image_size} px, "
        f"{len(done.left_out)} left out: loss {losses[0]:.3f} to {losses[-1]:.3f} in {config.epochs} epochs\n{out}\n"
        f"before: {measure.format(shlex.quote(str(encoder)))}\nafter:  {measure.format(shlex.quote(str(out)))}",
    )


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
