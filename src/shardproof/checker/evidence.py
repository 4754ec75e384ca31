"""What known mistakes are told apart by: factors, orders, slices, and which parameters are near."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.checker import mistake_kinds as kinds
from shardproof.checker.judging import Judge
from shardproof.checker.layout import FoundLayout
from shardproof.checker.locating import Fault
from shardproof.checker.placement import apart, largest, slice_for


@dataclass(frozen=True)
class KnownMistake:
    """A known mistake that would give what was seen.

    Attributes:
        kind: as in `KINDS`.
        evidence: what was compared, for people.
        unexplained: the largest difference that remains, relative to the largest element; None
            where nothing was computed.
    """

    kind: str
    evidence: str
    unexplained: float | None = None


def factors_of(degree: int) -> tuple[tuple[float, str], ...]:
    """Factors of a sum that was made twice or averaged, and the kinds of mistakes."""
    return (
        (float(degree), kinds.TWICE),
        (1.0 / degree, kinds.AVERAGED),
        (float(degree * degree), kinds.TWICE),
        (1.0 / degree**2, kinds.AVERAGED),
    )


def times_words(factor: float) -> str:
    """A factor as words before a noun."""
    return f"{factor:g} times" if factor >= 1 else f"1/{round(1 / factor)} of"


def relative(difference: float, whole: Tensor) -> float:
    """A difference as a part of the largest element."""
    scale = largest(whole)
    return difference / scale if scale and math.isfinite(scale) else difference


def misfit_in_slices(locals_: Sequence[Tensor], wrong: Tensor, bound: float) -> float | None:
    """The difference from what a mistake would give on each rank; None if it is too large."""
    parts = [slice_for(rank, locals_, wrong) for rank in range(len(locals_))]
    left = max(map(apart, locals_, parts))
    return left if left <= bound else None


def misfit(locals_: Sequence[Tensor], wrong: Tensor, bound: float) -> float | None:
    """The same, where the ranks may also hold parts of a sum; None if it is too large."""
    if all(each.shape == wrong.shape for each in locals_):
        left = max(apart(each, wrong) for each in locals_)
        if left <= bound:
            return left
        left = apart(torch.stack(list(locals_)).sum(0), wrong)
        return left if left <= bound else None
    for dim in range(wrong.ndim):
        if all(each.ndim == wrong.ndim for each in locals_):
            sizes = [each.shape for each in locals_]
            if sum(size[dim] for size in sizes) != wrong.shape[dim]:
                continue
            try:
                joined = torch.cat(list(locals_), dim)
            except RuntimeError:  # other dims differ too
                continue
            left = apart(joined, wrong)
            if left <= bound:
                return left
    return None


def are_alike(locals_: Sequence[Tensor], judge: Judge) -> bool:
    """Whether all ranks have the same tensor, up to rounding."""
    return all(apart(each, locals_[0]) <= judge.bound(locals_[0]) for each in locals_)


def is_run(indices: Sequence[int]) -> bool:
    """Whether indices are consecutive."""
    return list(indices) == list(range(indices[0], indices[0] + len(indices))) if indices else True


def is_block_order(indices: Sequence[Sequence[int]]) -> bool:
    """Whether each rank has one run, and the runs are in another order than the ranks."""
    starts = [each[0] for each in indices if each]
    return all(is_run(each) for each in indices) and starts != sorted(starts)


def blocks_of(indices: Sequence[Sequence[int]], degree: int) -> list[Sequence[int]]:
    """The runs that a whole tensor on every rank is made of, or the ranks' own."""
    if len({tuple(each) for each in indices}) > 1:
        return list(indices)
    joined = indices[0]
    size = -(-len(joined) // degree)
    return [joined[start : start + size] for start in range(0, len(joined), size)]


def is_regrouped(indices: Sequence[int], size: int) -> bool:
    """Whether (heads, head_dim) was read as (head_dim, heads)."""
    plain = torch.arange(size)
    for heads in range(2, size):
        if size % heads == 0 and plain.view(heads, -1).T.flatten().tolist() == list(indices):
            return True
    return False


def runs_words(indices: Sequence[int]) -> str:
    """Indices as slices: `0:4+8:12`."""
    words, start = [], None
    for place, each in enumerate(indices):
        start = each if start is None else start
        if place + 1 == len(indices) or indices[place + 1] != each + 1:
            words.append(f"{start}:{each + 1}")
            start = None
    return "+".join(words[:4]) + ("+..." if len(words) > 4 else "")


def slices_words(indices: Sequence[Sequence[int]]) -> str:
    """The slices of several ranks."""
    return listed([runs_words(each) for each in indices])


def listed(words: Sequence[str]) -> str:
    """Words with commas."""
    return ", ".join(words)


def ranks_words(ranks: Sequence[int]) -> str:
    """Ranks as words."""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed([str(each) for each in ranks])}"


def factor_between(local: Tensor, expected: Tensor, *, tolerance: float = 1e-6) -> float | None:
    """The factor between two tensors; None if it is not the same for all elements."""
    if local.shape != expected.shape or not largest(expected):
        return None
    factor = float((local.double() * expected.double()).sum() / expected.double().square().sum())
    is_factor = apart(local, factor * expected) <= tolerance * max(largest(local), 1e-300)
    return factor if is_factor else None


_FUSED_NAMES = ("qkv", "query_key_value", "c_attn", "in_proj", "gate_up", "w13", "fused")


def has_fused_name(name: str) -> bool:
    """Whether a name is that of a fused weight."""
    return any(each in name.lower() for each in _FUSED_NAMES)


_KEY_VALUE_NAMES = ("k", "v", "key", "value", "kv", "k_proj", "v_proj", "wk", "wv", "kv_proj")


def is_key_value(layout: FoundLayout) -> bool:
    """Whether several ranks hold a parameter of key or value heads."""
    last = owner_of(layout).rpartition(".")[2]
    return layout.overlaps or (layout.is_whole and last in _KEY_VALUE_NAMES)


def owner_of(layout: FoundLayout) -> str:
    """The path of the module that has a parameter."""
    return layout.name.rpartition(".")[0]


def is_near(owner: str, module: str) -> bool:
    """Whether a parameter's module is the faulty one, or directly inside it."""
    return owner == module or owner.rpartition(".")[0] == module


def layouts_near(fault: Fault, judge: Judge) -> list[FoundLayout]:
    """The parameters of the faulty module and of those inside it."""
    prefix = f"{fault.module}." if fault.module else ""
    inside = [each for each in judge.layouts.values() if owner_of(each) == fault.module]
    if fault.module:
        inside += [
            each
            for each in judge.layouts.values()
            if each.name.startswith(prefix) and each not in inside
        ]
    return inside
