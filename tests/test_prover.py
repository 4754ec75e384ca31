import dataclasses
import hashlib
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardproof as sp
from shardproof import comm
from shardproof.errors import DegreeError, MismatchError, NumericsError, ShapeError, UsageError
from shardproof.leaves import Cut, Layout, replicated
from shardproof.prover import prove_cases
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.cases.transformer_block import FFN, FeedForward
from shardproof.prover.compare import Figures, combine, measure
from shardproof.prover.hashing import hash_tensor
from shardproof.prover.recording import ReferenceReader, ReferenceWriter
from shardproof.prover.training import Batch, Training
from shardproof.ranks import launch


def bytes_hash(tensor):
    flat = tensor.contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


# Hashes


SHAPES = [((13, 5), 0), ((5, 13), 1), ((3, 4, 7), 1), ((2, 3, 9), 2), ((1, 100), 1), ((3,), 0)]


@pytest.mark.parametrize("degree", [1, 2, 3, 8])
def test_hash_is_that_of_the_full_tensors_bytes(degree):
    tensors = [(torch.randn(shape), shape, dim) for shape, dim in SHAPES]

    def work(axis):
        hashes = []
        for full, shape, dim in tensors:
            layout = Layout(shape, axis.rank, dim, Cut(shape[dim], 8, axis.size))
            owned = layout.owned
            shard = full.narrow(dim, owned.start, len(owned))
            hashes.append(hash_tensor(shard, layout, axis, who="x"))
        return hashes

    first, *others = launch(work, degree=degree, threads=1)
    assert first == [bytes_hash(full) for full, _, _ in tensors]
    assert all(found == [None] * len(tensors) for found in others)


@pytest.mark.parametrize(
    "full",
    [
        torch.randn(7, 3),
        torch.randn(7, 3).t(),
        torch.tensor(2.5),
        torch.empty(0, 4),
        torch.randn(9).bfloat16(),
        torch.tensor([math.nan, -0.0, math.inf]),
        torch.arange(5),
    ],
    ids=["matrix", "transposed", "scalar", "empty", "bf16", "special", "integers"],
)
def test_a_replicated_tensor_is_hashed_by_every_rank(full):
    layout = replicated(tuple(full.shape))
    found = launch(lambda axis: hash_tensor(full, layout, axis, who="x"), degree=2, threads=1)
    assert found == [bytes_hash(full)] * 2


def test_minus_zero_has_another_hash():
    assert bytes_hash(torch.tensor([0.0])) != bytes_hash(torch.tensor([-0.0]))


@pytest.mark.parametrize("degree", [2, 3, 8])
def test_no_gathered_block_is_larger_than_a_ranks_share(degree, monkeypatch):
    blocks = []
    gather = comm.gather

    def watched(x, axis, *, sizes, **options):
        blocks.append((options["who"], sum(sizes)))
        assert options["direction"] == "prover"
        return gather(x, axis, sizes=sizes, **options)

    monkeypatch.setattr(comm, "gather", watched)

    def work(axis):
        for index, (shape, dim) in enumerate(SHAPES):
            layout = Layout(shape, axis.rank, dim, Cut(shape[dim], 8, axis.size))
            hash_tensor(torch.zeros(layout.local_shape), layout, axis, who=str(index))

    launch(work, degree=degree, threads=1)
    assert blocks
    for who, size in blocks:
        shape, dim = SHAPES[int(who)]
        rest = math.prod(shape) // shape[dim]
        assert size <= max(Cut(shape[dim], 8, degree).sizes()) * rest


# Figures


def figures(ours, reference, precise=None):
    ours, reference = torch.as_tensor(ours), torch.as_tensor(reference)
    return measure(ours, reference, reference.double() if precise is None else precise)


def test_the_same_tensor_is_exact():
    x = torch.randn(40, 3)
    found = figures(x, x)
    assert found.exact
    assert found.elementwise
    assert found.max_abs_diff == 0.0
    assert found.max_ulp == 0
    assert found.agrees(0.0, 0.0)
    assert found.errors() == (0.0, 0.0)


def test_a_neighbour_is_one_ulp_away_and_not_exact():
    x = torch.tensor([1.0, -1.0, 0.0])
    found = figures(torch.nextafter(x, torch.tensor(2.0)), x)
    assert not found.exact
    assert found.max_ulp == 1


def test_ulps_count_across_zero_and_saturate_in_fp64():
    tiny = torch.tensor([5e-324], dtype=torch.float64)
    assert figures(tiny, -tiny).max_ulp == 2
    huge = torch.tensor([1.7e308], dtype=torch.float64)
    assert figures(huge, -huge).max_ulp >= 1 << 60


def test_minus_zero_agrees_but_is_not_exact():
    found = figures([-0.0], [0.0])
    assert not found.exact
    assert found.agrees(0.0, 0.0)
    assert found.max_ulp == 0


def test_nan_and_inf_agree_with_themselves_alone():
    special = [math.nan, math.inf, -math.inf, 1.0]
    assert figures(special, special).agrees(0.0, 0.0)
    for place in range(3):
        other = list(special)
        other[place] = 2.0
        assert not figures(other, special).agrees(1.0, 1.0)
        assert not figures(special, other).agrees(1.0, 1.0)
    assert not figures([math.inf], [-math.inf]).agrees(1.0, 1.0)


def test_an_infinite_reference_does_not_make_everything_agree():
    assert not figures([math.inf, 5.0], [math.inf, 1.0]).agrees(1e-5, 1e-6)


def test_agreement_uses_the_largest_element_and_elementwise_does_not():
    reference = torch.tensor([1000.0, 0.0])
    found = figures(reference + torch.tensor([0.0, 5e-3]), reference)
    assert found.agrees(1e-5, 1e-6)
    assert not found.elementwise
    assert not figures(reference + torch.tensor([0.0, 2e-2]), reference).agrees(1e-5, 1e-6)


def test_maxima_are_those_of_all_parts_together():
    whole_ours, whole = torch.tensor([1000.0, 5e-3]), torch.tensor([1000.0, 0.0])
    parts = [figures(whole_ours[at], whole[at]) for at in (slice(0, 1), slice(1, 2))]
    assert not parts[1].agrees(1e-5, 1e-6)
    assert combine(parts) == figures(whole_ours, whole)
    assert combine([*reversed(parts), Figures()]) == combine(parts)


def test_errors_against_fp64_are_relative_l2():
    precise = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = measure(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 5.0]), precise)
    assert found.errors() == (0.1, 0.2)


def test_errors_without_a_number_are_none_and_no_error_is_zero():
    zero = torch.zeros(2, dtype=torch.float64)
    assert measure(torch.ones(2), torch.zeros(2), zero).errors() == (None, 0.0)
    nan = measure(torch.tensor([math.nan]), torch.tensor([1.0]), torch.ones(1).double())
    assert nan.errors() == (None, 0.0)


def test_large_tensors_are_compared_in_blocks_with_the_same_figures():
    reference = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0))
    ours = reference.clone()
    ours[699, 999] += 1
    found = figures(ours, reference)
    assert found.max_abs_diff == (ours.double() - reference.double()).abs().max().item()
    assert not found.exact


def test_integers_must_be_equal():
    assert figures(torch.tensor([1, 2]), torch.tensor([1, 2])).agrees(0.0, 0.0)
    found = figures(torch.tensor([1, 4]), torch.tensor([1, 2]))
    assert found.max_abs_diff == 2.0
    assert found.max_ulp == 2


# References


def test_a_reference_gives_each_rank_its_own_part(tmp_path):
    tensors = {
        "matrix": torch.randn(5, 7),
        "bf16": torch.randn(5, 7).bfloat16(),
        "view": torch.randn(7, 5).t(),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 2),
    }
    writer = ReferenceWriter(tmp_path / "run")
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.activation_bytes = 12
    writer.close()
    reader = ReferenceReader(tmp_path / "run")
    assert reader.names() == tuple(tensors)
    assert reader.activation_bytes == 12
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name, replicated(tuple(tensor.shape))), tensor)
    for rank in range(8):
        layout = Layout((5, 7), rank, 1, Cut(7, 8, 8))
        part = tensors["view"][:, layout.owned.start : layout.owned.stop]
        assert torch.equal(reader.read("view", layout), part)


def test_a_reference_of_another_shape_is_an_error(tmp_path):
    writer = ReferenceWriter(tmp_path / "run")
    writer.write("y", torch.zeros(2, 8))
    writer.close()
    with pytest.raises(ShapeError, match=r"'y' has shape \(2, 4\).*\(2, 8\) in plain torch"):
        ReferenceReader(tmp_path / "run").read("y", replicated((2, 4)))


# Whole proofs


def recording(**tensors):
    """A case that records what its functions make of the axis (None in plain torch)."""

    def work(trial):
        for name, make in tensors.items():
            trial.record(name, make(trial.axis))

    return Case("planted", "", work)


def run(case, degrees=(1, 2), **options):
    return prove_cases([case], degrees=degrees, threads=1, **options)


def test_ranks_that_hold_other_replicas_are_a_finding():
    def make(axis):
        return torch.full((3,), float(axis is not None and axis.rank == 2))

    report = run(recording(x=make), degrees=(1, 3))
    (tensor,) = report.cases[0].tensors
    assert not report.proved
    assert not tensor.identical
    assert len(set(tensor.sha256.values())) == 1  # rank 0 has the right bits: not enough
    assert tensor.findings == ("replicas differ at degree 3: rank 2 differs from rank 0",)
    assert "tensor x is the first that is not identical (replicas differ" in report.verdict()


def test_the_first_difference_is_the_first_in_execution_order():
    def from_degree(axis):
        return torch.tensor([1.0 if axis is None else 1.0 + 1e-7 * (axis.size == 2)])

    def same(axis):
        return torch.ones(2)

    report = run(recording(zebra=same, middle=from_degree, aardvark=from_degree), degrees=(1, 2, 3))
    case = report.cases[0]
    assert case.first_difference() == {
        "tensor": "middle", "what": "bits", "degrees": [1, 2], "detail": ""
    }  # fmt: skip
    assert case.agrees_with_torch
    assert "tensor middle is the first whose bits differ: degree 2 differs from degree 1" in (
        report.verdict()
    )


def test_a_fault_that_every_degree_shares_is_seen_by_plain_torch():
    report = run(recording(x=lambda axis: torch.ones(2) * (1.0 if axis is None else 1.1)))
    assert report.identical
    assert not report.agrees_with_torch
    assert not report.proved
    assert "does not agree with plain PyTorch: the largest difference is 0.1" in report.verdict()


def test_a_tensor_that_is_not_recorded_everywhere_is_a_finding():
    def work(trial):
        trial.record("x", torch.ones(1))
        if trial.axis is not None and trial.axis.size == 1:
            trial.record("only at 1", torch.ones(1))
        if trial.axis is None:
            trial.record("only in torch", torch.ones(1))

    tensors = {t.name: t for t in run(Case("holes", "", work)).cases[0].tensors}
    assert tensors["x"].identical
    assert tensors["only at 1"].findings == (
        "not recorded at degree 2",
        "not recorded by plain torch",
    )
    assert tensors["only in torch"].findings[:1] == ("not recorded at degree 1",)
    assert not tensors["only at 1"].identical
    assert not tensors["only in torch"].identical


def test_ranks_that_record_other_tensors_are_an_error():
    def work(trial):
        trial.record("x" if trial.axis is None or not trial.axis.rank else "y", torch.ones(1))

    with pytest.raises(MismatchError, match=r"recorded 1 tensors on rank 0 and 1 on rank 1.*x, y"):
        run(Case("odd", "", work))


def test_a_failed_check_keeps_a_case_from_being_proved():
    def work(trial):
        FFN.work(trial)
        trial.check("small enough", trial.axis is None or trial.axis.size < 3, "size counted")

    report = run(Case("claims", "", work), degrees=(1, 2, 3))
    assert report.identical
    assert report.agrees_with_torch
    assert not report.proved
    (check,) = (each for each in report.cases[0].checks if each.name == "small enough")
    assert not check.passed
    assert check.detail == "at degree 3: size counted"
    assert "the check 'small enough' failed (at degree 3: size counted)" in report.verdict()
    assert run(Case("claims", "", work)).proved


def test_nan_and_inf_in_the_input_travel():
    def make_batch(trial):
        x = torch.randn(1, 5, 10)
        x[0, 1, 2], x[0, 3, 4] = math.nan, math.inf
        return Batch((x,), torch.zeros(1, 5, 10))

    fixed = make_batch(None)
    work = dataclasses.replace(FFN.work, batch=lambda trial: fixed)
    report = run(dataclasses.replace(FFN, work=work), degrees=(1, 2, 3))
    assert report.identical
    assert report.agrees_with_torch
    output = next(t for t in report.cases[0].tensors if t.name == "output")
    assert output.torch.allclose
    assert output.torch.max_abs_diff is not None


def planted(**changes):
    return dataclasses.replace(FFN, work=dataclasses.replace(FFN.work, **changes))


def test_a_planted_gradient_fault_is_found_at_its_tensor():
    class Forgetful(FeedForward):
        def forward(self, x):
            axis = self.up.axis
            y = self.up(x.detach())  # no gradient of x by way of the layer
            return self.down(y) + 0.0 * x.sum() * axis.size

    def build(trial):
        model = FFN.work.build(trial)
        return model if trial.axis is None else Forgetful(model.up, model.down)

    report = run(planted(build=build))
    assert not report.proved
    assert report.cases[0].first_difference()["tensor"] == "input.grad"


def test_a_planted_slicing_fault_is_found_in_the_initial_weights():
    def build(trial):
        model = FFN.work.build(trial)
        if trial.axis is not None and trial.axis.size == 2:
            with torch.no_grad():
                model.up.weight.copy_(model.up.weight.flip(0))
        return model

    report = run(planted(build=build))
    assert report.cases[0].first_difference() == {
        "tensor": "up.weight (initial)", "what": "bits", "degrees": [1, 2], "detail": ""
    }  # fmt: skip


def test_native_numerics_are_reported_as_they_are():
    report = run(FFN, degrees=(1, 2, 3), scheme=sp.Scheme(numerics="native"))
    assert not report.identical
    assert report.agrees_with_torch
    assert not report.proved
    assert report.numerics == "native"
    assert report.contract.startswith("native")


def test_wrong_requests_are_errors_before_any_run():
    with pytest.raises(DegreeError, match="degree 9 exceeds leaves=8"):
        run(FFN, degrees=(1, 9))
    with pytest.raises(UsageError, match="no degree"):
        run(FFN, degrees=())
    with pytest.raises(UsageError, match="no case"):
        prove_cases([], degrees=(1,))
    with pytest.raises(UsageError, match="'ffn' is there twice"):
        prove_cases([FFN, FFN], degrees=(1,))
    absent = dataclasses.replace(FFN, extra="moon", module="no_such_module_here")
    with pytest.raises(UsageError, match="needs the extra 'moon'"):
        run(absent)


def test_degrees_are_run_once_and_in_order():
    report = run(recording(x=lambda axis: torch.ones(1)), degrees=(3, 1, 3))
    assert report.degrees == (1, 3)
    assert report.cases[0].degrees == (1, 3)


def test_progress_counts_every_run():
    told = []
    prove_cases([FFN], degrees=(1, 2), threads=1, progress=lambda *step: told.append(step))
    assert told == [
        (0, 3, "ffn, plain torch"),
        (1, 3, "ffn, degree 1"),
        (2, 3, "ffn, degree 2"),
        (3, 3, "done"),
    ]


def test_no_file_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run(FFN)
    assert list(Path(tmp_path).iterdir()) == []


def test_the_global_generator_is_not_touched():
    before = torch.random.get_rng_state()
    run(FFN)
    assert torch.equal(torch.random.get_rng_state(), before)


# prove()


class TwoLayers(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def whole():
    generator = torch.Generator().manual_seed(3)
    model = TwoLayers(nn.Linear(6, 13), nn.Linear(13, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1, generator=generator)
    return model


@pytest.fixture(scope="module")
def model():
    return whole()


@pytest.fixture
def build(model):
    def made(axis):
        if axis is None:
            return whole()
        return TwoLayers(
            sp.ColumnParallelLinear.from_linear(model.up, axis=axis),
            sp.RowParallelLinear.from_linear(model.down, axis=axis),
        )

    return made


BATCH = (torch.randn(9, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(9, 5))


def test_prove_proves_a_users_model(build):
    report = sp.prove(
        build,
        F.mse_loss,
        BATCH,
        degrees=(1, 2, 3),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        steps=2,
        threads=1,
        name="mine",
    )
    assert report.proved, report.verdict()
    case = report.cases[0]
    names = [tensor.name for tensor in case.tensors]
    assert case.name == "mine"
    assert names[:6] == [
        "up.weight (initial)",
        "up.bias (initial)",
        "down.weight (initial)",
        "down.bias (initial)",
        "output",
        "loss",
    ]
    assert names[6:11] == [
        "down.bias.grad",
        "down.weight.grad",
        "up.bias.grad",
        "up.weight.grad",
        "input.grad",
    ]
    assert "up.weight.momentum_buffer" in names
    assert "step 2: up.weight" in names
    judged = {tensor.name: tensor.agreement_judged for tensor in case.tensors}
    assert judged["up.weight"]
    assert not judged["step 2: up.weight"]
    later = next(tensor for tensor in case.tensors if tensor.name == "step 2: up.weight")
    assert later.torch is None
    assert later.fp64 is None
    assert later.identical


def test_prove_takes_several_inputs_and_adamw(model):
    class Sum(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, y):
            return self.inner(x + y)

    def build(axis):
        if axis is None:
            return Sum(whole().up)
        layer = sp.ColumnParallelLinear.from_linear(model.up, axis=axis, gather_output=True)
        return Sum(layer)

    report = sp.prove(
        build,
        F.mse_loss,
        ((BATCH[0], BATCH[0] * 2), torch.ones(9, 13)),
        degrees=(1, 2),
        optimizer=torch.optim.AdamW,
        threads=1,
    )
    assert report.proved, report.verdict()
    names = [tensor.name for tensor in report.cases[0].tensors]
    assert {"input 0.grad", "input 1.grad", "inner.weight.exp_avg", "inner.weight.step"} <= {*names}


def test_prove_refuses_a_fused_optimizer(build):
    def fused(parameters):
        return torch.optim.SGD(parameters, lr=0.1, fused=True)

    with pytest.raises(NumericsError, match=r"SGD\(fused=True\) gives other bits"):
        sp.prove(build, F.mse_loss, BATCH, degrees=(1,), optimizer=fused)


def test_prove_names_a_sharded_output_without_a_layout(model):
    def build(axis):
        if axis is None:
            return whole().up
        return sp.ColumnParallelLinear.from_linear(model.up, axis=axis)

    report = sp.prove(build, lambda y, t: y.sum(), BATCH, degrees=(1, 2), threads=1)
    output = next(tensor for tensor in report.cases[0].tensors if tensor.name == "output")
    assert not report.proved
    assert not output.identical
    assert any("its shape is (9, 8), plain torch's (9, 13)" in found for found in output.findings)


def test_a_model_that_is_made_whole_is_over_its_bound_unless_creation_is_left_out(model):
    def build(axis):
        full = whole().to(torch.float32)
        if axis is None:
            return full
        return TwoLayers(
            sp.ColumnParallelLinear.from_linear(full.up, axis=axis),
            sp.RowParallelLinear.from_linear(full.down, axis=axis),
        )

    x, target = BATCH[0][:1], BATCH[1][:1]  # small activations, or they are the bound
    options = {"degrees": (1, 2), "threads": 1}
    counted = sp.prove(build, F.mse_loss, (x, target), **options)
    assert counted.identical
    assert not counted.proved
    assert "allocated 312 bytes for a tensor of shape [13, 6]" in counted.verdict()
    left_out = sp.prove(build, F.mse_loss, (x, target), audit_creation=False, **options)
    assert left_out.proved, left_out.verdict()


def test_a_training_that_clips_records_the_norm():
    def clip(trial: CaseRun, model):
        if trial.axis is None:
            return nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        return sp.clip_grad_norm_(model, 0.01)

    report = run(planted(clip=clip), degrees=(1, 2, 3))
    assert report.proved, report.verdict()
    assert "grad_norm" in [tensor.name for tensor in report.cases[0].tensors]
    assert isinstance(FFN.work, Training)
