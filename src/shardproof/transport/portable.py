"""The sum in a given order without the C core: an all-to-all and a gather.

Each rank receives its slice of every part, adds it up in the given order, and the slices are
gathered. At one part per rank the bytes are those of a ring; no buffer is larger than the message.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardproof.errors import ShapeError, UsageError
from shardproof.leaves import share
from shardproof.transport.base import Call, Order, Pending, Transport, Window, name_ranks
from shardproof.wording import dtype_name

NARROW = (torch.bfloat16, torch.float16)
SUMMABLE = (
    torch.float64,
    torch.float32,
    *NARROW,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
)


class PortableSum(Pending):
    """One sum on one rank.

    Args:
        transport: the transport that gathers the slices, if every rank gets the whole sum.
        parts, order, out, call, windows: as for `Transport.start_sum`.
    """

    def __init__(
        self,
        transport: Transport,
        parts: Sequence[Tensor],
        order: Order,
        out: Tensor,
        call: Call,
        windows: Sequence[Window] | None,
    ) -> None:
        self.dtype = check(transport, parts, order, out, call, windows)
        self._transport = transport
        self._parts = parts
        self._order = order
        self._out = out
        self._call = call
        self._windows = windows
        self._bounds = share(out.numel(), transport.size)
        self.receive: Callable[[], list[list[Tensor]]] | None = None

    @property
    def like(self) -> Tensor:
        """Any tensor with the dtype and device of the parts."""
        return self._out.new_empty(0, dtype=self.dtype)

    @property
    def rounds(self) -> int:
        """The largest number of parts of a rank."""
        return max(self._order.counts)

    def outgoing(self) -> list[list[Tensor]]:
        """For each other rank, its slices of this rank's parts."""
        ranks = range(self._transport.size)
        mine = self._transport.rank
        return [
            [self._piece(part, rank) for part in self._parts] if rank != mine else []
            for rank in ranks
        ]

    def incoming(self) -> list[list[int]]:
        """For each other rank, the lengths of the slices that it sends."""
        mine = self._transport.rank
        length = len(self._bounds[mine]) if self._windows is None else self._windows[mine].numel
        return [
            [length] * count if rank != mine else []
            for rank, count in enumerate(self._order.counts)
        ]

    def wait(self) -> None:
        """Take the received slices, finish this rank's slice and gather all slices."""
        if self.receive is None:
            raise UsageError("a sum is waited for that was not started, or twice.")
        received, self.receive = self.receive(), None
        mine = self._transport.rank
        received[mine] = [self._piece(part, mine) for part in self._parts]
        total = add_up(self._order, [part for pieces in received for part in pieces])
        total = total.to(self._out.dtype)
        if self._windows is not None:
            self._out.copy_(total)
            return
        sizes = [len(bound) for bound in self._bounds]
        self._transport.gather_slices(total, self._out, sizes, call=self._call)

    def _piece(self, part: Tensor, rank: int) -> Tensor:
        if self._windows is None:
            bound = self._bounds[rank]
            return part[bound.start : bound.stop]
        window = self._windows[rank]
        whole = part.view(window.outer, window.size, window.inner)
        return whole[:, window.start : window.stop].reshape(-1)


def add_up(order: Order, parts: Sequence[Tensor]) -> Tensor:
    """The sum of all ranks' parts; for 16-bit parts it is computed and returned in float32.

    Complex numbers are added as pairs of reals, because torch multiplies by one first, which turns
    infinity into NaN.

    Args:
        order: the order of the additions.
        parts: the parts by number.
    """
    if parts[0].is_complex():
        return torch.view_as_complex(add_up(order, [torch.view_as_real(part) for part in parts]))
    stack: list[tuple[Tensor, bool]] = []  # and whether we may write to it
    for step in order.program:
        if step >= 0:
            part = parts[step]
            is_narrow = part.dtype in NARROW
            stack.append((part.float() if is_narrow else part, is_narrow))
            continue
        (right, _), (left, is_ours) = stack.pop(), stack.pop()
        stack.append((left.add_(right) if is_ours else left + right, True))
    return stack.pop()[0]


def check(
    transport: Transport,
    parts: Sequence[Tensor],
    order: Order,
    out: Tensor,
    call: Call,
    windows: Sequence[Window] | None,
) -> torch.dtype:
    """Raise unless this rank's arguments of a sum fit each other.

    Returns:
        The dtype of the parts.
    """
    where = f"{call}: rank {transport.rank} of {transport.size}"
    order.check(transport.size)
    if len(parts) != order.counts[transport.rank]:
        raise ShapeError(
            f"{where} gives {len(parts)} parts, but {name_ranks([transport.rank])} adds "
            f"{order.counts[transport.rank]} by the order. Give one tensor for each."
        )
    numel = out.numel()
    if windows is not None:
        numel = _check_windows(where, transport, out, windows)
    dtype = parts[0].dtype if parts else torch.float32 if out.dtype in NARROW else out.dtype
    for x in (*parts, out):
        length = out.numel() if x is out else numel
        if x.dim() != 1 or x.numel() != length or not x.is_contiguous():
            raise ShapeError(
                f"{where} gives a tensor of shape {tuple(x.shape)} and strides {x.stride()} "
                f"where ({length},), contiguous, is wanted. Use x.contiguous().view(-1)."
            )
    check_dtypes(where, [part.dtype for part in parts] or [dtype], out.dtype)
    return dtype


def check_gather(
    transport: Transport, x: Tensor, out: Tensor, sizes: Sequence[int], call: Call, outer: int
) -> None:
    """Raise unless this rank's arguments of a gather fit each other."""
    if x.numel() != outer * sizes[transport.rank] or out.numel() != outer * sum(sizes):
        raise ShapeError(
            f"{call}: rank {transport.rank} has {x.numel()} elements and room for {out.numel()}, "
            f"but the ranks' sizes are {list(sizes)}, in {outer} rows."
        )


def check_dtypes(where: str, parts: Sequence[torch.dtype], out: torch.dtype) -> None:
    """Raise unless parts of these dtypes can be added into `out`."""
    for dtype in (*parts, out):
        if dtype not in SUMMABLE:
            dtype_names = ", ".join(dtype_name(each) for each in SUMMABLE)
            raise UsageError(
                f"{where} wants to add {dtype}, which has no sum over ranks. Convert it first: "
                f"x.to(dtype) to one of {dtype_names}."
            )
    narrows = parts[0] is torch.float32 and out in NARROW
    if len(set(parts)) > 1 or (parts[0] is not out and not narrows):
        raise UsageError(
            f"{where} gives parts of {', '.join(map(str, parts))} for a sum of {out}. All have "
            "one dtype, or the parts are float32 and the sum is bfloat16 or float16."
        )


def _check_windows(where: str, transport: Transport, out: Tensor, windows: Sequence[Window]) -> int:
    """Raise unless there is one window per rank and `out` fits ours; return a part's length."""
    forms = {(each.outer, each.size, each.inner) for each in windows}
    fits = all(0 <= each.start <= each.stop <= each.size for each in windows)
    if len(windows) != transport.size or len(forms) != 1 or not fits:
        raise ShapeError(
            f"{where} has the windows {list(windows)}. There must be one for each rank, inside "
            "one (outer, size, inner)."
        )
    mine = windows[transport.rank]
    if out.numel() != mine.numel:
        raise ShapeError(
            f"{where} has room for {out.numel()} elements, and its window {mine} has {mine.numel}."
        )
    return mine.outer * mine.size * mine.inner
