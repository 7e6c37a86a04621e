"""`unpoison pretrain`: images to encoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from unpoison.cli.options import (
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
from unpoison.pretrain.clip import ClipConfig
from unpoison.pretrain.loop import METHODS, PretrainConfig

__all__ = ["app"]

_DEFAULT = PretrainConfig()

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example: unpoison pretrain moco-v2 images/ --out encoder.safetensors\n\n"
    "Example: unpoison pretrain moco-v3 images/ --out clean.safetensors --only run/clean.txt --epochs 40"
)
def pretrain(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help=f"{', '.join(METHODS)}, or clip.", show_default=False)
    ],
    images: Images,
    out: Annotated[
        Path, typer.Option(metavar="ENC", help="The .safetensors file to write.", show_default=False)
    ],
    arch: Annotated[
        str | None,
        typer.Option(
            help="resnet10, resnet18, resnet34, resnet50, vit_tiny, vit_small, vit_base or a timm model; "
            "default: vit_tiny for moco-v3, else resnet10."
        ),
    ] = _DEFAULT.arch,
    width: Annotated[
        int, typer.Option(help="Channels of the first ResNet stage; a quarter of vit_tiny's features.")
    ] = _DEFAULT.width,
    image_size: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Side of the input; default: fits the images, at most 224.", min=8),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = _DEFAULT.epochs,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images per step.")] = _DEFAULT.batch_size,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="For a batch of 256; scales with it; default: the method's own."),
    ] = _DEFAULT.learning_rate,
    i_cutmix: Annotated[
        bool,
        typer.Option("--i-cutmix", help="Mix boxes of other images into the views; MoCo, BYOL and SimCLR."),
    ] = _DEFAULT.i_cutmix,
    captions: Captions = None,
    only: Only = None,
    root: Root = None,
    follow_links: FollowLinks = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; replace ENC and forget a half-finished run.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an encoder on unlabelled images; no label is read, but for the captions of clip.

    A killed run goes on where it was when the same command is given again, and ends with the same weights.
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    if method not in (*METHODS, "clip"):
        raise ConfigError(f"method {method!r}: expected {' or '.join((*METHODS, 'clip'))}")
    config = dataclasses.replace(
        ClipConfig() if method == "clip" else _DEFAULT,
        method=method,
        arch=arch,
        width=width,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        i_cutmix=i_cutmix,
    )
    if captions is not None and method != "clip":
        raise ConfigError(f"--captions: {method} reads no texts; use clip, or leave it out")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file")
    if out.exists() and not fresh:
        raise ConfigError(f"{out} exists and is not overwritten: name another --out, or add --fresh")
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name that ends in .safetensors")
    ids = read_ids(only)
    from unpoison.data.export import check_outside
    from unpoison.data.load import load_images, usual_side
    from unpoison.data.sources import open_source
    from unpoison.encoders.checkpoints import save_encoder
    from unpoison.encoders.image_text import save_image_text, words_file
    from unpoison.pretrain.clip import pretrain_clip
    from unpoison.pretrain.loop import pretrain as train
    from unpoison.records import Geometry

    state = out.with_name(f".{out.name}.state")
    if fresh:
        state.unlink(missing_ok=True)
    source = open_source(images, root=root, follow_links=follow_links, only=ids)
    check_outside(out, source)
    side = image_size or usual_side(source)
    with log_into(out.parent), screen.progress() as progress:
        pixels = load_images(source, Geometry(side, side), workers=workers, seed=seed, progress=progress)
        if isinstance(config, ClipConfig):
            texts = captions_for(source, pixels.ids, captions, seed)
            pair = pretrain_clip(
                pixels,
                texts,
                config,
                seed=seed,
                device=device,
                precision=precision,
                checkpoint=state,
                progress=progress,
            )
            trained = pair.trained
            save_image_text(trained, pair.words, pair.vocabulary, out)
        else:
            trained = train(
                pixels,
                config,
                seed=seed,
                device=device,
                precision=precision,
                checkpoint=state,
                progress=progress,
            )
            save_encoder(trained, out)
    summary = {
        "schema": 1,
        "encoder": str(out),
        "method": method,
        "arch": trained.architecture.name,
        "width": width,
        "image_size": side,
        "n_images": len(pixels),
        "n_skipped": len(pixels.skipped),
        "epochs": epochs,
        "i_cutmix": i_cutmix,
        "loss": trained.losses[-1],
        "seed": seed,
        "fingerprint": trained.fingerprint,
        **({"words": str(words_file(out))} if method == "clip" else {}),
    }
    skipped = f", {len(pixels.skipped)} skipped" if pixels.skipped else ""
    screen.finish(
        summary,
        f"{method} on {len(pixels)} images of {side} px{skipped}: "
        f"loss {trained.losses[0]:.3f} to {trained.losses[-1]:.3f} in {epochs} epochs\n{out}",
    )
