import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import unpoison

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", unpoison.__all__)
def test_every_public_name_exists(name):
    home = unpoison._HOME_OF.get(unpoison._SHORTER.get(name, name))
    if home is not None and find_spec(f"unpoison.{home}") is None:
        pytest.skip(f"unpoison.{home} is not written yet")
    value = getattr(unpoison, name)
    assert value is getattr(unpoison, name)
    assert name == "__version__" or value.__doc__


def test_the_list_is_sorted_complete_and_found_by_dir():
    assert unpoison.__all__ == sorted(unpoison.__all__, key=str.swapcase) or unpoison.__all__ == sorted(
        unpoison.__all__
    )
    lazy = {name for names in unpoison._HOMES.values() for name in names}
    public = {unpoison._SHORTER.get(name, name) for name in unpoison.__all__}
    assert public == lazy | {"__version__"}
    assert set(dir(unpoison)) == set(unpoison.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'unpoison' has no attribute 'scam'"):
        _ = unpoison.scam


def test_the_version_is_that_of_the_project():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == unpoison.__version__


def test_types_are_declared_for_every_lazy_name():
    text = Path(unpoison.__file__).read_text(encoding="utf-8")
    declared = text[text.index("if TYPE_CHECKING") : text.index("__version__ =")]
    assert all(name in declared for name in unpoison._HOME_OF)


@pytest.mark.parametrize("command", [["-c", "import unpoison"], ["-m", "unpoison", "--help"]])
def test_it_answers_without_torch_and_fast(command):
    watched = [sys.executable, "-X", "importtime", *command]
    started = time.perf_counter()
    done = subprocess.run(
        watched, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT / "src")}
    )
    assert time.perf_counter() - started < 3  # 0.2 s on an idle machine
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "numpy", "pandas", "PIL", "pyarrow", "jinja2"} & modules


@pytest.mark.parametrize("first", ["from unpoison import ScanConfig", "import unpoison.scan.search", "pass"])
@pytest.mark.parametrize("verb", ["scan", "pretrain", "audit"])
def test_a_function_that_shares_its_name_with_a_package_can_always_be_called(first: str, verb: str) -> None:
    code = (
        f"{first}\nimport unpoison\ntry:\n    unpoison.{verb}()\nexcept TypeError as error:\n    print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"{verb}() missing" in ran.stdout
