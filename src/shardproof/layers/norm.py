"""Norms: of activations that every rank holds, over a dim that is cut, and over each head."""

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from shardproof.comm.split import Split
from shardproof.errors import ShapeError, UsageError
from shardproof.layers.base import OwnParameter, ShardedModule, own
from shardproof.layers.rms_formula import find_formula
from shardproof.leaves import Layout
from shardproof.ops.norms import (
    head_rms_norm,
    layer_norm,
    sharded_rms_norm,
    whole_rms_norm,
)
from shardproof.ops.rms_norm import RmsFormula


class RMSNorm(nn.Module):
    """RMSNorm over the last dim of an activation that every rank holds.

    Shapes and placements:
        x       (*, size)                     Replicate
        weight  (size,)                       Replicate
        y       (*, size)                     Replicate

    Comm:
        forward none; backward none.

    Attributes:
        formula: eps, and where models differ.
    """

    weight: nn.Parameter | None

    def __init__(
        self, size: int, formula: RmsFormula, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.formula = formula
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def offset(self) -> float:
        """What is added to the weight."""
        return self.formula.offset

    def reset_parameters(self) -> None:
        """Make the factor one."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1 - self.formula.offset)

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Compute what `module` computes, with its very weight.

        Args:
            module: `nn.RMSNorm` over one dim, or a model's own class (`find_formula`).
        Raises:
            UsageError: it is none of those.
        """
        norm = cls(1, _formula_of(module), device="meta")
        norm.register_parameter("weight", module._parameters["weight"])
        return norm.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """See the class for shapes, placements and Comm."""
        return whole_rms_norm(x, self.weight, self.formula)

    def extra_repr(self) -> str:
        """Size and formula."""
        size = "" if self.weight is None else f"{self.weight.shape[0]}, "
        return f"{size}{self.formula}"


class LayerNorm(nn.Module):
    """LayerNorm over the last dim of an activation that every rank holds.

    Shapes and placements:
        x       (*, size)                     Replicate
        weight  (size,)                       Replicate
        bias    (size,)                       Replicate
        y       (*, size)                     Replicate

    Comm:
        forward none; backward none.

    Attributes:
        size: of the last dim.
        eps: added to the variance.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-5,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the factor one, and the bias zero."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_module(cls, module: nn.LayerNorm) -> Self:
        """Compute what `module` computes, with its very weight and bias.

        Args:
            module: over one dim.
        Raises:
            UsageError: it goes over several dims, or is of another class.
        """
        if type(module) is not nn.LayerNorm or len(module.normalized_shape) != 1:
            raise UsageError(
                f"LayerNorm.from_module takes an nn.LayerNorm over one dim, got {module}. Leave it "
                "replicated, or write it so."
            )
        norm = cls(module.normalized_shape[0], eps=module.eps, device="meta")
        norm.register_parameter("weight", module.weight)
        norm.register_parameter("bias", module.bias)
        return norm.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """See the class for shapes, placements and Comm."""
        if x.shape[-1:] != (self.size,):
            raise ShapeError(
                f"LayerNorm of size {self.size} takes (*, {self.size}), got shape "
                f"{tuple(x.shape)}. Check what the layer before hands on."
            )
        return layer_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        """Size and options."""
        return f"{self.size}, eps={self.eps}, bias={self.bias is not None}"


class _CutRMSNorm(ShardedModule):
    """What both cuts share: a weight, a formula, a cut dim."""

    weight: Any = OwnParameter()  # nn.Parameter

    def __init__(
        self, formula: RmsFormula, split: Split, layout: Layout, *, device: Any, dtype: Any
    ) -> None:
        super().__init__(axis=split.axis, name=split.name or None, scheme=split.scheme)
        self.formula = formula
        self._split = replace(split, name=self.name)
        self._add_parameter("weight", layout, device, dtype)
        self.reset_parameters()

    @property
    def offset(self) -> float:
        """What is added to the weight."""
        return self.formula.offset

    def reset_parameters(self) -> None:
        """Make the factor one."""
        nn.init.constant_(self.weight, 1 - self.formula.offset)

    def extra_repr(self) -> str:
        """Features on all ranks and of one head, formula, and which rank of which axis this is."""
        cut, axis = self._split.cut, self.axis
        unit = "" if cut.unit == 1 else f"unit={cut.unit}, "
        return f"{cut.size}, {unit}{self.formula}, {axis.name}={axis.rank}/{axis.size}"


class ShardedRMSNorm(_CutRMSNorm):
    """RMSNorm over a dim that is cut over `axis`, as OLMo 2 has it across all heads.

    Shapes and placements:
        x       (*, held)                     Shard(-1)
        weight  (held,)                       Shard(0)
        y       (*, held)                     Shard(-1)

    Where ranks hold more than they own (key-value heads), what several hold is the same on each,
    and so is expected of its gradient.

    Comm:
        forward one all_reduce of squares (*); backward one all_reduce of products (*).

    Attributes:
        formula: eps, and where models differ.
    """

    def __init__(
        self, formula: RmsFormula, split: Split, *, device: Any = None, dtype: Any = None
    ) -> None:
        layout = Layout((split.cut.size,), split.axis.rank, 0, split.cut, split.held)
        super().__init__(formula, split, layout, device=device, dtype=dtype)

    @classmethod
    def from_module(cls, module: nn.Module, split: Split) -> Self:
        """Take this rank's part of `module`, which must be the same on every rank.

        Args:
            module: `nn.RMSNorm` over one dim, or a model's own class (`find_formula`).
            split: axis, cut of the dim, what is held, scheme, name.
        Raises:
            UsageError: it is none of those, or has no weight.
            ShapeError: its weight does not have the cut's size.
        """
        formula, whole = _formula_of(module), _weight_of(module, (split.cut.size,), split)
        norm = cls(formula, split, device=whole.device, dtype=whole.dtype)
        indices = norm.layouts["weight"].held_indices
        with torch.no_grad():
            norm.weight.copy_(whole[indices.start : indices.stop])
        norm.weight.requires_grad_(whole.requires_grad)
        return norm.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """See the class for shapes, placements and Comm."""
        return sharded_rms_norm(x, own(self, "weight"), self._split, self.formula)


class HeadRMSNorm(_CutRMSNorm):
    """RMSNorm over the features of each head, where the heads are cut over `axis` (Qwen 3).

    Shapes and placements:
        x       (*, held heads, head_dim)     Shard(-2)
        weight  (head_dim,)                   Replicate
        y       (*, held heads, head_dim)     Shard(-2)

    Where ranks hold more than they own (key-value heads), what several hold is the same on each,
    and so is expected of its gradient: the weight's counts every head once.

    Comm:
        forward none; backward one all_reduce of grad_weight (head_dim).

    Attributes:
        formula: eps, and where models differ.
    """

    def __init__(
        self, formula: RmsFormula, split: Split, *, device: Any = None, dtype: Any = None
    ) -> None:
        layout = Layout((split.cut.unit,), split.axis.rank)
        super().__init__(formula, split, layout, device=device, dtype=dtype)

    @classmethod
    def from_module(cls, module: nn.Module, split: Split) -> Self:
        """Compute what `module` computes, with its very weight.

        Args:
            module: `nn.RMSNorm` over one dim, or a model's own class (`find_formula`).
            split: axis, cut of the features of all heads (`Heads.query_cut`, `Heads.key_cut`), what
                is held, scheme, name.
        Raises:
            UsageError: it is none of those, or has no weight.
            ShapeError: its weight does not have the size of one head.
        """
        formula, weight = _formula_of(module), _weight_of(module, (split.cut.unit,), split)
        norm = cls(formula, split, device="meta")
        norm.register_parameter("weight", weight)
        return norm.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """See the class for shapes, placements and Comm."""
        return head_rms_norm(x, self.weight, self._split, self.formula)


def norm_replacement(module: nn.Module) -> RMSNorm | LayerNorm | None:
    """Our module that computes what a norm over one dim computes, with its very parameters.

    None if it is no such norm, and for a subclass of `nn.LayerNorm`.

    Args:
        module: any module.
    """
    if type(module) is nn.LayerNorm:
        return LayerNorm.from_module(module) if len(module.normalized_shape) == 1 else None
    return None if find_formula(module) is None else RMSNorm.from_module(module)


def _weight_of(module: nn.Module, shape: tuple[int, ...], split: Split) -> nn.Parameter:
    """The weight of a norm that is to be cut, which must have that shape."""
    weight = module._parameters["weight"]
    if weight is None:
        raise UsageError(
            f"{module} has no weight, which a norm that is cut needs. Use elementwise_affine=True, "
            "or leave what it normalises whole."
        )
    if weight.shape != shape:
        raise ShapeError(
            f"{split.name or 'a norm'} on {split.axis}: {module} has a weight of shape "
            f"{tuple(weight.shape)}, but the cut, of {split.cut.size} features in units of "
            f"{split.cut.unit}, wants {shape}. Give the cut of what it normalises."
        )
    return weight


def _formula_of(module: nn.Module) -> RmsFormula:
    formula = find_formula(module)
    if formula is None:
        raise UsageError(
            f"{type(module).__name__} is no RMSNorm that we know: one with a weight over one dim, "
            "with eps or variance_epsilon, that computes what one of our formulas does. Use "
            "nn.RMSNorm, or leave what it normalises whole."
        )
    return formula
