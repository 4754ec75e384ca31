"""Process groups of some ranks of a process group."""

import weakref
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardproof.timeout import START_TIMEOUT

# A group is made once: each new one has threads and connections of its own.
_Parts = dict[tuple[int, ...], dist.ProcessGroup]
_parts: "weakref.WeakKeyDictionary[dist.ProcessGroup, _Parts]" = weakref.WeakKeyDictionary()


def subgroup(
    group: dist.ProcessGroup, ranks: Sequence[int], *, timeout: float | None
) -> dist.ProcessGroup:
    """The process group of some ranks of a group; these ranks call it.

    Args:
        group: a group that this process is in.
        ranks: of the group, this process among them.
        timeout: seconds of a collective, of the first call for these ranks; None: the default of
            torch.distributed.

    Returns:
        The group, which has the backend of `group`.

    Comm:
        setup none in the ledger: the ranks meet, uncounted.
    """
    made = _parts.setdefault(group, {})
    key = tuple(ranks)
    if key not in made:
        of_world = dist.get_process_group_ranks(group)
        # Ranks may be late here, and connect to each other for the first time.
        patience = None if timeout is None else timedelta(seconds=max(timeout, START_TIMEOUT))
        made[key] = dist.new_group(
            [of_world[rank] for rank in ranks],
            timeout=patience,
            backend=dist.get_backend_config(group),
            use_local_synchronization=True,
        )
        if timeout is not None:
            distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), made[key])
    return made[key]
