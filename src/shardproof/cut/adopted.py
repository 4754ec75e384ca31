"""A whole tensor that is written to with a cut one is cut from then on: caches, and what is filled.

Code makes a tensor by `torch.zeros` and fills it with activations: a cache of keys, the outputs of
chunks. Its first write says how it is cut. The same object becomes a cut tensor, so that everybody
who has it sees the writes; what it held before is kept, and so is the way of its gradient.
"""

from typing import Any

import torch
from torch import Tensor

from shardproof import operators
from shardproof.cut.spec import KEPT, Spec
from shardproof.cut.tensor import Adopted, CutTensor
from shardproof.ops import unit_ops

_ALONE = 2  # references to a storage: the tensor, and who asks


def adopt(x: Any, spec: Spec, who: str) -> bool:
    """Cut a whole tensor in place, if nobody else sees its memory.

    Args:
        x: whole; a tensor that a plain operation made.
        spec: how it is to be cut.
        who: the module of the weight that the cut comes from.

    Returns:
        False: it stays whole, for it is a parameter, a view, or has views.
    """
    is_own = type(x) is Tensor and x._base is None and not (x.is_leaf and x.requires_grad)
    if not is_own or hasattr(x, KEPT) or operators.is_recorded():
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
    made: CutTensor = x
    made.local, made.spec, made.who = local, spec, who
    return True
