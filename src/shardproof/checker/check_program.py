"""`check`: whether a tensor-parallel program agrees with a plain one, and if not, what is wrong."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardproof import torchrun
from shardproof.axis import Axis
from shardproof.checked_values import checked_whole
from shardproof.checker import locating
from shardproof.checker import mistake_kinds as kinds
from shardproof.checker.check_report import (
    CheckedLayout,
    CheckedTensor,
    CheckReport,
    FirstDifference,
)
from shardproof.checker.dropout import DropoutFault, find_dropout_fault
from shardproof.checker.evidence import KnownMistake
from shardproof.checker.judging import Judge, Judgement, ParameterJudgement, Runs
from shardproof.checker.locating import Fault, Findings
from shardproof.checker.mistakes import name_mistake
from shardproof.checker.placement import apart, slice_for
from shardproof.checker.program import Program
from shardproof.checker.step_recording import INPUT, Recording, common_prefix, record
from shardproof.errors import RankError, ShardproofError, UsageError
from shardproof.leaves import checked_degree
from shardproof.ranks import ENGINES, open_ranks
from shardproof.wording import error_words, few, short_repr

_NUM_MOVED = 4  # runs of the reference from parameters whose last bits differ


def check(
    parallel: Callable[[Any], nn.Module],
    reference: Callable[[], nn.Module],
    batch: Any,
    loss: Callable[..., Tensor] | None = None,
    *,
    degree: int = 2,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    steps: int = 1,
    update: Callable[..., Any] | None = None,
    reference_update: Callable[..., Any] | None = None,
    parallel_loss: Callable[..., Tensor] | None = None,
    names: Mapping[str, str] | None = None,
    engine: str = "processes",
    timeout: float = 120.0,
) -> CheckReport:
    """Judge a tensor-parallel program of any kind against the plain module (docs/check.md).

    Args:
        parallel: builds this rank's part, from the weights of the reference. It gets the process
            group of the ranks, which is the default group too; with engine="threads" an `Axis`.
        reference: builds the plain module; before both, torch is seeded alike.
        batch: what both are called with, or a function that makes it: a dict gives keyword
            arguments, a tuple or list positional ones, everything else is one argument.
        loss: of the output, or of the output and the batch; a scalar. None: `output.loss`, or the
            mean of the squares of the output.
        degree: number of ranks, 2 or more; not under torchrun, which has started them.
        optimizer: makes one for a list of parameters. None: SGD.
        steps: number of updates; one more forward follows.
        update: of the program, its optimizer and the group, in place of `optimizer.step()`.
        reference_update: the same for the plain module, without a group.
        parallel_loss: in place of `loss` on the ranks; may take the group as a third argument.
        names: parameters of the program that have another name in the plain module.
        engine: "processes", or "threads" for models that shardproof cut.
        timeout: seconds that a rank waits for the others.

    Returns:
        The report; under torchrun the same on every rank.

    Raises:
        UsageError, DegreeError: an argument is invalid.
        RankError: a rank raised an error or ended.
    """
    program = Program(
        parallel, reference, batch, loss,
        parallel_loss=parallel_loss, optimizer=optimizer, update=update,
        reference_update=reference_update, steps=checked_whole(steps, "steps"),
    )  # fmt: skip
    if torchrun.read(os.environ) is not None:
        return _here(program, names)
    return _on_new_ranks(program, names, degree=degree, engine=engine, timeout=timeout)


def _on_new_ranks(
    program: Program, names: Mapping[str, str] | None, *, degree: Any, engine: str, timeout: float
) -> CheckReport:
    """Check on ranks that are started for it."""
    degree = checked_degree(degree)
    if degree < 2:
        raise UsageError(
            f"degree={degree} has no ranks to compare. Use 2 or more, for instance degree=2."
        )
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {short_repr(engine)}. Use one of: {', '.join(ENGINES)}.")
    transport = "gloo" if engine == "processes" else "auto"
    with open_ranks(
        degree, engine, timeout=timeout, transport=transport, compare_inputs=False
    ) as ranks:

        def run(work: Callable[[Any], Any]) -> list[Any]:
            return ranks.run(functools.partial(_on_rank, work=work, engine=engine))

        return _checked(program, names, run)


_Run = Callable[[Callable[[Any], Any]], list[Any]]


def _on_rank(axis: Axis, *, work: Callable[[Any], Any], engine: str) -> Any:
    return work(dist.group.WORLD if engine == "processes" else axis)


def _here(program: Program, names: Mapping[str, str] | None) -> CheckReport:
    """Check on the ranks that torchrun started."""
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("gloo")

    def run(work: Callable[[Any], Any]) -> list[Any]:
        outcome: tuple[Any, str] = None, ""
        try:
            outcome = work(dist.group.WORLD), ""
        except Exception as error:  # told to all ranks, so that they raise together
            outcome = None, error_words(error)
        gathered: list[tuple[Any, str]] = [outcome] * dist.get_world_size()
        dist.all_gather_object(gathered, outcome)
        for rank, (_, problem) in enumerate(gathered):
            if problem:
                raise RankError(f"rank {rank} raised {problem}")
        return [result for result, _ in gathered]

    report = _checked(program, names, run)
    if is_ours:
        dist.destroy_process_group()  # not after an error: the others may be gone
    return report


def _checked(program: Program, names: Mapping[str, str] | None, run: _Run) -> CheckReport:
    before = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[]):  # the runs are seeded
            return _judged(program, names, run)
    finally:
        torch.set_default_dtype(before)


def _judged(program: Program, names: Mapping[str, str] | None, run: _Run) -> CheckReport:
    reference = record(program, None)
    singles = run(functools.partial(_single, program))
    first, again, drawn = (list(each) for each in zip(*singles, strict=True))
    prefix = "" if names else common_prefix(first[0].parameters, reference.parameters)
    single = Runs([each.without(prefix) for each in first], reference)
    changed = _changed(single.ranks, [each.without(prefix) for each in again])
    if changed is not None:
        judge = Judge(single, None, (), names)
        return _report(program, judge, Findings(), "", _of_change(changed))
    double, note = _double(program, run, prefix)
    moved = () if double is not None else _moved(program)
    judge = Judge(single, double, moved, names)
    findings = locating.find(judge, program.steps)
    dropout = None
    with_dropout = [each.without(prefix) for each in drawn if each is not None]
    if findings.fault is None and len(with_dropout) == judge.degree:
        dropout = find_dropout_fault(judge, with_dropout)
    return _report(program, judge, findings, note, dropout)


def _single(program: Program, group: Any) -> tuple[Recording, Recording, Recording | None]:
    """The recordings in fp32: two that must be the same, and one with dropout if there is any."""
    first = record(program, group)
    again = record(program, group)
    return first, again, record(program, group, draws=True) if first.draws else None


def _double(program: Program, run: _Run, prefix: str) -> tuple[Runs | None, str]:
    """The recordings in fp64, or why there are none."""
    try:
        reference = record(program, None, torch.float64)
        ranks = run(functools.partial(_in_double, program))
    except UsageError:
        raise
    except (ShardproofError, RuntimeError, TypeError, ValueError) as error:
        return None, f"the program does not run in fp64: {error_words(error)}"
    return Runs([each.without(prefix) for each in ranks], reference), ""


def _in_double(program: Program, group: Any) -> Recording:
    return record(program, group, torch.float64)


def _moved(program: Program) -> list[Recording]:
    """Runs of the plain module from parameters whose last bits differ."""
    return [
        record(program, None, before=functools.partial(_move, seed=seed))
        for seed in range(_NUM_MOVED)
    ]


def _move(module: nn.Module, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                signs = torch.randint(-1, 2, parameter.shape, generator=generator)
                parameter.add_(parameter * signs, alpha=torch.finfo(parameter.dtype).eps)


def _changed(first: Sequence[Recording], again: Sequence[Recording]) -> tuple[str, str] | None:
    """The module and name of the first tensor that differs between two runs; None if none does."""
    for one, two in zip(first, again, strict=True):
        for at, value in one.values.items():
            if at not in two.values or not _is_same(value, two.values[at]):
                # What comes into a module was made by the one around it.
                maker = at.path.rpartition(".")[0] if at.side == INPUT else at.path
                return maker, f"{at.side} of {at.path or 'the model'}"
        for a, b in zip(one.losses, two.losses, strict=True):
            if not _is_same(a, b):
                return "", "loss"
        for (step, name), gradient in one.parameter_gradients.items():
            other = two.parameter_gradients.get((step, name))
            if (gradient is None) != (other is None) or (
                gradient is not None and other is not None and not _is_same(gradient, other)
            ):
                return name.rpartition(".")[0], f"gradient of {name}"
        for (step, name), weight in one.weights.items():
            if not _is_same(weight, two.weights[step, name]):
                return name.rpartition(".")[0], f"updated {name}"
    return None


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _of_change(changed: tuple[str, str]) -> "_Change":
    return _Change(*changed)


class _Change:
    """The first tensor that differs between two runs from the same seeds."""

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name


def _report(
    program: Program,
    judge: Judge,
    findings: Findings,
    note: str,
    other: "DropoutFault | _Change | None",
) -> CheckReport:
    fault = findings.fault
    mistake: KnownMistake | None = None
    module, phase = None, ""
    notes = [each for each in (note, _not_compared(judge)) if each]
    if fault is not None:
        mistake, problems = name_mistake(fault, judge, program)
        notes += problems
        module, phase = fault.module, fault.phase
    elif isinstance(other, DropoutFault):
        mistake = KnownMistake(other.kind, other.evidence)
        module, phase = other.module, "dropout"
    elif other is not None:
        mistake = KnownMistake(
            kinds.NOT_DETERMINISTIC, f"the {other.name} differs between two runs"
        )
        module, phase = other.module, "two runs"
    precision = "fp32 and fp64" if judge.double is not None else "fp32 and moved last bits"
    tensors = (
        *(_checked_tensor(step, each) for step, each in findings.judgements),
        *(_checked_tensor(step, each) for step, each in findings.parameters),
    )
    return CheckReport(
        right=module is None,
        verdict=_verdict(judge, fault, mistake, module, phase, precision),
        module=module,
        kind=None if mistake is None else mistake.kind,
        evidence="" if mistake is None else _evidence(mistake),
        phase=phase,
        source="" if module is None else judge.runs.ranks[0].sources.get(module, ""),
        degree=judge.degree,
        precision=precision,
        note="; ".join(notes),
        tensors=tensors,
        layouts=tuple(
            CheckedLayout(
                each.name,
                each.whole,
                each.shape,
                str(each),
                each.declared,
                tuple(each.held(rank) for rank in range(judge.degree)),
            )
            for each in judge.layouts.values()
        ),
        differences=_differences(fault),
        modules=tuple(judge.runs.reference.classes.items()),
    )


def _not_compared(judge: Judge) -> str:
    """Which parameters were not compared, as a sentence; empty if all were."""
    found = [each for each in judge.layouts.values() if each.is_found]
    names = {name for each in judge.runs.ranks for name in each.parameters}
    strange = sorted(names - {each.name for each in found})
    missing = sorted(set(judge.runs.reference.parameters) - {each.whole for each in found})
    sentences = []
    if strange:
        sentences.append(
            f"gradients and updates were not compared for {few(strange)}, whose elements were not "
            "found in the plain module"
        )
    if missing:
        sentences.append(f"the plain module's {few(missing)} was not found in the program")
    return "; ".join(sentences)


def _verdict(
    judge: Judge,
    fault: Fault | None,
    mistake: KnownMistake | None,
    module: str | None,
    phase: str,
    precision: str,
) -> str:
    if module is None:
        return (
            f"Right at degree {judge.degree}: every difference from the plain module is rounding "
            f"({precision})."
        )
    where = module or "the model"
    shown = ""
    if fault is not None:
        shown = f", first seen in the {fault.judgement.name}"
    what = (
        "no known mistake would give these numbers"
        if mistake is None
        else f"consistent with {mistake.kind!r}: {kinds.KINDS[mistake.kind][0]}"
    )
    return f"Wrong at degree {judge.degree}, in the {phase} of {where}{shown}; {what}."


def _evidence(mistake: KnownMistake) -> str:
    left = mistake.unexplained
    rest = "" if left is None else f"; unexplained: {left:.1e} of the largest element"
    return f"{mistake.evidence}{rest}"


def _checked_tensor(step: int, judged: Judgement | ParameterJudgement) -> CheckedTensor:
    whole = judged.whole
    scale = float(whole.abs().max()) if whole.numel() else 0.0

    def relative(difference: float | None) -> float | None:
        return difference if difference is None or not scale else difference / scale

    placement = str(judged.placement if isinstance(judged, Judgement) else judged.layout)
    return CheckedTensor(
        judged.name,
        judged.module,
        step + 1,
        placement,
        relative(judged.in_fp32),
        relative(judged.in_fp64),
        judged.verdict,
    )


def _differences(fault: Fault | None) -> tuple[FirstDifference, ...]:
    """The first elements of the faulty tensor that differ, one on each of two ranks at most."""
    if fault is None:
        return ()
    judged = fault.judgement
    if isinstance(judged, ParameterJudgement):
        expected = judged.expected if judged.locals else []
    else:
        expected = [
            slice_for(rank, judged.locals, judged.whole) for rank in range(len(judged.locals))
        ]
    found = []
    for rank, (local, whole) in enumerate(zip(judged.locals, expected, strict=False)):
        if local.shape != whole.shape or not local.numel():
            continue
        off = (local.double() - whole.double()).abs()
        wrong = ~(off <= 0.5 * min(float(off.nan_to_num(0).max()), apart(local, whole)))
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            found.append(
                FirstDifference(judged.name, rank, index, float(local[index]), float(whole[index]))
            )
    return tuple(found[:2])
