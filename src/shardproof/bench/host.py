"""The process that owns one system: it starts the ranks, or is the only one.

    python -m shardproof.bench.host SYSTEM RANKS WIRE

The BLAS mode is one per process, so every system has a host of its own, started with the mode that
it needs in its environment.
"""

import functools
import sys
from pathlib import Path

import torch

from shardproof.bench.rank import serve
from shardproof.bench.systems.catalog import find_system
from shardproof.ranks import open_ranks

TIMEOUT = 120.0  # seconds that a rank waits for another one; the longest step takes one


def main(name: str, ranks: int, wire: Path) -> None:
    """Serve the bench at `wire` with `ranks` ranks of the system `name`."""
    system = find_system(name)
    work = functools.partial(serve, system=name, ranks=ranks, wire=wire)
    if system.engine == "alone":
        torch.set_num_threads(system.threads)
        work(None)
        return
    with open_ranks(
        ranks,
        system.engine,
        threads=system.threads,
        timeout=TIMEOUT,
        transport=system.transport,
    ) as opened:
        opened.run(work)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
