"""In which dtype numbers are added: 16-bit numbers in float32, others in their own."""

import torch
from torch import Tensor


def node_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of `dtype` are added, the same at every degree."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype in which it is added.

    Args:
        x: (*), any placement.
    Returns:
        (*), the placement of `x`; `x` itself if it has that dtype.
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
