"""`Atoms`: a union-find over labels, which works on whole arrays at once.

An *atom* is the label of one index of one dim of one parameter. Label 0 means "no label". The root
of a set of atoms is the smallest of them, so that the result does not depend on the order of joins.
"""

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


def distinct(labels: Labels) -> Labels:
    """The distinct labels, ascending. A stable sort is fast here, as labels are mostly sorted."""
    ordered = np.sort(labels, axis=None, kind="stable")
    if ordered.size < 2:
        return ordered
    is_first = np.empty(ordered.size, dtype=bool)
    is_first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    return ordered[is_first]


class Atoms:
    """Sets of labels that can only be joined, never split."""

    def __init__(self) -> None:
        self._parent: Labels = np.zeros(1, dtype=np.int64)
        self._sizes: Labels = np.zeros(1, dtype=np.int64)
        self._count = 1

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int) -> Labels:
        """New labels, each in its own set."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            grown = np.arange(max(self._count, 2 * len(self._parent)), dtype=np.int64)
            grown[: len(self._parent)] = self._parent
            sizes = np.ones_like(grown)
            sizes[: len(self._parent)] = self._sizes
            self._parent, self._sizes = grown, sizes
        return np.arange(start, self._count, dtype=np.int64)

    def roots(self, labels: Labels) -> Labels:
        """The root of every label, in an array of the same shape."""
        roots = self._parent[labels]
        is_direct = True
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots, is_direct = above, False
        if not is_direct:
            self._parent[labels] = roots
        return roots

    def sizes(self, roots: Labels) -> Labels:
        """Number of labels in the set of each root."""
        return self._sizes[roots]

    def join(self, left: Labels, right: Labels) -> None:
        """Join the sets of `left[i]` and `right[i]`, for every i."""
        left, right = self.roots(left.ravel()), self.roots(right.ravel())
        while True:
            differ = left != right
            if not differ.any():
                return
            left, right = left[differ], right[differ]
            low, high = np.minimum(left, right), np.maximum(left, right)
            np.minimum.at(self._parent, high, low)
            hooked = distinct(high)
            np.add.at(self._sizes, self.roots(hooked), self._sizes[hooked])
            left, right = self.roots(high), self.roots(low)
