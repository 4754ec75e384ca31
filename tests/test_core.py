"""The two modules in C: when they are used, why they are not, and what one rank's end refuses."""

import importlib
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from shardproof import c_modules
from shardproof.errors import UsageError

CSRC = Path(__file__).parents[1] / "csrc"
NAMES = pytest.mark.parametrize("name", ["kernels", "shm"])


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing has been loaded yet, and afterwards all is as before."""
    monkeypatch.delenv(c_modules.VARIABLE, raising=False)
    c_modules._load.cache_clear()
    yield monkeypatch
    c_modules._load.cache_clear()


def missing_because(fresh: pytest.MonkeyPatch, name: str, found: object) -> str:
    """Why the module is missing if this is imported, or raised, for it."""

    def imported(wanted: str) -> object:
        assert wanted == f"shardproof._{name}"
        if isinstance(found, Exception):
            raise found
        return found

    fresh.setattr(importlib, "import_module", imported)
    assert getattr(c_modules, name)() is None
    return c_modules.problem(name) or ""


@NAMES
@pytest.mark.parametrize("protocol", [None, c_modules._PROTOCOL - 1, c_modules._PROTOCOL + 1])
def test_a_module_of_other_sources_is_as_good_as_missing(
    name: str, protocol: int | None, fresh: pytest.MonkeyPatch
) -> None:
    old = ModuleType("old") if protocol is None else SimpleNamespace(PROTOCOL=protocol)
    assert missing_because(fresh, name, old) == (
        f"shardproof._{name} was built from other sources than these. Install shardproof again, "
        "on a machine with a C compiler and Python's headers"
    )


@NAMES
def test_the_number_that_is_expected_stands_in_the_sources(
    name: str, fresh: pytest.MonkeyPatch
) -> None:
    text = "".join(path.read_text() for path in sorted((CSRC / name).iterdir()))
    assert re.findall(r"\bPROTOCOL = (\d+)", text) == [str(c_modules._PROTOCOL)]
    now = SimpleNamespace(PROTOCOL=c_modules._PROTOCOL)
    fresh.setattr(importlib, "import_module", lambda _: now)
    assert getattr(c_modules, name)() is now
    assert c_modules.problem(name) is None


@NAMES
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("No module"),
            "is not there. It is built when shardproof is installed on a machine with a C compiler "
            "and Python's headers: install both, then shardproof again",
        ),
        (ImportError("no symbol"), "cannot be loaded (no symbol). Install shardproof again"),
    ],
)
def test_what_cannot_be_imported_says_what_to_do(
    name: str, error: Exception, said: str, fresh: pytest.MonkeyPatch
) -> None:
    assert missing_because(fresh, name, error) == f"shardproof._{name} {said}"


def test_a_rank_is_in_one_call_at_a_time_and_in_none_after_it_gave_up() -> None:
    module = c_modules.shm()
    if module is None:
        pytest.skip("the C core was not built")

    def tick(waited: float, missing: list[int]) -> None:
        if missing:  # rank 1 is not there: use the long wait for another call
            end.meet(2)

    end = module.Core(mmap.mmap(-1, module.area_bytes(2, 65536)), 0, 2, 65536, tick)
    with pytest.raises(UsageError, match="two threads use one rank's transport at the same"):
        end.meet(1)
    assert end.is_lost
    with pytest.raises(RuntimeError, match="this transport was interrupted before"):
        end.meet(1)
