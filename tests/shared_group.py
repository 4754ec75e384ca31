"""Projections that read one input: whole, cut, linked or not, and one step of them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from invariance import normal
from shardproof import comm
from shardproof.axis import Axis
from shardproof.heads import Heads
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.layers.shared import link
from shardproof.scheme import Numerics, Scheme

Tensors = dict[str, Tensor]
LEAVES = 8


@dataclass(frozen=True)
class Group:
    """Two projections of equal width, or query, key and value of an attention.

    Attributes:
        widths: of gate and up; or query heads and key-value heads.
        head_dim: 0 for gate and up.
    """

    widths: tuple[int, int]
    head_dim: int = 0
    in_features: int = 20
    leading: tuple[int, ...] = (3,)
    bias: bool = True
    dtype: torch.dtype = torch.float64
    numerics: Numerics = "invariant"
    is_linked: bool = True

    @property
    def who(self) -> str:
        return "layers.0.self_attn" if self.head_dim else "layers.0.mlp"

    @property
    def names(self) -> tuple[str, ...]:
        return ("q", "k", "v") if self.head_dim else ("gate", "up")

    @property
    def features(self) -> tuple[int, ...]:
        queries, keys = self.widths
        if not self.head_dim:
            return queries, keys
        return queries * self.head_dim, keys * self.head_dim, keys * self.head_dim

    @property
    def tolerance(self) -> dict[str, float]:
        return {
            torch.float64: {"rtol": 1e-12, "atol": 1e-12},
            torch.float32: {"rtol": 1e-5, "atol": 3e-4},
            torch.bfloat16: {"rtol": 5e-2, "atol": 0.5},
        }[self.dtype]

    def heads(self, degree: int) -> Heads | None:
        if not self.head_dim:
            return None
        return Heads(*self.widths, self.head_dim, LEAVES, degree)

    def linears(self) -> list[nn.Linear]:
        """The whole layers, the same on every rank."""
        made = []
        for seed, width in enumerate(self.features):
            linear = nn.Linear(self.in_features, width, self.bias, dtype=self.dtype, device="meta")
            linear.to_empty(device="cpu")
            with torch.no_grad():
                for number, parameter in enumerate(linear.parameters()):
                    parameter.copy_(normal(*parameter.shape, seed=10 * seed + number))
            made.append(linear)
        return made

    def layers(self, axis: Axis) -> list[ColumnParallelLinear]:
        heads, scheme = self.heads(axis.size), Scheme(LEAVES, self.numerics)
        cuts, held = [None] * 2, None
        if heads is not None:
            cuts, held = [heads.query_cut, heads.key_cut, heads.key_cut], heads.held(axis.rank)
        made = [
            ColumnParallelLinear.from_linear(
                linear,
                axis=axis,
                scheme=scheme,
                name=name,
                cut=cut,
                held=held if number else None,
            )
            for number, (linear, name, cut) in enumerate(
                zip(self.linears(), self.names, cuts, strict=True)
            )
        ]
        if self.is_linked:
            link(made, heads=heads, who=self.who)
        return made

    def data(self) -> tuple[Tensor, list[Tensor]]:
        """x and the gradient of every output, whole."""
        x = normal(*self.leading, self.in_features, seed=3).to(self.dtype)
        grads = [
            normal(*self.leading, width, seed=40 + number).to(self.dtype)
            for number, width in enumerate(self.features)
        ]
        return x, grads


ATTENTIONS = ((8, 4), (4, 2), (4, 1), (6, 2), (3, 3))
GROUPS = [
    Group((29, 29)),
    Group((5, 5), leading=(2, 3), bias=False),  # fewer features than ranks
    Group((24, 24), leading=()),
    Group((9, 9), leading=(2, 0, 3)),
    *[Group(widths, 4) for widths in ATTENTIONS],
    Group((4, 2), 3, leading=(2, 5), bias=False),
    Group((6, 2), 5, leading=(1,)),
]
# Where bits can differ: fp32, larger, odd.
LARGER = [
    Group((203, 203), in_features=117, leading=(37,), dtype=torch.float32),
    Group((600, 600), in_features=70, leading=(2, 9), dtype=torch.float32),
    *[
        Group(widths, 24, in_features=117, leading=(37,), dtype=torch.float32)
        for widths in ATTENTIONS
    ],
    Group((8, 2), 40, in_features=65, leading=(1, 3), dtype=torch.float32),
    Group((6, 2), 24, in_features=117, leading=(37,), dtype=torch.bfloat16),
    Group((203, 203), in_features=117, leading=(5,), dtype=torch.bfloat16),
]


def held_part(x: Tensor, layer: ColumnParallelLinear, dim: int = -1) -> Tensor:
    """What this rank holds of something whole along out_features."""
    held = layer.layouts["weight"].held_indices
    return x.narrow(dim, held.start, len(held))


def whole(x: Tensor, layer: ColumnParallelLinear, dim: int) -> Tensor:
    """Put together from what the ranks own of it."""
    split = layer.split
    own = split.leaves.own
    x = x.narrow(dim, own.start, own.stop - own.start)
    return comm.all_gather(x.detach(), split.axis, dim=dim, cut=split.cut, direction="prover")


@functools.cache
def expected(group: Group, used: tuple[int, ...] | None = None) -> Tensors:
    """What plain torch computes; backward through the outputs of `used`, by default of all.

    Every rank and degree compares with the same tensors, so nobody may change them.
    """
    linears, (x, grads) = group.linears(), group.data()
    x.requires_grad_()
    outputs = [linear(x) for linear in linears]
    members = range(len(outputs)) if used is None else used
    torch.autograd.backward([outputs[i] for i in members], [grads[i] for i in members])
    assert x.grad is not None
    found = {"x.grad": x.grad}
    for name, linear, y in zip(group.names, linears, outputs, strict=True):
        found[f"{name}.y"] = y.detach()
        found |= _gradients(name, linear)
    return found


def _gradients(name: str, linear: nn.Module) -> Tensors:
    named = linear.named_parameters()
    return {f"{name}.{kind}.grad": p.grad for kind, p in named if p.grad is not None}


def step(
    group: Group,
    layers: Sequence[ColumnParallelLinear],
    used: Sequence[int] | None = None,
) -> Tensors:
    """Forward and backward on this rank: its outputs and gradients, as it holds them."""
    x, grads = group.data()
    before = x.clone()
    x.requires_grad_()
    outputs = [layer(x) for layer in layers]
    used = range(len(outputs)) if used is None else used
    torch.autograd.backward(
        [outputs[i] for i in used], [held_part(grads[i], layers[i]) for i in used]
    )
    assert torch.equal(x, before)
    assert x.grad is not None
    found = {"x.grad": x.grad}
    for name, layer, y in zip(group.names, layers, outputs, strict=True):
        found[f"{name}.y"] = y.detach()
        found |= _gradients(name, layer)
    return found


def computed(axis: Axis, group: Group, used: Sequence[int] | None = None) -> Tensors:
    """One step, put together from all ranks."""
    layers = group.layers(axis)
    named = dict(zip(group.names, layers, strict=True))
    return {
        name: value
        if name == "x.grad"
        else whole(value, named[name.split(".")[0]], -1 if name.endswith(".y") else 0)
        for name, value in step(group, layers, used).items()
    }


def held_of(found: Tensors, group: Group, layers: Sequence[ColumnParallelLinear]) -> Tensors:
    """This rank's part of what is whole."""
    named = dict(zip(group.names, layers, strict=True))

    def part(name: str, value: Tensor) -> Tensor:
        if name == "x.grad":
            return value
        return held_part(value, named[name.split(".")[0]], -1 if name.endswith(".y") else 0)

    return {name: part(name, value) for name, value in found.items()}
