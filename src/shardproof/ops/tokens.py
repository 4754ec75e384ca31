"""Gathers, scatters and sums for activations that are cut along their tokens.

Between two blocks each rank has all features of its own tokens. Before a column layer the tokens
are gathered, and after a row layer each rank gets the sum of its own. A gradient that sums over
tokens (of a norm's weight) is summed in the order that it has without this cut: ranks exchange
tokens for features, and each sums some features over all tokens.

Source: Korthikanti et al. 2022 (arXiv 2205.05198, section 4.2.2), sequence parallelism.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof import comm, recut
from shardproof.comm.split import Split
from shardproof.leaves import Cut
from shardproof.numerics.sums import sum_batch_rows


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

    def scatter(
        self,
        parts: Sequence[Tensor],
        of: Split,
        *,
        shape: tuple[int, int],
        like: Tensor,
        direction: str,
    ) -> Tensor:
        """The sum of the ranks' parts, of which each rank gets its own tokens.

        Args:
            parts: (B * T, n), what a rank gives to the sum over `of`.
            of: the dim that is summed over.
            shape: (B * T, n).
            like: any tensor of the result's dtype and device.
            direction: for the ledger.
        Returns:
            (B, own tokens, n), Shard(1).
        Comm:
            `direction` one reduce_scatter of (B, T, n).
        """
        tokens = self.split.cut.size
        whole = (shape[0] // tokens, tokens, shape[1])
        into = comm.ShardOf(whole, 1, self.split.cut)
        return of.sum_scatter(
            [part.view(whole) for part in parts], into=into, like=like, direction=direction
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
