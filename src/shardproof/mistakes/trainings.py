"""The small trainings of linear layers in which mistakes are made.

Their weights and batches are drawn from seeds of their own; torch's global generator draws nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardproof import comm, optim
from shardproof.axis import Axis
from shardproof.comm import differentiable
from shardproof.errors import UsageError
from shardproof.functional import mse_loss
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.layers.step_guard import declare_elementwise
from shardproof.leaves import Cut, Layout, replicated
from shardproof.mistakes.cut_training import CutTraining, Scored
from shardproof.mistakes.mistake import SetUp
from shardproof.prover.case import CaseRun
from shardproof.prover.cases.mlp import MLP_GATHERED as GATHERED_CASE
from shardproof.prover.training import Batch, Training

IN, OUT, BATCH = 12, 7, 5
EVEN = 48  # units of the cut dim: 8 leaves of 6, so that at degree 2 all shards have one size

Activation = Callable[[Tensor], Tensor]
Change = Callable[[nn.Module, Axis], None]


class FeedForwardBlock(nn.Module):
    """A replicated linear, then column and row parallel ones; every kind of gradient occurs.

    Args:
        front: replicated; its gradients are right only if `up` sums its input gradient.
        up: column parallel, or plain.
        down: row parallel, or plain.
        activation: between `up` and `down`, on what is cut.
    """

    def __init__(
        self, front: nn.Module, up: nn.Module, down: nn.Module, activation: Activation
    ) -> None:
        super().__init__()
        self.front, self.up, self.down = front, up, down
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x: (5, 12), Replicate, to (5, 7), Replicate."""
        y: Tensor = self.down(self.activation(self.up(self.front(x))))
        return y


def linear(in_features: int, out_features: int, seed: int) -> nn.Linear:
    """A plain linear whose weights are drawn from a seed of its own.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        seed: from which weight and bias are drawn.
    """
    layer = nn.Linear(in_features, out_features, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return layer


def batch(columns: int = OUT, *, seed: int = 99) -> tuple[Tensor, Tensor]:
    """Input (5, 12) and target (5, columns), Replicate."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(BATCH, IN, generator=generator),
        torch.randn(BATCH, columns, generator=generator),
    )


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Gradient descent with momentum."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@declare_elementwise
class ResumedSgd(torch.optim.SGD):
    """Momentum that is saved whole after every step, and read again by each rank."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, then the checkpoint."""
        answer = super().step(closure)
        for parameter, state in self.state.items():
            if hasattr(parameter, "place"):
                read_state(state["momentum_buffer"], *parameter.place)
        return answer


def resumed_sgd(parameters: Any) -> torch.optim.Optimizer:
    """Gradient descent with momentum that is saved and read again."""
    return ResumedSgd(parameters, lr=0.02, momentum=0.8)


def read_state(buffer: Tensor, axis: Axis, cut: Cut) -> None:
    """Save the buffers of all ranks as one tensor, and read this rank's part of it."""
    saved = comm.all_gather(buffer, axis, dim=0, cut=cut, direction="update")
    owned = cut.owned(axis.rank)
    buffer.copy_(saved[owned.start : owned.stop])


def calm_sgd(parameters: Any) -> torch.optim.Optimizer:
    """SGD with a small step for several layers; a larger step makes the loss oscillate."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.8)


def small_sgd(parameters: Any) -> torch.optim.Optimizer:
    """SGD with a tiny step, for the large numbers of `TransposedRow`."""
    return torch.optim.SGD(parameters, lr=1e-6)


def rank_of(run: CaseRun) -> int:
    """The rank of this run; 0 in plain torch."""
    return 0 if run.axis is None else run.axis.rank


def read(run: CaseRun, *, columns: int = OUT) -> Batch:
    """Input (5, 12) and target (5, columns): the same on every rank."""
    x, target = batch(columns, seed=99)
    return Batch((x,), target)


def loss(run: CaseRun, output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of a whole output."""
    return F.mse_loss(output, target)


def column(run: CaseRun, whole: nn.Linear, name: str, *, gather_output: bool = False) -> nn.Module:
    """A column-parallel layer with the numbers of a plain one; in plain torch that one."""
    if run.axis is None:
        return whole
    return ColumnParallelLinear.from_linear(
        whole, axis=run.axis, name=name, gather_output=gather_output, scheme=run.scheme
    )


def row(run: CaseRun, whole: nn.Linear, name: str) -> nn.Module:
    """A row-parallel layer with the numbers of a plain one; in plain torch that one."""
    if run.axis is None:
        return whole
    return RowParallelLinear.from_linear(whole, axis=run.axis, name=name, scheme=run.scheme)


def build_block(run: CaseRun) -> FeedForwardBlock:
    """A replicated linear, a column-parallel and a row-parallel one."""
    front = linear(IN, IN, seed=1)
    up = column(run, linear(IN, EVEN, seed=2), "up")
    return FeedForwardBlock(front, up, row(run, linear(EVEN, OUT, seed=3), "down"), torch.relu)


class Masked(nn.Module):
    """Dropout with one mask for all steps.

    Args:
        mask: what is kept.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        """x: (5, 12), Replicate, to the same."""
        return x * self.mask.to(x.dtype)


def build_dropping(run: CaseRun) -> nn.Module:
    """The block behind a dropout of its input, which all ranks have whole."""
    draws = torch.Generator().manual_seed(7)
    mask = torch.rand(BATCH, IN, generator=draws) > 0.3
    return nn.Sequential(Masked(mask), build_block(run))


def build_column(run: CaseRun, *, columns: int = EVEN) -> nn.Module:
    """One column-parallel layer whose output is gathered."""
    return column(run, linear(IN, columns, seed=2), "column", gather_output=True)


def clip(run: CaseRun, model: nn.Module) -> Tensor:
    """Clip gradients by the norm of all of them."""
    if run.axis is None:
        return nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return optim.clip_grad_norm_(model, 0.5)


def build_resumed(run: CaseRun) -> nn.Module:
    """The block, whose cut weight tells the optimizer where it lies."""
    model = build_block(run)
    if run.axis is not None and isinstance(model.up, ColumnParallelLinear):
        model.up.weight.place = (run.axis, model.up.cut)
    return model


def score_block(run: CaseRun, model: nn.Module) -> Scored:
    """The whole output, and its mean squared error."""
    batch = read(run)
    y: Tensor = model(run.cast(batch.inputs[0]))
    error = F.mse_loss(y, run.cast(batch.target))
    return Scored("output", y, replicated(tuple(y.shape)), error)


def build_split(run: CaseRun) -> nn.Module:
    """One column-parallel layer whose output stays cut."""
    return column(run, linear(IN, EVEN, seed=2), "column")


def score_split(run: CaseRun, model: nn.Module) -> Scored:
    """The cut output, and the loss against this rank's columns of the label."""
    batch = read(run, columns=EVEN)
    y: Tensor = model(run.cast(batch.inputs[0]))
    label, shape = run.cast(batch.target), (BATCH, EVEN)
    if run.axis is None:
        return Scored("output", y, replicated(shape), F.mse_loss(y, label))
    cut = Cut(EVEN, run.scheme.leaves, run.axis.size)
    mine = own_columns(label, cut, run.axis.rank)
    total = mse_loss(y, mine, axis=run.axis, cut=cut)
    return Scored("output", y, Layout(shape, run.axis.rank, 1, cut), total)


def own_columns(label: Tensor, cut: Cut, rank: int) -> Tensor:
    """The columns of the label that belong to what a rank computes."""
    owned = cut.owned(rank)
    return label[:, owned.start : owned.stop]


class Gated(nn.Module):
    """A gated feed-forward: two column-parallel layers and a row-parallel one.

    Args:
        gate: its output goes through the activation.
        up: its output is multiplied by the activated gate.
        down: the row-parallel layer.
    """

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        """x: (5, 12), Replicate, to (5, 7), Replicate."""
        y: Tensor = self.down(torch.relu(self.gate(x)) * self.up(x))
        return y


def build_gated(run: CaseRun) -> nn.Module:
    """The gated block; a checkpoint has gate and up as one matrix (96, 12), gate first."""
    gate, up = linear(IN, EVEN, seed=2), linear(IN, EVEN, seed=4)
    fused = torch.cat([gate.weight, up.weight]).detach()
    parts = column(run, gate, "gate"), column(run, up, "up")
    if run.axis is not None:
        owned = Cut(EVEN, run.scheme.leaves, run.axis.size).owned(run.axis.rank)
        mine = rows_of_fused(fused, slice(owned.start, owned.stop))
        with torch.no_grad():
            for layer, rows in zip(parts, mine.chunk(2), strict=True):
                layer.get_parameter("weight").copy_(rows)
    return Gated(*parts, row(run, linear(EVEN, OUT, seed=3), "down"))


def rows_of_fused(fused: Tensor, own: slice) -> Tensor:
    """A rank's rows of the gate, and below them its rows of up."""
    gate, up = fused.chunk(2)
    return torch.cat([gate[own], up[own]])


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).float()


class TransposedRow(nn.Module):
    """A row-parallel product as `(w @ x.T).T`, so that the partial sum is not contiguous.

    It is written by hand, its weight is no parameter; a cut layer comes before.

    Args:
        run: the run of a case, whose axis cuts the layer.
    """

    def __init__(self, run: CaseRun) -> None:
        super().__init__()
        self.whole, self.axis = whole_numbers(8, 16, seed=0), run.axis
        self.scale = nn.Parameter(torch.ones(()))
        before = linear(16, 16, seed=3)
        with torch.no_grad():
            for parameter in before.parameters():
                parameter.mul_(8).round_()
        self.before = column(run, before, "before", gather_output=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (4, 16), Replicate, to (4, 8), Replicate."""
        x = self.before(x)
        if self.axis is None:
            return self.scale * (self.whole.to(x.dtype) @ x.t()).t()
        cut = Cut(x.shape[1], 8, self.axis.size)
        owned = cut.owned(self.axis.rank)
        part = differentiable.shard(x, self.axis, dim=1, cut=cut)
        partial = self.whole[:, owned.start : owned.stop] @ part.t()
        return self.scale * reduce(partial.t(), self.axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the ranks; what is sent must be contiguous."""
    y = differentiable.all_reduce(x.contiguous(), axis)
    return y


def read_whole_numbers(run: CaseRun) -> Batch:
    """Input (4, 16) and target (4, 8)."""
    return Batch((whole_numbers(4, 16, seed=1),), whole_numbers(4, 8, seed=2))


def _training(
    name: str,
    description: str,
    build: Callable[[CaseRun], nn.Module],
    reader: Callable[[CaseRun], Batch] = read,
    **options: Any,
) -> SetUp:
    """A set-up whose output is whole. `build` makes whole layers, so its memory is not audited."""
    training = Training(build, reader, loss, optimizer=calm_sgd, measures_creation=False)
    training = dataclasses.replace(training, **options)
    return SetUp(name, description, lambda steps: dataclasses.replace(training, steps=steps))


def _gathered(steps: int) -> Training:
    work = GATHERED_CASE.work
    if not isinstance(work, Training):
        raise UsageError(f"case {GATHERED_CASE.name} is no training. Name another case.")
    return dataclasses.replace(work, steps=steps)


read_even = functools.partial(read, columns=EVEN)
read_square = functools.partial(read, columns=IN)
BLOCK = _training(
    "block", "a replicated linear, a column-parallel, a row-parallel one", build_block
)
CLIPPED = _training("clipped", "the block, whose gradients are clipped", build_block, clip=clip)
DROPOUT = _training("dropout", "the block behind a dropout of its input", build_dropping)
RESUMED = SetUp(
    "resumed",
    "the block, its momentum saved and read again",
    lambda steps: CutTraining(build_resumed, score_block, resumed_sgd, steps),
)
COLUMN = _training(
    "column", "one column-parallel layer, gathered", build_column, read_even, optimizer=sgd
)
SQUARE = _training(
    "square",
    "one column-parallel layer with a square weight, gathered",
    functools.partial(build_column, columns=IN),
    read_square,
    optimizer=sgd,
)
GATED = _training("gated", "a gated feed-forward, its weights read from one matrix", build_gated)
BY_HAND = _training(
    "by-hand",
    "a row-parallel product written by hand, of whole numbers",
    TransposedRow,
    read_whole_numbers,
    optimizer=small_sgd,
)
TWO_LAYERS = SetUp("mlp-gathered", GATHERED_CASE.description, _gathered)
SPLIT = SetUp(
    "split",
    "one column-parallel layer whose output stays cut, and its loss",
    lambda steps: CutTraining(build_split, score_split, sgd, steps),
)
