"""Inputs that differ between the ranks of one axis are noticed, and equal ones never are."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import shardproof as sp
from agreeing import EVERY_TRANSPORT, check_all_said, drawn, gloo, mlp, run, said
from invariance import bits_equal
from places import Pool
from shardproof import c_modules, comm
from shardproof.axis import Axis
from shardproof.errors import MismatchError
from shardproof.leaves import Cut
from shardproof.ops.vocabulary import vocab_cross_entropy
from shardproof.transport import notes

# Different inputs ------------------------------------------------------------------------------


@EVERY_TRANSPORT
@pytest.mark.parametrize("degree", [2, 3])
def test_ranks_with_different_batches_all_raise(pool: Pool, engine: str, degree: int) -> None:
    def work(axis: Axis) -> str:
        model = mlp(axis)
        message = said(lambda: model(drawn(5, 12, seed=int(axis.rank == 1))))
        assert model(drawn(5, 12)).isfinite().all()  # nobody is left behind
        return message

    messages = run(pool, engine, work, degree)
    check_all_said(messages, "input of '0'", "float32 (5, 12), rank 0 has ", "rank 1 has ")
    check_all_said(messages, "compare_inputs=False", "same batch")
    assert ("rank 2 has what rank 0 has" in messages[0]) == (degree == 3)


@EVERY_TRANSPORT
def test_batches_of_different_sizes_all_raise(pool: Pool, engine: str) -> None:
    messages = run(pool, engine, lambda axis: said(lambda: mlp(axis)(drawn(4 + axis.rank, 12))))
    check_all_said(messages, "(4, 12)", "(5, 12)")


@EVERY_TRANSPORT
def test_token_ids_that_differ_in_one_place_raise_at_the_embedding(pool: Pool, engine: str) -> None:
    def work(axis: Axis) -> str:
        embedding = sp.VocabParallelEmbedding(50, 6, axis=axis, name="wte")
        ids = torch.arange(400).remainder(50).view(4, 100)
        unseen = next(i for i in range(400) if i not in notes.places_of(400))
        ids.view(-1)[unseen] += axis.rank
        return said(lambda: embedding(ids))

    check_all_said(run(pool, engine, work), "token ids of 'wte'", "int64 (4, 100)")


@EVERY_TRANSPORT
def test_a_loop_with_multinomial_on_ranks_seeded_apart_raises(pool: Pool, engine: str) -> None:
    def work(axis: Axis) -> str:
        embedding = sp.VocabParallelEmbedding(50, 12, axis=axis, name="wte")
        model = mlp(axis)
        generator = torch.Generator().manual_seed(axis.rank)

        def sample() -> None:
            ids = torch.zeros(1, 1, dtype=torch.long)
            for _ in range(8):
                logits = model(embedding(ids))[:, -1]
                ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)

        with torch.no_grad():
            return said(sample)

    check_all_said(run(pool, engine, work), "token ids of 'wte'", "int64 (1, 1), rank 0 has ")


def test_labels_that_differ_raise_at_the_loss(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        cut = Cut(16, 8, axis.size)
        logits = drawn(40, 16)[:, slice(*_bounds(cut, axis))]
        target = torch.arange(40).remainder(16)
        target[37] -= axis.rank
        loss = lambda: vocab_cross_entropy(logits, target, axis=axis, cut=cut, who="head")  # noqa: E731
        return said(loss)

    check_all_said(run(pool, "threads", work, 3), "labels of 'head'", "(40,)")


def _bounds(cut: Cut, axis: Axis) -> tuple[int, int]:
    owned = cut.owned(axis.rank)
    return owned.start, owned.stop


def test_a_mask_drawn_in_the_forward_raises_at_the_next_cut_layer(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        model, generator = mlp(axis), torch.Generator().manual_seed(axis.rank)
        x = drawn(4, 12)
        kept = torch.bernoulli(torch.full_like(x, 0.5), generator=generator)
        return said(lambda: model(x * kept))

    check_all_said(run(pool, "threads", work), "input of '0'")


def test_dropout_called_as_a_function_raises_at_the_next_cut_layer(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        model = mlp(axis)
        torch.manual_seed(axis.rank)  # processes: each has a generator of its own
        return said(lambda: model(nn.functional.dropout(drawn(8, 12), 0.5)))

    check_all_said(run(pool, "processes", work), "input of '0'")


def test_a_loader_that_shuffles_by_rank_raises(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        generator = torch.Generator().manual_seed(axis.rank)
        loader = DataLoader(
            TensorDataset(drawn(64, 12)), batch_size=8, shuffle=True, generator=generator
        )
        model = mlp(axis)
        return said(lambda: [model(x) for (x,) in loader])

    check_all_said(run(pool, "threads", work), "input of '0'", "seed samplers, shuffling")


@EVERY_TRANSPORT
def test_a_gradient_that_differs_raises_in_backward(pool: Pool, engine: str) -> None:
    def work(axis: Axis) -> str:
        model = mlp(axis)
        x = drawn(4, 12).requires_grad_()
        y = model(x)
        return said(lambda: (y * (1 + axis.rank)).sum().backward())

    check_all_said(run(pool, engine, work), "gradient of the output of '2'")


def test_a_gathered_column_compares_in_the_same_forward(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        layer = sp.ColumnParallelLinear(12, 24, axis=axis, gather_output=True, name="head")
        return said(lambda: layer(drawn(4, 12, seed=axis.rank)))

    check_all_said(run(pool, "threads", work), "input of 'head'")


def test_a_split_input_compares_in_the_same_forward(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        layer = sp.RowParallelLinear(12, 24, axis=axis, input_is_parallel=False, name="down")
        return said(lambda: layer(drawn(4, 12, seed=axis.rank)))

    check_all_said(run(pool, "threads", work), "input of 'down'")


@EVERY_TRANSPORT
def test_a_column_alone_is_compared_by_the_next_exchange(pool: Pool, engine: str) -> None:
    def work(axis: Axis) -> tuple[str, str]:
        layer = sp.ColumnParallelLinear(12, 24, axis=axis, name="up")
        with torch.no_grad():
            alone = said(lambda: layer(drawn(4, 12, seed=axis.rank)))
        return alone, said(lambda: comm.all_reduce(torch.ones(2), axis, direction="forward"))

    found = run(pool, engine, work)
    assert [alone for alone, _ in found] == ["", ""]
    check_all_said([later for _, later in found], "input of 'up'")


def test_a_layer_that_one_rank_alone_calls_is_named(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        model = mlp(axis)
        extra = sp.ColumnParallelLinear(12, 8, axis=axis, name="probe")
        with torch.no_grad():
            if axis.rank == 1:
                extra(drawn(4, 12))
            return said(lambda: model(drawn(4, 12)))

    check_all_said(run(pool, "threads", work), "the input of '0'", "the input of 'probe'")


def test_the_comparison_can_be_left_out() -> None:
    def work(axis: Axis) -> tuple[str, bool]:
        return said(lambda: mlp(axis)(drawn(4, 12, seed=axis.rank))), axis.transport.notes is None

    assert sp.launch(work, degree=2, compare_inputs=False) == [("", True)] * 2


# Equal inputs: no false alarm ------------------------------------------------------------------


def special(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = drawn(*shape)
    x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    return x.to(dtype)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "NaN and infinities": lambda: special(4, 12),
    "transposed": lambda: special(12, 4).t(),
    "expanded": lambda: drawn(1, 12).expand(5, 12),
    "sliced": lambda: drawn(8, 24)[::2, ::2],
    "no rows": lambda: drawn(0, 12),
    "one row": lambda: drawn(12),
    "many dims": lambda: drawn(1, 2, 1, 3, 12),
    "offset": lambda: drawn(25)[1:].view(2, 12),
}


@EVERY_TRANSPORT
def test_equal_inputs_of_every_form_raise_nothing(pool: Pool, engine: str) -> None:
    def work(axis: Axis) -> list[str]:
        model = mlp(axis)
        return [said(lambda make=make: model(make())) for make in INPUTS.values()]

    assert run(pool, engine, work, 3) == [[""] * len(INPUTS)] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_equal_inputs_of_other_dtypes_raise_nothing(pool: Pool, dtype: torch.dtype) -> None:
    def work(axis: Axis) -> str:
        layer = sp.RowParallelLinear(
            12, 6, axis=axis, input_is_parallel=False, dtype=dtype, name="down"
        )
        return said(lambda: layer(special(4, 12, dtype=dtype)))

    assert run(pool, "threads", work, 8) == [""] * 8


def steps(axis: Axis) -> list[str]:
    """Several ways of going forward and backward, the same on all ranks; some leave ranks idle."""
    model, x = mlp(axis), drawn(4, 12)
    other = Axis("other", axis.transport)
    second = sp.ColumnParallelLinear(12, 3, axis=other, gather_output=True, name="second")

    def recomputed() -> None:
        y = x.clone().requires_grad_()
        checkpoint(model, y, use_reentrant=False).sum().backward()

    def accumulated() -> None:
        for part in x.split(1):
            model(part).sum().backward()

    def without_gradients() -> None:
        with torch.no_grad():
            model.eval()(x)
            second(x)
        model.train()

    def twice() -> None:
        model(model(x)).sum().backward()

    def of_a_copy() -> None:
        copy.deepcopy(model)(x).sum().backward()

    ways = (recomputed, accumulated, without_gradients, twice, of_a_copy, without_gradients)
    return [said(way) for way in ways]


@EVERY_TRANSPORT
def test_equal_steps_of_every_kind_raise_nothing(pool: Pool, engine: str) -> None:
    assert run(pool, engine, steps, 3) == [[""] * 6] * 3


def test_idle_ranks_raise_nothing(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        up = sp.ColumnParallelLinear(12, 3, axis=axis, name="up")
        down = sp.RowParallelLinear(3, 12, axis=axis, name="down")
        return said(lambda: down(up(drawn(4, 12).requires_grad_())).sum().backward())

    assert run(pool, "threads", work, 8) == [""] * 8


def test_alone_nothing_is_noted_and_no_bit_changes() -> None:
    axis = Axis.solo()
    layer = sp.ColumnParallelLinear(12, 24, axis=axis, name="up")
    with sp.checked():
        y = layer(drawn(4, 12))
    assert axis.transport.notes is None
    assert bits_equal(y, layer(drawn(4, 12)))


def test_another_number_of_threads_changes_no_bit(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        model = mlp(axis)
        torch.set_num_threads(1 + axis.rank)
        try:
            with sp.checked():
                return said(lambda: model(model(drawn(64, 12).requires_grad_())).sum().backward())
        finally:
            torch.set_num_threads(1)

    assert run(pool, "processes", work) == ["", ""]


# What is looked at -----------------------------------------------------------------------------

FORMS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: x.transpose(0, -1) if x.dim() else x,
    lambda x: x[..., ::2] if x.dim() else x,
    lambda x: x[None].expand(3, *x.shape),
]


@pytest.mark.skipif(c_modules.shm() is None, reason="the C core was not built")
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (31,), (32,), (33,), (7, 1, 11), (4, 33, 65)])
def test_the_sample_in_c_is_that_in_python(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex128):
        x = (drawn(*shape) * 9).to(dtype)
        for form in FORMS:
            assert notes.sample(form(x)) == notes.sample_in_python(form(x))


def test_the_sample_does_not_depend_on_strides_and_sees_the_last_element() -> None:
    x = drawn(40, 50)
    assert notes.sample(x) == notes.sample(x.t().contiguous().t())
    places = notes.places_of(x.numel())
    assert len(set(places)) == notes.SAMPLE
    assert places[-1] == x.numel() - 1
    assert len({place % 50 for place in places}) > 10, "not all in a few columns"


def test_many_notes_without_an_exchange_are_bounded_and_all_count() -> None:
    first, second = notes.Notes(), notes.Notes()
    for number in range(1000):
        x = drawn(4, seed=number)
        first.add(x, "up", "input")
        second.add(x + (number == 3), "up", "input")
    assert len(first._notes) <= notes._MOST
    assert first.take().value != second.take().value
    assert first.take() == notes.NOTHING


def test_what_cannot_be_read_is_passed_over() -> None:
    found = notes.Notes()
    found.add(torch.empty(3, device="meta"), "up", "input")
    found.add(torch.ones(3).to_sparse(), "up", "input")
    torch.func.vmap(lambda x: (found.add(x, "up", "input"), x)[1])(torch.ones(2, 3))
    assert found.take() == notes.NOTHING


def test_a_new_axis_does_not_inherit_notes(pool: Pool) -> None:
    def leave(axis: Axis) -> None:
        if axis.rank == 1:
            axis.note(drawn(3), who="up")

    def go_on(axis: Axis) -> str:
        return said(lambda: comm.all_reduce(torch.ones(2), axis, direction="forward"))

    pool(2, "processes").run(leave)
    assert pool(2, "processes").run(go_on) == ["", ""]


def test_ranks_must_be_given_the_same_option(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        group = gloo().transport.group  # type: ignore[attr-defined]
        with pytest.raises(MismatchError) as caught:
            Axis.from_group(group, compare_inputs=axis.rank == 0)
        return str(caught.value)

    check_all_said(pool(2, "processes").run(work), "compare_inputs. rank 0: True; rank 1: False")
