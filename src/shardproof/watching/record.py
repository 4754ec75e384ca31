"""The record of a watched forward: joined labels, needed labels, and necessary transfers."""

from dataclasses import dataclass, field

import numpy as np

from shardproof.watching.atoms import Atoms, Labels, distinct

LARGEST_BOX = 1 << 22  # label layouts with more elements are not recorded


@dataclass(frozen=True)
class SeenOperation:
    """An operation that would need communication if the labels were cut apart.

    Attributes:
        what: "reduce" (a contraction with a parameter gives partial sums), "sum" (any other sum
            over the labels), "gather" (it needs all labels), "weight" (it needs all of a
            parameter), "lookup" (it picks rows by an index), "output" (the model
            returns the labels).
        op: the operation.
        module: name of the innermost module that ran it.
        atoms: the labels.
        parameter: the parameter that has these labels, or None.
        dim: the dim of the parameter, if known.
    """

    what: str
    op: str
    module: str
    atoms: Labels
    parameter: str | None
    dim: int | None = None


@dataclass
class Record:
    """Collects labels and operations while a forward runs.

    Attributes:
        atoms: the labels.
        needs: pairs (label, shared label): a rank with the first label needs the second.
        operations: those that would need communication.
        boxes: layouts of labels that vary along several dims of one tensor, by (lengths, whether
            they varied along one dim before it was split, hash).
        crossings: pairs of labels that one activation had along different dims, and where.
        unknown: operation without a rule -> how often it ran on labelled tensors.
        guesses: number of values that the forward read although they depend on parameters.
        used: names of parameters that were operands.
    """

    atoms: Atoms = field(default_factory=Atoms)
    needs: list[Labels] = field(default_factory=list)
    operations: list[SeenOperation] = field(default_factory=list)
    boxes: dict[tuple[tuple[int, ...], bool, int], Labels] = field(default_factory=dict)
    crossings: dict[tuple[object, ...], tuple[Labels, Labels, str, str]] = field(
        default_factory=dict
    )
    unknown: dict[str, int] = field(default_factory=dict)
    guesses: int = 0
    used: set[str] = field(default_factory=set)
    _modules: list[str] = field(default_factory=lambda: [""])
    _interned: dict[bytes, Labels] = field(default_factory=dict)
    _operation_keys: set[tuple[object, ...]] = field(default_factory=set)

    @property
    def module(self) -> str:
        """Name of the innermost running module."""
        return self._modules[-1]

    def enter(self, module: str) -> None:
        """A module begins its forward."""
        self._modules.append(module)

    def leave(self) -> None:
        """The innermost module ends its forward."""
        self._modules.pop()

    def need(self, units: Labels, shared: Labels) -> None:
        """Record that a rank with `units[i]` needs `shared[i]`."""
        units, shared = np.broadcast_arrays(units, shared)
        pairs = np.stack([units.ravel(), shared.ravel()], axis=1)
        pairs = pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs > 0).all(axis=1)]
        if len(pairs):
            self.needs.append(unique_pairs(pairs))

    def join_all(self, labels: Labels) -> None:
        """Join all labels into one set."""
        labels = labels[labels > 0]
        if labels.size:
            self.atoms.join(labels, np.full_like(labels, labels.flat[0]))

    def see(
        self,
        what: str,
        op: str,
        factor: Labels,
        parameter: str | None = None,
        dim: int | None = None,
    ) -> None:
        """Record an operation that would need communication."""
        if what == "gather" and parameter is not None:
            what = "weight"
        atoms = distinct(self.atoms.roots(factor))
        atoms = atoms[atoms > 0]
        if not atoms.size:
            return
        atoms = self._interned.setdefault(atoms.tobytes(), atoms)
        key = (what, op, self.module, parameter, dim, id(atoms))
        if key not in self._operation_keys:
            self._operation_keys.add(key)
            self.operations.append(SeenOperation(what, op, self.module, atoms, parameter, dim))

    def keep_box(self, factor: Labels, *, is_split: bool) -> None:
        """Record a layout of labels along several dims."""
        lengths = tuple(size for size in factor.shape if size > 1)
        if len(lengths) > 1 and factor.size <= LARGEST_BOX:
            key = (lengths, is_split, hash(factor.tobytes()))
            self.boxes.setdefault(key, factor.reshape(lengths))

    def lay_out(self, factors: tuple[Labels, ...], op: str, *, is_parameter: bool) -> None:
        """Record the layouts of an activation whose labels vary along more than one dim."""
        for factor in factors:
            self.keep_box(factor, is_split=False)
        if is_parameter or len(factors) < 2:
            return
        labels = [distinct(factor) for factor in factors]
        for i, left in enumerate(labels):
            for right in labels[:i]:
                key = (hash(left.tobytes()), hash(right.tobytes()))
                self.crossings.setdefault(key, (left, right, op, self.module))


def unique_pairs(pairs: Labels) -> Labels:
    """The distinct pairs of labels.

    Args:
        pairs: (n, 2).
    """
    if len(pairs) < 2:
        return pairs
    bound = int(pairs.max()) + 1
    keys = distinct(pairs[:, 0] * bound + pairs[:, 1])
    return np.stack([keys // bound, keys % bound], axis=1)
