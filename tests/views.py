"""The same numbers in every shape of memory: one table of views, by which all functions are driven.

Each view holds numbers that its name promises; what is right for it is right for a plain copy.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]
Make = Callable[[Tensor], Tensor]


def plain(x: Tensor) -> Tensor:
    """The numbers of any view in memory of their own, row by row."""
    return x.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _swapped(first: int, second: int) -> Make:
    return lambda x: x.transpose(first, second).contiguous().transpose(first, second)


def _stepped(dim: int, step: int) -> Make:
    """Every `step`-th element of a wider tensor."""

    def make(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[dim] = shape[dim] * step + 1
        wide = x.new_full(shape, 7.0)
        at = [slice(None)] * x.dim()
        at[dim] = slice(1, None, step)
        wide[tuple(at)] = x
        return wide[tuple(at)]

    return make


def _narrowed(x: Tensor) -> Tensor:
    """The middle of a larger buffer, no row of which is aligned."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), 7.0)
    wide[..., 1:-2] = x
    return wide.narrow(-1, 1, x.shape[-1])


def _offset(x: Tensor) -> Tensor:
    room = x.new_full((x.numel() + 3,), 7.0)
    room[3:] = x.reshape(-1)
    return room[3:].view(x.shape)


def _all_dims_turned(x: Tensor) -> Tensor:
    dims = tuple(reversed(range(x.dim())))
    return x.permute(dims).contiguous().permute(dims)


def _negated(x: Tensor) -> Tensor:
    """The imaginary part of a conjugate: memory of the opposite sign, every second element."""
    view = torch.complex(x, -x).conj().imag
    assert view.is_neg()
    return view


def _real_part(x: Tensor) -> Tensor:
    return torch.complex(x, x).real


def _flipped(x: Tensor) -> Tensor:
    """Torch has no negative strides: a flip is a copy."""
    return x.flip(-1).flip(-1)


def _expanded(dim: int) -> Make:
    """One slice along `dim`, seen many times."""
    return lambda x: x.narrow(dim, 0, min(1, x.shape[dim])).clone().expand(x.shape)


def _overlapping(x: Tensor) -> Tensor:
    """A window that moves by one element: neighbours share their memory."""
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    flat = x.reshape(-1)[: rows + columns].clone()
    if flat.numel() < rows + columns - 1 or not x.numel():
        return x
    strides = [1] * x.dim()
    for dim in range(x.dim() - 3, -1, -1):
        strides[dim] = strides[dim + 1] * x.shape[dim + 1]
    return flat.as_strided(x.shape, strides)


def _odd_strides_of_one(x: Tensor) -> Tensor:
    """Strides of dims of one element are anything; torch calls it contiguous all the same."""
    pairs = zip(x.shape, x.stride(), strict=True)
    return x.clone().as_strided(x.shape, [5 if size == 1 else step for size, step in pairs])


def _channels_last(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.channels_last)


def views(x: Tensor) -> dict[str, Tensor]:
    """Views of the shape of `x`: of its numbers, or of some of them where memory is shared."""
    makes: dict[str, Make] = {
        "contiguous": plain,
        "offset": _offset,
        "narrowed": _narrowed,
        "stepped": _stepped(-1, 3),
        "negated": _negated,
        "negated where it lies": lambda x: torch._neg_view(-plain(x)),
        "real part": _real_part,
        "flipped": _flipped,
        "expanded along the first dim": _expanded(0),
        "expanded along the last dim": _expanded(-1),
        "odd strides of dims of one": _odd_strides_of_one,
    }
    if x.dtype not in (torch.float32, torch.float64):
        del makes["negated"], makes["real part"]  # there is no complex number of 16 bits
    if x.dim() > 1:
        makes["last two dims swapped"] = _swapped(-1, -2)
        makes["first and last dim swapped"] = _swapped(0, -1)
        makes["first dim stepped"] = _stepped(0, 2)
        makes["overlapping"] = _overlapping
        makes["all dims turned"] = _all_dims_turned
    if x.dim() == 4:
        makes["channels last"] = _channels_last
    found = {name: make(x) for name, make in makes.items()}
    assert all(view.shape == x.shape for view in found.values())
    return found


# A last dim of `size`: leading dims that collapse in a transposed view and that do not, one row,
# no row, one dim.
def shapes(size: int) -> Sequence[Shape]:
    """Shapes that end in `size`."""
    return (
        (5, size),
        (1, size),
        (0, size),
        (1, 4, size),  # transposed, as the patch embedding of a ViT gives it at batch 1
        (3, 4, size),
        (2, 0, size),
        (2, 3, 2, size),
        (size,),
    )
