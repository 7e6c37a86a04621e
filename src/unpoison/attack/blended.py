"""Two older triggers that cover the whole image: a picture mixed in, and waves of brightness.

What they plant: on a share of the images of a target class, either a mixture with one fixed picture (blended), or
brightness that swings from left to right (SIG). No label is changed.
What they assume: as `attack.ctrl`. Both were made for supervised training; crops show only a part of what they plant.

Papers: Chen, Liu, Li, Lu, Song: Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning, 2017.
Barni, Kallas, Tondi: A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning, ICIP 2019.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from unpoison.attack.ctrl import added_waves
from unpoison.attack.plan import Trigger
from unpoison.attack.ssl_backdoor import check_rate, class_index, read_pattern
from unpoison.errors import ConfigError
from unpoison.runtime import stage_generator

__all__ = ["BlendedConfig", "SigConfig"]

_NOISE_SIDE = 32  # pixels of a drawn picture
_SEED = re.compile(r"seed:(\d+)\Z")


@dataclass(frozen=True, kw_only=True)
class BlendedConfig:
    """Settings of the blended trigger; give them to `poison` or `write_poisoned_copy` of `attack.ssl_backdoor`.

    Attributes:
        target: class name or class index.
        trigger: the picture to mix in: `seed:N` (32×32 pixels of random colours) or the path of an image; stretched to
            each image's size.
        share: of the picture in the mixture, (0, 1).
        rate: as in `CtrlConfig`.
        rate_of: as in `CtrlConfig`.
        everywhere: as in `CtrlConfig`.
    """

    target: str | int
    trigger: str = "seed:0"
    share: float = 0.2
    rate: float = 0.01
    rate_of: str = "dataset"
    everywhere: bool = False

    method: ClassVar[str] = "blended"
    of_target: ClassVar[bool] = True
    margin: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"share={self.share}: expected the picture's share of the mixture, in (0, 1)")
        check_rate(self.rate, self.rate_of)

    def make_triggers(self, class_names: Sequence[str]) -> tuple[Trigger, ...]:
        """The trigger with its picture.

        Raises:
            ConfigError: an unknown target, or a trigger that is neither `seed:N` nor a file.
            DataError: a trigger file cannot be decoded.
        """
        drawn = _SEED.match(self.trigger)
        pattern = _noise(int(drawn[1])) if drawn else read_pattern(self.trigger)
        name = self.trigger if drawn else Path(self.trigger).name
        index = class_index(self.target, class_names)
        return (Trigger(pattern, name, index, class_names[index], kind="blended", strength=self.share),)


@dataclass(frozen=True, kw_only=True)
class SigConfig:
    """Settings of SIG, six waves across the image; give them to `poison` or `write_poisoned_copy`.

    Attributes:
        target: class name or class index.
        amplitude: of the waves, grey levels, (0, 128].
        rate: as in `CtrlConfig`.
        rate_of: as in `CtrlConfig`.
        everywhere: as in `CtrlConfig`.
    """

    target: str | int
    amplitude: float = 20.0
    rate: float = 0.01
    rate_of: str = "dataset"
    everywhere: bool = False

    method: ClassVar[str] = "sig"
    of_target: ClassVar[bool] = True
    margin: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.amplitude <= 128:
            raise ConfigError(f"amplitude={self.amplitude}: expected grey levels in (0, 128]")
        check_rate(self.rate, self.rate_of)

    def make_triggers(self, class_names: Sequence[str]) -> tuple[Trigger, ...]:
        """The trigger; its pattern shows the waves on grey, for people.

        Raises:
            ConfigError: an unknown target.
        """
        index = class_index(self.target, class_names)
        return (added_waves("sig", self.amplitude, index, class_names[index]),)


def _noise(seed: int) -> Tensor:
    generator = stage_generator(seed, "attack/blended")
    return torch.randint(256, (3, _NOISE_SIDE, _NOISE_SIDE), generator=generator, dtype=torch.uint8)
