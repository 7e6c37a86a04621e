"""What a cell measures, under one name each: in task files, in results and in the heads of tables."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from unpoison.errors import ConfigError

__all__ = ["FALSE_POSITIVE_RATES", "MEASURES", "TOP", "Measure", "MeasureName", "nearest", "read_measure"]

TOP = (5, 10, 20, 50, 100, 200, 500)
"""The k of every measure of a scan's k highest-scored images."""

FALSE_POSITIVE_RATES = (
    0.0,
    0.0001,
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
)
"""Where the ROC of the filter is read off."""


@dataclass(frozen=True)
class Measure:
    """One thing that is measured.

    Attributes:
        title: head of its column.
        unit: `%`, `share` in [0, 1], `images`, `passes` or `triggers`.
        of: `probe` (once per probe and trigger), `scan`, `top` (once per k) or `roc` (once per false-positive rate).
        digits: after the decimal point, in tables.
        means: its definition.
    """

    title: str
    unit: str
    of: str
    digits: int
    means: str


MEASURES = {
    "accuracy": Measure("ACC clean", "%", "probe", 1, "clean test images classified rightly"),
    "patched_accuracy": Measure("ACC patched", "%", "probe", 1, "test images with the trigger, all classes"),
    "attack_success": Measure(
        "ASR", "%", "probe", 1, "images of other classes that carry the trigger and are taken for the target"
    ),
    "untriggered_rate": Measure("ASR untriggered", "%", "probe", 1, "the same images without the trigger"),
    "false_positives": Measure("FP patched", "images", "probe", 0, "the images behind ASR"),
    "untriggered_false_positives": Measure("FP clean", "images", "probe", 0, "those behind ASR untriggered"),
    "removed": Measure("removed", "images", "scan", 0, "flagged, hence taken away"),
    "planted": Measure("planted", "images", "scan", 0, "poisoned images in the training set"),
    "recall": Measure("recall", "%", "scan", 1, "poisoned images that are flagged"),
    "precision": Measure("precision", "%", "scan", 1, "flagged images that are poisoned"),
    "f1": Measure("F1", "%", "scan", 1, "harmonic mean of recall and precision"),
    "trigger_recall": Measure("recall per trigger", "%", "scan", 1, "recall of the images of each trigger"),
    "trigger_findings": Measure(
        "findings per trigger", "findings", "scan", 1, "those most of whose sources carry this trigger"
    ),
    "trigger_listed": Measure(
        "listed rightly", "%", "scan", 1, "of its flagged images, those on the list of such a finding"
    ),
    "said_poisoned": Measure("verdict poisoned", "%", "scan", 0, "scans with the verdict `poisoned`"),
    "triggers_found": Measure("triggers found", "triggers", "scan", 1, "confirmed findings of the scan"),
    "scored": Measure("scored", "images", "scan", 0, "examined one by one"),
    "scored_poisoned": Measure("scored poison", "images", "scan", 0, "poisoned images among those"),
    "encoder_passes": Measure("passes", "passes", "scan", 0, "images shown to the encoder by the scan"),
    "score_auc": Measure(
        "AUC of scores", "share", "scan", 3, "ROC area of the poison score, scored images only"
    ),
    "filter_auc": Measure(
        "AUC of filter", "share", "scan", 3, "ROC area of the poison probability, all images"
    ),
    "top_accuracy": Measure(
        "top-{at} accuracy", "%", "top", 1, "of the k highest-scored images, those poisoned"
    ),
    "window_accuracy": Measure(
        "top-{at} windows", "%", "top", 1, "of their windows, those that touch a trigger"
    ),
    "iou": Measure("IoU@{at}", "share", "top", 2, "overlap of window and trigger, poisoned ones of the k"),
    "catch_rate": Measure("CR@{at}", "share", "top", 2, "share of the trigger inside the window, likewise"),
    "true_positive_rate": Measure(
        "TPR at FPR {at}", "%", "roc", 1, "poison that the filter finds at this cost"
    ),
}

PROBES = ("linear", "knn")
_NAME = re.compile(r"(?:(?P<probe>\w+)\.)?(?P<measure>\w+)(?:@(?P<at>[\d.]+))?\Z")


@dataclass(frozen=True)
class MeasureName:
    """A measure with its probe, and its k or false-positive rate; None where it has none, or all are meant."""

    measure: str
    probe: str | None
    at: float | None

    @property
    def title(self) -> str:
        """Head of a column."""
        title = MEASURES[self.measure].title
        if self.at is not None:
            title = title.replace("{at}", f"{self.at:g}")
        return f"{title} (kNN)" if self.probe == "knn" else title

    @property
    def key(self) -> str:
        """The name as a file would spell it; the linear probe is meant where none is named."""
        probe = "knn." if self.probe == "knn" else ""
        return f"{probe}{self.measure}" + ("" if self.at is None else f"@{self.at:g}")


def read_measure(text: str, *, whole_curve: bool = False) -> MeasureName:
    """The measure that a task file names: `recall`, `knn.accuracy`, `top_accuracy@20`, `true_positive_rate@0.01`.

    Args:
        text: what the file says.
        whole_curve: `@` may be missing where a measure has one value per k; all of them are meant.

    Raises:
        ConfigError: an unknown name, or `@` missing or of no use.

    >>> read_measure("knn.accuracy").title, read_measure("top_accuracy@20").title
    ('ACC clean (kNN)', 'top-20 accuracy')
    """
    match = _NAME.match(text)
    if not match or match["measure"] not in MEASURES:
        raise ConfigError(f"unknown measure {text!r}{nearest(match['measure'] if match else text, MEASURES)}")
    measure = MEASURES[match["measure"]]
    probe = match["probe"]
    if probe is not None and (measure.of != "probe" or probe not in PROBES):
        raise ConfigError(
            f"measure {text!r}: expected linear or knn before the dot, of a measure of an encoder"
        )
    known = {"top": TOP, "roc": FALSE_POSITIVE_RATES}.get(measure.of)
    at = None if match["at"] is None else float(match["at"])
    if known is None and at is not None:
        raise ConfigError(f"measure {text!r}: it has one value only; drop the @")
    if known is not None and at not in known and not (at is None and whole_curve):
        raise ConfigError(
            f"measure {text!r}: expected @ and one of {', '.join(f'{value:g}' for value in known)}"
        )
    return MeasureName(match["measure"], (probe or "linear") if measure.of == "probe" else None, at)


def nearest(name: str, known: Iterable[str]) -> str:
    """What to add to a complaint about an unknown name: the most similar known one, or all of them.

    >>> nearest("widnow", ["window", "masks"])
    "; did you mean 'window'?"
    >>> nearest("zzz", ["a", "b"])
    '; expected one of a, b'
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}"
