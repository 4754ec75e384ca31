"""`torch.amp.GradScaler` on a cut model: all ranks skip a step together, or none does."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.testing import assert_close

import warm
from invariance import bits_equal, normal
from places import Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.layers.grad_scaler import install
from shardproof.optim import clip_grad_norm_, layouts_of
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, RowParallel

OPTIONS = {"init_scale": 2.0**10, "growth_interval": 2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(11, 37)
        self.act = nn.ReLU()
        self.down = nn.Linear(37, 7)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=seed) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


PLAN = {"up": ColumnParallel(), "down": RowParallel()}
BAD = 36  # a feature that the last rank has, whatever the degree


def spoil(model: nn.Module, value: float) -> None:
    """An overflow in the gradient of one feature, which one rank alone holds."""
    for name, parameter, layout, _ in layouts_of(model):
        if name == "up.weight" and BAD in layout.held_indices:
            assert parameter.grad is not None
            parameter.grad[BAD - layout.held_indices.start] = value


Step = Callable[[GradScaler, list[torch.optim.Optimizer], nn.Module], None]


def plain_step(
    scaler: GradScaler, optimizers: list[torch.optim.Optimizer], model: nn.Module
) -> None:
    for optimizer in optimizers:
        scaler.step(optimizer)


def unscaled_step(
    scaler: GradScaler, optimizers: list[torch.optim.Optimizer], model: nn.Module
) -> None:
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    for each in (model.up, model.down):  # an overflow in one must not spoil the other
        clip_grad_norm_(each, 1.0)
    plain_step(scaler, optimizers, model)


def no_step(scaler: GradScaler, optimizers: list[torch.optim.Optimizer], model: nn.Module) -> None:
    for optimizer in optimizers:
        scaler.unscale_(optimizer)


def whole(model: nn.Module) -> list[Tensor]:
    found = []
    for _, parameter, layout, axis in layouts_of(model):
        value = parameter.detach().clone()
        if axis is not None and layout.cut is not None and layout.dim is not None:
            value = comm.all_gather(value, axis, dim=layout.dim, cut=layout.cut, direction="prover")
        found.append(value)
    return found


def train(
    model: nn.Module,
    step: Step,
    make: Callable[..., GradScaler] = GradScaler,
    bad: dict[int, float] | None = None,
) -> tuple[list[Tensor], list[float]]:
    """Every weight after six steps, and the scale after each; overflows in the steps of `bad`."""
    bad = {1: float("inf"), 4: float("nan")} if bad is None else bad
    scaler = make("cpu", **OPTIONS)
    # Two optimizers: an overflow in one stops that one, and backs off the scale of both.
    optimizers = [
        torch.optim.AdamW(model.up.parameters(), lr=0.01),
        torch.optim.SGD(model.down.parameters(), lr=0.01),
    ]
    scales = []
    for number in range(6):
        loss = model(normal(5, 11, seed=number)).square().mean()
        scaler.scale(loss).backward()
        if number in bad:
            spoil(model, bad[number])
        step(scaler, optimizers, model)
        scaler.update()
        scales.append(scaler.get_scale())
        for optimizer in optimizers:
            optimizer.zero_grad()
    return whole(model), scales


def cut(axis: Axis) -> nn.Module:
    return parallelize(Net(), PLAN, axis)


@pytest.mark.parametrize("step", [plain_step, unscaled_step, no_step])
def test_all_ranks_skip_together_and_keep_the_bits(pool: Pool, step: Step) -> None:
    def run(axis: Axis) -> tuple[list[Tensor], list[float]]:
        return train(cut(axis), step)

    (alone,) = pool(1, "threads").run(run)
    assert alone[1] == [2.0**10, 2.0**9, 2.0**9, 2.0**10, 2.0**9, 2.0**9]
    for degree, engine in ((2, "threads"), (3, "threads"), (8, "threads"), (2, "processes")):
        for weights, scales in pool(degree, engine).run(run):
            assert scales == alone[1]
            assert all(bits_equal(a, b) for a, b in zip(weights, alone[0], strict=True))


def test_a_scaled_step_agrees_with_plain_torch() -> None:
    weights, scales = train(Net(), plain_step)
    for mine, wanted in zip(train(cut(Axis.solo()), plain_step)[0], weights, strict=True):
        assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    assert train(cut(Axis.solo()), plain_step)[1] == scales


class OwnUnscaling(GradScaler):
    """As a scaler of a library: its own way through the gradients, torch's way to step."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, *_: Any
    ) -> dict[torch.device, Tensor]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(inv_scale)
                if not parameter.grad.isfinite().all():
                    found_inf.fill_(1.0)
        return {found_inf.device: found_inf}


class Extended(GradScaler):
    """As accelerate and Lightning have them."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)


@pytest.mark.parametrize("make", [OwnUnscaling, Extended])
@pytest.mark.parametrize("step", [plain_step, unscaled_step])
def test_subclasses_share_too(pool: Pool, make: Callable[..., GradScaler], step: Step) -> None:
    def run(axis: Axis) -> tuple[list[Tensor], list[float]]:
        return train(cut(axis), step, make)

    (alone,) = pool(1, "threads").run(run)
    for degree in (2, 3):
        for weights, scales in pool(degree, "threads").run(run):
            assert scales == alone[1]
            assert all(bits_equal(a, b) for a, b in zip(weights, alone[0], strict=True))


def test_a_scaler_that_is_switched_off_sends_nothing(pool: Pool) -> None:
    def run(axis: Axis) -> int:
        model = cut(axis)
        scaler = GradScaler("cpu", enabled=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler.scale(model(normal(5, 11)).sum()).backward()
        axis.transport.ledger.reset()
        scaler.step(optimizer)
        scaler.update()
        return sum(count.calls for _, _, count in axis.transport.ledger)

    assert pool(2, "threads").run(run) == [0, 0]


def test_one_flag_is_sent_for_each_optimizer_of_cut_parameters(pool: Pool) -> None:
    def run(axis: Axis) -> list[tuple[str, str, int]]:
        model = cut(axis)
        other = nn.Linear(3, 2)
        scaler = GradScaler("cpu", **OPTIONS)
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, other)]
        loss = model(normal(5, 11)).sum() + other(normal(2, 3)).sum()
        scaler.scale(loss).backward()
        axis.transport.ledger.reset()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        return [(direction, kind, count.calls) for direction, kind, count in axis.transport.ledger]

    assert pool(2, "threads").run(run) == [[("update", "all_reduce", 1)]] * 2


def test_ranks_without_gradients_take_part(pool: Pool) -> None:
    """A rank may hold nothing of a layer, or have no gradient: it must not stay away."""

    def run(axis: Axis) -> list[float]:
        model = cut(axis)
        scaler = GradScaler("cpu", **OPTIONS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler.scale(model(normal(5, 11)).sum()).backward()
        if axis.rank == 1:
            optimizer.zero_grad()
        else:
            spoil(model, float("inf"))
        before = model.down.bias.detach().clone()
        scaler.unscale_(optimizer)
        return [float((model.down.bias.detach() - before).abs().max())]

    assert pool(3, "threads").run(run) == [[0.0]] * 3


SHARDED = """
import warnings, torch, json
from torch import nn
import torch.distributed as dist
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import shardproof as sp
from test_scaler import cut, train, plain_step, unscaled_step

def run(axis):
    found = []
    for step in (plain_step, unscaled_step):
        make = lambda *a, **k: ShardedGradScaler(*a, process_group=dist.group.WORLD, **k)
        found.append(train(cut(axis), step, make)[1])
    return found

print(json.dumps(sp.launch(run, degree=2, engine="threads")))
"""


def test_the_scaler_of_fsdp_shares_over_the_axis_too() -> None:
    first, second = json.loads(warm.printed(SHARDED))
    assert first == second
    assert first[0] == [2.0**10, 2.0**9, 2.0**9, 2.0**10, 2.0**9, 2.0**9]


def test_torch_cuda_amps_scaler_is_the_same_class() -> None:
    assert issubclass(torch.cuda.amp.GradScaler, GradScaler)
    assert "_unscale_grads_" not in vars(torch.cuda.amp.GradScaler)


def test_without_the_guard_the_ranks_drift_apart(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: what the scaler of torch does by itself."""
    install()
    originals = {
        name: getattr(GradScaler, name).__wrapped__
        for name in ("_unscale_grads_", "_maybe_opt_step")
    }
    for name, original in originals.items():
        monkeypatch.setattr(GradScaler, name, original)

    def run(axis: Axis) -> list[float]:
        model = cut(axis)
        scaler = GradScaler("cpu", **OPTIONS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler.scale(model(normal(5, 11)).sum()).backward()
        spoil(model, float("inf"))
        scaler.step(optimizer)
        scaler.update()
        return [scaler.get_scale()]

    first, second = pool(2, "threads").run(run)
    assert first != second
