"""`CutLogits`: logits of a cut vocabulary that have the whole shape and are gathered on first use.

A rank computes the logits of its part of the vocabulary, and the loss of a model is computed from
the parts. So logits that are not used otherwise are never sent. The first use that is not
element-wise gathers them, on all ranks together.
Why a tensor subclass that gathers by itself: docs/decisions/0030-logits-are-whole-when-used.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

# torch's decorator and not ours: ours refuses gradients of a subclass, and here they are
# `CutLogits`. Nothing is saved, so no second derivative can be lost.
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import AxisError, MismatchError, RankError
from shardproof.leaves import Cut

_aten = torch.ops.aten
_ALIASES = (_aten.detach.default, _aten.alias.default)
# Operations that models apply to logits before the loss. Each gives a part the same bits as the
# whole: tests/test_hf_logits.py compares them at every width of a part.
_ELEMENTWISE = (
    _aten._to_copy.default,
    _aten.add.Tensor,
    _aten.div.Tensor,
    _aten.mul.Tensor,
    _aten.neg.default,
    _aten.tanh.default,
    _aten.tanh_backward.default,
)
_ON_ALL_RANKS = (
    "The logits of {who!r} are gathered when they are first used, with labels too: use them on "
    "every rank of the axis alike and before `launch` returns (print shows none), or take "
    "`.part`, which is this rank's and sends nothing."
)


@dataclass
class _LogitsShard:
    """The storage behind one or several `CutLogits`: this rank's part, or the whole.

    Attributes:
        axis: the ranks that share the vocabulary.
        cut: cut of the vocabulary, the last dim.
        who: name of the head.
        direction: direction of the gather in the ledger.
        part: (*, owned), Shard(-1); None after the gather.
        whole: (*, cut.size), Replicate; None before the gather.
    """

    axis: Axis
    cut: Cut
    who: str
    direction: str
    part: Tensor | None = None
    whole: Tensor | None = None

    @property
    def some(self) -> Tensor:
        """Either of the two tensors, for the properties that they share."""
        logits = self.whole if self.part is None else self.part
        assert logits is not None  # noqa: S101 - one of them is always there
        return logits

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.some.shape[:-1], self.cut.size)

    def gather(self) -> Tensor:
        """Gather the whole; the second time nothing is sent.

        Comm:
            `direction` one all_gather of (*, cut.size), the first time.
        """
        if self.part is not None:
            part, last = self.part, self.part.dim() - 1
            try:
                self.whole = comm.all_gather(
                    part, self.axis, dim=last, cut=self.cut, direction=self.direction, who=self.who
                )
            except (AxisError, MismatchError, RankError) as error:
                error.args = (f"{error} {_ON_ALL_RANKS.format(who=self.who)}",)
                raise
            self.part = None
        return self.some

    def own(self) -> Tensor:
        """This rank's part; after the gather it is taken from the whole, which may have changed."""
        return self.some if self.part is not None else self.slice(self.some)

    def slice(self, whole: Tensor) -> Tensor:
        """A copy of this rank's part of a tensor with the whole shape."""
        owned = self.cut.owned(self.axis.rank)
        part = whole.narrow(-1, owned.start, len(owned))
        return part.clone(memory_format=torch.contiguous_format)

    def like(self, part: Tensor, direction: str | None = None) -> "CutLogits":
        """The storage of another part with the same cut."""
        shard = _LogitsShard(self.axis, self.cut, self.who, direction or self.direction, part)
        return CutLogits(shard)


class CutLogits(Tensor):
    """Logits (*, vocabulary) that behave as Replicate, of which this rank holds (*, owned).

    `argmax`, `F.cross_entropy`, indexing, `numpy`, `torch.save` and all other operations first
    gather it, once; its gradient is that of a Replicate value. Element-wise steps between the head
    and the loss (a scale, a soft cap, another dtype) and `detach` send nothing. Neither do `shape`,
    `dtype` and `print`, which prints a description.

    Gathering is a collective, so use the logits in the same way on every rank of the axis. If one
    rank uses them alone, that is reported as for any collective that ranks do not make together.

    Attributes:
        part: (*, owned), Shard(-1), the part that this rank holds; reading it sends nothing.

    Comm:
        first use: forward one all_gather of (*, vocabulary); backward none.
    """

    _shard: _LogitsShard
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, shard: _LogitsShard) -> Self:
        """Wrap a storage in a tensor of the whole shape."""
        some = shard.some
        wrapper: Self = Tensor._make_wrapper_subclass(
            cls, shard.shape, dtype=some.dtype, device=some.device
        )
        wrapper._shard = shard
        return wrapper

    @staticmethod
    def of(part: Tensor, *, axis: Axis, cut: Cut, who: str) -> "CutLogits":
        """Make logits from this rank's part.

        Args:
            part: (*, owned), Shard(-1).
            axis: the ranks that share the vocabulary.
            cut: cut of the vocabulary.
            who: name of the head.
        Returns:
            (*, cut.size); its gradient is expected to be Replicate.
        Comm:
            none.
        """
        comm.check_part(part, axis, dim=-1, cut=cut, is_whole=False, who=who)
        logits: CutLogits = _Cover.apply(
            part, _LogitsShard(axis, cut, who, "forward", part.detach())
        )
        return logits

    @property
    def part(self) -> Tensor:
        """This rank's part, (*, owned), Shard(-1), which carries gradients."""
        part: Tensor = _Uncover.apply(self)
        return part

    def whole(self) -> Tensor:
        """Gather a plain tensor, (*, vocabulary), Replicate, which carries gradients.

        Comm:
            forward one all_gather of (*, vocabulary), unless it has been used before.
        """
        return self.view(self.shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run element-wise operations on the part, and all others on the gathered whole."""
        kwargs = kwargs or {}
        if func in _ALIASES:
            return cls(args[0]._shard)
        if func in _ELEMENTWISE:
            y = _by_part(func, args, kwargs)
            if y is not None:
                return y
        logits_by_data: dict[int, CutLogits] = {}

        def whole(x: Any) -> Any:
            if not isinstance(x, CutLogits):
                return x
            data = x._shard.gather()
            logits_by_data[id(data)] = x
            return data

        y = func(*tree_map(whole, args), **tree_map(whole, kwargs))
        # An in-place operation returns its own argument.
        return tree_map(lambda each: logits_by_data.get(id(each), each), y)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """A description; the values only after the gather, because printing is no collective."""
        shard = self._shard
        if shard.part is None:
            return f"CutLogits({shard.some!r})"
        return (
            f"CutLogits(shape={tuple(self.shape)}, dtype={self.dtype}, of which rank "
            f"{shard.axis.rank} of {shard.axis.size} holds {tuple(shard.part.shape)}; gathered on "
            "first use, on all ranks together)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the whole; torch refuses it for tensors inside an autograd graph.

        Comm:
            forward one all_gather of (*, vocabulary), unless it has been used before.
        """
        return self.whole().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as the whole, a plain tensor; Comm as `whole`."""
        return self.whole().__reduce_ex__(protocol)

    # For these methods torch reads the memory of a tensor and does not dispatch to a subclass.

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """See `Tensor.numpy`; Comm as `whole`."""
        return self.whole().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        """See `Tensor.tolist`; Comm as `whole`."""
        return self.whole().tolist()

    def data_ptr(self) -> int:
        """See `Tensor.data_ptr`; Comm as `whole`."""
        return self._shard.gather().data_ptr()

    def untyped_storage(self) -> Any:
        """See `Tensor.untyped_storage`; Comm as `whole`."""
        return self._shard.gather().untyped_storage()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """See `Tensor.__dlpack__`; Comm as `whole`."""
        return self.whole().__dlpack__(*args, **kwargs)


def _by_part(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CutLogits | None:
    """Run an element-wise operation on this rank's part; None if it needs the whole."""
    operands = [x for x in args if isinstance(x, CutLogits)]
    shard = operands[0]._shard
    if any(x._shard.part is None or x._shard.cut != shard.cut for x in operands):
        return None
    if func is _aten._to_copy.default:
        device, layout = kwargs.get("device"), kwargs.get("layout")
        is_cast = device in (None, shard.some.device) and layout in (None, torch.strided)
        if not is_cast or kwargs.get("memory_format") is not None:
            return None
    parts = []
    for x in args:
        if isinstance(x, CutLogits):
            if x._shard.shape != shard.shape:
                return None
            parts.append(x._shard.own())
        elif isinstance(x, Tensor) and x.dim():
            if tuple(x.shape) != shard.shape:
                return None
            parts.append(shard.slice(x))
        else:
            parts.append(x)
    return shard.like(func(*parts, **kwargs))


class _Cover(torch.autograd.Function):
    """Wrap a part as logits; backward, take this rank's part of their gradient. No Comm."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, shard: _LogitsShard) -> CutLogits:
        ctx.shard = _LogitsShard(shard.axis, shard.cut, shard.who, "backward", part.new_empty(0))
        return CutLogits(shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad._shard.own() if isinstance(grad, CutLogits) else ctx.shard.slice(grad)
        return own, None


class _Uncover(torch.autograd.Function):
    """Unwrap the part of logits; backward, wrap its gradient as one of the whole. No Comm."""

    @staticmethod
    def forward(ctx: Any, logits: CutLogits) -> Tensor:
        ctx.shard = logits._shard
        return logits._shard.own().detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.shard.like(grad.contiguous(), "backward")
