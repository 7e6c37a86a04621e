"""An encoder: network, preprocessing and feature layer as one inseparable value."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from unpoison.encoders.weights import digest_of
from unpoison.errors import ConfigError, ShapeError
from unpoison.functional.colours import standardise
from unpoison.records import Geometry
from unpoison.runtime import autocast, choose_device, choose_precision

__all__ = ["Encoder", "Preprocessing"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What happens to a picture before the network sees it.

    Attributes:
        geometry: how any picture becomes a square.
        mean, std: per channel, for values in [0, 1].
        assumed: True when mean, std or size had to be guessed; the verdict then says so.
    """

    geometry: Geometry
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    assumed: bool = False

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise ConfigError(f"std={self.std}: expected three positive numbers for values in [0, 1]")
        if max(self.mean) > 1 or min(self.mean) < 0:
            raise ConfigError(f"mean={self.mean}: expected three numbers in [0, 1]; divide by 255")


class Encoder:
    """Images to features: a frozen network in evaluation mode with its own preprocessing.

    It owns normalisation: everything outside handles uint8 pixels, or floats in [0, 1]. It counts the images it
    was shown, which is the unit in which the cost of every method is stated. A batch that does not fit the device's
    memory is halved, and so are all that follow: `largest_batch` is None until then.

    Args:
        network: any module from (N, 3, S, S) normalised float images to (N, D) features. It is put in evaluation
            mode, its gradients are switched off, and it is moved to `device`.
        preprocessing: see `Preprocessing`.
        name: shown in reports.
        device, precision: see `runtime.choose_device` and `runtime.choose_precision`.
        fingerprint: hex digest of the weights: of their file, or of what the module holds in memory. Of a function it
            is what the caller names it by; without a name no kept run and no kept detector fits it.
        captioned: whether it learned from images with captions. Then an attack's images may be of any kind, since
            their captions say what they are to be taken for; a scan does not ask for one kind (`scan.aim`).
    """

    def __init__(
        self,
        network: nn.Module | Callable[[Tensor], Tensor],
        preprocessing: Preprocessing,
        *,
        name: str = "encoder",
        device: str | torch.device = "auto",
        precision: str = "auto",
        fingerprint: str = "",
        captioned: bool = False,
    ) -> None:
        self.device = choose_device(device) if isinstance(device, str) else device
        self.precision = choose_precision(precision, self.device)
        self.preprocessing = preprocessing
        self.name = name
        self._fingerprint = fingerprint
        self.captioned = captioned
        self.images_shown = 0
        self.largest_batch: int | None = None
        self.network = network
        self._compiled: Callable[[Tensor], Tensor] | None = None
        if isinstance(network, nn.Module):
            network.eval().requires_grad_(False).to(self.device)
            if any(p.ndim == 4 for p in network.parameters()):
                network.to(memory_format=torch.channels_last)
        self._mean = torch.tensor(preprocessing.mean, device=self.device)
        self._std = torch.tensor(preprocessing.std, device=self.device)

    @property
    def fingerprint(self) -> str:
        """See the class; empty for a function that has no name."""
        if self._fingerprint or not isinstance(self.network, nn.Module):
            return self._fingerprint
        return digest_of(self.network)

    def identity(self) -> dict[str, str]:
        """What a kept run knows the encoder by; a function without a name is never known again."""
        weights = self.fingerprint or f"a function without a fingerprint, {secrets.token_hex(8)}"
        return {"name": self.name, "weights": weights}

    def compile(self) -> Encoder:
        """Run the network through `torch.compile` from now on: faster after half a minute or more, so for long scans.

        Values differ from those of the plain network as much as another device's would. Where the compiler fails, for
        want of a C++ compiler for one, the plain network goes on after a warning.

        Returns:
            This encoder.

        Raises:
            ConfigError: it is a function and no module.
        """
        if not isinstance(self.network, nn.Module):
            raise ConfigError("only an nn.Module can be compiled; leave compile out")
        self._compiled = cast(Callable[[Tensor], Tensor], torch.compile(self.network))
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """uint8, or float in [0, 1], (N, 3, S, S) on any device, to what the network takes."""
        return standardise(images.to(self.device), self._mean, self._std)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            images: (N, 3, S, S) uint8, or float in [0, 1], S = `preprocessing.geometry.size`.

        Returns:
            (N, D) float32 on the encoder's device, as the network gives them (not normalised).

        Raises:
            ShapeError: the images have another shape, or the network gives no feature vector per image.
        """
        size = self.preprocessing.geometry.size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ShapeError(f"images must be (N, 3, {size}, {size}), got {tuple(images.shape)}")
        self.images_shown += len(images)
        output = self.fitting(self._run, images)
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(
                f"the encoder must give one feature vector per image, ({len(images)}, D), got {got}; "
                "pass the pooled output of the network"
            )
        return output.float()

    def fitting(self, run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """What `run` gives for images, in batches that fit the device's memory: each failure halves them for good.

        Args:
            run: (M, 3, S, S) to a tensor with a row per image, whatever else is in the batch.
            images: (N, 3, S, S).

        Raises:
            torch.OutOfMemoryError: a single image is too much.
        """
        largest = self.largest_batch or len(images)
        if len(images) > largest:
            return torch.cat([self.fitting(run, part) for part in torch.split(images, largest)])
        try:
            return run(images)
        except torch.OutOfMemoryError:
            if len(images) <= 1:
                raise
            self.largest_batch = len(images) // 2
        # Outside the handler, since the traceback there still holds what did not fit.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.fitting(run, images)

    def _run(self, images: Tensor) -> Tensor:
        """The network's output; without its compiled form from the first time on that this fails."""
        try:
            with autocast(self.device, self.precision):
                network = self.network if self._compiled is None else self._compiled
                return network(self.normalise(images))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Compilers fail in too many ways to be named; what is wrong with the images fails again below.
            if self._compiled is None:
                raise
            first = str(error).strip().split("\n")[0]
            warnings.warn(f"torch.compile failed, the plain network goes on: {first}", stacklevel=2)
            self._compiled = None
        return self._run(images)
