"""Python code in a process of its own: for what only the first moments of a process decide."""

import os
import subprocess
import sys
import textwrap

# What would decide the BLAS mode before the code does.
_NOT_INHERITED = ("SHARDPROOF_BLAS", "MKL_CBWR")


def run_fresh(code: str, **environment: str) -> str:
    """Standard output of `code`, run by a new interpreter that finds the tests' helpers too.

    The process has the given variables on top of this one's, without any that set a BLAS mode.
    Fails with its standard error if it does not exit with 0.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
