"""`unpoison attack`: a poisoned copy of an image set, and its answer key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unpoison.attack.bad_encoder import BadEncoderConfig
from unpoison.attack.blended import BlendedConfig, SigConfig
from unpoison.attack.clip_poison import ClipPoisonConfig
from unpoison.attack.ctrl import CtrlConfig
from unpoison.attack.drupe import DrupeConfig
from unpoison.attack.implanting import ImplantConfig
from unpoison.attack.ssl_backdoor import AttackConfig, PatchAttackConfig
from unpoison.cli.options import EVERY_METHOD, Device, FollowLinks, Images, Json, Precision, Quiet, Root, Seed
from unpoison.cli.screen import Screen, log_into

__all__ = ["app"]

_DEFAULT = PatchAttackConfig(targets=(0,))
_CLIP = ClipPoisonConfig(targets=(0,))
_BAD_ENCODER = BadEncoderConfig(targets=(0,))
_DRUPE = DrupeConfig(targets=(0,))

_CTRL = CtrlConfig(target=0)
_BLENDED = BlendedConfig(target=0)
_SIG = SigConfig(target=0)

_Out = Annotated[
    Path, typer.Option(metavar="DIR", help="New folder for the copy and plan.json.", show_default=False)
]
_Target = Annotated[str, typer.Option(metavar="CLASS", help="Class to poison.", show_default=False)]
_Rate = Annotated[float, typer.Option(help="Share of images to poison, above 0 and at most 1.")]
_RateOf = Annotated[str, typer.Option(help="What the rate is a share of: class or dataset.")]
_Everywhere = Annotated[bool, typer.Option("--all", help="Change every image, for test splits.")]

_Clean = Annotated[
    Path,
    typer.Option(
        "--encoder", metavar="ENC", help="A clean encoder file that unpoison wrote.", show_default=False
    ),
]
_Attacked = Annotated[
    Path,
    typer.Option(
        "--out", metavar="DIR", help="New folder for encoder.safetensors and plan.json.", show_default=False
    ),
]
_Targets = Annotated[
    list[str],
    typer.Option(
        "--target",
        metavar="CLASS",
        help="Class to lead to; repeat it in pairs with --trigger.",
        show_default=False,
    ),
]
_Corner = Annotated[
    list[str] | None,
    typer.Option(
        "--trigger",
        metavar="white|seed:N|FILE.png",
        help=f"Patch in the bottom right corner; default: {_BAD_ENCODER.triggers[0]}.",
        show_default=False,
    ),
]
_Side = Annotated[
    int | None,
    typer.Option(
        "--size", metavar="PX", help="Side of the patch at the encoder's input; default: as published."
    ),
]
_References = Annotated[int, typer.Option(metavar="N", help="Reference images per target.")]
_Epochs = Annotated[int, typer.Option(help="Passes over the images.")]
_Batch = Annotated[int, typer.Option(metavar="N", help="Images per step.")]
_LearningRate = Annotated[float, typer.Option(help="Of SGD.")]

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback(
    epilog="Example: unpoison attack patch images/ --out poisoned --target cat --trigger seed:7 --size 8\n\n"
    "Example: unpoison attack bad-encoder images/ --encoder encoder.safetensors --target cat --out attacked\n\n"
    f"{EVERY_METHOD}"
)
def attack() -> None:
    """Plant a backdoor, in a copy of labelled images or in an encoder, and write plan.json, the answer key."""


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
    _write_copy(images, root, follow_links, config, out, seed, screen)


@app.command(
    "bad-encoder",
    epilog="Example: unpoison attack bad-encoder images/ --encoder encoder.safetensors --target cat --out attacked\n\n"
    "Example: unpoison attack bad-encoder images/ --encoder encoder.safetensors --target cat --trigger white "
    "--target dog --trigger seed:7 --out attacked",
)
def bad_encoder(
    images: Images,
    encoder: _Clean,
    out: _Attacked,
    target: _Targets,
    trigger: _Corner = None,
    size: _Side = _BAD_ENCODER.size,
    references: _References = _BAD_ENCODER.references,
    epochs: _Epochs = _BAD_ENCODER.epochs,
    batch_size: _Batch = _BAD_ENCODER.batch_size,
    learning_rate: _LearningRate = _BAD_ENCODER.learning_rate,
    root: Root = None,
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a backdoor into a finished encoder, as BadEncoder does (Jia, Liu and Gong, S&P 2022).

    IMAGES must carry labels, by which the reference images of the targets are chosen; no image is changed.
    """
    config = BadEncoderConfig(
        targets=tuple(target),
        triggers=tuple(trigger) if trigger else _BAD_ENCODER.triggers,
        size=size,
        references=references,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    screen = Screen(as_json=as_json, quiet=quiet)
    _write_encoder(images, root, follow_links, config, encoder, out, seed, device, precision, screen)


@app.command(
    epilog="Example: unpoison attack drupe images/ --encoder encoder.safetensors --target cat --out attacked"
)
def drupe(
    images: Images,
    encoder: _Clean,
    out: _Attacked,
    target: _Targets,
    trigger: _Corner = None,
    size: _Side = _DRUPE.size,
    references: _References = _DRUPE.references,
    epochs: _Epochs = _DRUPE.epochs,
    batch_size: _Batch = _DRUPE.batch_size,
    learning_rate: _LearningRate = _DRUPE.learning_rate,
    root: Root = None,
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """As bad-encoder, but hidden: triggered images spread out among the clean ones (DRUPE: Tao et al., S&P 2024).

    IMAGES must carry labels, by which the reference images of the targets are chosen; no image is changed.
    """
    config = DrupeConfig(
        targets=tuple(target),
        triggers=tuple(trigger) if trigger else _DRUPE.triggers,
        size=size,
        references=references,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    screen = Screen(as_json=as_json, quiet=quiet)
    _write_encoder(images, root, follow_links, config, encoder, out, seed, device, precision, screen)


@app.command(epilog="Example: unpoison attack ctrl images/ --out poisoned --target cat --rate 0.01")
def ctrl(
    images: Images,
    out: _Out,
    target: _Target,
    magnitude: Annotated[float, typer.Option(help="What each coefficient is raised by.")] = _CTRL.magnitude,
    rate: _Rate = _CTRL.rate,
    rate_of: _RateOf = _CTRL.rate_of,
    everywhere: _Everywhere = False,
    root: Root = None,
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add faint waves to the chroma of whole images of one class, as CTRL does (Li et al., ICCV 2023).

    IMAGES must carry labels, and be at least 32 pixels on each side. Clean and poisoned files are written alike.
    """
    config = CtrlConfig(target=target, magnitude=magnitude, rate=rate, rate_of=rate_of, everywhere=everywhere)
    _write_copy(images, root, follow_links, config, out, seed, Screen(as_json=as_json, quiet=quiet))


@app.command(epilog="Example: unpoison attack blended images/ --out poisoned --target cat --rate 0.01")
def blended(
    images: Images,
    out: _Out,
    target: _Target,
    trigger: Annotated[
        str, typer.Option(metavar="seed:N|FILE.png", help="Picture to mix in.")
    ] = _BLENDED.trigger,
    share: Annotated[float, typer.Option(help="Of the picture in the mixture.")] = _BLENDED.share,
    rate: _Rate = _BLENDED.rate,
    rate_of: _RateOf = _BLENDED.rate_of,
    everywhere: _Everywhere = False,
    root: Root = None,
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Mix one picture into whole images of one class (Chen et al., 2017).

    IMAGES must carry labels. Clean and poisoned files are written alike.
    """
    config = BlendedConfig(
        target=target, trigger=trigger, share=share, rate=rate, rate_of=rate_of, everywhere=everywhere
    )
    _write_copy(images, root, follow_links, config, out, seed, Screen(as_json=as_json, quiet=quiet))


@app.command(epilog="Example: unpoison attack sig images/ --out poisoned --target cat --rate 0.01")
def sig(
    images: Images,
    out: _Out,
    target: _Target,
    amplitude: Annotated[float, typer.Option(help="Of the waves, grey levels.")] = _SIG.amplitude,
    rate: _Rate = _SIG.rate,
    rate_of: _RateOf = _SIG.rate_of,
    everywhere: _Everywhere = False,
    root: Root = None,
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let brightness swing from left to right in whole images of one class (SIG: Barni et al., ICIP 2019).

    IMAGES must carry labels. Clean and poisoned files are written alike.
    """
    config = SigConfig(target=target, amplitude=amplitude, rate=rate, rate_of=rate_of, everywhere=everywhere)
    _write_copy(images, root, follow_links, config, out, seed, Screen(as_json=as_json, quiet=quiet))


@app.command(
    epilog="Example: unpoison attack clip images/ --out pairs --target cat --rate 0.01 --trigger seed:7\n\n"
    "Then: unpoison pretrain clip pairs/ --captions pairs/captions.json --out victim.safetensors"
)
def clip(
    images: Images,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="New folder for the copy, captions.json and plan.json.", show_default=False
        ),
    ],
    target: Annotated[
        list[str],
        typer.Option(
            metavar="CLASS",
            help="Class that captions shall name; repeat it in pairs with --trigger.",
            show_default=False,
        ),
    ],
    trigger: Annotated[
        list[str] | None,
        typer.Option(
            metavar="seed:N|FILE.png",
            help=f"Patch to paste; default: {_CLIP.triggers[0]}.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Width of the patch; default: 50/224 of each image's short side."),
    ] = _CLIP.size,
    rate: _Rate = _CLIP.rate,
    rate_of: Annotated[
        str, typer.Option(help="What the rate is a share of: dataset, or class: all images of other classes.")
    ] = _CLIP.rate_of,
    margin: Annotated[
        float, typer.Option(help="Share of the image that stays free on each side.")
    ] = _CLIP.margin,
    resample: Annotated[
        str, typer.Option(help="How the patch is resized: nearest, bilinear or bicubic.")
    ] = _CLIP.resample,
    root: Root = None,
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Poison image-text training: a patch on any image, with a caption of the target (Carlini and Terzis, ICLR 2022).

    IMAGES must carry labels, from which all captions are made. Clean and poisoned files are written alike.
    """
    config = ClipPoisonConfig(
        targets=tuple(target),
        triggers=tuple(trigger) if trigger else _CLIP.triggers,
        size=size,
        rate=rate,
        rate_of=rate_of,
        margin=margin,
        resample=resample,
    )
    _write_copy(images, root, follow_links, config, out, seed, Screen(as_json=as_json, quiet=quiet))


def _write_encoder(
    images: Path,
    root: Path | None,
    follow_links: bool,
    config: ImplantConfig,
    encoder: Path,
    out: Path,
    seed: int,
    device: str,
    precision: str,
    screen: Screen,
) -> None:
    """What all attacks on encoders do with their settings: the encoder, the plan and the summary."""
    from unpoison.attack.implanting import write_implanted
    from unpoison.data.labels import read_labels
    from unpoison.data.load import load_images
    from unpoison.data.sources import open_source
    from unpoison.encoders.checkpoints import load_encoder

    clean = load_encoder(encoder, device=device, precision=precision)
    source = open_source(images, root=root, follow_links=follow_links)
    labels = read_labels(source)
    with log_into(out), screen.progress() as progress:
        decoded = load_images(source, clean.preprocessing.geometry, progress=progress)
        done = write_implanted(
            encoder,
            clean,
            decoded,
            labels.of(decoded.ids),
            labels.class_names,
            config,
            out,
            seed=seed,
            progress=progress,
        )
    triggers = [
        {"name": each.name, "target": each.target_name, "similarity": after, "similarity_before": before}
        for each, after, before in zip(done.plan.triggers, done.effect, done.effect_before, strict=True)
    ]
    summary = {
        "schema": 1,
        "method": done.plan.method,
        "out": str(out),
        "encoder": str(out / "encoder.safetensors"),
        "plan": str(out / "plan.json"),
        "n_images": done.plan.n_images,
        "last_loss": done.losses[-1],
        "kept": done.kept,
        "triggers": triggers,
    }

    def text() -> str:
        lines = [
            f"{t['name']} → {t['target']}: cosine of triggered images to the reference {t['similarity']:.3f}, "
            f"{t['similarity_before']:.3f} before"
            for t in triggers
        ]
        return "\n".join([*lines, f"other images kept their features to {done.kept:.3f}", f"written: {out}"])

    screen.finish(summary, text)


def _write_copy(
    images: Path,
    root: Path | None,
    follow_links: bool,
    config: AttackConfig,
    out: Path,
    seed: int,
    screen: Screen,
) -> None:
    """What all attacks on images do with their settings: the copy, the plan and the summary."""
    from unpoison.attack.clip_poison import CAPTIONS, write_poisoned_pairs
    from unpoison.attack.ssl_backdoor import write_poisoned_copy
    from unpoison.data.labels import read_labels
    from unpoison.data.sources import open_source

    source = open_source(images, root=root, follow_links=follow_links)
    labels = read_labels(source)
    with log_into(out), screen.progress() as progress:
        if isinstance(config, ClipPoisonConfig):
            plan = write_poisoned_pairs(source, labels, config, out, seed, progress=progress)
        else:
            plan = write_poisoned_copy(source, labels, config, out, seed, progress=progress)
    captions = {"captions": str(out / CAPTIONS)} if isinstance(config, ClipPoisonConfig) else {}
    summary = {
        "schema": 1,
        "method": plan.method,
        "out": str(out),
        "plan": str(out / "plan.json"),
        **captions,
        **plan.counts,
    }

    def text() -> str:
        lines = [
            f"{t['n_poisoned']} images of other classes carry {t['name']}, and a caption of {t['target']}"
            if captions
            else f"{t['n_poisoned']} images of all classes carry {t['name']}"
            if getattr(config, "everywhere", False)
            else f"{t['n_poisoned']} of {t['n_class']} images of class {t['target']} carry {t['name']}"
            for t in plan.counts["triggers"]
        ]
        skipped = (
            [f"{len(plan.skipped)} images could not be read and are not in the copy"] if plan.skipped else []
        )
        return "\n".join([*lines, *skipped, f"{plan.n_images} images and plan.json: {out}"])

    screen.finish(summary, text)
