"""One step of a small model: what most works time."""

import enum
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.system import Style, SystemRank
from benchmarks.work import Checked
from shardproof.leaves import Layout


class Phase(enum.StrEnum):
    """How much of a training step is timed."""

    TRAIN = "train"  # forward, MSE, backward (input too), SGD
    INFERENCE = "forward"  # under no_grad
    RECORDED = "recorded forward"  # with what backward will need
    BOTH = "forward+backward"  # from a given output gradient


@dataclass(frozen=True)
class Block:
    """A model, how it is cut, and what goes through it.

    Attributes:
        name: blocks of one name have the same random numbers.
        build: the plain model without numbers.
        plan: name of a linear -> how it is cut.
        in_shape, out_shape: of input and output, uncut.
        rate: of SGD.
    """

    name: str
    build: Callable[[], nn.Module]
    plan: Mapping[str, Style]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    rate: float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        """What a system must offer."""
        return frozenset(style.value for style in self.plan.values())

    @property
    def in_dim(self) -> int | None:
        """The dim along which the first linear expects its input to be cut."""
        first = next(iter(self.plan.values()))
        return len(self.in_shape) - 1 if first is Style.ROW else None

    @property
    def out_dim(self) -> int | None:
        """The dim along which the last linear leaves its output cut."""
        last = list(self.plan.values())[-1]
        return len(self.out_shape) - 1 if last is Style.COLUMN else None


class Step:
    """One rank's part of a block.

    Args:
        rank: of the system.
        block: what to compute.
        phase: how much of it.
    """

    def __init__(self, rank: SystemRank, block: Block, phase: Phase) -> None:
        self._rank, self._block, self._phase = rank, block, phase
        generator = torch.Generator().manual_seed(_seed(block.name))
        whole = draw(block.build(), generator)
        self._shapes = {name: tuple(value.shape) for name, value in whole.named_parameters()}
        is_training = phase is not Phase.INFERENCE
        self.model = rank.cut(whole, block.plan, training=is_training)
        self._in = rank.layout(block.in_shape, block.in_dim)
        self._out = rank.layout(block.out_shape, block.out_dim)
        self._x = part(torch.randn(block.in_shape, generator=generator), self._in)
        self._x.requires_grad_(is_training)
        self._target = part(torch.randn(block.out_shape, generator=generator), self._out)
        self._leaves = [self._x, *self.model.parameters()]
        self._sgd = torch.optim.SGD(self.model.parameters(), lr=block.rate)
        self.step: Callable[[], Tensor] = {
            Phase.TRAIN: self._train,
            Phase.RECORDED: self._forward,
            Phase.BOTH: self._both,
            Phase.INFERENCE: self._decode,
        }[phase]

    def _train(self) -> Tensor:
        self._forget()
        y = self.model(self._x)
        F.mse_loss(y, self._target).backward()
        self._sgd.step()
        self._finish_gradient()
        return y

    def _forward(self) -> Tensor:
        return self._rank.finish(self.model(self._x))

    def _both(self) -> Tensor:
        self._forget()
        y = self.model(self._x)
        y.backward(self._target)
        self._finish_gradient()
        return y

    @torch.no_grad()
    def _decode(self) -> Tensor:
        return self._rank.finish(self.model(self._x))

    def _forget(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None

    def _finish_gradient(self) -> None:
        if self._x.grad is not None:
            self._rank.finish(self._x.grad)

    def checked(self) -> Iterator[Checked]:
        """Output, gradients and, after an update, the weights."""
        y = self._rank.local(self.step())
        yield Checked("output", y.detach(), self._out)
        if self._phase not in (Phase.TRAIN, Phase.BOTH):
            return
        if self._x.grad is not None:
            yield Checked("input.grad", self._rank.local(self._x.grad), self._in)
        for name, value in self.model.named_parameters():
            layout = self._layout(name)
            if value.grad is not None:
                yield Checked(f"{name}.grad", self._rank.local(value.grad), layout)
            if self._phase is Phase.TRAIN:
                yield Checked(name, self._rank.local(value.detach()), layout)

    def figures(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}

    def _layout(self, parameter: str) -> Layout:
        module, _, name = parameter.rpartition(".")
        style, shape = self._block.plan[module], self._shapes[parameter]
        if name == "weight":
            return self._rank.layout(shape, style.weight_dim)
        return self._rank.layout(shape, None if style.weight_dim else 0)


def draw(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give a model without memory numbers like those of `nn.Linear`."""
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        bound = 1 / math.sqrt(parameter.shape[-1])
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return model


def part(full: Tensor, layout: Layout) -> Tensor:
    """What a rank owns of `full`, with memory of its own."""
    if layout.dim is None:
        return full.clone()
    owned = layout.owned
    return full.narrow(layout.dim, owned.start, len(owned)).clone(
        memory_format=torch.contiguous_format
    )


def linear(in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    """A linear without memory."""
    return nn.Linear(in_features, out_features, bias=bias, device="meta")


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
