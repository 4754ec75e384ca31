"""What tests of ranks that disagree share: places over every transport, and small layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardproof as sp
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import MismatchError
from shardproof.transport.distributed import DistributedTransport

# "processes" share memory where they can; "gloo" are the same ranks over their process group.
PLACES = ("threads", "processes", "gloo")
EVERY_TRANSPORT = pytest.mark.parametrize("engine", PLACES)


def gloo(name: str = "tp") -> Axis:
    """A new axis over the process group of a rank that is a process."""
    group = dist.group.WORLD
    assert group is not None
    return Axis(name, DistributedTransport(group))


def run(pool: Pool, engine: str, work: Callable[[Axis], Any], degree: int = 2) -> list[Any]:
    """Every rank's result."""
    if engine != "gloo":
        return pool(degree, engine).run(work)
    return pool(degree, "processes").run(lambda axis: work(gloo()))


def said(attempt: Callable[[], object]) -> str:
    """The message of the MismatchError that an attempt raises; "" if it raises none."""
    try:
        attempt()
    except MismatchError as error:
        return str(error)
    return ""


def check_all_said(messages: list[str], *words: str) -> None:
    """All ranks raised the same error, and it has these words."""
    assert len(set(messages)) == 1, messages
    for word in words:
        assert word in messages[0], messages[0]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(seed: int = 7) -> nn.Sequential:
    """Linear, GELU, Linear; torch's global generator is not asked."""
    model = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return model


MODEL = plain()


def mlp(axis: Axis) -> nn.Module:
    """Column and row parallel, the same numbers on every rank."""
    return sp.parallelize(
        copy.deepcopy(MODEL), {"0": sp.ColumnParallel(), "2": sp.RowParallel()}, axis
    )
