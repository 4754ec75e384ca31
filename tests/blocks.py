"""Parameters whose cut dim has several blocks, and a model that holds them."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from invariance import normal
from places import Pool
from shardproof.axis import Axis
from shardproof.block_layout import BlockLayout, cut_layout
from shardproof.index_runs import take
from shardproof.layers.cut_module import cut_parameters
from shardproof.layers.registry import record_of
from shardproof.leaves import Layout
from shardproof.optim.layouts import layouts_of
from shardproof.prover.hashing import hash_tensor
from shardproof.scheme import Scheme
from shardproof.units import Block, CutDim, Shared, Units

DEGREES = (1, 2, 3, 5, 8)  # of layouts, which are integers
RUN_DEGREES = (1, 3, 8)  # of ranks that compute
HEAD = 4


def attention(degree: int, queries: int = 6, keys: int = 2) -> Shared:
    """Query heads, and key-value heads that they share."""
    group = queries // keys
    needers = tuple(tuple(range(key * group, (key + 1) * group)) for key in range(keys))
    return Shared(Units("attention", queries, needers), 8, degree)


def fused(degree: int) -> CutDim:
    """Rows of a fused projection: 6 query heads, 2 key heads, 2 value heads."""
    blocks = (Block(6 * HEAD, 0, HEAD), Block(2 * HEAD, 6, HEAD), Block(2 * HEAD, 6, HEAD))
    return CutDim(attention(degree), blocks)


def twice(degree: int, count: int, unit: int) -> CutDim:
    """Two blocks of the same units: gate and up of a feed-forward."""
    block = Block(count * unit, 0, unit)
    return CutDim(Shared(Units("features", count), 8, degree), (block, block))


def scattered(degree: int) -> CutDim:
    """Units in no order, with holes, and one of no index."""
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(12), 3))
    return CutDim.of_labels(Shared(Units("anything", 13), 8, degree), labels)


@dataclass(frozen=True)
class Kind:
    """A parameter and how it is cut.

    Attributes:
        shape: of the whole.
        dim: that is cut.
        along: degree -> how.
    """

    shape: tuple[int, ...]
    dim: int
    along: Any

    def layout(self, degree: int, rank: int) -> Layout:
        return cut_layout(self.shape, rank, dim=self.dim, along=self.along(degree))


KINDS = {
    "fused": Kind((10 * HEAD, 6), 0, fused),
    "bias": Kind((10 * HEAD,), 0, fused),
    "turned": Kind((6, 10 * HEAD), 1, fused),
    "uneven": Kind((5, 26), 1, lambda degree: twice(degree, 13, 1)),
    "idle": Kind((12, 4), 0, lambda degree: twice(degree, 3, 2)),
    "middle": Kind((3, 10 * HEAD, 2), 1, fused),
    "scattered": Kind((36, 3), 0, scattered),
}


def full(name: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole of one of KINDS, the same at every degree."""
    return normal(*KINDS[name].shape, seed=seed + list(KINDS).index(name)).to(dtype)


def part(whole: Tensor, layout: Layout) -> Tensor:
    """What a rank holds of it."""
    if layout.dim is None:
        return whole
    return take(whole, layout.dim, layout.held_runs).clone()


class Holder(nn.Module):
    """One parameter of each kind, and one that stays whole."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name in KINDS:
            self.register_parameter(name, nn.Parameter(full(name, dtype=dtype)))
        self.plain = nn.Parameter(normal(7, seed=9).to(dtype))
        self.name = "a user's own"


def local(parameter: nn.Parameter, layout: Layout, module: nn.Module, name: str) -> Tensor:
    """A wrap that shows what is held."""
    return parameter


def cut(model: nn.Module, axis: Axis, prefix: str = "") -> nn.Module:
    """A `Holder`, cut on this rank."""
    layouts = {f"{prefix}{name}": kind.layout(axis.size, axis.rank) for name, kind in KINDS.items()}
    return cut_parameters(model, layouts, axis=axis, scheme=Scheme(), wrap=local)


def give_gradients(model: nn.Module, seed: int) -> None:
    """The same gradient of the whole at every degree, each rank what it holds of it."""
    for number, (_, parameter, layout, _) in enumerate(layouts_of(model)):
        grad = normal(*layout.shape, seed=seed + number).to(parameter.dtype)
        parameter.grad = part(grad, layout)


def sha(x: Tensor) -> str:
    """Of the bytes in row-major order."""
    return hashlib.sha256(x.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def hashes(model: nn.Module, axis: Axis, tensors: dict[str, Tensor] | None = None) -> list[Any]:
    """Of every parameter, or of a tensor that lies as it does; None on other ranks than 0."""
    found = []
    for name, parameter, layout, _ in layouts_of(model):
        tensor = parameter if tensors is None else tensors[name]
        found.append(hash_tensor(tensor.detach(), layout, axis, who=name))
    return found


def block_layouts(model: nn.Module) -> Iterator[BlockLayout]:
    """The layouts of a cut module that have several blocks."""
    for layout in record_of(model).layouts.values():
        if isinstance(layout, BlockLayout):
            yield layout


def at_every_degree(pool: Pool, work: Callable[[Axis], Any]) -> Any:
    """What rank 0 returns, if it is the same at all degrees."""
    found = {degree: pool(degree, "threads").run(work)[0] for degree in RUN_DEGREES}
    assert all(value == found[1] for value in found.values())
    return found[1]


HASHED = {name: sha(full(name)) for name in KINDS}
