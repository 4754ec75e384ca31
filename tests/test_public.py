"""The public face: what is exposed, what importing does, and the command."""

import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

import shardproof
import warm
from shardproof.cli.main import main

COMMAND = Path(sys.executable).with_name("shardproof")

QUIET_IMPORT = """
import sys, threading
import torch
threads, seed, dtype = torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype()
state = torch.get_rng_state()

import shardproof

assert not torch.cuda.is_initialized(), "CUDA is initialised"
assert not torch.distributed.is_initialized(), "there is a process group"
assert threading.active_count() == 1, threading.enumerate()
assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())
assert seed == torch.initial_seed() and torch.equal(state, torch.get_rng_state())
assert "sklearn" not in sys.modules, "an extra was imported"
assert "shardproof.cli" not in sys.modules, "the library imports its command line"
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_all_is_what_is_exposed() -> None:
    exposed = {
        name
        for name, value in vars(shardproof).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert exposed == {name for name in shardproof.__all__ if not name.startswith("_")} - modules()
    assert len(shardproof.__all__) == len(set(shardproof.__all__))
    assert all(hasattr(shardproof, name) for name in shardproof.__all__)


def modules() -> set[str]:
    return {found.name for found in pkgutil.iter_modules(shardproof.__path__)}


def test_only_own_modules_are_exposed() -> None:
    for name, value in vars(shardproof).items():
        if isinstance(value, ModuleType) and not name.startswith("_"):
            assert value.__name__ == f"shardproof.{name}", f"{name} leaks out of the package file"


@pytest.mark.parametrize("name", sorted(modules() - {"__main__"}))
def test_no_public_name_hides_a_module(name: str) -> None:
    importlib.import_module(f"shardproof.{name}")
    assert isinstance(getattr(shardproof, name), ModuleType)


def test_star_import_gives_all() -> None:
    names: dict[str, object] = {}
    exec("from shardproof import *", names)
    assert set(shardproof.__all__) <= set(names)


def test_import_starts_nothing() -> None:
    done = run(sys.executable, "-c", QUIET_IMPORT)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_version_is_that_of_the_package() -> None:
    assert importlib.metadata.version("shardproof") == shardproof.__version__


def test_types_are_shipped() -> None:
    assert Path(shardproof.__path__[0], "py.typed").exists()


def test_the_command_and_the_module_are_the_same() -> None:
    script, module = (
        warm.run([sys.executable, COMMAND, "--version"]),
        warm.run([sys.executable, "-m", "shardproof", "--version"]),
    )
    assert script.returncode == module.returncode == 0, script.stderr + module.stderr
    assert script.stdout == module.stdout
    assert shardproof.__version__ in script.stdout


@pytest.mark.parametrize("command", ["prove", "show", "break", "plan", "doctor"])
def test_the_command_knows_its_words(command: str) -> None:
    done = CliRunner().invoke(main, [command, "--help"])
    assert done.exit_code == 0, done.stderr
    assert "--json" in done.stdout


def test_an_unknown_word_is_a_usage_error_without_a_traceback() -> None:
    done = warm.run([sys.executable, COMMAND, "frobnicate"])
    assert done.returncode == 2
    assert "frobnicate" in done.stderr
    assert "Traceback" not in done.stderr
