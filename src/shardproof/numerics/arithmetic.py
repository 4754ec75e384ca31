"""How tensors are multiplied and added: with the same bits at every degree, or as fast as torch.

`INVARIANT` and `NATIVE` have one interface, and a cut dim chooses one of them once
(`arithmetic_of`). Plain tensors; no ranks, no autograd.

What a rank gives to a sum over the ranks are its *parts*: one tensor for each canonical node of its
leaves (invariant), or one tensor of all that it owns (native).
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof.leaves import OwnedLeaves
from shardproof.numerics import dim_sums, matmul, mode, softmax_and_norms
from shardproof.numerics.batched_products import batched_product, product_by_head
from shardproof.numerics.summed_products import joined_nodes
from shardproof.numerics.sums import sum_batch_rows, sum_rows, sum_squares_rows
from shardproof.scheme import Scheme
from shardproof.tree import Node, add_run, add_tensors, combine, nodes_of_run

Pair = tuple[Tensor, Tensor]


class Term(Protocol):
    """One product `a @ b` of a sum of products over a cut dim."""

    def by_leaf(self) -> Iterable[tuple[Pair, tuple[slice, ...]]]:
        """Pairs to multiply, and for each where its steps of every owned leaf lie in it."""

    def owned(self) -> Pair:
        """The pair of what this rank owns."""


class Arithmetic(ABC):
    """Products and sums of what one rank has. `slices` say where leaves lie along the cut dim."""

    is_invariant: bool

    @abstractmethod
    def require(self) -> None:
        """Raise unless this process can promise the bits.

        Raises:
            NumericsError: it cannot.
        """

    @abstractmethod
    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, slices: Sequence[slice]
    ) -> Tensor:
        """`x @ weight.T + bias`, of a weight (n, K) that is cut along n: (M, n)."""

    @abstractmethod
    def product_columns(
        self, a: Tensor, b: Tensor, slices: Sequence[slice], *, over_batch: bool = False
    ) -> Tensor:
        """`a @ b`, (M, K) by (K, n), cut along n: (M, n). `over_batch`: K are rows of a batch."""

    @abstractmethod
    def product_rows(
        self, a: Tensor, b: Tensor, slices: Sequence[slice], *, over_batch: bool = False
    ) -> Tensor:
        """`a @ b`, (n, M) by (M, K), cut along n: (n, K). `over_batch`: M are rows of a batch."""

    @abstractmethod
    def product_parts(
        self, a: Tensor, b: Tensor, leaves: OwnedLeaves, *, is_transposed: bool = False
    ) -> list[Tensor]:
        """The parts of `a @ b`, contracted over the cut dim.

        Args:
            a: (M, held).
            b: (held, N), or (N, held) if `is_transposed`: then `a @ b.T`.
            leaves: that this rank owns of the contracted dim.
            is_transposed: how `b` is given.
        """

    @abstractmethod
    def joined_parts(self, terms: Sequence[Term], leaves: OwnedLeaves) -> list[Tensor]:
        """The parts of a sum of products, added from the first term to the last."""

    @abstractmethod
    def blocks(self, leaves: OwnedLeaves) -> tuple[slice, ...]:
        """Where the runs lie that are summed one by one: leaves, or all that the rank owns."""

    @abstractmethod
    def parts(self, blocks: Iterable[Tensor], leaves: OwnedLeaves) -> list[Tensor]:
        """The parts of a sum, from the sum of each block."""

    @abstractmethod
    def nodes(self, num_leaves: int, run: range) -> list[Node]:
        """What a rank that owns `run` of some leaves adds by itself."""

    @abstractmethod
    def add(self, node: Node, values: Mapping[Node, Tensor]) -> Tensor:
        """The sum of `node` from the nodes inside of it."""

    @abstractmethod
    def sum_rows(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """(M, N) to (N,); without a dtype in that of `x`."""

    @abstractmethod
    def sum_batch_rows(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """`sum_rows` over the rows of a batch."""

    @abstractmethod
    def sum_squares_rows(self, x: Tensor) -> Tensor:
        """The squares of (M, N), summed to (N,)."""

    @abstractmethod
    def fold(
        self, x: Tensor, dims: tuple[int, ...], *, keepdim: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """The sum over dims that are not cut, counted from the front."""

    @abstractmethod
    def expand(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """`x` broadcast to `shape`, with a gradient that is summed in this arithmetic."""

    @abstractmethod
    def log_softmax(self, x: Tensor) -> Tensor:
        """Over the last dim."""

    @abstractmethod
    def product_by_head(
        self, a: Tensor, b: Tensor, *, rows: int, serving: Sequence[int] | None = None,
        is_transposed: bool = False, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`a[n, h] @ b[n, serving[h]]` for every n and h (`numerics/batched_products.py`)."""


class _Invariant(Arithmetic):
    """The same bits at every degree."""

    is_invariant = True
    sum_rows = staticmethod(sum_rows)
    sum_batch_rows = staticmethod(sum_batch_rows)
    sum_squares_rows = staticmethod(sum_squares_rows)
    linear = staticmethod(matmul.linear)
    product_columns = staticmethod(matmul.product_columns)
    product_rows = staticmethod(matmul.product_rows)
    expand = staticmethod(dim_sums.expand)
    product_by_head = staticmethod(product_by_head)

    def require(self) -> None:
        mode.require_invariant()

    def product_parts(
        self, a: Tensor, b: Tensor, leaves: OwnedLeaves, *, is_transposed: bool = False
    ) -> list[Tensor]:
        nodes = matmul.product_nodes(
            a,
            b,
            leaves.slices,
            run=leaves.run,
            num_leaves=leaves.num_leaves,
            is_transposed=is_transposed,
        )
        return list(nodes.values())

    def joined_parts(self, terms: Sequence[Term], leaves: OwnedLeaves) -> list[Tensor]:
        pairs, slices = [], []
        for term in terms:
            for pair, where in term.by_leaf():
                pairs.append(pair)
                slices.append(where)
        nodes = joined_nodes(pairs, slices, run=leaves.run, num_leaves=leaves.num_leaves)
        return list(nodes.values())

    def blocks(self, leaves: OwnedLeaves) -> tuple[slice, ...]:
        return leaves.slices

    def parts(self, blocks: Iterable[Tensor], leaves: OwnedLeaves) -> list[Tensor]:
        return list(add_run(blocks, leaves.run, leaves.num_leaves).values())

    def nodes(self, num_leaves: int, run: range) -> list[Node]:
        return nodes_of_run(num_leaves, run)

    def add(self, node: Node, values: Mapping[Node, Tensor]) -> Tensor:
        return combine(node, values, add_tensors)

    def fold(
        self, x: Tensor, dims: tuple[int, ...], *, keepdim: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        return dim_sums.total(x, dims, keepdim=keepdim, dtype=dtype)

    def log_softmax(self, x: Tensor) -> Tensor:
        return softmax_and_norms.log_softmax(x, -1)


class _Native(Arithmetic):
    """One product per rank, and torch's own sums."""

    is_invariant = False
    product_by_head = staticmethod(batched_product)

    def require(self) -> None:
        """Nothing is promised."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, slices: Sequence[slice]
    ) -> Tensor:
        return F.linear(x, weight, bias)

    def product_columns(
        self, a: Tensor, b: Tensor, slices: Sequence[slice], *, over_batch: bool = False
    ) -> Tensor:
        return a @ b

    def product_rows(
        self, a: Tensor, b: Tensor, slices: Sequence[slice], *, over_batch: bool = False
    ) -> Tensor:
        return a @ b

    def product_parts(
        self, a: Tensor, b: Tensor, leaves: OwnedLeaves, *, is_transposed: bool = False
    ) -> list[Tensor]:
        if not leaves.is_all:
            own = leaves.own
            a, b = a[:, own], b[:, own] if is_transposed else b[own]
        return [F.linear(a, b) if is_transposed else a @ b]

    def joined_parts(self, terms: Sequence[Term], leaves: OwnedLeaves) -> list[Tensor]:
        first, *more = (term.owned() for term in terms)
        total = torch.mm(*first)
        for a, b in more:
            total.addmm_(a, b)
        return [total]

    def blocks(self, leaves: OwnedLeaves) -> tuple[slice, ...]:
        return (leaves.own,)

    def parts(self, blocks: Iterable[Tensor], leaves: OwnedLeaves) -> list[Tensor]:
        return list(blocks)

    def nodes(self, num_leaves: int, run: range) -> list[Node]:
        return [(run.start, run.stop)] if run else []

    def add(self, node: Node, values: Mapping[Node, Tensor]) -> Tensor:
        inside = [values[part] for part in sorted(values) if node[0] <= part[0] < node[1]]
        return functools.reduce(torch.add, inside)

    def sum_rows(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        return x.sum(0, dtype=dtype)

    def sum_batch_rows(self, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        return x.sum(0, dtype=dtype)

    def sum_squares_rows(self, x: Tensor) -> Tensor:
        return x.square().sum(0)

    def fold(
        self, x: Tensor, dims: tuple[int, ...], *, keepdim: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        return x.sum(dims, keepdim=keepdim, dtype=dtype)

    def expand(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.expand(torch.Size(shape))

    def log_softmax(self, x: Tensor) -> Tensor:
        return torch.log_softmax(x, -1)


INVARIANT: Arithmetic = _Invariant()
NATIVE: Arithmetic = _Native()


def arithmetic_of(scheme: Scheme) -> Arithmetic:
    """The arithmetic that a scheme asks for."""
    return INVARIANT if scheme.is_invariant else NATIVE
