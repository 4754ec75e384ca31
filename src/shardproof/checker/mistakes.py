"""What kind of mistake a wrong tensor is: it is compared with what known mistakes would give."""

from collections.abc import Callable, Iterator

from shardproof.checker import in_gradients, in_losses, in_outputs, in_updates, locating, replayed
from shardproof.checker.evidence import KnownMistake
from shardproof.checker.judging import Judge, ParameterJudgement
from shardproof.checker.locating import Fault
from shardproof.checker.program import Program
from shardproof.wording import error_words

_Test = Callable[[Fault, Judge, Program], KnownMistake | None]


def name_mistake(
    fault: Fault, judge: Judge, program: Program
) -> tuple[KnownMistake | None, tuple[str, ...]]:
    """The first known mistake that is consistent with a fault.

    Returns:
        The mistake, None if no known one is; and a sentence about each test that failed, so that
        tensors of a shape that nobody thought of do not hide where the fault is.
    """
    problems = []
    for test in _tests(fault):
        try:
            mistake = test(fault, judge, program)
        except (RuntimeError, ValueError, IndexError) as error:
            problems.append(f"the test for {test.__name__} failed: {error_words(error)}")
            continue
        if mistake is not None:
            return mistake, tuple(problems)
    return None, tuple(problems)


def _tests(fault: Fault) -> Iterator[_Test]:
    """The tests for a fault, those with more evidence first."""
    yield in_outputs.not_finite
    if fault.phase == locating.AFTER:
        yield in_updates.stale_in_next_forward
    elif fault.phase == locating.UPDATE:
        yield in_updates.clipped_otherwise
        yield in_updates.not_updated
        yield in_updates.decayed_twice
    elif isinstance(fault.judgement, ParameterJudgement):
        yield in_gradients.no_gradient
        yield in_gradients.open_part_of_gradient
        yield in_gradients.scaled_everywhere
        yield in_gradients.parts_of_gradient
    elif fault.phase == locating.LOSS:
        yield from _tests_of_weights()
        yield in_losses.padding_counted
        yield in_losses.labels_shifted
        yield in_losses.loss_scaled
        yield in_losses.loss_of_slices
    else:
        yield from _tests_of_weights()
        if fault.phase == locating.BACKWARD:
            yield in_gradients.scaled_everywhere
            yield in_gradients.parts_of_readers
        yield in_outputs.bias_too_often
        yield in_outputs.scaled
        yield in_outputs.unequal_mean
        yield in_outputs.permuted
        yield in_outputs.rearranged
        if fault.phase == locating.FORWARD:
            yield replayed.heads_of_other_ranks
            yield replayed.other_heads
            yield in_outputs.one_rank_right
            yield in_outputs.part_on_all_ranks


def _tests_of_weights() -> Iterator[_Test]:
    """Tests of how parameters and earlier tensors lie."""
    yield in_outputs.one_shard
    yield in_outputs.fused_as_one
    yield in_outputs.open_part
    yield in_outputs.other_order
    yield in_outputs.order_of_weights
