"""What all lessons share: short hashes, plain tables, and numbers as a reader wants them."""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.console import Console, RenderableType
from torch import Tensor

from shardproof.numerics.mode import contract
from shardproof.scheme import Scheme

HASH_LENGTH = 16


def sha(tensor: Tensor) -> str:
    """The first 16 hex digits of the SHA-256 of a tensor's bytes, row by row."""
    data = tensor.detach().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:HASH_LENGTH]


def loose(tensor: Tensor) -> str:
    """A shorter hash, of a product that plain PyTorch made: its bits depend on the processor."""
    return f"{sha(tensor)[:6]}.."


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under a head; numbers as `number` writes them."""
    texts = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *texts]) for i in range(len(head))]
    lines = [list(head), ["-" * width for width in widths], *texts]
    for line in lines:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def show(what: RenderableType, *, width: int = 104) -> None:
    """Print what rich can lay out, as plain text, in Jupyter too."""
    plain = Console(
        file=sys.stdout, width=width, color_system=None, force_jupyter=False, force_terminal=False
    )
    with plain.capture() as captured:
        plain.print(what)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _cell(cell: Any) -> str:
    if isinstance(cell, torch.Size):
        return str(tuple(cell))
    return number(cell) if isinstance(cell, float) else str(cell)


def number(value: float) -> str:
    """A number with as many digits as a reader wants.

    >>> number(0.0), number(4.0978193283081055e-08), number(0.25)
    ('0', '4.1e-08', '0.2500')
    """
    if value == 0:
        return "0"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def about(text: str) -> str:
    """Mark memory that was held: the number differs a little from one processor to another.

    >>> about("50.3%")
    '~50.3%'
    """
    return f"~{text}"


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference between two tensors."""
    return (a - b).abs().max().item()


def bits_of() -> str:
    """What the hashes on this page depend on: shardproof's contract, and torch's own code."""
    return f"{contract(Scheme())}, torch's own functions for {_capability()}"


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()
