"""`CoreTransport`: base of the transports with shared memory, which use the C core.

The core gets addresses and lengths. This module checks tensors before the core gets them, and
prepares each kind of call once. If a rank cannot take part, it tells the others in the same
collective, so that all ranks raise and none waits.
"""

import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from shardproof import operands
from shardproof.errors import ShapeError, ShardproofError, UsageError
from shardproof.transport import portable
from shardproof.transport.agreement import disagreement
from shardproof.transport.base import (
    Call,
    Order,
    Pending,
    Transport,
    Window,
    digest_of,
)
from shardproof.transport.notes import NOTHING, CallNotes, Notes

# dtype -> kind of element, as the core numbers them, and how many of these one has.
_KINDS = {
    torch.float32: (0, 1),
    torch.float64: (1, 1),
    torch.bfloat16: (2, 1),
    torch.float16: (3, 1),
    torch.int8: (4, 1),
    torch.uint8: (4, 1),
    torch.int16: (5, 1),
    torch.int32: (6, 1),
    torch.int64: (7, 1),
    torch.complex64: (0, 2),
    torch.complex128: (1, 2),
}
_MOST_PLANS = 4096


class _Prepared(NamedTuple):
    """The preparation of a sum; it keeps the objects of its key alive."""

    plan: Any
    numel: int
    out_numel: int
    dtype: torch.dtype
    text: str
    references: tuple[Any, ...]


class _Gathering(NamedTuple):
    widths: tuple[int, ...]
    digest: int
    numel: int
    out_numel: int
    text: str
    call: Call


class _Started(Pending):
    """A sum that the core has begun; it keeps the tensors alive."""

    def __init__(
        self,
        transport: "CoreTransport",
        prepared: _Prepared,
        call: Call,
        call_notes: CallNotes,
        *x: Any,
    ):
        self._transport = transport
        self._references = x
        self.prepared = prepared
        self.call = call
        self.call_notes = call_notes

    def wait(self) -> None:
        """Finish it."""
        self._transport.finish(self)


class CoreTransport(Transport):
    """One rank's end of a shared area.

    Args:
        core: the C module, or None if it is missing and no method is called.
        rank, size: this rank, and the number of ranks.
        sliced_from: bytes of a part from which on each rank adds a slice, and slices are gathered.
    """

    def __init__(self, core: ModuleType | None, rank: int, size: int, *, sliced_from: int) -> None:
        self.rank = rank
        self.size = size
        self._shm: Any = core
        self._sliced_from = sliced_from
        self._plans: dict[tuple[Any, ...], _Prepared] = {}
        self._gatherings: dict[tuple[Any, ...], _Gathering] = {}
        self._started: deque[_Started] = deque()
        self._call: Call | None = None  # the current call, or the last one
        self._is_noted = False  # a wait was so long that others were told
        self._thread: int | None = None  # that used it last
        self._call_notes = NOTHING  # goes with the call at hand, or the last one
        self.notes = Notes()

    # The core of this rank; set by whoever knows the area.
    _core: Any

    @property
    def calls(self) -> int:
        """Number of collectives begun so far."""
        return int(self._core.calls)

    @property
    def current_call(self) -> Call | None:
        """The collective in which this rank has waited for a while."""
        return self._call if self._is_noted else None

    def sum(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        *,
        call: Call,
        windows: Sequence[Window] | None = None,
    ) -> None:
        """Read directly from the other ranks' memory into `out`."""
        prepared = self._prepared(parts, order, out, call, windows)
        addresses = self._addresses(call, out, *parts)
        self._begin(call)
        try:
            self._core.sum(prepared.plan, *addresses)
        except BaseException as error:
            self._explain(error, prepared.text)
        if self._is_noted:
            self._forget()

    def start_sum(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        *,
        call: Call,
        windows: Sequence[Window] | None = None,
    ) -> Pending:
        """Publish this rank's parts, if there is room, so that others need not wait for it."""
        prepared = self._prepared(parts, order, out, call, windows)
        addresses = self._addresses(call, out, *parts)
        self._begin(call)
        try:
            self._core.start(prepared.plan, *addresses)
        except BaseException as error:
            self._explain(error, prepared.text)
        if self._is_noted:
            self._forget()
        started = _Started(self, prepared, call, self._call_notes, parts, out)
        self._started.append(started)
        return started

    def finish(self, started: _Started) -> None:
        """Finish a sum, which must be the one that was started first."""
        if not self._started or self._started[0] is not started:
            raise UsageError("sums are waited for once, in the order in which they were started.")
        self._call, self._call_notes = started.call, started.call_notes
        try:
            self._core.finish()
        except BaseException as error:
            self._explain(error, started.prepared.text)
        self._started.popleft()
        if self._is_noted:
            self._forget()

    def all_gather(
        self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call, outer: int = 1
    ) -> None:
        """Copy directly from the other ranks' memory into `out`."""
        key = (id(call), outer, x.dtype, *sizes)
        gathering = self._gatherings.get(key)
        if gathering is None:
            gathering = self._learn_gathering(key, x.element_size(), sizes, call, outer)
        if (
            x.numel() != gathering.numel
            or out.numel() != gathering.out_numel
            or x.dtype is not out.dtype
            or not (x.is_cpu and x.is_contiguous() and out.is_cpu and out.is_contiguous())
            or (x.is_neg() or x.is_conj())
        ):
            self._refuse(call, self._misfit(x, out, sizes, call, outer))
        start, place = self._addresses(call, x, out)
        self._gather(start, place, outer, gathering)

    def _addresses(self, call: Call, *tensors: Tensor) -> list[int]:
        """The addresses of the tensors; raises on all ranks if one has no memory."""
        try:
            addresses = [x.data_ptr() for x in tensors]
            if not all(addresses) or any(x.storage_offset() for x in tensors):
                for x in tensors:
                    operands.check(self._where(call), x=x)
        except operands.ERRORS as error:
            self._refuse(call, self._unreadable(call, tensors, error))
        return addresses

    def _unreadable(
        self, call: Call, tensors: Sequence[Tensor], error: Exception
    ) -> ShardproofError:
        """The error for tensors whose address raised `error`."""
        try:
            for x in tensors:
                operands.check(self._where(call), x=x)
        except UsageError as reason:
            return reason
        return UsageError(f"{self._where(call)} gives a tensor that has no memory: {error}")

    def _where(self, call: Call) -> str:
        return f"{call}: rank {self.rank} of {self.size}"

    @abstractmethod
    def _tick(self, waited: float, missing: list[int]) -> None:
        """Called during a long wait; raise if the missing ranks cannot come."""

    def _forget(self) -> None:
        """Called after a long wait, to take back its note."""
        self._is_noted = False

    def _begin(self, call: Call) -> None:
        """Pass the notes of inputs to the core, for the next call."""
        self._call = call
        self._thread = threading.get_ident()
        self._call_notes = self.take_notes()
        if self._call_notes.value:
            self._core.noted = self._call_notes.value

    def _gather(self, x: int, out: int, outer: int, gathering: _Gathering) -> None:
        self._begin(gathering.call)
        try:
            self._core.gather(x, out, outer, gathering.widths, gathering.digest)
        except BaseException as error:
            self._explain(error, gathering.text)
        if self._is_noted:
            self._forget()

    def _learn_gathering(
        self,
        key: tuple[Any, ...] | None,
        itemsize: int,
        sizes: Sequence[int],
        call: Call,
        outer: int,
        what: str = "gathers",
    ) -> _Gathering:
        widths = tuple(size * itemsize for size in sizes)
        text = f"{call}\n{what} {outer} rows of {list(widths)} bytes"
        numel, total = (outer * size for size in (sizes[self.rank], sum(sizes)))
        gathering = _Gathering(widths, digest_of(text), numel, total, text, call)
        if key is not None:
            if len(self._gatherings) >= _MOST_PLANS:
                self._gatherings.clear()
            self._gatherings[key] = gathering
        return gathering

    def _prepared(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        call: Call,
        windows: Sequence[Window] | None,
    ) -> _Prepared:
        """The preparation of this sum, after a check of the tensors."""
        prepared_sum = self._plans.get((id(call), id(order), id(windows), out.dtype))
        if prepared_sum is None or len(parts) != order.counts[self.rank]:
            return self._prepare(parts, order, out, call, windows)
        fits = out.numel() == prepared_sum.out_numel and out.is_contiguous() and out.is_cpu
        for part in parts:
            fits = (
                fits
                and part.numel() == prepared_sum.numel
                and part.dtype is prepared_sum.dtype
                and part.is_contiguous()
                and part.is_cpu
                and not part.is_neg()
            )
        if not fits or (prepared_sum.dtype.is_complex and any(part.is_conj() for part in parts)):
            return self._prepare(parts, order, out, call, windows)
        return prepared_sum

    def _prepare(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        call: Call,
        windows: Sequence[Window] | None,
    ) -> _Prepared:
        try:
            for x in (*parts, out):
                _check_memory(x, f"{call}: rank {self.rank} of {self.size}")
            dtype = portable.check(self, parts, order, out, call, windows)
            if max(order.counts) > self._shm.MAX_OWN:
                raise UsageError(
                    f"{call}: a rank has {max(order.counts)} parts, and no more than "
                    f"{self._shm.MAX_OWN} go into one sum. Add some of them first."
                )
        except ShardproofError as error:
            self._refuse(call, error)
        numel = out.numel() if windows is None else _whole(windows)
        kind, width = _KINDS[dtype]
        window = None
        if windows is not None:
            mine = windows[self.rank]
            window = (mine.outer, mine.size, mine.inner * width, mine.start, mine.stop)
        text = (
            f"{call}\nadds {len(order.program) // 2 + 1} parts of {numel} {dtype} into {out.dtype}"
            f" by {order.digest:x}" + (f", for {list(windows)}" if windows is not None else "")
        )
        plan = self._core.plan(
            order.counts,
            order.program,
            numel * width,
            kind,
            _KINDS[out.dtype][0],
            digest_of(text),
            numel * dtype.itemsize >= self._sliced_from,
            window,
        )
        references = (call, order, windows)
        prepared = _Prepared(plan, numel, out.numel(), dtype, text, references)
        if windows is None or isinstance(windows, tuple):  # a copy, because a list may be changed
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[id(call), id(order), id(windows), out.dtype] = prepared
        return prepared

    def _misfit(
        self, x: Tensor, out: Tensor, sizes: Sequence[int], call: Call, outer: int
    ) -> ShardproofError:
        """The error for wrong arguments of a gather, or None."""
        where = f"{call}: rank {self.rank} of {self.size}"
        try:
            _check_memory(x, where)
            _check_memory(out, where)
        except ShardproofError as error:
            return error
        return ShapeError(
            f"{call}: rank {self.rank} has {x.numel()} elements of {x.dtype} and room for "
            f"{out.numel()} of {out.dtype}, but the ranks' sizes are {list(sizes)}, in {outer} "
            "rows."
        )

    def _refuse(self, call: Call, error: ShardproofError) -> NoReturn:
        """Raise `error` after all ranks have seen that this one cannot take part."""
        if not self._started:
            self._begin(call)
            try:
                self._core.meet(digest_of(f"refused: {call}"))
            except self._shm.Disagreement:
                self._raise_mismatch(f"{call}\nwhich it refuses: {error}", error)
        raise error

    def _explain(self, error: BaseException, text: str) -> NoReturn:
        if isinstance(error, self._shm.Disagreement):
            self._raise_mismatch(text, None)
        if self._core.is_lost:
            self._abandon(error)
        raise error

    def _abandon(self, error: BaseException) -> None:
        """Called when this rank has given up a wait and cannot take part any more."""

    def _raise_mismatch(self, text: str, cause: ShardproofError | None) -> NoReturn:
        """Exchange the calls of all ranks, and raise the mismatch on all of them."""
        self._started.clear()
        self._is_noted = True  # the text is stored where a long wait would put its note
        error = disagreement(
            text, self._call_notes, lambda mine: list(self._core.confer(mine.encode()))
        )
        self._forget()
        self.forget_notes()
        raise error from cause


def _check_memory(x: Tensor, where: str) -> None:
    """Raise unless the elements of `x` lie side by side in this machine's memory."""
    if x.is_cpu and x.layout is torch.strided and not x.is_quantized:
        if x.is_contiguous() and not x.is_neg() and not x.is_conj():
            return
        raise ShapeError(
            f"{where} gives a tensor of shape {tuple(x.shape)} and strides {x.stride()}"
            + (", conjugated or negated by a flag" if x.is_conj() or x.is_neg() else "")
            + ". Use x.resolve_conj().resolve_neg().contiguous()."
        )
    kind = "quantized" if x.is_quantized else str(x.layout).removeprefix("torch.")
    raise UsageError(
        f"{where} gives a {kind} tensor of {x.dtype} on {x.device}, and ranks that share memory "
        "take strided ones on the CPU. Convert it, or use another transport."
    )


def _whole(windows: Sequence[Window]) -> int:
    return windows[0].outer * windows[0].size * windows[0].inner
