"""Whether this thread compares tensors in full, and the comparison of one tensor."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import MismatchError

# One value for each thread: ranks may be threads.
_is_checked: ContextVar[bool] = ContextVar("is_checked", default=False)

_PARTS = 64  # number of pieces into which a tensor is divided to find the element that differs

Gather = Callable[[Any], list[Any]]


def is_checked() -> bool:
    """Whether this thread is inside `checked()`."""
    return _is_checked.get()


class Switch:
    """A context in which tensors are compared in full, or not; contexts may be nested.

    Args:
        is_on: whether tensors are compared; False in a rehearsal, where values mean nothing.
    """

    def __init__(self, *, is_on: bool = True) -> None:
        self.is_on = is_on

    def __enter__(self) -> None:
        self._token = _is_checked.set(self.is_on)

    def __exit__(self, *_: object) -> None:
        _is_checked.reset(self._token)


@torch.no_grad()
def compare(x: Tensor, name: str, gather: Gather, *, way_out: str) -> None:
    """Raise on all ranks unless all have the same tensor, bit by bit.

    Args:
        x: (*), Replicate.
        name: name of the tensor, for the message.
        gather: function that gathers a small value of all ranks, in rank order.
        way_out: the end of the message.

    Raises:
        MismatchError: names the tensor, two ranks and the first element in which they differ.
    """
    if x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return  # it has no elements of its own
    flat = _flat(x)
    kind = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    summaries = gather((kind, _hash(flat)))
    other = _other(summaries)
    if other is None:
        return
    start = f"the ranks disagree about {name}, which must be the same on all ranks of the axis: "
    if summaries[0][0] != summaries[other][0]:
        raise MismatchError(
            f"{start}rank 0 has {summaries[0][0]}, rank {other} has {summaries[other][0]}. "
            f"{way_out}"
        )
    place, other, values = _find(flat, gather)
    where = [int(i) for i in torch.unravel_index(torch.tensor(place), x.shape)] if x.dim() else []
    at = f" at {where}" if where else ""
    raise MismatchError(
        f"{start}of {kind}, rank 0 has {values[0]!r}{at}, rank {other} has {values[other]!r}. "
        f"{way_out}"
    )


def _flat(x: Tensor) -> Tensor:
    return x.detach().resolve_conj().resolve_neg().cpu().contiguous().view(-1)


def _hash(flat: Tensor) -> str:
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _other(summaries: Sequence[Any]) -> int | None:
    """The first rank that says something else than rank 0."""
    return next((rank for rank, each in enumerate(summaries) if each != summaries[0]), None)


def _find(flat: Tensor, gather: Gather) -> tuple[int, int, list[Any]]:
    """The first element that differs, a rank that has another one than rank 0, and all values."""
    low, high = 0, flat.numel()
    while high - low > 1:
        bounds = [low + (high - low) * part // _PARTS for part in range(_PARTS + 1)]
        parts = [(a, b) for a, b in itertools.pairwise(bounds) if a < b]
        hashes = gather([_hash(flat[a:b]) for a, b in parts])
        low, high = next(
            part for number, part in enumerate(parts) if len({each[number] for each in hashes}) > 1
        )
    hashes = gather((flat[low].item(), _hash(flat[low : low + 1])))
    other = _other([each[1] for each in hashes])
    return low, 0 if other is None else other, [each[0] for each in hashes]
