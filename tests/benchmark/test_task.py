import re
from pathlib import Path

import pytest

from unpoison.attack.blended import SigConfig
from unpoison.attack.ctrl import CtrlConfig
from unpoison.benchmark.images import digest
from unpoison.benchmark.task import AttackConfig, Cell, read_task
from unpoison.errors import ConfigError

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "tasks").glob("*.toml"))


def test_the_cells_are_the_product_of_the_axes(tiny):
    task = tiny()
    assert len(task.cells) == 6 and task.cells[0] == Cell("digits", "patch", "resnet", "no defence", 0)
    assert task.axes["defence"]["PoisonCAM"].config.scan.n_flips == 8
    assert task.axes["victim"]["resnet"].config.epochs == 1


def test_vary_makes_one_entry_per_setting(tiny):
    task = tiny("epochs = 1\n", "vary = [{ epochs = 1 }, { epochs = 2, label = 'longer' }]\n")
    assert list(task.axes["victim"]) == ["resnet epochs=1", "resnet longer"]
    assert [item.family for item in task.axes["victim"].values()] == ["resnet", "resnet"]
    cell = task.cells[-1]
    assert task.value(cell, "victim.epochs") == 2 and task.value(cell, "victim.family") == "resnet"
    assert task.value(cell, "victim.method") == "moco-v2"  # by default
    assert task.value(cell, "defence.kind") == "clean-trained" and task.value(cell, "seed") == 1


def test_grids_choose_by_name_and_by_family_and_count_a_cell_once(tiny):
    grid = (
        "\n[[grid]]\ndefence = 'no defence'\nseeds = [1]\n[[grid]]\ndefence = ['no defence', 'PoisonCAM']\n"
    )
    task = tiny("epochs = 1\n", "vary = [{ epochs = 1 }, { epochs = 2 }]\n", "[[plot]]", grid + "[[plot]]")
    assert len(task.cells) == 2 * 2 * 2
    assert {cell.defence for cell in task.cells} == {"no defence", "PoisonCAM"}


def test_targets_and_triggers_follow_the_seed():
    planned = AttackConfig(pairs=2, share_of_side=0.25).planned(1, 2, 32)
    assert planned.targets == (1, 0) and planned.triggers == ("seed:101", "seed:1101") and planned.size == 8


def test_triggers_without_a_place_follow_the_seed_too():
    def planned(**settings):
        return AttackConfig(rate=0.1, **settings).planned(3, 2, 32)

    assert planned(method="ctrl", strength=200.0) == CtrlConfig(
        target=1, magnitude=200.0, rate=0.1, rate_of="class"
    )
    assert planned(method="sig") == SigConfig(target=1, rate=0.1, rate_of="class")
    assert planned(method="blended").trigger == "seed:103"
    own = planned(method="blended", targets=("cat",), triggers=("a.png",), strength=0.3)
    assert (own.target, own.trigger, own.share) == ("cat", "a.png", 0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "badnet"}, "method='badnet': expected one of ssl-backdoor, ctrl, blended, sig"),
        (
            {"method": "ctrl", "size": 8, "margin": 0.1},
            "ctrl covers the whole image: leave out size, margin",
        ),
        ({"method": "sig", "triggers": ("seed:1",)}, "sig has no pattern to choose: leave out triggers"),
        ({"method": "blended", "targets": (0, 1)}, "blended has one target"),
        ({"method": "ctrl", "strength": -1.0}, "magnitude=-1.0: expected a number in"),
        ({"strength": 2.0}, "strength belongs to triggers that cover the image"),
    ],
)
def test_attacks_whose_settings_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        AttackConfig(**settings)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "epochs = 1",
            "epoch = 1",
            "task.toml: victim.resnet.epoch: unknown setting; did you mean 'epochs'?",
        ),
        (
            "window = 9",
            "widnow = 9",
            "task.toml: defence.PoisonCAM.widnow: unknown setting; did you mean 'window'?",
        ),
        ("epochs = 1", "epochs = '1'", "victim.resnet.epochs: input should be a valid integer, got '1'"),
        ("epochs = 1", "epochs = 0", "victim.resnet: epochs=0: expected at least 1"),
        (
            "epochs = 1",
            "views = { crap = 1 }",
            "victim.resnet.views.crap: unknown setting; did you mean 'crop'?",
        ),
        ("epochs = 1", "views = 3", "victim.resnet.views: expected a table of settings, got 3"),
        ("epochs = 1", "vary = 3", "victim.resnet.vary: expected a list of tables of settings, got 3"),
        ("epochs = 1", "vary = [{label='a'}, {}]", "victim.resnet.vary[0].label: names no change; drop it"),
        ("epochs = 1", "vary = [{}, {}]", "victim.resnet: 'resnet' comes twice; give it another label"),
        ("[victim.resnet]", "[vitcim.resnet]", "vitcim: unknown setting; did you mean 'victim'?"),
        (
            "[victim.resnet]\nepochs = 1\nwidth = 4\nbatch_size = 20",
            "",
            "no victim: expected at least one table",
        ),
        ("[attack.patch]", "attack.patch = 3\n[attack2]", "attack2: unknown setting; did you mean 'attack'?"),
        ("rate = 1.0", "rate = 2.0", "attack.patch: rate=2.0: expected a fraction in (0, 1]"),
        ("rate = 1.0", "targets = [1]", "targets and triggers belong together: give both, or neither"),
        ("rate = 1.0", "size = 3", "size and share_of_side say the same; give one of them"),
        ("rate = 1.0", "pairs = 0", "pairs=0: expected 1 to 20"),
        (
            "share_of_side = 0.25",
            "share_of_side = 2.0",
            "share_of_side=2.0: expected a share between 0 and 1",
        ),
        (
            "rate = 1.0",
            "targets=[1]\ntriggers=['seed:1']\npairs=2",
            "pairs counts the targets that follow the seed",
        ),
        ('embedded = "digits"', "", "data.digits: expected one of folder, images and embedded, got none"),
        ('embedded = "digits"', "images = 'a'\nfolder = 'b'", "got folder and images"),
        ('embedded = "digits"', "embedded = 'dogs'", "embedded='dogs': expected digits or photos"),
        ('embedded = "digits"', "embedded = 'digits'\nsize = 64", "embedded images have 32 pixels"),
        ('embedded = "digits"', "folder = 'a'\ntest_images = 'b'", "test_images belongs to images"),
        ('embedded = "digits"', "folder = 'a'\nheld_out = 1.5", "held_out=1.5: expected a share"),
        ('embedded = "digits"', "folder = 'a'\nsize = 4", "size=4, resize=None: expected 8 to 1024 pixels"),
        ("classes = 3", "classes = 1", "data.digits: classes=1: expected at least 2"),
        ("train = 20", "train = 0", "data.digits: train=0: expected at least 1"),
        (
            'kind = "none"',
            'kind = "hope"',
            "defence.no defence: kind='hope': expected none or scan or clean-trained or distill",
        ),
        (
            'kind = "none"',
            'kind = "none"\nwindow = 9',
            "no defence.window: kind = 'none' does not scan; drop it",
        ),
        ('kind = "none"', 'kind = "none"\nretrain = true', "no defence.retrain: kind = 'none' does not scan"),
        ('kind = "none"', 'kind = "none"\nshare = 0.5', "defence.no defence.share: unknown setting"),
        (
            'kind = "none"',
            'kind = "distill"\nshare = 2.0',
            "no defence: share=2.0: expected a share in (0, 1]",
        ),
        ('kind = "none"', 'kind = "distill"\nwindow = 9', "defence.no defence.window: unknown setting"),
        (
            'kind = "none"',
            'kind = "distill"\ni_cutmix = true',
            "no defence: i_cutmix: expected a defence that trains on images; leave it out",
        ),
        (
            "n_flips = 8",
            "n_flips = 8\nretrain = false\ni_cutmix = true",
            "i_cutmix: expected a defence that trains",
        ),
        (
            "seeds = [0, 1]",
            "seeds = [0, 0]",
            "seeds = [0, 0]: expected different whole numbers, not negative",
        ),
        ('name = "tiny"', "", "name: is missing"),
        ('name = "tiny"', "name = '../x'", "name = '../x': expected letters, digits, - and _"),
        ('name = "tiny"', "schema = 2\nname = 'x'", "schema = 2: this unpoison reads 1"),
        ('name = "tiny"', "name = 'x'\ntable = 3", "no valid TOML"),
        (
            '"knn.accuracy"',
            '"knn.accurcy"',
            "table[0]: unknown measure 'knn.accurcy'; did you mean 'accuracy'?",
        ),
        ('"knn.accuracy"', '"knn.recall"', "measure 'knn.recall': expected linear or knn before the dot"),
        ('"removed"]', '"removed@3"]', "measure 'removed@3': it has one value only; drop the @"),
        ('"removed"]', '"top_accuracy"]', "measure 'top_accuracy': expected @ and one of 5, 10, 20"),
        (
            'rows = ["data", "defence"]',
            'rows = ["deference"]',
            "table[0].rows: unknown axis 'deference'; did you",
        ),
        (
            'rows = ["data", "defence"]',
            'rows = ["victim.epoch"]',
            "unknown setting 'victim.epoch'; did you mean",
        ),
        ('rows = ["data", "defence"]', 'rows = ["seed.x"]', "the axis 'seed' has no settings; drop .x"),
        ('x = "k"', 'x = "kk"', "plot[0].x = 'kk': expected k, false_positive_rate or a setting"),
        ('defence = "PoisonCAM" }', 'defence = "CAM" }', "published[0].where.defence: unknown 'CAM'"),
        (
            'where = { defence = "PoisonCAM" }',
            "where = 3",
            "published[0].where: expected a table of axes, got 3",
        ),
        (
            "accuracy = 69.7, attack_success = 0.7",
            "",
            "published[0].values: expected figures by measure, got none",
        ),
        ("accuracy = 69.7", "acuracy = 69.7", "published[0].values: unknown measure 'acuracy'; did you mean"),
        ("[[published]]", "[published]", "published: expected tables [[published]]"),
        ("[[plot]]", "[[grid]]\ndefence='x'\n[[plot]]", "grid[0].defence: unknown 'x'; expected one of"),
        ("[[plot]]", "[[grid]]\nseeds=[5]\n[[plot]]", "grid[0].seeds: expected some of [0, 1], got [5]"),
        (
            "[[plot]]",
            "[evaluate]\nlabelled = 0\n[[plot]]",
            "evaluate: labelled=0.0: expected a share in (0, 1]",
        ),
        ("classes = 3", "classes = 2020-01-01", "expected numbers, texts, lists or tables"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_its_place(tiny, old, new, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        tiny(old, new)
    assert "\n" not in str(caught.value)


def test_defences_that_train_in_another_way(tiny):
    task = tiny(
        'kind = "none"',
        'kind = "none"\ni_cutmix = true\n\n[defence.student]\nkind = "distill"\nqueues = 1\n'
        "vary = [{ share = 0.5 }, { share = 0.1 }]",
    )
    plain, half, tenth, scan, _ = task.axes["defence"].values()
    assert plain.config.i_cutmix and plain.config.distill is None and plain.config.measures_encoder
    assert (half.name, half.config.distill.share, half.config.distill.queues) == ("student share=0.5", 0.5, 1)
    victim = task.axes["victim"]["resnet"].config
    student = tenth.config.student(victim)
    assert (student.arch, student.width, student.share) == ("resnet10", 4, 0.1)
    by_defence = {cell.defence: cell for cell in task.cells}
    shown = {name: task.value(cell, "defence.share") for name, cell in by_defence.items()}
    assert (shown[half.name], shown[tenth.name], shown[scan.name]) == (0.5, 0.1, None)
    assert task.value(by_defence[half.name], "defence.method") == "compress"
    assert task.value(by_defence[half.name], "defence.window") is None


def test_settings_that_came_later_leave_the_names_of_results_alone():
    before = {"victim": {"epochs": 1}, "defence": {"kind": "none"}}
    now = {"victim": {"epochs": 1, "i_cutmix": False}, "defence": {"kind": "none", "distill": None}}
    mixed = {"victim": {"epochs": 1, "i_cutmix": True}, "defence": {"kind": "none", "distill": None}}
    assert digest(before) == digest(now) != digest(mixed)


def test_a_missing_file_and_no_toml_are_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read; expected a task file"):
        read_task(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = \n")
    with pytest.raises(ConfigError, match="no valid TOML"):
        read_task(tmp_path / "bad.toml")


def test_one_seed_of_a_task(tiny):
    task = tiny()
    assert [cell.seed for cell in task.only_seed(1).cells] == [1, 1, 1]
    with pytest.raises(ConfigError, match="seed 7: expected one of the task's, 0, 1"):
        task.only_seed(7)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_task_is_valid_and_says_its_cost(path):
    task = read_task(path)
    assert task.name == path.stem and task.cells and task.tables
    assert re.search(r"^# Cost: \d+ cells", path.read_text(), re.M)
    if path.stem.startswith(("table1", "table2", "figure1")):
        assert task.published


def test_every_study_is_there_at_both_scales():
    names = {path.stem for path in COMMITTED}
    studies = {
        "table1",
        "table2",
        "table3",
        "figure1",
        "figure4",
        "figure5",
        "figures11-13",
        "topk",
        "targets",
        "rates",
        "icutmix",
        "compress",
        "victims",
    }
    assert names == studies | {f"{name}_small" for name in studies} | {"tiny100"}
