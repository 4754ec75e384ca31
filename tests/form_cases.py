"""For each function that has a form or holds: how it is called, and where it may be cut."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from calls import Call
from shardproof.numerics.safe_functions import words

Use = Callable[[Callable[..., Any]], Callable[..., Tensor]]


@dataclass(frozen=True)
class Case:
    """A function of torch.

    Attributes:
        torchs: the function, as it arrives in `__torch_function__`.
        use: calls it, or its form, with operands alone.
        call: the operands, without the function.
        breaks: torch's own is expected to break here.
    """

    torchs: Callable[..., Any]
    use: Use
    call: dict[str, Any]
    breaks: bool = False

    def of(self, function: Callable[..., Any]) -> Call:
        """The call of a function with these arguments."""
        return Call(self.use(function), **self.call)


CASES: dict[str, Case] = {}


def _add(name: str, torchs: Any, use: Use | None = None, breaks: bool = False, **call: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(torchs, use or (lambda f: f), call, breaks)


def _positive(x: Tensor) -> Tensor:
    return x.abs() + 0.1


def _within_one(x: Tensor) -> Tensor:
    return x.tanh() * 0.9


def _above_one(x: Tensor) -> Tensor:
    return x.abs() + 1.1


def _classes(x: Tensor) -> Tensor:
    """Targets of (N, C, T), of which a slice is that of the whole's."""
    return (x[:, 0].detach() * 1000).long() % max(x.shape[1], 1)


def _between(x: Tensor) -> Tensor:
    return x.tanh() * 0.4 + 0.5


def _tied(x: Tensor) -> Tensor:
    """Few values, zeros of both signs among them."""
    return (x * 1.5).round()


def _near_one(x: Tensor) -> Tensor:
    return x * 0.1 + 1


_TWO = {"operands": "abc abc"}

for (
    _name
) in words("""abs ceil cos deg2rad erf erfc exp expm1 floor frac i0 nan_to_num neg positive rad2deg
    relu round sgn sign sin sinc square tan atan trunc"""):
    _add(_name, getattr(torch, _name))
for _name in words("digamma lgamma log log10 log1p log2 reciprocal sqrt"):
    _add(_name, getattr(torch, _name), make=_positive)
_add("erfinv", torch.erfinv, make=_within_one)
_add("clamp", torch.clamp, lambda f: lambda x: f(x, -0.5, 0.7), make=_tied)
_add("clamp_min", torch.clamp_min, lambda f: lambda x: f(x, 0.1))
_add("clamp_max", torch.clamp_max, lambda f: lambda x: f(x, 0.1))
_add("F.hardsigmoid", F.hardsigmoid, order=1)
for _name in words("""relu6 hardtanh hardswish hardshrink leaky_relu logsigmoid softsign
    tanhshrink"""):
    _add(f"F.{_name}", getattr(F, _name))
_add("F.threshold", F.threshold, lambda f: lambda x: f(x, 0.1, 0.2))
_add("exp_", torch.Tensor.exp_, lambda f: lambda x: f(x * 1.0))
_add("relu_", torch.relu_, lambda f: lambda x: f(x * 1.0))

for _name in words("silu mish elu selu celu softplus softshrink"):
    _add(f"F.{_name}", getattr(F, _name), breaks=True)
_add("F.silu inplace", F.silu, lambda f: lambda x: f(x * 1.0, True), breaks=True)
_add("F.elu inplace", F.elu, lambda f: lambda x: f(x * 1.0, 0.7, inplace=True), breaks=True)
_add("F.elu_", F.elu_, lambda f: lambda x: f(x * 1.0), breaks=True)
_add("F.gelu", F.gelu, breaks=True)
_add("F.gelu tanh", F.gelu, lambda f: lambda x: f(x, approximate="tanh"), breaks=True)
_add("sigmoid", torch.sigmoid, breaks=True)
_add("sigmoid_", torch.Tensor.sigmoid_, lambda f: lambda x: f(x * 1.0), breaks=True)
_add("tanh", torch.tanh)
_add("F.rrelu", F.rrelu)
_add("F.glu", F.glu, lambda f: lambda x, y: f(torch.cat([x, y], 1), 1), breaks=True, **_TWO)
_add("F.prelu", F.prelu, operands="abc b", breaks=True)
_add("F.prelu one", F.prelu, lambda f: lambda x: f(x, torch.full((1,), 0.3, dtype=x.dtype)))

for _name in words("exp2 sinh cosh"):
    _add(_name, getattr(torch, _name), breaks=True)
_add("atanh", torch.atanh, make=_within_one, breaks=True)
_add("logit", torch.logit, make=_between, breaks=True)
_add("logit eps", torch.logit, lambda f: lambda x: f(x, 1e-3), make=_between, breaks=True)
_add("rsqrt", torch.rsqrt, make=_positive)
_add("asin", torch.asin, make=_within_one)
_add("acos", torch.acos, make=_within_one)
_add("asinh", torch.asinh)
_add("acosh", torch.acosh, make=_above_one)
for _power in (0, 1, 2, 3, 4, 7, 0.5, -0.5, -1, -2, 2.5, 17, -0.3):
    _add(f"pow {_power}", torch.pow, lambda f, p=_power: lambda x: f(x, p), make=_positive,
         breaks=_power in (4, 2.5, -0.3))  # fmt: skip
_add("__pow__", torch.Tensor.__pow__, lambda f: lambda x: f(x, 1.5), make=_positive, breaks=True)
_add("__rpow__", torch.Tensor.__rpow__, lambda f: lambda x: f(x, 2.5), breaks=True)
_add("pow of tensors", torch.pow, make=_positive, breaks=True, **_TWO)
_add("pow broadcast", torch.pow, operands="abc c", make=_positive, breaks=True)
_add("float_power", torch.float_power, lambda f: lambda x: f(x, 1.7).to(x.dtype), make=_positive)
_add("logaddexp", torch.logaddexp, breaks=True, **_TWO)
_add("maximum", torch.maximum, make=_tied, **_TWO)
_add("minimum", torch.minimum, make=_tied, **_TWO)
_add("max of two", torch.max, make=_tied, **_TWO)

for _name in words("add sub mul fmod remainder copysign"):
    _add(f"{_name} same", getattr(torch, _name), make=_positive, **_TWO)
_add("fmax same", torch.fmax, **_TWO)
_add("fmin same", torch.fmin, **_TWO)
_add("add alpha", torch.add, lambda f: lambda a, b: f(a, b, alpha=0.3), **_TWO)
_add("add_ alpha", torch.Tensor.add_, lambda f: lambda a, b: f(a * 1.0, b, alpha=0.3), **_TWO)
for _name in words("add sub mul div"):
    _add(f"{_name} rows", getattr(torch, _name), operands="abc c", make=_positive)
    _add(f"{_name} columns", getattr(torch, _name), lambda f: lambda x, w: f(x, w[:, None]),
         operands="abc b", make=_positive)  # fmt: skip
    _add(f"{_name} reversed", getattr(torch, _name), lambda f: lambda w, x: f(w, x),
         operands="c abc", make=_positive)  # fmt: skip
_add("mul number", torch.mul, lambda f: lambda x: f(x, 2.5))
_add("div number", torch.div, lambda f: lambda x: f(x, 2.5))
_add("mul_ rows", torch.Tensor.mul_, lambda f: lambda x, w: f(x * 1.0, w), operands="abc c")
_add("__rsub__", torch.Tensor.__rsub__, lambda f: lambda x: f(x, 1))
_add("__rdiv__", torch.Tensor.__rdiv__, lambda f: lambda x: f(x, 2.5), make=_positive)
_add("lerp rows", torch.lerp, lambda f: lambda a, b: f(a, b, 0.3), operands="abc c")
_add("addcmul rows", torch.addcmul, lambda f: lambda a, b, c: f(a, b, c, value=0.3),
     operands="abc c abc")  # fmt: skip
_add("addcdiv", torch.addcdiv, operands="abc abc c", make=_positive)
_add("where", torch.where, lambda f: lambda a, b: f(a > 0.1, a, b), operands="abc c")
_add("masked_fill", torch.Tensor.masked_fill,
     lambda f: lambda a, b: f(a, b > 0, 1.5), operands="c abc", frozen=1)  # fmt: skip
_add("expand", torch.Tensor.expand, lambda f: lambda x: f(x[:, None], -1, 301, -1), operands="ac",
     result="a1c", cut="ac", many=300)  # fmt: skip
_add("expand_as", torch.Tensor.expand_as, operands="c abc", frozen=1)
_add("broadcast_to", torch.broadcast_to, lambda f: lambda x: f(x, (7, *x.shape)), operands="bc",
     result="1bc", cut="bc")  # fmt: skip
_add("broadcast_tensors", torch.broadcast_tensors, lambda f: lambda x, y: f(x, y)[0] * y,
     operands="c abc")  # fmt: skip
_add("repeat", torch.Tensor.repeat, lambda f: lambda x: f(x, 5, 3, 1)[:, 1:2], operands="bc",
     result="11c", cut="c")  # fmt: skip
_add("tile", torch.tile, lambda f: lambda x: f(x, (3, 1)), result="a1c", cut="ac")
_add("repeat_interleave", torch.repeat_interleave, lambda f: lambda x: f(x, 9, 1), result="a1c",
     cut="ac")  # fmt: skip

for _dim in range(3):
    _left = "abc".replace("abc"[_dim], "")
    _over = {"result": _left, "cut": _left}
    for _name in words("sum mean logsumexp"):
        _add(f"{_name} {_dim}", getattr(torch, _name), lambda f, d=_dim: lambda x: f(x, d), **_over)
    for _name in words("amax amin"):
        _add(f"{_name} {_dim}", getattr(torch, _name), lambda f, d=_dim: lambda x: f(x, d),
             make=_tied, **_over)  # fmt: skip
    for _name in words("max min"):
        _add(f"{_name} {_dim}", getattr(torch, _name), lambda f, d=_dim: lambda x: f(x, d)[0],
             make=_tied, **_over)  # fmt: skip
    _add(f"prod {_dim}", torch.prod, lambda f, d=_dim: lambda x: f(x, d), make=_near_one, order=1,
         **_over)  # fmt: skip
    _add(f"var {_dim}", torch.var, lambda f, d=_dim: lambda x: f(x, d, False), **_over)
    _add(f"std {_dim}", torch.std, lambda f, d=_dim: lambda x: f(x, d, correction=0), **_over)
    _add(f"vector_norm {_dim}", torch.linalg.vector_norm,
         lambda f, d=_dim: lambda x: f(x, 2, d), **_over)  # fmt: skip
    for _name, _function in {"softmax": F.softmax, "log_softmax": F.log_softmax}.items():
        _add(f"{_name} {_dim}", _function, lambda f, d=_dim: lambda x: f(x, d), cut=_left)
    _add(f"normalize {_dim}", F.normalize, lambda f, d=_dim: lambda x: f(x, dim=d), cut=_left)
    for _name in words("cumsum logcumsumexp"):
        _add(f"{_name} {_dim}", getattr(torch, _name), lambda f, d=_dim: lambda x: f(x, d),
             cut=_left)  # fmt: skip
    _add(f"cumprod {_dim}", torch.cumprod, lambda f, d=_dim: lambda x: f(x, d), make=_near_one,
         cut=_left)  # fmt: skip
    for _name in words("cummax cummin sort"):
        _add(f"{_name} {_dim}", getattr(torch, _name), lambda f, d=_dim: lambda x: f(x, d)[0],
             cut=_left)  # fmt: skip

_LAST = {"result": "ab", "cut": "ab"}
_add("sum of two dims", torch.sum, lambda f: lambda x: f(x, (0, 2)), result="b", cut="b")
_add("mean keepdim", torch.mean, lambda f: lambda x: f(x, (1,), True), result="a1c", cut="ac")
_add("var_mean", torch.var_mean, lambda f: lambda x: torch.stack(f(x, -1, correction=0)).sum(0),
     **_LAST)  # fmt: skip
_add("std_mean", torch.std_mean, lambda f: lambda x: f(x, -1, correction=0)[0], **_LAST)
_add("nansum", torch.nansum, lambda f: lambda x: f(x, -1), **_LAST)
_add("torch.softmax", torch.softmax, lambda f: lambda x: f(x, -1), cut="ab")
_add("torch.log_softmax", torch.log_softmax, lambda f: lambda x: f(x, -1), cut="ab")
_add("softmax to fp32", torch.softmax,
     lambda f: lambda x: f(x, -1, torch.float64).to(x.dtype), cut="ab")  # fmt: skip
_add("softmin", F.softmin, lambda f: lambda x: f(x, -1), cut="ab")
_add("norm", torch.norm, lambda f: lambda x: f(x, dim=-1), **_LAST)
_add("Tensor.norm", torch.Tensor.norm, lambda f: lambda x: f(x, 1, -1), **_LAST)
_add("linalg.norm", torch.linalg.norm, lambda f: lambda x: f(x, None, -1), **_LAST)
_add("vector_norm 3", torch.linalg.vector_norm, lambda f: lambda x: f(x, 3, -1), **_LAST)
_add("vector_norm inf", torch.linalg.vector_norm, lambda f: lambda x: f(x, float("inf"), -1),
     **_LAST)  # fmt: skip
_add("cosine_similarity", F.cosine_similarity, lambda f: lambda x, y: f(x, y, -1),
     operands="abc abc", **_LAST)  # fmt: skip
_add("pairwise_distance", F.pairwise_distance, operands="abc abc", **_LAST)
_add("layer_norm", F.layer_norm, lambda f: lambda x, w, b: f(x, x.shape[-1:], w, b),
     operands="abc c c", cut="ab")  # fmt: skip
_add("layer_norm of two dims", F.layer_norm, lambda f: lambda x: f(x, x.shape[-2:]), cut="a")
_add("torch.layer_norm", torch.layer_norm, lambda f: lambda x: f(x, x.shape[-1:]), cut="ab")
_add("rms_norm", F.rms_norm, lambda f: lambda x, w: f(x, x.shape[-1:], w, 1e-6), operands="abc c",
     cut="ab")  # fmt: skip
_add("group_norm", F.group_norm, lambda f: lambda x, w, b: f(x, x.shape[1], w, b),
     operands="abc b b", cut="ab")  # fmt: skip
_add("instance_norm", F.instance_norm, lambda f: lambda x, w: f(x, weight=w), operands="abc b",
     cut="ab")  # fmt: skip
_add("batch_norm", F.batch_norm,
     lambda f: lambda x, w, b, m, v: f(x, m, v.abs() + 1, w, b), operands="abc b b b b",
     frozen=2)  # fmt: skip
_add("batch_norm in training", F.batch_norm,
     lambda f: lambda x, w, b: f(x, None, None, w, b, True), operands="abc b b",
     cut="b", fixed={"c": 5})  # fmt: skip

_add("matmul", torch.matmul, operands="abmk abkn", result="abmn", cut="abmn", many=3_001)
_add("matmul broadcast", torch.matmul, operands="bmk abkn", result="abmn", cut="amn", many=3_001)
_add("matmul by a matrix", torch.matmul, operands="bmk kn", result="bmn", cut="bmn")
_add("matmul of a matrix", torch.matmul, operands="mk bkn", result="bmn", cut="bmn")
_add("bmm", torch.bmm, operands="bmk bkn", result="bmn", cut="bmn")
_add("mm", torch.mm, operands="mk kn", result="mn", cut="mn")
_add("mv", torch.mv, operands="mk k", result="m", cut="m")
_add("F.linear", F.linear, operands="bmk nk n", result="bmn", cut="bmn")
_add("addmm", torch.addmm, lambda f: lambda c, a, b: f(c, a, b, beta=0.5, alpha=2.0),
     operands="n mk kn", result="mn", cut="mn")  # fmt: skip
_add("baddbmm", torch.baddbmm, operands="bmn bmk bkn", result="bmn", cut="bmn")
_add("outer", torch.outer, operands="m n", result="mn", cut="mn", many=600)
_add("inner", torch.inner, operands="mk nk", result="mn", cut="mn")
_add("tensordot", torch.tensordot, lambda f: lambda a, b: f(a, b, ([1, 2], [0, 1])),
     operands="mkl kln", result="mn", cut="mn")  # fmt: skip
_add("vecdot", torch.linalg.vecdot, operands="mk mk", result="m", cut="m")
for _equation in ("bthd,bshd->bhts", "bhts,bshd->bthd", "btd,df->btf", "bthk,hkd->btd",
                  "bld,bln->bldn", "bhd,hdf->bhf"):  # fmt: skip
    _left, _right, _out = _equation.replace("->", ",").split(",")
    _add(f"einsum {_equation}", torch.einsum, lambda f, e=_equation: lambda x, y: f(e, x, y),
         operands=f"{_left} {_right}", result=_out, cut=_out, many=3_001)  # fmt: skip
_add("conv1d", F.conv1d, lambda f: lambda x, w, b: f(x, w, b, padding=2), operands="nct dck d",
     result="nd1", cut="nd", fixed={"k": 5, "t": 37}, many=1_001, order=1)  # fmt: skip
_add("conv1d depthwise", F.conv1d,
     lambda f: lambda x, w, b: f(x, w[:, None], b, padding=3, groups=x.shape[1]),
     operands="nct ck c", result="nc1", cut="nc", fixed={"k": 4, "t": 37}, order=1)  # fmt: skip
_add("conv2d", F.conv2d, lambda f: lambda x, w: f(x, w, stride=2, dilation=(1, 2)),
     operands="nctu dckl", result="nd11", cut="nd",
     fixed={"k": 2, "l": 3, "t": 9, "u": 11, "c": 3}, many=1_001, order=1)  # fmt: skip
_add("conv2d of patches", F.conv2d, lambda f: lambda x, w: f(x, w, stride=4),
     operands="nctu dckl", result="nd11", cut="nd",
     fixed={"k": 4, "l": 4, "t": 16, "u": 12, "c": 3}, many=1_001, order=1)  # fmt: skip
_add("conv3d", F.conv3d, operands="nctuv dcklm", result="nd111", cut="nd", many=1_001, order=1,
     fixed={"k": 2, "l": 2, "m": 2, "t": 3, "u": 4, "v": 5, "c": 2})  # fmt: skip
_add("cross_entropy", F.cross_entropy,
     lambda f: lambda x, w: f(x, _classes(x), w, reduction="none", label_smoothing=0.1),
     operands="nct c", result="nt", cut="nt", frozen=1)  # fmt: skip
_add("cross_entropy of probabilities", F.cross_entropy,
     lambda f: lambda x, y: f(x, y.softmax(1).detach(), reduction="none"),
     operands="nct nct", result="nt", cut="nt", frozen=1)  # fmt: skip
_add("nll_loss", F.nll_loss, lambda f: lambda x: f(x, _classes(x), reduction="none"),
     operands="nct", result="nt", cut="nt")  # fmt: skip
for _kind in ("avg", "max"):
    # Torch refuses to find the maximum of no channels: `cut.lines.spatial` does not ask it to.
    _options: dict[str, Any] = {"cut": "nc"}
    _some = {} if _kind == "avg" else {"c": 5}
    _of = torch._C._nn if _kind == "avg" else torch
    _add(f"{_kind}_pool1d", getattr(F, f"{_kind}_pool1d"), lambda f: lambda x: f(x, 3, 2, 1),
         operands="nct", result="nc1", fixed={"t": 7} | _some, **_options)  # fmt: skip
    _add(f"{_kind}_pool1d of wide windows", getattr(F, f"{_kind}_pool1d"),
         lambda f: lambda x: f(x, 61, 20, 7), operands="nct", result="nc1",
         fixed={"t": 101} | _some, **_options)  # fmt: skip
    _add(f"{_kind}_pool2d", getattr(_of, f"{_kind}_pool2d"),
         lambda f: lambda x: f(x, (3, 2), 2, 1, ceil_mode=True),
         operands="nctu", result="nc11", fixed={"t": 5, "u": 8} | _some, **_options)  # fmt: skip
    _add(f"{_kind}_pool3d", getattr(_of, f"{_kind}_pool3d"), lambda f: lambda x: f(x, 2),
         operands="nctuv", result="nc111", fixed={"t": 3, "u": 4, "v": 2} | _some,
         **_options)  # fmt: skip
    _add(f"adaptive_{_kind}_pool1d",
         getattr(torch if _kind == "avg" else F, f"adaptive_{_kind}_pool1d"),
         lambda f: lambda x: f(x, 3), operands="nct", result="nc1",
         fixed={"t": 37} | _some, **_options)  # fmt: skip
    _add(f"adaptive_{_kind}_pool2d", getattr(F, f"adaptive_{_kind}_pool2d"),
         lambda f: lambda x: f(x, (1, 1)), operands="nctu", result="nc11",
         fixed={"t": 9, "u": 7} | _some, **_options)  # fmt: skip
    _add(f"adaptive_{_kind}_pool3d", getattr(F, f"adaptive_{_kind}_pool3d"),
         lambda f: lambda x: f(x, (2, None, 3)), operands="nctuv", result="nc111",
         fixed={"t": 3, "u": 2, "v": 6} | _some, **_options)  # fmt: skip
_HEADS = {"operands": "bhtd bhsd bhse", "result": "bhte", "many": 401, "order": 1}
_add("sdpa", F.scaled_dot_product_attention, cut="bht", **_HEADS)
_add("sdpa causal", F.scaled_dot_product_attention,
     lambda f: lambda q, k, v: f(q, k, v, is_causal=True), cut="bh", **_HEADS)  # fmt: skip
_add("sdpa with a bias", F.scaled_dot_product_attention,
     lambda f: lambda q, k, v, m: f(q, k, v, m, scale=0.3),
     **_HEADS | {"operands": "bhtd bhsd bhse hts", "cut": "ht"})  # fmt: skip
_add("sdpa shared", F.scaled_dot_product_attention,
     lambda f: lambda q, k, v: f(q.flatten(1, 2), k, v, enable_gqa=True),
     **_HEADS | {"operands": "bhgtd bhsd bhse", "result": "b1te", "cut": "bt"})  # fmt: skip

_MANY = torch.tensor([0, 0, 1, 0, 1] * 40)
_add("index_select", torch.index_select, lambda f: lambda x: f(x, 1, _MANY), result="a1c",
     cut="ac", fixed={"b": 2})  # fmt: skip
_add("embedding", F.embedding, lambda f: lambda x: f(_MANY, x), operands="bc", result="1c",
     cut="c", fixed={"b": 2})  # fmt: skip

_ITEM = torch.Tensor.__getitem__
_ROW, _COLUMN = torch.tensor([0, 1, 1, -1, 1]), torch.tensor([[2], [0]])
_add("item of rows", _ITEM, lambda f: lambda x: f(x, _ROW), result="1bc", cut="bc", fixed={"a": 2})
_add("item of columns", _ITEM, lambda f: lambda x: f(x, (..., _ROW, slice(1, None))),
     result="a11", cut="a", fixed={"b": 2, "c": 4})  # fmt: skip
_add("item of two dims", _ITEM, lambda f: lambda x: f(x, (slice(None), _ROW, _COLUMN)),
     result="a11", cut="a", fixed={"b": 2, "c": 3})  # fmt: skip
_add("item apart", _ITEM, lambda f: lambda x: f(x, (_ROW, slice(None), None, [0, 1, 1, 1, 0])),
     result="1b1", cut="b", fixed={"a": 2, "c": 3})  # fmt: skip
_add("item of a mask", _ITEM, lambda f: lambda x: f(x, (slice(None), _ROW > 0)), result="a1c",
     cut="ac", fixed={"b": 5})  # fmt: skip
_add("item and number", _ITEM, lambda f: lambda x: f(x, (1, slice(None), _ROW)), result="b1",
     cut="b", fixed={"a": 2, "c": 3})  # fmt: skip

_FIVE = torch.tensor([0, 0, 1, 3, 1])
_add("index_add", torch.index_add, lambda f: lambda x, y: f(x, 1, _FIVE.to(x.device), y), cut="ac",
     operands="abc adc", fixed={"b": 4, "d": 5})  # fmt: skip
_add("scatter_add", torch.scatter_add,
     lambda f: lambda x, y: f(x, 1, _FIVE[None, :, None].expand(y.shape), y), cut="ac",
     operands="abc adc", fixed={"b": 4, "d": 5})  # fmt: skip
_add("gather", torch.gather,
     lambda f: lambda x: f(x, 1, _FIVE[None, :, None].expand(x.shape[0], -1, x.shape[2])),
     result="a1c", cut="ac", fixed={"b": 4})  # fmt: skip
_add("topk", torch.topk, lambda f: lambda x: f(x, 2, 1)[0], result="a1c", cut="ac", fixed={"b": 4})
_add("kthvalue", torch.kthvalue, lambda f: lambda x: f(x, 2, 1)[0], result="ac", cut="ac",
     fixed={"b": 4})  # fmt: skip
_add("diff", torch.diff, lambda f: lambda x: f(x, dim=1), result="a1c", cut="ac", fixed={"b": 4})

_MOVES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "clone": (lambda f, x: f(x), {}),
    "contiguous": (lambda f, x: f(x), {}),
    "detach": (lambda f, x: f(x), {"order": 0}),
    "view_as": (lambda f, x: f(x.contiguous(), x), {}),
    "reshape_as": (lambda f, x: f(x, x), {}),
    "reshape": (lambda f, x: f(x, x.shape), {}),
    "view": (lambda f, x: f(x.contiguous(), x.shape), {}),
    "to": (lambda f, x: f(f(x, torch.float64), x.dtype), {}),
    "type": (lambda f, x: f(x, x.dtype), {}),
    "type_as": (lambda f, x: f(x, x), {}),
    "float": (lambda f, x: f(x).to(x.dtype), {}),
    "double": (lambda f, x: f(x).to(x.dtype), {}),
    "half": (lambda f, x: f(x).to(x.dtype), {}),
    "bfloat16": (lambda f, x: f(x).to(x.dtype), {}),
    "flatten": (lambda f, x: f(x, 1), {"result": "a1", "cut": "a"}),
    "ravel": (lambda f, x: f(x[:, 0, 0]), {"result": "a", "cut": "a", "fixed": {"b": 2, "c": 2}}),
    "unflatten": (lambda f, x: f(x, 1, (2, 2)), {"result": "a11c", "cut": "ac", "fixed": {"b": 4}}),
    "squeeze": (lambda f, x: f(x[:, None], 1), {}),
    "unsqueeze": (lambda f, x: f(x, 0), {"result": "1abc"}),
    "transpose": (lambda f, x: f(x, 0, 1), {"result": "bac"}),
    "swapaxes": (lambda f, x: f(x, 0, 1), {"result": "bac"}),
    "swapdims": (lambda f, x: f(x, 0, 1), {"result": "bac"}),
    "permute": (lambda f, x: f(x, (2, 0, 1)), {"result": "cab"}),
    "movedim": (lambda f, x: f(x, 0, 2), {"result": "bca"}),
    "moveaxis": (lambda f, x: f(x, 0, 2), {"result": "bca"}),
    "t": (lambda f, x: f(x[0]), {"result": "cb", "cut": "bc", "fixed": {"a": 1}}),
    "adjoint": (lambda f, x: f(x), {"result": "acb"}),
    "narrow": (lambda f, x: f(x, 1, 1, 2), {"result": "a1c", "cut": "ac", "fixed": {"b": 4}}),
    "select": (lambda f, x: f(x, 1, 1), {"result": "ac", "cut": "ac", "fixed": {"b": 4}}),
    "split": (lambda f, x: f(x, 2, 1)[1], {"result": "a1c", "cut": "ac", "fixed": {"b": 4}}),
    "split_with_sizes": (
        lambda f, x: f(x, [1, 3], 1)[1],
        {"result": "a1c", "cut": "ac", "fixed": {"b": 4}},
    ),
    "chunk": (lambda f, x: f(x, 2, 1)[1], {"result": "a1c", "cut": "ac", "fixed": {"b": 4}}),
    "tensor_split": (lambda f, x: f(x, 2, 1)[1], {"result": "a1c", "cut": "ac", "fixed": {"b": 4}}),
    "unbind": (lambda f, x: f(x, 1)[1], {"result": "ac", "cut": "ac", "fixed": {"b": 4}}),
    "cat": (lambda f, x: f([x, x], 1), {"result": "a1c", "cut": "ac"}),
    "concat": (lambda f, x: f([x, x], 1), {"result": "a1c", "cut": "ac"}),
    "concatenate": (lambda f, x: f([x, x], 1), {"result": "a1c", "cut": "ac"}),
    "stack": (lambda f, x: f([x, x], 1), {"result": "a1bc"}),
    "hstack": (lambda f, x: f([x, x]), {"result": "a1c", "cut": "ac"}),
    "vstack": (lambda f, x: f([x, x]), {"result": "1bc", "cut": "bc"}),
    "flip": (lambda f, x: f(x, (1,)), {"cut": "ac"}),
    "fliplr": (lambda f, x: f(x), {"cut": "ac"}),
    "flipud": (lambda f, x: f(x), {"cut": "bc"}),
    "roll": (lambda f, x: f(x, 2, 1), {"cut": "ac"}),
    "rot90": (lambda f, x: f(x, 1, (1, 2)), {"result": "a11", "cut": "a"}),
    "tril": (lambda f, x: f(x), {"cut": "a"}),
    "triu": (lambda f, x: f(x), {"cut": "a"}),
    "diagonal": (lambda f, x: f(x, 0, 1, 2), {"result": "a1", "cut": "a"}),
    "diag_embed": (lambda f, x: f(x), {"result": "ab11", "cut": "ab"}),
    "pad": (lambda f, x: f(x, (1, 2)), {"result": "ab1", "cut": "ab"}),
    "unfold": (lambda f, x: f(x, 1, 3, 1), {"result": "a1c1", "cut": "ac", "fixed": {"b": 7}}),
}
for _name, (_use, _call) in _MOVES.items():
    for _place in (torch.Tensor, torch, F):
        if hasattr(_place, _name):
            _add(_name, getattr(_place, _name), lambda f, u=_use: lambda x: u(f, x), **_call)
            break

_TRUTHS = {"order": 0}
for _name in words("eq ne lt le gt ge logical_and logical_or logical_xor floor_divide isclose"):
    _add(_name, getattr(torch, _name), make=_tied, **_TRUTHS, **_TWO)
for _name in words("isnan isinf isfinite isposinf isneginf signbit logical_not"):
    _add(_name, getattr(torch, _name), **_TRUTHS)
for _name in words("argmax argmin any all count_nonzero"):
    _add(_name, getattr(torch, _name), lambda f: lambda x: f(x, 1), make=_tied, result="ac",
         cut="ac", fixed={"b": 9}, **_TRUTHS)  # fmt: skip
_add("argsort", torch.argsort, lambda f: lambda x: f(x, 1), make=_tied, cut="ac",
     **_TRUTHS)  # fmt: skip
for _name in words("bitwise_and bitwise_or bitwise_xor"):
    _add(_name, getattr(torch, _name), lambda f: lambda a, b: f(a > 0, b > 0), **_TRUTHS, **_TWO)
_add("bitwise_not", torch.bitwise_not, lambda f: lambda a: f(a > 0), **_TRUTHS)
for _name in words("zeros_like ones_like"):
    _add(_name, getattr(torch, _name), **_TRUTHS)
_add("full_like", torch.full_like, lambda f: lambda x: f(x, 3), **_TRUTHS)
_add("one_hot", F.one_hot, lambda f: lambda x: f((x > 0).long(), 2), result="abc1", **_TRUTHS)
