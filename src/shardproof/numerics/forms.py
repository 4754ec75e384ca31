"""Which function computes what a function of torch does, with bits that no cut can change.

    form_of(torch.sigmoid)    a function of the same arguments
    holds(torch.exp)          True: torch's own can be called as it is

The key is the object that arrives in `__torch_function__`. Of a slice along one dim that the
function does not reduce, a form and what holds give the bits of the whole, forward and backward,
whatever the strides and the number of threads. A function that is in neither place is not known to
do so. Forms take plain tensors.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof.numerics import (
    activating,
    broadcasting,
    channelwise,
    contracting,
    entropy,
    holding,
    lengths,
    pooling,
    powers,
    reducing,
    rowwise,
)
from shardproof.numerics.activating import overwriting, with_inplace
from shardproof.numerics.broadcasting import broadcast, complex_product, in_fp32
from shardproof.numerics.convolving import convolution
from shardproof.numerics.einsum import einsum
from shardproof.numerics.elementwise import check_out
from shardproof.numerics.headed import attention
from shardproof.numerics.indexing import getitem

Form = Callable[..., Any]

HOLDS: frozenset[Form] = holding.collect()


def form_of(function: Form) -> Form | None:
    """The form of a function of torch.

    Args:
        function: as it arrives in `__torch_function__`.
    Returns:
        A function of the same arguments, on plain tensors; None if there is none, or if none is
        needed.
    """
    return _FORMS.get(function)


def holds(function: Form) -> bool:
    """Whether torch's own gives a slice the bits of the whole, forward and backward.

    Args:
        function: as it arrives in `__torch_function__`.
    """
    return function in HOLDS


def all_forms() -> Mapping[Form, Form]:
    """Every function of torch that has a form, and the form."""
    return _FORMS


def is_known(function: Form) -> bool:
    """Whether a function holds or has a form.

    Args:
        function: as it arrives in `__torch_function__`.
    """
    return function in _FORMS or function in HOLDS


def _functional_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    return rowwise.softmax(input, dim, dtype)


def _functional_log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    return rowwise.log_softmax(input, dim, dtype)


def _functional_softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    return rowwise.softmax(-input, dim, dtype)


def _layer_norm(*args: Any, cudnn_enable: bool = True, **options: Any) -> Tensor:
    return rowwise.layer_norm(*args[:5], **options)


def _group_norm(*args: Any, cudnn_enabled: bool = True, **options: Any) -> Tensor:
    return channelwise.group_norm(*args[:5], **options)


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return channelwise.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )


def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return channelwise.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _picking(of_dims: Form, of_two: Form, plain: Form) -> Form:
    """`max` or `min`: of all elements, along a dim with the place, or of two tensors."""

    def form(input: Tensor, *args: Any, **options: Any) -> Any:
        if not args and not options:
            return of_dims(input)
        other = args[0] if args else options.get("other")
        if isinstance(other, Tensor):
            return of_two(input, other)
        return plain(input, *args, **options)  # goes along the dim from first to last

    return form


def _reciprocal_times(input: Tensor, other: Any) -> Tensor:
    """`other / input`, as torch computes it."""
    return contracting.mul(input.reciprocal(), other)


def _minus(input: Tensor, other: Any) -> Tensor:
    """`other - input`."""
    return _SUB(other, input) if isinstance(other, Tensor) else other - input


_SUB = broadcast(torch.sub)

# By name, in every place where torch has one of that name, with the same arguments.
_BY_NAME: Mapping[str, Form] = {
    "sigmoid": activating.sigmoid,
    "expit": activating.sigmoid,
    "tanh": activating.tanh,
    "gelu": activating.gelu,
    "softplus": activating.softplus,
    "softshrink": activating.softshrink,
    "glu": activating.glu,
    "prelu": activating.prelu,
    "silu": with_inplace(activating.silu, 1),
    "mish": with_inplace(activating.mish, 1),
    "selu": with_inplace(activating.selu, 1),
    "elu": with_inplace(activating.elu, 2),
    "celu": with_inplace(activating.celu, 2),
    "rrelu": with_inplace(activating.rrelu, 4),
    "exp2": powers.exp2,
    "sinh": powers.sinh,
    "cosh": powers.cosh,
    "atanh": powers.atanh,
    "arctanh": powers.atanh,
    "logit": powers.logit,
    "rsqrt": in_fp32(torch.rsqrt),
    "asin": in_fp32(torch.asin),
    "acos": in_fp32(torch.acos),
    "arcsin": in_fp32(torch.asin),
    "arccos": in_fp32(torch.acos),
    "asinh": in_fp32(torch.asinh),
    "acosh": in_fp32(torch.acosh),
    "arcsinh": in_fp32(torch.asinh),
    "arccosh": in_fp32(torch.acosh),
    "pow": powers.power,
    "__pow__": powers.power,
    "__rpow__": powers.reversed_power,
    "float_power": powers.float_power,
    "logaddexp": powers.logaddexp,
    "maximum": powers.maximum,
    "minimum": powers.minimum,
    "softmax": rowwise.softmax,
    "log_softmax": rowwise.log_softmax,
    "layer_norm": _layer_norm,
    "rms_norm": rowwise.rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "logsumexp": reducing.logsumexp,
    "sum": lengths.sum_form,
    "mean": lengths.mean_form,
    "nansum": lengths.nansum,
    "var": lengths.var,
    "std": lengths.std,
    "var_mean": lengths.var_mean,
    "std_mean": lengths.std_mean,
    "prod": lengths.product,
    "amax": reducing.largest,
    "amin": reducing.smallest,
    "max": _picking(reducing.largest, powers.maximum, torch.max),
    "min": _picking(reducing.smallest, powers.minimum, torch.min),
    "norm": lengths.norm,
    "vector_norm": lengths.vector_norm,
    "normalize": lengths.normalize,
    "cosine_similarity": lengths.cosine_similarity,
    "pairwise_distance": lengths.pairwise_distance,
    "matmul": contracting.matmul,
    "__matmul__": contracting.matmul,
    "__rmatmul__": contracting.reversed_matmul,
    "mm": contracting.matmul,
    "bmm": contracting.matmul,
    "mv": contracting.matmul,
    "dot": contracting.matmul,
    "linear": contracting.linear,
    "addmm": contracting.addmm,
    "addmv": contracting.addmm,
    "baddbmm": contracting.addmm,
    "addbmm": contracting.addbmm,
    "outer": contracting.outer,
    "ger": contracting.outer,
    "inner": contracting.inner,
    "tensordot": contracting.tensordot,
    "vecdot": contracting.vecdot,
    "einsum": einsum,
    "conv1d": convolution(1),
    "conv2d": convolution(2),
    "conv3d": convolution(3),
    **{f"avg_pool{n}d": pooling.average(n) for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": pooling.adaptive_average(n) for n in (1, 2, 3)},
    "scaled_dot_product_attention": attention,
    "__getitem__": getitem,
    "expand": broadcasting.expand_to,
    "broadcast_to": broadcasting.expand_to,
    "expand_as": broadcasting.expand_as,
    "broadcast_tensors": broadcasting.broadcast_tensors,
    "repeat": broadcasting.repeat,
    "tile": broadcasting.tile,
    "repeat_interleave": broadcasting.repeat_interleave,
    "rsub": _minus,
    "__rsub__": _minus,
    "__rdiv__": _reciprocal_times,
    "__rtruediv__": _reciprocal_times,
}

# Pointwise in several operands, any of which may be repeated; torch's own does the rest.
REPEATING = holding.words("""
add sub subtract mul multiply div divide true_divide fmod remainder fmax fmin copysign lerp addcmul
addcdiv where masked_fill __add__ __radd__ __sub__ __mul__ __rmul__ __truediv__ __mod__ xlogy
""")

# One object has other arguments than those that share its name.
_BY_OBJECT: Mapping[Form, Form] = {
    F.softmax: _functional_softmax,
    F.log_softmax: _functional_log_softmax,
    F.softmin: _functional_softmin,
    F.cross_entropy: entropy.cross_entropy,
    F.nll_loss: entropy.nll_loss,
    F.layer_norm: rowwise.layer_norm,
    F.group_norm: channelwise.group_norm,
    F.batch_norm: channelwise.batch_norm,
    F.instance_norm: channelwise.instance_norm,
    torch.linalg.norm: lengths.linalg_norm,
}

# What torch lets overwrite its input.
_OVERWRITING = holding.words("""
sigmoid tanh silu mish selu elu celu rrelu exp2 sinh cosh atanh arctanh logit rsqrt asin acos arcsin
arccos asinh acosh arcsinh arccosh pow float_power addmm addmv baddbmm addbmm
""")


def _collect() -> dict[Form, Form]:
    found: dict[Form, Form] = {}
    for name, form in _BY_NAME.items():
        found.update(dict.fromkeys(holding.objects(name), _with_out(name, form)))
    for name in _OVERWRITING:
        write = _with_out(name, overwriting(_BY_NAME[name]))
        found.update(dict.fromkeys(holding.objects(f"{name}_"), write))
    for name in REPEATING:
        for each in (name, f"{name}_", f"__i{name.strip('_')}__"):
            found.update({function: _repeating(function) for function in holding.objects(each)})
    found.update({key: _with_out(key.__name__, form) for key, form in _BY_OBJECT.items()})
    return found


def _with_out(name: str, form: Form) -> Form:
    @functools.wraps(form)
    def call(*args: Any, **options: Any) -> Any:
        out = options.pop("out", None)
        y = form(*args, **options)
        return y if out is None else _written(y, out, name)

    return call


def _written(y: Any, out: Any, name: str) -> Any:
    """Write the result to `out` and return `out`, as torch does."""
    check_out(name, y, out)
    return out.resize_(y.shape).copy_(y) if out.shape != y.shape else out.copy_(y)


def _repeating(function: Form) -> Form:
    """Where `alpha` scales an operand, torch rounds bf16 and fp16 in two ways."""
    form = broadcast(function)
    wide = in_fp32(form)
    name = function.__name__
    is_product = name.strip("_") in ("mul", "imul", "rmul", "multiply")
    overwrites = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))

    def call(*args: Any, **options: Any) -> Any:
        if is_product and any(isinstance(x, Tensor) and x.is_complex() for x in args):
            y = complex_product(*args)
        elif "alpha" in options:
            y = wide(*args, **options)
        elif options or torch.is_grad_enabled():
            return form(*args, **options)
        else:
            return function(*args)  # only backward sums over what is repeated
        return args[0].copy_(y) if overwrites else y

    return call


_FORMS: Mapping[Form, Form] = MappingProxyType(_collect())
