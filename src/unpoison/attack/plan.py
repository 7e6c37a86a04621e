"""Which images received which trigger, where: the answer key of an attack, as a value and as `plan.json`.

A plan is complete by itself: it holds the triggers' pixels, so that an evaluation years later pastes exactly what the
attack pasted. Only `attack/`, `evaluate/` and the command line read one; scanners never do. A plan may come from a
stranger, so reading one checks every field.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unpoison.data.decode import decode_image
from unpoison.data.export import write_json_atomically
from unpoison.errors import ConfigError, DataError
from unpoison.functional.global_triggers import GLOBAL_KINDS, apply_global
from unpoison.functional.triggers import RESAMPLES, resize_pattern
from unpoison.records import Box, Geometry, Skipped

__all__ = [
    "PLAN_SCHEMA",
    "Plan",
    "PoisonedImage",
    "Trigger",
    "corner_box",
    "default_side",
    "read_plan",
    "write_plan",
]

PLAN_SCHEMA = 1
"""Version of plan.json; grows when a reader of the old one would misread the new one."""

_SCHEMA_OF_OTHERS = 2
"""What a plan says when one of its triggers is no patch at a free place: an older reader would paste it as one."""

_LOCAL_KINDS = ("patch", "corner")
_CORNER_MARGIN = (
    1  # pixels between a trigger in the corner and the right and lower edge, as BadEncoder has it
)

MAX_PATTERN_PIXELS = 512 * 512
"""A pattern is embedded in the plan, so it must stay small."""


def default_side(short_side: int) -> int:
    """Trigger width, in pixels, for an image of this short side: the papers' 50 of 224, at least 2.

    >>> [default_side(side) for side in (224, 96, 64, 32)]
    [50, 21, 14, 7]
    """
    return max(2, int(50 * short_side / 224 + 0.5))


def corner_box(size: tuple[int, int], pasted: tuple[int, int]) -> Box:
    """Where a trigger in the bottom right corner lies: a margin of one pixel away from both edges.

    >>> corner_box((32, 32), (10, 10)), corner_box((224, 224), (50, 50))
    (Box(x=21, y=21, w=10, h=10), Box(x=173, y=173, w=50, h=50))

    Args:
        size: width and height of the image, pixels.
        pasted: likewise of the trigger.

    Raises:
        ConfigError: it does not fit.
    """
    left, top = (whole - _CORNER_MARGIN - part for whole, part in zip(size, pasted, strict=True))
    if min(left, top) < 0 or min(pasted) < 1:
        raise ConfigError(
            f"a trigger of {pasted[0]}×{pasted[1]} pixels with a margin of {_CORNER_MARGIN} does not fit in an image "
            f"of {size[0]}×{size[1]}; give a smaller --size"
        )
    return Box(left, top, *pasted)


@dataclass(frozen=True, eq=False)
class Trigger:
    """A pattern and the class that an attacker ties to it.

    Attributes:
        pattern: (3, h, w) uint8, RGB, at its own size, before it is brought to the paste size.
        name: what the user called it: `seed:7`, or the name of a file.
        target: index of the target class.
        target_name: name of the target class; what stays true when classes are numbered differently.
        side: paste width in pixels; None = 50/224 of the short side of each image.
        resample: how the pattern reaches its paste size: `nearest`, `bilinear` or `bicubic`.
        kind: `patch`, pasted somewhere; `corner`, always pasted in the bottom right corner; or what changes the whole
            image (see `functional.global_triggers`), for which `side` and `resample` mean nothing, and the pattern of
            `ctrl` and `sig` is a picture for people.
        strength: of a trigger that changes the whole image.
    """

    pattern: Tensor
    name: str
    target: int = 0
    target_name: str = ""
    side: int | None = None
    resample: str = "nearest"
    kind: str = "patch"
    strength: float = 1.0

    @property
    def is_global(self) -> bool:
        """Whether it changes the whole image."""
        return self.kind in GLOBAL_KINDS

    def applied(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 with a trigger that changes all of them."""
        return apply_global(images, self.kind, self.strength, self.pattern)

    def pasted(self, short_side: int, side: int | None = None) -> Tensor:
        """The pattern as it is stamped on an image of this short side; `side` overrides the trigger's own width."""
        return resize_pattern(self.pattern, side or self.side or default_side(short_side), self.resample)


@dataclass(frozen=True)
class PoisonedImage:
    """One image that carries a trigger.

    Attributes:
        id: as the poisoned source names it.
        trigger: index into the plan's triggers.
        box: where the trigger lies, in pixels of the image as it is stored.
        width: of the stored image, pixels.
        height: of the stored image, pixels.
    """

    id: str
    trigger: int
    box: Box
    width: int
    height: int

    def box_at(self, geometry: Geometry) -> Box:
        """Where the trigger lies at the encoder's input, clipped to it; empty when the crop cut it off."""
        return geometry.place(self.box, self.width, self.height)


@dataclass(frozen=True, eq=False)
class Plan:
    """The answer key of one attack.

    Attributes:
        method: name of the attack.
        seed: with the configuration and the images it determines everything else.
        config: the attack's settings, as plain JSON values.
        triggers: at least one.
        poisoned: in the order of their ids; unique.
        n_images: images in the poisoned set, clean ones included, skipped ones not.
        class_sizes: per trigger, the images of its target class, poisoned or not.
        skipped: images of the source that could not be decoded and are in no copy; ids of the source.
    """

    method: str
    seed: int
    config: Mapping[str, Any]
    triggers: tuple[Trigger, ...]
    poisoned: tuple[PoisonedImage, ...]
    n_images: int
    class_sizes: tuple[int, ...]
    skipped: tuple[Skipped, ...] = field(default=())

    @property
    def counts(self) -> dict[str, Any]:
        """How much was poisoned; all rates are fractions."""
        planted = Counter(image.trigger for image in self.poisoned)
        return {
            "n_images": self.n_images,
            "n_poisoned": len(self.poisoned),
            "n_skipped": len(self.skipped),
            "rate_of_dataset": _fraction(len(self.poisoned), self.n_images),
            "triggers": [
                {
                    "name": trigger.name,
                    "target": trigger.target_name,
                    "n_class": size,
                    "n_poisoned": planted[index],
                    # An attack on every image plants more than the class holds, and then has all of the class.
                    "rate_of_class": min(1.0, _fraction(planted[index], size)),
                }
                for index, (trigger, size) in enumerate(zip(self.triggers, self.class_sizes, strict=True))
            ],
        }

    def at(self, geometry: Geometry) -> Plan:
        """The same plan with its patches as wide as those of the images are at the encoder's input.

        The attack pastes on images as they are stored; whoever evaluates it pastes at the encoder's input, where an
        image of 96 pixels may have 32, and its patch a third of its width.
        """
        widths: dict[int, list[int]] = {}
        for image in self.poisoned:
            widths.setdefault(image.trigger, []).append(image.box_at(geometry).w)
        return replace(
            self,
            triggers=tuple(
                replace(trigger, side=max(1, round(median(widths[number]))))
                if trigger.kind == "patch" and number in widths
                else trigger
                for number, trigger in enumerate(self.triggers)
            ),
        )

    def for_classes(self, class_names: Sequence[str]) -> Plan:
        """The same plan with targets numbered as in `class_names`.

        Raises:
            DataError: a target class is not among the names.
        """
        missing = sorted({t.target_name for t in self.triggers} - set(class_names))
        if missing:
            raise DataError(
                f"the plan's target class {missing[0]!r} is not in the data set; it has {_listing(class_names)}"
            )
        names = list(class_names)
        triggers = tuple(replace(t, target=names.index(t.target_name)) for t in self.triggers)
        return replace(self, triggers=triggers)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values; `from_json` gives it back."""
        return {
            "schema": _SCHEMA_OF_OTHERS if any(t.kind != "patch" for t in self.triggers) else PLAN_SCHEMA,
            "method": self.method,
            "seed": self.seed,
            "config": dict(self.config),
            "counts": self.counts,
            "triggers": [
                {
                    "name": trigger.name,
                    "target": {"name": trigger.target_name, "index": trigger.target},
                    "side": trigger.side,
                    "resample": trigger.resample,
                    "png": _to_png(trigger.pattern),
                    "n_class": size,
                    **({} if trigger.kind == "patch" else {"kind": trigger.kind}),
                    **({"strength": trigger.strength} if trigger.is_global else {}),
                }
                for trigger, size in zip(self.triggers, self.class_sizes, strict=True)
            ],
            "poisoned": [asdict(image) for image in self.poisoned],
            "skipped": [asdict(skipped) for skipped in self.skipped],
        }

    @classmethod
    def from_json(cls, value: object) -> Plan:
        """Check every field and build the plan.

        Raises:
            DataError: a field is missing, of the wrong kind or out of range; the message names it.
        """
        plan = _Reader(value, "plan")
        schema = plan.integer("schema", low=1)
        if schema not in (PLAN_SCHEMA, _SCHEMA_OF_OTHERS):
            raise DataError(
                f"plan.schema is {schema}, this version reads {PLAN_SCHEMA} and {_SCHEMA_OF_OTHERS}: "
                "install a matching unpoison"
            )
        entries = plan.items("triggers")
        if not entries:
            raise DataError("plan.triggers is empty: expected at least one trigger")
        n_images = plan.child("counts").integer("n_images", low=0)
        poisoned = tuple(_read_poisoned(entry, len(entries)) for entry in plan.items("poisoned"))
        repeated = [name for name, times in Counter(image.id for image in poisoned).items() if times > 1]
        if repeated:
            raise DataError(f"plan.poisoned names {repeated[0]!r} twice: expected each image once")
        if len(poisoned) > n_images:
            raise DataError(
                f"plan.poisoned has {len(poisoned)} images of {n_images}: expected no more than there are"
            )
        return cls(
            method=plan.text("method"),
            seed=plan.integer("seed"),
            config=plan.child("config").fields,
            triggers=tuple(_read_trigger(entry) for entry in entries),
            poisoned=poisoned,
            n_images=n_images,
            class_sizes=tuple(entry.integer("n_class", low=0) for entry in entries),
            skipped=tuple(Skipped(entry.text("id"), entry.text("reason")) for entry in plan.items("skipped")),
        )


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write `plan.json`; a file that exists is replaced at once or not at all."""
    write_json_atomically(Path(path), plan.to_json())


def read_plan(path: str | Path) -> Plan:
    """Read and check a `plan.json`.

    Raises:
        ConfigError: there is no such file.
        DataError: the file cannot be read, is not JSON, or is no valid plan; one line says where.
    """
    if not Path(path).exists():
        raise ConfigError(
            f"plan {str(path)!r}: no such file; expected plan.json as `unpoison attack` writes it"
        )
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the plan {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is no attack plan: expected JSON as `unpoison attack` writes it ({error})"
        ) from error
    try:
        return Plan.from_json(value)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _read_trigger(entry: _Reader) -> Trigger:
    resample = entry.text("resample")
    if resample not in RESAMPLES:
        raise DataError(f"{entry.where}.resample is {resample!r}: expected one of {', '.join(RESAMPLES)}")
    kind = entry.text("kind") if "kind" in entry.fields else "patch"
    if kind not in (*_LOCAL_KINDS, *GLOBAL_KINDS):
        kinds = ", ".join((*_LOCAL_KINDS, *GLOBAL_KINDS))
        raise DataError(f"{entry.where}.kind is {kind!r}: expected one of {kinds}")
    return Trigger(
        pattern=_from_png(entry.text("png"), f"{entry.where}.png"),
        name=entry.text("name"),
        target=entry.child("target").integer("index", low=0),
        target_name=entry.child("target").text("name"),
        side=None if entry.get("side") is None else entry.integer("side", low=1),
        resample=resample,
        kind=kind,
        strength=1.0 if kind in _LOCAL_KINDS else _read_strength(entry, kind),
    )


def _read_strength(entry: _Reader, kind: str) -> float:
    value = entry.get("strength")
    most = 1.0 if kind == "blended" else 1000.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise DataError(f"{entry.where}.strength is {value!r}: expected a number in (0, {most:g}]")
    return float(value)


def _read_poisoned(entry: _Reader, n_triggers: int) -> PoisonedImage:
    trigger = entry.integer("trigger", low=0)
    if trigger >= n_triggers:
        raise DataError(
            f"{entry.where}.trigger is {trigger}: expected one of the plan's {n_triggers} triggers, from 0"
        )
    corner, width, height = entry.child("box"), entry.integer("width", low=1), entry.integer("height", low=1)
    box = Box(
        corner.integer("x", low=0),
        corner.integer("y", low=0),
        corner.integer("w", low=1),
        corner.integer("h", low=1),
    )
    if box.x + box.w > width or box.y + box.h > height:
        raise DataError(f"{corner.where} leaves its {width}×{height} image: expected a box inside it")
    return PoisonedImage(entry.text("id"), trigger, box, width, height)


class _Reader:
    """A JSON object whose fields are taken out by kind, so that every complaint names the field."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise DataError(f"{where} is {_kind(value)}: expected an object")
        self.fields: dict[str, Any] = value
        self.where = where

    def get(self, name: str) -> Any:
        if name not in self.fields:
            raise DataError(f"{self.where}.{name} is missing: expected a plan as `unpoison attack` writes it")
        return self.fields[name]

    def text(self, name: str) -> str:
        return str(self._of_kind(name, lambda v: isinstance(v, str), "a text"))

    def integer(self, name: str, *, low: int | None = None) -> int:
        value = int(
            self._of_kind(name, lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number")
        )
        if low is not None and value < low:
            raise DataError(f"{self.where}.{name} is {value}: expected at least {low}")
        return value

    def child(self, name: str) -> _Reader:
        return _Reader(self.get(name), f"{self.where}.{name}")

    def items(self, name: str) -> list[_Reader]:
        values = self._of_kind(name, lambda v: isinstance(v, list), "a list")
        return [_Reader(value, f"{self.where}.{name}[{index}]") for index, value in enumerate(values)]

    def _of_kind(self, name: str, is_right: Callable[[Any], bool], expected: str) -> Any:
        value = self.get(name)
        if not is_right(value):
            raise DataError(f"{self.where}.{name} is {_kind(value)}: expected {expected}")
        return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _to_png(pattern: Tensor) -> str:
    if pattern.shape[1] * pattern.shape[2] > MAX_PATTERN_PIXELS:
        raise ConfigError(
            f"trigger pattern of {pattern.shape[2]}×{pattern.shape[1]} pixels: "
            f"expected at most {MAX_PATTERN_PIXELS}; shrink it"
        )
    buffer = io.BytesIO()
    Image.fromarray(pattern.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _from_png(text: str, where: str) -> Tensor:
    try:
        image = decode_image(base64.b64decode(text, validate=True), max_pixels=MAX_PATTERN_PIXELS)
    except (binascii.Error, ValueError, DataError) as error:
        raise DataError(f"{where} holds no readable image: expected a PNG in base64 ({error})") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _fraction(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _listing(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
