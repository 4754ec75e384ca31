"""Operations on activations that are cut along their tokens (sequence parallelism).

No bit may depend on this cut. So only operations that round each element by itself compute on a
rank's tokens. All others get the whole activation, as they do without sequence parallelism. A sum
over tokens or a product with a parameter would add in another order, and the bits of torch's
`sigmoid` depend on where an element lies in memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shardproof.cut.fallback import on_opened
from shardproof.cut.module_calls import DROPOUTS, RANDOM, as_called, is_called
from shardproof.cut.own_tokens import token_cut, tokens_of
from shardproof.cut.tensor import CutTensor, Rule, cut_tensor, named, run_as, token_rules
from shardproof.ops.norms import layer_norm, whole_rms_norm
from shardproof.ops.rms_norm import RmsFormula

# Each element is rounded by itself, as IEEE 754 says, or only chosen or copied.
_EXACT = (
    "abs", "absolute", "add", "and", "bfloat16", "bitwise_and", "bitwise_not", "bitwise_or",
    "bitwise_xor", "bool", "byte", "ceil", "char", "clamp", "clamp_max", "clamp_min", "clip",
    "copy", "cpu", "cuda", "div", "divide", "double", "eq", "fill", "float", "floor", "fmax",
    "fmin", "ge", "greater", "greater_equal", "gt", "half", "hardtanh", "int", "invert",
    "isfinite", "isinf", "isnan", "le", "less", "less_equal", "logical_and", "logical_not",
    "logical_or", "logical_xor", "long", "lt", "masked_fill", "maximum", "minimum", "mul",
    "multiply", "ne", "neg", "negative", "not_equal", "or", "pos", "positive", "radd", "rdiv",
    "reciprocal", "relu", "relu6", "rmul", "round", "rsub", "rtruediv", "short", "sign", "sqrt",
    "square", "sub", "subtract", "threshold", "to", "true_divide", "truediv", "trunc", "type",
    "where", "xor", "zero", "_to_copy",
)  # fmt: skip
_REFLECTED = {
    "radd": Tensor.add,
    "rdiv": Tensor.div,
    "rfloordiv": Tensor.floor_divide,
    "rmod": Tensor.remainder,
    "rmul": Tensor.mul,
    "rpow": Tensor.pow,
    "rsub": Tensor.sub,
    "rtruediv": Tensor.div,
}
_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
_COLUMNS = {"linear": 0, "matmul": 1}  # products by columns -> the dim of the weight that is cut
_ON_OWN_TOKENS = frozenset(
    (
        *_EXACT,
        *(f"{name}_" for name in _EXACT),
        *("clone", "contiguous", "detach", "elementwise", "whole", "requires_grad_"),
        *("zeros_like", "ones_like", "empty_like", "full_like", "retain_grad"),
    )
)


def install() -> None:
    """Look for such activations from now on; may be called again."""
    if not token_rules:
        token_rules.append(_rule)


def _rule(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rule | None:
    """The rule of an operation on such activations; None if its usual one serves."""
    tensors = list(_tensors(args, kwargs))
    cut = next((each for each in tensors if tokens_of(each) is not None), None)
    if cut is None or name == "grad":
        return None
    if name in _COLUMNS and _is_column(name, args, kwargs):
        return None
    if name in DROPOUTS or name in RANDOM:
        return None if is_called() else _on_whole
    if name == "layer_norm" and _is_over_features(cut, args, kwargs):
        return _normed
    if not all(_fits(each, cut) for each in tensors):
        return _turned if name in _REFLECTED else _on_whole
    if name == "getitem":
        return None if _is_all(args[1]) else _on_whole
    return None if name in _ON_OWN_TOKENS else _on_whole


def _on_whole(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gather the tokens, and do what is done with whole activations."""
    is_cut_otherwise = any(
        isinstance(each, CutTensor) and tokens_of(each) is None for each in _tensors(args, kwargs)
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_cut_otherwise:
            return run_as(name, func, args, kwargs)
        return as_called(func, args, kwargs)

    return on_opened(call, name, args, kwargs, lambda each: tokens_of(each) is not None)


def _turned(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x + y` of a plain `x` and a cut `y`, which Python hands to `y.__radd__`.

    The operands are put back in the order in which they were written: the first one decides how the
    result lies in memory.
    """
    one, other = args
    return _on_whole(_REFLECTED[name], name[1:], (other, one), kwargs)


def _is_column(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a product has an activation cut along its tokens, and a weight cut by columns."""
    x, weight = named(args, kwargs, "input", "weight" if name == "linear" else "other")
    is_matrix = isinstance(weight, CutTensor) and weight.dim() == 2
    return is_matrix and weight.spec.dim == _COLUMNS[name] and tokens_of(x) is not None


def _is_over_features(cut: CutTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a norm goes over the features, with the arithmetic that `layer_norm` of ours has."""
    x, shape, *parameters, _ = named(args, kwargs, *_LAYER_NORM)
    if x is not cut or any(isinstance(each, CutTensor) for each in parameters):
        return False
    is_ours = is_called() or not cut.spec.region.scheme.is_invariant
    return is_ours and tuple(shape) == (cut.shape[-1],)


def _normed(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CutTensor:
    """`F.layer_norm` over the features of a rank's tokens."""
    x, _, weight, bias, eps = named(args, kwargs, *_LAYER_NORM)
    return layer_normed(x, weight, bias, 1e-5 if eps is None else eps)


def layer_normed(x: CutTensor, weight: Any, bias: Any, eps: float) -> CutTensor:
    """LayerNorm over the features of a rank's tokens.

    Args:
        x: (B, T, n), cut along T.
        weight: (n,), Replicate, or None.
        bias: (n,), Replicate, or None.
        eps: added to the variance.
    """
    tokens = token_cut(x.spec.region, x.spec.cut, x.who)
    return cut_tensor(layer_norm(x.local, weight, bias, eps=eps, tokens=tokens), x.spec, x.who)


def rms_normed(x: CutTensor, weight: Any, formula: RmsFormula) -> CutTensor:
    """RMSNorm over the features of a rank's tokens.

    Args:
        x: (B, T, n), cut along T.
        weight: (n,), Replicate, or None.
        formula: which RMSNorm it is.
    """
    tokens = token_cut(x.spec.region, x.spec.cut, x.who)
    return cut_tensor(whole_rms_norm(x.local, weight, formula, tokens), x.spec, x.who)


def _fits(x: Any, cut: CutTensor) -> bool:
    """Whether an operand leaves shape, strides and gradients as they are without this cut.

    A parameter that broadcasts has a gradient that sums over tokens. Memory in another order than
    that of the shape would give its order to the result, and to later sums.
    """
    if isinstance(x, CutTensor):
        return x.spec is cut.spec
    if x.shape == cut.shape:
        return x.is_contiguous()
    is_smaller = x.dim() <= cut.dim() and all(
        size in (1, of_cut)
        for size, of_cut in zip(reversed(x.shape), reversed(cut.shape), strict=False)
    )
    return is_smaller and not (x.requires_grad and torch.is_grad_enabled())


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
