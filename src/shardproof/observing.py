"""One way of looking inside a rank: what its thread computes, sends and holds.

An observer is a dispatch mode of torch. It sees every operation of torch in its own thread, so
ranks as threads are told apart. Our kernels and the collectives are not operations of torch: the
code around them tells them. Without an observer, telling costs one comparison.

The memory audit of the prover, the counting of the bench and the trace are observers.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from shardproof.leaves import Layout


@dataclass(frozen=True)
class Placement:
    """How a tensor lies on the ranks, as far as it was told.

    Attributes:
        kind: "Replicate", "Shard" or "Partial".
        dim: that is cut; for Shard.
        held: the global indices along `dim` that the rank holds; for Shard. None if they
            are several runs.
        size: of the whole dim; for Shard.
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
    """How a tensor of this layout lies on its rank."""
    if layout.dim is None:
        return REPLICATE
    runs = layout.held_runs or (range(0),)
    return shard(layout.dim, runs[0] if len(runs) == 1 else None, layout.shape[layout.dim])


@dataclass(frozen=True)
class Operand:
    """A tensor that took part in something.

    Attributes:
        name: what it is called there.
        tensor: the tensor.
        placement: how it lies on the ranks; None if that is not known.
        node: of a partial sum: the run of leaves (start, stop) that it sums.
    """

    name: str
    tensor: Tensor
    placement: Placement | None = None
    node: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sending:
    """What one rank sends to one other in a collective.

    Attributes:
        receiver: a rank.
        source: which of the sender's inputs this is of; None: it is of the finished sum.
        start, stop: the elements of it, one after another in memory or, with `dim`, the indices.
        num_bytes: that travel.
        dim: along which `start` and `stop` count.
    """

    receiver: int
    source: int | None
    start: int
    stop: int
    num_bytes: int
    dim: int | None = None


@dataclass
class Told:
    """Something that the package did, as it tells it.

    Attributes:
        operation: "product", "addition", "all_reduce", ...
        phase: "setup", "forward", "backward", "update" or "prover".
        who: the layer or function that did it.
        detail: what was computed, in a formula or a few words.
        inputs: what it was computed from.
        output: the result; of a collective that was started, filled when it is finished.
        message_bytes: of a collective: bytes of its result.
        sent_bytes: of a collective: bytes that this rank sent.
        is_collective: it met other ranks.
        addition: of a collective that adds: which parts it adds, in which order.
        axis: of a collective: the name of the axis.
        sends: of a collective: to whom this rank sends which part; empty if the transport decides.
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
    """Sees what one thread does. A subclass overrides the hooks that it wants.

    Attributes:
        keeps_values: it reads the numbers of what it is told.
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
        """A product by one of our kernels."""

    def told(self, told: Told) -> None:
        """Something was done, or a collective was started."""

    def finished(self, told: Told) -> None:
        """A collective that was started has its result."""


class Memory:
    """Bytes of the storages that live, of those that were seen.

    Attributes:
        held: bytes now.
        peak: the most bytes at any look.
    """

    def __init__(self) -> None:
        self.held = 0
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
                known = self._living.get(key)
                if known is None or known[0]() is not storage:
                    freed = weakref.ref(storage, functools.partial(self._forget, key))
                    self._living[key] = freed, size
                    self.held += size
                elif known[1] != size:  # it was resized
                    self._living[key] = known[0], size
                    self.held += size - known[1]
            self.peak = max(self.peak, self.held)

    def _forget(self, key: int, freed: "weakref.ref[torch.UntypedStorage]") -> None:
        with self._lock:
            known = self._living.get(key)
            if known is not None and known[0] is freed:
                del self._living[key]
                self.held -= known[1]


class _Here(threading.local):
    def __init__(self) -> None:
        self.observers: list[Observer] = []


_here = _Here()
_lock = threading.Lock()
_num_observers = 0


def is_on() -> bool:
    """Whether any thread has an observer: telling is worth its price only then."""
    return _num_observers > 0


def observers() -> Sequence[Observer]:
    """Those of this thread."""
    return _here.observers


def tell(told: Told) -> None:
    """Hand something to the observers of this thread."""
    for observer in _here.observers:
        observer.told(told)


def finish(told: Told) -> None:
    """Say that a collective which was told when it was started has its result."""
    for observer in _here.observers:
        observer.finished(told)


def see_rule(name: str, args: Any, compute: Callable[[], Any]) -> Any:
    """Let the observers of this thread see an operation on cut tensors."""
    for observer in _here.observers:
        compute = functools.partial(observer.rule, name, args, compute)
    return compute()


def tell_kernel(flops: int) -> None:
    """Hand the flops of a product by one of our kernels to the observers of this thread."""
    for observer in _here.observers:
        observer.kernel(flops)


def before_write(x: Tensor) -> Tensor:
    """What to tell of a tensor that is about to be written into.

    A copy that no observer sees, if one of this thread reads numbers; else `x` itself.
    """
    if not any(observer.keeps_values for observer in _here.observers):
        return x
    with _disable_current_modes():
        return x.clone()


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of arguments or results with memory of their own (on meta there is none)."""
    if isinstance(tree, Tensor):
        if has_memory(tree):
            yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))


def has_memory(x: Tensor) -> bool:
    """Whether a tensor has elements somewhere: not those of torch.func, sparse ones or meta."""
    if x.layout != torch.strided or x.is_meta or x.is_nested or x._is_zerotensor():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def address(tensor: Tensor) -> int:
    """Where the storage of a tensor lies; all empty ones lie at 0."""
    return tensor.untyped_storage().data_ptr()


def storage_of(tensor: Tensor) -> int:
    """Which storage a tensor has, as a number; empty storages have numbers of their own."""
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
