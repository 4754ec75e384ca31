"""Linear layers whose weight is cut over one axis: drop-in for `nn.Linear`."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Protocol, Self

import torch
from torch import Tensor, nn

from shardproof import operands
from shardproof.axis import Axis
from shardproof.errors import ShapeError, UsageError
from shardproof.functional.linear import column_linear, row_linear
from shardproof.functional.site import LinearSite
from shardproof.layers.base import OwnParameter, ShardedModule, own
from shardproof.leaves import Cut
from shardproof.quantities import checked_flag
from shardproof.scheme import DEFAULT_SCHEME, Scheme
from shardproof.wording import shown


class _SharedOutputs(Protocol):
    """Layers that read one input and compute together (`shared.py`), as one of them sees it."""

    def join(self, place: int, parameters: Mapping[str, Tensor | None]) -> None:
        """Be told where the parameters of the layer at `place` are found."""

    def output(
        self, place: int, parameters: Mapping[str, Tensor | None], x: Tensor
    ) -> Tensor | None:
        """What the layer at `place` gives for `x`; None: it is to compute alone."""


class _ParallelLinear(ShardedModule):
    """What both cuts share: sizes, parameters, initialisation."""

    weight: Any = OwnParameter()  # nn.Parameter
    bias: Any = OwnParameter()  # nn.Parameter | None
    _site: LinearSite
    _width: int  # of the input as it comes to this rank
    _owned_input: int  # width of this rank's part of the input
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
        return self._site.cut

    @property
    def input_cut(self) -> Cut | None:
        """How an input is cut that comes as this rank's part of the features; None: it is whole."""
        return self._site.cut if self._weight_dim else self._site.input_cut

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
        got = x.shape[-1] if x.dim() else 0
        owned = self._owned_input
        if width == self.in_features and got == owned:
            return f"{got} is this rank's shard of it: use {self._if_shard}."
        if width == owned and got == self.in_features:
            return f"This input is whole: use {self._if_whole}."
        return "Sizes of a layer are global; check what the layer before hands on."

    def _small_ones(self) -> Iterator[tuple[Callable[[], nn.Module], Callable[[], nn.Module]]]:
        kind = RowParallelLinear if isinstance(self, RowParallelLinear) else ColumnParallelLinear
        yield lambda: nn.Linear(3, 2), lambda: kind(3, 2, axis=Axis.solo())

    def extra_repr(self) -> str:
        """Global sizes, and which rank of which axis this is."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.axis.name}={self.axis.rank}/{self.axis.size}"
        )


class ColumnParallelLinear(_ParallelLinear):
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
        input_cut = self._cut(self.in_features) if gather_input else None
        self._site = LinearSite(axis, cut, scheme, self.name, input_cut, gather_output, held=held)
        self._width = len(input_cut.owned(axis.rank)) if input_cut else self.in_features
        self._shared: tuple[_SharedOutputs, int] | None = None

    @property
    def site(self) -> LinearSite:
        """Where the layer stands: everything that is no tensor."""
        return self._site

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

        Nothing compares the ranks' layers: where they were drawn apart, as without a common seed,
        the cut layer is put together from several. `parallelize` does compare.

        Args:
            linear: the whole layer; frozen weights stay frozen, its training flag is kept.
            axis: the ranks.
            gather_input: the input comes as Shard(-1) and is gathered first.
            gather_output: the output is gathered to Replicate.
            name: for messages and initialisation; see `Axis.next_name` for None.
            scheme: leaves, numerics, seed.
            cut: of out_features, if it is not features that must stay whole (`Heads.query_cut`).
            held: the leaves that this rank holds, if more than it owns (`Heads.held`).
        """
        layer = _like(
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
            y = group.output(place, self._parameters, x)
            if y is not None:
                return y
        return column_linear(x, own(self, "weight"), own(self, "bias"), self._site)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._shared is not None:  # a copy: it joins the copy of its group
            group, place = self._shared
            group.join(place, self._parameters)


class RowParallelLinear(_ParallelLinear):
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
        split_input = not input_is_parallel
        self._site = LinearSite(axis, cut, scheme, self.name, split_input=split_input)
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

        Nothing compares the ranks' layers: where they were drawn apart, as without a common seed,
        the cut layer is put together from several. `parallelize` does compare.

        Args:
            linear: the whole layer; frozen weights stay frozen, its training flag is kept.
            axis: the ranks.
            input_is_parallel: False if the input comes whole and is to be cut here.
            name: for messages and initialisation; see `Axis.next_name` for None.
            scheme: leaves, numerics, seed.
            cut: of in_features, if it is not features that must stay whole (`Heads.query_cut`).
        """
        layer = _like(cls, linear, axis, name, scheme, input_is_parallel=input_is_parallel, cut=cut)
        return layer._take(linear)

    def forward(self, x: Tensor) -> Tensor:
        """See the class for shapes, placements and Comm."""
        self._check_width(x)
        return row_linear(x, own(self, "weight"), own(self, "bias"), self._site)


def _like(
    cls: type[Any],
    linear: nn.Linear,
    axis: Axis,
    name: str | None,
    scheme: Scheme,
    **options: Any,
) -> Any:
    """An undrawn layer with the sizes of `linear`, on its device and with its dtype."""
    if not isinstance(linear, nn.Linear):
        raise UsageError(f"{cls.__name__} cannot be made from {shown(linear)}. Give an nn.Linear.")
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
