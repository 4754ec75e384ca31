"""`Spec`: how a tensor is cut. `Region`: the specs and caches of one cut model on one rank.

A cut tensor is cut along exactly one dim; along all others every rank holds everything. A `Region`
makes each `Spec` once, so that specs are compared, and recipes are looked up, by identity.
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

# Attribute of a tensor that must stay whole when a cut tensor is written into it.
STAYS_WHOLE = "_shardproof_kept"


class Spec:
    """How one tensor is cut.

    Attributes:
        region: the region that made this.
        shape: shape of the whole tensor.
        dim: the dim that is cut, counted from the left.
        cut: how that dim is cut.
        local_shape: shape of this rank's part.
    """

    __slots__ = ("_joining", "_like", "cut", "dim", "local_shape", "region", "shape")

    def __init__(self, region: "Region", shape: tuple[int, ...], dim: int, cut: CutDim) -> None:
        self.region = region
        self.shape = torch.Size(shape)
        self.dim = dim
        self.cut = cut
        length = len(cut.held(region.axis.rank))
        self.local_shape = torch.Size((*shape[:dim], length, *shape[dim + 1 :]))
        self._like: dict[tuple[int, ...], Spec] = {}
        self._joining: dict[tuple[int, ...], bool] = {}

    def of_part(self, part: tuple[int, ...], dim: int | None = None) -> "Spec":
        """The spec of a tensor whose part has this shape, and whose cut dim is cut as here.

        Args:
            part: shape of this rank's part.
            dim: position of the cut dim; the same as here, if not given.
        """
        if dim is None:
            spec = self._like.get(part)
            if spec is None:
                spec = self._like[part] = self.of_part(part, self.dim)
            return spec
        shape = (*part[:dim], self.shape[self.dim], *part[dim + 1 :])
        return self.region.spec(shape, dim, self.cut)

    def is_joined_by(self, shape: tuple[int, ...]) -> bool:
        """Whether a whole tensor broadcasts to this shape, with size 1 along the cut dim.

        Args:
            shape: of the whole tensor.
        """
        is_joined = self._joining.get(shape)
        if is_joined is None:
            first = len(self.shape) - len(shape)
            is_joined = self._joining[shape] = first >= 0 and all(
                size == 1 or (dim != self.dim and size == self.shape[dim])
                for dim, size in enumerate(shape, first)
            )
        return is_joined

    def __repr__(self) -> str:
        return (
            f"{tuple(self.shape)} of which rank {self.region.axis.rank} of "
            f"{self.region.axis.size} holds {tuple(self.local_shape)}"
        )


class Region:
    """The cut tensors of one model on one rank: axis, scheme, specs, recipes and records.

    Args:
        axis: the ranks that share the model.
        scheme: leaves, numerics and seed.

    Attributes:
        axis: as given.
        scheme: as given.
        rank: the rank of this process or thread.
        recipes: (operation, specs, arguments) -> the calls on the parts.
        forms: operation -> the function that computes it on a part.
        gathered: (operation, module) -> how often a tensor was gathered for want of a rule.
        called: modules whose own code calls, on whole tensors, operations with an invariant form.
        drew: modules whose own code draws random numbers.
        are_weights_cut_only_in_forward: outside of a forward, `module.weight` is this rank's part.
        cuts_tokens: activations between blocks are cut along their tokens.
        whole_weights: name of a weight -> the operation that needs all of it. It is filled in a
            rehearsal; the next plan leaves these weights whole.
        is_rehearsed: whether this is a rehearsal, in which the calls of modules are recorded.
        variant: operation without an invariant form -> the module that called it first.
        graph_objects: objects that compiled graphs refer to, while the region exists.
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
        self.cuts_tokens = False
        self.whole_weights: dict[str, str] = {}
        self.is_rehearsed = axis.transport.name == "rehearsed"
        self.graph_objects: dict[Any, Any] = {}
        self._weights: list[tuple[weakref.ref[Tensor], str]] = []
        self._memories: dict[int | None, tuple[weakref.ref[Tensor], str]] = {}
        self._specs: dict[tuple[tuple[int, ...], int, int], Spec] = {}
        self._places: dict[tuple[int, str], UnitSplit] = {}
        self._cuts: dict[CutDim, CutDim] = {}
        self._same: dict[int, CutDim] = {}
        self._features: dict[Cut, CutDim] = {}
        self._finest: list[Region] | None = None
        self._cut_references: list[
            CutDim
        ] = []  # keeps the objects alive, so that an `id` is not reused

    def keep(self, model: nn.Module) -> None:
        """Keep the buffers of a model and of its copies whole, whatever is written into them."""
        for buffer in model.buffers():
            setattr(buffer, STAYS_WHOLE, True)  # a copy of the tensor has this attribute too

    def know_weights(self, model: nn.Module) -> None:
        """Remember the cut weights of two dims or more, which no operation may gather.

        Args:
            model: the cut model.
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
            part: a part of a cut tensor.
        """
        if torch.compiler.is_compiling():
            return None  # traced tensors do not lie in the memory of weights
        first = self._weights[0][0]() if self._weights else None
        if first is None or memory_of(first) not in self._memories:  # `.to()` moves all weights
            alive = [(each[0](), each) for each in self._weights]
            self._memories = {memory_of(x): each for x, each in alive if x is not None}
            self._memories.pop(None, None)
        memory = memory_of(part)
        weight, name = self._memories.get(memory, (None, None))
        parameter = None if weight is None else weight()
        # A weight may have moved, and its old memory may belong to another tensor by now.
        if parameter is not None and memory_of(parameter) == memory:
            return name
        storage_owner = part if part._base is None else part._base
        if isinstance(storage_owner, nn.Parameter) and storage_owner.dim() > 1:
            return name_by_memory(storage_owner) or "a weight"  # a weight of a copy of the model
        return None

    def count_gathered(self, why: str, who: str) -> None:
        """Remember that a tensor is gathered for want of a rule."""
        self.gathered[why, who] = self.gathered.get((why, who), 0) + 1

    def one(self, cut: CutDim) -> CutDim:
        """The one object that stands for all equal cuts, so that they compare by identity."""
        canonical = self._same.get(id(cut))
        if canonical is None:
            canonical = self._same[id(cut)] = self._cuts.setdefault(cut, cut)
            self._cut_references.append(cut)
        return canonical

    def features(self, cut: Cut) -> CutDim:
        """The `CutDim` of a dim for which a layer gives only a `Cut`."""
        cut_dim = self._features.get(cut)
        if cut_dim is None:
            units = Units("features", cut.size // cut.unit)
            shared = Shared(units, self.scheme.leaves, self.axis.size)
            cut_dim = self.one(CutDim(shared, (Block(cut.size, 0, cut.unit),)))
            self._features[cut] = cut_dim
        return cut_dim

    def spec(self, shape: tuple[int, ...], dim: int, cut: CutDim) -> Spec:
        """The one `Spec` with this shape, dim and cut."""
        spec = self._specs.get((shape, dim, id(cut)))
        if spec is None:
            cut = self.one(cut)
            key = (tuple(shape), dim, id(cut))
            spec = self._specs.get(key)
            if spec is None:
                spec = self._specs[key] = Spec(self, key[0], dim, cut)
        return spec

    def place(self, cut: CutDim, who: str) -> UnitSplit:
        """The place of a collective on tensors with this cut, for the ledger and its sums."""
        place = self._places.get((id(cut), who))
        if place is None:
            cut = self.one(cut)
            place = UnitSplit.of(self.axis, cut, self.scheme, who)
            self._places[id(cut), who] = place
        return place

    def finest(self) -> list["Region"]:
        """The regions of the first and the last rank at the highest degree, one rank per leaf."""
        if self._finest is None:
            size = self.scheme.leaves
            ranks = [] if self.axis.size >= size else sorted({0, size - 1})
            self._finest = [
                Region(Axis("tp", RehearsedTransport(rank, size)), self.scheme) for rank in ranks
            ]
        return self._finest

    def __deepcopy__(self, memo: dict[int, Any]) -> "Region":
        return self
