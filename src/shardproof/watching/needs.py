"""Which units need which shared units, once a forward has been watched."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardproof.watching.atoms import Atoms, Labels
from shardproof.watching.record import Record, unique_pairs


@dataclass(frozen=True)
class Needs:
    """Flags and pairs over the roots of labels.

    Attributes:
        pairs: (n, 2): a unit and a shared unit that it needs.
        is_needed: by label: whether its root is a shared unit.
        is_whole: by label: whether some operation needs all of its kind, so that every rank has it.
    """

    pairs: Labels
    is_needed: NDArray[np.bool_]
    is_whole: NDArray[np.bool_]


def settle_needs(record: Record) -> Needs:
    """Join what only one unit needs with it; tell shared units and whole ones.

    Labels must not be joined afterwards.
    """
    atoms = record.atoms
    pairs = np.concatenate([np.zeros((0, 2), dtype=np.int64), *record.needs])
    while True:
        whole = _whole(record)
        pairs = atoms.roots(pairs)
        pairs = unique_pairs(pairs[pairs[:, 0] != pairs[:, 1]])
        shared, counts = np.unique(pairs[:, 1], return_counts=True)
        once = shared[(counts == 1) & ~whole[shared]]
        lonely = pairs[np.isin(pairs[:, 1], once)]
        # The unit itself may be needed; only one that is not is a place to join.
        lonely = lonely[~whole[lonely[:, 0]]]
        if not len(lonely):
            break
        atoms.join(lonely[:, 0], lonely[:, 1])
    pairs = _closed(pairs)
    is_needed = np.zeros(len(atoms), dtype=bool)
    is_needed[pairs[:, 1]] = True
    return Needs(pairs, is_needed, whole)


def coarsen(record: Record, dims: list[Labels], needs: Needs) -> bool:
    """Join units with the shared unit that they need, where that one is the larger part.

    The features of a gate each need the head that they scale: the head is the unit. A key-value
    head stays shared: the query heads that need it are larger. Never where it would leave one unit.

    Args:
        record: of the forward.
        dims: roots along every dim of every parameter, each once.
        needs: of the record.
    Returns:
        Whether anything was joined.
    """
    atoms, pairs = record.atoms, needs.pairs[~needs.is_whole[needs.pairs[:, 1]]]
    if not len(pairs):
        return False
    beside = Atoms()  # units that lie in one dim
    beside.fresh(len(atoms))
    for units in dims:
        units = units[~needs.is_whole[units] & ~needs.is_needed[units]]
        if len(units):
            beside.join(units, np.full_like(units, units[0]))
    pairs = pairs[np.argsort(pairs[:, 1], kind="stable")]
    shared, starts = np.unique(pairs[:, 1], return_index=True)
    private = np.add.reduceat(atoms.sizes(pairs[:, 0]), starts)
    is_needer = np.isin(shared, pairs[:, 0])
    large = (atoms.sizes(shared) >= private) | is_needer
    group = beside.roots(pairs[starts, 0])
    groups, counts = np.unique(group[large], return_counts=True)
    several = np.isin(group, groups[counts > 1])
    chosen = pairs[np.isin(pairs[:, 1], shared[large & several])]
    atoms.join(chosen[:, 0], chosen[:, 1])
    return bool(len(chosen))


def _whole(record: Record) -> NDArray[np.bool_]:
    """Labels that some operation gathers or adds up over."""
    atoms: Atoms = record.atoms
    whole = np.zeros(len(atoms), dtype=bool)
    done: set[int] = set()
    for operation in record.seen:
        if operation.what in ("gather", "sum", "weight") and id(operation.atoms) not in done:
            done.add(id(operation.atoms))
            whole[atoms.roots(operation.atoms)] = True
    return whole


def _closed(pairs: Labels) -> Labels:
    """With what a shared unit needs itself."""
    while len(pairs):
        middle = np.isin(pairs[:, 1], pairs[:, 0])
        if not middle.any():
            break
        left = pairs[middle]
        right = pairs[np.isin(pairs[:, 0], left[:, 1])]
        order = np.argsort(right[:, 0], kind="stable")
        right = right[order]
        low = np.searchsorted(right[:, 0], left[:, 1], side="left")
        high = np.searchsorted(right[:, 0], left[:, 1], side="right")
        first = np.repeat(left[:, 0], high - low)
        where = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
        longer = np.stack([first, right[where, 1]], axis=1)
        longer = longer[longer[:, 0] != longer[:, 1]]
        grown = unique_pairs(np.concatenate([pairs, longer]))
        if len(grown) == len(pairs):
            break
        pairs = grown
    return pairs
