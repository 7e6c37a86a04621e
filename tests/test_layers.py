"""The rules of the layout, read off the source code, so that they hold without anybody remembering them.

cli -> pipeline, report -> verb folders -> data, encoders -> functional, records, runtime, errors: a module imports
from its own layer or from lower ones.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "unpoison"
VERBS = ("attack", "pretrain", "scan", "audit", "repair", "evaluate")
LAYERS = [
    {"errors", "callable_package"},
    {"records", "runtime"},
    {"functional"},
    {"data", "encoders"},
    set(VERBS),
    {"report", "runs", "caches"},
    {"pipeline", "patch_pipeline", "detector_pipeline", "audit_pipeline"},
    {"demo", "benchmark"},
    {"cli"},
    {"__init__", "__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

# Who may know the truth: labels and the answer key of an attack.
TRUTH = ("data.labels", "evaluate.truth", "attack.plan")
KNOWS_TRUTH = ("evaluate", "attack", "demo", "benchmark", "cli")
# The one verb that may look into another: it measures against the plan, and runs whole benchmarks.
# The one that trains, with the only training loop there is and what its methods share. And attackers choose what the
# probes of their victims will be sure of.
ACROSS = {
    ("evaluate", "attack.plan"),
    ("evaluate", "attack.ssl_backdoor.paste_everywhere"),
    ("repair", "pretrain"),
    ("attack", "evaluate.probes"),
}
ACROSS_ANYTHING = ("evaluate.benchmark",)

UNPICKLERS = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
RIM = (
    "os",
    "io",
    "pathlib",
    "shutil",
    "tempfile",
    "logging",
    "PIL",
    "pandas",
    "pyarrow",
    "pydantic",
    "picklescan",
)


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name below `unpoison`; a folder's __init__ has the folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = modules()


def top(module: str) -> str:
    return module.split(".")[0]


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = (
                    PACKAGE / Path(*module.split(".")) / "__init__.py"
                ).exists() or module == "__init__"
                here = ["unpoison", *([] if module == "__init__" else module.split("."))]
                here = here[: len(here) - node.level + is_package]
                base = ".".join([*here, base] if base else here)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def internal(module: str, tree: ast.AST) -> Iterator[str]:
    """What a module imports of this package, below `unpoison`."""
    for name in imports(module, tree):
        if name.startswith("unpoison."):
            yield name.removeprefix("unpoison.")


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted text of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def reaches(name: str, target: str) -> bool:
    return name == target or name.startswith(f"{target}.")


def layer_faults(module: str, tree: ast.AST) -> list[str]:
    faults = []
    here = top(module)
    for name in internal(module, tree):
        there = top(name)
        if there not in LAYER:
            faults.append(f"{module} imports {name}, which has no layer in this test")
        elif LAYER[there] > LAYER[here]:
            faults.append(f"{module} imports {name}, which lies above it")
        elif here in VERBS and there in VERBS and here != there and module not in ACROSS_ANYTHING:
            allowed = any(here == verb and reaches(name, target) for verb, target in ACROSS)
            if not allowed:
                faults.append(f"{module} imports {name}: verb folders meet only in pipeline.py")
    return faults


def truth_faults(module: str, tree: ast.AST) -> list[str]:
    return [
        f"{module} imports {name}: only {', '.join(KNOWS_TRUTH)} may know the truth"
        for name in internal(module, tree)
        for target in TRUTH
        if reaches(name, target) and top(module) not in KNOWS_TRUTH and not reaches(module, target)
    ]


def print_faults(module: str, tree: ast.AST) -> list[str]:
    printing = ("print", "sys.stdout.write", "sys.stderr.write", "Console", "rich.print")
    return [
        f"{module}:{node.lineno} prints"
        for name, node in calls(tree)
        if name in printing and top(module) not in ("cli", "__main__")
    ]


def pickle_faults(module: str, tree: ast.AST) -> list[str]:
    if module == "encoders.weights":
        return []
    loads = [
        f"{module}:{node.lineno} calls {name}"
        for name, node in calls(tree)
        if name in ("torch.load", "np.load")
    ]
    names = list(imports(module, tree))
    unpicklers = [
        f"{module} imports {name}" for name in names if top(name) in UNPICKLERS or name == "torch.load"
    ]
    return loads + unpicklers


def randomness_faults(module: str, tree: ast.AST) -> list[str]:
    faults = []
    for name, node in calls(tree):
        if name in ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all") and module != "runtime":
            faults.append(f"{module}:{node.lineno} calls {name}; use runtime.seeded or a generator")
        if name.startswith(("np.random.", "numpy.random.")) and not name.endswith(".default_rng"):
            faults.append(f"{module}:{node.lineno} uses NumPy's global state")
        if name.endswith(".cuda") and name != "torch.cuda":
            faults.append(f"{module}:{node.lineno} calls .cuda(); the device is an argument")
    faults += [f"{module} imports {name}" for name in imports(module, tree) if top(name) == "random"]
    return faults


def purity_faults(module: str, tree: ast.AST) -> list[str]:
    if top(module) != "functional":
        return []
    faults = [f"{module} imports {name}" for name in imports(module, tree) if top(name) in RIM]
    return faults + [f"{module}:{node.lineno} opens a file" for name, node in calls(tree) if name == "open"]


RULES = {
    rule.__name__: rule
    for rule in (layer_faults, truth_faults, print_faults, pickle_faults, randomness_faults, purity_faults)
}


@pytest.mark.parametrize("rule", RULES)
def test_the_package_follows_the_rule(rule):
    assert [fault for module, tree in MODULES.items() for fault in RULES[rule](module, tree)] == []


def test_every_module_has_a_layer():
    assert {top(module) for module in MODULES} <= set(LAYER)


def test_every_package_folder_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("rule", "module", "code"),
    [
        ("layer_faults", "functional.windows", "from unpoison.data import load"),
        ("layer_faults", "scan.poisoncam", "import unpoison.pipeline"),
        ("layer_faults", "scan.poisoncam", "from unpoison.audit.decree import audit"),
        ("layer_faults", "evaluate.probes", "from unpoison.attack.ssl_backdoor import poison"),
        ("layer_faults", "errors", "from .runtime import silent"),
        ("layer_faults", "data.load", "def f():\n    from unpoison.nowhere import x"),
        ("truth_faults", "scan.poisoncam", "from unpoison.data.labels import read_labels"),
        ("truth_faults", "scan.poisoncam", "from unpoison.data import labels"),
        ("truth_faults", "pipeline", "from unpoison.attack import plan"),
        ("truth_faults", "report.as_html", "import unpoison.evaluate.truth"),
        ("print_faults", "scan.poisoncam", "print(1)"),
        ("print_faults", "data.load", "import sys\nsys.stdout.write('x')"),
        ("pickle_faults", "data.load", "import pickle"),
        ("pickle_faults", "data.load", "from torch import load"),
        ("pickle_faults", "encoders.encoder", "torch.load(path)"),
        ("randomness_faults", "pretrain.loop", "torch.manual_seed(0)"),
        ("randomness_faults", "pretrain.loop", "np.random.rand(3)"),
        ("randomness_faults", "pretrain.loop", "import random"),
        ("randomness_faults", "pretrain.loop", "network.cuda()"),
        ("purity_faults", "functional.windows", "from pathlib import Path"),
        ("purity_faults", "functional.windows", "open('x')"),
    ],
)
def test_the_rule_catches(rule, module, code):
    assert len(RULES[rule](module, ast.parse(code))) == 1


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("evaluate.truth", "from unpoison.attack.plan import Plan"),
        ("evaluate.benchmark", "from unpoison.scan import poisoncam"),
        ("cli.attack", "from unpoison.data.labels import read_labels\nprint(1)"),
        ("data.load", "from unpoison.data.export import x\nfrom .decode import y\nfrom ..errors import z"),
        ("runtime", "torch.manual_seed(0)"),
        ("encoders.weights", "torch.load(path, weights_only=True)"),
        ("scan.poisoncam", "torch.cuda.is_available()\nnp.random.default_rng(0)"),
    ],
)
def test_the_rules_allow(module, code):
    assert [fault for rule in RULES.values() for fault in rule(module, ast.parse(code))] == []


@pytest.mark.parametrize("heavy", ["torch", "pandas", "PIL"])
def test_importing_the_package_is_light(heavy):
    code = f"import unpoison, sys; assert {heavy!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(PACKAGE.parent)})
