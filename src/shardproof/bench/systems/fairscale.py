"""fairscale: Megatron's layers of 2021, over gloo."""

from typing import Any

from torch import nn

from shardproof.axis import Axis
from shardproof.bench.system import Party, Style
from shardproof.bench.systems.group import rank_and_size
from shardproof.bench.systems.megatron_like import MegatronLike


class Fairscale(MegatronLike):
    """A rank of fairscale's model-parallel group, which is all processes."""

    def __init__(self) -> None:
        super().__init__(*rank_and_size())
        from fairscale.nn.model_parallel import initialize, layers  # noqa: PLC0415 - optional

        initialize.initialize_model_parallel(self.size)
        self._column, self._row = layers.ColumnParallelLinear, layers.RowParallelLinear

    def _layer(self, style: Style, inputs: int, outputs: int, options: dict[str, Any]) -> nn.Module:
        made = self._column if style.weight_dim == 0 else self._row
        return made(inputs, outputs, **options)


def join(axis: Axis | None) -> Party:
    """A rank of the default process group."""
    return Fairscale()
