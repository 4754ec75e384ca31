"""One weight for embedding and output head: one parameter, one gradient, counted once.

A small language model, from token ids to the loss and through an update, against plain torch.
"""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invariance import bits_equal, normal, random_threads
from places import EVERYWHERE, Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.engines.engine import Ranks
from shardproof.layers import registry
from shardproof.layers.embedding import VocabParallelEmbedding
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.leaves import Cut, Layout
from shardproof.ops.vocabulary import vocab_cross_entropy
from shardproof.optim import (
    clip_grad_norm_,
    layouts_of,
    load_optimizer_state_dict,
    optimizer_state_dict,
)
from shardproof.scheme import Numerics, Scheme

Tensors = dict[str, Tensor]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Change = Callable[[nn.Module], None]
TOKENS = (2, 9)


@dataclass(frozen=True)
class Setup:
    """A model, and one step of it."""

    size: int = 13
    dim: int = 6
    bias: bool = False
    is_tied: bool = True
    dtype: torch.dtype = torch.float64
    numerics: Numerics = "invariant"

    def plain(self) -> "Model":
        """The whole model, the same on every rank."""
        embedding = nn.Embedding(self.size, self.dim, padding_idx=0, device="meta")
        head = nn.Linear(self.dim, self.size, self.bias, device="meta")
        model = Model(embedding, head, self.dim).to_empty(device="cpu").to(self.dtype)
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=seed))
        if self.is_tied:
            head.weight = embedding.weight
        return model

    def cut(self, axis: Axis) -> "Model":
        return self.cut_from(self.plain(), axis)

    def cut_from(self, whole: "Model", axis: Axis) -> "Model":
        scheme = Scheme(numerics=self.numerics)
        embedding = VocabParallelEmbedding.from_embedding(
            whole.embedding, axis=axis, name="embedding", scheme=scheme
        )
        head = ColumnParallelLinear.from_linear(whole.head, axis=axis, name="head", scheme=scheme)
        if self.is_tied:
            head.weight = embedding.weight
        model = Model(embedding, head, self.dim).to(self.dtype)
        model.load_state_dict({"scale": whole.scale}, strict=False)
        return model

    def data(self) -> tuple[Tensor, Tensor]:
        draws = torch.Generator().manual_seed(5)
        ids = torch.randint(self.size, TOKENS, generator=draws)
        ids[0, 0], ids[1, -1], ids[0, 3] = 0, self.size - 1, self.size - 1
        labels = ids.roll(-1, 1).reshape(-1)
        labels[-1] = -100
        return ids, labels


class Model(nn.Module):
    """Embedding, a replicated scale, output head."""

    def __init__(self, embedding: nn.Module, head: nn.Module, dim: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.scale = nn.Parameter(torch.empty(dim))
        self.head = head

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(ids) * self.scale)
        return logits.flatten(0, -2)


SETUPS = [
    *[Setup(size, bias=bias) for size in (13, 3, 1) for bias in (False, True)],
    Setup(50257, 3),
    Setup(50257, 3, bias=True),
    Setup(is_tied=False),
]
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
}


def cut_loss(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    head: Any = model.head
    cut = head.layouts["weight"].cut
    return vocab_cross_entropy(
        logits, labels, axis=head.axis, cut=cut, label_smoothing=0.1, scheme=head.scheme
    )


def whole(value: Tensor, layout: Layout, axis: Axis | None) -> Tensor:
    value = value.detach()
    if axis is None or layout.cut is None or layout.dim is None:
        return value.clone()
    return comm.all_gather(value, axis, dim=layout.dim, cut=layout.cut, direction="prover")


def computed(
    axis: Axis, setup: Setup, loss: Loss = cut_loss, change: Change = lambda model: None
) -> Tensors:
    """Everything of one step with clipping, put together from all ranks."""
    model, (ids, labels) = setup.cut(axis), setup.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    logits = model(ids)
    value = loss(model, logits, labels)
    value.backward()
    change(model)
    layouts = list(layouts_of(model))
    grads = {name: parameter.grad for name, parameter, _, _ in layouts}
    found = {"loss": value.detach()}
    found["logits"] = comm.all_gather(
        logits.detach(), axis, dim=1, cut=Cut(setup.size, 8, axis.size), direction="prover"
    )
    for name, _, layout, where in layouts:
        grad = grads[name]
        assert grad is not None, name
        found[f"{name}.grad"] = whole(grad, layout, where)
    found["norm"] = clip_grad_norm_(model, 0.3)
    optimizer.step()
    for name, parameter, layout, where in layouts:
        found[name] = whole(parameter, layout, where)
    return found


@functools.cache  # not written by anybody
def expected(setup: Setup) -> Tensors:
    """The same by plain torch, in fp64."""
    setup = replace(setup, dtype=torch.float64)
    model, (ids, labels) = setup.plain(), setup.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    logits = model(ids)
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
    loss.backward()
    found = {"loss": loss.detach(), "logits": logits.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[f"{name}.grad"] = parameter.grad.clone()
    found["norm"] = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()
    return found | {name: parameter.detach() for name, parameter in model.named_parameters()}


def disagreeing(found: Tensors, setup: Setup) -> list[str]:
    """Names of what is not plain torch's, in order of execution."""
    wanted = expected(setup)
    assert set(found) == set(wanted)
    return [
        name
        for name, value in wanted.items()
        if found[name].dtype != setup.dtype
        or found[name].shape != value.shape
        or not torch.allclose(found[name].double(), value, **TOLERANCE[setup.dtype])
    ]


def differing(found: Tensors, other: Tensors) -> list[str]:
    return [name for name, value in other.items() if not bits_equal(found[name], value)]


def all_computed(axis: Axis) -> list[Tensors]:
    """Twice over: in fp64, and in fp32 under a schedule of 1 and 2 threads."""
    found = [computed(axis, setup) for setup in SETUPS]
    for number, setup in enumerate(SETUPS):
        with random_threads(10 * number + axis.rank):
            found.append(computed(axis, replace(setup, dtype=torch.float32)))
    return found


@pytest.fixture(scope="module")
def alone() -> list[Tensors]:
    return all_computed(Axis.solo())


def check(ranks: Ranks, alone: list[Tensors]) -> None:
    setups = [*SETUPS, *[replace(setup, dtype=torch.float32) for setup in SETUPS]]
    for found in ranks.run(all_computed):
        for setup, tensors, first in zip(setups, found, alone, strict=True):
            assert disagreeing(tensors, setup) == [], setup
            assert differing(tensors, first) == [], setup


@EVERYWHERE
def test_a_step_is_torchs_and_has_the_same_bits(
    pool: Pool, degree: int, engine: str, alone: list[Tensors]
) -> None:
    check(pool(degree, engine), alone)


def test_a_step_is_torchs_and_has_the_same_bits_over_gloo(pool: Pool, alone: list[Tensors]) -> None:
    check(pool(3, "gloo"), alone)


def test_native_agrees_with_torch(pool: Pool) -> None:
    setups = [Setup(numerics="native"), Setup(3, bias=True, numerics="native")]
    for degree in (1, 3, 8):
        for found in pool(degree, "threads").run(
            lambda axis: [computed(axis, setup) for setup in setups]
        ):
            for setup, tensors in zip(setups, found, strict=True):
                assert disagreeing(tensors, setup) == []


def test_one_parameter_has_one_layout_and_one_gradient(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[list[str], bool, dict[str, Any]]:
        model = Setup(bias=True).cut(axis)
        names = [name for name, _, _, _ in layouts_of(model)]
        same = model.head.layouts["weight"] == model.embedding.layouts["weight"]
        model(Setup().data()[0]).sum().backward()
        axis.transport.ledger.reset()
        clip_grad_norm_(model, 1.0)
        return names, same, axis.transport.ledger.as_dict()

    for names, same, ledger in pool(3, "threads").run(work):
        assert names == ["scale", "embedding.weight", "head.bias"]
        assert same
        assert ledger["update"]["all_reduce"]["calls"] == 2  # weight and bias, each once


def names_of_shared_weights(axis: Axis) -> list[str]:
    """How collectives of an optimizer call the weights that two layers share, in many models."""
    models = []
    for number in range(12):
        model = nn.Module()
        for name in ("embedding", "head"):
            layer = ColumnParallelLinear(4, 8, axis=axis, name=f"{name}-{number}")
            setattr(model, name, layer)
        model.head.weight = model.embedding.weight
        models.append(model)
    registry.refresh()
    parts = [registry.part_of(model.head.weight) for model in models]
    now = registry.parts()
    assert [now[id(model.head.weight)].name for model in models] == [
        None if part is None else part.name for part in parts
    ]
    return [str(part and part.name) for part in parts]


def test_all_ranks_call_a_shared_weight_by_one_name(pool: Pool) -> None:
    """Cut modules are visited in another order on each rank; a collective needs one name."""
    expected_names = [f"embedding-{number}.weight" for number in range(12)]
    assert pool(2, "threads").run(names_of_shared_weights) == [expected_names] * 2


def test_state_is_saved_and_loaded_and_the_weight_stays_tied(pool: Pool) -> None:
    def work(axis: Axis) -> list[bool]:
        setup = Setup(50, bias=True)
        first, second = setup.cut(axis), setup.cut(axis)
        optimizers = [
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (first, second)
        ]

        def step(model: Model, optimizer: torch.optim.Optimizer) -> None:
            ids, labels = setup.data()
            optimizer.zero_grad()
            cut_loss(model, model(ids), labels).backward()
            optimizer.step()

        step(first, optimizers[0])
        file = io.BytesIO()
        torch.save((first.state_dict(), optimizer_state_dict(first, optimizers[0])), file)
        file.seek(0)
        state, momenta = torch.load(file, weights_only=True)
        assert {"embedding.weight", "head.weight", "head.bias", "scale"} <= set(state)
        second.load_state_dict(state)
        load_optimizer_state_dict(second, optimizers[1], momenta)
        step(first, optimizers[0])
        step(second, optimizers[1])
        return [
            second.head.weight is second.embedding.weight,
            *(
                bits_equal(a, b)
                for a, b in zip(first.parameters(), second.parameters(), strict=True)
            ),
        ]

    assert pool(3, "threads").run(work) == [[True] * 4] * 3


class Truncated(Setup):
    """A vocabulary of which only so many rows are kept as the degree divides."""

    def cut(self, axis: Axis) -> Model:
        model = self.plain()
        kept = self.size // axis.size * axis.size
        for module, sizes in (
            (model.embedding, "num_embeddings"), (model.head, "out_features")
        ):  # fmt: skip
            setattr(module, sizes, kept)
            module.weight = nn.Parameter(module.weight.detach()[:kept])
        return self.cut_from(model, axis)

    def data(self) -> tuple[Tensor, Tensor]:
        ids, labels = super().data()
        return ids.clamp(max=11), labels.clamp(max=11)


def test_dropped_vocabulary_rows_are_seen(pool: Pool) -> None:
    """`vocab_size // degree` rows for every rank, as in transformers issue 37051."""
    setup = Truncated()
    found = pool(3, "threads").run(lambda axis: loss_and_gradient(axis, setup))
    solo = loss_and_gradient(Axis.solo(), setup)
    for tensors in found:
        assert differing(tensors, solo) == ["loss", "weight.grad"]
    # Where the degree divides nothing is dropped, and nothing is seen.
    whole_again = replace(Setup(), size=12)
    alike = loss_and_gradient(Axis.solo(), whole_again)
    for tensors in pool(3, "threads").run(lambda axis: loss_and_gradient(axis, whole_again)):
        assert differing(tensors, alike) == []


def loss_and_gradient(axis: Axis, setup: Setup) -> Tensors:
    model, (ids, labels) = setup.cut(axis), setup.data()
    loss = cut_loss(model, model(ids), labels)
    loss.backward()
    weight, layout = model.embedding.weight, model.embedding.layouts["weight"]
    return {"loss": loss.detach(), "weight.grad": whole(weight.grad, layout, axis)}


def add_every_use(model: nn.Module) -> None:
    """A gradient added once for every module that has the parameter."""
    grads = {id(p): p.grad for p in model.parameters()}
    total: dict[int, Tensor] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        grad = grads[id(parameter)]
        assert grad is not None
        total[id(parameter)] = total.get(id(parameter), torch.zeros_like(grad)) + grad
    for parameter in model.parameters():
        parameter.grad = total[id(parameter)]


def test_a_tied_gradient_that_counts_twice_is_seen(pool: Pool) -> None:
    setup = Setup(bias=True)
    for found in pool(3, "threads").run(lambda axis: computed(axis, setup, change=add_every_use)):
        wrong = disagreeing(found, setup)
        assert wrong[:2] == ["embedding.weight.grad", "norm"]


def mean_of_ranks(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Every rank's loss on the classes that it has, as if ranks shared the rows."""
    head: Any = model.head
    owned = head.layouts["weight"].owned
    here = (labels >= owned.start) & (labels < owned.stop)
    mine = torch.where(here, labels - owned.start, -100)
    loss = F.cross_entropy(logits, mine, label_smoothing=0.1)
    total = comm.all_reduce(loss.detach(), head.axis, direction="forward") / head.axis.size
    return loss + (total - loss).detach()


def test_a_loss_averaged_over_ranks_is_seen(pool: Pool) -> None:
    setup = Setup()
    alone = computed(Axis.solo(), setup, mean_of_ranks)
    assert disagreeing(alone, setup) == []
    for found in pool(2, "threads").run(lambda axis: computed(axis, setup, mean_of_ranks)):
        assert differing(found, alone)[:2] == ["loss", "scale.grad"]


def test_every_tensor_of_a_step_is_compared() -> None:
    assert list(expected(Setup(bias=True))) == [
        "loss", "logits", "scale.grad", "embedding.weight.grad", "head.bias.grad", "norm",
        "scale", "embedding.weight", "head.bias",
    ]  # fmt: skip
