"""What a rank allocates: the largest storage that any operation made while the audit ran.

An observer sees the outputs of every operation of its own thread, backward and optimizer
included, so ranks as threads are told apart. It counts a storage by its full size, also
where only a view of it is returned, if the operation made it. It does not see what a kernel uses
inside itself (BLAS and our kernels pack operands in memory of their own), the slots of shared
memory that a transport maps, nor what numpy allocates.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from shardproof.observing import Observer, address, tensors_in


class Audit:
    """The largest storage one rank allocated.

    Attributes:
        largest_bytes: of that storage.
        largest_shape: of the tensor it was made for.
    """

    def __init__(self) -> None:
        self.largest_bytes = 0
        self.largest_shape: tuple[int, ...] = ()
        self._data: dict[int, Tensor] = {}
        self._is_running = False
        self._pauses = 0

    def exclude(self, tensor: Tensor) -> None:
        """Mark a tensor as data: its storage is never counted."""
        # Kept alive, or another storage could come to lie at the same address.
        self._data[address(tensor)] = tensor.detach()

    def is_data(self, tensor: Tensor) -> bool:
        """True if the tensor lies in a storage that was marked as data."""
        return address(tensor) in self._data

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what this thread allocates inside the block."""
        if self._is_running:
            yield
            return
        self._is_running = True
        try:
            with _Watch(self._see):
                yield
        finally:
            self._is_running = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what this thread allocates inside the block: the recorder's own work."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def _see(self, tensor: Tensor) -> None:
        size = tensor.untyped_storage().nbytes()
        if self._pauses or size <= self.largest_bytes or self.is_data(tensor):
            return
        self.largest_bytes, self.largest_shape = size, tuple(tensor.shape)


class _Watch(Observer):
    """Calls back for every tensor that an operation made, views of its inputs left out."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it, and see what it made."""
        before = {address(tensor) for tensor in tensors_in((args, kwargs))}
        result = func(*args, **kwargs)
        # Arguments too: an operation may grow the storage of what it writes into.
        for tensor in tensors_in((result, args, kwargs)):
            if address(tensor) not in before:
                self._see(tensor)
        return result
