"""Traces: complete, true in every shape, placement, byte and value, and no trace when off."""

import copy
import json
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_modules
from torch.testing import assert_close
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import shardproof as sp
from benchmarks.counting import Counting
from hf_zoo import meta_model, whole_model
from places import ENGINES, Pool
from shardproof import comm, observing
from shardproof.axis import Axis
from shardproof.errors import RankError, UsageError
from shardproof.observing import PARTIAL, REPLICATE, Placement, shard
from shardproof.plans.planning import plan
from shardproof.prover.case import MemoryAudit
from shardproof.scheme import Scheme
from shardproof.trace.hooks import listening
from shardproof.trace.placements import TensorPlacements
from shardproof.trace.rank import OF_USERS, RankTrace
from shardproof.trace.step import Part, TraceStep
from shardproof.trace.text import aligned
from views import plain, shapes, views

PLAN = {"1": sp.ColumnParallel(), "3": sp.RowParallel()}


def model(hidden: int = 8) -> nn.Module:
    """The same weights on every rank, whatever other threads draw."""
    layers = (nn.LayerNorm(4), nn.Linear(4, hidden), nn.GELU(), nn.Linear(hidden, 4))
    block = nn.Sequential(*layers)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.uniform_(-0.5, 0.5, generator=drawn)
    return block


def train(axis: Axis, *, numerics: Any = "invariant", hidden: int = 8) -> dict[str, Any]:
    """One step; what the ledger counted, and the output."""
    cut = sp.parallelize(model(hidden), PLAN, axis=axis, scheme=Scheme(numerics=numerics))
    sgd = torch.optim.SGD(cut.parameters(), lr=0.1)
    y = cut(torch.arange(8.0).view(2, 4))
    sp.functional.mse_loss(y, torch.zeros(2, 4)).backward()
    sgd.step()
    parts = [p.detach().clone() for p in cut.parameters()]
    return {"ledger": axis.transport.ledger.as_dict(), "y": y.detach(), "parts": parts}


def traced(
    degree: int = 2,
    work: Callable[[Axis], Any] = train,
    **options: Any,
) -> tuple[list[Any], sp.Trace]:
    results = sp.launch(work, degree=degree, trace=sp.Trace(**options))
    assert results.trace is not None
    return list(results), results.trace


def steps_of(trace: sp.Trace, rank: int = 0, **wanted: str) -> list[TraceStep]:
    return [
        step
        for step in trace.ranks[rank]
        if all(getattr(step, name) == value for name, value in wanted.items())
    ]


@pytest.mark.parametrize(
    ("degree", "numerics"), [(1, "invariant"), (3, "native"), (8, "invariant")]
)
def test_collectives_are_those_of_the_ledger(degree: int, numerics: str) -> None:
    results, trace = traced(degree, lambda axis: train(axis, numerics=numerics))
    assert len(trace.ranks) == degree
    for rank, found in enumerate(results):
        assert trace.collectives(rank) == found["ledger"]
    assert (degree > 1) == bool(trace.collectives(0))


@pytest.mark.parametrize("engine", ["processes", "gloo"])
def test_every_transport_is_traced_alike(engine: str, pool: Pool) -> None:
    """In any order: what runs while a sum is on its way, the transport decides."""
    _, here = traced(2)
    trace, recorded = sp.Trace(), sp.Trace().recorded(train)
    runs = pool(2, engine).run(recorded)
    trace.take((steps, num_dropped) for _, steps, num_dropped in runs)
    assert [run[0]["ledger"] for run in runs] == [trace.collectives(rank) for rank in (0, 1)]

    def described(steps: Any) -> list[str]:
        return sorted(
            repr((s.phase, s.module, s.operation, s.inputs, s.output, s.sent_bytes)) for s in steps
        )

    for steps, others in zip(trace.ranks, here.ranks, strict=True):
        assert described(steps) == described(others)


@pytest.mark.parametrize(
    ("kind", "numerics"), [("llama", "native"), ("llama-one-key-head", "invariant")]
)
def test_the_step_of_a_small_llama_is_complete(kind: str, numerics: str) -> None:
    """Collectives and bytes are the plan's."""
    degree = 3
    pytest.importorskip("transformers")
    scheme = Scheme(numerics=numerics)  # type: ignore[arg-type]
    whole = whole_model(kind)
    ids = torch.arange(18).view(2, 9)

    def work(axis: Axis) -> dict[str, Any]:
        llama = sp.parallelize(copy.deepcopy(whole), None, axis=axis, scheme=scheme)
        llama(ids, labels=ids).loss.backward()
        torch.optim.SGD(llama.parameters(), lr=0.1).step()
        return axis.transport.ledger.as_dict()

    ledgers, trace = traced(degree, work)
    made = plan(meta_model(kind), degree=degree, scheme=scheme)
    for rank, ledger in enumerate(ledgers):
        assert trace.collectives(rank) == ledger
        assert ledger == made.comm(batch=2, length=9, labels=True, rank=rank)
    steps = trace.ranks[0]
    assert not any(trace.num_dropped)
    assert {"forward", "backward", "update"} <= {step.phase for step in steps}
    updated = {step.module for step in steps if step.operation == "update"}
    assert updated == {name for name, _ in whole.named_parameters()}


def test_tracing_changes_no_bit() -> None:
    plain = sp.launch(train, degree=3)
    assert plain.trace is None
    results, _ = traced(3, values=True)
    for one, other in zip(plain, results, strict=True):
        assert torch.equal(one["y"], other["y"])
        assert all(map(torch.equal, one["parts"], other["parts"]))


def test_shapes_and_placements_of_a_block() -> None:
    _, trace = traced(2)
    found = [
        (step.module, step.operation, [(p.name, p.shape, p.placement) for p in step.inputs],
         step.output and (step.output.name, step.output.shape, step.output.placement))
        for step in steps_of(trace, phase="forward")
    ]  # fmt: skip
    shard0, shard1 = "Shard(0)", "Shard(1)"
    assert found == [
        ("0", "LayerNorm", [("x", (2, 4), "")], ("y", (2, 4), "")),
        (
            "1",
            "product",
            [("x", (2, 4), "Replicate"), ("weight", (4, 4), shard0), ("bias", (4,), shard0)],
            ("y", (2, 4), shard1),
        ),
        ("2", "GELU", [("x", (2, 4), shard1)], ("y", (2, 4), shard1)),
        (
            "3",
            "product",
            [("x", (2, 4), shard1), ("weight", (4, 4), shard1)],
            ("y, leaves 0-3", (2, 4), "Partial"),
        ),
        ("3", "all_reduce", [("leaves 0-3", (2, 4), "Partial")], ("y", (2, 4), "Replicate")),
        ("3", "addition", [], ("y", (2, 4), "Replicate")),
        (
            "3",
            "bias",
            [("y", (2, 4), "Replicate"), ("bias", (4,), "Replicate")],
            ("y", (2, 4), "Replicate"),
        ),
        (
            "mse_loss",
            "loss",
            [("y", (2, 4), "Replicate"), ("target", (2, 4), "")],
            ("loss", (), "Replicate"),
        ),
    ]
    (addition,) = steps_of(trace, phase="forward", operation="addition")
    assert addition.detail == "leaves 0-3 + leaves 4-7"


def test_gradients_say_how_they_lie() -> None:
    _, trace = traced(2)
    found = {
        (step.module, step.output.name): step.output.placement
        for step in steps_of(trace, phase="backward")
        if step.output is not None and step.operation != "product"
    }
    found |= {
        (step.module, step.output.name): step.output.placement
        for step in steps_of(trace, phase="backward", operation="product")
        if step.output is not None
    }
    assert found["3", "grad_x"] == found["3", "grad_weight"] == "Shard(1)"
    assert found["3", "grad_bias"] == found["1", "grad_x"] == "Replicate"
    assert found["2", "grad_x"] == "Shard(1)"
    assert found["1", "grad_x, leaves 0-3"] == "Partial"
    assert found["1", "grad_weight"] == found["1", "grad_bias"] == "Shard(0)"


def test_updates_have_the_parameter_before_and_after() -> None:
    results, trace = traced(2, values=True)
    updates = steps_of(trace, rank=1, phase="update", operation="update")
    names = [name for name, _ in model().named_parameters()]
    assert [step.module for step in updates] == names
    for step, part in zip(updates, results[1]["parts"], strict=True):
        before, grad = (torch.tensor(each.values) for each in step.inputs)
        assert step.output is not None
        assert_close(torch.tensor(step.output.values), before - 0.1 * grad)
        assert torch.equal(torch.tensor(step.output.values), part)


@pytest.mark.parametrize("degree", [1, 3])
def test_values_are_those_of_the_step(degree: int) -> None:
    """Every product is the product of its operands, every sum the sum of all ranks' parts."""
    _, trace = traced(degree, values=True)
    products = [s for steps in trace.ranks for s in steps if s.operation == "product"]
    assert len(products) >= 6 * degree - 2
    for step in products:
        assert_close(tensor(step.output), by_hand(step), rtol=1e-5, atol=1e-6)
    for row in aligned(trace.ranks):
        if row[0] is not None and row[0].operation == "all_reduce":
            parts = [tensor(part) for step in row if step is not None for part in step.inputs]
            for step in row:
                assert step is not None
                assert_close(tensor(step.output), torch.stack(parts).sum(0))


def tensor(part: Part | None) -> Tensor:
    assert part is not None
    assert part.values is not None
    return torch.tensor(part.values)


def by_hand(step: TraceStep) -> Tensor:
    """The formula of a product, from the values of its operands."""
    given = {part.name: tensor(part) for part in step.inputs}
    formula = step.detail.partition(" = ")[2].partition(",")[0]
    result: Tensor = eval(formula, {"__builtins__": {}}, given)  # of our own making
    return result


def test_values_are_kept_only_if_asked_for_and_small() -> None:
    _, trace = traced(2)
    assert all(p.values is None for step in trace.ranks[0] for p in step.inputs)
    _, trace = traced(2, values=True, num_values=8)
    kept = {p.values is not None for step in trace.ranks[0] for p in step.inputs if len(p.shape)}
    assert kept == {True, False}
    sizes = [
        torch.Size(p.shape).numel()
        for s in trace.ranks[0]
        for p in s.inputs
        if p.values is not None
    ]
    assert max(sizes) == 8


def test_memory_of_a_rank_shrinks_with_the_degree() -> None:
    def work(axis: Axis) -> None:
        up = sp.ColumnParallelLinear(4, 4096, axis=axis)
        down = sp.RowParallelLinear(4096, 4, axis=axis)
        down(up(torch.ones(2, 4))).sum().backward()

    def most(degree: int) -> int:
        _, trace = traced(degree, work)
        return max(step.held_bytes for steps in trace.ranks for step in steps)

    whole = most(1)
    assert most(2) < 0.55 * whole
    assert most(4) < 0.3 * whole


def test_ranks_are_aligned_where_they_meet() -> None:
    _, trace = traced(3)
    rows = aligned(trace.ranks)
    assert all(len(row) == 3 for row in rows)
    for rank in range(3):
        assert [row[rank] for row in rows if row[rank] is not None] == list(trace.ranks[rank])
    for row in rows:
        if any(step is not None and step.is_collective for step in row):
            assert len({step.meeting for step in row if step is not None}) == 1
            assert None not in row


def test_operations_of_torch_are_steps_and_views_are_not() -> None:
    def work(axis: Axis) -> None:
        cut = sp.parallelize(model(), PLAN, axis=axis)
        h = cut(torch.ones(2, 4)).view(8).view(2, 4)
        (h * h + 1).sum().backward()

    _, trace = traced(2, work)
    forward = [s.operation for s in steps_of(trace, phase="forward")]
    assert forward[-3:] == ["mul", "add", "sum"]
    assert "view" not in forward
    mul = steps_of(trace, operation="mul", phase="forward")[0]
    assert mul.output is not None
    assert mul.output.placement == "Replicate"


def test_memory_that_is_only_made_is_no_step() -> None:
    def work(axis: Axis) -> None:
        x = torch.ones(4)
        x.new_empty_strided((4,), (1,)).copy_(x)
        torch.full_like(x, 2.0)
        x.new_ones(3)

    _, trace = traced(1, work)
    assert trace.ranks == ((),)


def test_backward_of_torch_is_named_by_its_module() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x)

    own = nn.Sequential(nn.Linear(4, 8), Own(), nn.Linear(8, 4))

    def work(axis: Axis) -> None:
        block = copy.deepcopy(own)
        sp.parallelize(block, {"0": sp.ColumnParallel(), "2": sp.RowParallel()}, axis=axis)
        block(torch.ones(2, 4)).sum().backward()

    _, trace = traced(2, work)
    found = [(s.module, s.operation) for s in steps_of(trace, phase="backward")]
    assert ("1", "cos") in found


@ENGINES
def test_the_context_traces_all_ranks(engine: str, pool: Pool) -> None:
    def work(axis: Axis) -> tuple[Any, Any]:
        trace = sp.Trace()
        axis.transport.ledger.reset()
        with trace.on(axis):
            found = train(axis)
        train(axis)
        return trace, found["ledger"]

    for trace, ledger in pool(2, engine).run(work):
        assert len(trace.ranks) == 2
        assert all(trace.collectives(rank) == ledger for rank in (0, 1))


def test_the_limit_counts_what_it_drops() -> None:
    _, whole = traced(2)
    _, trace = traced(2, limit=5)
    assert [len(steps) for steps in trace.ranks] == [5, 5]
    assert trace.ranks[0] == whole.ranks[0][:5]
    assert trace.num_dropped == (len(whole.ranks[0]) - 5,) * 2
    assert "dropped" in str(trace)
    with pytest.raises(UsageError, match="are beyond limit=5"):
        trace.collectives(0)


def fails(axis: Axis) -> None:
    train(axis)
    raise ValueError("on purpose")


def test_nothing_stays_behind() -> None:
    sp.launch(train, degree=2, trace=True)
    assert is_off()
    with pytest.raises(RankError, match="on purpose"):
        sp.launch(fails, degree=2, trace=True)
    assert is_off()


def is_off() -> bool:
    hooks = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)
    seen = (observing.is_on(), observing.observers(), _get_current_dispatch_mode_stack())
    return not any(hooks) and not any(seen)


def test_other_threads_see_nothing_of_a_trace() -> None:
    """An audit of one rank and the trace of all do not mix."""

    def work(axis: Axis) -> int:
        audit = MemoryAudit()
        with audit.running():
            if axis.rank:
                torch.empty(10_000)
        return audit.largest_bytes

    results, trace = traced(2, work)
    assert results == [0, 40_000]
    assert [len(steps) for steps in trace.ranks] == [0, 0]


def test_what_is_given_a_number_of_a_rank_is_not_called_replicate() -> None:
    def work(axis: Axis) -> None:
        cut = sp.parallelize(model(), PLAN, axis=axis)
        y = cut(torch.ones(2, 4))
        torch.relu(y) * (axis.rank + 1)

    _, trace = traced(2, work)
    placed = {s.operation: s.output and s.output.placement for s in trace.ranks[1]}
    assert (placed["relu"], placed["mul"]) == ("Replicate", "")


def test_products_under_no_grad_are_forward_and_draws_are_setup() -> None:
    def work(axis: Axis) -> None:
        plain = nn.Linear(4, 4)
        with torch.no_grad():
            plain(torch.ones(2, 4))

    _, trace = traced(1, work)
    found = [(s.phase, s.operation) for s in trace.ranks[0]]
    assert found == [("setup", "uniform_"), ("setup", "uniform_"), ("forward", "addmm")]


def test_gradients_that_accumulate_have_the_name_of_their_parameter() -> None:
    def work(axis: Axis) -> None:
        plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        for _ in range(2):
            plain(torch.ones(2, 4)).sum().backward()

    _, trace = traced(1, work)
    added = {s.module for s in steps_of(trace, phase="backward") if s.operation == "add_"}
    assert added <= {"0.weight", "0.bias", "1.weight"}
    assert added


def test_closures_are_traced_and_updates_that_begin_without_gradients() -> None:
    def work(axis: Axis) -> None:
        plain = nn.Linear(4, 1)
        lbfgs = torch.optim.LBFGS(plain.parameters(), max_iter=2)

        def closure() -> Tensor:
            lbfgs.zero_grad()
            loss = plain(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        lbfgs.step(closure)

    _, trace = traced(1, work)
    operations = [s.operation for s in trace.ranks[0]]
    assert operations.count("addmm") == 2
    updated = [s.module for s in trace.ranks[0] if s.operation == "update"]
    assert updated == ["weight", "bias"]


def test_a_step_that_raises_hides_nothing_afterwards() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ValueError("on purpose")

    def work(axis: Axis) -> None:
        plain = nn.Linear(4, 1)
        with pytest.raises(ValueError, match="on purpose"):
            Fails(plain.parameters()).step()
        with torch.no_grad():
            plain(torch.ones(2, 4)).relu()

    _, trace = traced(1, work)
    assert [s.operation for s in trace.ranks[0]][-2:] == ["addmm", "relu"]


def test_an_embedding_shows_its_numbers_and_not_their_bits() -> None:
    whole = nn.Embedding(8, 2)
    with torch.no_grad():
        whole.weight.fill_(2.0)

    def work(axis: Axis) -> None:
        sp.VocabParallelEmbedding.from_embedding(whole, axis=axis)(torch.tensor([1, 7]))

    _, trace = traced(2, work, values=True)
    (step,) = steps_of(trace, operation="all_reduce")
    assert step.output is not None
    assert (step.output.dtype, step.output.values) == ("float32", ((2.0, 2.0), (2.0, 2.0)))


def functional(axis: Axis) -> list[Tensor]:
    layer = copy.deepcopy(LINEAR)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.ones(2, 4)

    def loss(given: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, given, x).square().sum()
        return result

    grads = torch.func.grad(loss)(weights)
    moved = torch.func.jvp(layer, (x,), (x,))[1]
    hessian = torch.func.hessian(lambda b: loss(weights | {"bias": b}))(weights["bias"])
    return [*grads.values(), moved, hessian]


LINEAR = nn.Linear(4, 4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_programs_of_torch_func_run_under_a_trace() -> None:
    (plain,) = sp.launch(functional, degree=1)
    (found,), _ = traced(1, functional, values=True)
    assert all(map(torch.equal, plain, found))


def test_a_trace_may_begin_and_end_inside_a_forward() -> None:
    def work(axis: Axis) -> int:
        inner, outer = nn.Linear(4, 4), sp.Trace()
        context = outer.on(axis)
        inner.register_forward_pre_hook(lambda *_: context.__enter__() and None)
        inner.register_forward_hook(lambda *_: context.__exit__(None, None, None))
        nn.Sequential(inner)(torch.ones(1, 4))
        return len(outer.ranks[0])

    assert sp.launch(work, degree=1) == [1]


def test_sparse_gradients_and_complex_numbers_have_no_values_or_words() -> None:
    def work(axis: Axis) -> None:
        table = nn.Embedding(5, 4, sparse=True)
        table(torch.tensor([1, 3])).sum().backward()
        torch.optim.SGD(table.parameters(), lr=0.1).step()
        torch.ones(2, dtype=torch.complex64) * 1j

    _, trace = traced(1, work, values=True)
    assert [s.operation for s in trace.ranks[0]][-2:] == ["update", "mul"]
    assert "1j" in json.dumps(trace.as_dict(), allow_nan=False)


def test_a_long_trace_prints_its_beginning() -> None:
    steps = [step_of(0, number, "a") for number in range(20_000)]
    trace = sp.Trace()
    trace.take([(steps, 0), (steps, 0)])
    text = str(trace)
    assert text.count("product") == 500
    assert "the first 500 are above" in text


def test_a_graph_that_outlives_its_trace_writes_nothing() -> None:
    def work(axis: Axis) -> tuple[int, int]:
        cut = sp.parallelize(model(), PLAN, axis=axis)
        with listening(), RankTrace(axis.rank, num_values=0, limit=100) as recorded:
            y = cut(torch.ones(2, 4, requires_grad=True))
        before = len(recorded.steps)
        y.sum().backward()
        return before, len(recorded.steps)

    for before, after in sp.launch(work, degree=2):
        assert before == after > 0


def test_a_sum_that_was_started_before_the_trace_is_left_out() -> None:
    def work(axis: Axis) -> tuple[list[str], float]:
        started = comm.start_all_reduce(torch.ones(2), axis, direction="forward")
        with sp.Trace().on(axis) as trace:
            total = started.wait()
        return [s.operation for s in trace.ranks[axis.rank]], total.sum().item()

    assert sp.launch(work, degree=2) == [([], 4.0), ([], 4.0)]


def test_looking_changes_no_memory() -> None:
    """The prover's audit and the bench count what a rank does, not what observers are told."""

    def work(axis: Axis) -> int:
        layer = sp.RowParallelLinear(8, 1000, axis=axis, scheme=Scheme(numerics="native"))
        x = torch.ones(1000, 8 // axis.size)
        counting = Counting([])
        with counting, torch.no_grad():
            y = layer(x)
        return counting.peak - y.untyped_storage().nbytes()

    assert max(sp.launch(work, degree=2)) < 1000 * 1000 * 4


def test_what_json_has_no_number_for_is_a_word() -> None:
    def work(axis: Axis) -> None:
        torch.ones(2).log().neg().exp() / torch.zeros(2)

    _, trace = traced(1, work, values=True)
    text = json.dumps(trace.as_dict(), allow_nan=False)
    assert '"inf"' in text


def test_every_package_is_of_users_or_of_our_own() -> None:
    """A new package of the work of users must be named, or its operations are no steps."""
    names = {found.name for found in pkgutil.iter_modules(sp.__path__)} - {"_kernels", "_shm"}
    own = {
        *("__main__", "autograd", "axis", "block_layout", "checking"),
        *("checkpoint", "comm", "c_modules", "comparison", "cut", "watching", "safetensors_file"),
        *("environment", "errors", "extras", "files", "functional", "heads", "hf", "layers"),
        *(
            "leaves",
            "checked_objects",
            "numerics",
            "observing",
            "operands",
            "operators",
            "ops",
            "optim",
        ),
        "plans",
        *(
            "checked_values",
            "recut",
            "reductions",
            "index_runs",
            "scheme",
            "error_text",
            "timeout",
        ),
        *("checker", "stop_signal", "text_batches", "training_run"),
        *("batch_gradients", "batch_leaves", "data_parallel", "sharded_optimizer"),
        *("arriving_gradients", "data_parallel_step", "gradient_buckets", "gradient_exchange"),
        *("torchrun", "trace", "transport", "tree", "units", "wording"),
    }
    users = {name.partition(".")[0] for name in OF_USERS}
    assert names == own | users
    assert not own & users


def test_it_prints() -> None:
    _, trace = traced(2)
    text = str(trace)
    assert "rank 0" in text
    assert "rank 1" in text
    assert "all_reduce" in text
    assert "-->" in text
    assert "<--" in text
    assert trace.table(1).row_count == len(trace.ranks[1])
    assert json.loads(json.dumps(trace.as_dict()))["degree"] == 2
    assert str(sp.Trace()) == "a trace of nothing yet"


def lines_of(trace: sp.Trace) -> list[str]:
    """The timeline as plain text, each step on one line, with single spaces."""
    console = Console(width=400, color_system=None)
    with console.capture() as captured:
        console.print(trace.timeline())
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def test_the_timeline_says_once_what_the_ranks_do_alike() -> None:
    lines = lines_of(traced(2)[1])
    assert lines[0] == "phase module step rank 0 rank 1"
    for line in (
        "forward 1 y = x @ weight.T + bias (2, 4) Shard(1) (2, 4) Shard(1)",
        "forward 2 GELU y (2, 4) Shard(1) y (2, 4) Shard(1)",
        "forward 3 y = x @ weight.T leaves 0-3 (2, 4) Partial leaves 4-7 (2, 4) Partial",
        "forward 3 all_reduce of y (2, 4) sends 32 bytes --> <-- sends 32 bytes",
        "forward 3 addition: leaves 0-3 + leaves 4-7 y (2, 4) Replicate y (2, 4) Replicate",
        "backward 1 grad_weight = grad_y.T @ x (4, 4) Shard(0) (4, 4) Shard(0)",
        "update 3.weight update: SGD (4, 4) Shard(1) (4, 4) Shard(1)",
    ):
        assert line in lines


def test_the_timeline_says_of_each_rank_what_it_does_otherwise() -> None:
    def work(axis: Axis) -> None:
        layer = sp.ColumnParallelLinear(4, 6, axis=axis, bias=axis.rank == 0, name="layer")
        layer(torch.ones(2, 4))
        if axis.rank == 1:
            torch.relu(torch.ones(3))

    lines = lines_of(traced(2, work)[1])
    of = [f"y = x @ weight.T{bias}: (2, 3) Shard(1)" for bias in (" + bias", "")]
    assert f"forward layer {of[0]} {of[1]}" in lines
    assert "forward relu y (3,)" in lines
    three = lines_of(traced(3)[1])
    assert "forward 3 y = x @ weight.T leaf 2 (2, 4) Partial leaves 4-5 (2, 4) Partial" in three


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: sp.launch(train, degree=1, trace="yes"), "trace='yes' is neither a bool"),
        (lambda: sp.Trace(limit=0), "limit"),
        (lambda: sp.Trace().on(5).__enter__(), "axis=5 is not an Axis"),  # type: ignore[arg-type]
        (lambda: sp.Trace(num_values=-1), "num_values"),
        (lambda: sp.Trace(values="all"), "values"),
        (lambda: sp.Trace().timeline(), "this trace is empty"),
        (lambda: traced(2)[1].table(2), "rank 2 is not one of the 2 ranks"),
    ],
)
def test_bad_arguments_are_named(do: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        do()


HELD = shard(2, range(2, 4), 4)
aten = torch.ops.aten


@pytest.mark.parametrize(
    ("func", "args", "place", "expected"),
    [
        (aten.mul.Tensor, (2.0,), HELD, HELD),
        (aten.view.default, ([6, 2, 5],), HELD, shard(1, range(2, 4), 4)),
        (aten.view.default, ([2, 3, 10],), HELD, shard(2, range(10, 20), 20)),
        (aten.view.default, ([2, 3, 2, 1, 5],), HELD, HELD),
        (aten.view.default, ([12, 5],), HELD, None),
        (aten.view.default, ([2, 30],), HELD, None),
        (aten.transpose.int, (1, 2), HELD, shard(1, range(2, 4), 4)),
        (aten.slice.Tensor, (0, 0, 1), HELD, HELD),
        (aten.slice.Tensor, (2, 0, 1), HELD, None),
        (aten.slice.Tensor, (0, 0, 1), REPLICATE, None),
        (aten.relu.default, (), REPLICATE, REPLICATE),
        (aten.mul.Tensor, (2.0,), REPLICATE, None),
        (aten.sum.dim_IntList, ([0],), REPLICATE, REPLICATE),
        (aten.as_strided.default, ([2], [1], 3), REPLICATE, None),
        (aten.relu.default, (), PARTIAL, None),
        (aten.relu.default, (), None, None),
        (aten.cumsum.default, (2,), HELD, None),
        (aten.bernoulli.default, (), REPLICATE, None),
    ],
)
def test_placements_are_carried_or_not_claimed(
    func: Any, args: tuple[Any, ...], place: Placement | None, expected: Placement | None
) -> None:
    x = torch.rand(2, 3, 2, 5)
    places = TensorPlacements()
    places.learn(x, place)
    seen = places.look([x])
    y = func(x, *args)
    places.carry(func, seen, (x, *args), [y], is_ours=False)
    assert places.of(y) == expected


def test_outputs_of_more_dims_keep_their_placement() -> None:
    def work(axis: Axis) -> None:
        up = sp.ColumnParallelLinear(4, 8, axis=axis)
        down = sp.RowParallelLinear(8, 4, axis=axis)
        torch.relu(down(torch.relu(up(torch.ones(2, 3, 4)))))

    _, trace = traced(2, work)
    found = [s.output and (s.output.shape, s.output.placement) for s in trace.ranks[0]]
    relus = [part for part, s in zip(found, trace.ranks[0], strict=True) if s.operation == "relu"]
    assert relus == [((2, 3, 4), "Shard(2)"), ((2, 3, 4), "Replicate")]


def test_idle_ranks_have_the_steps_of_all() -> None:
    """Their tensors are empty, and empty tensors have one address."""

    def work(axis: Axis) -> None:
        up = sp.ColumnParallelLinear(4, 3, axis=axis, bias=False)
        down = sp.RowParallelLinear(3, 4, axis=axis, bias=False)
        down(torch.relu(up(torch.ones(2, 4)))).sum().backward()

    _, trace = traced(8, work)

    def done(rank: int) -> list[tuple[str, str, str]]:
        return [
            (s.phase, s.operation, s.output.placement if s.output else "")
            for s in trace.ranks[rank]
            if s.detail.count("leaf") == 0 and s.operation != "addition"
        ]

    assert done(7) == done(0)
    assert ("forward", "relu", "Shard(1)") in done(7)


@pytest.mark.parametrize("shape", shapes(8), ids=str)
def test_a_trace_of_views_has_their_numbers_and_changes_none(shape: tuple[int, ...]) -> None:
    """Forward and backward of views of every kind, beside plain torch."""
    inputs, grads = (
        views(torch.randn(shape, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2)
    )
    whole = nn.Linear(8, 8, bias=False)

    def work(axis: Axis) -> list[tuple[Tensor, Tensor | None]]:
        layer = sp.ColumnParallelLinear.from_linear(whole, axis=axis, gather_output=True)
        found = []
        for name, x in inputs.items():
            given = x.detach().requires_grad_()
            y = layer(given)
            y.backward(grads[name])
            found.append((y.detach(), given.grad))
        return found

    results, trace = traced(2, work, values=True)
    products = steps_of(trace, operation="product", phase="forward")
    for number, (name, x) in enumerate(inputs.items()):
        plain_x = plain(x).requires_grad_()
        plain_y = whole(plain_x)
        plain_y.backward(plain(grads[name]))
        for found in results:
            y, grad_x = found[number]
            assert_close(y, plain_y.detach())
            assert_close(grad_x, plain_x.grad)
        rows = tensor(products[number].inputs[0])
        assert torch.equal(rows.view(-1), plain(x).view(-1)), name


def test_placements_of_freed_memory_are_forgotten() -> None:
    places = TensorPlacements()
    x = torch.rand(1000)
    places.learn(x, REPLICATE)
    assert places.of(x) == REPLICATE
    for _ in range(100):
        del x
        x = torch.rand(1000)
        assert places.of(x) is None


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.gate(x) * self.up(x)
        return result


def test_layers_that_share_an_input_are_told_once() -> None:
    whole = nn.Sequential(Gated())
    column = sp.ColumnParallel()
    plan = {"0.gate": column, "0.up": column, "0": sp.SharedInput(("gate", "up"))}

    def work(axis: Axis) -> None:
        layers = sp.parallelize(copy.deepcopy(whole), plan, axis)
        layers(torch.ones(2, 4, requires_grad=True)).part.sum().backward()

    _, trace = traced(2, work)
    forward = [(s.module, s.operation) for s in steps_of(trace, phase="forward")]
    assert forward == [("0.gate", "product"), ("0.up", "product"), ("0", "mul"), ("", "sum")]
    backward = steps_of(trace, phase="backward")
    assert [s.operation for s in backward if s.is_collective] == ["all_reduce"]
    assert "ColumnParallelLinear" not in {s.operation for s in backward}


def test_functions_between_cut_layers_are_steps() -> None:
    """Of a form of ours one forward and one backward, of torch's own what torch does."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.up(x)
            return self.down(F.silu(hidden) + sp.functional.gelu(torch.sin(hidden)))

    whole = Halves()

    def work(axis: Axis) -> None:
        model = sp.parallelize(copy.deepcopy(whole), {"up": "colwise", "down": "rowwise"}, axis)
        model(torch.ones(2, 4)).sum().backward()

    _, trace = traced(2, work)
    forward = [
        (step.module, step.operation, step.output.shape, step.output.placement)
        for step in steps_of(trace, phase="forward")
        if step.output is not None and step.module == "Halves"
    ]
    of_part = ((2, 4), "Shard(1)")
    assert forward == [("Halves", name, *of_part) for name in ("silu", "sin", "gelu", "add")]
    backward = [s.operation for s in steps_of(trace, phase="backward") if s.module == "Halves"]
    assert backward == ["gelu", "cos", "mul", "silu"]


def step_of(rank: int, number: int, module: str) -> TraceStep:
    return TraceStep(rank, number, "forward", module, "product", "", (), None)


def test_a_step_that_only_one_rank_has_stands_alone() -> None:
    first = [step_of(0, number, name) for number, name in enumerate("abcd")]
    second = [step_of(1, number, name) for number, name in enumerate("acxd")]
    rows = [tuple(step and step.module for step in row) for row in aligned([first, second])]
    assert rows == [("a", "a"), ("b", None), ("c", "c"), (None, "x"), ("d", "d")]
