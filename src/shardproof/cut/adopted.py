"""Turn a whole tensor into a cut tensor when a cut tensor is written into it.

Model code makes a tensor with `torch.zeros` and fills it with activations: a key cache, the outputs
of chunks. The first write decides how it is cut. The same object becomes a cut tensor, so that all
references to it see the writes. It keeps its previous values and its place in the autograd graph.
"""

from typing import Any

import torch
from torch import Tensor

from shardproof import operators
from shardproof.cut.spec import STAYS_WHOLE, Spec
from shardproof.cut.tensor import Adopted, CutTensor
from shardproof.ops import unit_ops

_ALONE = 2  # references to a storage: those of the tensor, and of this check


def adopt(x: Any, spec: Spec, who: str) -> bool:
    """Turn a whole tensor into a cut one, if no other tensor shares its memory.

    Args:
        x: a whole tensor, the result of a plain operation.
        spec: how it is to be cut.
        who: the module of the weight from which the cut comes.

    Returns:
        Whether it was cut. A parameter, a view or a tensor with views stays whole.
    """
    is_own = type(x) is Tensor and x._base is None and not (x.is_leaf and x.requires_grad)
    if not is_own or hasattr(x, STAYS_WHOLE) or operators.is_recorded():
        return False
    if torch._C._storage_Use_Count(x.untyped_storage()._cdata) != _ALONE:
        return False
    place = spec.region.place(spec.cut, who)
    if x.requires_grad:
        local = unit_ops.take(x, spec.dim, place)
    else:
        local = unit_ops.held_part(x, spec.dim, place).clone()
    with torch.no_grad():
        x.data = x.new_empty(0)  # its memory
    x.__class__ = Adopted
    adopted: CutTensor = x
    adopted.local, adopted.spec, adopted.who = local, spec, who
    return True
