"""A cut model under `torch.compile`, `torch.export` and what else records operations of torch."""

import copy
import functools
import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import shardproof as sp
from places import Pool
from shardproof import comm, recut
from shardproof.cut.tensor import CutTensor
from shardproof.errors import UsageError
from shardproof.layers.dropout import Drawing
from shardproof.leaves import Cut
from shardproof.numerics import batched_products, products, summed_products, sums
from shardproof.ops.embedding import pick
from views import plain, views
from zoo.build import build
from zoo.example import Example
from zoo.example import loss_of as scores_loss
from zoo.own_attention import Grouped

OWN = "nanoGPT"
LLAMA, GPT2 = "LlamaForCausalLM", "GPT2LMHeadModel"
STEPS = 2
ONE_AT_A_TIME = threading.Lock()  # what torch patches to record, all threads share


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def cut_of(
    example: Example, axis: Any, *, watched: bool = True, numerics: str = "invariant"
) -> nn.Module:
    """A copy of the model, cut."""
    scheme = sp.Scheme(numerics=numerics)
    inputs = example.inputs if watched else None
    return sp.parallelize(copy.deepcopy(example.model), None, axis, inputs=inputs, scheme=scheme)


@functools.cache
def short(name: str, *, dropout: bool = True) -> Example:
    """A model of the zoo with one layer: the time of these tests is that of compiling layers.

    Whoever cuts it takes a copy.
    """
    changes = {LLAMA: {"num_hidden_layers": 1}, GPT2: {"n_layer": 1}}.get(name)
    example = build(name, dtype=torch.float32, dropout=dropout, changes=changes)
    model: Any = example.model
    if name == OWN:
        model.transformer.h = model.transformer.h[:1]
    elif name == "TransformerEncoder":
        model.encoder.layers = model.encoder.layers[:1]
    return example


def compiled(model: Any) -> Any:
    """Without a break."""
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def compiled_on_one(model: Any, axis: Any) -> Any:
    """On rank 0, which is the one that is looked at; the others send the same without a graph."""
    return model if axis.rank else compiled(model)


def loss_of(example: Example, y: Any) -> Tensor:
    """The model's, or of its scores; a cut tensor that a graph gave is no `torch.Tensor`."""
    if not isinstance(y, CutTensor):
        return example.loss(y)
    lines = y.reshape(-1, y.shape[-1])
    return F.cross_entropy(lines, torch.arange(len(lines)) % lines.shape[-1])


def trained(model: nn.Module, call: Any, example: Example, axis: Any) -> list[Any]:
    """Losses, gradients, weights and what was sent, of some steps by `call`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found: list[Any] = []
    axis.transport.ledger.reset()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(example, call(**example.inputs))
        loss.backward()
        found += [loss.detach(), *(each.grad for each in model.parameters())]
        # While one thread compiles, torch's AdamW computes otherwise in all of them.
        axis.gather_small(step, what="before an update")
        optimizer.step()
        axis.gather_small(step, what="after an update")
    weights = (each.detach() for each in model.parameters())
    return [*found, *weights, axis.transport.ledger.as_dict()]


def differing(first: list[Any], second: list[Any]) -> list[Any]:
    """What is not the same in every bit and every count."""
    return [
        (place, b if isinstance(b, dict) else "", a if isinstance(a, dict) else "")
        for place, (a, b) in enumerate(zip(first, second, strict=True))
        if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b)
    ]


def compare(axis: Any, example: Example, watched: bool, numerics: str) -> list[Any]:
    """In what a compiled model trains otherwise than an eager one, on one rank."""
    eager = cut_of(example, axis, watched=watched, numerics=numerics)
    other = copy.deepcopy(eager)
    first = trained(eager, eager, example, axis)
    second = trained(other, compiled(other), example, axis)
    if (
        not watched and axis.size > 1
    ):  # the logits of a graph are whole, those of an eager step never used
        gathered = second[-1]["forward"]["all_gather"]
        assert gathered["calls"] == first[-1]["forward"]["all_gather"]["calls"] + STEPS
        first[-1]["forward"]["all_gather"] = gathered
    return differing(first, second)


@pytest.mark.parametrize(
    ("name", "numerics", "degree"),
    [
        ("gated-chunk", "native", 2),
        ("ConvNet", "invariant", 2),
        (GPT2, "invariant", 2),
        (LLAMA, "invariant", 1),
    ],
)
def test_a_compiled_model_trains_as_an_eager_one(name: str, numerics: str, degree: int) -> None:
    """In the middle of its dropouts too, whose masks a graph may not keep."""
    check_steps(short(name), numerics, degree)


def check_steps(example: Example, numerics: str, degree: int) -> None:
    def work(axis: Any) -> list[Any]:
        return compare(axis, example, True, numerics)

    assert list(sp.launch(work, degree=degree, engine="threads", timeout=300)) == [[]] * degree


@pytest.mark.parametrize(("name", "watched"), [(OWN, True), (LLAMA, False)])
def test_a_compiled_model_trains_alike_on_processes(pool: Pool, name: str, watched: bool) -> None:
    def work(axis: Any) -> list[Any]:
        return compare(axis, short(name), watched, "invariant")

    assert pool(2, "processes").run(work) == [[], []]


def on_one(work: Callable[[Any], Any], degree: int = 1) -> Any:
    """Of rank 0, in this process.

    Ranks compare inputs in an eager step alone, and of these ranks some have a graph.
    """
    return sp.launch(work, degree=degree, engine="threads", timeout=300, compare_inputs=False)[0]


def test_a_compiled_model_takes_batches_of_several_sizes() -> None:
    example = build("gated-chunk", dtype=torch.float32, dropout=False)

    def work(axis: Any) -> list[bool]:
        model = cut_of(example, axis).eval()
        call, found = compiled_on_one(model, axis), []
        for rows in (2, 3, 1):
            inputs = {key: torch.cat([x] * 3)[:rows] for key, x in example.inputs.items()}
            found.append(torch.equal(call(**inputs).whole(), model(**inputs).whole()))
        return found

    assert on_one(work, 2) == [True] * 3


def test_what_follows_on_a_cut_output_is_compiled_too() -> None:
    """A model that returns scores that are cut, and a loss outside of it."""
    example = short("TransformerEncoder")

    def loss_of(model: nn.Module, inputs: Any) -> Tensor:
        y = model(**inputs)
        lines = y.reshape(-1, y.shape[-1])
        beside = F.silu(y.transpose(0, 1)) * 2 + 1
        targets = torch.arange(len(lines)) % lines.shape[-1]
        return F.cross_entropy(lines, targets) + beside.square().mean() + torch.relu(y).sum()

    def work(axis: Any) -> list[Any]:
        eager = cut_of(example, axis)
        other = copy.deepcopy(eager)
        loss_of(eager, example.inputs).backward()
        compiled_on_one(loss_of, axis)(other, example.inputs).backward()
        return [
            torch.equal(a.grad, b.grad)
            for a, b in zip(eager.parameters(), other.parameters(), strict=True)
            if a.grad is not None
        ]

    found = on_one(work, 2)
    assert found
    assert all(found)


def test_a_graph_is_not_given_to_another_model_and_looks_at_ids_in_every_step() -> None:
    """Of two copies of a model each counts its own draws, by a graph of its own."""
    parts = (nn.Embedding(29, 12), nn.Linear(12, 26), nn.Dropout(0.5), nn.Linear(26, 12))
    words, ids = nn.Sequential(*parts), torch.tensor([[3, 28, 0]])

    def work(axis: Any) -> tuple[list[int], str]:
        models = [sp.parallelize(copy.deepcopy(words), None, axis, inputs=(ids,))]
        models.append(copy.deepcopy(models[0]))
        calls = [compiled(each) for each in models]
        for call in (calls[0], calls[1], calls[0]):
            call(ids)
        drawing = [
            next(each for each in model.modules() if isinstance(each, Drawing)) for model in models
        ]
        counted = [each.step for each in drawing]
        try:
            calls[0](torch.tensor([[10**6, 28, 0]]))
        except UsageError as error:
            return counted, str(error)
        return counted, "taken"

    counted, said = on_one(work)
    assert counted == [2, 1]
    assert "token id 1000000 at position (0, 0) is outside" in said


class Remembering(nn.Module):
    """Its forward branches on attributes, takes None, and may keep what it computes."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 26), nn.Linear(26, 12)
        self.scale, self.keeps, self.calls = 1.0, keeps, 0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """A feed-forward; `mask` is added."""
        if self.keeps:
            self.calls += 1
        h = F.dropout(torch.relu(self.up(x)) * self.scale, 0.5, self.training)
        y: Tensor = self.down(h)
        return y if mask is None else y + mask


REMEMBERING = {keeps: Remembering(keeps) for keeps in (False, True)}


def cut_remembering(axis: Any, keeps: bool = False) -> nn.Module:
    model = copy.deepcopy(REMEMBERING[keeps])
    return sp.parallelize(model, None, axis, inputs=(torch.ones(3, 12),))


def test_a_graph_is_made_again_where_what_it_was_made_of_changes() -> None:
    x, mask = torch.randn(3, 12), torch.randn(3, 12)

    def work(axis: Any) -> list[bool]:
        eager = cut_remembering(axis)
        other = copy.deepcopy(eager)
        call, found = compiled_on_one(other, axis), []
        for change in (
            lambda m: m.train(),
            lambda m: m.eval(),
            lambda m: setattr(m, "scale", 2.0),
            lambda m: m.up.train(),
            lambda m: m.train(),
        ):
            change(eager)
            change(other)
            found.append(torch.equal(call(x, None), eager(x, None)))
        found.append(torch.equal(call(x, mask), eager(x, mask)))
        return found

    assert all(on_one(work, 2))


def test_a_forward_that_sets_attributes_is_refused_and_leaves_them() -> None:
    def work(axis: Any) -> list[Any]:
        model = cut_remembering(axis, keeps=True)
        said = ""
        try:
            compiled(model)(torch.ones(3, 12))
        except Exception as error:
            said = str(error)
        plain = nn.Linear(3, 3)
        compiled(plain)(torch.ones(2, 3)).sum().backward()
        return [said, model.calls, plain.weight.grad is not None]

    said, calls, is_well = on_one(work)
    assert "the forward of a cut Remembering sets calls" in said
    assert calls == 0
    assert is_well  # nothing of what was given up is left in torch


def test_attributes_are_put_back_where_a_forward_raises() -> None:
    def work(axis: Any) -> int:
        model: Any = cut_remembering(axis, keeps=True)
        model.down.register_forward_pre_hook(lambda *_: 1 / 0)
        with suppress(Exception):
            compiled(model)(torch.ones(3, 12))
        return int(model.calls)

    assert on_one(work) == 0


def test_a_model_compiles_itself() -> None:
    x = torch.randn(3, 12)

    def work(axis: Any) -> bool:
        model = cut_remembering(axis).eval()
        other = copy.deepcopy(model)
        if axis.rank == 0:
            other.compile(backend="aot_eager", fullgraph=True)
        return torch.equal(other(x), model(x))

    assert on_one(work, 2)


def test_16_bits_are_compiled() -> None:
    example = build("gated-chunk", dtype=torch.float32)

    check_steps(replace(example, model=example.model.bfloat16()), "invariant", 2)


def test_ranks_without_work_are_compiled() -> None:
    model = Grouped(n_heads=2, n_kv_heads=1)
    example = Example("two heads", model, build("grouped-heads").inputs, scores_loss, ["own"])

    check_steps(example, "invariant", 3)


def test_a_cut_output_can_be_used_after_the_graph_and_a_copy_has_graphs_of_its_own() -> None:
    """Its outputs are cut, so that its graphs refer to how."""
    parts = (nn.Linear(12, 26), nn.ReLU(), nn.Linear(26, 12), nn.LayerNorm(12), nn.Linear(12, 251))
    words, x = nn.Sequential(*parts), torch.randn(3, 12)

    def work(axis: Any) -> dict[str, bool]:
        model = sp.parallelize(copy.deepcopy(words), None, axis, inputs=(x,))
        y, z = model(x), compiled_on_one(model, axis)(x)
        copied = compiled_on_one(copy.deepcopy(model), axis)(x)
        loss = z.square().mean()
        loss.backward()
        return {
            "shape": z.shape == y.shape,
            "values": torch.equal(z.whole(), y.whole()),
            "part": z.part.shape[-1] < 251,
            "copy": torch.equal(copied.whole(), y.whole()),
        }

    assert on_one(work, 2) == dict.fromkeys(("shape", "values", "part", "copy"), True)


def test_a_cache_that_a_graph_made_goes_on() -> None:
    """It comes back as an object of its own class, its keys still cut."""
    example = short(LLAMA, dropout=False)
    ids = example.inputs["input_ids"]

    @torch.no_grad()
    def work(axis: Any) -> Any:
        model = cut_of(example, axis).eval()
        whole = model(ids).logits
        first = compiled_on_one(model, axis)(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], past_key_values=first.past_key_values).logits
        kind = type(first.past_key_values).__name__
        return kind, (last.whole()[:, -1] - whole.whole()[:, -1]).abs().max()

    kind, error = on_one(work, 2)
    assert kind == "DynamicCache"
    assert error < 1e-5


@pytest.mark.filterwarnings("ignore")  # inductor uses what torch has deprecated
@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_inductor_compiles_native_numerics_alone(numerics: str) -> None:
    if numerics == "native" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    plain, x = feed_forward(), torch.randn(3, 12)
    # One small file is compiled: a pool of compilers and precompiled headers would cost more.
    quick = {"compile_threads": 1, "cpp_cache_precompile_headers": False}

    @inductor.patch(quick)
    def work(axis: Any) -> Any:
        scheme: Any = sp.Scheme(numerics=numerics)  # type: ignore[arg-type]
        model = sp.parallelize(copy.deepcopy(plain), None, axis, inputs=(x,), scheme=scheme)
        y = model(x)
        try:
            z = torch.compile(model, fullgraph=True)(x)
        except Exception as error:
            return str(error)
        return float((z - y).abs().max())

    found = on_one(work)
    if numerics == "native":
        assert found < 1e-4
    else:
        assert "backend='inductor'" in found
        assert "Use backend='aot_eager'" in found


def test_a_cut_model_is_exported_with_whole_outputs() -> None:
    example = short(OWN, dropout=False)

    @torch.no_grad()
    def work(axis: Any) -> Any:
        model = cut_of(example, axis).eval()
        with ONE_AT_A_TIME:
            program = torch.export.export(model, (), dict(example.inputs))
        scores, loss = program.module()(**example.inputs)
        wanted, wanted_loss = model(**example.inputs)
        names = {
            str(node.target) for node in program.graph.nodes if "shardproof" in str(node.target)
        }
        return (
            type(scores),
            torch.equal(scores, wanted.whole()),
            torch.equal(loss, wanted_loss),
            names,
        )

    kind, same, same_loss, names = on_one(work, 2)
    assert kind is Tensor
    assert same
    assert same_loss
    assert "shardproof.all_reduce.default" in names


def test_make_fx_records_a_step() -> None:
    example = short(OWN, dropout=False)

    @torch.no_grad()
    def work(axis: Any) -> bool:
        model = cut_of(example, axis)
        graph = make_fx(lambda: example.loss(model(**example.inputs)))()
        return torch.equal(graph(), example.loss(model(**example.inputs)))

    assert on_one(work)


def test_fakes_go_through_a_step() -> None:
    example = short(OWN)

    def work(axis: Any) -> list[bool]:
        model = cut_of(example, axis)
        shapes = [each.shape for each in model.parameters()]
        with FakeTensorMode() as mode:
            fakes = {id(each): nn.Parameter(mode.from_tensor(each)) for each in model.parameters()}
            for module in model.modules():
                for name, each in list(module._parameters.items()):
                    if each is not None:
                        module._parameters[name] = fakes[id(each)]
                for name, buffer in list(module._buffers.items()):
                    if buffer is not None:
                        module._buffers[name] = mode.from_tensor(buffer)
            inputs = {name: mode.from_tensor(each) for name, each in example.inputs.items()}
            example.loss(model(**inputs)).backward()
            return [
                each.grad is not None and each.grad.shape == shape
                for each, shape in zip(model.parameters(), shapes, strict=True)
            ]

    found = on_one(work, 2)
    assert found
    assert all(found)


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 26), nn.ReLU(), nn.Linear(26, 12))


def flops_of(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("degree", [1, 3])
@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_flops_of_the_ranks_are_those_of_the_whole(numerics: str, degree: int) -> None:
    plain, x = feed_forward(), torch.randn(7, 12, requires_grad=True)

    def work(axis: Any) -> int:
        model = sp.parallelize(
            copy.deepcopy(plain),
            None,
            axis,
            inputs=(x.detach(),),
            scheme=sp.Scheme(numerics=numerics),  # type: ignore[arg-type]
        )
        return flops_of(model, x.detach().clone().requires_grad_())

    counted = sp.launch(work, degree=degree, engine="threads")
    assert sum(counted) == flops_of(plain, x)


def test_a_copy_of_a_cut_model_is_a_cut_model() -> None:
    example = short(OWN, dropout=False)

    def work(axis: Any) -> list[Any]:
        model = cut_of(example, axis)
        other = copy.deepcopy(model)
        return [
            type(model).__name__,
            isinstance(model, type(example.model)),
            isinstance(other, type(example.model)),
            torch.equal(
                example.loss(model(**example.inputs)), example.loss(other(**example.inputs))
            ),
        ]

    assert on_one(work) == ["GPT", True, True, True]


def recorded_sum(axis: Any) -> Any:
    """A graph of one sum over the ranks."""

    def summed(x: Tensor) -> Tensor:
        nodes = {(axis.rank, axis.rank + 1): x}
        cut = Cut(2, 2, 2)
        return comm.all_reduce_nodes(
            nodes, axis, cut=cut, shape=(3,), like=x, direction="forward", who="test"
        )

    with ONE_AT_A_TIME:
        return make_fx(summed, tracing_mode="fake")(torch.ones(3))


def test_a_recorded_collective_runs_again_and_leaves_its_input() -> None:
    def work(axis: Any) -> list[Any]:
        graph = recorded_sum(axis)
        x = torch.full((3,), 2.0 + axis.rank)
        return [graph(x).tolist(), x.tolist()]

    found = sp.launch(work, degree=2, engine="threads")
    assert [each[0] for each in found] == [[5.0] * 3] * 2
    assert [each[1] for each in found] == [[2.0] * 3, [3.0] * 3]


def test_a_graph_does_not_rest_on_an_axis_that_is_equal() -> None:
    """Ranks that are started once have an equal axis in each run; that of the run before dies."""

    def work(axis: Any) -> Any:
        before = replace(axis)
        recorded_sum(before)
        graph = recorded_sum(axis)
        del before
        gc.collect()
        return graph(torch.ones(3)).tolist()

    assert list(sp.launch(work, degree=2, engine="threads")) == [[2.0] * 3] * 2


def test_a_graph_whose_ranks_are_gone_says_so() -> None:
    graphs = list(sp.launch(recorded_sum, degree=2, engine="threads"))
    gc.collect()
    with pytest.raises(UsageError, match=r"its axis is gone. Record it again"):
        graphs[0](torch.ones(3))


def test_an_exchange_is_recorded() -> None:
    rows, columns = Cut(4, 2, 2), Cut(6, 2, 2)

    def work(axis: Any) -> bool:
        x = torch.arange(24.0).view(4, 6)
        part = x[2 * axis.rank : 2 * axis.rank + 2]

        def swapped(part: Tensor) -> Tensor:
            return recut.to_columns(
                part, axis, rows=rows, columns=columns, direction="setup", who="test"
            )

        with ONE_AT_A_TIME:
            graph = make_fx(swapped, tracing_mode="fake")(part)
        found = graph(part)
        return torch.equal(found, x[:, 3 * axis.rank : 3 * axis.rank + 3])

    assert all(sp.launch(work, degree=2, engine="threads"))


A, B = torch.randn(4, 6), torch.randn(6, 3)
CHECKED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "product": (products._operator, (A, B, None, [0, 6, 0, 1], False)),
    "product with a bias": (products._operator, (A, B.t(), B[0], [0, 6, 0, 1], True)),
    "product_by_head": (batched_products._operator, (A[None, None], B[None, None], [0])),
    "product_sums": (summed_products._operator, ([A], [B], [0, 3, 3, 6], [0, 2, 2])),
    "product_sums of two pairs": (
        summed_products._operator,
        ([A, A], [B, B], [0, 3, 3, 6] * 2, [0, 2, 2]),
    ),
    "product_sums without leaves": (
        summed_products._operator,
        ([A[:, :0]], [B[:0]], [], [0, 0, 2]),
    ),
    "sum_rows": (sums._fold_operator, (A, False)),
    "squares": (sums._fold_operator, (A, True)),
}


@pytest.mark.parametrize("name", CHECKED)
def test_torch_finds_nothing_wrong_with_an_operator(name: str) -> None:
    operator, args = CHECKED[name]
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, args, test_utils=utils)


MATRICES = {
    f"{shape} {name}": view
    for shape in ((5, 7), (1, 7), (0, 7))
    for name, view in views(torch.randn(shape)).items()
}
OTHER, PLACES = torch.randn(7, 3), torch.tensor([0, -1, 0, 0, -1])
LEAVES = ((slice(0, 3), slice(3, 7)),)


def picked(weight: Tensor) -> Tensor:
    """Rows of a table, zeros for those that lie elsewhere; of an empty table, zeros alone."""
    y = weight.new_zeros(len(PLACES), weight.shape[1])
    pick(weight, PLACES if len(weight) else PLACES.clamp(max=-1), y)
    return y


RECORDED: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: products.product(x, OTHER),
    "product of transposes": lambda x: products.product(OTHER.t(), x, is_transposed=True),
    "product_by_head": lambda x: batched_products.product_by_head(
        x[None, None], OTHER[None, None], rows=9
    ),
    "product_sums": lambda x: torch.stack(
        [*summed_products.joined_nodes([(x, OTHER)], LEAVES, run=range(2), num_leaves=2).values()]
    ),
    "sum_rows": sums.sum_rows,
    "sum_squares_rows": sums.sum_squares_rows,
    "pick": picked,
}


@pytest.mark.parametrize("name", RECORDED)
def test_an_operator_computes_the_same_on_every_view(name: str) -> None:
    function = RECORDED[name]
    for view, x in MATRICES.items():
        with FlopCounterMode(display=False):  # while it looks, operators are called
            found = function(x)
        assert torch.equal(found, function(plain(x))), view


def stepped(kind: type[nn.Module], x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of a layer."""
    layer = kind(7, 7, axis=sp.Axis.solo(), name="layer")  # type: ignore[arg-type]
    given = x.detach().requires_grad_()
    y = layer(given)
    y.backward(grad)
    return [y, given.grad, *(each.grad for each in layer.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("kind", [sp.ColumnParallelLinear, sp.RowParallelLinear])
def test_a_recorded_layer_takes_every_view(kind: type[nn.Module]) -> None:
    """As input and as incoming gradient."""
    for view, x in MATRICES.items():
        for given, grad in ((x, plain(x)), (plain(x), x)):
            with FlopCounterMode(display=False):
                found = stepped(kind, given, grad)
            wanted = stepped(kind, plain(x), plain(x))
            assert all(map(torch.equal, found, wanted)), view
