"""How a tensor is cut, and the region in which that is known. Values that are compared by identity.

A cut tensor is cut along exactly one dim; along all others every rank holds everything. `Region`
makes each `Spec` once, so that a recipe that was found for one is found again by its identity.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.layers.registry import is_cut_module, memory_of, name_by_memory, parts_of
from shardproof.leaves import Cut
from shardproof.ops.unit_ops import UnitSplit
from shardproof.scheme import Scheme
from shardproof.transport.rehearsed import RehearsedTransport
from shardproof.units import Block, CutDim, Shared, Units

KEPT = "_shardproof_kept"  # attribute of a tensor that stays whole, whatever is written to it


class Spec:
    """How one tensor is cut.

    Attributes:
        region: that made it.
        shape: of the whole.
        dim: the dim that is cut, counted from the left.
        cut: how.
        local_shape: of what this rank holds.
    """

    __slots__ = ("_joining", "_like", "cut", "dim", "local_shape", "region", "shape")

    def __init__(self, region: "Region", shape: tuple[int, ...], dim: int, cut: CutDim) -> None:
        self.region = region
        self.shape = torch.Size(shape)
        self.dim = dim
        self.cut = cut
        held = len(cut.held(region.axis.rank))
        self.local_shape = torch.Size((*shape[:dim], held, *shape[dim + 1 :]))
        self._like: dict[tuple[int, ...], Spec] = {}
        self._joining: dict[tuple[int, ...], bool] = {}

    def of_part(self, part: tuple[int, ...], dim: int | None = None) -> "Spec":
        """How a tensor is cut whose part on this rank has a shape; its cut dim is cut as this one.

        Args:
            part: shape of what this rank holds.
            dim: where the cut dim is in it; where it is here, if not given.
        """
        if dim is None:
            found = self._like.get(part)
            if found is None:
                found = self._like[part] = self.of_part(part, self.dim)
            return found
        shape = (*part[:dim], self.shape[self.dim], *part[dim + 1 :])
        return self.region.spec(shape, dim, self.cut)

    def is_joined_by(self, shape: tuple[int, ...]) -> bool:
        """Whether a whole tensor broadcasts to one that is cut so, with size 1 along the cut dim.

        Args:
            shape: of the whole tensor.
        """
        found = self._joining.get(shape)
        if found is None:
            first = len(self.shape) - len(shape)
            found = self._joining[shape] = first >= 0 and all(
                size == 1 or (dim != self.dim and size == self.shape[dim])
                for dim, size in enumerate(shape, first)
            )
        return found

    def __repr__(self) -> str:
        return (
            f"{tuple(self.shape)} of which rank {self.region.axis.rank} of "
            f"{self.region.axis.size} holds {tuple(self.local_shape)}"
        )


class Region:
    """Where tensors are cut in one way: the ranks, the arithmetic, and what was found out so far.

    Args:
        axis: the ranks.
        scheme: leaves, numerics, seed.

    Attributes:
        axis: likewise.
        scheme: likewise.
        rank: of this process or thread.
        recipes: (operation, specs, arguments) -> what to do with the parts.
        forms: operation -> what computes it on a part.
        gathered: (operation, module) -> how often a tensor was gathered for want of a rule.
        called: modules whose own code calls, on whole tensors, what has a form of its own.
        drew: modules whose own code draws.
        are_weights_cut_only_in_forward: outside of it, `module.weight` is this rank's part.
        wanted_whole: name of a weight -> the operation that needs all of it. It is filled while a
            plan is made; the next plan leaves these weights whole.
        is_rehearsed: a plan is being made: what modules call is remembered.
        variant: operation without an invariant form -> the module that called it first.
        kept_by_graphs: what compiled graphs refer to, as long as the region is there.
    """

    def __init__(self, axis: Axis, scheme: Scheme) -> None:
        self.axis = axis
        self.scheme = scheme
        self.rank = axis.rank
        self.recipes: dict[Any, Any] = {}
        self.forms: dict[Any, Any] = {}
        self.gathered: dict[tuple[str, str], int] = {}
        self.variant: dict[str, str] = {}
        self.called: set[str] = set()
        self.drew: set[str] = set()
        self.are_weights_cut_only_in_forward = False
        self.wanted_whole: dict[str, str] = {}
        self.is_rehearsed = axis.transport.name == "rehearsed"
        self.kept_by_graphs: dict[Any, Any] = {}
        self._weights: list[tuple[weakref.ref[Tensor], str]] = []
        self._memories: dict[int | None, tuple[weakref.ref[Tensor], str]] = {}
        self._specs: dict[tuple[tuple[int, ...], int, int], Spec] = {}
        self._places: dict[tuple[int, str], UnitSplit] = {}
        self._cuts: dict[CutDim, CutDim] = {}
        self._same: dict[int, CutDim] = {}
        self._features: dict[Cut, CutDim] = {}
        self._finest: list[Region] | None = None
        self._met: list[CutDim] = []  # or an `id` could be given again

    def keep(self, model: nn.Module) -> None:
        """Let the buffers of a model, and of its copies, be whole, whatever is written to them."""
        for buffer in model.buffers():
            setattr(buffer, KEPT, True)  # which a copy of the tensor has too

    def know_weights(self, model: nn.Module) -> None:
        """Remember the cut weights of two dims or more: no operation may make one whole.

        Args:
            model: once it is cut.
        """
        cut = {
            id(parameter)
            for module in model.modules()
            if is_cut_module(module)
            for parameter, part in parts_of(module)
            if part.is_cut and parameter.dim() > 1
        }
        self._weights = [
            (weakref.ref(parameter), name)
            for name, parameter in model.named_parameters()
            if id(parameter) in cut
        ]
        self._memories = {}

    def weight_of(self, part: Tensor) -> str | None:
        """The name of the cut weight in whose memory a tensor lies, or None.

        Args:
            part: what a rank holds.
        """
        if torch.compiler.is_compiling():
            return None  # a graph is made of what has been run, on memory of its own
        first = self._weights[0][0]() if self._weights else None
        if first is None or memory_of(first) not in self._memories:  # `.to()` moves all of them
            alive = [(each[0](), each) for each in self._weights]
            self._memories = {memory_of(x): each for x, each in alive if x is not None}
            self._memories.pop(None, None)
        memory = memory_of(part)
        weight, name = self._memories.get(memory, (None, None))
        known = None if weight is None else weight()
        if known is not None and memory_of(known) == memory:  # not of another tensor by now
            return name
        held = part if part._base is None else part._base
        if isinstance(held, nn.Parameter) and held.dim() > 1:
            return name_by_memory(held) or "a weight"  # of a copy of the model
        return None

    def count_gathered(self, why: str, who: str) -> None:
        """Remember that a tensor is gathered for want of a rule."""
        self.gathered[why, who] = self.gathered.get((why, who), 0) + 1

    def one(self, cut: CutDim) -> CutDim:
        """The one object of all cuts that are equal: they are compared by identity after that."""
        found = self._same.get(id(cut))
        if found is None:
            found = self._same[id(cut)] = self._cuts.setdefault(cut, cut)
            self._met.append(cut)
        return found

    def features(self, cut: Cut) -> CutDim:
        """How a dim is cut of which a layer says only how its leaves lie."""
        found = self._features.get(cut)
        if found is None:
            units = Units("features", cut.size // cut.unit)
            shared = Shared(units, self.scheme.leaves, self.axis.size)
            found = self.one(CutDim(shared, (Block(cut.size, 0, cut.unit),)))
            self._features[cut] = found
        return found

    def spec(self, shape: tuple[int, ...], dim: int, cut: CutDim) -> Spec:
        """The one `Spec` of a shape that is cut so."""
        found = self._specs.get((shape, dim, id(cut)))
        if found is None:
            cut = self.one(cut)
            key = (tuple(shape), dim, id(cut))
            found = self._specs.get(key)
            if found is None:
                found = self._specs[key] = Spec(self, key[0], dim, cut)
        return found

    def place(self, cut: CutDim, who: str) -> UnitSplit:
        """Where a crossing of tensors that are cut so stands."""
        found = self._places.get((id(cut), who))
        if found is None:
            cut = self.one(cut)
            found = UnitSplit.of(self.axis, cut, self.scheme, who)
            self._places[id(cut), who] = found
        return found

    def finest(self) -> list["Region"]:
        """The first and the last rank of as many ranks as there are leaves."""
        if self._finest is None:
            size = self.scheme.leaves
            ranks = [] if self.axis.size >= size else sorted({0, size - 1})
            self._finest = [
                Region(Axis("tp", RehearsedTransport(rank, size)), self.scheme) for rank in ranks
            ]
        return self._finest

    def __deepcopy__(self, memo: dict[int, Any]) -> "Region":
        return self
