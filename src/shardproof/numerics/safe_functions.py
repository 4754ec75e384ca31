"""Functions of torch that need no form: a slice, a view or a thread changes none of their bits.

Measured, forward and backward, in fp32, fp64, bf16 and fp16 (tests/test_forms.py measures again):
as they are, on operands of one shape, along every dim that they do not reduce or scan over. What
repeats an operand has a form (`broadcasting`), because its backward sums.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

PLACES: tuple[Any, ...] = (
    torch,
    torch.Tensor,
    F,
    torch._C._nn,
    torch.special,
    torch.linalg,
)


def words(text: str) -> list[str]:
    """Names that stand in a text, between spaces.

    Args:
        text: of any number of lines.
    """
    return text.split()


# One operand, element by element. Those that can overwrite it hold as well: exp_ and so on.
POINTWISE = words("""
abs ceil clamp clamp_max clamp_min cos deg2rad digamma erf erfc erfinv exp
expm1 floor frac i0 lgamma log log10 log1p log2 nan_to_num neg positive rad2deg
reciprocal relu round sgn sign sin sinc sqrt square tan atan trunc
relu6 hardtanh hardswish hardsigmoid hardshrink leaky_relu logsigmoid softsign
tanhshrink threshold
""")

# Comparisons and logic, places and numbers of elements: there is no gradient.
WITHOUT_GRADIENT = words("""
eq ne lt le gt ge isclose isnan isinf isfinite isposinf isneginf signbit logical_not logical_and
logical_or logical_xor bitwise_not bitwise_and bitwise_or bitwise_xor floor_divide argmax argmin
argsort any all count_nonzero one_hot zeros_like ones_like full_like empty_like
""")

# Data that is moved and not computed with; backward moves it back, each element to one place.
MOVES = words("""
clone contiguous detach to type type_as float double half bfloat16 view reshape view_as reshape_as
flatten unflatten ravel squeeze unsqueeze transpose permute movedim moveaxis swapaxes swapdims t
adjoint narrow select split split_with_sizes chunk tensor_split unbind cat concat concatenate stack
hstack vstack flip fliplr flipud roll rot90 tril triu diagonal diag_embed pad unfold
""")

# Along the dims that they do not go along.
ALONG_A_DIM = words("""
cumsum cumprod cummax cummin logcumsumexp sort topk kthvalue diff index_select gather embedding
index_add scatter_add max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d
""")

# Names that torch has for the same, and what Python calls for an operator.
_SAME = {
    "absolute": "abs",
    "negative": "neg",
    "fix": "trunc",
    "arctan": "atan",
    "clip": "clamp",
    "log_sigmoid": "logsigmoid",
    "__eq__": "eq",
    "__ne__": "ne",
    "__lt__": "lt",
    "__le__": "le",
    "__gt__": "gt",
    "__ge__": "ge",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "__invert__": "bitwise_not",
    "__floordiv__": "floor_divide",
    "__neg__": "neg",
    "__abs__": "abs",
}

NAMES: tuple[str, ...] = (*POINTWISE, *WITHOUT_GRADIENT, *MOVES, *ALONG_A_DIM)


def objects(name: str) -> Iterator[Callable[..., Any]]:
    """All functions of a name, as they arrive in `__torch_function__`.

    Args:
        name: of a function, a method, or both.
    """
    for place in PLACES:
        member = getattr(place, name, None)
        if callable(member):
            yield member


def collect() -> frozenset[Callable[..., Any]]:
    """The functions of all names above, of names for the same, and of those that overwrite."""
    same = [other for other, name in _SAME.items() if name in NAMES]
    names = [*NAMES, *same, *(f"{name}_" for name in (*POINTWISE, *same))]
    return frozenset(function for name in names for function in objects(name))
