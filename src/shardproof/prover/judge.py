"""Judges one case: from the results of the ranks of all degrees to its report."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof.errors import MismatchError
from shardproof.prover.case import NOTEBOOK_DEGREE, Case, Check
from shardproof.prover.case_report import (
    Agreement,
    CaseReport,
    CutReport,
    Errors,
    MemoryReport,
    Numbers,
    ShownValues,
    TensorReport,
)
from shardproof.prover.compare import (
    Figures,
    StepFigures,
    combine,
    combine_steps,
    rounding,
    tolerance,
)
from shardproof.prover.recording import Counts, RankResult, TensorRecord, TensorValues
from shardproof.scheme import Scheme

Results = Mapping[int, Sequence[RankResult]]  # degree -> every rank's result


def judge_case(
    case: Case,
    results: Results,
    *,
    expected: Sequence[str],
    activation_bytes: int,
    allows_nonfinite: bool = False,
) -> CaseReport:
    """Compare the degrees with each other and with plain torch.

    Args:
        case: what was run.
        results: of every degree, lowest first.
        expected: the tensors that plain torch recorded.
        activation_bytes: of the case's largest activation.
        allows_nonfinite: NaN and Inf are no fault.
    """
    tables = {degree: _by_name(case, ranks) for degree, ranks in results.items()}
    names = _merged([list(expected), *(list(table) for table in tables.values())])
    expected_names = frozenset(expected)
    tensors = tuple(_judge_tensor(case, name, tables, name in expected_names) for name in names)
    return CaseReport(
        name=case.name,
        source=case.source,
        description=case.description,
        degrees=tuple(results),
        seconds=sum(max(rank.seconds for rank in ranks) for ranks in results.values()),
        tensors=tensors,
        memory={
            str(degree): tuple(_memory(rank, activation_bytes) for rank in ranks)
            for degree, ranks in results.items()
        },
        comm={str(degree): _counts(ranks) for degree, ranks in results.items()},
        checks=(*_checks(results), *accuracy_checks(case, tensors)),
        curves=_curves(results),
        cut={str(degree): _cut(ranks) for degree, ranks in results.items()},
        allows_nonfinite=allows_nonfinite,
    )


def _by_name(case: Case, ranks: Sequence[RankResult]) -> dict[str, list[TensorRecord]]:
    """Tensor name -> what every rank recorded, in execution order."""
    names = [[tensor.name for tensor in rank.recorded] for rank in ranks]
    for rank, other in enumerate(names):
        if other != names[0] or len(set(other)) != len(other):
            only = sorted(set(other) ^ set(names[0])) or [n for n in other if other.count(n) > 1]
            raise MismatchError(
                f"case {case.name!r} recorded {len(names[0])} tensors on rank 0 and {len(other)} "
                f"on rank {rank}, not the same or not each once: {', '.join(only) or 'order'}. "
                f"Every rank must record the same tensors in the same order."
            )
    columns = zip(*(rank.recorded for rank in ranks), strict=True)
    return {column[0].name: list(column) for column in columns}


def _judge_tensor(
    case: Case, name: str, tables: Mapping[int, Mapping[str, list[TensorRecord]]], is_known: bool
) -> TensorReport:
    records = {degree: table[name] for degree, table in tables.items() if name in table}
    findings = [f"not recorded at degree {degree}" for degree in tables if degree not in records]
    findings += _different_replicas(records) + _different_copies(records)
    sha256 = {str(degree): ranks[0].sha256 or "" for degree, ranks in records.items()}
    identical = not findings and len(set(sha256.values())) == 1
    first = (
        next(iter(records.values()))[0]
        if records
        else TensorRecord(name, (), "", True, "", True, None)
    )
    if first.is_judged and not is_known:
        findings.append("not recorded by plain torch")
    misfits = _misfits(records)
    findings += misfits
    is_measured = first.is_judged and is_known and bool(records) and not misfits
    figures = [_figures(ranks) for ranks in records.values()] if is_measured else []
    steps = [each for ranks in records.values() if (each := _steps(ranks))] if is_measured else []
    agreement = _agreement(figures, first.dtype) if figures else None
    return TensorReport(
        name,
        first.shape,
        first.dtype,
        sha256,
        identical,
        first.is_judged,
        agreement,
        _errors(figures) if figures else None,
        all(f.elementwise for f in figures) if name in case.elementwise else None,
        tuple(findings),
        rounding(figures, steps, getattr(torch, first.dtype), math.prod(first.shape))
        if figures
        else None,
        _nonfinite(records),
        _shown_values(
            {degree: [tensor.values for tensor in ranks] for degree, ranks in records.items()}
        ),
    )


def _different_replicas(records: Mapping[int, Sequence[TensorRecord]]) -> list[str]:
    """Sentences on ranks whose copy of a replicated tensor differs from rank 0's."""
    sentences = []
    for degree, ranks in records.items():
        other = [
            str(rank)
            for rank, tensor in enumerate(ranks)
            if tensor.is_replicated and tensor.sha256 != ranks[0].sha256
        ]
        if other:
            is_one = len(other) == 1
            which = f"rank {other[0]} differs" if is_one else f"ranks {', '.join(other)} differ"
            sentences.append(f"replicas differ at degree {degree}: {which} from rank 0")
    return sentences


def _different_copies(records: Mapping[int, Sequence[TensorRecord]]) -> list[str]:
    """Sentences on ranks whose copy of another rank's leaf differs from the owner's."""
    sentences = []
    for degree, ranks in records.items():
        first: dict[str, tuple[int, str]] = {}  # the owner is the first rank that holds it
        for rank, tensor in enumerate(ranks):
            for name, sha in tensor.copies.items():
                owner, owned = first.setdefault(name, (rank, sha))
                if sha != owned:
                    sentences.append(
                        f"copies differ at degree {degree}: {name} of rank {rank} differs from "
                        f"that of rank {owner}"
                    )
    return sentences


def _misfits(records: Mapping[int, Sequence[TensorRecord]]) -> list[str]:
    """How shape or dtype differ from plain torch's, at the first degree at which they do."""
    for degree, ranks in records.items():
        if ranks[0].misfit:
            return [f"at degree {degree} {ranks[0].misfit}"]
    return []


def _figures(ranks: Sequence[TensorRecord]) -> Figures:
    return combine([tensor.figures for tensor in ranks if tensor.figures is not None])


def _steps(ranks: Sequence[TensorRecord]) -> StepFigures | None:
    """Of an updated weight; None for any other tensor."""
    steps = [tensor.step for tensor in ranks if tensor.step is not None]
    return combine_steps(steps) if steps else None


def _nonfinite(records: Mapping[int, Sequence[TensorRecord]]) -> dict[str, int]:
    """Degree, "torch" or "fp64" -> number of elements that are not finite, if any are.

    Of a cut tensor the counts of all ranks are added; of a replicated one the largest counts.
    """
    counts: dict[str, int] = {}
    for degree, ranks in records.items():
        join = max if ranks[0].is_replicated else sum
        for where in ("ours", "torch", "fp64"):
            key = str(degree) if where == "ours" else where
            count = join([tensor.nonfinite.get(where, 0) for tensor in ranks])
            if count:
                counts[key] = max(count, counts.get(key, 0))
    return counts


def _agreement(figures: Sequence[Figures], dtype: str) -> Agreement:
    """The worst of all degrees."""
    rtol, atol = tolerance(getattr(torch, dtype))
    worst = combine(figures)
    has_number = worst.same_nonfinite
    return Agreement(
        exact=worst.exact,
        allclose=all(part.agrees(rtol, atol) for part in figures),
        rtol=rtol,
        atol=atol,
        max_abs_diff=worst.max_abs_diff if has_number else None,
        max_ulp=worst.max_ulp if has_number else None,
    )


def _errors(figures: Sequence[Figures]) -> Errors:
    """The worst of all degrees; None, if any of them has no number."""
    ours, torch_errors = zip(*(part.errors() for part in figures), strict=True)
    return Errors(
        None if None in ours else max(ours), None if None in torch_errors else max(torch_errors)
    )


def _memory(result: RankResult, activation_bytes: int) -> MemoryReport:
    bound = max(result.share_bytes, activation_bytes)
    return MemoryReport(result.rank, result.largest_bytes, result.largest_shape, bound)


def _counts(ranks: Sequence[RankResult]) -> Counts:
    """Calls and message bytes are the same on all ranks; sent bytes are the largest of a rank."""
    counts: Counts = {}
    for direction, kinds in ranks[0].counts.items():
        counts[direction] = {}
        for kind, figures in kinds.items():
            sent = [
                rank.counts.get(direction, {}).get(kind, {}).get("sent_bytes", 0) for rank in ranks
            ]
            counts[direction][kind] = figures | {"sent_bytes": max(sent)}
    return counts


def _cut(ranks: Sequence[RankResult]) -> CutReport:
    """How much the ranks shared: bytes of the rank that sent most, forward and backward."""
    return CutReport(
        max(rank.num_cut_parameters for rank in ranks), max(_sent_bytes(rank) for rank in ranks)
    )


def _sent_bytes(rank: RankResult) -> int:
    return sum(
        figures.get("sent_bytes", 0)
        for direction in ("forward", "backward")
        for figures in rank.counts.get(direction, {}).values()
    )


def _checks(results: Results) -> tuple[Check, ...]:
    """One check per claim; it passes if it does on every rank of every degree that claims it."""
    claims: dict[str, list[tuple[int, Check]]] = {}
    for degree, ranks in results.items():
        for rank in ranks:
            for check in rank.checks:
                claims.setdefault(check.name, []).append((degree, check))
    return tuple(join_checks(name, each) for name, each in claims.items())


def accuracy_checks(case: Case, tensors: Sequence[TensorReport]) -> Iterator[Check]:
    """The check that ours is as close to fp64 as plain torch's fp32, if the case claims that.

    It covers output, loss and gradients in fp32. Updated weights are left out: an update may divide
    by nearly zero. An error of one unit in the last place counts as none, since a single number may
    be exact on one side by chance.
    """
    if not case.accuracy:
        return
    errors = {
        tensor.name: (tensor.fp64.ours, tensor.fp64.torch)
        for tensor in tensors
        if tensor.fp64 is not None
        and tensor.dtype == "float32"
        and tensor.name.endswith((".grad", "logits", "output", "loss"))
    }
    ratios = {
        name: _times(ours, plain, least=torch.finfo(torch.float32).eps)
        for name, (ours, plain) in errors.items()
    }
    name = f"no further from fp64 than {case.accuracy:g} times plain torch's fp32"
    if not ratios:
        yield Check(name, False, "no tensor was compared")
        return
    worst = max(ratios, key=lambda name: ratios[name])
    detail = (
        f"{len(ratios)} tensors, median {statistics.median(ratios.values()):.2f}, "
        f"worst {ratios[worst]:.2f} ({worst})"
    )
    yield Check(name, ratios[worst] <= case.accuracy, detail)


def _times(ours: float | None, plain: float | None, *, least: float) -> float:
    """How many times further from fp64 ours is; infinite where there is no number."""
    if ours is None or plain is None:
        return 0.0 if ours == plain else math.inf
    return ours / max(plain, least)


def _curves(results: Results) -> dict[str, dict[str, tuple[float, ...]]]:
    """Training -> degree -> losses, of rank 0; the proof compares the loss of all ranks."""
    curves: dict[str, dict[str, tuple[float, ...]]] = {}
    for degree, ranks in results.items():
        for run, losses in ranks[0].curves.items():
            curves.setdefault(run, {})[str(degree)] = tuple(losses)
    return curves


def join_checks(name: str, checks: Sequence[tuple[int, Check]]) -> Check:
    """One check from those of all degrees and ranks, with the first failure's detail if any."""
    failed = [(degree, check) for degree, check in checks if not check.passed]
    if failed:
        degree, check = failed[0]
        return Check(name, False, f"at degree {degree}: {check.detail}")
    details = _in_order([[check.detail for _, check in checks]])
    degrees = _in_order([[str(degree) for degree, _ in checks]])
    at = f"degree{'s' if len(degrees) > 1 else ''} {', '.join(degrees)}"
    return Check(name, True, f"{'; '.join(details)} ({at})")


def _merged(lists: Sequence[Sequence[str]]) -> list[str]:
    """Every name once, in execution order; a new name comes after the one before it in its list."""
    names: list[str] = []
    for others in lists:
        place = 0
        for name in others:
            if name not in names:
                names.insert(place, name)
            place = names.index(name) + 1
    return names


def _in_order(lists: Iterable[Sequence[str]]) -> list[str]:
    """Every item once, in the order in which they first appear."""
    return list(dict.fromkeys(item for items in lists for item in items))


def agreed_contract(
    results: Mapping[str, Mapping[int, Sequence[RankResult]]],
) -> tuple[Scheme, str]:
    """The scheme and contract that all ranks of all degrees of all cases have in common.

    Args:
        results: case -> degree -> every rank's result; not empty.

    Raises:
        MismatchError: two ranks ran under different ones, which alone may change the bits.
    """
    places = [
        (f"rank {result.rank} of {degree} in case {case!r}", result)
        for case, by_degree in results.items()
        for degree, ranks in by_degree.items()
        for result in ranks
    ]
    first_place, first = places[0]
    for place, result in places:
        if (result.scheme, result.contract) != (first.scheme, first.contract):
            what, one, other = "contract", first.contract, result.contract
            if one == other:
                what, one, other = "scheme", str(first.scheme), str(result.scheme)
            raise MismatchError(
                f"{first_place} ran under the {what} {one!r}, {place} under {other!r}, and bits "
                f"are compared under one alone. Give all ranks the same number of threads, and "
                f"models of another dtype, device or scheme a report of their own."
            )
    return first.scheme, first.contract


def _shown_values(
    values_by_degree: Mapping[int, Sequence[TensorValues | None]],
) -> ShownValues | None:
    """What a report shows of one tensor; None if it shows no values.

    The values are those of degree 2, which the notebooks simulate, or of the lowest degree.
    """
    by_degree = {
        degree: [each for each in ranks if each] for degree, ranks in values_by_degree.items()
    }
    by_degree = {degree: ranks for degree, ranks in by_degree.items() if ranks}
    if not by_degree:
        return None
    degree = NOTEBOOK_DEGREE if NOTEBOOK_DEGREE in by_degree else next(iter(by_degree))
    first = by_degree[degree][0]
    shapes_by_degree = {
        str(degree): tuple(each.shape for each in ranks) for degree, ranks in by_degree.items()
    }
    return ShownValues(shapes_by_degree, _numbers(first.ours), _numbers(first.torch), degree)


def _numbers(tensor: Tensor | None) -> Numbers | None:
    return None if tensor is None else _as_tuples(tensor.cpu().tolist())


def _as_tuples(tree: Any) -> Any:
    return tuple(map(_as_tuples, tree)) if isinstance(tree, list) else tree
