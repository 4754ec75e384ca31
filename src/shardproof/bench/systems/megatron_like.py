"""What fairscale and Megatron-Core share: layers of one descent that take the place of linears."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.bench.system import Party, Style


class MegatronLike(Party):
    """A rank that replaces each linear by the peer's column or row layer."""

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """Every linear replaced by the peer's, with the numbers of the plain one."""
        for name, style in plan.items():
            linear: Any = model.get_submodule(name)
            options: dict[str, Any] = {"bias": linear.bias is not None, "init_method": _undrawn}
            if style.weight_dim == 0:
                options["gather_output"] = style is Style.COLUMN_GATHERED
            else:
                options["input_is_parallel"] = style is Style.ROW
            layer = self._layer(style, linear.in_features, linear.out_features, options)
            model.set_submodule(name, self._fill(layer, linear, style))
        return model

    @abstractmethod
    def _layer(self, style: Style, inputs: int, outputs: int, options: dict[str, Any]) -> nn.Module:
        """The peer's layer; its weights are filled afterwards."""

    @torch.no_grad()
    def _fill(self, layer: nn.Module, linear: Any, style: Style) -> nn.Module:
        """Give the layer this rank's part of a plain linear's numbers."""
        dim = style.weight_dim
        layer.get_parameter("weight").copy_(self._part(linear.weight, dim))
        if linear.bias is not None:
            layer.get_parameter("bias").copy_(self._part(linear.bias, None if dim else 0))
        return layer

    def _part(self, full: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return full
        owned = self.layout(tuple(full.shape), dim).owned
        return full.narrow(dim, owned.start, len(owned))


def _undrawn(weight: Tensor) -> Tensor:
    return weight
