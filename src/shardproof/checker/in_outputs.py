"""Known mistakes in the outputs of modules, and in the gradients that they pass on."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from shardproof.checker import locating
from shardproof.checker import mistake_kinds as kinds
from shardproof.checker.evidence import (
    KnownMistake,
    are_alike,
    blocks_of,
    factors_of,
    has_fused_name,
    is_block_order,
    is_near,
    is_regrouped,
    is_run,
    layouts_near,
    listed,
    misfit,
    misfit_in_slices,
    owner_of,
    ranks_words,
    relative,
    runs_words,
    slices_words,
    times_words,
)
from shardproof.checker.judging import Judge
from shardproof.checker.layout import FoundLayout
from shardproof.checker.locating import Fault
from shardproof.checker.placement import PARTIAL, apart, largest, matched, slice_for
from shardproof.checker.program import Program


def not_finite(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """NaN or infinite elements, where the plain module has none."""
    judgement = fault.judgement
    if all(bool(torch.isfinite(each).all()) for each in judgement.locals):
        return None
    if not bool(torch.isfinite(judgement.whole).all()):
        return None
    ranks = [r for r, each in enumerate(judgement.locals) if not torch.isfinite(each).all()]
    return KnownMistake(kinds.NOT_FINITE, f"NaN or infinity on {ranks_words(ranks)}")


def open_part(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """An earlier tensor that is a part of a sum, and is used as it is."""
    source = fault.source
    if source is None or source.placement.kind != PARTIAL:
        return None
    return KnownMistake(
        kinds.MISSING_SUM,
        f"the {source.name} on each rank is a part, and the parts add up to the whole; what "
        "follows uses a part alone",
        relative(source.placement.difference, source.whole),
    )


def other_order(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """An earlier tensor whose slices are in another order than the ranks."""
    source = fault.source
    if source is None or source.placement.indices is None:
        return None
    indices = source.placement.indices
    if is_block_order(indices):
        return KnownMistake(
            kinds.ORDER,
            f"the {source.name} has the slices {slices_words(indices)} on ranks 0, 1, ...",
            relative(source.placement.difference, source.whole),
        )
    if _is_fused(fault.module, judge):
        return None
    return KnownMistake(
        kinds.SWAPPED,
        f"the {source.name} has the elements {slices_words(indices)} on ranks 0, 1, ...",
        relative(source.placement.difference, source.whole),
    )


def one_shard(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """Parameters of the module, or of one inside it, that ranks hold alike and nobody holds."""
    for layout in layouts_near(fault, judge):
        if layout.is_found and not layout.covers:
            held = [layout.held(rank) for rank in range(judge.degree)]
            if len(set(held)) < len(held):
                return KnownMistake(
                    kinds.ONE_SHARD,
                    f"ranks 0, 1, ... hold {listed(held)} of {layout.whole}, and the rest is on "
                    "no rank",
                )
    judgement = fault.of_module
    whole = judgement.whole
    for dim in range(whole.ndim):
        found = [matched(each, whole, dim, judge.bound(whole)) for each in judgement.locals]
        if any(each is None for each in found):
            continue
        indices = [each for each in found if each is not None]
        held_ = {i for each in indices for i in each}
        repeats = any(len(set(each)) < len(each) for each in indices)
        if len(held_) < whole.shape[dim] and (repeats or len(set(indices)) < len(indices)):
            own = [each for each in judge.layouts.values() if owner_of(each) == fault.module]
            is_looked_up = bool(own) and all(each.is_whole for each in own)
            return KnownMistake(
                kinds.POSITIONS if is_looked_up else kinds.ONE_SHARD,
                f"the {judgement.name} has only the slices {runs_words(sorted(held_))} of "
                f"0:{whole.shape[dim]} along dim {dim}",
                0.0,
            )
    return None


def fused_as_one(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """A fused weight of which each rank holds one block."""
    for layout in layouts_near(fault, judge):
        if not layout.is_found or layout.is_whole or not has_fused_name(layout.whole):
            continue
        along = [piece.indices[layout.cut_dims[0]] for piece in layout.pieces if layout.cut_dims]
        if along and all(is_run(each) for each in along):
            return KnownMistake(
                kinds.FUSED,
                f"{layout.whole} is fused, and ranks 0, 1, ... hold {slices_words(along)}",
            )
    return None


def bias_too_often(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """A bias once for each rank, or a sum beside a bias that is wrong."""
    judgement = fault.of_module
    whole, d = judgement.whole, judge.degree
    bound = judge.bound(whole)
    is_shared = are_alike(judgement.locals, judge) and judgement.locals[0].shape == whole.shape
    for name, bias in _biases(fault.module, judge, whole):
        right = f"the {judgement.name} is the right one"
        if (left := misfit_in_slices(judgement.locals, whole + (d - 1) * bias, bound)) is not None:
            return KnownMistake(
                kinds.BIAS, f"{right} and {d - 1} times {name} more", relative(left, whole)
            )
        for factor, kind in factors_of(d):
            wrong = factor * (whole - bias) + bias
            if (left := misfit_in_slices(judgement.locals, wrong, bound)) is not None:
                return KnownMistake(
                    kind,
                    f"the {judgement.name} is {times_words(factor)} the right one, without {name}",
                    relative(left, whole),
                )
        if is_shared or any(each.shape != whole.shape for each in judgement.locals):
            continue
        left = apart(torch.stack(list(judgement.locals)).sum(0), whole + (d - 1) * bias)
        if left <= bound:
            kind = kinds.BIAS if _is_summed_later(fault, judge) else kinds.MISSING_SUM
            return KnownMistake(
                kind,
                f"the {judgement.name} on each rank is a part with all of {name}",
                relative(left, whole),
            )
    return None


def _biases(module: str, judge: Judge, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Biases of a module, or of one inside it, that can be added to a tensor."""
    for name, record in judge.runs.reference.parameters.items():
        owner, _, last = name.rpartition(".")
        bias = record.value
        if "bias" not in last or not is_near(owner, module) or not whole.ndim:
            continue
        if bias.shape == whole.shape[-1:] and largest(bias):
            yield name, bias.to(whole.dtype)


def _is_summed_later(fault: Fault, judge: Judge) -> bool:
    """Whether the ranks are alike in what the module around the faulty one gives."""
    places = judge.places(fault.step)
    if fault.place is None:
        return False
    around = locating.caller(judge, fault.module)
    for at in places[places.index(fault.place) + 1 :]:
        if at.path == around and at.side == "output":
            return are_alike(judge.value(at).locals, judge)
    return False


def scaled(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """A tensor that is the number of ranks times too large or too small."""
    judgement = fault.of_module
    for factor, kind in factors_of(judge.degree):
        left = misfit(judgement.locals, factor * judgement.whole, judge.bound(judgement.whole))
        if left is not None:
            return KnownMistake(
                kind,
                f"the {judgement.name} is {times_words(factor)} the right one",
                relative(left, judgement.whole),
            )
    return None


def unequal_mean(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """A tensor that differs between ranks, and whose mean is right."""
    judgement = fault.of_module
    if any(each.shape != judgement.whole.shape for each in judgement.locals):
        return None
    mean = torch.stack(list(judgement.locals)).mean(0)
    left = apart(mean, judgement.whole)
    if left <= judge.bound(judgement.whole) and are_alike(judgement.locals, judge):
        return None
    if left <= judge.bound(judgement.whole):
        return KnownMistake(
            kinds.TWICE,
            f"the {judgement.name} differs between ranks, and its mean over the ranks is right",
            relative(left, judgement.whole),
        )
    return None


def permuted(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """The right elements in another order along one dim, or viewed as other heads."""
    judgement = fault.of_module
    whole, bound = judgement.whole, judge.bound(judgement.whole)
    parts = [slice_for(rank, judgement.locals, whole) for rank in range(judge.degree)]
    for dim in reversed(range(whole.ndim)):
        for wholes in ([whole] * judge.degree, parts):
            pairs = zip(judgement.locals, wholes, strict=True)
            found = [matched(local, each, dim, bound) for local, each in pairs]
            indices = [each for each in found if each is not None]
            if len(indices) < len(found):
                continue
            is_cut = judgement.locals[0].shape[dim] != wholes[0].shape[dim]
            held = [i for each in indices for i in each] if is_cut else indices[0]
            if sorted(set(held)) != list(range(wholes[0].shape[dim])):
                continue
            if dim == whole.ndim - 1 and is_regrouped(indices[0], len(indices[0])):
                kind = kinds.HEADS
            elif is_block_order(blocks_of(indices, judge.degree)):
                kind = kinds.ORDER
            else:
                kind = kinds.SWAPPED
            return KnownMistake(
                kind,
                f"the {judgement.name} has the right elements in the order {slices_words(indices)} "
                f"along dim {dim} on ranks 0, 1, ...",
                0.0,
            )
    return None


def rearranged(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """The right elements, all of them at other places."""
    judgement = fault.of_module
    whole, bound = judgement.whole, judge.bound(judgement.whole)
    for rank, local in enumerate(judgement.locals):
        right = slice_for(rank, judgement.locals, whole)
        if local.shape != right.shape or local.numel() < _SOME:
            return None
        if apart(local.flatten().sort().values, right.flatten().sort().values) > bound:
            return None
    return KnownMistake(
        kinds.HEADS, f"the {judgement.name} has the right elements at other places", 0.0
    )


def order_of_weights(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """Parameters whose parts lie in another order, or are those of another parameter."""
    for layout in layouts_near(fault, judge):
        if not layout.is_found:
            other = _other_whole(layout, judge)
            if other is not None:
                return KnownMistake(kinds.SWAPPED, f"{layout.name} has elements of {other}")
            continue
        for dim in range(len(layout.shape)):
            indices = [piece.indices[dim] for piece in layout.pieces]
            in_turn = dict.fromkeys(indices)  # several ranks can hold the same
            joined = [i for each in in_turn for i in each]
            if joined == sorted(joined) or has_fused_name(layout.whole):
                continue
            return KnownMistake(
                kinds.ORDER if is_block_order(indices) else kinds.SWAPPED,
                f"ranks 0, 1, ... hold {slices_words(indices)} of dim {dim} of {layout.whole}",
            )
    return None


def _other_whole(layout: FoundLayout, judge: Judge) -> str | None:
    """The parameter of the plain module, nearby and by another name, that ranks hold parts of."""
    around = layout.whole.rpartition(".")[0].rpartition(".")[0]
    for name, record in judge.runs.reference.parameters.items():
        if name == layout.whole or not name.startswith(around) or record.value.ndim < 2:
            continue
        local = judge.runs.ranks[0].parameters[layout.name].value
        for dim in range(record.value.ndim):
            if local.ndim == record.value.ndim and matched(local, record.value, dim, 0.0):
                return name
    return None


def one_rank_right(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """Where positions, masks or gates are used: rank 0 is right, and the others are not."""
    judgement = fault.of_module
    if not _uses_positions(fault.module, judge):
        return None
    whole, bound = judgement.whole, judge.bound(judgement.whole)
    if judgement.placement.dim is None and judgement.locals[0].shape == whole.shape:
        return None
    right = []
    for rank, local in enumerate(judgement.locals):
        for dim in range(whole.ndim):
            size = local.shape[dim] if local.ndim == whole.ndim else 0
            if not size or size == whole.shape[dim]:
                continue
            start = sum(each.shape[dim] for each in judgement.locals[:rank])
            size = min(size, whole.shape[dim] - start)
            if size > 0 and apart(local, whole.narrow(dim, start, size)) <= bound:
                right.append(rank)
    if right == [0] and judge.degree > 1:
        return KnownMistake(kinds.POSITIONS, f"the {judgement.name} is right on rank 0 only")
    return None


def part_on_all_ranks(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """The part of one rank, as after a broadcast in place of a sum over a row-parallel layer."""
    judgement, at = fault.of_module, fault.place
    if at is None or at.side != "output" or judgement.locals[0].shape != judgement.whole.shape:
        return None
    biases = [("", torch.zeros(())), *_biases(fault.module, judge, judgement.whole)]
    for rank, each in enumerate(judge.runs.ranks):
        x = each.values.get(replace(at, side="input", index=0))
        record = each.parameters.get(f"{fault.module}.weight")
        if x is None or record is None or record.value.ndim != 2:
            return None
        if record.value.shape[-1:] != x.shape[-1:]:
            return None
        part = torch.nn.functional.linear(x, record.value)
        for _, bias in biases:
            left = max(apart(local, part + bias) for local in judgement.locals)
            if left <= judge.bound(part):
                return KnownMistake(
                    kinds.MISSING_SUM,
                    f"the {judgement.name} on every rank is the part of rank {rank}",
                    relative(left, judgement.whole),
                )
    return None


def _is_fused(module: str, judge: Judge) -> bool:
    return any(has_fused_name(name) for name in judge.layouts if name.startswith(f"{module}."))


def _uses_positions(module: str, judge: Judge) -> bool:
    recording = judge.runs.reference
    inside = [each for each in recording.classes if each.startswith(f"{module}.") or each == module]
    words = [*inside, *recording.parameters, *(recording.classes[each] for each in inside)]
    words += [each for each in recording.buffers if each.startswith(module)]
    return any(each in word.lower() for word in words for each in _POSITION_NAMES)


_POSITION_NAMES = ("rot", "alibi", "slope", "pos", "rope", "mask", "gate", "sink", "freq")


_SOME = 8  # elements: fewer can have the same values by chance
