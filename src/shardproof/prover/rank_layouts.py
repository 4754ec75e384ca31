"""`prove --layouts`: one training in many layouts of its ranks, with the same bits in all.

A layout says how many ranks share a model (`tp`), how many groups of ranks share a batch (`dp`),
in how many groups a rank computes its samples (`accumulate`), and whether activations between
blocks are cut along their tokens (`sequence`). Each layout trains the same language model on the
same text, with dropout, clipping and AdamW. The layout of one rank computes each batch leaf by
itself; the others compute a tree node in one pass. Models with tied weights compute leaf by leaf,
where `accumulate` has no effect, and so does a process without our products. Every loss, gradient,
norm, weight and state of the optimizer must have the same hash in all of them. Plain torch is the
second judge: without dropout and in fp64, loss and gradients of the first step must agree with it.
"""

import functools
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.data_parallel import DataParallel
from shardproof.errors import ShardproofError, UsageError
from shardproof.leaves import Layout
from shardproof.numerics import mode
from shardproof.optim.gradient_norms import clip_grad_norm_
from shardproof.prover.case import Case, CaseRun, RecordOptions
from shardproof.prover.cases.text_training import (
    FEW,
    TextTraining,
    kept_double,
    standard_library,
)
from shardproof.prover.hashing import hash_tensor
from shardproof.prover.proof import DEFAULT_SEED, Progress, ProgressCounter
from shardproof.prover.training import (
    make_optimizer,
    record_gradients,
    record_parameters,
    record_state,
)
from shardproof.ranks import open_ranks
from shardproof.scheme import Scheme

TP_SIZES, DP_SIZES, ACCUMULATIONS = (1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 2, 4)
SAMPLE, MOST_RANKS = 12, 12  # layouts, and ranks of one, where no set is named
ROWS, LENGTH = 11, 29  # of a batch: neither leaves nor degrees divide them
DROPOUT = 0.1
TOLERANCE = 1e-9  # of fp64 against plain torch, relative to the largest number of a tensor
_SAMPLE_SEED = 2_024  # seed of the choice


@dataclass(frozen=True, order=True)
class RankLayout:
    """How the ranks of one run share the model and the batch.

    Attributes:
        tp: number of ranks that share a model.
        dp: number of groups of such ranks, which share a batch.
        accumulate: number of groups of samples that a rank computes one after the other.
        sequence: activations between blocks are cut along their tokens.
    """

    tp: int = 1
    dp: int = 1
    accumulate: int = 1
    sequence: bool = False

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the run."""
        return self.tp * self.dp

    def __str__(self) -> str:
        passes = "" if self.accumulate == 1 else f", accumulate {self.accumulate}"
        sequence = ", sequence parallel" if self.sequence else ""
        return f"tp {self.tp} x dp {self.dp}{passes}{sequence}"


ALONE = RankLayout()


def all_layouts(
    tp: Sequence[int] = TP_SIZES,
    dp: Sequence[int] = DP_SIZES,
    accumulate: Sequence[int] = ACCUMULATIONS,
    sequence: Sequence[bool] = (False, True),
) -> tuple[RankLayout, ...]:
    """Every layout of these numbers, that of one rank first; one rank has all tokens anyway."""
    product = {
        RankLayout(ranks, groups, passes, ranks > 1 and is_cut)
        for ranks, groups, passes, is_cut in itertools.product(tp, dp, accumulate, sequence)
    }
    return (ALONE, *sorted(product - {ALONE}))


def sampled_layouts(count: int = SAMPLE) -> tuple[RankLayout, ...]:
    """Some layouts of few ranks, always the same, with many pairs of numbers of two dims.

    Args:
        count: number of layouts, with that of one rank.
    """
    left = [each for each in all_layouts() if each.num_ranks <= MOST_RANKS and each != ALONE]
    random.Random(_SAMPLE_SEED).shuffle(left)
    chosen, covered = [ALONE], _pairs(ALONE)
    while left and len(chosen) < count:
        best = max(left, key=lambda each: (len(_pairs(each) - covered), -each.num_ranks))
        left.remove(best)
        chosen.append(best)
        covered |= _pairs(best)
    return (ALONE, *sorted(chosen[1:]))


def _pairs(layout: RankLayout) -> set[tuple[tuple[str, int], ...]]:
    """The pairs of numbers of two dims."""
    return set(itertools.combinations(sorted(vars(layout).items()), 2))


@dataclass(frozen=True)
class LayoutRun:
    """One case in one layout.

    Attributes:
        layout: of the ranks.
        num_tensors: number of tensors that were recorded.
        differing: names of those with other bits than on one rank, in the order of recording.
        seconds: duration.
    """

    layout: RankLayout
    num_tensors: int
    differing: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class LayoutCase:
    """One case in all layouts.

    Attributes:
        name: of the case.
        hashes: tensor -> SHA-256 on one rank.
        runs: one for each layout, that of one rank first.
        torch_difference: largest relative difference from plain torch, in fp64.
        torch_tensor: where.
        losses: of each step.
    """

    name: str
    hashes: dict[str, str]
    runs: tuple[LayoutRun, ...]
    torch_difference: float
    torch_tensor: str
    losses: tuple[float, ...]

    @property
    def agrees_with_torch(self) -> bool:
        """Whether plain torch agrees."""
        return self.torch_difference <= TOLERANCE

    @property
    def fault(self) -> str:
        """What is wrong first, as the end of a sentence; "" if nothing is."""
        for run in self.runs:
            if run.differing:
                return (
                    f"in case {self.name}, tensor {run.differing[0]!r} is the first that has other "
                    f"bits in layout {run.layout} than in {self.runs[0].layout} "
                    f"({len(run.differing)} of {run.num_tensors} differ)"
                )
        if not self.agrees_with_torch:
            return (
                f"in case {self.name}, {self.torch_tensor} is {self.torch_difference:.1e} off "
                f"plain torch in fp64, more than {TOLERANCE:g}"
            )
        return ""


@dataclass(frozen=True)
class LayoutReport:
    """What a proof over layouts says.

    Attributes:
        cases: one for each case.
        engine, transport: of the ranks.
        seed: of all draws.
        batch_leaves: of the scheme.
        contract: everything that the bits depend on.
    """

    cases: tuple[LayoutCase, ...]
    engine: str
    transport: str
    seed: int
    batch_leaves: int
    contract: str

    @property
    def proved(self) -> bool:
        """Whether no case has a fault."""
        return not any(case.fault for case in self.cases)

    def verdict(self) -> str:
        """The answer as one sentence."""
        fault = next((case.fault for case in self.cases if case.fault), "")
        if fault:
            return f"Not proved: {fault}."
        layouts = len(self.cases[0].runs)
        tensors = sum(len(case.hashes) for case in self.cases)
        names = ", ".join(case.name for case in self.cases)
        return (
            f"Proved for {names} with {tensors} tensors: every tensor has the same bits in "
            f"{layouts} layouts, and plain torch agrees in fp64."
        )

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "proved": self.proved,
            "verdict": self.verdict(),
            "engine": self.engine,
            "transport": self.transport,
            "seed": self.seed,
            "batch_leaves": self.batch_leaves,
            "contract": self.contract,
            "cases": [
                {
                    "name": case.name,
                    "sha256": case.hashes,
                    "losses": list(case.losses),
                    "torch_difference": case.torch_difference,
                    "torch_tensor": case.torch_tensor,
                    "agrees_with_torch": case.agrees_with_torch,
                    "layouts": [
                        {
                            **vars(run.layout),
                            "ranks": run.layout.num_ranks,
                            "tensors": run.num_tensors,
                            "differing": list(run.differing),
                            "seconds": run.seconds,
                        }
                        for run in case.runs
                    ],
                }
                for case in self.cases
            ],
        }


@dataclass
class _Hashes:
    """A recorder that keeps only hashes; see `Recorder`."""

    axis: Axis
    by_name: dict[str, str | None] = field(default_factory=dict)

    def record(self, name: str, tensor: Tensor, layout: Layout, how: RecordOptions) -> None:
        self.by_name[name] = hash_tensor(tensor, layout, self.axis, who=name)

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Nothing is judged here."""


@dataclass(frozen=True)
class LayoutTraining:
    """What every rank runs.

    Attributes:
        case_training: which model is trained, and how.
        layout: of the ranks.
        scheme: with batch leaves.
        seed: of all draws.
        steps: number of updates.
        rows, length: of the batch.
    """

    case_training: TextTraining
    layout: RankLayout
    scheme: Scheme
    seed: int
    steps: int = FEW
    rows: int = ROWS
    length: int = LENGTH

    def __call__(self, axis: Axis) -> tuple[dict[str, str | None], list[float], str, float]:
        """Train on this rank; hashes, losses, contract, and seconds."""
        started = time.perf_counter()
        axes = axis.split(dp=self.layout.dp, tp=self.layout.tp)
        recorder = _Hashes(axes["tp"])
        run = CaseRun(axis=axes["tp"], scheme=self.scheme, seed=self.seed, recorder=recorder)
        run.sequence_parallel = self.layout.sequence
        model = run.adopt(self.case_training.source.build(run, dropout=DROPOUT))
        optimizer = make_optimizer(self.case_training.adamw, model)
        data_parallel = DataParallel(
            model,
            axes["dp"],
            accumulate=self.layout.accumulate,
            passes="leaf" if self.layout == ALONE or _needs_leaves(model) else "node",
        )
        record_parameters(run, model, suffix=" (initial)", judged=False)
        losses = []
        for step in range(self.steps):
            prefix = f"step {step + 1}: "
            tokens = self.tokens(step)
            loss = data_parallel.backward(
                functools.partial(self.loss_of, run, model, tokens), len(tokens)
            )
            losses.append(loss.item())
            run.record(f"{prefix}loss", loss, judged=False)
            record_gradients(run, model, prefix=prefix, judged=False)
            norm = clip_grad_norm_(model, self.case_training.max_norm)
            run.record(f"{prefix}grad_norm", norm, judged=False)
            optimizer.step()
            optimizer.zero_grad()
            record_parameters(run, model, prefix=prefix, judged=False)
            record_state(run, model, optimizer, prefix=prefix, judged=False)
        seconds = time.perf_counter() - started
        return recorder.by_name, losses, run.contract(), seconds

    def tokens(self, step: int) -> Tensor:
        """The whole batch of a step, on every rank: (rows, length)."""
        return standard_library().windows(
            seed=self.seed,
            step=step,
            rows=self.rows,
            length=self.length,
            vocabulary=self.case_training.source.vocabulary,
        )

    def loss_of(
        self, run: CaseRun, model: nn.Module, tokens: Tensor, samples: slice
    ) -> tuple[Tensor, int]:
        """The sum of the losses of some rows, and how many next tokens they have."""
        rows = tokens[samples]
        return self.case_training.source.loss_sum(run, model, rows), rows[:, 1:].numel()

    def difference_from_torch(self) -> tuple[float, str]:
        """The largest relative difference of the first step in fp64 without dropout, and where."""
        ours, plain = (self._in_fp64(axis) for axis in (Axis.solo(), None))
        worst = 0.0, "nothing"
        for name, mine in ours.items():
            scale = plain[name].abs().max().clamp(min=1e-30)
            worst = max(worst, (((mine - plain[name]).abs().max() / scale).item(), name))
        return worst

    def _in_fp64(self, axis: Axis | None) -> dict[str, Tensor]:
        """Loss and gradients of the first step, of ours or of plain torch."""
        alone = Axis.solo() if axis is None else axis
        run = CaseRun(axis=axis, scheme=self.scheme, seed=self.seed, recorder=_Hashes(alone))
        model = self.case_training.source.build(run, dropout=0.0).double()
        tokens = self.tokens(0)
        with kept_double(True):
            if axis is None:
                loss = self.case_training.source.score(run, model, tokens).loss
                loss.backward()
            else:
                loss = DataParallel(model, Axis.solo("dp")).backward(
                    functools.partial(self.loss_of, run, model, tokens), len(tokens)
                )
        gradients = {
            f"the gradient of {name!r}": each.grad
            for name, each in model.named_parameters()
            if each.grad is not None
        }
        return {"the loss": loss.detach(), **gradients}


def prove_layouts(
    cases: Sequence[Case],
    layouts: Sequence[RankLayout],
    *,
    engine: str = "threads",
    transport: str = "auto",
    threads: int | None = None,
    scheme: Scheme,
    seed: int = DEFAULT_SEED,
    steps: int = FEW,
    progress: Progress | None = None,
) -> LayoutReport:
    """Train every case in every layout, and compare.

    Args:
        cases: which train on text.
        layouts: that of one rank is run first in any case.
        engine: what the ranks are.
        transport: what carries bytes between them.
        threads: intra-op threads of each rank; 1 by default.
        scheme: with batch leaves.
        seed: of all draws.
        steps: number of updates.
        progress: called before each run, and once at the end.

    Raises:
        UsageError: a case does not train on text.
        DegreeError: the leaves of the scheme cannot serve a layout.
    """
    case_trainings = [_case_training(case) for case in cases]
    ordered = (ALONE, *(each for each in layouts if each != ALONE))
    count = ProgressCounter(progress, total=len(cases) * (len(ordered) + 1))
    options = {"engine": engine, "transport": transport, "threads": threads}
    reports, contract, used = [], "", ""
    for case, case_training in zip(cases, case_trainings, strict=True):
        training = LayoutTraining(case_training, ALONE, scheme, seed, steps)
        report, contract, used = _prove_case(case.name, training, ordered, options, count)
        reports.append(report)
    count("done")
    return LayoutReport(tuple(reports), engine, used, seed, scheme.batch_leaves or 0, contract)


def _prove_case(
    name: str,
    training: LayoutTraining,
    layouts: Sequence[RankLayout],
    options: dict[str, Any],
    count: ProgressCounter,
) -> tuple[LayoutCase, str, str]:
    """One case in all layouts; also the contract, and the transport of the last layout."""
    count(f"{name}, plain torch")
    worst = training.difference_from_torch()
    reference: dict[str, str] = {}
    losses: tuple[float, ...] = ()
    runs, contract, used = [], "", ""
    for layout in layouts:
        count(f"{name}, {layout}")
        with open_ranks(layout.num_ranks, **options) as ranks:
            try:
                results = ranks.run(replace(training, layout=layout))
            except ShardproofError as error:
                error.add_note(f"This was case {name} in layout {layout}.")
                raise
            used = ranks.transport
        hashes = _joined([each for each, *_ in results])
        if layout == ALONE:
            reference = {tensor: "".join(values) for tensor, values in hashes.items()}
            losses, contract = tuple(results[0][1]), results[0][2]
        seconds = max(duration for *_, duration in results)
        runs.append(LayoutRun(layout, len(hashes), _differing(reference, hashes), seconds))
    return LayoutCase(name, reference, tuple(runs), *worst, losses), contract, used


def _case_training(case: Case) -> TextTraining:
    if isinstance(case.work, TextTraining):
        return case.work
    raise UsageError(
        f"case {case.name!r} does not train a language model on text, and layouts are proved by "
        "such a training. Use gpt, llama, qwen or --model DIR."
    )


def _needs_leaves(model: nn.Module) -> bool:
    """Whether a pass of several leaves may have other bits: tied weights, or not our products."""
    every = list(model.named_parameters(remove_duplicate=False))
    is_tied = len(every) > len(dict(model.named_parameters()))
    return is_tied or bool(mode.missing_products())


def _joined(results: Sequence[dict[str, str | None]]) -> dict[str, frozenset[str]]:
    """Tensor -> its hashes on all ranks that have one, in the order of recording."""
    names = dict.fromkeys(itertools.chain.from_iterable(results))
    return {
        name: frozenset(value for each in results if (value := each.get(name)) is not None)
        for name in names
    }


def _differing(reference: dict[str, str], hashes: dict[str, frozenset[str]]) -> tuple[str, ...]:
    names: Iterator[str] = iter(dict.fromkeys((*reference, *hashes)))
    return tuple(name for name in names if hashes.get(name) != frozenset({reference.get(name, "")}))
