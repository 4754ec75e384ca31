"""What a collective is given, checked before anything is sent."""

from torch import Tensor

from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.leaves import Cut


def check_degree_of(cut: Cut, axis: Axis, who: str) -> None:
    """Raise unless `cut` was made for the ranks of `axis`."""
    if cut.degree != axis.size:
        raise ShapeError(
            f"{who} on {axis}: the cut is for degree {cut.degree} and the axis has {axis.size} "
            f"ranks. Make it as Cut({cut.size}, leaves={cut.leaves}, degree=axis.size)."
        )


def check_part(x: Tensor, axis: Axis, *, dim: int, cut: Cut, is_whole: bool, who: str) -> int:
    """Raise unless `x` is, along `dim`, the whole of `cut` or what this rank owns of it.

    Args:
        x: (*, cut.size, *) if `is_whole`, else (*, owned, *).
        axis: the axis over which the dim is cut.
        dim: counted from either end.
        cut: of that dim.
        is_whole: which of the two `x` should be.
        who: for the message.
    Returns:
        `dim`, counted from the front.
    Raises:
        ShapeError: `dim`, the cut or the length does not fit.
    """
    check_degree_of(cut, axis, who)
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(
            f"{who} on {axis}: dim {dim} wanted of a tensor of shape {tuple(x.shape)}, which has "
            f"{x.dim()} dims."
        )
    length = cut.size if is_whole else len(cut.owned(axis.rank))
    if x.shape[dim] != length:
        part = "is the whole" if is_whole else f"is what this rank owns of {cut.size}"
        raise ShapeError(
            f"{who} on {axis}: dim {dim} of shape {tuple(x.shape)} has {x.shape[dim]} units, "
            f"but {length} {part}. Give the tensor that the cut describes."
        )
    return dim % x.dim()
