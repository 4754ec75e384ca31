"""Where tests of ranks run: degrees and engines, all from the session's pools."""

from collections.abc import Callable

import pytest

from shardproof import c_modules
from shardproof.engines.engine import Ranks

# What carries bytes between processes here.
CARRIER = "gloo" if c_modules.shm() is None else "shm"

Pool = Callable[[int, str], Ranks]

# One rank, an uneven cut over the other engine, and a leaf for each rank.
PLACES = [
    pytest.param(degree, engine, id=f"{engine}-{degree}")
    for degree, engine in ((1, "threads"), (3, "processes"), (8, "threads"))
]
EVERYWHERE = pytest.mark.parametrize(("degree", "engine"), PLACES)
TOGETHER = pytest.mark.parametrize(
    ("degree", "engine"), [place for place in PLACES if place.values[0] != 1]
)
ENGINES = pytest.mark.parametrize("engine", ["threads", "processes"])
