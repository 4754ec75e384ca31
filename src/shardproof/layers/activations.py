"""Modules for the invariant activations: twins of torch's, with the same options.

None for `nn.ReLU`: it compares and picks, so that torch's own has the same bits however it is cut.
Activations of Hugging Face transformers are known by the names of their classes, and tried: a class
of that name that computes something else has no twin.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.layers.norm import norm_twin
from shardproof.numerics import elementwise
from shardproof.numerics.elementwise import Approximate


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
        wide = elementwise.widen(x)
        return (wide * elementwise.sigmoid(wide * 1.702)).to(x.dtype)


class Mish(nn.Module):
    """`x * tanh(softplus(x))` (Misra 2019, arXiv 1908.08681)."""

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), the placement of `x`."""
        wide = elementwise.widen(x)
        return (wide * elementwise.tanh(elementwise.softplus(wide))).to(x.dtype)


def invariant_twin(module: nn.Module) -> nn.Module | None:
    """Our module that computes what an activation or a norm computes, or None if there is none.

    Known are torch's own, transformers' activations, and norms over one dim (`norm_twin`), whose
    parameters the twin shares. None too for a subclass, which may compute something else, and for
    `inplace=True`, which promises to overwrite the input: a twin never does, and a caller may
    count on it.

    Args:
        module: any module.
    """
    make = _TWINS.get(type(module))
    if make is not None:
        return None if getattr(module, "inplace", False) else make(module).train(module.training)
    named = _NAMED.get(type(module).__name__)
    if named is not None:
        twin = named()
        return twin.train(module.training) if _computes_the_same(module, twin) else None
    return norm_twin(module)


@torch.no_grad()
def _computes_the_same(module: nn.Module, twin: nn.Module) -> bool:
    """Try both, without the hooks that `module` may have."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return False
    forward: Any = module.forward
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        x = torch.linspace(-12, 12, 1001, dtype=dtype, device="cpu")
        y = forward(x)
        if not isinstance(y, Tensor) or y.dtype != dtype or y.shape != x.shape:
            return False
        if not torch.allclose(y, twin(x), rtol=tolerance, atol=tolerance):
            return False
    return True


_TWINS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Tanh: lambda _: Tanh(),
    nn.Sigmoid: lambda _: Sigmoid(),
    nn.SiLU: lambda _: SiLU(),
    nn.Mish: lambda _: Mish(),
    nn.GELU: lambda module: GELU(module.approximate),
    nn.Softplus: lambda module: Softplus(module.beta, module.threshold),
}

# Classes of transformers.activations, which is not imported for them.
_NAMED: dict[str, Callable[[], nn.Module]] = {
    "SiLUActivation": SiLU,
    "GELUActivation": GELU,
    "GELUTanh": lambda: GELU("tanh"),
    "PytorchGELUTanh": lambda: GELU("tanh"),
    "NewGELUActivation": lambda: GELU("tanh"),
    "FastGELUActivation": lambda: GELU("tanh"),
    "AccurateGELUActivation": lambda: GELU("tanh"),
    "QuickGELUActivation": QuickGELU,
    "MishActivation": Mish,
}
