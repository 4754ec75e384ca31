"""The report in one plain sentence."""

from collections.abc import Sequence

from shardproof.prover.casereport import CaseReport, TensorReport


def verdict(cases: Sequence[CaseReport], degrees: Sequence[int]) -> str:
    """What was proved, or what is the first thing that keeps it from being proved."""
    for case in cases:
        if not case.proved:
            return f"Not proved: in case {case.name}, {_first_fault(case)}."
    tensors = sum(len(case.tensors) for case in cases)
    what = f"{counted(len(cases), 'case')} with {counted(tensors, 'tensor')}"
    rest = "agrees with plain PyTorch and no rank exceeds its memory bound"
    if len(degrees) == 1:
        return (
            f"Proved for {what}: every tensor {rest} at degree {degrees[0]}; with one "
            f"degree nothing was compared between degrees."
        )
    return (
        f"Proved for {what}: every tensor has the same bits at degrees {_listed(degrees)}, {rest}."
    )


def _first_fault(case: CaseReport) -> str:
    """Bits first, then agreement, then memory, then the case's own checks."""
    if not case.tensors:
        return "no tensor was recorded, so that nothing was compared"
    faults = [_bits_fault(tensor) for tensor in case.tensors if not tensor.identical][:1]
    faults += [_agreement_fault(tensor) for tensor in case.tensors if not tensor.agrees][:1]
    if faults:
        return "; ".join(faults)
    for degree, ranks in case.memory.items():
        for rank in ranks:
            if int(degree) >= 2 and not rank.is_within:
                return (
                    f"rank {rank.rank} of {degree} allocated {rank.largest_bytes} bytes for a "
                    f"tensor of shape {list(rank.largest_shape)}, more than its bound of "
                    f"{rank.bound_bytes}"
                )
    failed = next(check for check in case.checks if not check.passed)
    return f"the check {failed.name!r} failed ({failed.detail})"


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
    if tensor.torch.allclose and tensor.is_far_off and tensor.fp64 is not None:
        return (
            f"{head}: its values are too small for the tolerance (atol {tensor.torch.atol:g}), and "
            f"its error against fp64 is {tensor.fp64.ours:.2g}, plain PyTorch's "
            f"{tensor.fp64.torch:.2g}"
        )
    if tensor.torch.allclose:
        return f"{head} element by element, as its seed document demands (atol=1e-6)"
    return (
        f"{head}: the largest difference is {tensor.torch.max_abs_diff:.3g} "
        f"(rtol {tensor.torch.rtol:g}, atol {tensor.torch.atol:g})"
    )


def counted(number: int, noun: str) -> str:
    """How many there are, as prose."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(degrees: Sequence[int]) -> str:
    *front, last = map(str, degrees)
    return f"{', '.join(front)} and {last}"
