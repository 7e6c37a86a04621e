"""Does the block-DCT screen find CTRL's waves? By magnitude, on CIFAR-10 and Tiny-ImageNet; no encoder is needed.

One per cent of the images carries the trigger. `poison first`: AUROC of the poisoned images within the set itself.
`held out`: a detector fitted on one quarter (with all of the poison), calibrated on another, judges the other half,
with and without the trigger. The waves are added to decoded images; compression afterwards would thin them out.

    python benchmarks/spectral_dct.py --seeds 0 1 2 --threads 1
"""

import sys

import common
import torch

from unpoison.functional.global_triggers import apply_global
from unpoison.scan.detector import fit_detector
from unpoison.scan.spectral_dct import fit_spectral_dct

RATE = 0.01
MAGNITUDES = (100.0, 50.0, 25.0)
DATA = {
    "CIFAR-10": common.Data(folder="cifar10", size=32, classes=10, train=0, test=300),
    "Tiny-ImageNet": common.Data(
        folder="tinyimagenet100", size=64, classes=10, train=0, test=50, held_out="val"
    ),
}


def measure(data, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = common.load_split(data, "test").images.pixels
    pixels = pixels[torch.randperm(len(pixels), generator=generator)]
    half, quarter, few = len(pixels) // 2, len(pixels) // 4, len(pixels) // 100
    by_magnitude = {}
    for magnitude in MAGNITUDES:

        def triggered(images, magnitude=magnitude):
            return apply_global(images, "ctrl", magnitude, torch.zeros(3, 1, 1, dtype=torch.uint8))

        mixed = torch.cat((triggered(pixels[:few]), pixels[few:]))
        scores = fit_spectral_dct(mixed).score(mixed)
        detector = fit_detector(
            "spectral-dct", mixed[:quarter], calibration=mixed[quarter:half], false_positive_rate=RATE
        )
        by_magnitude[f"{magnitude:.0f}"] = {
            "auroc": auroc(scores[:few], scores[few:]),
            "true_positives": float(detector.flags(triggered(pixels[half:])).float().mean()),
            "false_positives": float(detector.flags(pixels[half:]).float().mean()),
        }
    return {"n_images": len(pixels), "by_magnitude": by_magnitude}


def auroc(higher, lower):
    """Probability that one of `higher` lies above one of `lower`; ties count half."""
    difference = higher[:, None] - lower[None]
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


def table(results):
    header = ["images", "magnitude", "seeds", "poison first: AUROC", "held out: found %"]
    header.append(f"held out: false alarms % (stated {100 * RATE:.0f})")
    lines = []
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]
        for magnitude in rows[0]["by_magnitude"]:

            def of(key, rows=rows, magnitude=magnitude, **how):
                return common.spread((row["by_magnitude"][magnitude][key] for row in rows), **how)

            lines.append(
                [
                    case,
                    magnitude,
                    str(len(rows)),
                    of("auroc", digits=3),
                    of("true_positives", percent=True, digits=1),
                    of("false_positives", percent=True, digits=2),
                ]
            )
    return common.markdown(header, lines)


if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(3), cases=list(DATA))
    jobs = [
        common.Job(name, seed, common.asdict(DATA[name]), lambda n=name, s=seed: measure(DATA[n], s))
        for name in options.cases
        for seed in options.seeds
    ]
    code = common.run_jobs("spectral_dct", jobs, options)
    common.print_table("spectral_dct", table)
    sys.exit(code)
