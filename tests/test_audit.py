import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from shardproof import comm
from shardproof.axis import Axis
from shardproof.prover import prove_cases
from shardproof.prover.case import CaseRun, MemoryAudit
from shardproof.prover.cases import find_case
from shardproof.prover.cases.single_linear import LINEAR_ROW
from shardproof.prover.recording import run_on_rank, run_references
from shardproof.ranks import launch
from shardproof.scheme import Scheme


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More of them wait for each other where the machine is busy, and change no size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def audited(do, *, data=()):
    audit = MemoryAudit()
    for tensor in data:
        audit.exclude(tensor)
    with audit.running():
        do()
    return audit


# What is counted


def test_the_largest_storage_is_kept_with_its_shape():
    audit = audited(lambda: (torch.zeros(3), torch.zeros(5, 2), torch.zeros(4)))
    assert (audit.largest_bytes, audit.largest_shape) == (40, (5, 2))


def test_temporaries_count():
    audit = audited(lambda: (torch.zeros(2, 1) + torch.zeros(1, 50)).sum())
    assert (audit.largest_bytes, audit.largest_shape) == (400, (2, 50))


def test_a_view_of_what_was_there_is_not_allocated():
    full = torch.zeros(100)
    assert audited(lambda: full[3:50].view(-1).detach()).largest_bytes == 0
    assert audited(lambda: full.add_(1)).largest_bytes == 0


def test_a_slice_of_something_new_counts_as_its_whole_storage():
    audit = audited(lambda: torch.zeros(100)[:2].clone())
    assert audit.largest_bytes == 400


def test_a_storage_that_grows_counts():
    x = torch.zeros(2)
    assert audited(lambda: x.resize_(50)).largest_bytes == 200


def test_lists_of_outputs_count():
    several = [torch.zeros(2), torch.zeros(9)]
    assert audited(lambda: torch._foreach_add(several, 1.0)).largest_bytes == 36


def test_backward_and_the_optimizer_count():
    layer = nn.Linear(10, 30, bias=False)
    x, optimizer = torch.zeros(1, 10), torch.optim.Adam(layer.parameters())
    y = layer(x).sum()
    assert audited(y.backward).largest_shape == (30, 10)
    assert audited(optimizer.step).largest_bytes >= 1200


def test_the_meta_device_has_no_memory():
    assert audited(lambda: torch.empty(1000, device="meta")).largest_bytes == 0


def test_data_is_left_out_and_what_is_made_of_it_is_not():
    data = torch.zeros(100)
    assert audited(lambda: data.view(10, 10).t(), data=[data]).largest_bytes == 0
    assert audited(lambda: data[:25] * 2, data=[data]).largest_bytes == 100
    assert audited(lambda: data * 2, data=[data]).largest_bytes == 400


def test_a_pause_leaves_out_the_recorders_own_work():
    audit = MemoryAudit()
    with audit.running():
        with audit.paused():
            torch.zeros(100)
        torch.zeros(2)
    assert audit.largest_bytes == 8


def test_outside_a_phase_nothing_counts():
    audit = audited(lambda: None)
    torch.zeros(100)
    assert audit.largest_bytes == 0


def test_nested_phases_count_once_and_end_together():
    audit = MemoryAudit()
    with audit.running():
        with audit.running():
            torch.zeros(2)
        torch.zeros(3)
    torch.zeros(100)
    assert audit.largest_bytes == 12


def test_each_rank_sees_its_own_thread_alone():
    def work(axis):
        return audited(lambda: torch.zeros(10 * (axis.rank + 1))).largest_bytes

    assert launch(work, degree=3, threads=1) == [40, 80, 120]


# The audit against the allocator's own record


@pytest.mark.parametrize("name", ["matmul-row", "ffn", "linear-row", "linear-column"])
def test_the_allocator_knows_of_nothing_larger(name, tmp_path, monkeypatch):
    """The dispatch mode cannot look into a kernel; the profiler sees every allocation."""
    allocated = []
    measured = CaseRun.measured

    @contextlib.contextmanager
    def profiled(self):
        if self.is_reference:
            yield
            return
        with (
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
            measured(self),
        ):
            yield
        events = record.profiler.kineto_results.events()
        allocated.extend(event.nbytes() for event in events if event.name() == "[memory]")

    case, options = find_case(name), {"scheme": Scheme(), "seed": 1}
    run_references(case, directory=tmp_path / "run", **options)
    # Not the first run of the process: torch builds caches of its own in it.
    run_on_rank(Axis.solo(), case=case, directory=tmp_path / "run", **options)
    monkeypatch.setattr(CaseRun, "measured", profiled)
    result = run_on_rank(Axis.solo(), case=case, directory=tmp_path / "run", **options)
    assert max(allocated) == result.largest_bytes


# Planted faults


def planted(**changes):
    return dataclasses.replace(LINEAR_ROW, work=dataclasses.replace(LINEAR_ROW.work, **changes))


def run(case, degrees=(1, 2)):
    return prove_cases([case], degrees=degrees, threads=1)


def test_a_planted_full_weight_is_caught():
    def build(trial):
        if trial.axis is not None:
            torch.empty(608, 1024)
        return LINEAR_ROW.work.build(trial)

    report = run(planted(build=build))
    assert report.identical
    assert report.agrees_with_torch
    assert not report.proved
    assert [rank.largest_shape for rank in report.cases[0].memory["2"]] == [(608, 1024)] * 2
    assert report.verdict() == (
        "Not proved: in case linear-row, rank 0 of 2 allocated 2490368 bytes for a tensor of shape "
        "[608, 1024], more than its bound of 1245184."
    )


def test_a_planted_gather_of_the_weight_is_caught():
    class Gathering(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            cut = self.inner.layouts["weight"].cut
            weight = self.inner.weight.detach()
            axis = self.inner.axis
            comm.all_gather(weight, axis, dim=1, cut=cut, direction="forward", who="planted")
            return self.inner(x)

    def build(trial):
        model = LINEAR_ROW.work.build(trial)
        wrapped = nn.Module() if trial.axis is None else Gathering(model)
        if trial.axis is None:
            wrapped.inner = model
            wrapped.forward = model.forward
        return wrapped

    report = run(planted(build=build), degrees=(2,))
    assert report.identical
    assert not report.cases[0].within_memory_bound
    sizes = {rank.largest_bytes for rank in report.cases[0].memory["2"]}
    assert sizes == {608 * 1024 * 4}


def test_the_bound_is_the_owned_share_or_the_largest_activation():
    report = run(LINEAR_ROW, degrees=(1, 3))
    assert report.proved
    (alone,) = report.cases[0].memory["1"]
    assert alone.largest_bytes == alone.bound_bytes == 608 * 1024 * 4, "it has the full weight"
    memory = report.cases[0].memory["3"]
    assert [rank.bound_bytes for rank in memory] == [608 * 384 * 4, 608 * 384 * 4, 608 * 256 * 4]
    small = prove_cases([find_case("mlp-gathered")], degrees=(8,), threads=1).cases[0].memory["8"]
    assert {rank.bound_bytes for rank in small} == {32 * 4 * 4}  # h, gathered, of 32 samples


def test_the_recorders_own_work_is_not_measured():
    """Comparing makes fp64 copies of whole shards; they must not be blamed on the case."""

    def build(trial):
        model = LINEAR_ROW.work.build(trial)
        with trial.measured():
            trial.record("inside", model.get_parameter("bias") * 1.0)
        return model

    report = run(planted(build=build), degrees=(2,))
    assert report.proved, report.verdict()
