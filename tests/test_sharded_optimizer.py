"""The state of an optimizer, shared out over data-parallel ranks: the same bits, and less of it."""

import copy
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import shardproof as sp
from shardproof.errors import MismatchError, UsageError

ROWS = 9
PLAN = {"0": "colwise", "2": "rowwise"}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "muon": lambda parameters: sp.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.1),
}


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6), nn.LayerNorm(6))


def files(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def loss_of(model: nn.Module, x: Tensor, samples: slice) -> Tensor:
    return model(x[samples]).square().sum()


def train(
    axis: sp.Axis,
    model: nn.Module,
    dp: int,
    make: str,
    directory: Path,
    *,
    start: Path | None = None,
    steps: int = 2,
) -> int:
    """Some steps and a checkpoint; the number of parameters with state on this rank."""
    axes = axis.split(dp=dp, tp=axis.size // dp)
    scheme = sp.Scheme(batch_leaves=8)
    model = sp.parallelize(copy.deepcopy(model), PLAN, axes["tp"], scheme=scheme)
    parallel = sp.DataParallel(model, axes["dp"])
    sharded = sp.ShardedOptimizer(OPTIMIZERS[make](model.parameters()), parallel)
    step = 0
    if start is not None:
        with sharded.whole_state() as optimizer:
            step = sp.load(start, model, optimizer).step
    while step < steps:
        x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))
        parallel.backward(partial(loss_of, model, x), len(x))
        sharded.step()
        sharded.zero_grad()
        step += 1
    with sharded.whole_state() as optimizer:
        if axes["dp"].rank == 0:
            sp.save(directory, model, optimizer, step=step)
    return len(sharded.optimizer.state)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_no_bit_changes_and_a_checkpoint_moves(make: str, tmp_path: Path, pool: Any) -> None:
    work = partial(train, model=net(), make=make)
    (count,) = pool(1, "threads").run(partial(work, dp=1, directory=tmp_path / "one"))
    whole = files(tmp_path / "one")
    for dp, tp in ((2, 1), (3, 1), (2, 2)):
        path = tmp_path / f"{dp} {tp}"
        counts = pool(dp * tp, "threads").run(partial(work, dp=dp, directory=path))
        assert files(path) == whole
        assert sum(counts[::tp]) == count
        assert max(counts) < count
    pool(2, "threads").run(partial(work, dp=2, directory=tmp_path / "half", steps=1))
    again = partial(work, dp=3, directory=tmp_path / "again", start=tmp_path / "half")
    pool(3, "threads").run(again)
    assert files(tmp_path / "again") == whole


@pytest.mark.parametrize("engine", ["processes", "gloo"])
def test_on_processes(engine: str, tmp_path: Path, pool: Any) -> None:
    work = partial(train, model=net(), make="adamw")
    pool(1, "threads").run(partial(work, dp=1, directory=tmp_path / "one"))
    pool(3, engine).run(partial(work, dp=3, directory=tmp_path / "three"))
    assert files(tmp_path / "three") == files(tmp_path / "one")


class Remembering(torch.optim.SGD):
    """Keeps a tuple, a text and a tensor beside each other in its state."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for each in group["params"]:
                if each.grad is not None:
                    size = each.numel()
                    self.state[each] = {"kept": (size, 2, True), "name": "x", "sum": each.sum()}


def test_a_state_may_have_tuples() -> None:
    plain = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))

    def work(axis: sp.Axis) -> list[Any]:
        model = copy.deepcopy(plain)
        parallel = sp.DataParallel(model, axis)
        sharded = sp.ShardedOptimizer(Remembering(model.parameters()), parallel)
        x = torch.ones(8, 3)
        parallel.backward(lambda samples: model(x[samples]).square().sum(1), len(x))
        sharded.step()
        with sharded.whole_state() as optimizer:
            return [
                (each["kept"], each["name"], each["sum"].item())
                for each in map(optimizer.state.get, model.parameters())
            ]

    (alone,) = sp.launch(work, degree=1)
    assert [kept for kept, *_ in alone] == [(6, 2, True), (2, 2, True), (6, 2, True), (3, 2, True)]
    assert list(sp.launch(work, degree=3)) == [alone] * 3


def test_more_ranks_than_parameters(tmp_path: Path, pool: Any) -> None:
    work = partial(train, model=net(), make="muon")
    pool(1, "threads").run(partial(work, dp=1, directory=tmp_path / "one"))
    counts = pool(8, "threads").run(partial(work, dp=8, directory=tmp_path / "eight"))
    assert files(tmp_path / "eight") == files(tmp_path / "one")
    assert min(counts) == 0


def test_what_does_not_fit_is_refused() -> None:
    model = nn.Linear(3, 2)
    parallel = sp.DataParallel(model, sp.Axis.solo("dp"))
    used = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    used.step()
    with pytest.raises(UsageError, match="has state already"):
        sp.ShardedOptimizer(used, parallel)
    with pytest.raises(UsageError, match="a parameter that the model"):
        sp.ShardedOptimizer(torch.optim.SGD(nn.Linear(3, 2).parameters()), parallel)
    with pytest.raises(UsageError, match="is not a DataParallel"):
        sp.ShardedOptimizer(torch.optim.SGD(model.parameters()), model)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="optimizer"):
        sp.ShardedOptimizer(model, parallel)  # type: ignore[arg-type]


def test_ranks_with_other_optimizers_all_raise() -> None:
    plain = nn.Linear(3, 2)

    def work(axis: sp.Axis) -> None:
        model = copy.deepcopy(plain)
        parameters = list(model.parameters())
        some = parameters if axis.rank else parameters[:1]
        sp.ShardedOptimizer(torch.optim.SGD(some), sp.DataParallel(model, axis))

    with pytest.raises(MismatchError, match="different optimizers"):
        sp.launch(work, degree=2)
