"""Operations on activations that are cut along their tokens (sequence parallelism).

No bit may depend on this cut, so that only element-wise operations compute on a rank's tokens. All
others get the whole activation, as they do without sequence parallelism: a sum over tokens, a
product with a parameter or a parameter that broadcasts over tokens would add in another order.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shardproof.cut.fallback import gathered
from shardproof.cut.pointwise import NAMES
from shardproof.cut.tensor import CutTensor, Rule, token_rules
from shardproof.units import CutDim

TOKENS = "tokens"  # name of the units
DIM = 1  # of the tokens in (B, T, n)
_ON_OWN_TOKENS = frozenset(
    (
        *NAMES,
        *(f"{name}_" for name in NAMES),
        *"clone contiguous detach elementwise zeros_like ones_like empty_like full_like".split(),  # noqa: SIM905
        *"whole requires_grad_ retain_grad data_ptr".split(),  # noqa: SIM905
    )
)


def tokens_of(x: Any) -> CutDim | None:
    """How the tokens of an activation are cut; None if they are not."""
    if not isinstance(x, CutTensor) or x.spec.dim != DIM or x.dim() != 3:
        return None
    return x.spec.cut if x.spec.cut.shared.units.name == TOKENS else None


def install() -> None:
    """Look for such activations from now on; may be called again."""
    if not token_rules:
        token_rules.append(_rule)


def _rule(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rule | None:
    """The rule of an operation on such activations; None if its usual one serves."""
    tensors = list(_tensors(args, kwargs))
    cut = next((each for each in tensors if tokens_of(each) is not None), None)
    if cut is None:
        return None
    is_graded = torch.is_grad_enabled()
    for each in tensors:
        if isinstance(each, CutTensor):
            is_same = each.spec is cut.spec
        else:
            is_same = each.shape == cut.shape or not (is_graded and each.requires_grad)
        if not is_same:
            return gathered
    if name == "getitem":
        return None if _is_all(args[1]) else gathered
    return None if name in _ON_OWN_TOKENS else gathered


def _is_all(index: Any) -> bool:
    """Whether an index takes everything, as models do that keep the logits of all tokens."""
    entries = index if isinstance(index, tuple) else (index,)
    whole = (slice(None), slice(0, None))
    return all(each is ... or (type(each) is slice and each in whole) for each in entries)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for each in (*args, *kwargs.values()):
        if isinstance(each, Tensor | CutTensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from (one for one in each if isinstance(one, Tensor | CutTensor))
