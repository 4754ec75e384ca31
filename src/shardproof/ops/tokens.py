"""Gathers, scatters and sums for activations that are cut along their tokens.

Between two blocks each rank has all features of its own tokens. Before a column layer the tokens
are gathered, and after a row layer each rank gets the sum of its own. A gradient that sums over
tokens (of a norm's weight) is summed in the order that it has without this cut: ranks exchange
tokens for features, and each sums some features over all tokens.

Source: Korthikanti et al. 2022 (arXiv 2205.05198, section 4.2.2), sequence parallelism.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardproof import comm, operators, recut
from shardproof.comm.split import Split
from shardproof.leaves import Cut
from shardproof.numerics.sums import sum_batch_rows


@dataclass(frozen=True)
class _Gathered:
    """An input of column layers with all its tokens.

    Attributes:
        key: what tells the memory of the input.
        direction: in which it was gathered.
        split: of its tokens.
        x: the input, so that its memory is not used for another.
        whole: with all tokens.
    """

    key: tuple[Any, ...]
    direction: str
    split: Split
    x: Tensor
    whole: Tensor


class _Last(threading.local):
    """State of one thread: the input that was gathered last."""

    gathered: _Gathered | None = None


_last = _Last()


def forget_input() -> None:
    """Give the memory of the last input back: after a forward, and after a backward."""
    _last.gathered = None


@dataclass(frozen=True)
class TokenCut:
    """The cut of the tokens of one activation (B, T, *).

    Attributes:
        split: of the T tokens over the ranks.
    """

    split: Split

    def gather(self, x: Tensor, direction: str) -> Tensor:
        """All tokens on every rank.

        Args:
            x: (B, own tokens, n), Shard(1).
            direction: for the ledger.
        Returns:
            (B, T, n), Replicate.
        Comm:
            `direction` one all_gather of (B, T, n).
        """
        return self.split.gather(x.contiguous(), direction, dim=1)

    def gather_input(self, x: Tensor, direction: str) -> Tensor:
        """All tokens of the input of column layers, which gather one input once, not once each.

        The last input is kept with all its tokens, until `forget_input`.

        Args:
            x: (B, own tokens, n), Shard(1).
            direction: for the ledger.
        Returns:
            (B, T, n), Replicate; it must not be written.
        Comm:
            `direction` one all_gather of (B, T, n), for the first of several layers in a row.
        """
        if operators.is_recorded(x):
            return self.gather(x, direction)
        last = _last.gathered
        key = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x._version)
        if last is None or (last.key, last.direction, last.split) != (key, direction, self.split):
            if direction == "backward" and torch._C._current_graph_task_id() >= 0:
                torch.autograd.Variable._execution_engine.queue_callback(forget_input)
            whole = self.gather(x, direction)
            last = _last.gathered = _Gathered(key, direction, self.split, x, whole)
        return last.whole

    def shown_whole(self, x: Tensor) -> Tensor:
        """A tensor on the meta device with the shape of `x` when all its tokens are there.

        Args:
            x: (B, own tokens, n), Shard(1).
        """
        return torch.empty((x.shape[0], self.split.cut.size, x.shape[2]), device="meta")

    def scatter(
        self,
        parts: Sequence[Tensor],
        of: Split,
        *,
        shape: tuple[int, int],
        like: Tensor,
        direction: str,
        who: str = "",
    ) -> Tensor:
        """The sum of the ranks' parts, of which each rank gets its own tokens.

        Args:
            parts: (B * T, n), what a rank gives to the sum over `of`.
            of: the dim that is summed over.
            shape: (B * T, n).
            like: any tensor of the result's dtype and device.
            direction: for the ledger.
            who: name of the caller; default: the name of the dim that is summed over.
        Returns:
            (B, own tokens, n), Shard(1).
        Comm:
            `direction` one reduce_scatter of (B, T, n).
        """
        tokens = self.split.cut.size
        whole = (shape[0] // tokens, tokens, shape[1])
        into = comm.ShardOf(whole, 1, self.split.cut)
        return of.sum_scatter(
            [part.view(whole) for part in parts], into=into, like=like, direction=direction, who=who
        )

    def sum_rows(self, terms: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
        """The sum over all rows of all ranks, in the order that they have without this cut.

        Args:
            terms: (B * own tokens, n), Shard(0).
            batch: B.
            dtype: of the result.
        Returns:
            (n,), Replicate.
        Comm:
            backward one exchange of (B * T, n), and one all_gather of (n).
        """
        split, axis = self.split, self.split.axis
        width, tokens = terms.shape[1], split.cut.size
        rows = Cut(tokens * batch, split.cut.leaves, axis.size, batch, runs=split.cut.runs)
        columns = Cut(width, axis.size, axis.size)
        by_token = terms.view(batch, -1, width).transpose(0, 1).reshape(-1, width)
        turned = recut.to_columns(
            by_token, axis, rows=rows, columns=columns, direction="backward", who=split.name
        )
        ordered = turned.view(tokens, batch, -1).transpose(0, 1).reshape(tokens * batch, -1)
        mine = sum_batch_rows(ordered, dtype=dtype)
        return comm.all_gather(mine, axis, dim=0, cut=columns, direction="backward", who=split.name)
