"""Observers of a rank: they see what its thread computes, sends and holds.

An observer is a dispatch mode of torch. It sees every operation of torch in its own thread, so that
ranks as threads are separate. Our kernels and the collectives are not operations of torch; the code
around them reports them to the observers. Without an observer, this costs one comparison.

The memory audit of the prover, the counters of `benchmarks/` and the trace are observers.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from shardproof.leaves import Layout


@dataclass(frozen=True)
class Placement:
    """The placement of a tensor, as far as it is known.

    Attributes:
        kind: "Replicate", "Shard" or "Partial".
        dim: for Shard, the dim that is cut.
        held: for Shard, the global indices along `dim` that the rank holds; None if they are
            several runs.
        size: for Shard, the size of the whole dim.
    """

    kind: str
    dim: int = 0
    held: range | None = None
    size: int | None = None

    def __str__(self) -> str:
        return f"Shard({self.dim})" if self.kind == "Shard" else self.kind


REPLICATE = Placement("Replicate")
PARTIAL = Placement("Partial")


def shard(dim: int, held: range | slice | None = None, size: int | None = None) -> Placement:
    """Shard(dim), of which the rank holds `held`."""
    if isinstance(held, slice):
        held = range(held.start, held.stop)
    return Placement("Shard", dim, held, size)


def placement_of(layout: Layout) -> Placement:
    """The placement of a tensor with this layout."""
    if layout.dim is None:
        return REPLICATE
    runs = layout.held_runs or (range(0),)
    return shard(layout.dim, runs[0] if len(runs) == 1 else None, layout.shape[layout.dim])


@dataclass(frozen=True)
class Operand:
    """A tensor that an observed step used or produced.

    Attributes:
        name: its name in the step.
        tensor: the tensor.
        placement: its placement; None if it is not known.
        node: for a partial sum, the run of leaves (start, stop) that it sums.
    """

    name: str
    tensor: Tensor
    placement: Placement | None = None
    node: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sending:
    """The part that one rank sends to another in a collective.

    Attributes:
        receiver: the receiving rank.
        source: index of the sender's input that is sent; None for a part of the finished sum.
        start, stop: the range of its elements in memory or, with `dim`, of its indices.
        num_bytes: number of bytes that are sent.
        dim: the dim along which `start` and `stop` count.
    """

    receiver: int
    source: int | None
    start: int
    stop: int
    num_bytes: int
    dim: int | None = None


@dataclass
class StepEvent:
    """One step of shardproof, as it is reported to observers.

    Attributes:
        operation: "product", "addition", "all_reduce", ...
        phase: "setup", "forward", "backward", "update" or "prover".
        who: name of the layer or function.
        detail: a formula or a short description.
        inputs: the operands.
        output: the result; for a collective that was started, it is set when that is finished.
        message_bytes: for a collective, bytes of its result.
        sent_bytes: for a collective, bytes that this rank sent.
        is_collective: whether it is a collective.
        addition: for a collective that adds, the parts and the order of the additions.
        axis: for a collective, the name of the axis.
        sends: for a collective, the parts that this rank sends and their receivers; empty if the
            transport decides.
    """

    operation: str
    phase: str
    who: str
    detail: str = ""
    inputs: Sequence[Operand] = ()
    output: Operand | None = None
    message_bytes: int = 0
    sent_bytes: int = 0
    is_collective: bool = False
    addition: str = ""
    axis: str = ""
    sends: Sequence[Sending] = ()


class Observer(TorchDispatchMode):
    """Observes one thread. A subclass overrides the hooks that it needs.

    Attributes:
        keeps_values: whether it reads the values of the tensors that are reported.
    """

    keeps_values = False

    def __enter__(self) -> Self:
        _enter(self)
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        _leave(self)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return self.operation(func, args, kwargs)

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation of torch: call it and return its result."""
        return func(*args, **kwargs)

    def rule(self, name: str, args: Any, compute: Callable[[], Any]) -> Any:
        """An operation of the model's code on cut tensors: compute it and return its result."""
        return compute()

    def kernel(self, flops: int) -> None:
        """A matrix product by one of our kernels."""

    def on_event(self, event: StepEvent) -> None:
        """A step was done, or a collective was started."""

    def on_finish(self, event: StepEvent) -> None:
        """A collective that was started has its result."""


class Memory:
    """Bytes of the live storages among those that were seen.

    Attributes:
        num_bytes: bytes now.
        peak: the largest number of bytes so far.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self.peak = 0
        self._living: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        # A storage may be freed by another thread, or by this one inside `see`.
        self._lock = threading.RLock()

    def see(self, tensors: Sequence[Tensor]) -> None:
        """Count the storages of some tensors; each is counted until it is freed."""
        with self._lock:
            for tensor in tensors:
                storage = tensor.untyped_storage()
                key, size = id(storage), storage.nbytes()
                entry = self._living.get(key)
                if entry is None or entry[0]() is not storage:
                    freed = weakref.ref(storage, functools.partial(self._forget, key))
                    self._living[key] = freed, size
                    self.num_bytes += size
                elif entry[1] != size:  # it was resized
                    self._living[key] = entry[0], size
                    self.num_bytes += size - entry[1]
            self.peak = max(self.peak, self.num_bytes)

    def _forget(self, key: int, freed: "weakref.ref[torch.UntypedStorage]") -> None:
        with self._lock:
            entry = self._living.get(key)
            if entry is not None and entry[0] is freed:
                del self._living[key]
                self.num_bytes -= entry[1]


class _Here(threading.local):
    def __init__(self) -> None:
        self.observers: list[Observer] = []


_here = _Here()
_lock = threading.Lock()
_num_observers = 0


def is_on() -> bool:
    """Whether any thread has an observer."""
    return _num_observers > 0


def observers() -> Sequence[Observer]:
    """The observers of this thread."""
    return _here.observers


def tell(event: StepEvent) -> None:
    """Report a step to the observers of this thread."""
    for observer in _here.observers:
        observer.on_event(event)


def finish(event: StepEvent) -> None:
    """Report that a collective, which was reported at its start, has its result."""
    for observer in _here.observers:
        observer.on_finish(event)


def see_rule(name: str, args: Any, compute: Callable[[], Any]) -> Any:
    """Run an operation on cut tensors through the observers of this thread."""
    for observer in _here.observers:
        compute = functools.partial(observer.rule, name, args, compute)
    return compute()


def tell_kernel(flops: int) -> None:
    """Report the flops of a product by one of our kernels to the observers of this thread."""
    for observer in _here.observers:
        observer.kernel(flops)


def before_write(x: Tensor) -> Tensor:
    """The tensor to report in place of `x`, which is about to be overwritten.

    It is a copy that no observer sees, if an observer reads values; else `x` itself.
    """
    if not any(observer.keeps_values for observer in _here.observers):
        return x
    with _disable_current_modes():
        return x.clone()


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of arguments or results with memory of their own (on meta there is none)."""
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        if has_memory(tree):
            found.append(tree)
    elif isinstance(tree, list | tuple):
        for item in tree:
            _collect(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _collect(item, found)


def has_memory(x: Tensor) -> bool:
    """Whether a tensor has memory; tensors of torch.func, sparse and meta tensors do not."""
    if x.layout != torch.strided or x.is_meta or x.is_nested or x._is_zerotensor():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def address(tensor: Tensor) -> int:
    """The address of a tensor's storage; 0 for empty storages."""
    return tensor.untyped_storage().data_ptr()


def storage_of(tensor: Tensor) -> int:
    """A number that identifies the storage of a tensor, also for empty storages."""
    return int(tensor.untyped_storage()._cdata)


def _enter(observer: Observer) -> None:
    global _num_observers
    with _lock:
        _num_observers += 1
    _here.observers.append(observer)


def _leave(observer: Observer) -> None:
    global _num_observers
    _here.observers.remove(observer)
    with _lock:
        _num_observers -= 1
