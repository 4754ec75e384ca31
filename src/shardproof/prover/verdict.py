"""The report in one plain sentence."""

import math
from collections.abc import Iterator, Sequence

from shardproof.prover.casereport import CaseReport, TensorReport
from shardproof.prover.rounding import NEAR


def verdict(cases: Sequence[CaseReport], degrees: Sequence[int]) -> str:
    """What was proved, or what is the first thing that keeps it from being proved."""
    for case in cases:
        if not case.proved:
            where = "" if case.where is None else f" {case.where}"
            return f"Not proved: in case {case.name}, {_first_fault(case)}.{where}"
    what = f"{counted(len(cases), 'case')} with {counted(_count(cases), 'tensor')}"
    rest = "agrees with plain PyTorch and no rank exceeds its memory bound"
    if len(degrees) == 1:
        sentence = (
            f"Proved for {what}: every tensor {rest} at degree {degrees[0]}; with one "
            f"degree nothing was compared between degrees."
        )
    else:
        same = f"has the same bits at degrees {_listed(degrees)}"
        sentence = f"Proved for {what}: every tensor {same}, {rest}."
    return " ".join([sentence, *_reservations(cases)])


def _count(cases: Sequence[CaseReport]) -> int:
    return sum(len(case.tensors) for case in cases)


def _reservations(cases: Sequence[CaseReport]) -> Iterator[str]:
    """What a reader of a proof must know of how tensors agree, a sentence each."""
    tensors = [tensor for case in cases for tensor in case.tensors]
    decided = [tensor.name for tensor in tensors if tensor.is_decided_by_rounding]
    if decided:
        yield f"In {_named(decided)} rounding decides some numbers, in plain PyTorch as here."
    odd = [tensor.name for tensor in tensors if not tensor.is_finite]
    if odd:
        yield f"NaN or Inf were allowed, and occur in {_named(odd)}."


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors (the first is {names[0]})"


def _first_fault(case: CaseReport) -> str:
    """Bits first, then agreement, memory, checks, cuts; NaN and Inf where they come first."""
    if not case.tensors:
        return "no tensor was recorded, so that nothing was compared"
    faults = [_bits_fault(tensor) for tensor in case.tensors if not tensor.identical][:1]
    faults += [_agreement_fault(tensor) for tensor in case.tensors if not tensor.agrees][:1]
    if not case.is_finite:
        faults.insert(_place_of_nonfinite(case), _nonfinite_fault(case))
    uncut = [_uncut_fault(case)] if case.uncut_degrees else []
    if faults:
        return "; ".join([*faults, *uncut])
    beyond = case.first_beyond_bound()
    if beyond is not None:
        degree, rank = beyond
        return (
            f"rank {rank.rank} of {degree} allocated {rank.largest_bytes} bytes for a tensor of "
            f"shape {list(rank.largest_shape)}, more than its bound of {rank.bound_bytes}"
        )
    for check in case.checks:
        if not check.passed:
            return f"the check {check.name!r} failed ({check.detail})"
    return uncut[0]


def _place_of_nonfinite(case: CaseReport) -> int:
    """0, the first place, unless a fault of finite numbers comes before."""
    for tensor in case.tensors:
        if not tensor.is_finite:
            return 0
        if not (tensor.identical and tensor.agrees):
            return 2
    return 0


def _nonfinite_fault(case: CaseReport) -> str:
    tensor = next(tensor for tensor in case.tensors if not tensor.is_finite)
    numel, found = math.prod(tensor.shape), tensor.nonfinite
    ranks = {degree: count for degree, count in found.items() if degree.isdigit()}
    said = []
    if ranks:
        at = "" if set(ranks) == set(map(str, case.degrees)) else f" at degree {_listed([*ranks])}"
        said.append(f"{max(ranks.values())} of {numel} are NaN or infinite{at}")
    if "torch" in found:
        said.append("in plain PyTorch too" if ranks else f"{found['torch']} of {numel} are NaN or "
                    "infinite in plain PyTorch")  # fmt: skip
    elif ranks and tensor.torch is not None:
        said.append("in plain PyTorch all are finite")
    if set(found) == {"fp64"}:
        said.append(f"{found['fp64']} of {numel} are NaN or infinite in the fp64 run")
    return (
        f"tensor {tensor.name} is the first whose numbers are not all finite "
        f"({', '.join(said)}), and such numbers show nothing: mend them, or allow them with "
        "allow_nonfinite=True (--allow-nonfinite)"
    )


def _uncut_fault(case: CaseReport) -> str:
    degree = case.uncut_degrees[0]
    cut = case.cut[str(degree)]
    if cut.parameters:
        what = (
            f"{counted(cut.parameters, 'parameter')} were cut at degree {degree}, but no byte was "
            "sent in forward or backward"
        )
    else:
        sent = f", though {cut.sent_bytes} bytes were sent" if cut.sent_bytes else ""
        what = f"no parameter was cut at degree {degree}{sent}"
    return (
        f"{what}, so that nothing was shown of that degree. Cut the model over the axis that build "
        "is given, with layers or a plan of shardproof"
    )


def _bits_fault(tensor: TensorReport) -> str:
    between = tensor.differing_degrees()
    if between is not None:
        what = (
            f"tensor {tensor.name} is the first whose bits differ: degree {between[1]} differs "
            f"from degree {between[0]}"
        )
    else:
        what = f"tensor {tensor.name} is the first that is not identical"
    return f"{what} ({'; '.join(tensor.findings)})" if tensor.findings else what


def _agreement_fault(tensor: TensorReport) -> str:
    head = f"tensor {tensor.name} is the first that does not agree with plain PyTorch"
    if tensor.torch is None:
        return f"{head} ({'; '.join(tensor.findings)})"
    if tensor.torch.max_abs_diff is None:
        return f"{head}: NaN or Inf stand in other places"
    if tensor.torch.allclose and tensor.is_far_off:
        return (
            f"{head}: its values are too small for the tolerance (atol {tensor.torch.atol:g}), and "
            f"its error against fp64 is {_far(tensor)}"
        )
    is_within = tensor.torch.allclose or tensor.is_decided_by_rounding
    if tensor.is_not_updated and is_within:
        return f"{head}: {_update_fault(tensor)}"
    if tensor.torch.allclose:
        return f"{head} element by element, as its seed document demands (atol=1e-6)"
    sentence = (
        f"{head}: the largest difference is {tensor.torch.max_abs_diff:.3g} "
        f"(rtol {tensor.torch.rtol:g}, atol {tensor.torch.atol:g})"
    )
    if tensor.rounding is not None and tensor.rounding.outside is not None:
        sentence += f", and rounding explains all but {tensor.rounding.outside:.3g} of it"
    return sentence


def _far(tensor: TensorReport) -> str:
    """How far it is from fp64, by the measure that says so."""
    ours, plain = (tensor.fp64.ours, tensor.fp64.torch) if tensor.fp64 else (None, None)
    if ours is not None and plain is not None and plain < NEAR:
        return f"{ours:.2g}, plain PyTorch's {plain:.2g}"
    times = tensor.rounding.times if tensor.rounding else None
    return f"{times or 0.0:.3g} times plain PyTorch's, which is rounding"


def _update_fault(tensor: TensorReport) -> str:
    if tensor.rounding is None or tensor.rounding.is_stuck:
        return "it has a gradient and was not updated, plain PyTorch's was"
    return (
        f"its update is wrong by {tensor.rounding.update_ours:.2g} of itself, plain PyTorch's by "
        f"{tensor.rounding.update_torch or 0.0:.2g}"
    )


def counted(number: int, noun: str) -> str:
    """How many there are, as prose."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(degrees: Sequence[int | str]) -> str:
    *front, last = map(str, degrees)
    return f"{', '.join(front)} and {last}" if front else last
