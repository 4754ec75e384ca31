"""Process groups of some ranks of a process group."""

import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardproof.timeout import START_TIMEOUT

# A group is made once, until it is destroyed: each has threads and connections of its own. With
# each of them the number of groups that were made of its ranks, for the name of the next.
_Parts = dict[tuple[int, ...], tuple[int, "weakref.ref[dist.ProcessGroup]"]]
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
    number, last = made.get(key, (0, None))
    part = None if last is None else last()
    if part is not None and part in distributed_c10d._world.pg_map:
        return part
    of_world = dist.get_process_group_ranks(group)
    # Ranks may be late here, and connect to each other for the first time.
    patience = None if timeout is None else timedelta(seconds=max(timeout, START_TIMEOUT))
    part = _new_group(group, [of_world[rank] for rank in ranks], number, timeout=patience)
    if timeout is not None:
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), part)
    made[key] = number + 1, weakref.ref(part)
    return part


def _new_group(
    group: dist.ProcessGroup, ranks: list[int], number: int, *, timeout: timedelta | None
) -> dist.ProcessGroup:
    """A new process group of global ranks, in their order; `number` of these were made before.

    `dist.new_group(use_local_synchronization=True)` puts the number of groups that this process
    has into the name of the new one. Ranks that have different numbers of groups would wait for
    each other under different names. It also sorts the ranks. Here the name follows from the group,
    the ranks and the number, which are the same on all of them.
    """
    name: Any = f"part {number} of {group.group_name}: {' '.join(map(str, ranks))}"
    backend = distributed_c10d.Backend(dist.get_backend_config(group))
    made, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        ranks,
        backend,
        distributed_c10d._get_default_store(),
        name,
        timeout=distributed_c10d._get_default_timeout(backend) if timeout is None else timeout,
        device_id=distributed_c10d._get_default_group().bound_device_id,
    )
    distributed_c10d._world.pg_group_ranks[made] = {rank: at for at, rank in enumerate(ranks)}
    return made
