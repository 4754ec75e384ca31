"""Linear layers whose weight is cut over one axis: drop-in for `nn.Linear`."""

from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.checked_values import checked_flag
from shardproof.comm.split import Split
from shardproof.layers.base import own
from shardproof.layers.parallel_linear import ParallelLinear, like
from shardproof.leaves import Cut
from shardproof.ops.linear import Gathers, column_linear, row_linear
from shardproof.ops.tokens import TokenCut
from shardproof.scheme import DEFAULT_SCHEME, Scheme


class _SharedOutputs(Protocol):
    """Layers that read one input and compute together (`shared.py`), as one of them sees it."""

    def join(self, place: int, parameters: Mapping[str, Tensor | None]) -> None:
        """Store the parameters of the layer at `place`."""

    def output(
        self,
        place: int,
        parameters: Mapping[str, Tensor | None],
        x: Tensor,
        tokens: TokenCut | None = None,
    ) -> Tensor | None:
        """The output of the layer at `place` for `x`.

        Return None if the layer must compute its output itself.
        """


class ColumnParallelLinear(ParallelLinear):
    """`y = x @ weight.T + bias`, with out_features cut over `axis`.

    Layers that read one input can share the sum of its gradient: `shared.link`.

    Shapes and placements:
        x       (*, in_features)              Replicate; (*, owned in_features), Shard(-1) with
                                              gather_input
        weight  (owned out_features, in_features)  Shard(0)
        bias    (owned out_features,)         Shard(0)
        y       (*, owned out_features)       Shard(-1); (*, out_features), Replicate with
                                              gather_output

    Comm:
        forward none; backward one all_reduce of grad_x (*, in_features).
        gather_input: forward one all_gather of x (*, in_features); backward one reduce_scatter of
        grad_x (*, in_features).
        gather_output: forward also one all_gather of y (*, out_features).
    """

    _weight_dim = 0
    _bias_dim = 0
    _if_shard = (
        "gather_input=True or RowParallelLinear here, or gather_output=True in the layer before"
    )
    _if_whole = "gather_input=False here"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axis: Axis,
        bias: bool = True,
        gather_input: bool = False,
        gather_output: bool = False,
        name: str | None = None,
        scheme: Scheme = DEFAULT_SCHEME,
        device: Any = None,
        dtype: Any = None,
        cut: Cut | None = None,
        held: range | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            axis=axis,
            bias=bias,
            name=name,
            scheme=scheme,
            device=device,
            dtype=dtype,
            cut=cut,
            held=held,
        )
        self.gather_input = checked_flag(gather_input, "gather_input")
        self.gather_output = checked_flag(gather_output, "gather_output")
        cut = cut or self._cut(self.out_features)
        self._split = Split(axis, cut, scheme, self.name, held)
        gathered = Split(axis, self._cut(self.in_features), scheme, self.name)
        self._gathers = Gathers(gathered if gather_input else None, gather_output)
        self._width = self._owned_input if gather_input else self.in_features
        self._shared: tuple[_SharedOutputs, int] | None = None

    @property
    def split(self) -> Split:
        """How out_features are cut."""
        return self._split

    @property
    def input_cut(self) -> Cut | None:
        """How the input's features are cut; None if the input is whole."""
        return self._gathers.input.cut if self._gathers.input is not None else None

    @property
    def is_shared(self) -> bool:
        """Whether it computes together with others that read its input."""
        return self._shared is not None

    def share(self, group: _SharedOutputs, place: int) -> None:
        """Compute together with others (`shared.link`).

        Args:
            group: of layers that read one input.
            place: of this layer among them.
        """
        self._shared = (group, place)
        group.join(place, self._parameters)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        axis: Axis,
        gather_input: bool = False,
        gather_output: bool = False,
        name: str | None = None,
        scheme: Scheme = DEFAULT_SCHEME,
        cut: Cut | None = None,
        held: range | None = None,
    ) -> Self:
        """Take this rank's rows of `linear`, which must be the same on every rank.

        Nothing compares the ranks' layers; `parallelize` does. If the ranks drew different weights,
        for instance without a common random seed, the cut layer mixes them.

        Args:
            linear: the whole layer; frozen weights stay frozen, its training flag is kept.
            axis: the axis over which out_features are cut.
            gather_input: the input comes as Shard(-1) and is gathered first.
            gather_output: the output is gathered to Replicate.
            name: for messages and initialisation; see `Axis.next_name` for None.
            scheme: leaves, numerics, seed.
            cut: how out_features are cut, if the units are not single features (for example
                `Heads.query_cut`).
            held: the leaves that this rank holds, if more than it owns (`Heads.held`).
        """
        layer = like(
            cls,
            linear,
            axis,
            name,
            scheme,
            gather_input=gather_input,
            gather_output=gather_output,
            cut=cut,
            held=held,
        )
        return layer._take(linear)

    def forward(self, x: Tensor) -> Tensor:
        """See the class for shapes, placements and Comm."""
        self._check_width(x)
        if self._shared is not None and x.requires_grad and torch.is_grad_enabled():
            group, place = self._shared
            y = group.output(place, self._parameters, x, self.tokens)
            if y is not None:
                return y
        gathers = self._gathers
        if self.tokens is not None:
            gathers = gathers._replace(tokens=self.tokens)
        return column_linear(x, own(self, "weight"), own(self, "bias"), self._split, gathers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._shared is not None:  # a copy: it joins the copy of its group
            group, place = self._shared
            group.join(place, self._parameters)


class RowParallelLinear(ParallelLinear):
    """`y = x @ weight.T + bias`, with in_features cut over `axis`.

    Shapes and placements:
        x       (*, owned in_features)        Shard(-1); (*, in_features), Replicate with
                                              input_is_parallel=False
        weight  (out_features, owned in_features)  Shard(1)
        bias    (out_features,)               Replicate; added once, after the sum
        y       (*, out_features)             Replicate

    Comm:
        forward one all_reduce of y (*, out_features); backward none.
        input_is_parallel=False: backward also one all_gather of grad_x (*, in_features).
    """

    _weight_dim = 1
    _bias_dim = None
    _if_shard = "input_is_parallel=True here"
    _if_whole = "input_is_parallel=False here, or ColumnParallelLinear before it"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axis: Axis,
        bias: bool = True,
        input_is_parallel: bool = True,
        name: str | None = None,
        scheme: Scheme = DEFAULT_SCHEME,
        device: Any = None,
        dtype: Any = None,
        cut: Cut | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            axis=axis,
            bias=bias,
            name=name,
            scheme=scheme,
            device=device,
            dtype=dtype,
            cut=cut,
        )
        self.input_is_parallel = checked_flag(input_is_parallel, "input_is_parallel")
        cut = cut or self._cut(self.in_features)
        self._split = Split(axis, cut, scheme, self.name)
        self._width = len(cut.owned(axis.rank)) if input_is_parallel else self.in_features

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        axis: Axis,
        input_is_parallel: bool = True,
        name: str | None = None,
        scheme: Scheme = DEFAULT_SCHEME,
        cut: Cut | None = None,
    ) -> Self:
        """Take this rank's columns of `linear`, which must be the same on every rank.

        Nothing compares the ranks' layers; `parallelize` does. If the ranks drew different weights,
        for instance without a common random seed, the cut layer mixes them.

        Args:
            linear: the whole layer; frozen weights stay frozen, its training flag is kept.
            axis: the axis over which in_features are cut.
            input_is_parallel: False if the input comes whole and is to be cut here.
            name: for messages and initialisation; see `Axis.next_name` for None.
            scheme: leaves, numerics, seed.
            cut: how in_features are cut, if the units are not single features (for example
                `Heads.query_cut`).
        """
        layer = like(cls, linear, axis, name, scheme, input_is_parallel=input_is_parallel, cut=cut)
        return layer._take(linear)

    def forward(self, x: Tensor) -> Tensor:
        """See the class for shapes, placements and Comm."""
        self._check_width(x)
        weight, bias = own(self, "weight"), own(self, "bias")
        return row_linear(
            x,
            weight,
            bias,
            self._split,
            splits_input=not self.input_is_parallel,
            tokens=self.tokens,
        )


ColumnParallelLinear._kind = ColumnParallelLinear
RowParallelLinear._kind = RowParallelLinear
