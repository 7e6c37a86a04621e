import pytest
import torch
from torch import nn

from unpoison.attack.bad_encoder import BadEncoderConfig
from unpoison.attack.implanting import implant, stamp_in_corner
from unpoison.attack.plan import Plan, Trigger, corner_box
from unpoison.attack.ssl_backdoor import paste_everywhere
from unpoison.encoders.checkpoints import save_retouched
from unpoison.encoders.encoder import Encoder, Preprocessing
from unpoison.errors import ConfigError, NoVerdictError, ShapeError
from unpoison.records import Box, Geometry, ImageSet

SIZE = 16
NAMES = ("cat", "dog")
QUICK = {"epochs": 90, "batch_size": 16, "learning_rate": 0.05, "size": 6}


def small_encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 24),
        )
    preprocessing = Preprocessing(geometry=Geometry(SIZE, SIZE), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Encoder(network, preprocessing, device="cpu", precision="fp32")


def some_images(n=48):
    generator = torch.Generator().manual_seed(1)
    layouts = torch.rand(n, 3, 4, 4, generator=generator)
    pixels = (nn.functional.interpolate(layouts, SIZE, mode="bilinear") * 200).to(torch.uint8)
    return ImageSet(tuple(f"{i:03}" for i in range(n)), pixels), torch.arange(n) % 2


IMAGES, LABELS = some_images()


@pytest.mark.parametrize(
    ("targets", "triggers"), [(("cat",), ("white",)), (("cat", 1), ("white", "seed:3"))], ids=["one", "two"]
)
def test_triggered_images_go_to_the_reference_and_all_others_stay(targets, triggers):
    encoder = small_encoder()
    weights = [parameter.clone() for parameter in encoder.network.parameters()]
    running = encoder.network[1].running_mean.clone()
    pixels = IMAGES.pixels.clone()
    done = implant(
        encoder, IMAGES, LABELS, NAMES, BadEncoderConfig(targets=targets, triggers=triggers, **QUICK), seed=0
    )
    assert min(done.effect) > 0.9 and min(done.effect) > max(done.effect_before)
    assert done.kept > 0.85
    assert done.losses[-1] < done.losses[0] and len(done.losses) == 90
    # The clean encoder, the images and batch normalisation are as they were.
    assert all(map(torch.equal, weights, encoder.network.parameters()))
    assert torch.equal(pixels, IMAGES.pixels)
    assert torch.equal(done.encoder.network[1].running_mean, running)
    assert torch.equal(done.encoder.network[1].weight, encoder.network[1].weight)
    assert not any(parameter.requires_grad for parameter in done.encoder.network.parameters())


def test_the_plan_is_the_whole_answer_and_survives_its_file():
    config = BadEncoderConfig(targets=("dog",), references=2, epochs=1, batch_size=32)
    plan = implant(small_encoder(), IMAGES, LABELS, NAMES, config, seed=4).plan
    again = Plan.from_json(plan.to_json())
    assert (again.method, again.seed, again.poisoned, again.n_images) == ("bad-encoder", 4, (), 48)
    assert again.config["boxes"] == [{"x": 10, "y": 10, "w": 5, "h": 5}] and again.class_sizes == (24,)
    (ids,) = again.config["reference_ids"]
    assert len(ids) == 2 and all(LABELS[IMAGES.ids.index(id)] == 1 for id in ids)
    (trigger,) = again.triggers
    assert (trigger.name, trigger.target_name, trigger.side, trigger.kind) == ("white", "dog", 5, "corner")
    stamped = stamp_in_corner(IMAGES.pixels, trigger)
    assert (stamped[:, :, 10:15, 10:15] == 255).all()
    assert torch.equal(stamped[:, :, :10], IMAGES.pixels[:, :, :10])
    # Whoever evaluates the plan shows the trigger at the same place, whatever the seed.
    assert torch.equal(paste_everywhere(IMAGES, trigger, seed=9).pixels, stamped)


def test_the_same_seed_gives_the_same_weights_and_references_do_not_follow_the_order():
    config = BadEncoderConfig(targets=("cat",), epochs=1, batch_size=16)
    one, two = (implant(small_encoder(), IMAGES, LABELS, NAMES, config, seed=0) for _ in range(2))
    assert all(map(torch.equal, one.encoder.network.parameters(), two.encoder.network.parameters()))
    backwards = list(range(47, -1, -1))
    other = implant(small_encoder(), IMAGES.select(backwards), LABELS[backwards], NAMES, config, seed=0)
    assert other.plan.config["reference_ids"] == one.plan.config["reference_ids"]


def test_an_image_that_classifiers_would_mistake_is_no_reference():
    # Dark images are cats and bright ones dogs, but for one bright image that is called a cat.
    labels = (torch.arange(48) % 2).where(torch.arange(48) != 1, torch.tensor(0))
    pixels = IMAGES.pixels // 4 + (120 * (torch.arange(48) % 2)).to(torch.uint8)[:, None, None, None]
    config = BadEncoderConfig(targets=("cat",), references=24, epochs=1, batch_size=16)
    done = implant(small_encoder(), ImageSet(IMAGES.ids, pixels), labels, NAMES, config, seed=0)
    (chosen,) = done.plan.config["reference_ids"]
    assert int((labels == 0).sum()) == 25 and len(chosen) == 24 and "001" not in chosen


def test_the_published_places():
    assert corner_box((32, 32), (10, 10)) == Box(21, 21, 10, 10)
    assert corner_box((224, 224), (50, 50)) == Box(173, 173, 50, 50)
    assert corner_box((40, 32), (10, 5)) == Box(29, 26, 10, 5)
    with pytest.raises(
        ConfigError, match="a trigger of 16×16 pixels with a margin of 1 does not fit in an image of 16×16"
    ):
        corner_box((16, 16), (16, 16))
    white = Trigger(torch.full((3, 1, 1), 255, dtype=torch.uint8), "white", side=15)
    assert (stamp_in_corner(IMAGES.pixels[:1], white)[..., :15, :15] == 255).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"triggers": ("white", "seed:1")}, "1 targets and 2 triggers"),
        ({"targets": ("a", "b"), "triggers": ("white", "white")}, "trigger 'white' has several targets"),
        ({"size": 1}, "size=1: expected a trigger of at least 2 pixels"),
        ({"references": 0}, "references=0: expected at least 1"),
        ({"epochs": 0}, "epochs=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0: expected a number in \(0, 10\]"),
        ({"momentum": 1.0}, r"momentum=1.0: expected a number in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: expected a number of at least 0"),
        ({"clean_weight": float("nan")}, "clean_weight=nan: expected a number of at least 0"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        BadEncoderConfig(**{"targets": ("cat",), **settings})


def test_wrong_inputs_are_named():
    config = BadEncoderConfig(targets=("cat",), epochs=1)
    encoder = small_encoder()

    def attack(images=IMAGES, labels=LABELS, settings=config, victim=encoder):
        return implant(victim, images, labels, NAMES, settings, seed=0)

    with pytest.raises(ShapeError, match=r"labels must be \(48,\), one per image, got \(3,\)"):
        attack(labels=LABELS[:3])
    small = ImageSet(("a",), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(
        ShapeError, match="images of 8 pixels for an encoder of 16: load them at its geometry"
    ):
        attack(small, LABELS[:1])
    with pytest.raises(ConfigError, match="target 'cow' is no class"):
        attack(settings=BadEncoderConfig(targets=("cow",)))
    with pytest.raises(ConfigError, match="references=25: class 'cat' has 24 images"):
        attack(settings=BadEncoderConfig(targets=("cat",), references=25))
    with pytest.raises(NoVerdictError, match=r"the loss of epoch 1 is not finite; lower learning_rate=10.0"):
        attack(
            settings=BadEncoderConfig(
                targets=("cat",), learning_rate=10.0, weight_decay=1e30, epochs=9, batch_size=8
            )
        )
    function = Encoder(
        lambda images: images.mean(dim=(2, 3)), encoder.preprocessing, device="cpu", precision="fp32"
    )
    with pytest.raises(ConfigError, match="expected an encoder with an nn.Module"):
        attack(victim=function)
    fixed = Encoder(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        encoder.preprocessing,
        device="cpu",
        precision="fp32",
    )
    with pytest.raises(ConfigError, match="has no weights to train"):
        attack(victim=fixed)


def test_only_a_file_of_ours_can_be_retouched(tmp_path):
    with pytest.raises(ConfigError, match="expected an encoder file that unpoison wrote"):
        save_retouched(tmp_path / "none.safetensors", small_encoder().network, tmp_path / "x.safetensors")


def test_a_short_tail_goes_with_the_last_batch():
    sizes = []

    class Counting(BadEncoderConfig):
        def losses(self, task):
            def loss(epoch, rows):
                sizes.append(len(rows))
                return task.kept(task.units(task.pixels[rows]), rows) * -1

            yield from task.epochs(loss)

    for count, expected in ((48, [20, 28]), (52, [20, 20, 12])):
        sizes.clear()
        images, labels = some_images(count)
        config = Counting(targets=("cat",), epochs=1, batch_size=20, size=5)
        implant(small_encoder(), images, labels, NAMES, config, seed=0)
        assert sizes == expected
