"""All systems, by name, and those that need no other library: ours, plain torch and a copy."""

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import (
    CUDA_ONLY,
    DeepSpeed,
    DTensors,
    Fairscale,
    HuggingFace,
    Megatron,
)
from benchmarks.system import ANY_DEGREE, LINEARS, SUM, TRANSFORMER, Sent, Style, System, SystemRank
from shardproof.axis import Axis
from shardproof.comm.plans import tree_order
from shardproof.errors import UsageError
from shardproof.leaves import Cut, Layout
from shardproof.numerics import mode
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, Plan, RowParallel
from shardproof.plans.style import Style as PlanStyle
from shardproof.prover.hashing import hash_tensor
from shardproof.scheme import NUMERICS, Numerics, Scheme
from shardproof.transport.base import Call

STYLES: dict[Style, PlanStyle] = {
    Style.COLUMN: ColumnParallel(),
    Style.COLUMN_GATHERED: ColumnParallel(gather_output=True),
    Style.ROW: RowParallel(),
    Style.ROW_SCATTERED: RowParallel(input_is_parallel=False),
}


class Ours(SystemRank):
    """A rank of shardproof: `parallelize` and the transports.

    Args:
        axis: the ranks; None: one rank alone.
        numerics: for layers and sums.
    """

    def __init__(self, axis: Axis | None, numerics: Numerics) -> None:
        self.axis = Axis.solo() if axis is None else axis
        super().__init__(self.axis.rank, self.axis.size)
        self.scheme = Scheme(numerics=numerics)
        self.contract = mode.contract(self.scheme)

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """`parallelize`."""
        styles = {name: STYLES[style] for name, style in plan.items()}
        return parallelize(model, Plan(styles, scheme=self.scheme), self.axis)

    def cut_transformer(self, model: Any, *, training: bool) -> nn.Module:
        """`parallelize` by the model's own plan."""
        return parallelize(model, None, self.axis, scheme=self.scheme).train(training)

    def layout(self, shape: tuple[int, ...], dim: int | None) -> Layout:
        """The layout, cut by leaves."""
        if dim is None:
            return super().layout(shape, dim)
        return Layout(shape, self.rank, dim, Cut(shape[dim], self.scheme.leaves, self.size))

    def hash(self, name: str, tensor: Tensor, layout: Layout) -> str | None:
        """The hash of the whole tensor (invariant numerics).

        For a cut tensor, only rank 0 returns it.

        Comm:
            gathers a cut tensor to rank 0 in direction "prover".
        """
        if not self.scheme.is_invariant:
            return None
        return hash_tensor(tensor, layout, self.axis, who=name)

    def sent(self) -> Sent:
        """What the ledger of the axis has counted in forward and backward."""
        counts = [
            count
            for direction, _, count in self.axis.transport.ledger
            if direction in ("forward", "backward")
        ]
        return Sent(
            sum(count.calls for count in counts),
            sum(count.message_bytes for count in counts),
            sum(count.sent_bytes for count in counts),
        )

    def make_sum(self, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
        """The sum at the end of a row layer's forward: in the transport's order, or the tree's.

        Comm:
            one all_reduce of (n) for each call of the result.
        """
        transport = self.axis.transport
        call = Call("all_reduce", "forward", "bench", tuple(x.shape), x.dtype)
        if not self.scheme.is_invariant:

            def sum_natively() -> Tensor:
                transport.all_reduce(x, out, call=call)
                return out

            return sum_natively
        order = tree_order(Cut(self.scheme.leaves, self.scheme.leaves, self.size))
        parts = [x] * min(1, order.counts[self.rank])
        parts += [torch.zeros_like(x) for _ in range(order.counts[self.rank] - 1)]

        def sum_by_tree() -> Tensor:
            transport.sum(parts, order, out, call=call)
            return out

        return sum_by_tree


class Plain(SystemRank):
    """Plain torch: the whole model as it is."""

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """`model` itself."""
        return model

    def cut_transformer(self, model: Any, *, training: bool) -> nn.Module:
        """`model` itself."""
        whole: nn.Module = model.train(training)
        return whole


class Copying(SystemRank):
    """A rank that copies its own bytes. No sum can be faster.

    Args:
        axis: the ranks, of which nothing is asked but the place.
    """

    adds = False

    def __init__(self, axis: Axis | None) -> None:
        super().__init__(*((0, 1) if axis is None else (axis.rank, axis.size)))

    def make_sum(self, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
        """A plain copy of `x` to `out`.

        Comm:
            none.
        """

        def copy() -> Tensor:
            ctypes.memmove(out.data_ptr(), x.data_ptr(), x.nbytes)
            return out

        return copy


def join_plain(axis: Axis | None) -> SystemRank:
    """The only rank of plain torch."""
    return Plain()


@functools.cache
def once(kind: Callable[[], SystemRank]) -> SystemRank:
    """The rank of a library whose groups can be made only once in a process."""
    return kind()


def join_peer(axis: Axis | None, kind: Callable[[], SystemRank]) -> SystemRank:
    """A rank of the default process group."""
    return once(kind)


MODELS = LINEARS | {TRANSFORMER}
OWN = MODELS | {SUM, ANY_DEGREE}
LAYERS_ALONE = "brings layers, and nothing that cuts a model of transformers"


def _ours(numerics: Numerics, wire: str) -> System:
    is_threads = wire == "threads"
    ranks = "threads of one process" if is_threads else f"processes over {wire}"
    return System(
        f"{numerics}-{wire}",
        f"shardproof, {numerics} numerics, ranks are {ranks}",
        functools.partial(Ours, numerics=numerics),
        engine="threads" if is_threads else "processes",
        transport="auto" if is_threads else wire,
        numerics=numerics,
        offers=OWN,
    )


def _peer(name: str, description: str, kind: Any, *, package: str | None, **options: Any) -> System:
    return System(
        name,
        description,
        functools.partial(join_peer, kind=kind),
        transport="gloo",
        package=package,
        extra="peers",
        **options,
    )


SYSTEMS: tuple[System, ...] = (
    System(
        "torch-2t",
        "plain torch, 2 threads",
        join_plain,
        engine="alone",
        threads=2,
        offers=MODELS,
    ),
    System("torch-1t", "plain torch, 1 thread", join_plain, engine="alone", offers=MODELS),
    *(_ours(numerics, wire) for wire in ("shm", "threads", "gloo") for numerics in NUMERICS),
    _peer("dtensor", "torch parallelize_module, gloo", DTensors, package=None, offers=MODELS),
    _peer(
        "deepspeed",
        "DeepSpeed AutoTP, gloo; in inference its shared memory",
        DeepSpeed,
        package="deepspeed",
        offers=MODELS | {SUM},
    ),
    _peer(
        "fairscale",
        "fairscale model_parallel, gloo",
        Fairscale,
        package="fairscale",
        lacks={TRANSFORMER: LAYERS_ALONE},
    ),
    _peer(
        "hf",
        "Hugging Face transformers tp_plan, gloo",
        HuggingFace,
        package="transformers",
        offers=MODELS,
    ),
    _peer(
        "megatron",
        "Megatron-Core tensor_parallel, gloo",
        Megatron,
        package="megatron",
        offers=frozenset({Style.COLUMN.value, Style.ROW.value}),
        lacks={
            Style.COLUMN_GATHERED.value: CUDA_ONLY,
            Style.ROW_SCATTERED.value: CUDA_ONLY,
            TRANSFORMER: LAYERS_ALONE,
        },
    ),
    System(
        "memcpy",
        "a copy of the bytes by all ranks at once",
        Copying,
        transport="gloo",
        offers=frozenset({SUM}),
        is_yardstick=True,
    ),
)


def find_system(name: str) -> System:
    """The system of a name.

    Raises:
        UsageError: there is none; names all.
    """
    for system in SYSTEMS:
        if system.name == name:
            return system
    names = ", ".join(system.name for system in SYSTEMS)
    raise UsageError(f"there is no system {name!r}. Use one of: {names}.")
