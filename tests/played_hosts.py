"""Ranks of one machine that take each other for ranks of several hosts."""

from unittest import mock

import torch.distributed as dist

from shardproof.axis import Axis
from shardproof.transport.segment import Host


def over_hosts(axis: Axis, hosts: int, *, timeout: float | None = None) -> Axis:
    """The processes of `axis`, shared out evenly over so many hosts, as `Axis.from_group` has it.

    Args:
        axis: ranks that are processes.
        hosts: how many.
        timeout: seconds of a collective.
    """
    group = dist.group.WORLD
    assert group is not None
    host, here = axis.rank * hosts // axis.size, Host.here

    def played(layout: int, problem: str | None) -> Host:
        real = here(layout, problem)
        return Host(f"host {host}", real.namespace, layout, real.pid, real.began, problem)

    with mock.patch.object(Host, "here", played):
        return Axis.from_group(group, timeout=timeout)
