"""Which detector tells triggered images from clean ones, one by one? Five attacks, two kinds of auxiliary images.

Victims are those of cifar5.py: five classes of 1000 images of CIFAR-10, MoCo v2, 16 epochs.
patch        SSL-Backdoor: all images of the target class carry the patch
ctrl         CTRL: waves on 5 % of the data set, all of the target class
blended      a picture of noise mixed in at 20 %, on as many images
bad-encoder  BadEncoder, implanted in the clean-trained encoder
drupe        DRUPE, likewise
ctrl at scale  CTRL on ten classes of 4000 images, SimCLR, a ResNet-18 of full width, 100 epochs: for a GPU; without
               one, only when it is named by --cases

Auxiliary images fit each method, others of the same kind calibrate it: `in`, CIFAR-10 images that the victim never saw,
1 % of the first with the trigger; `out`, Tiny-ImageNet at 32 pixels. Judged are 1000 clean and 1000 triggered test
images. The second encoder of cross-encoder is the clean-trained one of the next seed. PoisonCAM scores single images
by the share of auxiliary images that their window moves, with nothing else of the search; 400 of each kind only, since
it costs more.

"Through" is what a screen in front of the encoder leaves: images that are not flagged and that the linear probe takes
for the target, of all triggered ones; and clean ones that pass and are classified rightly, of all clean ones.

The cases `… removed` remove what a detector flags from the training images, at a false-positive rate of 5 % on
auxiliary images that the victim never saw, and train again: the control and the attacked encoder beside it.

The case `speed` asks what scoring costs where nothing else runs: --threads 2 takes two cores.

The cases `ctrl strength` ask whether CTRL attacks at all: attack success by share of poisoned images and by magnitude.

    python benchmarks/detectors.py --seeds 0 1 2 --threads 1 [--cases "patch, in" "ctrl strength"]

One row takes about 4 minutes of one CPU core, half of it DeDe's training; a victim that is not kept yet 2 more.
"""

import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace

import cifar5
import common
import torch

from unpoison.attack.bad_encoder import BadEncoderConfig
from unpoison.attack.blended import BlendedConfig
from unpoison.attack.ctrl import CtrlConfig
from unpoison.attack.drupe import DrupeConfig
from unpoison.attack.implanting import implant
from unpoison.attack.ssl_backdoor import paste_everywhere, poison
from unpoison.encoders.extract import extract_features, raw_features
from unpoison.evaluate.probes import fit_linear_probe
from unpoison.functional.clustering import assign, kmeans
from unpoison.records import Clusters, Features, ImageSet
from unpoison.runtime import silent, stage_generator
from unpoison.scan.config import ScanConfig
from unpoison.scan.detector import METHODS, Calibration, calibrate, fit_detector, make_config
from unpoison.scan.flip_test import FlipTest, nearest_rows
from unpoison.scan.poisoncam import MaskAttention
from unpoison.scan.search import Searcher
from unpoison.scan.spectral_dct import find_waves

RATES = (0.01, 0.05)
ATTACKS = ("patch", "ctrl", "blended", "bad-encoder", "drupe", "ctrl at scale")
IMPLANTED = ("bad-encoder", "drupe")
REMOVED = ("patch", "ctrl")
REMOVAL_RATE = 0.05
# What is poisoned of all images, and with what magnitude: the paper's 1 % and 100, and more.
STRENGTHS = {"1 %": (0.01, 100.0), "5 %": (0.05, 100.0), "5 %, magnitude 200": (0.05, 200.0)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How much of everything; smaller in a smoke run."""

    data: common.Data = cifar5.DATA
    outside: common.Data = field(
        default_factory=lambda: common.Data(
            folder="tinyimagenet100", size=32, classes=100, train=30, test=1, held_out="val"
        )
    )
    victim: common.PretrainConfig = cifar5.VICTIM
    auxiliary: int = 2000
    calibration: int = 1000
    judged: int = 1000
    poisoncam: int = 400
    implant_epochs: int = 12
    drupe_epochs: int = 15
    dede_epochs: int = 40
    methods: tuple[str, ...] = (*sorted(METHODS), "poisoncam")


SETTING = Setting()
LARGE = {
    "data": common.Data(folder="cifar10", size=32, classes=10, train=4000, test=1000),
    "victim": common.PretrainConfig(method="simclr", arch="resnet18", width=64, epochs=100, batch_size=512),
}


def setting_of(attack, setting):
    """The setting of a row; the attack that takes a GPU has data and a victim of its own."""
    return replace(setting, **LARGE) if attack.endswith("at scale") else setting


def attack_of(name, setting, seed):
    target = seed % setting.data.classes
    if name == "patch":
        return common.attack_of(replace(cifar5.CASES[0], data=setting.data), seed)
    if name.startswith("ctrl"):
        # At the published magnitude of 100 neither victim learns the waves.
        return CtrlConfig(target=target, rate=0.05, magnitude=200.0 if name.endswith("at scale") else 100.0)
    if name == "blended":
        return BlendedConfig(target=target, trigger=f"seed:{100 + seed}", rate=0.05)
    shared = {"targets": (target,), "batch_size": 128, "learning_rate": 0.04}
    if name == "drupe":
        return DrupeConfig(**shared, epochs=setting.drupe_epochs)
    return BadEncoderConfig(**shared, epochs=setting.implant_epochs)


_LAST = {}


def victim(name, setting, seed, options):
    """As `make_victim`; the last one made is remembered for the next row."""
    if (name, seed) not in _LAST:
        _LAST.clear()
        _LAST[name, seed] = make_victim(name, setting, seed, options)
    return _LAST[name, seed]


def make_victim(name, setting, seed, options):
    """The encoder under attack, its trigger, and what the data set says of itself."""
    train, test = (common.load_split(setting.data, split) for split in ("train", "test"))
    attack = attack_of(name, setting, seed)
    control, _ = common.trained(train.images, setting.victim, seed, options)
    row = {}
    if name in IMPLANTED:
        done = implant(control, train.images, train.labels, train.class_names, attack, seed=seed)
        encoder, trigger = done.encoder, done.plan.triggers[0]
    else:
        images, plan = poison(train.images, train.labels, train.class_names, attack, seed)
        encoder, _ = common.trained(images, setting.victim, seed, options)
        trigger = plan.triggers[0]
        row["waves"] = waves_in(images, plan)
    row["control"] = {"seconds": 0, **common.probes(control, train, test, trigger, seed)}
    row["victim"] = {"seconds": 0, **common.probes(encoder, train, test, trigger, seed)}
    common.say(f"victim: {common.brief(row['victim'])}")
    return encoder, trigger, row


def waves_in(images, plan):
    """What the screen of the whole data set says, at the alpha that it has in a scan."""
    found = find_waves(images.pixels, 0.001)
    poisoned = {entry.id for entry in plan.poisoned}
    hits = sum(flag and id_ in poisoned for flag, id_ in zip(found.flagged.tolist(), images.ids, strict=True))
    n_flagged = int(found.flagged.sum())
    return {
        "p_value": found.p_value,
        "recall": hits / len(poisoned),
        "precision": hits / n_flagged if n_flagged else None,
    }


def run_row(name, kind, setting, seed, options):
    encoder, trigger, row = victim(name, setting, seed, options)
    train, test = (common.load_split(setting.data, split) for split in ("train", "test"))
    other, _ = common.trained(train.images, setting.victim, seed + 1, options)
    fitting, calibration = auxiliary(kind, setting, train, trigger, seed)
    order = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(seed)).tolist()
    clean = test.images.select(order[: setting.judged])
    foreign = [r for r in order if int(test.labels[r]) != trigger.target]
    # The poison in the calibration is none of the judged images.
    foreign, beyond = foreign[: setting.judged], foreign[setting.judged :][: setting.calibration // 100]
    triggered = paste_everywhere(test.images.select(foreign), trigger, seed=seed)
    few = paste_everywhere(test.images.select(beyond), trigger, seed=seed).pixels
    row = {**row, "methods": known_methods(f"{name}, {kind}", "methods", seed, options)}
    probe = fit_linear_probe(
        raw_features(encoder, train.images.pixels),
        train.labels,
        n_classes=setting.data.classes,
        generator=stage_generator(seed, "evaluate/linear probe"),
    )
    right = probe.predict(raw_features(encoder, clean.pixels)) == test.labels[order[: setting.judged]]
    taken = probe.predict(raw_features(encoder, triggered.pixels)) == trigger.target
    row["unscreened"] = {"accuracy": share(right), "attack_success": share(taken)}
    for method in setting.methods:
        if method in row["methods"]:
            continue
        started = time.perf_counter()
        if method == "poisoncam":
            score = poisoncam(encoder, fitting, setting, seed)
            most = setting.poisoncam
        else:
            score = fitted_detector(method, fitting, calibration, encoder, other, setting, seed).score
            most = None
        fitted = time.perf_counter() - started
        measured = measure(
            score,
            calibration[:most],
            clean.pixels[:most],
            triggered.pixels[:most],
            few,
            right=right[:most],
            taken=taken[:most],
        )
        row["methods"][method] = {"fit_seconds": round(fitted, 1), **measured}
        common.say(f"{method}: AUROC {measured['auroc']:.3f}, {measured['images_per_second']:.0f} images/s")
    return row


def known_methods(case, part, seed, options):
    """What a part of the newest row has of methods that `--methods` does not name."""
    if not options.methods:
        return {}
    rows = common.known_rows("detectors", common.KEPT / "detectors.jsonl")
    newest = [row[part] for row in rows if (row["case"], row["seed"]) == (case, seed)][-1:]
    return {name: said for row in newest for name, said in row.items() if name not in options.methods}


def fitted_detector(method, fitting, calibration, encoder, other, setting, seed):
    """One of unpoison's own detectors; its threshold is set by the caller."""
    config = make_config(method, seed=seed)
    if method == "dede":
        config = replace(config, epochs=setting.dede_epochs)
    return fit_detector(
        method,
        fitting,
        None if method == "spectral-dct" else encoder,
        other=other if method == "cross-encoder" else None,
        config=config,
        calibration=calibration[:99],
    )


def run_removal(name, setting, seed, options):
    """Remove what each detector flags from the training images, train again, measure ACC and ASR."""
    train, test = (common.load_split(setting.data, split) for split in ("train", "test"))
    attack = attack_of(name, setting, seed)
    images, plan = poison(train.images, train.labels, train.class_names, attack, seed)
    trigger = plan.triggers[0]
    control, _ = common.trained(train.images, setting.victim, seed, options)
    encoder, _ = common.trained(images, setting.victim, seed, options)
    other, _ = common.trained(train.images, setting.victim, seed + 1, options)
    fitting, calibration = auxiliary("in", setting, train, trigger, seed)
    poisoned = torch.tensor([id_ in {entry.id for entry in plan.poisoned} for id_ in images.ids])
    row = {
        "control": common.probes(control, train, test, trigger, seed),
        "victim": common.probes(encoder, train, test, trigger, seed),
        "removed": known_methods(f"{name}, removed", "removed", seed, options),
    }
    for method in sorted(METHODS.keys() - row["removed"].keys()):
        score = fitted_detector(method, fitting, calibration, encoder, other, setting, seed).score
        flagged = score(images.pixels) > calibrate(score(calibration), REMOVAL_RATE).threshold
        kept = images.select((~flagged).nonzero().flatten().tolist())
        kept = replace(kept, fingerprint=f"{images.fingerprint} without what {method} flags, seed {seed}")
        again, _ = common.trained(kept, setting.victim, seed, options)
        row["removed"][method] = {
            "recall": share(flagged[poisoned]),
            "wrong": share(flagged[~poisoned]),
            "probes": common.probes(again, train, test, trigger, seed),
        }
        said = row["removed"][method]["probes"]["linear"]
        common.say(
            f"{method}: recall {row['removed'][method]['recall']:.2f}, ASR {said['attack_success']:.1f}"
        )
    return row


def auxiliary(kind, setting, train, trigger, seed):
    """Images to fit on and images to calibrate on, both (n, 3, S, S) uint8."""
    if kind == "in":
        per_class = setting.data.train + -(-(setting.auxiliary + setting.calibration) // setting.data.classes)
        images = common.load_split(replace(setting.data, train=per_class), "train").images
        known = set(train.images.ids)
        images = images.select([row for row, id_ in enumerate(images.ids) if id_ not in known])
    else:
        images = common.load_split(setting.outside, "train").images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    fitting = images.select(order[: setting.auxiliary])
    pixels = fitting.pixels.clone()
    if kind == "in":
        n_poisoned = setting.auxiliary // 100
        carriers = fitting.select(range(n_poisoned))
        pixels[:n_poisoned] = paste_everywhere(carriers, trigger, seed=seed).pixels
    rest = order[setting.auxiliary : setting.auxiliary + setting.calibration]
    return pixels, images.select(rest).pixels


def poisoncam(encoder, fitting, setting, seed):
    """A score for single images: pasted on auxiliary images, how many does the hottest window move?"""
    config = ScanConfig(method="poisoncam", score="any").resolve(len(fitting), setting.data.size)
    known = ImageSet(tuple(map(str, range(len(fitting)))), fitting)
    features = extract_features(encoder, known)
    found = kmeans(features.values, config.clusters, generator=stage_generator(seed, "kmeans"))
    clusters = Clusters(found.centroids, found.assignment)
    everywhere = torch.ones(len(known), dtype=torch.bool)
    rows = nearest_rows(
        features.values, clusters, everywhere, config.n_flips, generator=stage_generator(seed, "flips")
    )
    flip_test = FlipTest.draw(
        encoder,
        known,
        clusters,
        rows,
        config.window,
        generator=stage_generator(seed, "corners"),
        with_control=False,
        batch_size=512,
    )
    attention = MaskAttention(
        encoder, clusters, config, generator=stage_generator(seed, "masks"), batch_size=512
    )

    def score(pixels):
        images = ImageSet(tuple(map(str, range(len(pixels)))), pixels)
        values: Features = extract_features(encoder, images)
        own = Clusters(clusters.centroids, assign(values.values, clusters.centroids))
        searcher = Searcher(
            images,
            own,
            attention,
            flip_test,
            config,
            torch.ones(len(images), dtype=torch.bool),
            lambda step: stage_generator(seed, step),
            silent,
        )
        candidates = searcher.score(list(range(len(images))), "score")
        return candidates.flips.score("any", candidates.own)

    return score


def measure(score, calibration, clean, triggered, few, *, right, taken):
    """What a score is worth; `right` and `taken` say what the probe makes of the clean and the triggered images."""
    started = time.perf_counter()
    usual, innocent, guilty, hot = (score(images) for images in (calibration, clean, triggered, few))
    rate = (len(calibration) + len(clean) + len(triggered) + len(few)) / (time.perf_counter() - started)
    # One in a hundred calibration images carries the trigger.
    hot = hot[: len(usual) // 100]
    dirty = torch.cat((hot, usual[len(hot) :]))
    row = {"auroc": auroc(guilty, innocent)}
    for wanted in RATES:
        ideal = innocent.sort(descending=True).values[int(wanted * len(innocent))]
        at = {"best": share_above(guilty, ideal)}
        for name, scores in (("clean", usual), ("dirty", dirty)):
            threshold = calibrate(scores, wanted).threshold
            at[name] = {
                "found": share_above(guilty, threshold),
                "wrong": share_above(innocent, threshold),
                "through": {
                    "accuracy": share(right & (innocent <= threshold)),
                    "attack_success": share(taken & (guilty <= threshold)),
                },
            }
        row[f"at {wanted:.0%}"] = at
    return {**row, "images_per_second": rate, "latency_ms": latency(score, clean)}


def latency(score, images):
    """Median milliseconds that one image takes by itself."""
    single = []
    for row in range(min(20, len(images))):
        started = time.perf_counter()
        score(images[row : row + 1])
        single.append(time.perf_counter() - started)
    return 1000 * statistics.median(single)


def run_speed(setting, seed, options):
    """Images per second, one image's time, and memory, of every method on the clean-trained encoder."""
    train = common.load_split(setting.data, "train")
    encoder, _ = common.trained(train.images, setting.victim, seed, options)
    other, _ = common.trained(train.images, setting.victim, seed + 1, options)
    pixels = train.images.pixels
    fitting, calibration, judged = pixels[: setting.auxiliary], pixels[-200:], pixels[-setting.judged :]
    brief = replace(setting, dede_epochs=1)  # a decoder's speed does not depend on what it learned
    row = {"speed": {}}
    for method in setting.methods:
        if method == "poisoncam":
            score, images = poisoncam(encoder, fitting, setting, seed), judged[: setting.poisoncam]
        else:
            score = fitted_detector(method, fitting, calibration, encoder, other, brief, seed).score
            images = judged
        started = time.perf_counter()
        score(images)
        row["speed"][method] = {
            "images_per_second": len(images) / (time.perf_counter() - started),
            "latency_ms": latency(score, images),
            "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "gpu_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20)
            if encoder.device.type == "cuda"
            else None,
        }
        common.say(f"{method}: {row['speed'][method]['images_per_second']:.0f} images/s")
    return row


def share(chosen):
    return round(float(chosen.float().mean()), 5)


def share_above(scores, threshold):
    return share(scores > threshold)


def auroc(higher, lower):
    """Probability that one of `higher` lies above one of `lower`; ties count half."""
    difference = higher[:, None] - lower[None]
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


def run_strength(setting, seed, options):
    """Attack success of CTRL by how much is planted, beside the clean-trained control, and what finds it."""
    from unpoison.pipeline import scan

    train, test = (common.load_split(setting.data, split) for split in ("train", "test"))
    control, _ = common.trained(train.images, setting.victim, seed, options)
    row = {"strengths": {}}
    for name, (rate, magnitude) in STRENGTHS.items():
        attack = CtrlConfig(target=seed % setting.data.classes, rate=rate, magnitude=magnitude)
        images, plan = poison(train.images, train.labels, train.class_names, attack, seed)
        encoder, _ = common.trained(images, setting.victim, seed, options)
        trigger = plan.triggers[0]
        alone = scan(images, encoder, config=ScanConfig(method="poisoncam"), seed=seed)
        row["strengths"][name] = {
            "victim": common.probes(encoder, train, test, trigger, seed),
            "control": common.probes(control, train, test, trigger, seed),
            "waves": waves_in(images, plan),
            "poisoncam": alone.verdict,
        }
        said = row["strengths"][name]["victim"]["linear"]
        common.say(
            f"ctrl {name}: ASR {said['attack_success']:.1f}, untriggered {said['untriggered_rate']:.1f}"
        )
    return row


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(results):
    parts = (
        detector_table(results),
        rate_sentence(results),
        removal_table(results),
        strength_table(results),
        speed_table(results),
    )
    return "\n\n".join(part for part in parts if part)


def detector_table(results):
    header = ["attack, auxiliary", "seeds", "ASR % (control)", "method", "AUROC", "found % at 1 / 5 % wrong"]
    header += ["threshold for 1 %: found / wrong %", "1 % of the calibration poisoned: found / wrong %"]
    header += ["through a screen at 5 %: ASR / ACC % (without)"]
    header += ["published AUROC"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in results["rows"] if "methods" in row):
        rows = [row for row in results["rows"] if row["case"] == case]
        for number, method in enumerate(rows[0]["methods"]):

            def of(path, rows=rows, method=method, **how):
                return common.spread(
                    (common.pick(row["methods"].get(method, {}), path) for row in rows), **how
                )

            def attack(who, rows=rows):
                return common.spread(common.pick(row, f"{who}.linear.attack_success") for row in rows)

            def without(what, rows=rows):
                return common.spread((common.pick(row, f"unscreened.{what}") for row in rows), percent=True)

            first = [case, str(len(rows)), f"{attack('victim')} ({attack('control')})"]
            lines.append(
                [
                    *(first if number == 0 else [""] * 3),
                    method,
                    of("auroc", digits=3),
                    f"{of('at 1%.best', percent=True)} / {of('at 5%.best', percent=True)}",
                    *(
                        f"{of(f'at 1%.{kind}.found', percent=True)} / "
                        f"{of(f'at 1%.{kind}.wrong', percent=True, digits=1)}"
                        for kind in ("clean", "dirty")
                    ),
                    f"{of('at 5%.clean.through.attack_success', percent=True)} / "
                    f"{of('at 5%.clean.through.accuracy', percent=True)} "
                    f"({without('attack_success')} / {without('accuracy')})",
                    "0.981 (notebook of the release)" if method == "dede" and "drupe" in case else "–",
                ]
            )
    return common.markdown(header, lines) if lines else ""


def rate_sentence(results):
    """Does the stated false-positive rate hold? Counted over all rows and methods, by the exact distribution."""
    said = []
    for kind, words in (("clean", "clean calibration images"), ("dirty", "1 % of these poisoned")):
        pairs = [
            (row["case"], rate_p_value(row["settings"]["setting"], method, measured, wanted, kind))
            for row in results["rows"]
            for method, measured in row.get("methods", {}).items()
            for wanted in RATES
        ]
        for where in ("in", "out"):
            chosen = [p for case, p in pairs if case.endswith(where)]
            if chosen:
                beyond = sum(p < 0.05 for p in chosen)
                said.append(f"`{where}`, {words}: {beyond} of {len(chosen)}")
    if not said:
        return ""
    return (
        "Thresholds for 1 and 5 % beside how many clean images they flagged, one test each; more than chance explains "
        f"in 19 of 20 cases (beta-binomial): {'; '.join(said)}."
    )


def rate_p_value(setting, method, measured, wanted, kind):
    """How surely a kept rate would flag as many of the judged clean images."""
    most = setting["poisoncam"] if method == "poisoncam" else max(setting["calibration"], setting["judged"])
    n_usual, n_judged = min(setting["calibration"], most), min(setting["judged"], most)
    kept = Calibration(threshold=0.0, false_positive_rate=wanted, poison_share=0.0, n_images=n_usual)
    return kept.p_value(round(measured[f"at {wanted:.0%}"][kind]["wrong"] * n_judged), n_judged)


def speed_table(results):
    header = ["method", "images/s", "one image, ms", "memory so far, MiB: process (GPU)", "on"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in results["rows"] if "speed" in row):
        rows = [row for row in results["rows"] if row["case"] == case]
        for method in rows[0]["speed"]:

            def of(path, rows=rows, method=method, **how):
                return common.spread((common.pick(row["speed"][method], path) for row in rows), **how)

            about = [row["machine"] for row in rows]
            on = ", ".join(
                sorted({m["gpu"] if case.endswith("GPU") else f"{m['threads']} threads" for m in about})
            )
            memory = of("peak_memory_mib") + (f" ({of('gpu_memory_mib')})" if case.endswith("GPU") else "")
            lines.append([method, of("images_per_second"), of("latency_ms", digits=1), memory, on])
    return common.markdown(header, lines) if lines else ""


def removal_table(results):
    header = ["removed from training at 5 %", "seeds", "method", "poison found / clean lost %"]
    header += ["ASR % (attacked; clean-trained)", "ACC % (attacked; clean-trained)"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in results["rows"] if "removed" in row):
        rows = [row for row in results["rows"] if row["case"] == case]
        for number, method in enumerate(rows[0]["removed"]):

            def of(path, rows=rows, method=method, **how):
                return common.spread((common.pick(row["removed"][method], path) for row in rows), **how)

            def beside(what, rows=rows):
                both = (
                    common.spread(common.pick(row, f"{who}.linear.{what}") for row in rows)
                    for who in ("victim", "control")
                )
                return "; ".join(both)

            lines.append(
                [
                    *([case, str(len(rows))] if number == 0 else ["", ""]),
                    method,
                    f"{of('recall', percent=True)} / {of('wrong', percent=True, digits=1)}",
                    f"{of('probes.linear.attack_success')} ({beside('attack_success')})",
                    f"{of('probes.linear.accuracy')} ({beside('accuracy')})",
                ]
            )
    return common.markdown(header, lines) if lines else ""


def strength_table(results):
    header = ["CTRL, share poisoned", "seeds", "ASR % (control)", "ACC %", "waves: found / right %"]
    header += ["PoisonCAM alone says"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in results["rows"] if "strengths" in row):
        rows = [row for row in results["rows"] if row["case"] == case]
        for name in rows[0]["strengths"]:

            def of(path, rows=rows, name=name, **how):
                return common.spread((common.pick(row["strengths"][name], path) for row in rows), **how)

            asr = f"{of('victim.linear.attack_success')} ({of('control.linear.attack_success')})"
            waves = f"{of('waves.recall', percent=True)} / {of('waves.precision', percent=True)}"
            verdicts = [row["strengths"][name].get("poisoncam", "–") for row in rows]
            said = ", ".join(f"{verdicts.count(v)} × {v}" for v in dict.fromkeys(verdicts))
            where = case.replace("ctrl strength", "").strip(", ")
            lines.append(
                [
                    f"{name} {where}".strip(),
                    str(len(rows)),
                    asr,
                    of("victim.linear.accuracy"),
                    waves,
                    said,
                ]
            )
    return common.markdown(header, lines) if lines else ""


def jobs_of(setting, options):
    for seed in options.seeds:
        for attack in ATTACKS:
            own = setting_of(attack, setting)
            for kind in ("in", "out"):
                case = f"{attack}, {kind}"
                if case in options.cases:
                    yield common.Job(
                        case,
                        seed,
                        {"setting": asdict(own), "attack": asdict(attack_of(attack, own, seed))},
                        lambda a=attack, k=kind, own=own, s=seed: run_row(a, k, own, s, options),
                    )
        for attack in REMOVED:
            if f"{attack}, removed" in options.cases:
                yield common.Job(
                    f"{attack}, removed",
                    seed,
                    {"setting": asdict(setting), "attack": asdict(attack_of(attack, setting, seed))},
                    lambda a=attack, s=seed: run_removal(a, setting, s, options),
                )
        if "speed" in options.cases:
            yield common.Job(
                f"speed{common.device_suffix(options)}",
                seed,
                {"setting": asdict(setting)},
                lambda s=seed: run_speed(setting, s, options),
            )
        for case in STRENGTH_CASES:
            own = setting_of(case, setting)
            if case in options.cases:
                yield common.Job(
                    case,
                    seed,
                    {"setting": asdict(own), "strengths": STRENGTHS},
                    lambda own=own, s=seed: run_strength(own, s, options),
                )


STRENGTH_CASES = ("ctrl strength", "ctrl strength, at scale")
CASES = [
    *(f"{attack}, {kind}" for attack in ATTACKS for kind in ("in", "out")),
    *(f"{attack}, removed" for attack in REMOVED),
    *STRENGTH_CASES,
    "speed",
]

if __name__ == "__main__":
    options = common.parse(__doc__, seeds=range(3), cases=CASES, methods=SETTING.methods)
    if options.cases == CASES and not common.device_suffix(options):
        options.cases = [case for case in CASES if "at scale" not in case]  # days on a processor
    code = common.run_jobs("detectors", jobs_of(SETTING, options), options)
    common.print_table("detectors", table)
    sys.exit(code)
