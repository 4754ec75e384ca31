"""torch.distributed as a transport: gloo on CPUs, nccl on GPUs; many processes, many machines.

Buffers are always contiguous: some gloo collectives silently corrupt non-contiguous ones (pytorch
192920). Tensors that are only moved are sent as bytes, because backends do not support every dtype.
No backend compares the calls of the ranks. Over gloo, tensors on CPUs go through the `Stream` of
their group, which compares them: if calls differ, all ranks raise instead of computing garbage or
aborting. Tensors on GPUs go to the backend directly; if calls differ, nccl hangs or returns
garbage. With `check=True`, one more small collective compares a hash of every call first.
"""

import atexit
import functools
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shardproof.errors import (
    AxisError,
    MismatchError,
    ShardproofError,
    UsageError,
)
from shardproof.transport import asking, portable
from shardproof.transport.agreement import disagreement
from shardproof.transport.base import (
    BUSY,
    Call,
    Order,
    PeerError,
    Pending,
    Transport,
    Window,
    compare_pieces,
    mismatch,
)
from shardproof.transport.ledger import Ledger
from shardproof.transport.notes import CallNotes, Notes
from shardproof.transport.presence import Place
from shardproof.transport.stream import NextExchange, Round, stream_of

# all_gather_into_tensor by its newer name; torch warns about the older one where it has both.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


_T = TypeVar("_T")


class _Work(Protocol):
    def wait(self, timeout: timedelta = ...) -> Any: ...


class _Reducing(Pending):
    """An all-reduce of the backend that was started."""

    def __init__(self, finish: Callable[[], object]) -> None:
        self._finish = finish

    def wait(self) -> None:
        """Wait for the backend."""
        self._finish()


class DistributedTransport(Transport):
    """A process group as a transport.

    Args:
        group: a process group that this process is in.
        check: compare the ranks' calls before every collective of tensors that are not on CPUs, or
            of another backend than gloo, by one more small collective. Over gloo calls are always
            compared.
        timeout: seconds that a rank waits in one collective; None for the group's own timeout.
        observer: called with each call, and whether it is new, when this rank begins it or waits
            for it, and with None when it has ended.
    """

    is_asynchronous = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        check: bool = False,
        timeout: float | None = None,
        observer: Callable[[Call | None, bool], None] | None = None,
    ) -> None:
        self.name = _backend(group)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.ledger = Ledger()
        # Weakly: held past destroy_process_group, its threads would live until the interpreter is
        # half gone, and abort the process there. torch.distributed holds it until then.
        self._group_ref = weakref.ref(group)
        _let_threads_finish_at_exit()
        self._check = check
        self._stream = stream_of(group)
        self._number = next(self._stream.axes)  # of the axes of this group
        self._is_gloo = "gloo" in dist.get_backend_config(group)
        self.notes = Notes() if self._is_gloo else None
        self.timeout = timeout
        self._timeout = None if timeout is None else timedelta(seconds=timeout)
        self._observer = observer
        self._busy = threading.Lock()
        self._call: Call | None = None
        # The host of each rank, once the ranks have told each other; of several hosts, the places.
        self.hosts: tuple[str, ...] = ()
        self.places: tuple[Place, ...] = ()
        # Where small control messages live. A mixed group has a CPU side for them.
        self._device = torch.device("cpu")
        if not self._is_gloo and torch.cuda.is_available():
            self._device = torch.device("cuda", torch.cuda.current_device())

    @property
    def current_call(self) -> Call | None:
        """The collective in which this rank is now."""
        return self._call

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group; raises an AxisError once it was destroyed."""
        group = self._group_ref()
        if group is None:
            raise AxisError(
                f"the process group of rank {self.rank} of {self.size} was destroyed. Make an axis "
                "from a new one after torch.distributed.destroy_process_group()."
            )
        return group

    @torch.no_grad()
    def exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[int]],
        *,
        rounds: int,
        like: Tensor,
        call: Call,
    ) -> list[list[Tensor]]:
        """Exchange one piece per pair and round; a buffer has at most size - 1 pieces."""
        with self._during(call, like):
            if self._is_streamed(like):
                lengths_by_rank = self._gather_objects(
                    _lengths(outgoing, incoming, self.rank), call
                )
                compare_pieces(lengths_by_rank, call)
            exchange = self._start_exchange(outgoing, incoming, rounds, like, call, is_whole=True)
            return exchange()

    @torch.no_grad()
    def all_gather(
        self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call, outer: int = 1
    ) -> None:
        """Gather equal sizes directly into `out`, and others by an all-to-all, without padding."""
        portable.check_gather(self, x, out, sizes, call, outer)
        with self._during(call, x):
            if outer == 1:
                self._gather(x, out, sizes, call)
                return
            # Data arrives rank by rank; the rows are assembled afterwards.
            flat = torch.empty_like(out)
            lengths = [outer * size for size in sizes]
            self._gather(x, flat, lengths, call)
            parts = [part.view(outer, -1) for part in flat.split(lengths) if part.numel()]
            if parts:
                torch.cat(parts, 1, out=out.view(outer, -1))

    @torch.no_grad()
    def start_sum(
        self,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        *,
        call: Call,
        windows: Sequence[Window] | None = None,
    ) -> Pending:
        """Start the sum; sending has begun when this returns."""
        if order.is_free and windows is None and parts[0].dtype == out.dtype:
            return self._start_all_reduce(parts[0], out, call)
        pending = portable.PortableSum(self, parts, order, out, call, windows)
        with self._during(call, out):
            receive = self._start_exchange(
                pending.outgoing(), pending.incoming(), pending.rounds, pending.like, call
            )
        pending.receive = lambda: self._resume(call, receive)
        return pending

    @torch.no_grad()
    def gather_slices(self, x: Tensor, out: Tensor, sizes: Sequence[int], *, call: Call) -> None:
        """Gather without another comparison; equal sizes go directly into `out`."""
        with self._during(call, x, is_new=False):
            self._stream.settle()
            self._gather_unseen(x, out, sizes, call)

    @torch.no_grad()
    def gather_objects(self, value: Any, *, call: Call) -> list[Any]:
        """Every rank's value, pickled."""
        with self._during(call):
            return self._gather_objects(value, call)

    def _start_all_reduce(self, x: Tensor, out: Tensor, call: Call) -> Pending:
        out.copy_(x)
        with self._during(call, x):
            if not self._is_streamed(out):
                finish = self._reduce(out, call)
                return _Reducing(lambda: self._resume(call, finish))
            none = (0,) * self.size
            reduced = Round(none, none, out.numel(), out.dtype, is_for_heads=True)
            empty = out.new_empty(0, dtype=torch.uint8)
            pieces = [*[empty] * self.size, out]
            arrive = self._stream.start(self._wish(call), [reduced], [pieces])
        return _Reducing(lambda: self._resume(call, arrive))

    def _reduce(self, x: Tensor, call: Call) -> Callable[[], None]:
        return self._start(call, lambda: dist.all_reduce(x, group=self.group, async_op=True))

    def _resume(self, call: Call, finish: Callable[[], _T]) -> _T:
        """Continue a call that was compared at its beginning."""
        with self._during(call, is_new=False):
            return finish()

    def _start_exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[int]],
        rounds: int,
        like: Tensor,
        call: Call,
        *,
        is_whole: bool = False,
    ) -> Callable[[], list[list[Tensor]]]:
        """Start to send; the returned function waits and returns the received pieces."""
        send, lengths = [], []
        for index in range(rounds):
            pieces = [_at(each, index, like) for each in outgoing]
            pieces[self.rank] = like.new_empty(0)
            send.append(pieces)
            sizes = [each[index] if index < len(each) else 0 for each in incoming]
            sizes[self.rank] = 0
            lengths.append(sizes)
        begin: Callable[..., Callable[[], list[list[Tensor]]]] = self._start_unseen
        if self._is_streamed(like):
            begin = functools.partial(self._start_compared, is_whole=is_whole)
        arrive = begin(send, lengths, like, call)

        def finish() -> list[list[Tensor]]:
            inboxes = arrive()
            return [
                [] if peer == self.rank else [inboxes[index][peer] for index in range(len(pieces))]
                for peer, pieces in enumerate(incoming)
            ]

        return finish

    def _is_streamed(self, x: Tensor) -> bool:
        return self._is_gloo and x.is_cpu

    def _start_compared(
        self,
        send: Sequence[Sequence[Tensor]],
        lengths: Sequence[Sequence[int]],
        like: Tensor,
        call: Call,
        *,
        is_whole: bool = False,
    ) -> Callable[[], list[list[Tensor]]]:
        """Send all rounds by the stream of the group; if `is_whole`, send hashes separately."""
        width, dtype = like.element_size(), like.dtype
        rounds = [
            Round(tuple(x.numel() * width for x in pieces), tuple(n * width for n in sizes))
            for pieces, sizes in zip(send, lengths, strict=True)
        ]
        pieces = [[_as_bytes(x) for x in each] for each in send]
        if is_whole:
            # A copy with 16 bytes in front could be larger than any other tensor of this rank.
            none, empty = (0,) * self.size, like.new_empty(0, dtype=torch.uint8)
            rounds.insert(0, Round(none, none, is_for_heads=True))
            pieces.insert(0, [empty] * self.size)
        skipped = len(rounds) - len(send)
        arrive = self._stream.start(self._wish(call), rounds, pieces)
        return lambda: [[x.view(dtype) for x in each] for each in arrive()[skipped:]]

    def _wish(self, call: Call) -> NextExchange:
        def post(
            target: Tensor, source: Tensor, received: Sequence[int], sent: Sequence[int]
        ) -> Callable[[], None]:
            return self._start(call, lambda: self._all_to_all(target, source, received, sent))

        def disagree(call_notes: CallNotes) -> MismatchError:
            self.forget_notes()
            text = f"{call}\non axis {self._number} of those made of this process group"
            return disagreement(text, call_notes, lambda mine: self._tell(mine, call))

        # The axes of a group share its backend, so all ranks must use them in the same order.
        digest = call.digest ^ (self._number * 0x9E3779B97F4A7C15) % (1 << 64)
        return NextExchange(
            digest, self.take_notes(), post, lambda x: self._reduce(x, call), disagree
        )

    def _start_unseen(
        self,
        send: Sequence[Sequence[Tensor]],
        lengths: Sequence[Sequence[int]],
        like: Tensor,
        call: Call,
    ) -> Callable[[], list[list[Tensor]]]:
        """Send round by round, by the backend."""
        inboxes: list[list[Tensor]] = []
        finishes: list[Callable[[], None]] = []
        width = like.element_size()
        for pieces, sizes in zip(send, lengths, strict=True):
            inbox = like.new_empty(sum(sizes))
            filled = [piece for piece in pieces if piece.numel()]
            outbox = filled[0].contiguous() if len(filled) == 1 else torch.cat(list(pieces))
            begin = functools.partial(
                self._all_to_all,
                _as_bytes(inbox),
                _as_bytes(outbox),
                [size * width for size in sizes],
                [piece.numel() * width for piece in pieces],
            )
            finishes.append(self._start(call, begin))
            inboxes.append(list(inbox.split(list(sizes))))

        def arrive() -> list[list[Tensor]]:
            for each in finishes:
                each()
            return inboxes

        return arrive

    def _all_to_all(
        self, target: Tensor, source: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> _Work | None:
        work: _Work | None = dist.all_to_all_single(
            target, source, list(received), list(sent), group=self.group, async_op=True
        )
        return work

    def _gather(self, x: Tensor, out: Tensor, sizes: Sequence[int], call: Call) -> None:
        if not self._is_streamed(x):
            self._gather_unseen(x, out, sizes, call)
            return
        begin = functools.partial(self._start_compared, is_whole=True)
        self._gather_by_pieces(x, out, sizes, call, begin)

    def _gather_unseen(self, x: Tensor, out: Tensor, sizes: Sequence[int], call: Call) -> None:
        if len(set(sizes)) > 1:
            self._gather_by_pieces(x, out, sizes, call, self._start_unseen)
            return
        source, target = _as_bytes(x), _as_bytes(out)
        self._start(
            call, lambda: _all_gather_single(target, source, group=self.group, async_op=True)
        )()

    def _gather_by_pieces(
        self, x: Tensor, out: Tensor, sizes: Sequence[int], call: Call, begin: Callable[..., Any]
    ) -> None:
        # The own part is left out: with it, the buffer could be larger than the message.
        lengths = [0 if peer == self.rank else size for peer, size in enumerate(sizes)]
        send = [x.new_empty(0) if peer == self.rank else x for peer in range(self.size)]
        parts = list(begin([send], [lengths], x, call)()[0])
        parts[self.rank] = x
        for place, part in zip(out.split(list(sizes)), parts, strict=True):
            place.copy_(part)

    def _tell(self, text: str, call: Call) -> list[str]:
        """Gather every rank's text, after the ranks' calls differed."""
        message = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        lengths = torch.empty(self.size, dtype=torch.int64, device="cpu")
        mine = lengths.new_tensor([message.numel()])
        self._gather_unseen(mine, lengths, [1] * self.size, call)
        sizes: list[int] = lengths.tolist()
        messages = message.new_empty(sum(sizes))
        self._gather_unseen(message, messages, sizes, call)
        return [part.numpy().tobytes().decode() for part in messages.split(sizes)]

    def _gather_objects(self, value: Any, call: Call) -> list[Any]:
        message = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        message = message.to(self._device)
        lengths = torch.empty(self.size, dtype=torch.int64, device=self._device)
        self._gather(lengths.new_tensor([message.numel()]), lengths, [1] * self.size, call)
        sizes: list[int] = lengths.tolist()
        messages = message.new_empty(sum(sizes))
        self._gather(message, messages, sizes, call)
        return [pickle.loads(part.numpy()) for part in messages.cpu().split(sizes)]

    @contextmanager
    def _during(
        self, call: Call, like: Tensor | None = None, *, is_new: bool = True
    ) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise UsageError(f"{call} on rank {self.rank} of {self.size}: {BUSY}.")
        try:
            self._call = call
            if self._observer is not None:
                self._observer(call, is_new)
            is_seen = self._is_gloo if like is None else self._is_streamed(like)
            if self._check and is_new and not is_seen:
                self._compare(call)
            yield
        finally:
            self._call = None
            self._busy.release()
        # Not after an error: the current call of this rank is then useful information.
        if self._observer is not None:
            self._observer(None, False)

    def _compare(self, call: Call) -> None:
        """Raise on all ranks unless all make the same call."""
        text = str(call)
        mine = torch.tensor([call.digest - (1 << 63)], device=self._device)
        all_digests = mine.new_empty(self.size)
        self._gather(mine, all_digests, [1] * self.size, call)
        if len(set(all_digests.tolist())) > 1:
            raise mismatch(self._gather_objects(text, call))

    def _start(self, call: Call, begin: Callable[[], _Work | None]) -> Callable[[], None]:
        """Start a collective of the backend; the returned function waits for its end."""
        with self._naming(call):
            work = begin()

        def finish() -> None:
            with self._naming(call):
                if work is not None and self._timeout is None:
                    work.wait()
                elif work is not None and self._timeout is not None:
                    work.wait(self._timeout)

        return finish

    @contextmanager
    def _naming(self, call: Call) -> Iterator[None]:
        try:
            yield
        except ShardproofError:
            raise
        except RuntimeError as error:
            # An error of the backend nearly always means that another rank has ended or is stuck.
            where = asking.where(self.places, self.rank)
            who_answers, lost = asking.who_answers()
            raise PeerError(
                f"{self.name} failed on rank {self.rank} of {self.size}{where} in {call}: "
                f"{error}. If another rank failed or is stuck, its own message says why."
                f"{who_answers}",
                rank=self.places.index(lost) if lost in self.places else None,
            ) from error


@functools.cache
def _let_threads_finish_at_exit() -> None:
    """Give gloo's threads a moment before the interpreter ends, once per process.

    They free the tensors of the last collective shortly after its end, and need the interpreter for
    that. If the interpreter is ending, they abort the process.
    """
    atexit.register(time.sleep, 0.05)


def _at(pieces: Sequence[Tensor], index: int, like: Tensor) -> Tensor:
    return pieces[index] if index < len(pieces) else like.new_empty(0)


def _lengths(
    outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[int]], rank: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The lengths that a rank sends to each other rank, and those that it expects."""
    sent = [[piece.numel() for piece in pieces] for pieces in outgoing]
    expected = [list(each) for each in incoming]
    sent[rank], expected[rank] = [], []
    return sent, expected


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _backend(group: dist.ProcessGroup) -> str:
    config = dist.get_backend_config(group)
    return next((name for name in ("nccl", "gloo") if name in config), dist.get_backend(group))
