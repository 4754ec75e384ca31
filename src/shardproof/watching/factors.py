"""Factors: the labels of a tensor's elements, and how they combine when elements meet.

A *factor* is an integer array that says which atom each element of a tensor belongs to. It has the
dims of the tensor, and size 1 along each dim in which the labels do not vary: the labels of the
features in an activation (2, 16, 64) are an array (1, 1, 64). A tensor has one factor for each kind
of label.
"""

import numpy as np

from shardproof.watching.atoms import Labels, distinct
from shardproof.watching.record import Record, unique_pairs

Factors = tuple[Labels, ...]
Operand = tuple[Labels, bool]  # a factor, and whether its tensor depends on parameters alone


def varying(factor: Labels) -> tuple[int, ...]:
    """The dims along which a factor varies."""
    return tuple(dim for dim, size in enumerate(factor.shape) if size > 1)


def compress(factor: Labels, record: Record) -> Labels | None:
    """The roots, with size 1 along dims in which they do not vary; None if there are no labels."""
    roots = record.atoms.roots(factor)
    if not roots.size or not roots.any():
        return None
    for dim, size in enumerate(roots.shape):
        if size > 1:
            first = roots[(slice(None),) * dim + (slice(0, 1),)]
            if (roots == first).all():
                roots = first
    return np.ascontiguousarray(roots)


def reduce_lines(factor: Labels, dims: tuple[int, ...], record: Record) -> Labels:
    """Combine labels for an operation that needs all elements along `dims` (whole lines).

    The labels that only one line has are joined into one unit. Labels that several lines have are
    shared: each of these lines needs them. The result has size 1 along `dims`.
    """
    dims = tuple(dim for dim in {dim % factor.ndim for dim in dims} if factor.shape[dim] > 1)
    if not dims:
        return factor
    rest = tuple(dim for dim in range(factor.ndim) if dim not in dims)
    roots = record.atoms.roots(factor)
    length = int(np.prod([factor.shape[dim] for dim in dims]))
    units = _join_lines(np.transpose(roots, rest + dims).reshape(-1, length), record)
    shape = [1 if dim in dims else size for dim, size in enumerate(factor.shape)]
    reduced = compress(units.reshape(shape), record)
    return np.zeros((1,) * factor.ndim, dtype=np.int64) if reduced is None else reduced


def _join_lines(lines: Labels, record: Record) -> Labels:
    """The unit of each line, from (lines, length) labels; 0 for a line without labels."""
    labels, which = np.unique(lines, return_inverse=True)
    which = which.reshape(lines.shape)
    keys = distinct(np.arange(len(lines))[:, None] * len(labels) + which)
    line, label = np.divmod(keys, len(labels))
    is_label = labels[label] > 0
    line, label = line[is_label], label[is_label]
    result = np.zeros(len(lines), dtype=np.int64)
    if not line.size:
        return result
    starts = np.flatnonzero(np.diff(line, prepend=-1))
    sums = np.add.reduceat(_scrambled(labels[label]), starts)
    _, first, kind = np.unique(sums, return_index=True, return_inverse=True)  # of equal lines: one
    chosen = np.isin(line, line[starts[first]])
    line_once, label_once = line[chosen], label[chosen]
    private = np.bincount(label_once, minlength=len(labels))[label_once] == 1
    order = np.lexsort((label_once, ~private, line_once))
    line_once, label_once, private = line_once[order], label_once[order], private[order]
    heads = np.flatnonzero(np.diff(line_once, prepend=-1))
    counts = np.diff(np.append(heads, len(line_once)))
    head = np.repeat(labels[label_once[heads]], counts)
    joined = private | ~np.repeat(private[heads], counts)
    values = labels[label_once]
    record.atoms.join(head[joined], values[joined])
    record.need(head[~joined], values[~joined])
    unit_of = dict(zip(line_once[heads].tolist(), labels[label_once[heads]].tolist(), strict=True))
    representatives = np.array([unit_of[each] for each in line[starts[first]].tolist()])
    result[line[starts]] = representatives[kind.reshape(-1)]
    return record.atoms.roots(result)


def _scrambled(labels: Labels) -> np.ndarray:
    """A 64-bit hash of each label (splitmix64), so that different sets have different sums."""
    mixed = labels.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def meet(left: Operand, right: Operand, record: Record) -> Labels | None:
    """Combine two factors that vary along the same dims, element by element; return the finer one.

    If each label meets one label only, the two are joined. If many labels meet one, they need it.
    Labels of a parameter that are finer than the activation's are joined with them, because nothing
    shows that they could be cut apart.
    """
    shape = np.broadcast_shapes(left[0].shape, right[0].shape)
    a = record.atoms.roots(np.broadcast_to(left[0], shape))
    b = record.atoms.roots(np.broadcast_to(right[0], shape))
    if np.array_equal(a, b):
        return compress(a, record)
    both = (a > 0) & (b > 0)
    pairs = unique_pairs(np.stack([a[both], b[both]], axis=1))
    if len(pairs):
        left_is_finer = len(distinct(pairs[:, 0])) == len(pairs)
        right_is_finer = len(distinct(pairs[:, 1])) == len(pairs)
        if left_is_finer and not right_is_finer and not left[1]:
            record.need(pairs[:, 0], pairs[:, 1])
        elif right_is_finer and not left_is_finer and not right[1]:
            record.need(pairs[:, 1], pairs[:, 0])
            a, b = b, a
        else:
            record.atoms.join(pairs[:, 0], pairs[:, 1])
    return compress(np.where(a > 0, a, b), record)


def combine(operands: list[Operand], op: str, record: Record) -> Factors:
    """The factors of the result of an element-wise operation, from those of its operands."""
    todo = [each for each in operands if varying(each[0])]
    single = [each[0] for each in operands if not varying(each[0]) and each[0].any()]
    independent: list[Operand] = []
    while todo:
        factor = todo.pop()
        for number, other in enumerate(independent):
            if set(varying(factor[0])) & set(varying(other[0])):
                del independent[number]
                todo += _meet_or_reduce(factor, other, op, record)
                break
        else:
            independent.append(factor)
    return _with_single([factor for factor, _ in independent], single, record)


def _with_single(factors: list[Labels], single: list[Labels], record: Record) -> Factors:
    """Add factors in which all elements have one label, which every other label then needs."""
    if not single:
        return tuple(factors)
    for factor in single:
        if factor.shape != single[0].shape or not np.array_equal(factor, single[0]):
            record.atoms.join(factor, single[0].reshape(factor.shape))
    if not factors:
        return (single[0],)
    for factor in factors:
        units = distinct(record.atoms.roots(factor))
        record.need(units, record.atoms.roots(single[0]).ravel())
    return tuple(factors)


def _meet_or_reduce(left: Operand, right: Operand, op: str, record: Record) -> list[Operand]:
    """Combine two factors that both vary along some dim, so that they no longer conflict."""
    s, t = set(varying(left[0])), set(varying(right[0]))
    if s == t:
        merged = meet_all([left, right], record)
        return [merged] if varying(merged[0]) else []
    if (len(s), max(s)) < (len(t), max(t)):
        left, right, s, t = right, left, t, s
    # `left` varies along more dims than it can be cut along: its units lie along the leftmost.
    dims = s - t if t < s and max(s) not in t else s & t
    if dims >= s:
        dims = s - t or s
    smaller = reduce_lines(left[0], tuple(dims), record)
    if not varying(smaller):
        record.see("gather", op, left[0])
        return [right]
    return [right, (smaller, left[1])]


def settle(factors: list[Labels], record: Record) -> Factors:
    """Merge factors of one tensor that vary along the same dims after its elements were moved.

    If two kinds of labels now share a dim (heads, and features of a head that all heads use), one
    of them is kept: a rank with a head needs all of the features.
    """
    distinct_factors: list[Labels] = []
    for factor in factors:
        for number, other in enumerate(distinct_factors):
            if varying(factor) and varying(factor) == varying(other):
                distinct_factors[number] = meet_all([(other, False), (factor, False)], record)[0]
                break
        else:
            distinct_factors.append(factor)
    return tuple(distinct_factors)


def _rank(labels: Labels, record: Record) -> tuple[float, int]:
    """Sort key: first labels in larger sets (heads), then labels that change more rarely."""
    joined = float(record.atoms.sizes(distinct(labels[labels > 0])).mean())
    return -joined, int(np.count_nonzero(np.diff(labels)))


def _outer(left: Labels, right: Labels, record: Record) -> Labels:
    """Keep one of two factors along one dim; each of its labels needs all labels of the other."""
    shape = np.broadcast_shapes(left.shape, right.shape)
    a = record.atoms.roots(np.broadcast_to(left, shape)).ravel()
    b = record.atoms.roots(np.broadcast_to(right, shape)).ravel()
    if _rank(a, record) > _rank(b, record):
        left, right, a, b = right, left, b, a
    record.join_all(b)
    record.need(distinct(a), record.atoms.roots(b[b > 0][:1]))
    return left


def are_independent(left: Labels, right: Labels, record: Record) -> bool:
    """Whether every label of one factor occurs with every label of the other."""
    shape = np.broadcast_shapes(left.shape, right.shape)
    a = record.atoms.roots(np.broadcast_to(left, shape)).ravel()
    b = record.atoms.roots(np.broadcast_to(right, shape)).ravel()
    if np.array_equal(a, b):
        return False
    both = (a > 0) & (b > 0)
    pairs = len(unique_pairs(np.stack([a[both], b[both]], axis=1)))
    count = len(distinct(a[both])), len(distinct(b[both]))
    return min(count) > 1 and pairs == count[0] * count[1]


def meet_all(operands: list[Operand], record: Record) -> Operand:
    """Combine factors of several tensors that vary along the same dims into one."""
    independent: list[Operand] = []
    for factor, is_parameter in operands:
        for number, (other, other_is) in enumerate(independent):
            if not are_independent(factor, other, record):
                meeting = meet((other, other_is), (factor, is_parameter), record)
                independent[number] = (
                    other if meeting is None else meeting,
                    other_is and is_parameter,
                )
                break
        else:
            independent.append((factor, is_parameter))
    while len(independent) > 1:
        (left, left_is), (right, right_is) = independent.pop(), independent.pop()
        independent.append((_outer(left, right, record), left_is and right_is))
    return independent[0]
