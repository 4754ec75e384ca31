"""Small models of which one part, between two layers that are cut, is what a test is about."""

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import shardproof as sp
from shardproof.layers.base import ShardedModule
from shardproof.ops import unit_ops
from shardproof.plans.watched import cut_by, plan_by_watching
from shardproof.plans.watched_plan import Rehearsal, WatchedPlan
from shardproof.scheme import Scheme
from shardproof.units import Block, Units
from shardproof.watching import Family

BATCH, LENGTH, IN, HIDDEN = 2, 5, 10, 24
RTOL = 1e-9


class Between(nn.Module):
    """`up`, which is cut by columns; what is asked about; `down`, which is cut by rows."""

    def __init__(
        self,
        middle: Callable[[Any, Tensor], Any],
        parts: Callable[[], dict[str, Any]] | None = None,
        width: int | None = HIDDEN,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(IN, HIDDEN)
        for name, part in (parts() if parts else {}).items():
            setattr(self, name, part)
        self.down = None if width is None else nn.Linear(width, IN)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, IN) -> a number."""
        with x.device:  # a step is rehearsed on the meta device
            y = self.middle(self, self.up(x))
            if self.down is not None:
                y = self.down(y)
            return y if y.dim() == 0 else (y.square() * weights(y)).sum()


def weights(x: Tensor) -> Tensor:
    """Numbers that differ, so that no order of elements goes unseen."""
    count = torch.arange(x.numel(), dtype=torch.float64) * 7919 % 1013
    return (count / 1013 + 0.25).to(x.dtype).reshape(x.shape)


def example(dtype: torch.dtype) -> Tensor:
    """What the models take."""
    x = torch.randn(BATCH, LENGTH, IN, generator=torch.Generator().manual_seed(3))
    return x.to(dtype)


def made(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The same model every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make().to(dtype)


def numbers_of(model: nn.Module, x: Any, plan: WatchedPlan | None, axis: Any) -> dict[str, Tensor]:
    """Loss and gradients, whole."""
    region = None if plan is None else cut_by(model, plan, axis)
    loss = model(x)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            if region is not None and plan is not None and name in plan.cuts:
                dim, along = plan.cuts[name]
                grad = unit_ops.gather(grad, dim, region.place(along, "test"))
            found[name] = grad
    return found | {name: each.clone() for name, each in model.named_buffers()}


def by_names(model: nn.Module, x: Any, axis: Any) -> dict[str, Tensor]:
    """Loss and gradients, whole, of a model whose two linears a plan names."""
    styles = {"up": "colwise"} | ({} if model.down is None else {"down": "rowwise"})
    model = sp.parallelize(model, styles, axis)
    loss = model(x)
    loss.backward()
    found = {"loss": loss.detach()}
    cut = {
        (f"{name}.{own}" if name else own): layout
        for name, module in model.named_modules()
        if isinstance(module, ShardedModule)
        for own, _, layout in module.parameters_with_layouts()
    }
    for name, parameter in model.named_parameters():
        grad, dim = parameter.grad, cut[name].dim if name in cut else None
        if grad is not None:
            found[name] = (
                grad if dim is None else torch.cat(axis.gather_small(grad, what=name), dim)
            )
    return found | {name: each.clone() for name, each in model.named_buffers()}


def watched(make: Callable[[], nn.Module]) -> WatchedPlan:
    """What the planner says."""
    x = example(torch.float32)
    return plan_by_watching(made(make, torch.float32), x, degree=2, scheme=Scheme())


def forced(make: Callable[[], nn.Module]) -> WatchedPlan:
    """Every feature of `up` a unit, whatever the planner thinks of it."""
    model = made(make, torch.float32)
    block = (Block(HIDDEN, 0, 1),)
    dims: dict[tuple[str, int], tuple[Block, ...]] = {
        ("up.weight", 0): block,
        ("up.bias", 0): block,
    }
    down = getattr(model, "down", None)
    if down is not None and down.weight.shape[1] == HIDDEN:
        dims["down.weight", 1] = block
    units = Units("features", HIDDEN)
    named = dict(model.named_parameters())
    return WatchedPlan(
        model="Between",
        degree=2,
        scheme=Scheme(),
        families=(Family("features", units, dims, (), "pair", (), ()),),
        whole={},
        shapes={name: tuple(each.shape) for name, each in named.items()},
        dtypes={name: each.dtype for name, each in named.items()},
        rehearsal=Rehearsal("", (), calls=frozenset(name for name, _ in model.named_modules())),
    )


def cut_alike(one: WatchedPlan, other: WatchedPlan) -> bool:
    """True if both cut the same parameters into the same units."""
    mine, theirs = (
        [(each.units.count, each.dims) for each in plan.families] for plan in (one, other)
    )
    return mine == theirs


def dtypes_at(degree: int) -> tuple[torch.dtype, ...]:
    """What runs at a degree: fp64, which is compared with plain torch, where there is one rank."""
    return (torch.float32, torch.float64) if degree == 1 else (torch.float32,)


def run(make: Callable[[], nn.Module], plan: WatchedPlan, degree: int) -> list[dict[Any, Any]]:
    """Numbers of all ranks, by dtype."""
    plan = replace(plan, degree=degree)

    # Ranks that are threads share torch's generator, so none of them makes a model.
    models = {dtype: made(make, dtype) for dtype in dtypes_at(degree)}

    def work(axis: sp.Axis) -> dict[Any, Any]:
        return {
            dtype: numbers_of(copy.deepcopy(model), example(dtype), plan, axis)
            for dtype, model in models.items()
        }

    return sp.launch(work, degree=degree, engine="threads", timeout=60)


def hashes(numbers: dict[str, Tensor]) -> dict[str, str]:
    """One for each tensor."""
    return {
        name: hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16]
        for name, x in numbers.items()
    }


def run_by_names(make: Callable[[], nn.Module], degree: int) -> list[dict[Any, Any]]:
    """Numbers of all ranks in fp64, by dtype, of a model whose two linears a plan names."""
    model = made(make, torch.float64)

    def work(axis: sp.Axis) -> dict[Any, Any]:
        return {torch.float64: by_names(copy.deepcopy(model), example(torch.float64), axis)}

    return sp.launch(work, degree=degree, engine="threads", timeout=60)


def check(make: Callable[[], nn.Module], plan: WatchedPlan, degrees: Sequence[int]) -> None:
    """The same bits at every degree and rank, and the numbers of plain torch."""
    check_runs(make, partial(run, make, plan), degrees)


def check_runs(
    make: Callable[[], nn.Module],
    runs: Callable[[int], list[dict[Any, Any]]],
    degrees: Sequence[int],
) -> None:
    """As `check`, of what `runs` gives for a degree."""
    first: dict[str, str] = {}
    for degree in degrees:
        for rank, found in enumerate(runs(degree)):
            if torch.float64 in found:
                check_values(found[torch.float64], truth(make), f"degree {degree}, rank {rank}")
            own = {
                f"{name} in {dtype}": each
                for dtype, numbers in found.items()
                for name, each in hashes(numbers).items()
            }
            first = first or own
            differ = [name for name in own if own[name] != first[name]]
            assert not differ, f"bits differ at degree {degree}, rank {rank}: {differ}"


@functools.cache
def truth(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The numbers of plain torch, in fp64."""
    return numbers_of(made(make, torch.float64), example(torch.float64), None, None)


def check_values(have: dict[str, Tensor], want: dict[str, Tensor], where: str) -> None:
    """The numbers of plain torch, in fp64."""
    assert have.keys() == want.keys(), (where, have.keys() ^ want.keys())
    for name, x in want.items():
        scale = max(float(x.abs().max()), 1e-3) if x.numel() else 1.0
        error = float((have[name] - x).abs().max()) / scale if x.numel() else 0.0
        assert error <= RTOL, f"{name} at {where}: off by {error:.1e}"
