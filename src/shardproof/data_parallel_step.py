"""`DataParallelStep`: the passes of one step, and the sum of their gradients over the ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from shardproof.arriving_gradients import Arrivals
from shardproof.axis import Axis
from shardproof.batch_gradients import BatchStep, PassError, Passes, Sums, passes_of
from shardproof.errors import MismatchError, NumericsError, ShardproofError, UsageError
from shardproof.gradient_buckets import LOSS, Bucket, buckets_of, loss_bucket
from shardproof.gradient_exchange import GradientExchange, PlannedBuckets
from shardproof.leaves import Cut
from shardproof.plans.apply import sample_weights
from shardproof.transport.base import digest_of

Gradients = list[Tensor | None]
Problem = tuple[type[ShardproofError], str]


@dataclass(frozen=True)
class StepOptions:
    """What all steps of a `DataParallel` have in common; its arguments, checked.

    Attributes:
        model, axis, passes, accumulate, bucket_bytes: as its arguments.
        num_leaves: of a batch with at least as many samples.
        can_overlap: whether gradients can be sent while backward runs.
    """

    model: nn.Module
    axis: Axis
    num_leaves: int
    passes: Passes
    accumulate: int
    bucket_bytes: int
    can_overlap: bool


@dataclass
class StepHistory:
    """What a step knows of those before it.

    Attributes:
        is_running: whether a step has begun and not ended.
        is_first: whether the weights of the ranks are still to be compared.
        is_compared: whether passes of several leaves were compared with those of one.
        sent_early: names of the parameters whose gradients can be sent while backward runs.
    """

    is_running: bool = False
    is_first: bool = True
    is_compared: bool = False
    sent_early: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class _PartOfStep:
    """What a rank tells the others of its part of a step."""

    num_samples: int
    count: int
    has_gradient: tuple[bool, ...]
    late: tuple[int, ...]
    uses_axis: bool
    draws: tuple[int, ...]
    loss_dtype: torch.dtype
    problem: Problem | None


class DataParallelStep:
    """One step of a `DataParallel`: a block with a loop over the passes of this rank.

    `DataParallel.step` makes and describes it.

    Args:
        options: of the `DataParallel`.
        history: of its steps so far; updated.
        num_samples: number of samples of the batch, on all ranks together.
    """

    def __init__(self, options: StepOptions, history: StepHistory, num_samples: int) -> None:
        self._options = options
        self._history = history
        self._num_samples = num_samples
        self._axis = options.axis
        self._state: Literal["new", "open", "looping", "ended"] = "new"
        self._problem: PassError | NumericsError | None = None
        self._loss: Tensor | None = None
        self._sums_by_leaf: Sums = []
        self._late: set[int] = set()

    @property
    def loss(self) -> Tensor:
        """(), Replicate: the mean of the losses of the whole batch, after the block."""
        if self._loss is None:
            raise UsageError(
                "the loss of a step is known when its block has ended without an error. Read "
                "step.loss after the block."
            )
        return self._loss

    # ---- the block and its loop

    def __enter__(self) -> "DataParallelStep":
        if self._state != "new":
            raise PassError(
                "a step is used once, and this one has begun already. Call "
                "data_parallel.step(num_samples) for each."
            )
        if self._history.is_running:
            raise PassError(
                "another step of this DataParallel has begun and not ended. End its block first."
            )
        self._prepare()
        if self._history.is_first:
            self._compare_weights()
        self._planned = PlannedBuckets(self._exchange, self._agreed_buckets())
        self._num_calls = self._calls_of_axis()
        self._before = [parameter.grad for _, parameter in self._named]
        self._state, self._history.is_running = "open", True
        return self

    def __iter__(self) -> "DataParallelStep":
        if self._state != "open":
            raise self._refusal(
                "a step was looped over twice. Use one loop, which gives all passes of this rank."
                if self._state == "looping"
                else "a step was looped over outside of its block. Use: with "
                "data_parallel.step(num_samples) as step: for samples in step: ..."
            )
        self._state = "looping"
        return self

    def __next__(self) -> slice:
        self._require_loop()
        waiting = self._step.open_samples
        if waiting is not None:
            raise self._refusal(
                f"step.backward was not called for samples {waiting.start}:{waiting.stop}. Call "
                "step.backward(loss) once for each slice of the loop."
            )
        if self._num_begun == len(self._passes):
            raise StopIteration
        if self._compares and self._num_begun == self._num_by_leaf:
            self._sums_by_leaf = self._step.sums
            self._step.forget()
        self._num_begun += 1
        return self._step.begin(self._passes[self._num_begun - 1])

    def backward(self, loss: Tensor, count: int | Tensor | None = None) -> None:
        """Compute the backward of the pass that the loop has begun; once for each slice.

        Args:
            loss: the sum of the losses of these samples, (), or the loss of each, (samples,).
            count: number that the sum is divided by, such as the number of tokens that count; the
                number of samples if it is None.

        Raises:
            UsageError: the loss is no sum with a gradient, the count is no whole number, a
                gradient is sparse, the pass changed a buffer or drew from torch's global
                generator, or it has had its backward.

        Comm:
            backward as the model; in the last pass the all_reduces of gradients may begin, which
            the end of the block makes otherwise.
        """
        self._require_loop()
        samples = self._step.open_samples
        if samples is None:
            raise self._refusal(
                "step.backward was called twice for one slice, or before the loop began. Call it "
                "once for each slice that the loop over the step gives."
            )
        if count is None:
            count = samples.stop - samples.start
        arrivals = self._arrivals()
        try:
            self._step.end(loss, count, arrivals)
        except (PassError, NumericsError) as error:
            self._problem = error
            raise
        if arrivals is not None:
            self._late = arrivals.late

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._state, self._history.is_running = "ended", False
        self._step.leave()
        gradients: Gradients | None = None
        try:
            if error is None or isinstance(error, PassError | NumericsError):
                self._loss, gradients = self._end(error)
        finally:
            for (_, parameter), grad in zip(self._named, self._before, strict=True):
                parameter.grad = grad
            if gradients is None:
                self._step.undo_draws()
                self._history.sent_early = frozenset()
        if gradients is None:
            return
        for (_, parameter), grad in zip(self._named, gradients, strict=True):
            if grad is not None:
                grad = grad.view(parameter.shape).to(parameter.dtype)
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    def _require_loop(self) -> None:
        if self._problem is not None:
            raise self._problem
        if self._state != "looping":
            raise self._refusal(
                "step.backward was called outside of the loop over its step. Call it once for each "
                "slice that the loop gives."
            )

    def _refusal(self, message: str) -> PassError:
        """An error that the other ranks are told of when the block ends."""
        self._problem = PassError(message)
        return self._problem

    # ---- before the passes

    def _prepare(self) -> None:
        self._named = [
            (name, each)
            for name, each in self._options.model.named_parameters()
            if each.requires_grad
        ]
        cut = Cut(self._num_samples, self._options.num_leaves, self._axis.size)
        self._step = BatchStep(self._options.model, self._named, cut)
        self._exchange = GradientExchange(self._axis, self._step)
        run, options = cut.run(self._axis.rank), self._options
        passes = passes_of(run, cut.num_leaves, options.passes, options.accumulate)
        # The first step with several leaves in a pass: each leaf by itself, then these passes.
        has_several = any(len(each) > 1 for each in passes)
        self._compares = has_several and not self._history.is_compared
        by_leaf = passes_of(run, cut.num_leaves, "leaf") if self._compares else []
        self._num_by_leaf = len(by_leaf)
        self._passes = by_leaf + passes
        self._num_begun = 0

    def _compare_weights(self) -> None:
        self._axis.agree(
            sample_weights(self._options.model, with_parts=True),
            what="weights",
            way_out="Give every rank of the axis the same weights: load one state, or draw them "
            "from one seed.",
        )

    def _agreed_buckets(self) -> Iterable[Bucket]:
        """The buckets that are sent while backward runs: the same on all ranks, or none."""
        if not self._options.can_overlap:
            return ()
        early = self._history.sent_early
        places = [place for place, (name, _) in enumerate(self._named) if name in early]
        digest = f"{digest_of(repr([self._named[place][0] for place in places])):016x}"
        told = self._axis.gather_small((self._num_samples, digest), what="the begin of a step")
        self._check_num_samples([num_samples for num_samples, _ in told])
        if any(each != digest for _, each in told):
            return ()
        return buckets_of(self._named, places, self._options.bucket_bytes)

    def _check_num_samples(self, told: Sequence[int]) -> None:
        if len(set(told)) > 1:
            sides = ", ".join(f"rank {rank}: {each}" for rank, each in enumerate(told))
            raise MismatchError(
                f"the ranks of axis {self._axis.name!r} were given different num_samples. {sides}. "
                "Give the number of samples of the whole batch on every rank."
            )

    def _check_trained(self, told: Sequence[int]) -> None:
        if len(set(told)) > 1:
            sides = ", ".join(f"rank {rank}: {each}" for rank, each in enumerate(told))
            raise MismatchError(
                f"the ranks of axis {self._axis.name!r} have different numbers of parameters that "
                f"require a gradient. {sides}. Set requires_grad alike on every rank."
            )

    # ---- while the passes run

    def _arrivals(self) -> Arrivals | None:
        """What watches the backward of the last pass, in which gradients become complete."""
        if not self._options.can_overlap or self._num_begun < len(self._passes):
            return None
        leaves = self._passes[-1]

        def take(place: int, grad: Tensor | None) -> None:
            self._step.put(place, (leaves.start, leaves.stop), grad)
            self._planned.complete(place)

        # Sums that are still to be compared are not sent; the others wait for this rank's.
        return Arrivals(self._named, () if self._compares else self._planned.places, take)

    def _calls_of_axis(self) -> int:
        return sum(count.calls for *_, count in self._axis.transport.ledger)

    # ---- after the passes

    @torch.no_grad()
    def _end(self, error: PassError | NumericsError | None) -> tuple[Tensor, Gradients]:
        """Loss and gradients of the whole batch, flat, after the division."""
        problem = self._found_problem(error)
        self._planned.send_rest()
        num_calls = self._calls_of_axis() - self._num_calls - self._exchange.num_started
        uses_axis = self._options.can_overlap and num_calls != 0
        sums = self._exchange.finish()
        told = self._told(problem, uses_axis)
        count = sum(each.count for each in told)
        if count == 0:
            raise UsageError(
                "the counts of all samples are 0, and the mean of no losses is not a number. Leave "
                "out a batch in which nothing counts."
            )
        has_gradient = [any(each) for each in zip(*(t.has_gradient for t in told), strict=True)]
        sums += self._sums_of_others(has_gradient, [each.loss_dtype for each in told])
        loss, gradients = torch.empty(0), list[Tensor | None]([None] * len(self._named))
        for bucket, flat in sums:
            flat.div_(count)
            for place, part in zip(bucket.places, flat.split(bucket.sizes), strict=True):
                if place == LOSS:
                    loss = part.view(())
                elif has_gradient[place]:
                    gradients[place] = part
        self._remember(told, has_gradient)
        return loss, gradients

    def _found_problem(self, error: PassError | NumericsError | None) -> Problem | None:
        """What is wrong with the passes of this rank."""
        error = self._problem or error
        if error is not None:
            return NumericsError if isinstance(error, NumericsError) else UsageError, str(error)
        if self._step.num_ended < len(self._passes):
            return UsageError, (
                f"the block of a step ended after {self._step.num_ended} of its "
                f"{len(self._passes)} passes. Do not leave the loop early, and call step.backward "
                "for each slice: the gradients are those of the whole batch."
            )
        difference = self._step.difference(self._sums_by_leaf) if self._compares else ""
        return (NumericsError, difference) if difference else None

    def _told(self, problem: Problem | None, uses_axis: bool) -> list[_PartOfStep]:
        """What the ranks tell each other, after their problems and draws."""
        step = self._step
        mine = _PartOfStep(
            self._num_samples,
            step.count,
            step.has_gradient(),
            tuple(sorted(self._late)),
            uses_axis,
            step.draws(),
            step.loss_dtype,
            problem,
        )
        told: list[_PartOfStep] = self._axis.gather_small(mine, what="the part of a batch")
        self._check_num_samples([each.num_samples for each in told])
        self._check_trained([len(each.has_gradient) for each in told])
        for kind, message in [each.problem for each in told if each.problem is not None]:
            raise kind(message)
        step.advance_draws([max(each) for each in zip(*(each.draws for each in told), strict=True)])
        return told

    def _sums_of_others(
        self, has_gradient: Sequence[bool], loss_dtypes: Sequence[torch.dtype]
    ) -> list[tuple[Bucket, Tensor]]:
        """The sums of the loss, and of all gradients that were not sent while backward ran."""
        is_double = torch.float64 in loss_dtypes
        device = self._named[0][1].device if self._named else torch.device("cpu")
        most_bytes = self._options.bucket_bytes if self._axis.size > 1 else 0  # alone: unpacked
        places = {place for place, has in enumerate(has_gradient) if has} - self._planned.places
        self._exchange.start(loss_bucket(torch.float64 if is_double else torch.float32, device))
        for bucket in buckets_of(self._named, places, most_bytes):
            self._exchange.start(bucket)
        return self._exchange.finish()

    def _remember(self, told: Sequence[_PartOfStep], has_gradient: Sequence[bool]) -> None:
        """Keep what the next step begins with, the same on all ranks."""
        late = {place for each in told for place in each.late}
        can_overlap = self._options.can_overlap and not any(each.uses_axis for each in told)
        self._history.sent_early = frozenset(
            name
            for place, (name, _) in enumerate(self._named)
            if can_overlap and has_gradient[place] and place not in late
        )
        self._history.is_compared |= self._compares
        self._history.is_first = False
