"""CIFAR-10, all ten classes, 10 000 images, half of one class poisoned (5 %).

python benchmarks/cifar10.py --seeds 0 1 2 --threads 1
"""

import sys

import common

DATA = common.Data(folder="cifar10", size=32, classes=10, train=1000, test=300)
VICTIM = common.PretrainConfig(method="moco-v2", epochs=15)
CASES = (common.Case(name="CIFAR-10, 10 classes", data=DATA, victim=VICTIM, side=8, rate=0.5),)

if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(3))
    code = common.run("cifar10", CASES, options)
    common.print_table("cifar10")
    sys.exit(code)
