"""Plain torch: the model as it is, in one process."""

from collections.abc import Mapping

from torch import nn

from shardproof.axis import Axis
from shardproof.bench.system import Party, Style


class Plain(Party):
    """The whole model."""

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """`model` itself."""
        return model

    def cut_transformer(self, model: nn.Module, *, training: bool) -> nn.Module:
        """`model` itself."""
        return model.train(training)


def join(axis: Axis | None) -> Party:
    """The only rank."""
    return Plain(0, 1)
