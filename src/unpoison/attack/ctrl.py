"""CTRL: faint waves in the chroma of a whole image, invisible and everywhere, poison whoever trains without labels.

What it plants: on a share of the images of a target class, 100 is added to two cosine coefficients of U and V in every
block of 32 pixels. No label is changed; an encoder ties the waves to the class by itself.
What it assumes: the attacker gets images into the training set, knows which of them show the target class, and nobody
scales or compresses them before training.
What it leaves behind: chroma that no camera makes; `scan.spectral_dct` finds it without any encoder.

Paper: Li, Pang, Xi, Du, Ji, Yao, Wang: An Embarrassingly Simple Backdoor Attack on Self-supervised Learning, ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from unpoison.attack.plan import Trigger
from unpoison.attack.ssl_backdoor import check_rate, class_index
from unpoison.errors import ConfigError
from unpoison.functional.global_triggers import CTRL_BLOCK, global_change

__all__ = ["CtrlConfig", "added_waves"]


@dataclass(frozen=True, kw_only=True)
class CtrlConfig:
    """Settings of CTRL; give them to `poison` or `write_poisoned_copy` of `attack.ssl_backdoor`.

    Attributes:
        target: class name or class index.
        magnitude: added to each of the two coefficients of U and V; the release uses 100, which is 4.4 grey levels of
            root mean square.
        rate: how much is poisoned, a fraction in (0, 1].
        rate_of: what `rate` is a fraction of: the target `class` (readable images), or the whole `dataset`.
        everywhere: change every image of every class, for test splits; `rate` then means nothing.
    """

    target: str | int
    magnitude: float = 100.0
    rate: float = 0.01
    rate_of: str = "dataset"
    everywhere: bool = False

    method: ClassVar[str] = "ctrl"
    of_target: ClassVar[bool] = True
    margin: ClassVar[float] = 0.0  # nothing to keep free: the trigger is everywhere

    def __post_init__(self) -> None:
        if not 0 < self.magnitude <= 1000:
            raise ConfigError(f"magnitude={self.magnitude}: expected a number in (0, 1000], such as 100")
        check_rate(self.rate, self.rate_of)

    def make_triggers(self, class_names: Sequence[str]) -> tuple[Trigger, ...]:
        """The trigger; its pattern shows one block on grey, for people.

        Raises:
            ConfigError: an unknown target.
        """
        index = class_index(self.target, class_names)
        return (added_waves("ctrl", self.magnitude, index, class_names[index]),)


def added_waves(kind: str, strength: float, target: int, target_name: str) -> Trigger:
    """A trigger that adds to an image; its pattern is what it adds to 32×32 pixels of grey.

    Args:
        kind: `ctrl` or `sig`.
        strength: as in `functional.global_triggers.global_change`.
        target: class index.
        target_name: its name.
    """
    nothing = torch.zeros(3, 1, 1, dtype=torch.uint8)
    _, added = global_change(kind, strength, nothing, CTRL_BLOCK, CTRL_BLOCK)
    shown = (128 + added).round().clamp(0, 255).to(torch.uint8)
    return Trigger(shown, f"{kind}:{strength:g}", target, target_name, kind=kind, strength=strength)
