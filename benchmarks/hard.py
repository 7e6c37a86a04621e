"""Three cases in which the published search loses the trigger: where is it found now?

soft      a smooth (bilinear) trigger, which augmentation washes out and windows do not frame
standard  half of the class poisoned, under the papers' augmentation strengths (at the side of small images)
simclr    a SimCLR victim on Tiny-ImageNet, whose clusters hold poison and clean images together

    python benchmarks/hard.py --seeds 0 1 2 --threads 1 [--cases soft standard simclr]
"""

import sys
from dataclasses import replace

import cifar5
import common
import tiny

from unpoison.data.views import ViewConfig

STANDARD = ViewConfig(crop=0.2, jitter=(0.4, 0.4, 0.4, 0.1), grey_probability=0.2)
# On the same victims, the published score without our control, vote and second look.
SCANS = {"mask": common.ScanConfig(), "any": common.ScanConfig(score="any")}
CASES = (
    common.Case(
        name="soft", data=cifar5.DATA, victim=cifar5.VICTIM, side=8, resample="bilinear", scans=SCANS
    ),
    common.Case(
        name="standard",
        data=cifar5.DATA,
        victim=replace(cifar5.VICTIM, views=STANDARD),
        side=8,
        rate=0.5,
        scans=SCANS,
    ),
    common.Case(
        name="simclr",
        data=tiny.DATA,
        victim=common.PretrainConfig(method="simclr", epochs=20),
        side=16,
        scans=SCANS,
    ),
)

if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(3), cases=[case.name for case in CASES])
    code = common.run("hard", CASES, options)
    common.print_table("hard")
    sys.exit(code)
