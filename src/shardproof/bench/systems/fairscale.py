"""fairscale: Megatron's layers of 2021, over gloo."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.bench.system import Party, Style
from shardproof.bench.systems.group import rank_and_size


class Fairscale(Party):
    """A rank of fairscale's model-parallel group, which is all processes."""

    def __init__(self) -> None:
        super().__init__(*rank_and_size())
        from fairscale.nn.model_parallel import initialize, layers  # noqa: PLC0415 - optional

        initialize.initialize_model_parallel(self.size)
        self._layers = layers

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """Every linear replaced by fairscale's, which draw their own weights: filled afterwards."""
        for name, style in plan.items():
            linear = model.get_submodule(name)
            model.set_submodule(name, self._layer(linear, style))
        return model

    def _layer(self, linear: Any, style: Style) -> nn.Module:
        sizes = (linear.in_features, linear.out_features)
        options: dict[str, Any] = {"bias": linear.bias is not None, "init_method": _undrawn}
        if style.weight_dim == 0:
            options["gather_output"] = style is Style.COLUMN_GATHERED
            layer = self._layers.ColumnParallelLinear(*sizes, **options)
        else:
            options["input_is_parallel"] = style is Style.ROW
            layer = self._layers.RowParallelLinear(*sizes, **options)
        return fill(layer, linear, style, self)


def join(axis: Axis | None) -> Party:
    """A rank of the default process group."""
    return Fairscale()


def _undrawn(weight: Tensor) -> Tensor:
    return weight


@torch.no_grad()
def fill(layer: nn.Module, linear: Any, style: Style, party: Party) -> nn.Module:
    """Give a layer that cuts like Megatron's this rank's part of a plain linear's numbers."""
    dim = style.weight_dim
    layer.get_parameter("weight").copy_(_part(linear.weight, dim, party))
    if linear.bias is not None:
        layer.get_parameter("bias").copy_(_part(linear.bias, None if dim else 0, party))
    return layer


def _part(full: Tensor, dim: int | None, party: Party) -> Tensor:
    if dim is None:
        return full
    owned = party.layout(tuple(full.shape), dim).owned
    return full.narrow(dim, owned.start, len(owned))
