"""Rules for shardproof's own functions when they are called with cut tensors."""

from typing import Any

from torch import Tensor

from shardproof.comm.split import Split
from shardproof.cut.alignment import is_one_shared_unit, refined
from shardproof.cut.fallback import whole
from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor, cut_tensor, rule
from shardproof.leaves import Cut
from shardproof.ops import unit_ops
from shardproof.ops.linear import Gathers
from shardproof.units import CutDim


@rule("elementwise")
def elementwise(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An element-wise function, or the forward of an element-wise module."""
    x = _first(args, kwargs)
    parts = [each.local if each is x else each for each in args]
    options = {key: each.local if each is x else each for key, each in kwargs.items()}
    return cut_tensor(func(*parts, **options), x.spec, x.who)


@rule("of a part")
def of_a_part(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that takes a cut of the last dim; without one, it gets whole tensors."""
    cut = _cut_argument(func.__name__, args, kwargs)
    region = _first(args, kwargs).spec.region

    def converted(x: Any) -> Any:
        if not isinstance(x, CutTensor):
            return x
        if cut is None:
            return whole(x, func.__name__)
        return part_of(x, x.dim() - 1, region, region.features(cut))

    return func(*map(converted, args), **{key: converted(each) for key, each in kwargs.items()})


def part_of(x: Any, dim: int, region: Region, along: CutDim) -> Any:
    """This rank's part of a cut or whole tensor.

    Args:
        x: (*), a cut or a whole tensor.
        dim: the dim of the part, counted from the left.
        region: the region of the cut tensors.
        along: how that dim is to be cut.

    Comm:
        none if x is cut like this; else forward one all_gather of x if it is cut otherwise, and
        backward one all_gather of its gradient.
    """
    who = ""
    if isinstance(x, CutTensor):
        if x.spec.dim == dim:
            return refined(x, along).local
        if is_one_shared_unit(x) and _is_one(along, x.spec.cut):
            return _all_or_nothing(x, dim)
        who = x.who
        x = whole(x, "the part along another dim")
    return unit_ops.take(x, dim, region.place(along, who))


def _is_one(along: CutDim, other: CutDim) -> bool:
    """Whether both dims are one and the same unit, which fills all of `along`."""
    own, theirs = along.blocks[0], other.blocks[0]
    return along.size == own.unit and own.first == theirs.first and along.shared is other.shared


def _all_or_nothing(x: CutTensor, dim: int) -> Tensor:
    """This rank's part of a single key-value head: all of it, or none without query heads.

    A view may have moved the cut to the features of the head, because there is only one head.
    """
    if x.local.shape == x.shape:
        return x.local
    shape = [0 if each == dim else size for each, size in enumerate(x.shape)]
    return x.local.new_zeros(shape) + x.local.sum()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CutTensor:
    return next(each for each in (*args, *kwargs.values()) if isinstance(each, CutTensor))


def _cut_argument(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cut | None:
    """The cut of the last dim among the arguments of a function, or None."""
    arguments = (*args, *kwargs.values())
    if name == "row_linear":
        split = next((each for each in arguments if isinstance(each, Split)), None)
        return None if split is None or kwargs.get("splits_input") else split.cut
    if name == "column_linear":
        gathers = next((each for each in arguments if isinstance(each, Gathers)), Gathers())
        return None if gathers.input is None else gathers.input.cut
    return kwargs.get("cut")
