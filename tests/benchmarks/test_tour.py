import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import tour

TEXT = """```sh
{command}
```

<!-- tour:1 -->

```text
old
```

after
"""


def test_a_command_s_output_takes_the_place_of_the_old_one(tmp_path):
    text = TEXT.format(command="echo one; echo two >&2; echo 'three  '")
    assert tour.taken(text, tmp_path) == text.replace("old", "one\nthree")
    text = TEXT.format(command="echo found; exit 1")
    assert tour.taken(text, tmp_path) == text.replace("old", "found")


def test_a_failure_is_no_output(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        tour.taken(TEXT.format(command="exit 3"), tmp_path)


def test_every_step_of_the_readme_is_one():
    text = Path(tour.README).read_text(encoding="utf-8")
    assert len(tour.STEP.findall(text)) == text.count("<!-- tour:") == 5
