"""Indexing by tensors, whose gradient torch adds up in an order that threads change.

`x[index]` with an element that is taken twice adds its gradients by `index_put_`, in parallel. Here
the dims that tensors index become one, and `index_select` takes from it: its backward adds one
after the other. What takes no element twice (slices, numbers, masks) is torch's own. Plain tensors;
no ranks.
"""

import math
from typing import Any

import torch
from torch import Tensor

from shardproof import operators
from shardproof.errors import ShapeError


def getitem(input: Tensor, index: Any) -> Tensor:
    """`input[index]`.

    Args:
        input: (*), Replicate along the dims that tensors index.
        index: as torch takes it.
    Returns:
        what torch returns.
    Raises:
        ShapeError: an element of a tensor is out of range.
    """
    items = [
        torch.tensor(item, device=input.device) if isinstance(item, list) else item
        for item in (index if isinstance(index, tuple) else (index,))
    ]
    tensors = [item for item in items if isinstance(item, Tensor)]
    wants = torch.is_grad_enabled() and input.requires_grad
    if not wants or not any(_takes_twice(item) for item in tensors):
        return input[index]
    items = _spread(items, input.dim())
    # First what takes a view, then the dims that are left for tensors.
    x = input[tuple(slice(None) if isinstance(item, Tensor) else item for item in items)]
    indices: list[Any] = [
        item for item in items if not isinstance(item, int) or isinstance(item, bool)
    ]
    places = [place for place, item in enumerate(indices) if isinstance(item, Tensor)]
    return _select(x, places, [indices[place].long() for place in places])


def _takes_twice(item: Tensor) -> bool:
    return item.dtype is not torch.bool and item.numel() > 1


def _spread(items: list[Any], dims: int) -> list[Any]:
    """No ellipsis and no masks; a tensor without dims is a number, as torch has it."""
    masked: list[Any] = []
    for item in items:
        if isinstance(item, Tensor) and item.dtype is torch.bool:
            masked.extend(item.nonzero(as_tuple=True))
        elif isinstance(item, Tensor) and not item.dim():
            masked.append(int(item))
        else:
            masked.append(item)
    used = sum(item is not None and item is not Ellipsis for item in masked)
    at = next((n for n, item in enumerate(masked) if item is Ellipsis), len(masked))
    return masked[:at] + [slice(None)] * (dims - used) + masked[at + 1 :]


def _checked(index: Tensor, size: int, shape: list[int]) -> Tensor:
    """The indices; raises if one is out of range."""
    if index.is_meta:
        return index
    if operators.is_recorded(index):
        checked_index: Tensor = _operator(index, size, shape)
        return checked_index
    if bool(((index < -size) | (index >= size)).any()):
        raise ShapeError(f"an index is out of range: a dim of {tuple(shape)} has {size}.")
    return index


@operators.define(
    "check_index(Tensor index, int size, int[] shape) -> Tensor",
    lambda index, size, shape: index.clone(),
)
def _operator(index: Tensor, size: int, shape: list[int]) -> Tensor:
    """A copy: an operator may not return what it was given."""
    return _checked(index, size, shape).clone()


def _select(x: Tensor, places: list[int], indices: list[Tensor]) -> Tensor:
    """`x` with its dims `places` indexed, each by its tensor."""
    sizes = [x.shape[place] for place in places]
    linear = torch.zeros((), dtype=torch.int64, device=x.device)
    for size, one in zip(sizes, indices, strict=True):
        item = _checked(one.to(x.device), size, list(x.shape))
        linear = linear * size + torch.where(item < 0, item + size, item)
    is_one_run = places == list(range(places[0], places[0] + len(places)))
    first = places[0] if is_one_run else 0
    moved = x.movedim(places, list(range(first, first + len(places))))
    head, tail = moved.shape[:first], moved.shape[first + len(places) :]
    selected_rows = moved.reshape(*head, math.prod(sizes), *tail).index_select(
        first, linear.reshape(-1)
    )
    return selected_rows.reshape(*head, *linear.shape, *tail)
