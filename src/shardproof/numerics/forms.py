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
    broadcasting,
    channel_norms,
    dim_sums,
    pooling,
    powers,
    safe_functions,
    softmax_and_norms,
    torch_activations,
    torch_products,
    vector_norms,
    whole_cross_entropy,
)
from shardproof.numerics.broadcasting import broadcast, complex_product, in_fp32
from shardproof.numerics.convolutions import convolution
from shardproof.numerics.einsum import einsum
from shardproof.numerics.elementwise import check_out
from shardproof.numerics.indexing import getitem
from shardproof.numerics.sdpa import attention
from shardproof.numerics.torch_activations import overwriting, with_inplace

Form = Callable[..., Any]

HOLDS: frozenset[Form] = safe_functions.collect()


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
    return softmax_and_norms.softmax(input, dim, dtype)


def _functional_log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    return softmax_and_norms.log_softmax(input, dim, dtype)


def _functional_softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    return softmax_and_norms.softmax(-input, dim, dtype)


def _layer_norm(*args: Any, cudnn_enable: bool = True, **options: Any) -> Tensor:
    return softmax_and_norms.layer_norm(*args[:5], **options)


def _group_norm(*args: Any, cudnn_enabled: bool = True, **options: Any) -> Tensor:
    return channel_norms.group_norm(*args[:5], **options)


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
    return channel_norms.batch_norm(
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
    return channel_norms.instance_norm(
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
    return torch_products.mul(input.reciprocal(), other)


def _minus(input: Tensor, other: Any) -> Tensor:
    """`other - input`."""
    return _SUB(other, input) if isinstance(other, Tensor) else other - input


_SUB = broadcast(torch.sub)

# By name, in every place where torch has one of that name, with the same arguments.
_BY_NAME: Mapping[str, Form] = {
    "sigmoid": torch_activations.sigmoid,
    "expit": torch_activations.sigmoid,
    "tanh": torch_activations.tanh,
    "gelu": torch_activations.gelu,
    "softplus": torch_activations.softplus,
    "softshrink": torch_activations.softshrink,
    "glu": torch_activations.glu,
    "prelu": torch_activations.prelu,
    "silu": with_inplace(torch_activations.silu, 1),
    "mish": with_inplace(torch_activations.mish, 1),
    "selu": with_inplace(torch_activations.selu, 1),
    "elu": with_inplace(torch_activations.elu, 2),
    "celu": with_inplace(torch_activations.celu, 2),
    "rrelu": with_inplace(torch_activations.rrelu, 4),
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
    "softmax": softmax_and_norms.softmax,
    "log_softmax": softmax_and_norms.log_softmax,
    "layer_norm": _layer_norm,
    "rms_norm": softmax_and_norms.rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "logsumexp": dim_sums.logsumexp,
    "sum": vector_norms.sum_form,
    "mean": vector_norms.mean_form,
    "nansum": vector_norms.nansum,
    "var": vector_norms.var,
    "std": vector_norms.std,
    "var_mean": vector_norms.var_mean,
    "std_mean": vector_norms.std_mean,
    "prod": vector_norms.product,
    "amax": dim_sums.largest,
    "amin": dim_sums.smallest,
    "max": _picking(dim_sums.largest, powers.maximum, torch.max),
    "min": _picking(dim_sums.smallest, powers.minimum, torch.min),
    "norm": vector_norms.norm,
    "vector_norm": vector_norms.vector_norm,
    "normalize": vector_norms.normalize,
    "cosine_similarity": vector_norms.cosine_similarity,
    "pairwise_distance": vector_norms.pairwise_distance,
    "matmul": torch_products.matmul,
    "__matmul__": torch_products.matmul,
    "__rmatmul__": torch_products.reversed_matmul,
    "mm": torch_products.matmul,
    "bmm": torch_products.matmul,
    "mv": torch_products.matmul,
    "dot": torch_products.matmul,
    "linear": torch_products.linear,
    "addmm": torch_products.addmm,
    "addmv": torch_products.addmm,
    "baddbmm": torch_products.addmm,
    "addbmm": torch_products.addbmm,
    "outer": torch_products.outer,
    "ger": torch_products.outer,
    "inner": torch_products.inner,
    "tensordot": torch_products.tensordot,
    "vecdot": torch_products.vecdot,
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
REPEATING = safe_functions.words("""
add sub subtract mul multiply div divide true_divide fmod remainder fmax fmin copysign lerp addcmul
addcdiv where masked_fill __add__ __radd__ __sub__ __mul__ __rmul__ __truediv__ __mod__ xlogy
""")

# One object has other arguments than those that share its name.
_BY_OBJECT: Mapping[Form, Form] = {
    F.softmax: _functional_softmax,
    F.log_softmax: _functional_log_softmax,
    F.softmin: _functional_softmin,
    F.cross_entropy: whole_cross_entropy.cross_entropy,
    F.nll_loss: whole_cross_entropy.nll_loss,
    F.layer_norm: softmax_and_norms.layer_norm,
    F.group_norm: channel_norms.group_norm,
    F.batch_norm: channel_norms.batch_norm,
    F.instance_norm: channel_norms.instance_norm,
    torch.linalg.norm: vector_norms.linalg_norm,
}

# What torch lets overwrite its input.
_OVERWRITING = safe_functions.words("""
sigmoid tanh silu mish selu elu celu rrelu exp2 sinh cosh atanh arctanh logit rsqrt asin acos arcsin
arccos asinh acosh arcsinh arccosh pow float_power addmm addmv baddbmm addbmm
""")


def _collect() -> dict[Form, Form]:
    forms: dict[Form, Form] = {}
    for name, form in _BY_NAME.items():
        forms.update(dict.fromkeys(safe_functions.objects(name), _with_out(name, form)))
    for name in _OVERWRITING:
        write = _with_out(name, overwriting(_BY_NAME[name]))
        forms.update(dict.fromkeys(safe_functions.objects(f"{name}_"), write))
    for name in REPEATING:
        for each in (name, f"{name}_", f"__i{name.strip('_')}__"):
            forms.update(
                {function: _repeating(function) for function in safe_functions.objects(each)}
            )
    forms.update({key: _with_out(key.__name__, form) for key, form in _BY_OBJECT.items()})
    return forms


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
