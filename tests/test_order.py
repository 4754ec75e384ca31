"""Tests can run in a random order; a seed gives the same one again."""

import subprocess
import sys
from pathlib import Path

import pytest

import warm
from order import seed_of, shuffled

ITEMS = [(file, test) for file in "abcdef" for test in range(7)]


def file_of(item: tuple[str, int]) -> str:
    return item[0]


def test_every_test_is_there_once_and_files_stay_together() -> None:
    found = shuffled(ITEMS, 3, file_of)
    assert sorted(found) == sorted(ITEMS)
    assert found != ITEMS
    files = [file for file, _ in found]
    assert [file for place, file in enumerate(files) if file not in files[:place]] == files[::7]
    assert [test for file, test in found if file == "a"] != list(range(7))


def test_a_seed_gives_the_same_order_again_and_another_seed_another() -> None:
    assert shuffled(ITEMS, 3, file_of) == shuffled(ITEMS, 3, file_of)
    assert shuffled(ITEMS, 3, file_of) != shuffled(ITEMS, 4, file_of)


def test_what_may_be_asked_for() -> None:
    assert seed_of("written") is None
    assert seed_of("random:17") == 17
    assert 0 <= (seed_of("random") or 0) < 10_000
    for order in ("randomly", "random:x", "random:-1", "reverse"):
        with pytest.raises(ValueError, match=f"--order {order} is unknown. Write --order random:S"):
            seed_of(order)


def test_the_option_names_its_seed_and_shuffles() -> None:
    here = Path(__file__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",  # a fork has some plugins already
        str(here),
        "--order",
    ]

    def run(order: str) -> subprocess.CompletedProcess[str]:
        return warm.run([*command, order], cwd=here.parents[1], timeout=120)

    done = run("random:2")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert len(names) == 4
    assert names != [name for name in globals() if name.startswith("test_")]
    assert "--order backwards is unknown" in run("backwards").stderr
