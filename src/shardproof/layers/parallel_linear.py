"""What column and row parallel linear share: sizes, parameters, initialisation, messages."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn

from shardproof import operands
from shardproof.axis import Axis
from shardproof.checked_values import checked_flag
from shardproof.comm.split import Split
from shardproof.errors import ShapeError, UsageError
from shardproof.layers.base import OwnParameter, ShardedModule
from shardproof.leaves import Cut
from shardproof.ops.tokens import TokenCut
from shardproof.scheme import Scheme
from shardproof.wording import short_repr


class ParallelLinear(ShardedModule):
    """What both cuts share: sizes, parameters, initialisation.

    Attributes:
        tokens: how the tokens of the input (column) or output (row) are cut in this call; None
            (default) if they are not cut.
    """

    tokens: TokenCut | None = None
    weight: Any = OwnParameter()  # nn.Parameter
    bias: Any = OwnParameter()  # nn.Parameter | None
    _split: Split
    _width: int  # of the input as it comes to this rank
    _owned_input: int  # width of this rank's part of the input
    _kind: ClassVar[type[Any]]  # the layer of the package that this one is
    _weight_dim: int
    _bias_dim: int | None
    _if_shard: str  # what to do if the input is a shard and should be whole
    _if_whole: str  # and the other way round

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axis: Axis,
        bias: bool,
        name: str | None,
        scheme: Scheme,
        device: Any,
        dtype: Any,
        cut: Cut | None = None,
        held: range | None = None,
    ) -> None:
        super().__init__(axis=axis, name=name, scheme=scheme)
        in_features, out_features = self._sizes(
            "a layer", in_features=in_features, out_features=out_features
        )
        self.in_features = in_features
        self.out_features = out_features
        input_cut = (cut if self._weight_dim else None) or self._cut(in_features)
        self._owned_input = len(input_cut.owned(axis.rank))
        shape = (out_features, in_features)
        weight = self._layout(shape, self._weight_dim, cut, held)
        self._add_parameter("weight", weight, device, dtype)
        if checked_flag(bias, "bias"):
            layout = self._layout((out_features,), self._bias_dim, cut, held)
            self._add_parameter("bias", layout, device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw what `nn.Linear` draws, U(-1/sqrt(in), 1/sqrt(in)), keyed by (seed, name, leaf).

        No rank draws a full weight, and every degree gets the same numbers. Layers of the same
        name and seed draw the same. On the meta device this does nothing.
        """
        bound = self.in_features**-0.5
        for name in self.layouts:
            self._draw(name, bound)

    @torch.no_grad()
    def _take(self, linear: nn.Linear) -> Self:
        """Copy this rank's part of a whole layer, and what it says of itself."""
        for name, layout in self.layouts.items():
            whole, shard = getattr(linear, name), getattr(self, name)
            shard.requires_grad_(whole.requires_grad)
            if shard.is_meta:
                continue
            if layout.dim is None:
                shard.copy_(whole)
            else:
                held = layout.held_indices
                shard.copy_(whole.narrow(layout.dim, held.start, len(held)))
        return self.train(linear.training)

    @property
    def cut(self) -> Cut:
        """How the weight is cut."""
        return self._split.cut

    @property
    def input_cut(self) -> Cut | None:
        """How the input's features are cut; None if the input is whole."""
        return self._split.cut

    def _check_width(self, x: Tensor) -> None:
        """Raise unless `x` is as wide as what comes to this rank."""
        try:
            is_wide = x.dim() > 0 and x.size(-1) == self._width
        except RuntimeError as error:  # a nested tensor has no sizes
            operands.explain(error, self.name, x=x)
        if not is_wide:
            self._refuse_width(x, self._width)

    def _refuse_width(self, x: Tensor, width: int) -> NoReturn:
        """Say why the last dim of `x` must be `width`: all in_features, or those owned here."""
        part = "" if width == self.in_features else f" of which {self.axis} owns {width}"
        raise ShapeError(
            f"{self.name!r} ({type(self).__name__}, in_features={self.in_features}, "
            f"out_features={self.out_features}) takes an input whose last dim is "
            f"in_features={self.in_features}{part}; got shape {tuple(x.shape)}. "
            f"{self._advice(x, width)}"
        )

    def _advice(self, x: Tensor, width: int) -> str:
        """What is most likely wrong with an input of that width."""
        last_dim = x.shape[-1] if x.dim() else 0
        owned = self._owned_input
        if width == self.in_features and last_dim == owned:
            return f"{last_dim} is this rank's shard of it: use {self._if_shard}."
        if width == owned and last_dim == self.in_features:
            return f"This input is whole: use {self._if_whole}."
        return "Sizes of a layer are global; check what the layer before hands on."

    def _small_ones(self) -> Iterator[tuple[Callable[[], nn.Module], Callable[[], nn.Module]]]:
        kind = self._kind
        yield lambda: nn.Linear(3, 2), lambda: kind(3, 2, axis=Axis.solo())

    def extra_repr(self) -> str:
        """Global sizes, and which rank of which axis this is."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.axis.name}={self.axis.rank}/{self.axis.size}"
        )


def like(
    cls: type[Any],
    linear: nn.Linear,
    axis: Axis,
    name: str | None,
    scheme: Scheme,
    **options: Any,
) -> Any:
    """An undrawn layer with the sizes of `linear`, on its device and with its dtype."""
    if not isinstance(linear, nn.Linear):
        raise UsageError(
            f"{cls.__name__} cannot be made from {short_repr(linear)}. Give an nn.Linear."
        )
    device = linear.weight.device
    layer = cls(
        linear.in_features,
        linear.out_features,
        axis=axis,
        bias=linear.bias is not None,
        name=name,
        scheme=scheme,
        device="meta",
        dtype=linear.weight.dtype,
        **options,
    )
    return layer if device.type == "meta" else layer.to_empty(device=device)
