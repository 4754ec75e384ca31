"""What is given away: the sources are complete, and a wheel built of them has both C modules."""

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


def run_setup(folder: Path, *command: str) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry and Path(entry) != ROOT)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr


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
    """Some 20 s: both modules are compiled."""
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

    run_setup(unpacked, "build_ext", "--parallel", "2", "bdist_wheel", "--dist-dir", str(tmp_path))
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
