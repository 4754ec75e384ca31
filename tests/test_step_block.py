"""`DataParallel.step`: a loop of one's own, the ways to leave it, and what holds inside of it."""

import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardproof as sp
from shardproof import DataParallel, batch_leaves
from shardproof.data_parallel_step import DataParallelStep
from shardproof.errors import NumericsError, RankError, UsageError

Body = Callable[[nn.Module, DataParallelStep], None]
ROWS = 11
PLAN = {"0": "colwise_rep", "3": "rowwise_rep"}
X = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(2))
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(5)
    PLAIN = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 6))


def make(axis: sp.Axis | None = None, **options: Any) -> tuple[nn.Module, DataParallel]:
    """A cut model, and a `DataParallel` over the ranks of an axis."""
    scheme = sp.Scheme(batch_leaves=8, seed=3)
    model = sp.parallelize(copy.deepcopy(PLAIN), PLAN, sp.Axis.solo(), scheme=scheme).train()
    return model, DataParallel(model, axis or sp.Axis.solo("dp"), **options)


def losses(model: nn.Module, samples: slice) -> Tensor:
    """(samples,)."""
    each: Tensor = model(X[samples]).square().sum(1)
    return each


def by_function(axis: sp.Axis, **options: Any) -> list[Tensor]:
    """Losses and gradients of two steps, by `backward`."""
    model, parallel = make(axis, **options)

    def loss_of(at: slice) -> tuple[Tensor, int]:
        return losses(model, at), 3 * (at.stop - at.start)

    means = [parallel.backward(loss_of, ROWS) for _ in range(2)]
    return [*means, *(each.grad for each in model.parameters() if each.grad is not None)]


def by_block(axis: sp.Axis, **options: Any) -> list[Tensor]:
    """The same, by a loop."""
    model, parallel = make(axis, **options)
    means = []
    for _ in range(2):
        with parallel.step(ROWS) as step:
            for samples in step:
                step.backward(losses(model, samples), 3 * (samples.stop - samples.start))
        means.append(step.loss)
    return [*means, *(each.grad for each in model.parameters() if each.grad is not None)]


@pytest.mark.parametrize("passes", ["leaf", "node"])
@pytest.mark.parametrize("engine", ["threads", "gloo"])
def test_a_loop_has_the_bits_of_a_function(engine: str, passes: str, pool: Any) -> None:
    (wanted,) = sp.launch(partial(by_function, passes="leaf"), degree=1)
    assert len(wanted) == 6
    for work in (by_function, by_block):
        for found in pool(3, engine).run(partial(work, passes=passes)):
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_without_a_count_it_is_the_number_of_samples() -> None:
    model, parallel = make()
    model.eval()
    with parallel.step(ROWS) as step:
        for samples in step:
            step.backward(losses(model, samples).sum())
    torch.testing.assert_close(step.loss, losses(model, slice(None)).mean().detach())


def test_the_first_step_of_nodes_gives_all_samples_twice() -> None:
    _, parallel = make(passes="node")
    model = parallel.model
    seen = []
    for _ in range(2):
        with parallel.step(ROWS) as step:
            for samples in step:
                seen.append((samples.start, samples.stop))
                step.backward(losses(model, samples))
    assert len(seen) == 8 + 1 + 1
    assert seen[8:] == [(0, ROWS)] * 2


def _summed(model: nn.Module, step: DataParallelStep) -> None:
    for samples in step:
        step.backward((losses(model, samples) * 777.7 + 0.1).cumsum(0)[-1])


def test_a_loss_that_was_summed_is_found_when_the_block_ends() -> None:
    with pytest.raises(NumericsError, match="the loss over leaves 0-7"):
        _run(*make(passes="node"), _summed)


def _run(model: nn.Module, parallel: DataParallel, body: Body) -> None:
    with parallel.step(ROWS) as step:
        body(model, step)


def test_a_loss_of_the_user_is_not_written() -> None:
    model, parallel = make()
    kept = []
    with parallel.step(ROWS) as step:
        for samples in step:
            loss = losses(model, samples).sum()
            kept.append((loss, loss.item()))
            step.backward(loss)
    assert all(loss.item() == value for loss, value in kept)


# ---- ways to do it wrong


def _forgets(model: nn.Module, step: DataParallelStep) -> None:
    for samples in step:
        if samples.start < 4:
            step.backward(losses(model, samples))


def _forgets_the_last(model: nn.Module, step: DataParallelStep) -> None:
    for samples in step:
        if samples.stop < ROWS:
            step.backward(losses(model, samples))


def _twice(model: nn.Module, step: DataParallelStep) -> None:
    for samples in step:
        step.backward(losses(model, samples))
        step.backward(losses(model, samples))


def _breaks(model: nn.Module, step: DataParallelStep) -> None:
    for samples in step:
        step.backward(losses(model, samples))
        break


def _breaks_before_backward(model: nn.Module, step: DataParallelStep) -> None:
    for _ in step:
        break


def _no_loop(model: nn.Module, step: DataParallelStep) -> None:
    pass


def _loops_twice(model: nn.Module, step: DataParallelStep) -> None:
    _right(model, step)
    _right(model, step)


def _after_the_loop(model: nn.Module, step: DataParallelStep) -> None:
    _right(model, step)
    step.backward(losses(model, slice(0, 2)))


def _before_the_loop(model: nn.Module, step: DataParallelStep) -> None:
    step.backward(losses(model, slice(0, 2)))


def _swallows(model: nn.Module, step: DataParallelStep) -> None:
    for samples in step:
        try:
            step.backward(losses(model, samples).detach())
        except UsageError:
            break


def _of_torch(model: nn.Module, step: DataParallelStep) -> None:
    for samples in step:
        losses(model, samples).sum().backward()
        step.backward(losses(model, samples))


def _enters_again(model: nn.Module, step: DataParallelStep) -> None:
    with step:
        pass


def _right(model: nn.Module, step: DataParallelStep) -> None:
    for samples in step:
        step.backward(losses(model, samples))


WRONG: dict[Body, str] = {
    _forgets: r"step.backward was not called for samples \d+:\d+",
    _forgets_the_last: r"step.backward was not called for samples 10:11",
    _twice: "step.backward was called twice for one slice",
    _breaks: r"ended after 1 of its \d passes",
    _breaks_before_backward: r"ended after 0 of its \d passes",
    _no_loop: r"ended after 0 of its \d passes",
    _loops_twice: "a step was looped over twice",
    _after_the_loop: "called twice for one slice, or before the loop",
    _before_the_loop: "step.backward was called outside of the loop",
    _swallows: "has no gradient",
    _of_torch: "called backward of torch",
    _enters_again: "a step is used once",
}


def _wrong_on_last(axis: sp.Axis, body: Body) -> tuple[str, int, bool]:
    """In the third step the last rank does something wrong; all must hear of it, and go on."""
    model, parallel = make(axis, bucket_bytes=1)
    said, was_enabled = "", torch.autograd.is_multithreading_enabled()
    for number in range(4):
        model.zero_grad()
        before = model[0].bias.grad = torch.ones(16)  # type: ignore[index]
        is_wrong = number == 2 and axis.rank == axis.size - 1
        try:
            with parallel.step(ROWS) as step:
                (body if is_wrong else _right)(model, step)
        except UsageError as error:
            assert (said, number) == ("", 2)
            assert model[0].bias.grad is before  # type: ignore[index]
            assert model[3].bias.grad is None  # type: ignore[index]
            with pytest.raises(UsageError, match="known when its block has ended"):
                _ = step.loss
            said = str(error)
        assert batch_leaves.current() is None
        assert torch.autograd.is_multithreading_enabled() == was_enabled
    return said, int(model[2].step), model[3].bias.grad is not None  # type: ignore[index, arg-type]


@pytest.mark.parametrize("body", WRONG, ids=lambda each: each.__name__)
@pytest.mark.parametrize(("degree", "engine"), [(1, "threads"), (3, "threads"), (2, "gloo")])
def test_what_is_wrong_is_one_error_of_all_ranks(
    body: Body, degree: int, engine: str, pool: Any
) -> None:
    results = pool(degree, engine).run(partial(_wrong_on_last, body=body))
    assert results == [results[0]] * degree
    said, draws, is_right_after = results[0]
    with pytest.raises(UsageError, match=WRONG[body]):
        raise UsageError(said)
    assert (draws, is_right_after) == (3, True)


def test_a_step_is_used_in_its_block_and_once() -> None:
    model, parallel = make()
    with pytest.raises(UsageError, match="looped over outside of its block"):
        _right(model, parallel.step(ROWS))
    with parallel.step(ROWS) as step:
        _right(model, step)
    with pytest.raises(UsageError, match="a step is used once"), step:
        pass
    with pytest.raises(UsageError, match="num_samples"):
        parallel.step(0)


def test_a_step_inside_of_another_is_refused() -> None:
    model, parallel = make()

    def body(model: nn.Module, step: DataParallelStep) -> None:
        for _ in step:
            parallel.backward(partial(losses, model), ROWS)

    with pytest.raises(UsageError, match=r"another step .* has begun"):
        _run(model, parallel, body)
    _run(model, parallel, _right)


def test_an_exception_of_the_body_comes_out_and_undoes_the_step() -> None:
    model, parallel = make()
    before = model[0].bias.grad = torch.ones(16)  # type: ignore[index]

    def body(model: nn.Module, step: DataParallelStep) -> None:
        for samples in step:
            if samples.start > 4:
                raise ValueError("no more")
            step.backward(losses(model, samples))

    with pytest.raises(ValueError, match="no more"):
        _run(model, parallel, body)
    assert model[0].bias.grad is before  # type: ignore[index]
    assert model[3].bias.grad is None  # type: ignore[index]
    assert model[2].step == 0  # type: ignore[index]
    assert batch_leaves.current() is None
    assert torch.autograd.is_multithreading_enabled()
    _run(model, parallel, _right)


def test_an_exception_of_one_rank_ends_the_others() -> None:
    def work(axis: sp.Axis) -> None:
        model, parallel = make(axis)
        with parallel.step(ROWS) as step:
            for samples in step:
                if axis.rank == 1:
                    raise ValueError("no more")
                step.backward(losses(model, samples))

    with pytest.raises(RankError, match="rank 1 of 2 raised ValueError: no more"):
        sp.launch(work, degree=2)


def test_leaves_hold_from_a_slice_to_its_backward_alone() -> None:
    model, parallel = make()
    with parallel.step(ROWS) as step:
        assert batch_leaves.current() is None
        for number, samples in enumerate(step):
            now = batch_leaves.current()
            assert now is not None
            assert now.leaves == range(number, number + 1)
            assert not torch.autograd.is_multithreading_enabled()
            step.backward(losses(model, samples))
            assert batch_leaves.current() is None
            assert torch.autograd.is_multithreading_enabled()


def test_a_generator_that_is_thrown_away_ends_its_step() -> None:
    model, parallel = make()

    def generate() -> Iterator[slice]:
        with parallel.step(ROWS) as step:
            for samples in step:
                yield samples
                step.backward(losses(model, samples))

    some = generate()
    next(some)
    assert batch_leaves.current() is not None
    del some
    gc.collect()
    assert batch_leaves.current() is None
    assert torch.autograd.is_multithreading_enabled()
    assert model[2].step == 0  # type: ignore[index]
    _run(model, parallel, _right)
