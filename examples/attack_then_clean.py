"""The whole story in Python, on handwritten digits that ship with scikit-learn; about a minute on two cores.

A backdoor is planted in images that nobody labels for training, an encoder learns it, a scan finds the planted images,
and an encoder trained without them no longer obeys the patch.
"""

import torch
from sklearn.datasets import load_digits

import unpoison
from unpoison.attack.plan import Plan
from unpoison.attack.ssl_backdoor import PatchAttackConfig, poison
from unpoison.evaluate.attack_success import evaluate_encoder

CLASSES = tuple(map(str, range(10)))
ATTACK = PatchAttackConfig(targets=("1",), triggers=("seed:7",), size=8, rate=0.5)
TRAINING = unpoison.PretrainConfig(epochs=25, batch_size=128, queue_size=512)


def digits() -> tuple[unpoison.ImageSet, torch.Tensor]:
    """1797 digits at 32 px, and what they are."""
    data = load_digits()
    grey = torch.from_numpy(data.images).float()[:, None] / 16
    large = torch.nn.functional.interpolate(grey, size=32, mode="bilinear")
    pixels = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    ids = tuple(f"{row:04d}" for row in range(len(pixels)))
    images = unpoison.ImageSet(
        ids, pixels.contiguous(memory_format=torch.channels_last), fingerprint="digits"
    )
    return images, torch.from_numpy(data.target).long()


def report(title: str, encoder: unpoison.Encoder, plan: Plan, known: tuple, shown: tuple) -> None:
    """Accuracy, and how often the patch makes other digits look like the target."""
    outcome = evaluate_encoder(encoder, *known, *shown, triggers=plan.triggers, n_classes=10).probe("knn")
    attack = outcome.attacks[0]
    print(
        f"{title:<22} accuracy {outcome.accuracy:.0f} %, with the patch {attack.patched.accuracy:.0f} %; "
        f"attack success {attack.patched.attack_success:.0f} % ({attack.untriggered_rate:.1f} % without the patch)"
    )


def main() -> None:
    images, labels = digits()
    train, test = range(1293), range(1293, 1797)
    clean_train, shown = images.select(train), (images.select(test), labels[1293:])
    poisoned, plan = poison(clean_train, labels[:1293], CLASSES, ATTACK, seed=0)

    victim = unpoison.pretrain(poisoned, TRAINING, seed=0).encoder
    report("trained on poison", victim, plan, (clean_train, labels[:1293]), shown)

    result = unpoison.scan(poisoned, victim, seed=0)  # sees neither labels nor the plan
    planted = {image.id for image in plan.poisoned}
    found = planted & set(result.flagged)
    print(
        f"{result.verdict}: {len(result.flagged)} flagged, {len(found)} of the {len(planted)} planted among them"
    )

    kept = [row for row, id in enumerate(poisoned.ids) if id not in set(result.flagged)]
    healed = unpoison.pretrain(poisoned.select(kept), TRAINING, seed=0).encoder
    report("trained on the rest", healed, plan, (clean_train, labels[:1293]), shown)


if __name__ == "__main__":
    main()
