"""What every test shares: pools of ranks, the gpu marker, and hypothesis without a clock."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from hypothesis import settings

from shardproof.engines.base import Ranks
from shardproof.ranks import open_ranks

# What the tests were started with decides nothing: where SIGCHLD is ignored, no process can tell
# how its children ended, and what is blocked would be blocked in them too.
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, [])

# A busy machine is slow, not wrong: a deadline would make failures of it.
settings.register_profile("shardproof", deadline=None, print_blob=True)
settings.load_profile("shardproof")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch finds none"))


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int, str], Ranks]]:
    """`pool(degree, engine)`: ranks that all tests share, started when first asked for.

    Starting processes is what tests would otherwise spend their time on. A pool that a failing
    test has broken is replaced.
    """
    pools: dict[tuple[int, str], Ranks] = {}
    with ExitStack() as stack:

        def get(degree: int, engine: str) -> Ranks:
            key = (degree, engine)
            if key not in pools or not pools[key].is_usable:
                pools[key] = stack.enter_context(
                    open_ranks(degree, engine, threads=1, timeout=60.0)
                )
            return pools[key]

        yield get
