"""Evaluate which units need which shared units, after a forward was watched."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardproof.watching.atoms import Atoms, Labels
from shardproof.watching.record import Record, unique_pairs


@dataclass(frozen=True)
class Needs:
    """Flags and pairs over the roots of labels.

    Attributes:
        pairs: (n, 2), a unit and a shared unit that it needs.
        is_needed: by label, whether its root is a shared unit.
        is_whole: by label, whether some operation needs all labels of its kind, so that every rank
            must hold them.
    """

    pairs: Labels
    is_needed: NDArray[np.bool_]
    is_whole: NDArray[np.bool_]


def settle_needs(record: Record) -> Needs:
    """Join labels that only one unit needs with that unit; find shared and whole units.

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
        # Nothing is joined with a unit that every rank must hold.
        lonely = lonely[~whole[lonely[:, 0]]]
        if not len(lonely):
            break
        atoms.join(lonely[:, 0], lonely[:, 1])
    pairs = _closed(pairs)
    is_needed = np.zeros(len(atoms), dtype=bool)
    is_needed[pairs[:, 1]] = True
    return Needs(pairs, is_needed, whole)


def coarsen(record: Record, dims: list[Labels], needs: Needs) -> bool:
    """Join units with a shared unit that they need, if the shared unit has more labels.

    Example: each feature of a gate needs the head that it scales, so the head becomes the unit. A
    key-value head stays shared, because its query heads have more labels. Nothing is joined if only
    one unit would remain.

    Args:
        record: the record of the forward.
        dims: for each dim of each parameter its distinct roots.
        needs: the needs of the record.
    Returns:
        Whether anything was joined.
    """
    atoms, pairs = record.atoms, needs.pairs[~needs.is_whole[needs.pairs[:, 1]]]
    if not len(pairs):
        return False
    beside = Atoms()  # joins units that lie in one dim
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
    """By label, whether some operation gathers it or sums over it."""
    atoms: Atoms = record.atoms
    whole = np.zeros(len(atoms), dtype=bool)
    checked_ids: set[int] = set()
    for operation in record.operations:
        if operation.what in ("gather", "sum", "weight") and id(operation.atoms) not in checked_ids:
            checked_ids.add(id(operation.atoms))
            whole[atoms.roots(operation.atoms)] = True
    return whole


def _closed(pairs: Labels) -> Labels:
    """The transitive closure of the pairs: a unit also needs what its shared units need."""
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
