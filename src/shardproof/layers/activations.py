"""Modules for the invariant activations: twins of torch's, with the same options.

None for `nn.ReLU`: it compares and picks, so that torch's own has the same bits however it is cut.
"""

from collections.abc import Callable

from torch import Tensor, nn

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


def invariant_twin(module: nn.Module) -> nn.Module | None:
    """Our module that computes what a torch.nn activation computes, or None if there is none.

    None too for a subclass, which may compute something else, and for `inplace=True`, which
    promises to overwrite the input: a twin never does, and a caller may count on it.

    Args:
        module: any module.
    """
    make = _TWINS.get(type(module))
    if make is None or getattr(module, "inplace", False):
        return None
    return make(module).train(module.training)


_TWINS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Tanh: lambda _: Tanh(),
    nn.Sigmoid: lambda _: Sigmoid(),
    nn.SiLU: lambda _: SiLU(),
    nn.GELU: lambda module: GELU(module.approximate),
    nn.Softplus: lambda module: Softplus(module.beta, module.threshold),
}
