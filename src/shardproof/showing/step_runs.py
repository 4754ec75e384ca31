"""The training step that is shown, of a case, a module or a directory, run on ranks and traced.

The trace has the step alone, and not what comes before it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.checked_objects import checked_model, checked_optimizer
from shardproof.cut.tensor import CutTensor
from shardproof.errors import UsageError
from shardproof.functional import mse_loss
from shardproof.hf.skeleton import skeleton
from shardproof.hf.weights import checked_directory, load, matched
from shardproof.leaves import Layout
from shardproof.observing import Placement, observers
from shardproof.operands import FLOATS
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.prover.case import Case, CaseRun, RecordOptions
from shardproof.ranks import launch
from shardproof.scheme import Scheme
from shardproof.trace.hooks import listening
from shardproof.trace.rank import RankTrace
from shardproof.trace.step import TraceStep
from shardproof.trace.trace import Trace
from shardproof.wording import short_repr as as_text
from shardproof.wording import short_text

NUM_VALUES = 1024  # numbers of larger tensors are not kept, but for a corner
MOST_STEPS = 5000  # of each rank

Counts = dict[str, dict[str, dict[str, int]]]  # direction -> collective -> figures
OpenTrace = Callable[[], AbstractContextManager[None]]
StepFunction = Callable[[Axis, OpenTrace], None]  # what is computed in the context is traced


@dataclass(frozen=True)
class RankSteps:
    """What one rank returns.

    Attributes:
        steps: that were traced.
        num_dropped: steps beyond the limit.
        counts: what the ledger of the rank's axis counted since the first traced part.
    """

    steps: list[TraceStep]
    num_dropped: int
    counts: Counts


@dataclass(frozen=True)
class TracedStep:
    """A step of all ranks.

    Attributes:
        trace: of it.
        counts: of every rank, what its ledger counted.
    """

    trace: Trace
    counts: tuple[Counts, ...]


def traced(
    work: StepFunction, *, degree: int, engine: str, values: bool, num_values: int = NUM_VALUES
) -> TracedStep:
    """Run some work on ranks, and trace the parts of it that it asks for.

    Args:
        work: called on every rank with its axis and with a function; what the rank does inside the
            context that the function returns is traced.
        degree: how many ranks.
        engine: "threads" or "processes".
        values: keep numbers.
        num_values: of tensors up to this size; of larger ones a corner.
    """
    trace = Trace(values=values, num_values=num_values, limit=MOST_STEPS)
    values_per_tensor = num_values if values else 0
    runs = launch(
        partial(run_on_rank, work=work, num_values=values_per_tensor), degree=degree, engine=engine
    )
    trace.take((run.steps, run.num_dropped) for run in runs)
    return TracedStep(trace, tuple(run.counts for run in runs))


def run_on_rank(axis: Axis, *, work: StepFunction, num_values: int) -> RankSteps:
    """Run some work on this rank and trace the parts that it asks for; all ranks call this.

    Args:
        axis: of this rank.
        work: what is run.
        num_values: numbers of larger tensors are not kept, but for a corner; 0: none are.
    """
    rank_trace = RankTrace(axis.rank, num_values=num_values, limit=MOST_STEPS)
    rank_trace.is_writing = False
    is_first = True

    @contextmanager
    def tracing() -> Iterator[None]:
        nonlocal is_first
        if is_first:
            axis.transport.ledger.reset()
            is_first = False
        rank_trace.is_writing = True
        try:
            yield
        finally:
            rank_trace.is_writing = False

    with listening(), rank_trace:
        work(axis, tracing)
    return RankSteps(rank_trace.steps, rank_trace.num_dropped, axis.transport.ledger.as_dict())


class _StepDoneError(Exception):
    """Raised to end a case after its first update."""


class _Recorder:
    """A recorder that keeps nothing, and ends the run at the first updated weight."""

    def __init__(self) -> None:
        self.has_begun = False

    def record(self, name: str, tensor: Tensor, layout: Layout, how: RecordOptions) -> None:
        """A case records its first weights before its step, and updated ones after it."""
        self.has_begun = True
        if how.step is not None:
            raise _StepDoneError

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Nothing is set aside on a rank."""


class _StepRun(CaseRun):
    """A run in which the phases of the first training step are traced."""

    def __init__(self, *, axis: Axis, scheme: Scheme, seed: int, tracing: OpenTrace) -> None:
        self._step_recorder, self._tracing = _Recorder(), tracing
        super().__init__(axis=axis, scheme=scheme, seed=seed, recorder=self._step_recorder)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Creation comes before anything is recorded; evaluation has no gradients."""
        if not self._step_recorder.has_begun or not torch.is_grad_enabled():
            yield
            return
        with self._tracing():
            yield


def case_work(case: Case, *, scheme: Scheme, seed: int) -> StepFunction:
    """The function that every rank runs to show the first step of a case.

    Args:
        case: which is installed.
        scheme: leaves and numerics.
        seed: of everything that the case draws.
    """

    def work(axis: Axis, tracing: OpenTrace) -> None:
        run = _StepRun(axis=axis, scheme=scheme, seed=seed, tracing=tracing)
        try:
            case.work(run)
        except _StepDoneError:
            return

    return work


BuildModel = Callable[[Axis], nn.Module]
MEAN_OF_SQUARES = "mean_of_squares"  # what a trace calls it


def step_work(
    build: BuildModel,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    loss: Callable[..., Tensor] | None = None,
    target: Any = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
) -> StepFunction:
    """Build, forward, loss, backward and update, as every rank runs them.

    Args:
        build: makes the model of a rank.
        inputs: arguments and keyword arguments; every rank copies them.
        loss: as in `show`.
        target: as in `show`.
        optimizer: as in `show`.
    """

    def work(axis: Axis, tracing: OpenTrace) -> None:
        model = checked_model(build(axis), what="what the function of an axis returned")
        stepping = None
        if optimizer is not None:
            stepping = checked_optimizer(
                optimizer(model.parameters()), what="what the function optimizer returned"
            )
        # A copy each: ranks as threads would share gradients, and what is written in place.
        arguments, options, label = _copied((*inputs, target))
        with tracing():
            output = model(*arguments, **options)
            loss_value = _loss_of(output, loss, label, axis)
            loss_value.backward()
        if stepping is not None:
            with tracing():
                stepping.step()

    return work


def _loss_of(output: Any, loss: Callable[..., Tensor] | None, target: Any, axis: Axis) -> Tensor:
    place = _place(output)
    if loss is not None:
        loss_value = loss(output) if target is None else loss(output, target)
    elif isinstance(getattr(output, "loss", None), Tensor):
        loss_value = output.loss
    elif isinstance(output, Tensor):
        if place is not None and place.kind == "Shard" and axis.size > 1:
            raise UsageError(
                f"the output of the model is cut, {place}: each rank has a part of it, and the "
                "mean of the squares wants all. Gather it ('colwise_gather_output' in the plan), "
                "or give loss=, a function of this rank's part."
            )
        loss_value = mse_loss(output, torch.zeros_like(output), who=MEAN_OF_SQUARES)
    else:
        raise UsageError(
            f"the model returns a {type(output).__name__} without a loss. Give loss=, a function "
            "of it."
        )
    is_number = (
        isinstance(loss_value, Tensor) and loss_value.numel() == 1 and loss_value.dtype in FLOATS
    )
    if not is_number or not loss_value.requires_grad:
        raise UsageError(
            f"the loss is {as_text(loss_value)}, and a step needs one number that depends on a "
            "parameter. Return what a loss of torch gives, such as its mean."
        )
    if place is not None and place.kind == "Shard":
        axis.agree(
            {"loss": loss_value.item()},
            what="losses",
            way_out=f"The output of the model is cut, {place}: the loss must add the ranks' parts.",
        )
    return loss_value


def _place(output: Any) -> Placement | None:
    """The placement of the output, as far as this rank's trace knows it."""
    if not isinstance(output, Tensor) or isinstance(output, CutTensor):
        return None
    traces = (each for each in observers() if isinstance(each, RankTrace))
    return next((trace.placement(output) for trace in traces), None)


def _copied(tree: Any) -> Any:
    """Copy tensors, with their `requires_grad`; return anything else as it is."""
    if isinstance(tree, Tensor):
        return tree.detach().clone().requires_grad_(tree.requires_grad)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(_copied, tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map(_copied, tree))
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return tree


ROWS, LENGTH = 1, 6  # of the batch
LEARNING_RATE = 0.1
# On the ranks of one machine, with gradients; larger models are what `shardproof plan` is for.
MOST_PARAMETERS = 300_000_000
MOST_WITH_VALUES = 20_000_000
_WEIGHTS = "*.safetensors"


def model_work(
    directory: str | Path, *, scheme: Scheme, values: bool
) -> tuple[StepFunction, str, tuple[str, ...]]:
    """The function that every rank runs, the name of the model, and sentences about the step.

    Args:
        directory: with config.json, and with safetensors or without.
        scheme: leaves, numerics, and the seed of random weights and tokens.
        values: numbers are kept, to be printed or written to a file.

    Raises:
        UsageError: the extra is not installed, the directory has no model that can be run, or the
            model is too large.
    """
    folder = checked_directory(directory).resolve()
    plain = skeleton(folder)
    _check_size(plain, short_text(str(directory)), values)
    has_weights = any(folder.glob(_WEIGHTS))
    if has_weights:
        matched(plain, folder)  # raises before any run if the weights do not fit

    def build(axis: Axis) -> nn.Module:
        model = initialize(
            parallelize(copy.deepcopy(plain), None, axis, scheme=scheme), scheme=scheme
        )
        return (load(model, folder) if has_weights else model).train()

    vocabulary = int(plain.config.get_text_config().vocab_size)  # type: ignore[operator,union-attr]
    generator = torch.Generator().manual_seed(scheme.seed)
    tokens = torch.randint(vocabulary, (ROWS, LENGTH), generator=generator)
    options: dict[str, Any] = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    about = (
        f"One training step on {ROWS} x {LENGTH} random tokens: forward, backward, and an update "
        f"by SGD with a learning rate of {LEARNING_RATE}.",
        "The weights are those of the directory."
        if has_weights
        else "The directory has no weights: this run takes random weights.",
    )
    return step_work(build, ((), options), optimizer=_sgd), type(plain).__name__, about


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def _check_size(model: nn.Module, where: str, values: bool) -> None:
    """Raise if the model is too large to run here, or for its numbers to be shown."""
    num = sum(parameter.numel() for parameter in model.parameters())
    if num > MOST_PARAMETERS:
        raise UsageError(
            f"--model {where} has {num:,} parameters, and show runs a step of at most "
            f"{MOST_PARAMETERS:,} on this machine. Take a config with fewer or smaller layers, or "
            "use shardproof plan, which runs nothing."
        )
    if values and num > MOST_WITH_VALUES:
        raise UsageError(
            f"--model {where} has {num:,} parameters, and --values, --html and --json, which keep "
            f"numbers, take at most {MOST_WITH_VALUES:,}. Leave them out, or take a config with "
            "fewer or smaller layers."
        )
