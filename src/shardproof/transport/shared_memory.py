"""`SharedTransport`: exchanges between processes of one machine through shared memory.

It is set up over an existing process group, and independent of it afterwards. If a rank dies or
does not come in time, every other rank notices it and names it.
"""

import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof import c_modules
from shardproof.error_text import text_of
from shardproof.errors import AxisError, MismatchError, ShardproofError
from shardproof.transport.asking import who_answers
from shardproof.transport.base import (
    Call,
    PeerError,
    Transport,
    compare_pieces,
    name_ranks,
    name_waits,
)
from shardproof.transport.incore import CoreTransport
from shardproof.transport.ledger import Ledger
from shardproof.transport.segment import Peer, find_hosts, layout_of, map_together

# Bytes of a slot: two slots of two ranks fit into a second-level cache.
_SLOT = 128 * 1024
# With three or more ranks, from so many bytes on each rank adds one slice of the message.
_SLICED_FROM = 32 * 1024
# Seconds of a wait after which the observer is called.
_OBSERVED = 0.05
# Seconds after which ranks that wait for each other on two axes are considered deadlocked.
_CERTAIN = 1.0
# Stands for the failed rank if the calls of two ranks differ.
_NOBODY = "nobody"

# The axes of this process, to find ranks that use axes in another order.
_open: "weakref.WeakSet[SharedTransport]" = weakref.WeakSet()


class SharedTransport(CoreTransport):
    """One rank's end of the shared memory of one machine. Made by `connect`."""

    name = "shm"

    def __init__(
        self,
        memory: Any,
        rank: int,
        peers: Sequence[Peer | None],
        *,
        timeout: float,
        observer: Callable[[Call | None], None] | None,
    ) -> None:
        module = c_modules.shm()
        if module is None:
            raise AxisError(f"ranks cannot share memory: {c_modules.problem()}.")
        size = len(peers)
        super().__init__(module, rank, size, sliced_from=_SLICED_FROM if size > 2 else 1 << 62)
        self.ledger = Ledger()
        self._peers = peers
        self.timeout: float = timeout
        self._observer = observer
        self._is_observed = False
        self._elsewhere: tuple[int, str, float] | None = None
        _open.add(self)
        self._core = module.Core(memory, rank, size, _SLOT, self._tick)

    @classmethod
    def connect(
        cls,
        base: Transport,
        *,
        timeout: float,
        observer: Callable[[Call | None], None] | None = None,
    ) -> "SharedTransport":
        """Map shared memory with the ranks of `base`, all of which must call this.

        Args:
            base: a transport between the processes, used here only.
            timeout: seconds that a rank waits for the others in one collective.
            observer: called with the call in which this rank has waited for a while or failed, and
                with None when such a wait is over. Not called for calls that do not wait.

        Raises:
            AxisError: on all ranks, if they cannot share memory; the message says why.
        """
        module = c_modules.shm()
        layout = 0 if module is None else layout_of(module, _SLOT, _SLICED_FROM)
        hosts = find_hosts(base, layout, c_modules.problem() if module is None else None)
        if module is None:
            raise AxisError(f"ranks cannot share memory: {c_modules.problem()}.")
        if base.size > module.MAX_RANKS:
            raise AxisError(
                f"{base.size} ranks cannot share memory; no more than {module.MAX_RANKS} can. Use "
                "transport='gloo'."
            )
        memory = map_together(base, module.area_bytes(base.size, _SLOT))
        peers = [
            None if rank == base.rank else Peer(host.pid, host.began)
            for rank, host in enumerate(hosts)
        ]
        return cls(memory, base.rank, peers, timeout=timeout, observer=observer)

    def fail(self, error: BaseException) -> None:
        """This rank has raised; all ranks that wait for it or come later raise too."""
        what = text_of(error)
        self._tell(f"rank {self.rank} of {self.size} raised {what}", self.rank)

    def close(self) -> None:
        """Close the handles of the other processes; the memory is freed with its last reference."""
        for peer in self._peers:
            if peer is not None:
                peer.close()

    def exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[int]],
        *,
        rounds: int,
        like: Tensor,
        call: Call,
    ) -> list[list[Tensor]]:
        """Exchange one piece per pair and round, directly between the tensors."""
        lengths = [[piece.numel() for piece in pieces] for pieces in outgoing]
        lengths[self.rank] = []
        expected = [list(each) if rank != self.rank else [] for rank, each in enumerate(incoming)]
        lengths_by_rank = self.gather_objects((lengths, expected), call=call)
        compare_pieces(lengths_by_rank, call)
        width = like.element_size()
        received = [[like.new_empty(length) for length in each] for each in expected]
        for index in range(max(len(each) for sent, _ in lengths_by_rank for each in sent)):
            send = [
                pieces[index].contiguous() if index < len(sizes) else like.new_empty(0)
                for pieces, sizes in zip(outgoing, lengths, strict=True)
            ]
            receive = [
                pieces[index] if index < len(pieces) else like.new_empty(0) for pieces in received
            ]
            longest = max(
                each[index] for sent, _ in lengths_by_rank for each in sent if index < len(each)
            )
            self._swap(send, receive, longest * width, call)
        return received

    def _swap(
        self, send: Sequence[Tensor], receive: Sequence[Tensor], longest: int, call: Call
    ) -> None:
        """Send one piece to each rank and receive one; no piece is longer than `longest`."""
        self._begin(call)
        try:
            self._core.exchange(
                tuple(x.data_ptr() for x in send),
                tuple(x.numel() * x.element_size() for x in send),
                tuple(x.data_ptr() for x in receive),
                tuple(x.numel() * x.element_size() for x in receive),
                longest,
                call.digest,
            )
        except BaseException as error:
            self._explain(error, str(call))
        if self._is_noted:
            self._forget()

    def gather_objects(self, value: Any, *, call: Call) -> list[Any]:
        """Every rank's value, pickled."""
        message = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        mine = torch.tensor([message.numel()], device="cpu")
        lengths = mine.new_empty(self.size)
        gathering = self._learn_gathering(None, 8, [1] * self.size, call, 1, "tells")
        self._gather(mine.data_ptr(), lengths.data_ptr(), 1, gathering)
        sizes: list[int] = lengths.tolist()
        messages = message.new_empty(sum(sizes))
        gathering = self._learn_gathering(None, 1, sizes, call, 1, "tells")
        self._gather(message.data_ptr(), messages.data_ptr(), 1, gathering)
        return [pickle.loads(part.numpy()) for part in messages.split(sizes)]

    def _tick(self, waited: float, missing: list[int]) -> None:
        reason = self._core.broken_because()
        if reason is not None:
            self._observe()
            blamed_rank, _, message = reason.partition("\n")
            if blamed_rank == _NOBODY:
                raise MismatchError(message)
            raise PeerError(message, rank=int(blamed_rank))
        if waited > _OBSERVED:
            self._observe()
        if not self._is_noted:
            self._is_noted = True
            self._core.note(str(self._call).encode())
        self._look_elsewhere(waited, missing)
        for rank in missing:
            peer = self._peers[rank]
            # In this order, because a collective that it joined before it ended is complete.
            if peer is not None and peer.has_ended() and self._core.is_missing(rank):
                self._break(
                    f"rank {rank} of {self.size} is gone, its process {peer.pid} has ended: "
                    f"{self._waits(missing)}",
                    rank,
                )
        if missing and waited >= self.timeout:
            waits = self._waits(missing)
            answers, _ = who_answers()  # they may wait for another host
            self._break(
                f"{name_ranks(missing)} of {self.size} did not come within {self.timeout:g} s: "
                f"{waits}{answers and f'.{answers}'}",
                missing[0],
            )

    def _look_elsewhere(self, waited: float, missing: Sequence[int]) -> None:
        """Raise if a missing rank waits on another axis for this one, which is a deadlock.

        Both axes are then marked as failed, so that the other rank raises too, whichever of the two
        notices it first.
        """
        elsewhere = next(filter(None, (self._place_elsewhere(rank) for rank in missing)), None)
        if elsewhere is None or self._elsewhere is None or self._elsewhere[:2] != elsewhere[:2]:
            self._elsewhere = None if elsewhere is None else (*elsewhere[:2], waited)
        elif waited - self._elsewhere[2] >= _CERTAIN:
            rank, note, other = elsewhere
            calls = sorted(((self.rank, str(self._call)), (rank, note)))
            sides = "; ".join(f"rank {number}: {call}" for number, call in calls)
            message = (
                f"the ranks disagree about one collective. {sides}, on two axes. All ranks must "
                "use their axes in the same order."
            )
            # Both ranks make the same message, so it does not matter which one marks an axis first.
            for each in (self, other):
                each._tell(message, _NOBODY)
            raise MismatchError(message)

    def _place_elsewhere(self, rank: int) -> "tuple[int, str, SharedTransport] | None":
        """The rank, the call in which it waits on another axis of this thread, and that axis."""
        peer = self._peers[rank]
        for other in tuple(_open):
            if other is self or other._thread not in (None, threading.get_ident()):
                continue
            if other._core.broken_because() is not None:
                continue  # the ranks that waited there have raised
            notes = other._core.notes()
            for place, each in enumerate(other._peers):
                if peer is not None and each is not None and each.pid == peer.pid and notes[place]:
                    return rank, notes[place], other
        return None

    def _waits(self, missing: Sequence[int]) -> str:
        """The calls in which ranks wait, as far as they are known."""
        notes = enumerate(self._core.notes())
        return name_waits({rank: note for rank, note in notes if note and rank not in missing})

    def _break(self, message: str, blamed_rank: int) -> None:
        """Tell the others and raise; if another rank was first, raise its message."""
        self._observe()
        if not self._tell(message, blamed_rank):
            self._tick(0.0, [])
        raise PeerError(message, rank=blamed_rank)

    def _tell(self, message: str, blamed_rank: int | str) -> bool:
        return bool(self._core.break_off(f"{blamed_rank}\n{message}".encode()))

    def _abandon(self, error: BaseException) -> None:
        if not isinstance(error, ShardproofError):
            self.fail(error)

    def _observe(self) -> None:
        if self._observer is not None and not self._is_observed:
            self._is_observed = True
            self._observer(self._call)

    def _forget(self) -> None:
        super()._forget()
        self._elsewhere = None
        self._core.note(b"")
        if self._is_observed and self._observer is not None:
            self._is_observed = False
            self._observer(None)
