"""Scan a folder of images with an encoder of your own, and list what should go.

    python examples/scan_a_folder.py [IMAGES]

Without IMAGES it makes a few hundred plain pictures first, so that there is something to scan. The encoder here is a
small random network: it stands for any torch module that turns normalised images into feature vectors.
"""

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import unpoison
from unpoison.runtime import seeded


def make_pictures(folder: Path, count: int = 300) -> Path:
    """Smooth random pictures, as files."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        corners = torch.randint(0, 256, (3, 3, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(corners.numpy()).resize((32, 32), Image.Resampling.BICUBIC).save(
            folder / f"{number:03d}.png"
        )
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(sys.argv[1]) if len(sys.argv) > 1 else make_pictures(Path(scratch))
        with seeded(0, "example"):
            network = nn.Sequential(
                nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            )  # fmt: skip
        preprocessing = unpoison.Preprocessing(geometry=unpoison.Geometry(size=32, resize=32))
        encoder = unpoison.Encoder(network, preprocessing, name="my network")
        result = unpoison.scan(images, encoder, seed=0)
        print(f"{result.verdict}: {len(result.flagged)} of {len(result.findings)} images flagged")
        print(result.to_pandas().nlargest(5, "poison_score")[["cluster", "poison_score", "flagged"]])


if __name__ == "__main__":
    main()
