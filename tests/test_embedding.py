"""The vocabulary-parallel embedding against `nn.Embedding`: every bit, at every degree."""

import copy
import functools
import itertools
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from invariance import LargestNew, all_bits_equal, bits_equal, normal, random_threads
from places import EVERYWHERE, Pool
from shardproof import batch_leaves, comm
from shardproof.axis import Axis
from shardproof.batch_leaves import BatchLeaves
from shardproof.comm.split import Split
from shardproof.engines.engine import Ranks
from shardproof.errors import LayoutError, ShapeError, UsageError
from shardproof.layers.embedding import VocabParallelEmbedding
from shardproof.leaves import Cut
from shardproof.ops.embedding import gradient_of_table, vocab_embedding
from shardproof.scheme import Scheme
from shardproof.tree import sum_leaves

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Setup:
    """One embedding and some tokens."""

    size: int = 13
    dim: int = 5
    tokens: tuple[int, ...] = (3, 7)
    dtype: torch.dtype = torch.float32
    padding_idx: int | None = None
    ids: torch.dtype = torch.int64

    def embedding(self) -> nn.Embedding:
        """The whole embedding, the same on every rank; with -0.0, infinities and odd NaNs."""
        whole = nn.Embedding(
            self.size, self.dim, self.padding_idx, device="meta", dtype=self.dtype
        ).to_empty(device="cpu")
        with torch.no_grad():
            whole.weight.copy_(normal(self.size, self.dim, seed=1))
            whole.weight[::2, 0] = -0.0
            whole.weight[-1, -1] = float("-inf")
            bits = whole.weight.view(BITS[whole.weight.element_size()])
            nan = torch.tensor(float("nan"), dtype=self.dtype).view(bits.dtype)
            bits[self.size // 2, -1] = nan + 5  # with something in it
        return whole

    def data(self) -> tuple[Tensor, Tensor]:
        """Ids, of which some come often, and the gradient of y."""
        draws = torch.Generator().manual_seed(2)
        ids = torch.randint(self.size, self.tokens, generator=draws)
        if ids.numel() > 3:
            flat = ids.view(-1)
            flat[:3] = torch.tensor([self.size - 1, 0, self.size // 2])
            flat[3::4] = self.size - 1
        grad = normal(*self.tokens, self.dim, seed=3).to(self.dtype)
        return ids.to(self.ids), grad


SETUPS = [
    Setup(),
    Setup(3, 4),  # fewer rows than ranks
    Setup(1, 1, (2,)),
    Setup(50257, 3, (2, 50)),
    Setup(509, 33, (300,)),
    Setup(tokens=()),
    Setup(tokens=(2, 0)),
    Setup(padding_idx=0),
    Setup(padding_idx=12, ids=torch.int32),
    Setup(padding_idx=-6),
    Setup(dtype=torch.float64),
    Setup(dtype=torch.bfloat16),
    Setup(dtype=torch.bfloat16, dim=6),
    Setup(dtype=torch.float16, padding_idx=4),
]


def computed(axis: Axis, setup: Setup) -> dict[str, Tensor]:
    """y, and the gradient of the weight put together from all ranks."""
    layer = VocabParallelEmbedding.from_embedding(setup.embedding(), axis=axis)
    ids, grad = setup.data()
    y = layer(ids)
    y.backward(grad)
    cut = layer.layouts["weight"].cut
    assert layer.weight.grad is not None
    assert cut is not None
    assert layer.weight.grad.shape == layer.weight.shape
    whole = comm.all_gather(layer.weight.grad, axis, dim=0, cut=cut, direction="prover")
    return {"y": y.detach(), "weight.grad": whole}


@functools.cache  # not written by anybody
def expected(setup: Setup) -> dict[str, Tensor]:
    embedding, (ids, grad) = setup.embedding(), setup.data()
    y = embedding(ids)
    y.backward(grad)
    wanted = embedding.weight.grad
    assert wanted is not None
    if setup.dtype.itemsize == 2:  # torch rounds after every token, we once
        rounded, wide = wanted, replace(setup, dtype=torch.float32).embedding()
        wide(ids).backward(grad.float())
        assert wide.weight.grad is not None
        wanted = wide.weight.grad.to(setup.dtype)
        assert_close(wanted, rounded, rtol=2e-2, atol=2e-2)
    return {"y": y.detach(), "weight.grad": wanted}


def all_computed(axis: Axis) -> list[dict[str, Tensor]]:
    found = []
    for number, setup in enumerate(SETUPS):
        with random_threads(10 * number + axis.rank):
            found.append(computed(axis, setup))
    return found


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Tensor]]:
    return all_computed(Axis.solo())


def check(ranks: Ranks, alone: list[dict[str, Tensor]]) -> None:
    for found in ranks.run(all_computed):
        for setup, tensors, first in zip(SETUPS, found, alone, strict=True):
            for name, value in expected(setup).items():
                assert bits_equal(tensors[name], first[name]), (setup, name)
                assert bits_equal(tensors[name], value), (setup, name)


@EVERYWHERE
def test_every_bit_is_that_of_nn_embedding(
    pool: Pool, degree: int, engine: str, alone: list[dict[str, Tensor]]
) -> None:
    check(pool(degree, engine), alone)


def test_every_bit_is_that_of_nn_embedding_over_gloo(
    pool: Pool, alone: list[dict[str, Tensor]]
) -> None:
    check(pool(3, "gloo"), alone)


def added_as_floats(axis: Axis, setup: Setup) -> Tensor:
    """The wrong answer: masked lookups added as what they are."""
    layer = VocabParallelEmbedding.from_embedding(setup.embedding(), axis=axis)
    ids = setup.data()[0].view(-1)
    owned = layer.layouts["weight"].owned
    y = torch.zeros(len(ids), setup.dim)
    for row, token in enumerate(ids.tolist()):
        if token in owned:
            y[row] = layer.weight.detach()[token - owned.start]
    return comm.all_reduce(y, axis, direction="forward").view(*setup.tokens, setup.dim)


def test_rows_added_as_floats_lose_the_sign_of_zero(pool: Pool) -> None:
    """The negative control: equal numbers, other bits."""
    wanted = expected(SETUPS[0])["y"]
    for found in pool(3, "threads").run(lambda axis: added_as_floats(axis, SETUPS[0])):
        assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert not bits_equal(found, wanted)


def test_the_order_of_tokens_matters() -> None:
    """Negative control of the gradients: added from the last token, they have other bits."""
    setup = Setup(509, 33, (300,))
    ids, grad = setup.data()
    backwards = torch.zeros(509, 33).index_add_(0, ids.flip(0), grad.flip(0))
    wanted = expected(setup)["weight.grad"]
    assert_close(backwards, wanted)
    assert not bits_equal(backwards, wanted)


def test_the_padding_row_gets_no_gradient(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[Tensor, int | None]:
        setup = Setup(padding_idx=-6)
        layer = VocabParallelEmbedding.from_embedding(setup.embedding(), axis=axis)
        return computed(axis, setup)["weight.grad"], layer.padding_idx

    assert 7 in Setup().data()[0]
    for grad, padding_idx in pool(3, "threads").run(work):
        assert padding_idx == 7
        assert not grad[7].any()
        assert grad[12].any()


def messages(axis: Axis, setup: Setup) -> list[tuple[str, str, int, int]]:
    layer = VocabParallelEmbedding.from_embedding(setup.embedding(), axis=axis)
    axis.transport.ledger.reset()
    ids, grad = setup.data()
    layer(ids).backward(grad)
    return [
        (direction, kind, count.calls, count.message_bytes)
        for direction, kind, count in axis.transport.ledger
    ]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_one_message_of_the_output_and_none_backward(pool: Pool, setup: Setup) -> None:
    nbytes = expected(setup)["y"].nbytes
    for found in pool(3, "threads").run(lambda axis: messages(axis, setup)):
        assert found == [("forward", "all_reduce", 1, nbytes)]


def test_degree_1_sends_nothing() -> None:
    axis = Axis.solo()
    computed(axis, SETUPS[0])
    assert axis.transport.ledger.as_dict() == {}


def test_views_give_the_same_bits_and_nothing_is_written_into_them(pool: Pool) -> None:
    setup = Setup(tokens=(4, 3))

    def work(axis: Axis) -> list[bool]:
        layer = VocabParallelEmbedding.from_embedding(setup.embedding(), axis=axis)
        ids, grad = setup.data()
        view = ids.t().contiguous().t()
        strided_grad = grad.transpose(0, 2).contiguous().transpose(0, 2)
        before = [view.clone(), strided_grad.clone(), layer.weight.detach().clone()]
        y = layer(view)
        y.backward(strided_grad)
        after = [view, strided_grad, layer.weight.detach()]
        found = computed(axis, setup)
        y.mul_(0)  # no view: a caller may write into it
        own = layer.layouts["weight"].owned
        wanted = found["weight.grad"][own.start : own.stop]
        assert layer.weight.grad is not None
        return [all_bits_equal(before, after), bits_equal(layer.weight.grad, wanted)]

    assert pool(3, "threads").run(work) == [[True, True]] * 3


def test_two_uses_of_one_embedding_add_their_gradients(pool: Pool) -> None:
    setup = Setup(dtype=torch.float64)

    def work(axis: Axis) -> Tensor:
        layer = VocabParallelEmbedding.from_embedding(setup.embedding(), axis=axis)
        ids, grad = setup.data()
        (layer(ids) + 3 * layer(ids.flip(0))).backward(grad)
        own = layer.layouts["weight"].owned
        assert layer.weight.grad is not None
        return layer.weight.grad - wanted[own.start : own.stop]

    embedding, (ids, grad) = setup.embedding(), setup.data()
    (embedding(ids) + 3 * embedding(ids.flip(0))).backward(grad)
    wanted = embedding.weight.grad
    assert wanted is not None
    for found in pool(3, "threads").run(work):
        assert not found.any()


def drawn(axis: Axis) -> list[Tensor]:
    found = []
    for size, name, padding, dtype, seed in (
        (13, "embed", None, torch.float32, 0), (13, None, 5, torch.float64, 1),
        (3, "embed", -1, torch.bfloat16, 0),
    ):  # fmt: skip
        layer = VocabParallelEmbedding(
            size,
            6,
            axis=axis,
            padding_idx=padding,
            name=name,
            dtype=dtype,
            scheme=Scheme(seed=seed),
        )
        cut = layer.layouts["weight"].cut
        assert cut is not None
        found.append(
            comm.all_gather(layer.weight.detach(), axis, dim=0, cut=cut, direction="prover")
        )
        later = VocabParallelEmbedding(
            size, 6, axis=axis, padding_idx=padding, name=layer.name, dtype=dtype,
            scheme=Scheme(seed=seed), device="meta",
        )  # fmt: skip
        assert later.weight.is_meta
        later.to_empty(device="cpu").reset_parameters()
        assert bits_equal(later.weight, layer.weight)
    return found


@EVERYWHERE
def test_every_degree_draws_the_same_numbers(pool: Pool, degree: int, engine: str) -> None:
    alone = drawn(Axis.solo())
    assert not alone[1][5].any()
    assert not alone[2][2].any()
    for found in pool(degree, engine).run(drawn):
        assert all_bits_equal(found, alone)


def test_the_numbers_are_distributed_as_in_nn_embedding() -> None:
    layer = VocabParallelEmbedding(300, 64, axis=Axis.solo(), name="embed")
    weight = layer.weight.detach()
    assert abs(weight.mean()) < 0.02
    assert abs(weight.std() - 1) < 0.02
    assert len(weight.unique()) > 0.99 * weight.numel(), "leaves differ from each other"
    other = VocabParallelEmbedding(
        300, 64, axis=Axis.solo(), name="embed", scheme=Scheme(seed=1)
    ).weight
    assert not torch.equal(weight, other)


def test_no_rank_makes_more_than_its_shard(pool: Pool) -> None:
    whole = Setup(96, 40).embedding()

    def work(axis: Axis) -> list[tuple[int, int]]:
        found = []
        for make in (
            lambda: VocabParallelEmbedding(96, 40, axis=axis, padding_idx=3),
            lambda: VocabParallelEmbedding.from_embedding(whole, axis=axis),
        ):
            with LargestNew(whole.weight) as made:
                layer = make()
            found.append((made.bytes, layer.weight.nbytes))
        return found

    for found in pool(3, "threads").run(work):
        for largest, shard in found:
            assert 0 < largest <= shard < 96 * 40 * 4


def test_what_an_embedding_says_of_itself_is_kept(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        whole = Setup(padding_idx=2).embedding().eval()
        whole.weight.requires_grad_(False)
        layer = VocabParallelEmbedding.from_embedding(whole, axis=axis, name="embed")
        assert not layer.training
        assert not layer.weight.requires_grad
        assert not layer(torch.tensor([1])).requires_grad
        assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (13, 5, 2)
        assert repr(layer) == (
            f"VocabParallelEmbedding(num_embeddings=13, embedding_dim=5, padding_idx=2, "
            f"tp={axis.rank}/3)"
        )
        meta = VocabParallelEmbedding.from_embedding(whole.to("meta"), axis=axis)
        assert meta.weight.is_meta
        assert not meta.weight.requires_grad
        again = copy.deepcopy(layer)
        assert bits_equal(again(torch.tensor([1])), layer(torch.tensor([1])))

    pool(3, "threads").run(work)


def test_state_is_loaded_where_it_was_saved_and_nowhere_else(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[bool, dict[str, Any]]:
        layer = VocabParallelEmbedding(12, 4, axis=axis, name="a")
        other = VocabParallelEmbedding(12, 4, axis=axis, name="b")
        other.load_state_dict(layer.state_dict())
        return bits_equal(other.weight, layer.weight), other.state_dict()

    found = pool(2, "threads").run(work)
    assert [equal for equal, _ in found] == [True, True]

    def cross(axis: Axis) -> None:
        layer = VocabParallelEmbedding(12, 4, axis=axis, name="c")
        with pytest.raises(LayoutError, match=f"its rank is {1 - axis.rank}"):
            layer.load_state_dict(found[1 - axis.rank][1])

    pool(2, "threads").run(cross)


def refusals(axis: Axis) -> list[str]:
    """What every rank says of ids that it cannot look up; then all still work together."""
    layer = VocabParallelEmbedding(13, 4, axis=axis, name="embed")
    said = []
    for ids in (
        torch.tensor([[1, 2, 3], [4, 13, -1]]), torch.tensor([0, -1]), torch.tensor(13),
        torch.tensor([1.0]), torch.tensor([True]),
    ):  # fmt: skip
        with pytest.raises(UsageError) as raised:
            layer(ids)
        said.append(str(raised.value))
    with pytest.raises(ShapeError) as refused:
        layer(torch.tensor([1], device="meta"))
    said.append(str(refused.value))
    layer(torch.tensor([0, 12]))
    return said


@EVERYWHERE
def test_ids_outside_are_named_on_all_ranks(pool: Pool, degree: int, engine: str) -> None:
    matches = [
        r"embed: token id 13 at position \(1, 1\) is outside of the vocabulary of 13. Use 0 to 12",
        r"token id -1 at position \(1,\) is outside",
        r"token id 13 at position \(\) is outside",
        "token ids must be int64 or int32, got torch.float32",
        "token ids must be int64 or int32, got torch.bool",
        r"the ids are on meta and the weight on cpu. Move the ids",
    ]
    for said in pool(degree, engine).run(refusals):
        for match, message in zip(matches, said, strict=True):
            assert re.search(match, message), message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, r"'embed' cannot be cut with max_norm=1.0: rows are scaled"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True: gradients depend on how often"),
        ({"sparse": True}, "sparse=True: gradients are sparse.*Set sparse=False"),
    ],
)
def test_options_that_are_not_ours_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VocabParallelEmbedding.from_embedding(
            nn.Embedding(4, 3, **options), axis=Axis.solo(), name="embed"
        )


def test_sizes_that_make_no_sense_are_refused() -> None:
    axis = Axis.solo()
    with pytest.raises(ShapeError, match=r"num_embeddings=0 and embedding_dim=4: an embedding"):
        VocabParallelEmbedding(0, 4, axis=axis)
    with pytest.raises(ShapeError, match=r"'e' .*embedding_dim=0"):
        VocabParallelEmbedding(4, 0, axis=axis, name="e")
    for row in (4, -5):
        with pytest.raises(ShapeError, match=f"e: padding_idx={row} is no row of 4. Use 0 to 3"):
            VocabParallelEmbedding(4, 3, axis=axis, padding_idx=row, name="e")
    split = Split(axis, Cut(4, 8, 1), Scheme())
    with pytest.raises(ShapeError, match=r"embedding_dim\) wanted, got shape \(4,\)"):
        vocab_embedding(torch.tensor([0]), torch.ones(4), split)
    with pytest.raises(ShapeError, match="5 units, but 4 is what this rank owns"):
        vocab_embedding(torch.tensor([0]), torch.ones(5, 2), split)


def test_a_second_backward_raises() -> None:
    layer = VocabParallelEmbedding(5, 3, axis=Axis.solo())
    (grad,) = torch.autograd.grad(
        layer(torch.tensor([1, 2])).square().sum(), layer.weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("sizes", [(1, 2, 3), (3, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_leaves_add_whole_tables(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Rows that some leaf lacks, rows of nobody, and zeros of both signs, bit for bit."""
    rows, tokens = 9, 2 * sum(sizes)
    places = torch.tensor([3, 3, -1, 0, 8, 3, 0, -1, 5, 5, 5, 3])[:tokens]
    grad_rows = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    grad_rows[:, 0], grad_rows[::2, 1] = -0.0, 0.0
    with batch_leaves.running(BatchLeaves(range(len(sizes)), sizes)):
        ours = gradient_of_table(grad_rows, places, rows)
    ends = [0, *itertools.accumulate(2 * size for size in sizes)]
    wanted = sum_leaves(
        torch.ops.aten.embedding_dense_backward(
            grad_rows[start:stop], places[start:stop], rows, -1, False
        )
        for start, stop in itertools.pairwise(ends)
    )
    assert torch.equal(ours.view(torch.uint8), wanted.view(torch.uint8))
