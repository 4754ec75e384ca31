"""Rules for element-wise operations, which compute on the parts and send nothing.

Operands that are cut in the same way are used as they are. An operand with a coarser cut (the keys
of a group of query heads) is repeated for the finer cut. A whole operand that has the cut dim is
sliced; the gradient of one that broadcasts along the cut dim is summed over the ranks.
"""

from typing import Any

import torch
from torch import Tensor

from shardproof.cut.adopted import adopt
from shardproof.cut.alignment import broadcast, common, fitted
from shardproof.cut.fallback import computed, gathered, invariant
from shardproof.cut.spec import Spec
from shardproof.cut.tensor import CutTensor, cut_tensor, rule

_TENSORS = (CutTensor, Tensor)
_NAMES = [
    "abs",
    "truediv",
    "rtruediv",
    "ror",
    "rxor",
    "lshift",
    "rshift",
    "bitwise_left_shift",
    "bitwise_right_shift",
    "absolute",
    "acos",
    "acosh",
    "add",
    "addcdiv",
    "addcmul",
    "angle",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "arctan2",
    "atanh",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "bitwise_not",
    "and",
    "or",
    "xor",
    "invert",
    "ceil",
    "celu",
    "clamp",
    "clamp_max",
    "clamp_min",
    "clip",
    "conj",
    "conj_physical",
    "copysign",
    "cos",
    "cosh",
    "deg2rad",
    "digamma",
    "div",
    "divide",
    "elu",
    "eq",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "exp2",
    "expm1",
    "exp1",
    "float_power",
    "floor",
    "floor_divide",
    "floordiv",
    "fmax",
    "fmin",
    "fmod",
    "frac",
    "ge",
    "gelu",
    "greater",
    "greater_equal",
    "gt",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "heaviside",
    "hypot",
    "isclose",
    "isfinite",
    "isinf",
    "isnan",
    "isneginf",
    "isposinf",
    "ldexp",
    "le",
    "leaky_relu",
    "lerp",
    "less",
    "less_equal",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "logaddexp",
    "logaddexp2",
    "logical_and",
    "logical_not",
    "logical_or",
    "logical_xor",
    "logit",
    "logsigmoid",
    "log_sigmoid",
    "lt",
    "masked_fill",
    "maximum",
    "minimum",
    "mish",
    "mod",
    "mul",
    "multiply",
    "nan_to_num",
    "ne",
    "neg",
    "negative",
    "nextafter",
    "not_equal",
    "polar",
    "pos",
    "positive",
    "pow",
    "rad2deg",
    "radd",
    "rdiv",
    "real",
    "imag",
    "reciprocal",
    "relu",
    "relu6",
    "remainder",
    "rfloordiv",
    "rmod",
    "rmul",
    "round",
    "rpow",
    "rrelu",
    "rsqrt",
    "rsub",
    "selu",
    "sgn",
    "sigmoid",
    "sign",
    "signbit",
    "silu",
    "sin",
    "sinc",
    "sinh",
    "softplus",
    "softshrink",
    "softsign",
    "special_expit",
    "special_erf",
    "sqrt",
    "square",
    "sub",
    "subtract",
    "tan",
    "tanh",
    "tanhshrink",
    "threshold",
    "true_divide",
    "trunc",
    "where",
    "xlogy",
    "to",
    "type",
    "type_as",
    "float",
    "half",
    "double",
    "bfloat16",
    "int",
    "long",
    "short",
    "char",
    "byte",
    "bool",
    "cpu",
    "cuda",
    "_to_copy",
    "view_as_complex_",
    "quick_gelu",
    "sigmoid_backward",
    "nan_to_num",
    "rint",
    "quantize",
    "fill",
    "zero",
    "copy",
]
_LIKE = ["zeros_like", "ones_like", "empty_like", "full_like"]

rule(*(f"{name}_" for name in _NAMES))(lambda *rule_args: _in_place(*rule_args))


@rule(*_NAMES)
def pointwise(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An element-wise operation on tensors and numbers."""
    x = args[0] if args else None
    if isinstance(x, CutTensor) and not (
        kwargs and any(isinstance(each, Tensor) for each in kwargs.values())
    ):
        # The common case: numbers, and tensors that are cut in the same way.
        spec = x.spec
        for other in args:
            if isinstance(other, CutTensor):
                if other.spec is not spec:
                    break
            elif isinstance(other, Tensor) and not _joins_as_it_is(other, spec):
                break
        else:
            compute = invariant(spec.region, func, x.who)
            parts = [each.local if isinstance(each, CutTensor) else each for each in args]
            return cut_tensor(compute(*parts, **kwargs), spec, x.who)
    return _general(func, name, args, kwargs)


def _joins_as_it_is(x: Tensor, spec: Spec) -> bool:
    """Whether a whole tensor needs no gradient and broadcasts along the cut dim."""
    return spec.is_joined_by(x.shape) and not (x.requires_grad and torch.is_grad_enabled())


def _general(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    flat = [*args, *kwargs.values()]
    places = [place for place, each in enumerate(flat) if isinstance(each, _TENSORS)]
    if name in ("type_as", "to") and len(places) > 1:
        places = places[:1]
        flat = [
            each if place == places[0] or not isinstance(each, CutTensor) else each.local
            for place, each in enumerate(flat)
        ]
    tensors = [flat[place] for place in places]
    shape = broadcast(*(each.shape for each in tensors))
    spec_and_who = common(tensors, shape)
    if spec_and_who is None:
        return gathered(func, name, args, kwargs)
    spec, who = spec_and_who
    for place in places:
        flat[place] = fitted(flat[place], spec, who)
    options = dict(zip(kwargs, flat[len(args) :], strict=True))
    y = invariant(spec.region, func, who)(*flat[: len(args)], **options)
    if isinstance(y, Tensor):
        return cut_tensor(y, spec, who)
    return type(y)(cut_tensor(each, spec, who) for each in y)


def _in_place(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An in-place operation: it writes to the part, or to all of a whole tensor."""
    x = args[0]
    flat = [*args, *kwargs.values()]
    if not isinstance(x, CutTensor) and not _adopted(x, flat):
        return gathered(func, name, args, kwargs)
    for place, each in enumerate(flat):
        if isinstance(each, _TENSORS) and each is not x:
            if broadcast(each.shape, x.shape) != x.shape:
                return gathered(func, name, args, kwargs)
            flat[place] = fitted(each, x.spec, x.who)
    flat = [each.local if each is x else each for each in flat]
    options = dict(zip(kwargs, flat[len(args) :], strict=True))
    invariant(x.spec.region, func, x.who)(*flat[: len(args)], **options)
    return x


def _adopted(x: Tensor, operands: list[Any]) -> bool:
    """Whether a whole tensor was turned into a cut one, as the written operands are cut."""
    cuts = [each for each in operands if isinstance(each, CutTensor)]
    if broadcast(*(each.shape for each in cuts), x.shape) != x.shape:
        return False
    spec_and_who = common(cuts, tuple(x.shape))
    return spec_and_who is not None and adopt(x, *spec_and_who)


@rule(*_LIKE)
def like(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`zeros_like` and its like: a new tensor that is cut as the given one."""
    x = args[0]
    return cut_tensor(func(x.local, *args[1:], **kwargs), x.spec, x.who)


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new")
def new(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`new_zeros` and its like: cut as the given tensor if the shape has the cut dim too."""
    x, size_args = args[0], args[1:]
    places = 1 if name == "new_full" else len(size_args)
    size = (
        size_args[0] if size_args and isinstance(size_args[0], list | tuple) else size_args[:places]
    )
    shape = tuple(kwargs.pop("size", size))
    rest = size_args[1:] if name == "new_full" or (size_args and size_args[0] is size) else ()
    spec = x.spec
    if name == "new":  # the old `x.new()`: without arguments, with sizes, or with values
        if not all(isinstance(each, int) for each in shape):
            return func(x.local, *args[1:], **kwargs)
        func, shape = Tensor.new_empty, shape or (0,)
    if len(shape) != x.dim() or shape[spec.dim] != x.shape[spec.dim]:
        return func(x.local, shape, *rest, **kwargs)
    result_spec = spec.region.spec(shape, spec.dim, spec.cut)
    return cut_tensor(func(x.local, result_spec.local_shape, *rest, **kwargs), result_spec, x.who)


@rule("new_tensor")
def new_tensor(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`new_tensor` of given values: a whole tensor."""
    return func(args[0].local, *args[1:], **kwargs)


@rule("prelu")
def prelu(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.prelu`: one slope for each channel (dim 1), or one for all."""
    x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
    shape = (-1, *[1] * (x.dim() - 2)) if weight.numel() > 1 else ()
    region = (x if isinstance(x, CutTensor) else weight).spec.region
    falling = computed(region, torch.mul, x, weight.reshape(shape))
    return computed(region, torch.where, x > 0, x, falling)
