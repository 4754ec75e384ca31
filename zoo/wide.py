"""fp64 throughout: neither a model's own casts nor torch's default bring fp32 in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shardproof.prover.wide import KeepDouble


@contextmanager
def wide() -> Iterator[None]:
    """A context in which an fp64 tensor stays fp64 and a new tensor of floats is fp64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with KeepDouble():
            yield
    finally:
        torch.set_default_dtype(before)
