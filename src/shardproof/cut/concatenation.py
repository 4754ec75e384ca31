"""Rules for `cat` and `stack`: tensors that are cut alike are joined part by part."""

from typing import Any

import numpy as np
import torch

from shardproof.cut.alignment import common, fitted, one_along
from shardproof.cut.fallback import gathered
from shardproof.cut.spec import Spec
from shardproof.cut.tensor import CutTensor, cut_tensor, rule, run
from shardproof.units import CutDim


@rule("cat", "concat", "concatenate")
def cat(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.cat` along a whole dim, or along the cut dim, whose blocks are then joined."""
    tensors = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    first = next(each for each in tensors if isinstance(each, CutTensor))
    spec = first.spec
    dim %= len(spec.shape)
    if dim != spec.dim:
        parts = [each.local for each in tensors if _lies_as(each, spec)]
        if len(parts) == len(tensors):
            y = torch.cat(parts, dim)
            return cut_tensor(y, spec.of_part(y.shape), first.who)
    tensors = [each for each in tensors if each.shape != (0,)]
    if any(each.dim() != first.dim() for each in tensors):
        return gathered(func, name, args, kwargs)
    if dim == first.spec.dim:
        return _side_by_side(func, name, tensors, dim, args, kwargs)
    shape = list(first.shape)
    shape[dim] = 1
    cuts = [one_along(each, dim) for each in tensors if isinstance(each, CutTensor)]
    spec_and_who = common(cuts, tuple(shape))
    if spec_and_who is None:
        return gathered(func, name, args, kwargs)
    spec, who = spec_and_who
    parts = [
        fitted(each, spec.region.spec(tuple(each.shape), spec.dim, spec.cut), who)
        for each in tensors
    ]
    shape[dim] = sum(each.shape[dim] for each in tensors)
    joined_spec = spec.region.spec(tuple(shape), spec.dim, spec.cut)
    return cut_tensor(torch.cat(parts, dim), joined_spec, who)


def _lies_as(x: Any, other: Spec) -> bool:
    """Whether `x` is cut as `other` is, along the same dim."""
    if not isinstance(x, CutTensor):
        return False
    spec = x.spec
    if spec is other:
        return True
    is_alike = spec.cut is other.cut and spec.dim == other.dim
    return is_alike and len(spec.shape) == len(other.shape)


def _side_by_side(
    func: Any,
    name: str,
    tensors: list[Any],
    dim: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    first = next(each for each in tensors if isinstance(each, CutTensor))
    if not all(
        isinstance(each, CutTensor)
        and each.spec.dim == dim
        and each.spec.cut.shared is first.spec.cut.shared
        for each in tensors
    ):
        return gathered(func, name, args, kwargs)
    labels = np.concatenate([each.spec.cut.labels for each in tensors])
    shape = list(first.shape)
    shape[dim] = len(labels)
    region = first.spec.region
    key = ("cat", *(each.spec.cut for each in tensors))
    if key not in region.recipes:
        region.recipes[key] = CutDim.of_labels(first.spec.cut.shared, labels)
    spec = region.spec(tuple(shape), dim, region.recipes[key])
    return cut_tensor(torch.cat([each.local for each in tensors], dim), spec, first.who)


@rule("stack", "hstack", "vstack", "dstack", "column_stack")
def stack(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.stack`, as `cat` of tensors with a new dim."""
    if name != "stack":
        return gathered(func, name, args, kwargs)
    tensors = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim %= tensors[0].dim() + 1
    return run(torch.cat, ([each.unsqueeze(dim) for each in tensors], dim), {})
