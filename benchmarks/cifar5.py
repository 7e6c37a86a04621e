"""CIFAR-10, five classes of 1000 images, one of them poisoned throughout: found by masks, found by Grad-CAM?

python benchmarks/cifar5.py --seeds 0 1 2 3 4 --threads 1
"""

import sys

import common

DATA = common.Data(folder="cifar10", size=32, classes=5, train=1000, test=500)
VICTIM = common.PretrainConfig(method="moco-v2", epochs=16)
CASES = (common.Case(name="CIFAR-10, 5 classes", data=DATA, victim=VICTIM, side=8),)

if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(5))
    code = common.run("cifar5", CASES, options)
    common.print_table("cifar5")
    sys.exit(code)
