"""Counts what one rank computes and holds: flops of products and bytes of living tensors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from shardproof.observing import Memory, Observer


class Counting(Observer):
    """A context manager that counts while it is open.

    Args:
        held: tensors that are there before the first operation.

    Attributes:
        flops: so far.
    """

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.flops = 0
        self._memory = Memory()
        self._memory.see(held)

    @property
    def peak(self) -> int:
        """The most bytes at the end of an operation."""
        return self._memory.peak

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operation of torch; count its flops and the tensors that it made."""
        result = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        results = result if isinstance(result, tuple | list) else (result,)
        self._memory.see([tensor for tensor in results if isinstance(tensor, Tensor)])
        return result

    def kernel(self, flops: int) -> None:
        """Count a product by one of our kernels."""
        self.flops += flops
