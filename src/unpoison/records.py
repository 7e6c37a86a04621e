"""The nouns that travel between stages. All are frozen values; tensors live on the CPU unless said otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unpoison.errors import ShapeError

if TYPE_CHECKING:
    import pandas

__all__ = [
    "BenignPattern",
    "Box",
    "Clusters",
    "Cost",
    "Evidence",
    "Features",
    "Geometry",
    "ImageSet",
    "ScanResult",
    "Skipped",
    "StageCost",
    "TriggerFinding",
    "Verdict",
]

Verdict = Literal["poisoned", "no_evidence", "inconclusive"]


@dataclass(frozen=True)
class Skipped:
    """An image that could not be examined, and why; never the same as an innocent one."""

    id: str
    reason: str


@dataclass(frozen=True)
class StageCost:
    """Passes of one stage: as expected, and at the most."""

    name: str
    expected: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Encoder passes of a whole run; `stages` in the order in which they run."""

    stages: tuple[StageCost, ...]

    @property
    def expected(self) -> int:
        """Of all stages, as expected."""
        return sum(stage.expected for stage in self.stages)

    @property
    def most(self) -> int:
        """Of all stages; never exceeded."""
        return sum(stage.most for stage in self.stages)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; `x` and `y` are its left and top edge."""

    x: int
    y: int
    w: int
    h: int

    @property
    def area(self) -> int:
        """Number of pixels inside."""
        return self.w * self.h

    def intersection(self, other: Box) -> int:
        """Number of pixels that both rectangles hold."""
        width = min(self.x + self.w, other.x + other.w) - max(self.x, other.x)
        height = min(self.y + self.h, other.y + other.h) - max(self.y, other.y)
        return max(width, 0) * max(height, 0)


@dataclass(frozen=True)
class Geometry:
    """How an image of any size becomes a square: short side to `resize` pixels, then the central `size` pixels."""

    size: int
    resize: int
    interpolation: str = "bilinear"  # bilinear | bicubic

    def place(self, box: Box, width: int, height: int) -> Box:
        """Where a box of a `width` × `height` original lies in the square, clipped to it (may be empty)."""
        scale = self.resize / min(width, height)
        left = (round(width * scale) - self.size) // 2
        top = (round(height * scale) - self.size) // 2
        x0, x1 = (min(max(round(v * scale) - left, 0), self.size) for v in (box.x, box.x + box.w))
        y0, y1 = (min(max(round(v * scale) - top, 0), self.size) for v in (box.y, box.y + box.h))
        return Box(x0, y0, x1 - x0, y1 - y0)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images decoded once, at one size, in the order of their ids.

    Attributes:
        ids: one per image: stable, unique, shown in every output.
        pixels: (N, 3, S, S) uint8, RGB; channels-last in memory; may be a memory map.
        skipped: what the source named but could not be decoded; in no other field.
        fingerprint: hex digest of the ids and of the files' bytes, skipped ones included.
    """

    ids: tuple[str, ...]
    pixels: Tensor
    skipped: tuple[Skipped, ...] = ()
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 3 or self.pixels.dtype != torch.uint8:
            raise ShapeError(
                f"pixels must be (N, 3, H, W) uint8, got {tuple(self.pixels.shape)} {self.pixels.dtype}"
            )
        if len(self.ids) != len(self.pixels):
            raise ShapeError(f"{len(self.ids)} ids for {len(self.pixels)} images; there must be one each")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> int:
        """Side of the square images, in pixels."""
        return self.pixels.shape[-1]

    def select(self, rows: Sequence[int]) -> ImageSet:
        """The images of these rows, in this order; skipped ones are left behind."""
        index = torch.as_tensor(list(rows), dtype=torch.int64)
        pixels = self.pixels[index].contiguous(memory_format=torch.channels_last)
        return ImageSet(tuple(self.ids[i] for i in rows), pixels, (), self.fingerprint)


@dataclass(frozen=True, eq=False)
class Features:
    """What the encoder says of each image.

    Attributes:
        ids: in the order of the images.
        values: (N, D) float32, every row of unit length.
    """

    ids: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True, eq=False)
class Clusters:
    """Spherical k-means: unit centroids, and the nearest one of each image by cosine.

    Attributes:
        centroids: (K, D) float32, unit length.
        assignment: (N,) int64, in the order of the images.
    """

    centroids: Tensor
    assignment: Tensor


@dataclass(frozen=True, eq=False)
class TriggerFinding:
    """A patch that moves other images into one cluster, confirmed on images that the search never saw.

    Attributes:
        target_cluster: where most images go that carry the patch.
        target_clusters: all the clusters where they go; a trigger's poison often fills several.
        flip_rate: share of the confirmation images that the patch moves to one of these, [0, 1].
        control_rate: the same for the patch with its pixels shuffled in blocks, at the same places.
        p_value: of the confirmation, corrected for the number of finalists.
        n_sources: distinct images that carry the trigger.
        source_ids: those images, strongest first.
        boxes: where the patch lies in each of them, in encoder-input pixels.
        patches: (n_sources, 3, w, w) uint8, cut from them.
        image: path of the picture of the patches, relative to the run folder; empty until the run is saved.
    """

    target_cluster: int
    target_clusters: tuple[int, ...]
    flip_rate: float
    control_rate: float
    p_value: float
    n_sources: int
    source_ids: tuple[str, ...]
    boxes: tuple[Box, ...]
    patches: Tensor
    image: str = ""


@dataclass(frozen=True, eq=False)
class BenignPattern:
    """The same pixels in several images, which are no attack: a watermark, a logo, a frame. No alarm.

    Attributes:
        flip_rate: share of the search's flip images that the patches bring to the cluster that gains most, [0, 1]; of a
            pattern that steers, share of the confirmation half that it moves.
        control_rate: the same of their shuffled pixels.
        steers: whether the encoder obeys it; it lies on images of all kinds then, and is aimed at none.
        concentration: of a pattern that steers, how much more often two of its images share a group of clusters once it
            is hidden than two other images do; about 1, or it would be an attack. None where too few are left to tell.
        n_sources: distinct images among the scored ones that carry it; there may be more.
        source_ids: those images.
        boxes: where the patch lies in each of them, in encoder-input pixels.
        patches: (n_sources, 3, w, w) uint8, cut from them.
        image: path of the picture of the patches, relative to the run folder; empty until the run is saved.
    """

    flip_rate: float
    control_rate: float
    steers: bool
    concentration: float | None
    n_sources: int
    source_ids: tuple[str, ...]
    boxes: tuple[Box, ...]
    patches: Tensor
    image: str = ""


@dataclass(frozen=True, eq=False)
class Evidence:
    """The pictures that a report shows: the highest-scored images with what the search saw in them.

    Attributes:
        ids: (E) ids, highest score first.
        pixels: (E, 3, S, S) uint8.
        attention: (E, S, S) float32 in [0, 1], each map scaled to its own maximum.
    """

    ids: tuple[str, ...]
    pixels: Tensor
    attention: Tensor


@dataclass(frozen=True, eq=False)
class ScanResult:
    """What a scan says.

    Attributes:
        verdict: `poisoned`, `no_evidence` or `inconclusive`.
        findings: one row per image that the source named, in the order of ids; columns as in findings.parquet.
        triggers: the confirmed ones, strongest first; empty unless the verdict is `poisoned`.
        evidence: pictures for the report.
        summary: the content of verdict.json.
        benign_patterns: what recurs and is no attack: first what the encoder obeys all the same, then the most
            frequent. No alarm.
    """

    verdict: Verdict
    findings: pandas.DataFrame
    triggers: tuple[TriggerFinding, ...]
    evidence: Evidence
    summary: dict[str, Any]
    benign_patterns: tuple[BenignPattern, ...] = ()

    @property
    def flagged(self) -> tuple[str, ...]:
        """Ids of the images to remove."""
        return tuple(self.findings.loc[self.findings["flagged"], "id"])

    def to_pandas(self) -> pandas.DataFrame:
        """The findings, indexed by image id."""
        return self.findings.set_index("id")
