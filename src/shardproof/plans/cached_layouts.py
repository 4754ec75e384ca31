"""Layouts and head counts, cached because many layers have the same sizes."""

import functools

from shardproof.heads import Heads
from shardproof.leaves import Cut, Layout
from shardproof.tree import nodes_of_run

_CACHE_SIZE = 1024


@functools.lru_cache(_CACHE_SIZE)
def layouts(
    shape: tuple[int, ...],
    degree: int,
    dim: int | None,
    cut: Cut | None,
    held: tuple[range, ...] | None,
) -> tuple[Layout, ...]:
    """The layout of one parameter on every rank."""
    return tuple(
        Layout(shape, rank, dim, cut, None if held is None or dim is None else held[rank])
        for rank in range(degree)
    )


@functools.lru_cache(_CACHE_SIZE)
def heads_of(queries: int, keys: int, head_dim: int, leaves: int, degree: int) -> Heads:
    """One `Heads` for all layers with these sizes; it caches its cuts."""
    return Heads(queries, keys, head_dim, leaves, degree)


@functools.lru_cache(_CACHE_SIZE)
def held_keys(heads: Heads) -> tuple[range, ...]:
    """Key-value heads that each rank holds."""
    return tuple(heads.held(rank) for rank in range(heads.degree))


@functools.lru_cache(_CACHE_SIZE)
def shared_keys(heads: Heads) -> tuple[int, ...]:
    """Key-value heads that several ranks hold."""
    return heads.shared()


@functools.lru_cache(_CACHE_SIZE)
def gradient_parts(heads: Heads, is_invariant: bool) -> tuple[int, ...]:
    """By rank, elements per token of the gradients of heads that several ranks hold."""
    counts = []
    for rank in range(heads.degree):
        runs = [heads.served(key, rank) for key in shared_keys(heads)]
        if is_invariant:
            nodes = sum(len(nodes_of_run(heads.group, run)) for run in runs)
        else:
            nodes = sum(1 for run in runs if run)
        counts.append(2 * nodes * heads.head_dim)  # of keys and of values
    return tuple(counts)
