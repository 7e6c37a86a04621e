"""A task file: which images, attacks, victims and defences to combine, and what to show of it.

TOML, read strictly: an unknown setting is an error that names the nearest known one. Settings of an attack, a victim or
a scan are those of the classes that carry them out, so they and their defaults exist once.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from unpoison.attack.blended import BlendedConfig, SigConfig
from unpoison.attack.ctrl import CtrlConfig
from unpoison.attack.ssl_backdoor import AttackConfig as PlannedAttack
from unpoison.attack.ssl_backdoor import PatchAttackConfig
from unpoison.benchmark.measures import MeasureName, nearest, read_measure
from unpoison.data.views import ViewConfig
from unpoison.errors import ConfigError
from unpoison.pretrain.loop import PretrainConfig
from unpoison.repair.distillation import DistillConfig
from unpoison.scan.config import ScanConfig

__all__ = [
    "AXES",
    "AttackConfig",
    "Cell",
    "DataConfig",
    "DefenceConfig",
    "EvaluateConfig",
    "Item",
    "Plot",
    "Published",
    "Table",
    "Task",
    "read_task",
]

TASK_SCHEMA = 1
AXES = ("data", "attack", "victim", "defence", "seed")
_TOP_LEVEL = (
    *("schema", "name", "title", "about", "seeds", "evaluate"),
    *("data", "attack", "victim", "defence", "grid", "table", "plot", "published", "left_out"),
)
_T = TypeVar("_T")


# ── what a file may say ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and test images; exactly one of `folder`, `images` and `embedded` says where from.

    Attributes:
        folder: below UNPOISON_DATA: parquet shards `train-*` and `TEST_SPLIT-*`.
        images: one's own: anything that `unpoison scan` takes, with labels; a relative path starts at the task file.
        test_images: likewise; without it a share of `images` is kept for testing.
        embedded: `digits` or `photos`, which come along.
        test_split: first word of the test shards of `folder`.
        held_out: share of every class that is kept for testing, (0, 1), when there are no test images.
        size: side of the encoder's input, pixels; 32 for embedded images.
        resize: short side before the central crop; None = `size`.
        classes: only the first so many classes; None = all.
        train, test: so many images of each class; None = all.
    """

    folder: str | None = None
    images: str | None = None
    test_images: str | None = None
    embedded: str | None = None
    test_split: str = "test"
    held_out: float = 0.3
    size: int = 32
    resize: int | None = None
    classes: int | None = None
    train: int | None = None
    test: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("folder", "images", "embedded") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                f"expected one of folder, images and embedded, got {' and '.join(given) or 'none'}"
            )
        if self.test_images and not self.images:
            raise ConfigError("test_images belongs to images; a folder has test_split")
        if self.embedded not in (None, "digits", "photos"):
            raise ConfigError(f"embedded={self.embedded!r}: expected digits or photos")
        if self.embedded and (self.size != 32 or self.resize):
            raise ConfigError("embedded images have 32 pixels; leave out size and resize")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out}: expected a share between 0 and 1")
        if not 8 <= self.size <= 1024 or (self.resize is not None and self.resize < self.size):
            raise ConfigError(
                f"size={self.size}, resize={self.resize}: expected 8 to 1024 pixels, and resize no smaller"
            )
        for name in ("classes", "train", "test"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "classes" else 1):
                raise ConfigError(f"{name}={value}: expected at least {2 if name == 'classes' else 1}")


_GLOBAL: dict[str, Callable[..., PlannedAttack]] = {
    CtrlConfig.method: CtrlConfig,
    BlendedConfig.method: BlendedConfig,
    SigConfig.method: SigConfig,
}
_STRENGTH = {CtrlConfig.method: "magnitude", BlendedConfig.method: "share", SigConfig.method: "amplitude"}
_OF_PATCHES = ("pairs", "size", "share_of_side", "margin", "resample")


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """An attack on the images as a study plans it; what is not said here is in `attack.ssl_backdoor.PatchAttackConfig`.

    Attributes:
        method: `ssl-backdoor` (patches), or a trigger that covers the image: `ctrl`, `blended` or `sig`, of which there
            is one, without a size or a place.
        strength: of such a trigger: CTRL's magnitude, the share of the blended picture, the amplitude of SIG; None
            takes the attack's own.
        targets: class names or numbers; None follows the seed: pair i of seed s has class (s + i) mod n.
        triggers: `seed:N`, or image files beside the task file or below UNPOISON_DATA, one per target; None follows
            the seed: pair i of seed s has `seed:(100 + s + 1000 i)`. Fixed targets need fixed triggers.
        pairs: how many targets and triggers follow the seed.
        size: width of the trigger, pixels; or
        share_of_side: the same as a share of the side of the images; None for both = 50/224 of it.
        rate, rate_of, margin, resample: as in the attack.
    """

    targets: tuple[str | int, ...] | None = None
    triggers: tuple[str, ...] | None = None
    pairs: int = 1
    size: int | None = None
    share_of_side: float | None = None
    rate: float = 0.5
    rate_of: str = "class"
    margin: float = 0.25
    resample: str = "nearest"
    method: str = PatchAttackConfig.method
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.method != PatchAttackConfig.method:
            self._check_global()
        elif self.strength is not None:
            raise ConfigError(
                "strength belongs to triggers that cover the image; leave it out beside patches"
            )
        elif (self.targets is None) != (self.triggers is None):
            raise ConfigError(
                "targets and triggers belong together: give both, or neither to follow the seed"
            )
        if self.targets is not None and self.pairs != 1:
            raise ConfigError("pairs counts the targets that follow the seed; leave it out beside targets")
        if not 1 <= self.pairs <= 20:
            raise ConfigError(f"pairs={self.pairs}: expected 1 to 20")
        if self.size is not None and self.share_of_side is not None:
            raise ConfigError("size and share_of_side say the same; give one of them")
        if self.share_of_side is not None and not 0 < self.share_of_side < 1:
            raise ConfigError(f"share_of_side={self.share_of_side}: expected a share between 0 and 1")
        self.planned(0, 1000, 224)  # the attack's own checks, before anything runs

    def _check_global(self) -> None:
        if self.method not in _GLOBAL:
            known = ", ".join((PatchAttackConfig.method, *_GLOBAL))
            raise ConfigError(f"method={self.method!r}: expected one of {known}")
        of_patches = [name for name in _OF_PATCHES if getattr(self, name) != getattr(AttackConfig, name)]
        if of_patches:
            raise ConfigError(f"{self.method} covers the whole image: leave out {', '.join(of_patches)}")
        if self.triggers is not None and self.method != BlendedConfig.method:
            raise ConfigError(f"{self.method} has no pattern to choose: leave out triggers")
        if any(named is not None and len(named) != 1 for named in (self.targets, self.triggers)):
            raise ConfigError(f"{self.method} has one target: expected one of targets and triggers")

    def _global(self, seed: int, n_classes: int) -> PlannedAttack:
        settings: dict[str, Any] = {"target": seed % n_classes if self.targets is None else self.targets[0]}
        if self.strength is not None:
            settings[_STRENGTH[self.method]] = self.strength
        if self.method == BlendedConfig.method:
            settings["trigger"] = f"seed:{100 + seed}" if self.triggers is None else self.triggers[0]
        return _GLOBAL[self.method](**settings, rate=self.rate, rate_of=self.rate_of)

    def planned(self, seed: int, n_classes: int, image_size: int) -> PlannedAttack:
        """The attack of one seed on images of so many classes and pixels."""
        if self.method != PatchAttackConfig.method:
            return self._global(seed, n_classes)
        targets, triggers = self.targets, self.triggers
        if targets is None or triggers is None:
            targets = tuple((seed + pair) % n_classes for pair in range(self.pairs))
            triggers = tuple(f"seed:{100 + seed + 1000 * pair}" for pair in range(self.pairs))
        size = self.size
        if self.share_of_side is not None:
            size = max(2, round(self.share_of_side * image_size))
        return PatchAttackConfig(
            targets=targets,
            triggers=triggers,
            size=size,
            rate=self.rate,
            rate_of=self.rate_of,
            margin=self.margin,
            resample=self.resample,
        )


KINDS = ("none", "scan", "clean-trained", "distill")


@dataclass(frozen=True, kw_only=True)
class DefenceConfig:
    """What is done about the poison.

    Attributes:
        kind: `none` measures the victim; `scan` scans with it; `clean-trained` measures an encoder trained on the
            images before the attack, which no defence can beat; `distill` measures a student of the victim that sees
            a share of those.
        retrain: after a scan: remove the flagged images, train again with the victim's recipe, and measure that.
        i_cutmix: the encoder that is measured is trained with i-CutMix; the victim that scans is not.
        scan: settings of the scan.
        distill: settings of the student; its network is the victim's where they do not say. None unless distilled.
    """

    kind: str = "scan"
    retrain: bool = True
    i_cutmix: bool = False
    scan: ScanConfig = field(default_factory=ScanConfig)
    distill: DistillConfig | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind={self.kind!r}: expected {' or '.join(KINDS)}")
        if self.i_cutmix and (self.kind == "distill" or not self.retrain):
            raise ConfigError("i_cutmix: expected a defence that trains on images; leave it out")

    @property
    def measures_encoder(self) -> bool:
        """Whether an encoder comes of it, beside the victim."""
        return self.kind != "scan" or self.retrain

    def student(self, victim: PretrainConfig) -> DistillConfig:
        """The settings of the student of a victim, whose network it has where nothing else is said."""
        assert self.distill is not None, "a defence that distils has them"
        if self.distill.arch is not None:
            return self.distill
        return replace(
            self.distill, arch=victim.recipe.arch, width=victim.width, stem_stride=victim.stem_stride
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How encoders are measured.

    Attributes:
        labelled: share of the training images of every class whose labels the probes learn from, (0, 1].
        encoders: whether they are measured at all; a study of searches needs no accuracy.
    """

    labelled: float = 1.0
    encoders: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.labelled <= 1:
            raise ConfigError(f"labelled={self.labelled}: expected a share in (0, 1]")


@dataclass(frozen=True)
class Item:
    """One entry of an axis.

    Attributes:
        name: unique on its axis; what tables show.
        family: the name in the file; entries that `vary` makes of one table share it.
        settings: as the file gives them.
        config: the same, checked.
    """

    name: str
    family: str
    settings: Mapping[str, Any]
    config: Any


@dataclass(frozen=True)
class Cell:
    """One combination; names of its items, and the seed."""

    data: str
    attack: str
    victim: str
    defence: str
    seed: int


@dataclass(frozen=True)
class Table:
    """A table: one row per value of `rows`, one column per measure; `where` keeps only some cells."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[MeasureName, ...]
    where: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Plot:
    """A picture: y over x, one line per value of `lines`, one panel per value of `panels`.

    Attributes:
        title: above it.
        x: `k`, `false_positive_rate`, or a setting such as `defence.window`.
        y: measures, one panel each.
        lines, panels: axes or settings.
        where: as in a table.
        log: whether x is drawn by its logarithm.
    """

    title: str
    x: str
    y: tuple[MeasureName, ...]
    lines: tuple[str, ...]
    panels: tuple[str, ...]
    where: Mapping[str, tuple[Any, ...]]
    log: bool


@dataclass(frozen=True)
class Published:
    """Figures of a paper: which rows they stand beside, and where they are printed."""

    where: Mapping[str, tuple[Any, ...]]
    values: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Task:
    """A task file, checked.

    Attributes:
        name: of the study; letters, digits, `-` and `_`.
        title, about: what it asks; shown above the tables.
        seeds: one repetition of everything each.
        axes: `data`, `attack`, `victim` and `defence` to their items by name.
        cells: every combination that the file asks for, in the order in which they are computed.
        evaluate: how encoders are measured.
        tables, plots, published: what to show.
        left_out: combinations that are not computed, and why.
        root: the folder of the file.
    """

    name: str
    title: str
    about: str
    seeds: tuple[int, ...]
    axes: Mapping[str, Mapping[str, Item]]
    cells: tuple[Cell, ...]
    evaluate: EvaluateConfig
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    published: tuple[Published, ...]
    left_out: tuple[tuple[str, str], ...]
    root: Path

    def only_seed(self, seed: int) -> Task:
        """The same task with one of its seeds; cells are the same, so that seeds can be computed one by one.

        Raises:
            ConfigError: it is not among the task's seeds.
        """
        if seed not in self.seeds:
            raise ConfigError(f"seed {seed}: expected one of the task's, {', '.join(map(str, self.seeds))}")
        return replace(self, seeds=(seed,), cells=tuple(cell for cell in self.cells if cell.seed == seed))

    def value(self, cell: Cell, key: str) -> Any:
        """What a cell has on an axis (`defence`: its name), as a family (`defence.family`) or as a setting."""
        axis, _, setting = key.partition(".")
        if not setting:
            return getattr(cell, axis)
        item = self.axes[axis][getattr(cell, axis)]
        if setting == "family":
            return item.family
        return item.settings.get(setting, _default(axis, item, setting))


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_task(path: str | Path) -> Task:
    """Read and check a task file.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or says something that is unknown, missing or out of range;
            the message names the place in the file.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read; expected a task file, see docs/benchmarks.md") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: no valid TOML: {str(error).splitlines()[0]}") from error
    try:
        return _task(content, path.resolve().parent)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from error


def _task(content: dict[str, Any], root: Path) -> Task:
    _only_known(content, _TOP_LEVEL, "")
    schema = content.get("schema", TASK_SCHEMA)
    if schema != TASK_SCHEMA:
        raise ConfigError(f"schema = {schema!r}: this unpoison reads {TASK_SCHEMA}")
    name = _typed(content.get("name"), str, "name")
    if not re.fullmatch(r"[\w-]{1,80}", name, re.ASCII):
        raise ConfigError(f"name = {name!r}: expected letters, digits, - and _")
    seeds = _typed(content.get("seeds", [0]), tuple[int, ...], "seeds")
    if not seeds or min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds = {list(seeds)}: expected different whole numbers, not negative")
    axes = {
        "data": _items(content, "data", _data),
        "attack": _items(content, "attack", _attack),
        "victim": _items(content, "victim", _victim),
        "defence": _items(content, "defence", _defence),
    }
    published = tuple(_published(entry, where, axes) for entry, where in _tables_of(content, "published"))
    return Task(
        name=name,
        title=_typed(content.get("title", name), str, "title"),
        about=" ".join(_typed(content.get("about", ""), str, "about").split()),
        seeds=seeds,
        axes=axes,
        cells=_cells(content, axes, seeds),
        evaluate=_configured(EvaluateConfig, content.get("evaluate", {}), "evaluate"),
        tables=tuple(_table(entry, where, axes) for entry, where in _tables_of(content, "table")),
        plots=tuple(_plot(entry, where, axes) for entry, where in _tables_of(content, "plot")),
        published=published,
        left_out=tuple(_left_out(entry, where) for entry, where in _tables_of(content, "left_out")),
        root=root,
    )


def _items(content: dict[str, Any], axis: str, build: Any) -> dict[str, Item]:
    """The entries of one axis, with `vary` written out."""
    named = content.get(axis)
    if not isinstance(named, dict) or not named:
        raise ConfigError(f"no {axis}: expected at least one table [{axis}.NAME]")
    items: dict[str, Item] = {}
    for family, settings in named.items():
        where = f"{axis}.{family}"
        if not isinstance(settings, dict):
            raise ConfigError(f"{where}: expected a table [{axis}.NAME], got {_shown(settings)}")
        base = {key: value for key, value in settings.items() if key != "vary"}
        variants = settings.get("vary", [{}])
        if not isinstance(variants, list) or not variants or not all(isinstance(v, dict) for v in variants):
            raise ConfigError(f"{where}.vary: expected a list of tables of settings, got {_shown(variants)}")
        for index, variant in enumerate(variants):
            place = where if variant == {} else f"{where}.vary[{index}]"
            changes = dict(variant)
            if list(changes) == ["label"]:
                raise ConfigError(f"{place}.label: names no change; drop it")
            said = changes.pop("label", ", ".join(f"{key}={_plain(value)}" for key, value in changes.items()))
            label = family if not changes else f"{family} {_typed(said, str, f'{place}.label')}"
            if label in items:
                raise ConfigError(f"{place}: {label!r} comes twice; give it another label")
            merged = base | changes
            items[label] = Item(label, family, merged, build(merged, place))
    return items


def _data(settings: dict[str, Any], where: str) -> DataConfig:
    return _configured(DataConfig, settings, where)


def _attack(settings: dict[str, Any], where: str) -> AttackConfig:
    return _configured(AttackConfig, settings, where)


def _victim(settings: dict[str, Any], where: str) -> PretrainConfig:
    for key in ("views", "second_views"):
        if key in settings:
            _configured(ViewConfig, settings[key], f"{where}.{key}")
    return _configured(PretrainConfig, settings, where)


def _defence(settings: dict[str, Any], where: str) -> DefenceConfig:
    own = {key: value for key, value in settings.items() if key in _OWN_OF_DEFENCE}
    others = {key: value for key, value in settings.items() if key not in own}
    known = [entry.name for entry in fields(DistillConfig if own.get("kind") == "distill" else ScanConfig)]
    _only_known(settings, (*_OWN_OF_DEFENCE, *known), where)
    config = _configured(DefenceConfig, own, where)
    if config.kind == "scan":
        scan = _configured(ScanConfig, others, where)
        if scan.by_detector:
            raise ConfigError(
                f"{where}.method: {scan.method} needs other images to come to a verdict; expected a patch search"
            )
        return replace(config, scan=scan)
    if "retrain" in own:
        raise ConfigError(f"{where}.retrain: kind = {config.kind!r} does not scan; drop it")
    if config.kind == "distill":
        return replace(config, distill=_configured(DistillConfig, others, where))
    for key in others:
        raise ConfigError(f"{where}.{key}: kind = {config.kind!r} does not scan; drop it")
    return config


def _cells(
    content: dict[str, Any], axes: Mapping[str, Mapping[str, Item]], seeds: Sequence[int]
) -> tuple[Cell, ...]:
    """Every grid written out; a combination that two grids name is one cell."""
    grids = list(_tables_of(content, "grid")) or [({}, "grid")]
    found: dict[Cell, None] = {}
    for grid, where in grids:
        _only_known(grid, ("data", "attack", "victim", "defence", "seeds"), where)
        chosen = []
        for axis, items in axes.items():
            wanted = _names(grid[axis], f"{where}.{axis}") if axis in grid else None
            for name in wanted or ():
                if name not in items and name not in {item.family for item in items.values()}:
                    raise ConfigError(f"{where}.{axis}: unknown {name!r}{nearest(name, items)}")
            chosen.append(
                [n for n, item in items.items() if wanted is None or n in wanted or item.family in wanted]
            )
        grid_seeds = _typed(grid.get("seeds", list(seeds)), tuple[int, ...], f"{where}.seeds")
        if not set(grid_seeds) <= set(seeds):
            raise ConfigError(f"{where}.seeds: expected some of {list(seeds)}, got {list(grid_seeds)}")
        data, attacks, victims, defences = chosen
        # Seeds before victims and defences: one poisoned set at a time.
        for one, attack, seed, victim, defence in product(data, attacks, grid_seeds, victims, defences):
            found[Cell(one, attack, victim, defence, seed)] = None
    return tuple(found)


def _table(entry: dict[str, Any], where: str, axes: Mapping[str, Mapping[str, Item]]) -> Table:
    _only_known(entry, ("title", "rows", "columns", "where"), where)
    rows = _names(entry.get("rows"), f"{where}.rows")
    for key in rows:
        _check_key(key, axes, f"{where}.rows")
    return Table(
        title=_typed(entry.get("title", ""), str, f"{where}.title"),
        rows=rows,
        columns=tuple(_measure(text, where) for text in _names(entry.get("columns"), f"{where}.columns")),
        where=_where(entry, where, axes),
    )


def _plot(entry: dict[str, Any], where: str, axes: Mapping[str, Mapping[str, Item]]) -> Plot:
    _only_known(entry, ("title", "x", "y", "lines", "panels", "where", "log"), where)
    x = _typed(entry.get("x"), str, f"{where}.x")
    if x not in ("k", "false_positive_rate"):
        if "." not in x:
            raise ConfigError(
                f"{where}.x = {x!r}: expected k, false_positive_rate or a setting such as defence.window"
            )
        _check_key(x, axes, f"{where}.x")
    curve = x in ("k", "false_positive_rate")
    measures = tuple(
        _measure(text, where, whole_curve=curve) for text in _names(entry.get("y"), f"{where}.y")
    )
    parts = {}
    for key in ("lines", "panels"):
        parts[key] = _names(entry.get(key, ["defence.family"] if key == "lines" else []), f"{where}.{key}")
        for name in parts[key]:
            _check_key(name, axes, f"{where}.{key}")
    return Plot(
        title=_typed(entry.get("title", ""), str, f"{where}.title"),
        x=x,
        y=measures,
        lines=parts["lines"],
        panels=parts["panels"],
        where=_where(entry, where, axes),
        log=_typed(entry.get("log", curve), bool, f"{where}.log"),
    )


def _published(entry: dict[str, Any], where: str, axes: Mapping[str, Mapping[str, Item]]) -> Published:
    _only_known(entry, ("where", "values", "source"), where)
    values = _typed(entry.get("values"), dict[str, float], f"{where}.values")
    values = {_measure(name, f"{where}.values").key: value for name, value in values.items()}
    if not values:
        raise ConfigError(f"{where}.values: expected figures by measure, got none")
    return Published(
        where=_where(entry, where, axes),
        values=values,
        source=_typed(entry.get("source"), str, f"{where}.source"),
    )


def _left_out(entry: dict[str, Any], where: str) -> tuple[str, str]:
    _only_known(entry, ("what", "reason"), where)
    return _typed(entry.get("what"), str, f"{where}.what"), _typed(
        entry.get("reason"), str, f"{where}.reason"
    )


def _where(
    entry: dict[str, Any], where: str, axes: Mapping[str, Mapping[str, Item]]
) -> dict[str, tuple[Any, ...]]:
    given = entry.get("where", {})
    if not isinstance(given, dict):
        raise ConfigError(f"{where}.where: expected a table of axes, got {_shown(given)}")
    chosen: dict[str, tuple[Any, ...]] = {}
    for key, value in given.items():
        _check_key(key, axes, f"{where}.where")
        chosen[key] = tuple(value) if isinstance(value, list) else (value,)
        if key in axes:
            known = {*axes[key], *(item.family for item in axes[key].values())}
            for name in chosen[key]:
                if name not in known:
                    raise ConfigError(
                        f"{where}.where.{key}: unknown {name!r}{nearest(str(name), sorted(known))}"
                    )
    return chosen


def _check_key(key: str, axes: Mapping[str, Mapping[str, Item]], where: str) -> None:
    axis, dot, setting = key.partition(".")
    if axis not in AXES:
        raise ConfigError(f"{where}: unknown axis {axis!r}{nearest(axis, AXES)}")
    if dot and setting != "family":
        if axis not in axes:
            raise ConfigError(f"{where}: the axis {axis!r} has no settings; drop .{setting}")
        known = _setting_names(axis)
        if setting not in known:
            raise ConfigError(f"{where}: unknown setting {key!r}{nearest(setting, known)}")


_OWN_OF_DEFENCE = ("kind", "retrain", "i_cutmix")


def _setting_names(axis: str) -> list[str]:
    if axis == "defence":
        names = (entry.name for config in (ScanConfig, DistillConfig) for entry in fields(config))
        return [*_OWN_OF_DEFENCE, *dict.fromkeys(names)]
    config: Any = {"data": DataConfig, "attack": AttackConfig, "victim": PretrainConfig}[axis]
    return [entry.name for entry in fields(config)]


def _default(axis: str, item: Item, setting: str) -> Any:
    holder = item.config
    if axis == "defence" and setting not in _OWN_OF_DEFENCE:
        holder = holder.distill or holder.scan
        return getattr(holder, setting, None)  # a student has no window, a scan no share
    return getattr(holder, setting)


def _tables_of(content: dict[str, Any], key: str) -> Iterator[tuple[dict[str, Any], str]]:
    entries = content.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{key}: expected tables [[{key}]], got {_shown(entries)}")
    for index, entry in enumerate(entries):
        yield entry, f"{key}[{index}]"


def _names(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    names: tuple[str, ...] = _typed(value, tuple[str, ...], where)
    return names


def _measure(text: str, where: str, *, whole_curve: bool = False) -> MeasureName:
    try:
        return read_measure(text, whole_curve=whole_curve)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _only_known(settings: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in settings:
        if key not in known:
            place = f"{where}.{key}" if where else key
            raise ConfigError(f"{place}: unknown setting{nearest(key, known)}")


def _configured(kind: type[_T], settings: Any, where: str) -> _T:
    """A config dataclass from a table: no unknown names, the right types, and the class's own checks."""
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: expected a table of settings, got {_shown(settings)}")
    _only_known(settings, [entry.name for entry in fields(kind)], where)  # type: ignore[arg-type]
    config: _T = _typed(settings, kind, where)
    return config


def _typed(value: Any, kind: Any, where: str) -> Any:
    """The value as that type; JSON's strict rules, so that neither "3" nor 3.5 becomes 3."""
    if value is None:
        raise ConfigError(f"{where}: is missing")
    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: expected numbers, texts, lists or tables, got {_shown(value)}"
        ) from error
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        place = ".".join([where, *(str(part) for part in first["loc"] if isinstance(part, str | int))])
        if isinstance(cause, ConfigError):
            raise ConfigError(f"{place}: {cause}") from error
        message = first["msg"][0].lower() + first["msg"][1:]
        raise ConfigError(f"{place}: {message}, got {_shown(first['input'])}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(_plain(entry) for entry in value)
    return (
        f"{value:g}"
        if isinstance(value, float)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
