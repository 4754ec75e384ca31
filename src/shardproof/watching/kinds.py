"""Classify an ATen operation by its schema, its tags or its name.

move       no arithmetic: every output element is an input element
pointwise  an output element depends on the elements at its place
new        only the shape of the operand is used, not its elements
lines      needs all elements along some dims, independent along the others: softmax, sort, cumsum
sum        a sum along some dims
others     have their own rules, under their own names
"""

from functools import cache
from typing import Any

import torch

MOVES = frozenset((
    "cat", "stack", "repeat", "clone", "contiguous", "_unsafe_view", "flip", "roll", "_to_copy",
    "constant_pad_nd", "tril", "triu", "repeat_interleave", "_reshape_copy", "unfold_copy",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unsafe_split", "unsafe_chunk",
    "unsafe_split_with_sizes", "lift_fresh", "lift_fresh_copy", "split_with_sizes_copy",
    "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
    "view_copy", "slice_scatter", "select_scatter", "rot90", "block_diag", "expand_copy",
    "permute_copy", "_reshape_alias", "_pad_circular",
))  # fmt: skip
IDENTITIES = frozenset((
    "_to_copy", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "detach", "alias",
    "_conj", "_neg_view", "tril", "triu", "resolve_conj", "resolve_neg", "detach_", "lift",
    "_efficientzerotensor",
))  # fmt: skip
POINTWISE = frozenset((
    "masked_fill", "native_dropout", "dropout", "bernoulli", "isin", "copy", "copy_",
    "nan_to_num", "polar", "_fused_dropout", "rrelu_with_noise", "exponential_", "uniform_",
    "normal_", "bernoulli_", "fill_", "zero_", "lerp", "masked_scatter", "masked_fill_",
    "_prelu_kernel", "complex", "where", "quantize_per_tensor",
    "fake_quantize_per_tensor_affine", "rrelu", "rrelu_with_noise_functional", "hardswish",
    "hardsigmoid", "hardtanh", "mish", "log_sigmoid_forward", "leaky_relu", "elu", "selu",
    "celu", "softshrink", "hardshrink", "threshold", "random_", "geometric_", "log_normal_",
    "cauchy_", "clamp", "angle",
))  # fmt: skip
NEW = frozenset((
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
    "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "randint_like",
))  # fmt: skip
# name -> position of the argument with the dims of which all elements are needed
LINES = {
    "_softmax": 1, "_log_softmax": 1, "softmax": 1, "log_softmax": 1, "_safe_softmax": 1,
    "cumsum": 1, "cumprod": 1, "logcumsumexp": 1, "cummax": 1, "cummin": 1, "sort": 1,
    "argsort": 1, "topk": 2, "kthvalue": 2, "argmax": 1, "argmin": 1, "max": 1, "min": 1,
    "amax": 1, "amin": 1, "aminmax": 1, "logsumexp": 1, "var": 1, "std": 1, "var_mean": 1,
    "std_mean": 1, "linalg_vector_norm": 2, "norm": 2, "any": 1, "all": 1, "prod": 1,
    "median": 1, "mode": 1, "renorm": 2, "count_nonzero": 1, "_fft_c2c": 1, "_fft_r2c": 1,
    "_fft_c2r": 1, "nanmedian": 1,
}  # fmt: skip
SUMS = frozenset(("sum", "mean", "nansum"))
# Operations in LINES that need only one or two sums along the dims, and not all elements.
LIKE_SUMS = frozenset((
    "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "any", "all",
    "count_nonzero",
))  # fmt: skip


@cache
def name_of(func: Any) -> str:
    """The name of the operation, without namespace and overload."""
    return str(func._schema.name).split("::")[1]


@cache
def is_view(func: Any) -> bool:
    """Whether the result is a view of an argument that is not written."""
    infos = [each.alias_info for each in func._schema.returns]
    return bool(infos) and infos[0] is not None and not infos[0].is_write


@cache
def written_arguments(func: Any) -> tuple[int, ...]:
    """Positions of the arguments that are written."""
    return tuple(
        place
        for place, each in enumerate(func._schema.arguments)
        if each.alias_info is not None and each.alias_info.is_write
    )


@cache
def is_random(func: Any) -> bool:
    """Whether it draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


@cache
def kind_of(func: Any) -> str:
    """One of the kinds above, or the operation's name."""
    name = name_of(func)
    if name in NEW:
        return "new"
    if is_view(func) or name in MOVES:
        return "move"
    if name in LINES:
        return "lines"
    if name in SUMS:
        return "sum"
    if name in POINTWISE or torch.Tag.pointwise in func.tags or _is_pointwise_in_place(name):
        return "pointwise"
    return name


def _is_pointwise_in_place(name: str) -> bool:
    if not name.endswith("_") or name.startswith("index_"):
        return False
    functional = getattr(torch.ops.aten, name[:-1], None)
    return functional is not None and (
        name[:-1] in POINTWISE
        or any(
            torch.Tag.pointwise in getattr(functional, overload).tags
            for overload in functional.overloads()
        )
    )
