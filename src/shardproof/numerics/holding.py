"""Functions of torch that need no form: a slice, a view or a thread changes none of their bits.

Measured, forward and backward, in fp32, fp64, bf16 and fp16 (tests/test_forms.py measures again): as
they are, on operands of one shape, along every dim that they do not reduce or scan over. What
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

# One operand, element by element. Those that can overwrite it hold as well: exp_ and so on.
POINTWISE = """
abs absolute ceil clamp clamp_max clamp_min clip cos deg2rad detach digamma erf erfc erfinv exp
expm1 floor frac i0 lgamma log log10 log1p log2 nan_to_num neg negative positive rad2deg
reciprocal relu round sgn sign sin sinc sqrt square tan atan arctan trunc fix
relu6 hardtanh hardswish hardsigmoid hardshrink leaky_relu logsigmoid log_sigmoid softsign
tanhshrink threshold
""".split()

# Comparisons and logic, which have no gradient, and what makes a tensor of another dtype.
WITHOUT_GRADIENT = """
eq ne lt le gt ge isnan isinf isfinite isposinf isneginf isclose signbit logical_not logical_and
logical_or logical_xor bitwise_not bitwise_and bitwise_or bitwise_xor bitwise_left_shift
bitwise_right_shift floor_divide argmax argmin argsort count_nonzero any all equal allclose
heaviside searchsorted bucketize bincount unique one_hot zeros_like ones_like full_like empty_like
rand_like randn_like __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __xor__ __invert__
__floordiv__ __lshift__ __rshift__ item tolist
""".split()

# Data that is moved and not computed with; backward moves it back, each element to one place.
MOVES = """
clone contiguous to type type_as float double half bfloat16 view reshape view_as reshape_as flatten
unflatten squeeze unsqueeze transpose permute movedim moveaxis swapaxes swapdims t mT narrow select
split split_with_sizes chunk tensor_split unbind cat concat concatenate stack hstack vstack flip
fliplr flipud roll rot90 tril triu diagonal diag_embed pad unfold masked_select masked_scatter
pixel_shuffle pixel_unshuffle channel_shuffle adjoint ravel
""".split()

# Along the dims that they do not go along.
ALONG_A_DIM = """
cumsum cumprod cummax cummin logcumsumexp sort topk kthvalue diff index_select gather embedding
index_add scatter_add max_pool1d max_pool2d
""".split()

NAMES: tuple[str, ...] = (*POINTWISE, *WITHOUT_GRADIENT, *MOVES, *ALONG_A_DIM)


def objects(name: str) -> Iterator[Callable[..., Any]]:
    """All functions of a name, as they arrive in `__torch_function__`.

    Args:
        name: of a function, a method, or both.
    """
    for place in PLACES:
        found = getattr(place, name, None)
        if callable(found):
            yield found


def collect() -> frozenset[Callable[..., Any]]:
    """The functions of all names above, and those that overwrite."""
    names = [*NAMES, *(f"{name}_" for name in POINTWISE)]
    return frozenset(found for name in names for found in objects(name))
