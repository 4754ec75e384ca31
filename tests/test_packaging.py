"""The sources are complete, a wheel has both C modules, and `make setup` says what it does."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("csrc", "src", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILT = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")


def run_setup(folder: Path, *command: str, compiler: Path | None = None) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry and Path(entry) != ROOT)
    environment = {**os.environ, "PYTHONPATH": path}
    if compiler is not None:
        environment["CC"] = str(compiler)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def unoptimized(folder: Path) -> Path:
    """A compiler that takes the options of the build and does not optimize: ten times as fast."""
    script = folder / "cc"
    script.write_text(f'#!/bin/sh\nexec {sysconfig.get_config_var("CC") or "cc"} "$@" -O0\n')
    script.chmod(0o755)
    return script


def why_not() -> str | None:
    if importlib.util.find_spec("setuptools") is None:
        return "needs setuptools"
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        return "needs setuptools 77, as the build does"
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if (
        shutil.which(compiler) is None
        or not Path(sysconfig.get_path("include"), "Python.h").exists()
    ):
        return "needs a C compiler and Python's headers"
    return None


def test_the_sources_that_are_given_away_build_both_modules(tmp_path: Path) -> None:
    if problem := why_not():
        pytest.skip(problem)
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=BUILT)
        else:
            shutil.copy(ROOT / part, copy)
    run_setup(copy, "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("shardproof-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")

    def files(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}

    assert files(unpacked / "csrc") == files(ROOT / "csrc")

    wheel_of = ("bdist_wheel", "--dist-dir", str(tmp_path))
    run_setup(unpacked, "build_ext", "--parallel", "2", *wheel_of, compiler=unoptimized(tmp_path))
    (wheel,) = tmp_path.glob("shardproof-*.whl")
    assert "-cp311-abi3-" in wheel.name, "one wheel for every Python from 3.11 on"
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    for module in ("_kernels", "_shm"):
        assert f"shardproof/{module}.abi3.so" in names
    for data in ("py.typed", "showing/page.css", "showing/page.js"):
        assert f"shardproof/{data}" in names
    assert not [name for name in names if name.endswith((".c", ".h", ".inc"))]
    tools = [name for name in names if not name.startswith(("shardproof/", "shardproof-"))]
    assert tools == [], "benchmarks and the zoo are tools of the repository"


PIP = """#!/bin/sh
echo "python $*"
case "$*" in *"$FAIL"*) exit 3;; esac
"""


def make_setup(folder: Path, fail: str) -> subprocess.CompletedProcess[str]:
    """`make setup` in a copy whose python only prints its arguments, and fails at some.

    The tests may run under `make test`: what that make hands on to a make below it is left out.
    """
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP)
    python.chmod(0o755)
    return subprocess.run(
        ["make", "setup", f"PYTHON={sys.executable}"],
        cwd=folder,
        env={x: y for x, y in os.environ.items() if not x.startswith("MAKE")} | {"FAIL": fail},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_setup_says_what_it_does_before_it_does_it(tmp_path: Path) -> None:
    done = make_setup(tmp_path, "nothing fails")
    assert done.returncode == 0, done.stderr
    torch = next(x for x in (ROOT / "constraints.txt").read_text().split() if x[:7] == "torch==")
    options = "--quiet --disable-pip-version-check -c constraints.txt"
    assert done.stdout.splitlines() == [
        "setup: .venv will have 1.7 GB; that takes some minutes, once",
        f"setup 1 of 4: .venv with {sys.executable}",
        f"setup 2 of 4: {torch} and what it needs (0.8 GB; more where it comes with CUDA)",
        f"python -m pip install {options} {torch}",
        "setup 3 of 4: shardproof itself; builds the C modules kernels shm where there is a "
        "compiler",
        f"python -m pip install {options} --no-deps -e .",
        "setup 4 of 4: the packages for tests and demo: pytest ruff mypy transformers scikit-learn "
        "and what they need (0.9 GB)",
        f"python -m pip install {options} shardproof[demo,dev]",
        "setup: done",
    ]
    assert (tmp_path / ".venv/.setup-stamp").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_step_of_setup_that_fails_ends_it(tmp_path: Path) -> None:
    done = make_setup(tmp_path, "--no-deps")
    assert done.returncode == 2
    assert "setup 3 of 4" in done.stdout
    assert "setup 4 of 4" not in done.stdout
    assert not (tmp_path / ".venv/.setup-stamp").exists()
