"""Counts what one rank computes and holds: flops of products and bytes of living tensors.

Torch's products are seen by a dispatch mode. Ours in C are not, so they are watched where the
package calls them. Both see the operations of one thread alone: ranks may be threads.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import Any, Self

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from shardproof.numerics import joined, products


def _of_operands(a: Tensor, b: Tensor, *_: Any, is_transposed: bool = False, **__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[0 if is_transposed else 1]


def _of_pairs(pairs: joined.Pairs, slices: joined.Slices, *_: Any) -> int:
    depth = sum(at.stop - at.start for places in slices for at in places)
    return 2 * pairs[0][0].shape[0] * depth * pairs[0][1].shape[1]


# Where our kernels are called, and the flops of a call.
_KERNELS: tuple[tuple[ModuleType, str, Callable[..., int]], ...] = (
    (products, "product", _of_operands),
    (products, "leaf_sum", _of_operands),
    (products, "leaf_nodes", _of_operands),
    (joined, "kernel_nodes", _of_pairs),
)


class Counting(TorchDispatchMode):
    """A context manager.

    Args:
        held: tensors that are there before the first operation.

    Attributes:
        flops: so far.
        peak: the most bytes at the end of an operation.
    """

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.flops = 0
        self.peak = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self._see(held)

    def __enter__(self) -> Self:
        _watch.enter(self)
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        _watch.leave()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        found = result if isinstance(result, tuple | list) else (result,)
        self._see([tensor for tensor in found if isinstance(tensor, Tensor)])
        return result

    def _see(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            self._living[reference.cdata] = reference, storage.nbytes()
        gone = [key for key, (reference, _) in self._living.items() if reference.expired()]
        for key in gone:
            del self._living[key]
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))


class _Watch:
    """Stands in front of our kernels while any thread counts, and never when a step is timed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counting = 0
        self._here = threading.local()
        self._originals: list[Callable[..., Any]] = []

    def enter(self, counting: Counting) -> None:
        """This thread's products are counted from now on."""
        self._here.counting = counting
        with self._lock:
            self._counting += 1
            if self._counting == 1:
                self._originals = [getattr(module, name) for module, name, _ in _KERNELS]
                for (module, name, flops), kernel in zip(_KERNELS, self._originals, strict=True):
                    setattr(module, name, self._watched(kernel, flops))

    def leave(self) -> None:
        """This thread's products are no longer counted."""
        self._here.counting = None
        with self._lock:
            self._counting -= 1
            if self._counting == 0:
                for (module, name, _), kernel in zip(_KERNELS, self._originals, strict=True):
                    setattr(module, name, kernel)

    def _watched(self, kernel: Callable[..., Any], flops: Callable[..., int]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def watched(*args: Any, **kwargs: Any) -> Any:
            counting = getattr(self._here, "counting", None)
            if counting is not None:
                counting.flops += flops(*args, **kwargs)
            return kernel(*args, **kwargs)

        return watched


_watch = _Watch()
