"""`unpoison attack`: a poisoned copy of an image set, and its answer key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unpoison.attack.ssl_backdoor import PatchAttackConfig
from unpoison.cli.options import Device, FollowLinks, Images, Json, Quiet, Root, Seed
from unpoison.cli.screen import Screen, log_into

__all__ = ["app"]

_DEFAULT = PatchAttackConfig(targets=(0,))

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def attack() -> None:
    """Plant a backdoor: a poisoned copy of labelled images, and plan.json, the answer key."""


@app.command(
    epilog="Example: unpoison attack patch images/ --out poisoned --target cat --trigger seed:7 --size 8\n\n"
    "Example: unpoison attack patch test/ --out patched --target cat --trigger seed:7 --size 8 --all"
)
def patch(
    images: Images,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="New folder for the copy and plan.json.", show_default=False)
    ],
    target: Annotated[
        list[str],
        typer.Option(
            metavar="CLASS", help="Class to poison; repeat it in pairs with --trigger.", show_default=False
        ),
    ],
    trigger: Annotated[
        list[str] | None,
        typer.Option(
            metavar="seed:N|FILE.png",
            help=f"Patch to paste; default: {_DEFAULT.triggers[0]}.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Width of the patch; default: 50/224 of each image's short side."),
    ] = _DEFAULT.size,
    rate: Annotated[
        float, typer.Option(help="Share of images to poison, above 0 and at most 1.")
    ] = _DEFAULT.rate,
    rate_of: Annotated[
        str, typer.Option(help="What the rate is a share of: class or dataset.")
    ] = _DEFAULT.rate_of,
    margin: Annotated[
        float, typer.Option(help="Share of the image that stays free on each side.")
    ] = _DEFAULT.margin,
    resample: Annotated[
        str, typer.Option(help="How the patch is resized: nearest, bilinear or bicubic.")
    ] = _DEFAULT.resample,
    everywhere: Annotated[bool, typer.Option("--all", help="Paste on every image, for test splits.")] = False,
    root: Root = None,
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Paste a small patch on images of one class, as SSL-Backdoor does (Saha et al., CVPR 2022).

    IMAGES must carry labels: one folder per class, or a label column. Clean and poisoned files are written alike.
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    config = PatchAttackConfig(
        targets=tuple(target),
        triggers=tuple(trigger) if trigger else _DEFAULT.triggers,
        size=size,
        rate=rate,
        rate_of=rate_of,
        margin=margin,
        resample=resample,
        everywhere=everywhere,
    )
    from unpoison.attack.ssl_backdoor import write_poisoned_copy
    from unpoison.data.labels import read_labels
    from unpoison.data.sources import open_source

    source = open_source(images, root=root, follow_links=follow_links)
    labels = read_labels(source)
    with log_into(out), screen.progress() as progress:
        plan = write_poisoned_copy(source, labels, config, out, seed, progress=progress)
    summary = {
        "schema": 1,
        "method": plan.method,
        "out": str(out),
        "plan": str(out / "plan.json"),
        **plan.counts,
    }

    def text() -> str:
        lines = [
            f"{t['n_poisoned']} of {t['n_class']} images of class {t['target']} carry {t['name']}"
            for t in plan.counts["triggers"]
        ]
        skipped = (
            [f"{len(plan.skipped)} images could not be read and are not in the copy"] if plan.skipped else []
        )
        return "\n".join([*lines, *skipped, f"{plan.n_images} images and plan.json: {out}"])

    screen.finish(summary, text)
