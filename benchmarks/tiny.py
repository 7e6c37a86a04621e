"""Tiny-ImageNet-100, its first ten classes of 500 images at 64 pixels, one of them poisoned throughout.

python benchmarks/tiny.py --seeds 0 1 2 --threads 1
"""

import sys

import common

DATA = common.Data(folder="tinyimagenet100", size=64, classes=10, train=500, test=50, held_out="val")
VICTIM = common.PretrainConfig(method="moco-v2", epochs=20)
CASES = (common.Case(name="Tiny-ImageNet, 10 classes", data=DATA, victim=VICTIM, side=16),)

if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(3))
    code = common.run("tiny", CASES, options)
    common.print_table("tiny")
    sys.exit(code)
