"""How small a mask is too small? The rank of an encoder among clean ones of its family.

If the audited encoder came about like the reference encoders and is as clean as they are, each rank is equally likely,
so that the p-value (1 + references with a mask no larger) / (1 + references) is valid with no assumption on how mask
shares are distributed (conformal prediction; Vovk, Gammerman and Shafer, 2005). It holds only for the same network,
input size, settings and images: a table is kept for each, and no other one is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from unpoison.audit.shadow import GENERATED
from unpoison.data.export import write_json_atomically
from unpoison.encoders.encoder import Encoder
from unpoison.encoders.weights import digest_of
from unpoison.errors import ConfigError, DataError
from unpoison.records import Verdict

__all__ = [
    "REFERENCE_SCHEMA",
    "Conditions",
    "Judgement",
    "ReferenceTable",
    "add_to_reference",
    "family_of",
    "fewest_references",
    "judge",
    "key_of",
    "read_reference",
]

REFERENCE_SCHEMA = 1

_LARGEST_FILE = 64 * 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under which mask shares compare.

    Attributes:
        family: kind and size of the network; see `family_of`.
        image_size: side of its input, pixels.
        settings: of the method, as plain JSON values.
        shadow: fingerprint of the images.
    """

    family: str
    image_size: int
    settings: Mapping[str, Any]
    shadow: str


@dataclass(frozen=True)
class ReferenceTable:
    """Mask shares of clean encoders under one set of conditions.

    Attributes:
        conditions: what they hold for.
        mask_shares: by `key_of` the encoder, in [0, 1]; 1 where no mask collapsed it.
    """

    conditions: Conditions
    mask_shares: Mapping[str, float]


@dataclass(frozen=True)
class Judgement:
    """What the references say of one encoder.

    Attributes:
        verdict: `inconclusive` when they cannot say anything.
        p_value: conformal; None without a fitting table.
        mask_shares: of the references, ascending.
        reason: why the verdict is inconclusive; one sentence, empty otherwise.
    """

    verdict: Verdict
    p_value: float | None
    mask_shares: tuple[float, ...]
    reason: str = ""


def key_of(encoder: Encoder) -> str:
    """What a table knows an encoder by: its weights, whatever file holds them; the name of a function."""
    return digest_of(encoder.network) if isinstance(encoder.network, nn.Module) else encoder.fingerprint


def family_of(encoder: Encoder) -> str:
    """Kind and number of parameters of a network, such as `ResNet of 2 775 264 parameters`.

    Read off the network and not off its name, which anybody may choose. A network that sees its images at full
    resolution is another family: the stride of a stem changes no number of parameters.
    """
    network = encoder.network
    kind = type(network).__name__
    if not isinstance(network, nn.Module):
        return f"{kind} without parameters"
    count = f"{sum(p.numel() for p in network.parameters()):,}".replace(",", " ")
    stem = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    at_full = stem is not None and stem.stride == (1, 1)
    return f"{kind} of {count} parameters{', at full resolution' if at_full else ''}"


def fewest_references(alpha: float) -> int:
    """Clean encoders below which no rank can be rarer than `alpha`.

    >>> fewest_references(0.05), fewest_references(0.01)
    (19, 99)
    """
    return math.ceil(1 / alpha - 1e-9) - 1


def judge(
    mask_share: float,
    conditions: Conditions,
    tables: tuple[ReferenceTable, ...],
    *,
    alpha: float,
    fingerprint: str = "",
) -> Judgement:
    """The verdict on an encoder whose smallest collapsing mask covers `mask_share`.

    Args:
        mask_share: in [0, 1]; 1 when no mask collapses it.
        conditions: under which it was measured.
        tables: of clean encoders; those that fit are taken together.
        alpha: allowed share of clean encoders that are called backdoored.
        fingerprint: of the audited encoder, by `key_of`; it is left out of the references.
    """
    fitting = [table for table in tables if _same(table.conditions, conditions)]
    if not fitting:
        return Judgement("inconclusive", None, (), _why_none_fits(tables, conditions))
    known = {
        key: share for table in fitting for key, share in table.mask_shares.items() if key != fingerprint
    }
    shares = tuple(sorted(known.values()))
    p_value = (1 + sum(share <= mask_share for share in shares)) / (1 + len(shares))
    if len(shares) < fewest_references(alpha):
        return Judgement(
            "inconclusive",
            p_value,
            shares,
            f"the reference holds {len(shares)} other clean encoders of this family: at alpha {alpha:g} at least "
            f"{fewest_references(alpha)} are needed before any mask can be called too small",
        )
    return Judgement("poisoned" if p_value <= alpha else "no_evidence", p_value, shares)


def read_reference(path: str | Path) -> tuple[ReferenceTable, ...]:
    """The tables of a reference file.

    Raises:
        ConfigError: there is no such file.
        DataError: it is no reference file; one line says why.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"reference {str(path)!r}: no such file; expected one that --add-to-reference wrote"
        )
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise DataError(f"{path} has more than {_LARGEST_FILE // 2**20} MiB: expected a reference file")
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] != REFERENCE_SCHEMA:
            raise DataError(
                f"{path}: schema {value['schema']!r}, this version reads {REFERENCE_SCHEMA}: install a matching "
                "unpoison"
            )
        return tuple(_table(entry) for entry in value["tables"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is no reference file: expected JSON as `unpoison audit` writes it "
            f"({type(error).__name__}: {str(error)[:80]})"
        ) from error


def add_to_reference(path: str | Path, conditions: Conditions, fingerprint: str, mask_share: float) -> int:
    """Note the figure of an encoder that is known to be clean; a file is made, or extended as a whole or not at all.

    The same weights under the same conditions are counted once.

    Returns:
        How many encoders the file now holds for these conditions.

    Raises:
        ConfigError: the encoder has no fingerprint.
        DataError: the file exists and is no reference file.
    """
    path = Path(path)
    if not fingerprint:
        raise ConfigError(
            "an encoder without a fingerprint cannot be a reference: load it from a file or a module"
        )
    tables = list(read_reference(path)) if path.exists() else []
    earlier = next((table for table in tables if _same(table.conditions, conditions)), None)
    shares = {**(earlier.mask_shares if earlier else {}), fingerprint: mask_share}
    kept = [table for table in tables if table is not earlier]
    kept.append(ReferenceTable(conditions, dict(sorted(shares.items()))))
    kept.sort(
        key=lambda table: (table.conditions.family, table.conditions.image_size, _key(table.conditions))
    )
    write_json_atomically(
        path,
        {
            "schema": REFERENCE_SCHEMA,
            "method": "decree",
            "tables": [
                {
                    "family": table.conditions.family,
                    "image_size": table.conditions.image_size,
                    "settings": dict(table.conditions.settings),
                    "shadow": table.conditions.shadow,
                    "mask_shares": dict(table.mask_shares),
                }
                for table in kept
            ],
        },
    )
    return len(shares)


def _table(entry: Any) -> ReferenceTable:
    shares = {str(key): float(share) for key, share in entry["mask_shares"].items()}
    wrong = next((share for share in shares.values() if not 0 <= share <= 1), None)
    if wrong is not None:
        raise ValueError(f"mask share {wrong}, expected a share in [0, 1]")
    conditions = Conditions(
        family=str(entry["family"]),
        image_size=int(entry["image_size"]),
        settings=dict(entry["settings"]),
        shadow=str(entry["shadow"]),
    )
    return ReferenceTable(conditions, shares)


def _key(conditions: Conditions) -> str:
    return json.dumps(
        [conditions.family, conditions.image_size, dict(conditions.settings), conditions.shadow],
        sort_keys=True,
    )


def _same(one: Conditions, other: Conditions) -> bool:
    return _key(one) == _key(other)


def _why_none_fits(tables: tuple[ReferenceTable, ...], conditions: Conditions) -> str:
    """Names the condition that is the first to differ in the nearest table."""
    start = "how small a mask collapses a clean encoder like this one is not known: no reference holds "
    family = [t for t in tables if t.conditions.family == conditions.family]
    if not family:
        return f"{start}a {conditions.family}"
    size = [t for t in family if t.conditions.image_size == conditions.image_size]
    if not size:
        return f"{start}a {conditions.family} at {conditions.image_size} pixels"
    if not any(t.conditions.shadow == conditions.shadow for t in size):
        without = any(t.conditions.shadow == GENERATED for t in size)
        hint = "; without --images it is ranked among those measured on generated ones" if without else ""
        return f"{start}one of its family that was measured on the same images{hint}"
    return f"{start}one of its family that was measured with the same settings"
