"""Images per second of pre-training, beside the same method built from lightly's published building blocks.

Both train the same network on the same pictures with the same batch, optimiser and precision, in turns, in one process
with the same number of threads. lightly's side is the loop of its examples: a data loader without workers whose
transform makes two views per picture (at our strengths), its heads, losses and moving average. "with our views" feeds
that loop with our batched views instead, which shows how much of the difference they make. The pictures are
scikit-learn's digits at 32 pixels. Goal: a ratio of at least 1.5.

    pip install 'unpoison[bench]'
    python benchmarks/pretrain_speed.py --threads 1
"""

import copy
import statistics
import sys
import time

import common
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from unpoison.data.views import random_views
from unpoison.demo import embedded_digits
from unpoison.encoders.backbones import Architecture, build_backbone
from unpoison.pretrain.loop import PretrainConfig, pretrain
from unpoison.pretrain.moco_v3 import fix_patches
from unpoison.pretrain.recipe import OPTIMISERS
from unpoison.runtime import autocast, choose_device, choose_precision, seeded, stage_generator

NAME = "pretrain_speed"
IMAGES, EPOCHS, ROUNDS = 1792, 1, 3  # a rate, not a result: three short turns each, after one that warms up
MEAN, STD = [0.5] * 3, [0.25] * 3


def measure(config, seed, options):
    """Rates of all three loops, in turns: a shared machine slows whoever is running."""
    images = embedded_digits()[0].select(range(IMAGES))
    rates = {"ours": [], "lightly": [], "with our views": []}
    for _ in range(1 + ROUNDS):
        rates["ours"].append(
            timed(lambda: pretrain(images, config, seed=seed, device=options.device), config)
        )
        for name, loader in (("lightly", theirs_per_picture), ("with our views", ours_per_batch)):
            batches = loader(images.pixels, config, seed)
            rates[name].append(
                timed(lambda b=batches: train(b, images, config, seed, options.device), config)
            )
    rates = {name: values[1:] for name, values in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["lightly"], strict=True))
    common.say(f"{config.method}: ratio {ratio:.2f}")
    return {"arch": config.recipe.arch, "rates": rates, "ratio": ratio}


def timed(work, config):
    """Images per second."""
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return config.epochs * (IMAGES // config.batch_size) * config.batch_size / seconds


# ── lightly's side ───────────────────────────────────────────────────────────────────────────────────────────────────


class Pictures(Dataset):
    """Decoded pictures in memory; each access makes two views."""

    def __init__(self, pixels, transform):
        self.pictures = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]
        self.transform = transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.transform(self.pictures[index])


def theirs_per_picture(pixels, config, seed):
    from lightly.transforms import BYOLTransform, MoCoV2Transform, SimCLRTransform, SimSiamTransform
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

    brightness, contrast, saturation, hue = config.views.jitter
    strengths = {
        "input_size": pixels.shape[-1],
        "cj_prob": config.views.jitter_probability,
        "cj_strength": 1.0,
        "cj_bright": brightness,
        "cj_contrast": contrast,
        "cj_sat": saturation,
        "cj_hue": hue,
        "min_scale": config.views.crop,
        "random_gray_scale": config.views.grey_probability,
        "gaussian_blur": config.views.blur_probability,
        "normalize": {"mean": MEAN, "std": STD},
    }
    second = strengths | {"solarization_prob": config.views.solarise_probability}  # its own default is 0.2
    kinds = {
        "moco-v2": lambda: MoCoV2Transform(**strengths),
        "simclr": lambda: SimCLRTransform(**strengths),
        "moco-v3": lambda: BYOLTransform(BYOLView1Transform(**strengths), BYOLView2Transform(**second)),
        "byol": lambda: BYOLTransform(BYOLView1Transform(**strengths), BYOLView2Transform(**second)),
        "simsiam": lambda: SimSiamTransform(**strengths),
    }
    return DataLoader(
        Pictures(pixels, kinds[config.method]()),
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )


class OurBatches:
    """Our views through their loop."""

    def __init__(self, pixels, config, seed):
        self.pixels, self.config = pixels, config
        self.generator = stage_generator(seed, "benchmark")

    def __len__(self):
        return len(self.pixels) // self.config.batch_size

    def __iter__(self):
        order = torch.randperm(len(self.pixels), generator=self.generator)
        for rows in order.split(self.config.batch_size)[: len(self)]:
            batch = self.pixels[rows]
            yield [
                (random_views(batch, self.config.views, generator=self.generator) - MEAN[0]) / STD[0]
                for _ in range(2)
            ]


def ours_per_batch(pixels, config, seed):
    return OurBatches(pixels, config, seed)


def train(batches, images, config, seed, device):
    """The loop of lightly's examples."""
    from lightly.utils.scheduler import cosine_schedule

    on = choose_device(device)
    recipe = config.recipe
    with seeded(seed, "benchmark"):
        network = build_backbone(
            Architecture(name=recipe.arch, image_size=images.pixels.shape[-1], width=config.width)
        )
        with torch.no_grad():
            size = network(images.pixels[:2].float()).shape[1]
        module = MODULES[config.method](network, size, recipe).to(on, memory_format=torch.channels_last)
    optimiser = OPTIMISERS[recipe.optimiser](module, recipe)
    steps, step = config.epochs * len(batches), 0
    module.train()
    for _ in range(config.epochs):
        for views in batches:
            module.momentum = cosine_schedule(step, steps, recipe.key_momentum or 0.0, 1)
            first, second = (v.to(on, memory_format=torch.channels_last) for v in views)
            with autocast(on, choose_precision("auto", on)):
                loss = module(first, second)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1


class LightlySimCLR(nn.Module):
    def __init__(self, network, size, recipe):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        super().__init__()
        self.network = network
        self.head = SimCLRProjectionHead(size, recipe.head_hidden, recipe.head_out)
        self.criterion = NTXentLoss(temperature=recipe.temperature)

    def forward(self, first, second):
        return self.criterion(self.head(self.network(first)), self.head(self.network(second)))


class WithFollower(nn.Module):
    """Network, heads, and the moving average of both, moved before each step as in lightly's examples."""

    def __init__(self, network, head):
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.network, self.head = network, head
        self.slow_network, self.slow_head = copy.deepcopy(network), copy.deepcopy(head)
        deactivate_requires_grad(self.slow_network)
        deactivate_requires_grad(self.slow_head)

    def follow(self):
        from lightly.models.utils import update_momentum

        update_momentum(self.network, self.slow_network, m=self.momentum)
        update_momentum(self.head, self.slow_head, m=self.momentum)

    @torch.no_grad()
    def slow(self, view):
        return self.slow_head(self.slow_network(view)).detach()


class LightlyMoCoV2(WithFollower):
    def __init__(self, network, size, recipe):
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead

        super().__init__(
            network, MoCoProjectionHead(size, recipe.head_hidden, recipe.head_out, batch_norm=True)
        )
        memory = (recipe.queue_size, recipe.head_out)
        self.criterion = NTXentLoss(temperature=recipe.temperature, memory_bank_size=memory)

    def forward(self, first, second):
        self.follow()
        return self.criterion(self.head(self.network(first)), self.slow(second))


class LightlyBYOL(WithFollower):
    def __init__(self, network, size, recipe):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

        super().__init__(network, BYOLProjectionHead(size, recipe.head_hidden, recipe.head_out))
        self.predictor = BYOLPredictionHead(recipe.head_out, recipe.head_hidden, recipe.head_out)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, first, second):
        self.follow()
        one, two = (self.predictor(self.head(self.network(view))) for view in (first, second))
        return 0.5 * (self.criterion(one, self.slow(second)) + self.criterion(two, self.slow(first)))


class LightlySimSiam(nn.Module):
    def __init__(self, network, size, recipe):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

        super().__init__()
        self.network = network
        self.head = SimSiamProjectionHead(size, recipe.head_hidden, recipe.head_out)
        self.predictor = SimSiamPredictionHead(recipe.head_out, recipe.head_out // 4, recipe.head_out)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, first, second):
        one, two = (self.head(self.network(view)) for view in (first, second))
        return 0.5 * (
            self.criterion(self.predictor(one), two.detach())
            + self.criterion(self.predictor(two), one.detach())
        )


class LightlyMoCoV3(WithFollower):
    """lightly has the heads but no loss of MoCo v3; the paper's pseudo-code takes its place."""

    def __init__(self, network, size, recipe):
        from lightly.models.modules import MoCoProjectionHead

        fix_patches(network)
        hidden, out = recipe.head_hidden, recipe.head_out
        super().__init__(network, MoCoProjectionHead(size, hidden, out, num_layers=3, batch_norm=True))
        self.predictor = MoCoProjectionHead(out, hidden, out, num_layers=2, batch_norm=True)
        self.temperature = recipe.temperature

    def contrast(self, query, key):
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / self.temperature
        return 2 * self.temperature * F.cross_entropy(logits, torch.arange(len(query), device=query.device))

    def forward(self, first, second):
        self.follow()
        one, two = (self.predictor(self.head(self.network(view))) for view in (first, second))
        return self.contrast(one, self.slow(second)) + self.contrast(two, self.slow(first))


MODULES = {
    "moco-v2": LightlyMoCoV2,
    "simclr": LightlySimCLR,
    "moco-v3": LightlyMoCoV3,
    "byol": LightlyBYOL,
    "simsiam": LightlySimSiam,
}


def table(results):
    header = ["method", "network", "ours, images/s", "lightly, images/s", "ratio", "lightly with our views"]
    return common.markdown(
        header,
        [
            [
                row["case"],
                row["arch"],
                common.spread(row["rates"]["ours"]),
                common.spread(row["rates"]["lightly"]),
                f"{row['ratio']:.2f}",
                common.spread(row["rates"]["with our views"]),
            ]
            for row in results["rows"]
        ],
    )


def missing():
    """The one line for people without lightly; None when it is there."""
    try:
        import lightly.transforms  # noqa: F401
    except ImportError as error:
        return f"this benchmark needs lightly ({error}): pip install 'unpoison[bench]'"
    return None


def main():
    options = common.parse(__doc__, seeds=[0], cases=list(MODULES))
    if line := missing():
        common.say(line)
        return 2
    options.fresh = True  # a speed is measured now or not at all
    jobs = []
    for seed in options.seeds:
        for method in options.cases:
            config = PretrainConfig(method=method, epochs=EPOCHS)
            work = lambda config=config, seed=seed: measure(config, seed, options)  # noqa: E731
            jobs.append(common.Job(method, seed, common.asdict(config.resolve()), work))
    code = common.run_jobs(NAME, jobs, options)
    common.print_table(NAME, table)
    return code


if __name__ == "__main__":
    sys.exit(main())
