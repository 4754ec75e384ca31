"""Find which RMSNorm formula a module computes. The module is run; its name is not used.

Models bring their own classes, which look alike and differ in where they round and in whether the
weight is added to one. A small module of the same class is run on numbers whose squares add up
without rounding, so that only the formula can make a difference, in fp32, in bf16, and with both.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.ops.norms import rms_norm
from shardproof.ops.rms_norm import RmsFormula

_SIZE, _ROWS, _EPS = 8, 64, 1e-3
_EPS_NAMES = ("eps", "variance_epsilon")
_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
_CANDIDATES = tuple(
    RmsFormula(_EPS, offset, rounds) for offset in (0.0, 1.0) for rounds in (True, False)
)


def find_formula(module: nn.Module) -> RmsFormula | None:
    """The formula of an RMSNorm over one dim, or None if the module is not one that we know.

    Known are `nn.RMSNorm`, and classes that compute what one of our formulas does: with `weight` as
    the only parameter, and `eps` or `variance_epsilon`.

    Args:
        module: any module.
    """
    if type(module) is nn.RMSNorm:
        return RmsFormula(module.eps) if len(module.normalized_shape) == 1 else None
    eps = _eps_of(module)
    if eps is None:
        return None
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if [(name, value.dim()) for name, value in tensors] != [("weight", 1)]:
        return None
    kind: Any = type(module)
    class_formula = _formula_of(kind)
    if class_formula is None or _options(module) != class_formula[1]:
        return None  # an option of this very module may change what it computes
    return RmsFormula(eps, class_formula[0].offset, class_formula[0].rounds_before_weight)


def _eps_of(module: nn.Module) -> float | None:
    values = [getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)]
    return values[0] if len(values) == 1 and isinstance(values[0], float) else None


def _options(module: nn.Module) -> dict[str, Any]:
    """The module's attributes, except sizes and eps."""
    size = module.get_parameter("weight").shape[0]
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in (*_EPS_NAMES, "training")
        and value not in (size, (size,), [size])
    }


@functools.cache
def _formula_of(kind: Any) -> tuple[RmsFormula, dict[str, Any]] | None:
    """The formula of a class, and the options with which it was tried."""
    try:
        with torch.device("cpu"):
            module = kind(_SIZE, eps=_EPS)
        options = _options(module)
        results = [(x, weight, _run(module, x, weight)) for x, weight in _trials()]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None  # it is made or called in another way: no RMSNorm of one input
    for formula in _CANDIDATES:
        if all(_agrees(formula, x, weight, y) for x, weight, y in results):
            return formula, options
    return None


def _trials() -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (_ROWS, _SIZE), generator=draws, device="cpu") / 4
    weight = torch.randn(_SIZE, generator=draws, device="cpu", dtype=torch.float32)
    return [(x.to(kind), weight.to(weight_kind)) for kind, weight_kind in _DTYPES]


@torch.no_grad()
def _run(module: nn.Module, x: Tensor, weight: Tensor) -> Any:
    module.register_parameter("weight", nn.Parameter(weight))
    return module.forward(x)


@torch.no_grad()
def _agrees(formula: RmsFormula, x: Tensor, weight: Tensor, y: Any) -> bool:
    ours = rms_norm(
        x,
        weight,
        eps=formula.eps,
        offset=formula.offset,
        rounds_before_weight=formula.rounds_before_weight,
    )
    if not isinstance(y, Tensor) or y.dtype != ours.dtype or y.shape != ours.shape:
        return False
    if y.dtype is torch.float32:
        return torch.allclose(y, ours, rtol=1e-6, atol=1e-6)
    return torch.equal(y, ours)
