"""Take the README's tour again: its commands in an empty folder, and what they print in the place of what it shows.

python benchmarks/tour.py          about six minutes on one core; one thread, so that it repeats exactly
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
STEP = re.compile(r"```sh\n(?P<command>[^`]*)```\n\n(?P<mark><!-- tour:\d+ -->)\n\n```text\n[^`]*```")
ENDS_WITH_FINDINGS = 1


def taken(text, folder):
    """The text with today's output after every command of the tour.

    Raises:
        subprocess.CalledProcessError: a command failed; the text is left as it was.
    """

    def again(step):
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }
        command = step["command"]
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode not in (0, ENDS_WITH_FINDINGS):
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
        lines = "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())
        return f"```sh\n{command}```\n\n{step['mark']}\n\n```text\n{lines}\n```"

    return STEP.sub(again, text)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        README.write_text(taken(README.read_text(encoding="utf-8"), folder), encoding="utf-8")
