"""Modules for the invariant activations, and what is known of every activation of torch.

Every class of `torch.nn.modules.activation`, and every activation of Hugging Face transformers, is
in exactly one of four tables: `HOLDS` (torch's function keeps its bits under any cut), the
replacements (`_REPLACEMENTS` and `_NAMED`), `REFUSED` (no replacement exists), `NOT_ELEMENTWISE`
(an output depends on several elements, so only a whole tensor works).
tests/test_activations.py goes over the classes of the installed torch and transformers, tries each,
and fails where one is in no place or in two.

Activations of transformers are known by the names of their classes, and tried: a class of that name
that computes something else has no replacement.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.layers.norm import norm_replacement
from shardproof.numerics import elementwise, piecewise
from shardproof.numerics.elementwise import Approximate
from shardproof.numerics.precision import widen


class Tanh(nn.Module):
    """Hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return elementwise.tanh(x)


class Sigmoid(nn.Module):
    """1 / (1 + exp(-x))."""

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return elementwise.sigmoid(x)


class SiLU(nn.Module):
    """`x * sigmoid(x)`."""

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return elementwise.silu(x)


class GELU(nn.Module):
    """`x * P(Z <= x)` for a standard normal Z, or its tanh approximation.

    Attributes:
        approximate: "none" or "tanh".
    """

    def __init__(self, approximate: Approximate = "none") -> None:
        super().__init__()
        self.approximate: Approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return elementwise.gelu(x, self.approximate)

    def extra_repr(self) -> str:
        """The options."""
        return f"approximate={self.approximate!r}"


class Softplus(nn.Module):
    """log(1 + exp(beta x)) / beta.

    Attributes:
        beta: how sharp the bend is.
        threshold: of beta x, where the function goes over into the identity.
    """

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        super().__init__()
        self.beta = beta
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return elementwise.softplus(x, self.beta, self.threshold)

    def extra_repr(self) -> str:
        """The options."""
        return f"beta={self.beta}, threshold={self.threshold}"


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, an approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        wide = widen(x)
        return (wide * elementwise.sigmoid(wide * 1.702)).to(x.dtype)


class ClippedGELU(nn.Module):
    """GELU, held between two bounds (Wu et al., arXiv 2004.09602).

    Attributes:
        min: the lower bound.
        max: the upper bound.
    """

    def __init__(self, min: float, max: float) -> None:
        super().__init__()
        self.min = min
        self.max = max

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return torch.clip(elementwise.gelu(x), self.min, self.max)

    def extra_repr(self) -> str:
        """The options."""
        return f"min={self.min}, max={self.max}"


class SqrtSoftplus(nn.Module):
    """Square root of softplus, which scores the experts of a router."""

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return elementwise.softplus(widen(x)).sqrt().to(x.dtype)


class Mish(nn.Module):
    """`x * tanh(softplus(x))` (Misra 2019, arXiv 1908.08681)."""

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return piecewise.mish(x)


class ELU(nn.Module):
    """`x` above zero, `alpha * (exp(x) - 1)` below.

    Attributes:
        alpha: the bound below is `-alpha`.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return piecewise.elu(x, self.alpha)

    def extra_repr(self) -> str:
        """The options."""
        return f"alpha={self.alpha}"


class CELU(ELU):
    """`x` above zero, `alpha * (exp(x / alpha) - 1)` below; options as of `ELU`."""

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return piecewise.celu(x, self.alpha)


class SELU(nn.Module):
    """A scaled ELU that keeps mean 0 and variance 1 (Klambauer et al., arXiv 1706.02515)."""

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return piecewise.selu(x)


class Softshrink(nn.Module):
    """`x` moved towards zero by `lambd`, and zero where it would pass it.

    Attributes:
        lambd: by how much.
    """

    def __init__(self, lambd: float = 0.5) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        return piecewise.softshrink(x, self.lambd)

    def extra_repr(self) -> str:
        """The options."""
        return f"lambd={self.lambd}"


def invariant_replacement(module: nn.Module) -> nn.Module | None:
    """Our module that computes what an activation or a norm computes, or None if there is none.

    It knows the activations of torch and of transformers, and norms over one dim
    (`norm_replacement`). The replacement of a norm has the same parameter objects. The result is
    None for a subclass, which may compute something else. It is None for `inplace=True`: a
    replacement does not overwrite its input, and a caller may rely on that.

    Args:
        module: any module.
    """
    make = _REPLACEMENTS.get(type(module))
    if make is not None:
        return None if getattr(module, "inplace", False) else make(module).train(module.training)
    factory = _NAMED.get(type(module).__name__)
    if factory is not None:
        replacement = factory(module)
        return (
            replacement.train(module.training) if _computes_the_same(module, replacement) else None
        )
    return norm_replacement(module)


def why_refused(module: nn.Module) -> str | None:
    """Why an activation cannot stay in a cut model and nothing of ours can replace it, or None.

    Args:
        module: any module.
    Returns:
        What it is, why it is refused and the way out, to be put behind the name of the module.
    """
    kind = _kind_of(module)
    if isinstance(module, nn.RReLU) and kind is nn.RReLU and module.lower < module.upper:
        return (
            f"is {type(module).__name__}(lower={module.lower:.4g}, upper={module.upper:.4g}): "
            f"{REFUSED[nn.RReLU]}. Use nn.LeakyReLU({(module.lower + module.upper) / 2:.4g}), "
            "which is what it computes in evaluation."
        )
    if kind not in _REPLACEMENTS:
        return None
    if getattr(module, "inplace", False):
        return (
            f"is {type(module).__name__}(inplace=True): its bits change with the cut, and the one "
            f"that would replace it does not overwrite its input. Use nn.{kind.__name__}()."
        )
    if type(module) is not kind:
        return (
            f"is {type(module).__name__}, which computes with the forward of nn.{kind.__name__}: "
            "its bits change with the cut, and a class of your own is not replaced. Use "
            f"nn.{kind.__name__}, or give your class a forward that calls "
            f"shardproof.functional.{kind.__name__.lower()}."
        )
    return None


def _kind_of(module: nn.Module) -> Any:
    """The class of torch whose forward a module has: its own, or that of the class it extends."""
    own: Any = type(module)
    for kind in own.__mro__:
        if kind in _REPLACEMENTS or kind in REFUSED:
            return kind if own.forward is kind.forward else own
    return own


@torch.no_grad()
def _computes_the_same(module: nn.Module, replacement: nn.Module) -> bool:
    """Try both, without the hooks that `module` may have."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return False
    forward: Any = module.forward
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        x = torch.linspace(-12, 12, 1001, dtype=dtype, device="cpu")
        y = forward(x)
        if not isinstance(y, Tensor) or y.dtype != dtype or y.shape != x.shape:
            return False
        if not torch.allclose(y, replacement(x), rtol=tolerance, atol=tolerance):
            return False
    return True


def _clipped_gelu(module: Any) -> nn.Module:
    low, high = getattr(module, "min", 0.0), getattr(module, "max", 0.0)
    return ClippedGELU(low, high)


# Torch's own has the same bits in the whole and in any part of it, forward and backward, for they
# compare, pick and calculate, or call a function that holds (log_sigmoid, tanh).
HOLDS: tuple[type[nn.Module], ...] = (
    nn.Threshold,
    nn.ReLU,
    nn.Hardtanh,
    nn.ReLU6,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardshrink,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Softsign,
    nn.Tanhshrink,
)

_REPLACEMENTS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Tanh: lambda _: Tanh(),
    nn.Sigmoid: lambda _: Sigmoid(),
    nn.SiLU: lambda _: SiLU(),
    nn.Mish: lambda _: Mish(),
    nn.GELU: lambda module: GELU(module.approximate),
    nn.Softplus: lambda module: Softplus(module.beta, module.threshold),
    nn.ELU: lambda module: ELU(module.alpha),
    nn.CELU: lambda module: CELU(module.alpha),
    nn.SELU: lambda _: SELU(),
    nn.Softshrink: lambda module: Softshrink(module.lambd),
}
REPLACED: tuple[type[nn.Module], ...] = tuple(_REPLACEMENTS)

REFUSED: Mapping[type[nn.Module], str] = {
    nn.RReLU: "in training it draws a slope for every element from the global generator, so that "
    "ranks would hold different activations where they must be the same",
}

# What each depends on beyond the element: right where the tensor is whole (gather_output=True), and
# not between a column and a row.
NOT_ELEMENTWISE: Mapping[type[nn.Module], str] = {
    nn.GLU: "takes the two halves of a dim, which a cut moves",
    nn.Softmax: "sums over a dim",
    nn.Softmin: "sums over a dim",
    nn.Softmax2d: "sums over a dim",
    nn.LogSoftmax: "sums over a dim",
    nn.PReLU: "has a slope for all features or for each, whose gradient is a sum over what is cut",
    nn.MultiheadAttention: "mixes positions, and has weights of its own",
}

# Classes of transformers.activations, which is not imported for them.
NAMED_HOLDS: tuple[str, ...] = ("LaplaceActivation", "LinearActivation", "ReLUSquaredActivation")

_NAMED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "SiLUActivation": lambda _: SiLU(),
    "GELUActivation": lambda _: GELU(),
    "GELUTanh": lambda _: GELU("tanh"),
    "PytorchGELUTanh": lambda _: GELU("tanh"),
    "NewGELUActivation": lambda _: GELU("tanh"),
    "FastGELUActivation": lambda _: GELU("tanh"),
    "AccurateGELUActivation": lambda _: GELU("tanh"),
    "ClippedGELUActivation": _clipped_gelu,
    "QuickGELUActivation": lambda _: QuickGELU(),
    "MishActivation": lambda _: Mish(),
    "SqrtSoftplusActivation": lambda _: SqrtSoftplus(),
}
NAMED_REPLACED: tuple[str, ...] = tuple(_NAMED)

NAMED_NOT_ELEMENTWISE: Mapping[str, str] = {
    "XIELUActivation": "has slopes for all features, whose gradients are sums over what is cut",
}
