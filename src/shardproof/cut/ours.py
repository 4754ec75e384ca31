"""Functions of ours that were made for a rank's part, called with cut tensors."""

from typing import Any

from torch import Tensor

from shardproof.comm.split import Split
from shardproof.cut.meet import is_for_all, refined
from shardproof.cut.others import whole
from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor, cut_tensor, rule
from shardproof.leaves import Cut
from shardproof.ops import unit_ops
from shardproof.ops.linear import Gathers
from shardproof.units import CutDim


@rule("elementwise")
def elementwise(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One that computes element by element, or such a forward with its module."""
    x = _first(args, kwargs)
    given = [each.local if each is x else each for each in args]
    options = {key: each.local if each is x else each for key, each in kwargs.items()}
    return cut_tensor(func(*given, **options), x.spec, x.who)


@rule("of a part")
def of_a_part(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One that is told how the last dim is cut; where it is not told, it is given the whole."""
    cut = _told(func.__name__, args, kwargs)
    region = _first(args, kwargs).spec.region

    def taken(x: Any) -> Any:
        if not isinstance(x, CutTensor):
            return x
        if cut is None:
            return whole(x, func.__name__)
        return part_of(x, x.dim() - 1, region, region.features(cut))

    return func(*map(taken, args), **{key: taken(each) for key, each in kwargs.items()})


def part_of(x: Any, dim: int, region: Region, along: CutDim) -> Any:
    """This rank's part of a tensor, which is cut or whole.

    Args:
        x: (*).
        dim: of x, counted from the left.
        region: of cut tensors.
        along: how that dim is to be cut.

    Comm:
        none where it is cut so; else forward one all_gather of x if that is cut, and backward one
        all_gather of its gradient.
    """
    who = ""
    if isinstance(x, CutTensor):
        if x.spec.dim == dim:
            return refined(x, along).local
        if is_for_all(x) and _is_one(along, x.spec.cut):
            return _all_or_nothing(x, dim)
        who = x.who
        x = whole(x, "the part along another dim")
    return unit_ops.take(x, dim, region.place(along, who))


def _is_one(along: CutDim, other: CutDim) -> bool:
    """Whether a dim is the one unit, of size 1 in it, that another dim is too."""
    own, theirs = along.blocks[0], other.blocks[0]
    return along.size == own.unit and own.first == theirs.first and along.shared is other.shared


def _all_or_nothing(x: CutTensor, dim: int) -> Tensor:
    """This rank's part of a single key-value head: all of it, or nothing if no query head is here.

    A view may have left the cut on the features of the head, for it has one head and one run.
    """
    if x.local.shape == x.shape:
        return x.local
    shape = [0 if each == dim else size for each, size in enumerate(x.shape)]
    return x.local.new_zeros(shape) + x.local.sum()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CutTensor:
    return next(each for each in (*args, *kwargs.values()) if isinstance(each, CutTensor))


def _told(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cut | None:
    """How a function is told that the last dim of its input is cut."""
    given = (*args, *kwargs.values())
    if name == "row_linear":
        split = next((each for each in given if isinstance(each, Split)), None)
        return None if split is None or kwargs.get("splits_input") else split.cut
    if name == "column_linear":
        gathers = next((each for each in given if isinstance(each, Gathers)), Gathers())
        return None if gathers.input is None else gathers.input.cut
    return kwargs.get("cut")
