"""What every test shares: pools of ranks, order, the gpu marker, hypothesis without a clock."""

import faulthandler
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Idle threads of OpenMP sleep. They would spin, and take the cores from the ranks of other tests.
# It is read when torch is imported, here and in all processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

import warm
from order import WRITTEN, seed_of, shuffled
from shardproof.engines import processes
from shardproof.engines.engine import Ranks
from shardproof.numerics import mode
from shardproof.ranks import open_ranks

# Reset inherited signal settings. With SIGCHLD ignored, a process cannot read its children's exit
# codes; blocked signals would stay blocked in children.
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell does so for a background job
    signal.signal(signal.SIGINT, signal.default_int_handler)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
# Hundreds of processes are started; without compiled files each would compile the package again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A busy machine is slow, not wrong: a deadline would make failures of it.
settings.register_profile("shardproof", deadline=None, print_blob=True)
settings.load_profile("shardproof")


# These go first, so that no worker is left alone with one of them at the end.
LONGEST = (
    "test_cases.py",
    "test_compile.py",
    "test_notebook.py",
    "test_own_models.py",
    "test_ranks.py",
    "test_readme.py",
    "test_rounding.py",
    "test_signals.py",
    "test_train.py",
    "test_whole_optimizers.py",
    "test_zoo_models.py",
)
OF_PYTEST = ("/_pytest/", "/pluggy/", "/xdist/", "/execnet/", '"<string>"', "Extension modules")
SEED = pytest.StashKey[int | None]()
# Where workers of pytest-xdist write their stacks if they crash, so that the end of the run shows
# them: pytest itself writes them where they are lost among the output.
CRASHES = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--order",
        default=WRITTEN,
        metavar="random[:SEED]",
        help="shuffle the files, and the tests of each file",
    )
    parser.addoption(
        "--kills", type=int, default=3, metavar="N", help="how often a rank is killed in a save"
    )
    fuzz = parser.getgroup("fuzz", "random models (tests/test_fuzz.py)")
    fuzz.addoption("--fuzz-seconds", type=float, default=3.0, help="how long; 3 if not given")
    fuzz.addoption("--fuzz-seed", type=int, default=0, help="of the models; 0 if not given")


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[SEED] = seed_of(config.getoption("--order"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    # A worker of pytest-xdist does not draw again: all of them must have the same order.
    given = getattr(config, "workerinput", {})
    config.stash[SEED] = given.get("order", config.stash[SEED])
    if not given:
        config.stash[CRASHES] = tempfile.TemporaryDirectory(prefix="shardproof-crashes-")
    state = mode.set_blas_mode()
    if not state.took:
        raise pytest.UsageError(f"the tests need invariant numerics, and {state.problem}")


@pytest.hookimpl(optionalhook=True)  # only pytest-xdist calls it
def pytest_configure_node(node: Any) -> None:
    node.workerinput["order"] = node.config.stash[SEED]
    node.workerinput["crashes"] = node.config.stash[CRASHES].name


def pytest_sessionstart(session: pytest.Session) -> None:
    given = getattr(session.config, "workerinput", {})
    if "crashes" in given:
        path = Path(given["crashes"]) / given["workerid"]
        faulthandler.enable(path.open("w"))  # it stays open as long as the worker lives


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if CRASHES not in config.stash:
        return
    with config.stash[CRASHES] as folder:
        for path in sorted(Path(folder).iterdir()):
            lines = path.read_text().splitlines()
            if lines:
                terminalreporter.section(f"stacks of worker {path.name} when it crashed")
            for line in lines:
                if not any(each in line for each in OF_PYTEST):
                    terminalreporter.line(line)


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.stash[SEED]
    return None if seed is None else f"order: random:{seed}"


@pytest.hookimpl(tryfirst=True)  # pytest then puts those together that share a fixture
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.stash[SEED]
    if seed is None:
        items.sort(key=lambda item: item.path.name not in LONGEST)
    else:
        items[:] = shuffled(items, seed, lambda item: item.path)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch finds none"))


@pytest.fixture(autouse=True, scope="session")
def _warm_ranks() -> Iterator[Any]:
    """Ranks that are processes are forks of an interpreter that has imported torch."""
    original = processes.start_process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "start_process", warm.start_process)
        yield original


@pytest.fixture(autouse=True)
def _fresh_ranks(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _warm_ranks: Any
) -> None:
    """A test marked `fresh_ranks` is about how the package itself starts them."""
    if request.node.get_closest_marker("fresh_ranks") is not None:
        monkeypatch.setattr(processes, "start_process", _warm_ranks)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int, str], Ranks]]:
    """`pool(degree, engine)`: ranks that all tests share, started when first asked for.

    The engine "gloo" is processes that send over gloo, also where they could share memory.

    Starting processes is what tests would otherwise spend their time on. A pool that a failing
    test has broken is replaced.
    """
    pools: dict[tuple[int, str], Ranks] = {}
    with ExitStack() as stack:

        def get(degree: int, engine: str) -> Ranks:
            key = (degree, engine)
            if key not in pools or not pools[key].is_usable:
                kind, transport = ("processes", "gloo") if engine == "gloo" else (engine, "auto")
                pools[key] = stack.enter_context(
                    open_ranks(degree, kind, threads=1, timeout=60.0, transport=transport)
                )
            return pools[key]

        yield get
