"""Every example runs on this machine and ends with its own check."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LAST_LINES = {
    "feed_forward.py": "max difference from plain torch",
    "train_a_model.py": "the same bits at every degree: True",
    "under_torchrun.py": "degree 3 has the bits of degree 1: True",
}


def command(name: str) -> list[str]:
    if name == "under_torchrun.py":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
        return [sys.executable, *launcher, str(EXAMPLES / name)]
    return [sys.executable, str(EXAMPLES / name)]


def test_every_example_is_listed_here():
    assert sorted(LAST_LINES) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", LAST_LINES)
def test_example_ends_with_its_check(name):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(name), capture_output=True, text=True, env=environment)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(LAST_LINES[name])
