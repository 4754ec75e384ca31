"""The default device of a program (`torch.set_default_device`) is for the program's own tensors.

Ours lie where the tensors lie that we are given. The default is the meta device here: whatever is
made there by mistake has no numbers, so that it cannot go unnoticed.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shardproof as sp
from gpu.checks import block_step, draw
from shardproof.axis import Axis
from shardproof.engines.engine import Ranks
from shardproof.prover.cases.gpt import SelfAttention, attention_style
from shardproof.transport.base import Call

Pool = Callable[[int, str], Ranks]

with torch.random.fork_rng():  # made once: ranks as threads share torch's generator
    torch.manual_seed(0)
    ATTENTION = nn.ModuleDict({"attention": SelfAttention(3, 4, dropout=0.3)})
    FEED_FORWARD = nn.Sequential(nn.Linear(12, 29), nn.GELU(), nn.Dropout(), nn.Linear(29, 12))


def objects(axis: Axis) -> list[Tensor]:
    told = axis.transport.gather_objects(axis.rank + 1, call=Call("agree", "setup", "test"))
    return [torch.tensor(told, device="cpu")]


def block(axis: Axis) -> list[Tensor]:
    return block_step(axis, torch.device("cpu"), draw(12, 37))


def planned(axis: Axis) -> list[Tensor]:
    """Attention with dropout of its weights, cut by a plan; and what all parameters say."""
    x = draw(2, 5, 12)
    plan = {"attention": attention_style(3, 4)}
    cut = sp.parallelize(copy.deepcopy(ATTENTION), plan, axis)
    y = cut["attention"](x)
    y.square().sum().backward()
    return [y.detach(), sp.grad_norm(cut), sp.max_over_parameters(cut), sp.parameter_norm(cut)]


def watched(axis: Axis) -> list[Tensor]:
    x = draw(2, 5, 12)
    cut = sp.parallelize(copy.deepcopy(FEED_FORWARD), None, axis, inputs=x)
    y = cut(x)
    y.square().sum().backward()
    return [y.detach(), sp.grad_norm(cut)]


@pytest.mark.parametrize("engine", ["threads", "processes", "gloo"])
@pytest.mark.parametrize("work", [objects, block, planned, watched])
def test_the_default_device_moves_nothing_of_ours(
    pool: Pool, engine: str, work: Callable[[Axis], list[Tensor]]
) -> None:
    def with_default(axis: Axis) -> list[Tensor]:
        with torch.device("meta"):
            return work(axis)

    ranks = pool(2, engine)
    for plain, found in zip(ranks.run(work), ranks.run(with_default), strict=True):
        assert found
        assert all(map(torch.equal, plain, found))
