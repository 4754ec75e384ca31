"""Disable transports that must not be used: in a fork of their rank, or after its call is over.

A fork inherits the transports of its rank. If it used them, it would write into the memory and the
sockets that the ranks share, and the other ranks would mistake it for the rank. So in a fork every
transport becomes a `DisabledTransport`, whose collectives raise. The rank itself pays no cost.
"""

import os
import weakref
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardproof.errors import AxisError
from shardproof.transport.base import Transport, living

# Process groups that this process inherited from the process that it was forked from.
_inherited: "weakref.WeakSet[dist.ProcessGroup]" = weakref.WeakSet()

FORKED = (
    "this process is a fork of that rank, and a fork cannot take part in the rank's collectives. "
    "Let it only read and compute, communicate in the rank itself, or start it with "
    "multiprocessing's 'spawn' method"
)
OVER = (
    "the call of launch or Ranks.run that this axis was made for is over. Make the model inside "
    "the function, on the axis that the function is given, and return plain tensors (of a cut "
    "tensor its `whole()`)"
)


class DisabledTransport(Transport):
    """A disabled transport, which knows its rank and size, and whose collectives raise."""

    why: str

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise AxisError(f"rank {self.rank} of {self.size} cannot be reached here: {self.why}.")

    exchange = all_gather = start_sum = sum = gather_objects = _refuse
    finish = _refuse  # for a sum that was started before

    def __getattr__(self, name: str) -> Any:
        """Refuse all other methods; special methods of Python are simply missing."""
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        self._refuse()


def disable(transport: Transport, why: str) -> None:
    """Let `transport` refuse every collective from now on; a solo transport is not changed."""
    if getattr(transport, "size", 1) > 1:
        name, is_asynchronous = transport.name, transport.is_asynchronous
        transport.__class__ = DisabledTransport
        transport.__dict__.update(name=name, is_asynchronous=is_asynchronous, why=why)


def refuse_inherited(group: dist.ProcessGroup) -> None:
    """Raise if `group` was inherited by a fork.

    Raises:
        AxisError: it was.
    """
    if group in _inherited:
        raise AxisError(
            f"the process group of rank {dist.get_rank(group)} of {dist.get_world_size(group)} was "
            f"made before a fork: {FORKED}."
        )


def _disable_in_fork() -> None:
    for transport in list(living):
        disable(transport, FORKED)
    if dist.is_available():
        _inherited.update(distributed_c10d._world.pg_map)


os.register_at_fork(after_in_child=_disable_in_fork)
