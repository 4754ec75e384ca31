"""One rank of the bench on real ranks: what it finds wrong, what it hashes and what it counts."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.counting import Counting
from benchmarks.groups import (
    FirstStep,
    faults,
    first_step,
    read_reference,
    stamps,
    write_reference,
)
from benchmarks.step import Phase
from benchmarks.system import Style, System
from benchmarks.systems import Ours, Plain, find_system
from benchmarks.work import Checked, Variant
from benchmarks.works import AllReduce, CountedStep, feed_forward, find_work
from shardproof.axis import Axis
from shardproof.engines.engine import Ranks
from shardproof.leaves import Cut, Layout, replicated
from shardproof.numerics import mode, products
from shardproof.scheme import NUMERICS

Pool = Callable[[int, str], Ranks]
(VARIANT,) = find_work("linear-row").variants


def look(
    system: System, folder: Path, axis: Axis | None = None, *, keeps: bool = False
) -> FirstStep:
    """What a rank of a system does first, compared with what plain torch left in `folder`."""
    return first_step(system.join(axis), variant=VARIANT, folder=folder, keeps=keeps)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("reference")
    assert look(find_system("torch-1t"), folder, keeps=True).faults == ()
    return folder


# -- what is found wrong ---------------------------------------------------------------------------


def test_what_plain_torch_computes_is_right(reference: Path) -> None:
    assert look(find_system("torch-2t"), reference).faults == ()
    assert look(find_system("native-threads"), reference).faults == ()


class Wrong(Plain):
    """Plain torch with a module of the test's around the model."""

    def __init__(self, spoil: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self._spoil = spoil

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        self._spoil(model)
        return model


def wrong(spoil: Callable[[nn.Module], None]) -> System:
    return System("wrong", "", lambda axis: Wrong(spoil), engine="alone")


def spoil_output(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, y: y * 1.0001)


def lose_output(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, y: y / 0.0)


def spoil_gradient(model: nn.Module) -> None:
    model[0].weight.register_hook(lambda grad: grad / 2)


def lose_input_gradient(model: nn.Module) -> None:
    model.register_forward_pre_hook(lambda module, args: (args[0].detach(),))


def freeze(model: nn.Module) -> None:
    model[0].bias.requires_grad_(False)


def lose_update(model: nn.Module) -> None:
    """The gradient is right when it is looked at, and was not there for the update."""
    kept: dict[nn.Parameter, Tensor] = {}

    def hold(parameter: nn.Parameter) -> None:
        kept[parameter] = parameter.detach().clone()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hold)
    model.kept = kept  # type: ignore[assignment] # put back by the party below


class Forgetful(Wrong):
    def finish(self, tensor: Tensor) -> Tensor:
        """Called last in a step: the weights are what they were."""
        with torch.no_grad():
            for parameter, before in self.model.kept.items():
                parameter.copy_(before)
        return tensor

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        self.model: Any = super().cut(model, plan, training=training)
        return model


@pytest.mark.parametrize(
    ("spoil", "name", "text"),
    [
        (spoil_output, "output", r"differs from plain torch by .*e-04, and .*e-05 is allowed"),
        (lose_output, "output", "has NaN or Inf where plain torch has none"),
        (spoil_gradient, "0.weight.grad", "differs from plain torch by"),
        (lose_input_gradient, "input.grad", "was not computed"),
        (freeze, "0.bias.grad", "was not computed"),
    ],
)
def test_a_planted_fault_is_found(
    reference: Path, spoil: Callable[[nn.Module], None], name: str, text: str
) -> None:
    found = look(wrong(spoil), reference).faults
    assert any(re.match(f"{re.escape(name)} {text}", fault) for fault in found), found


def test_a_lost_update_is_found(reference: Path) -> None:
    system = System("wrong", "", lambda axis: Forgetful(lose_update), engine="alone")
    found = look(system, reference).faults
    assert [fault.split()[0] for fault in found] == ["0.weight", "0.bias"]


def test_a_tensor_of_another_shape_is_found(tmp_path: Path) -> None:
    write_reference([Checked("y", torch.ones(4, 2), replicated((4, 2)))], tmp_path)
    right = read_reference(tmp_path)

    def compare(tensor: Tensor, layout: Layout, name: str = "y") -> list[str]:
        return faults([Checked(name, tensor, layout)], right)

    half = Layout((4, 2), 1, 0, Cut(4, 2, 2))
    assert compare(torch.ones(2, 2), half) == []
    assert compare(torch.ones(4, 2), replicated((4, 2))) == []
    assert compare(torch.ones(4, 2), half) == ["y is held as (4, 2), not (2, 2)"]
    assert compare(torch.ones(2, 4), replicated((2, 4))) == ["y has shape (2, 4), not (4, 2)"]
    assert compare(torch.ones(4, 2), replicated((4, 2)), "z") == [
        "z is not what plain torch computes at all", "y was not computed",
    ]  # fmt: skip


def test_stamps_are_taken_after_the_warm_up_and_after_every_step() -> None:
    class Task:
        calls = 0

        def step(self) -> None:
            self.calls += 1

    task: Any = Task()
    variant = Variant(lambda rank: task, frozenset(), steps=5, warm_up=3)
    ends = stamps(Plain(), variant=variant)
    assert task.calls == 8
    assert len(ends) == 6
    assert ends == sorted(ends)


def test_ranks_agree_with_plain_torch_and_hash_the_whole(reference: Path, pool: Pool) -> None:
    def work(axis: Axis) -> list[FirstStep]:
        return [look(find_system(f"{kind}-threads"), reference, axis) for kind in NUMERICS]

    one, two, three = (pool(degree, "threads").run(work) for degree in (1, 2, 3))
    for ranks in (one, two, three):
        assert all(each.faults == () for both in ranks for each in both)
        invariant, native = ranks[0]
        assert invariant.hashes == one[0][0].hashes
        assert invariant.contract == one[0][0].contract
        assert native.hashes == {}
    # Every rank hashes what it holds whole; of what is cut, the first rank speaks for all.
    assert set(two[1][0].hashes) == {"output", "input.grad", "0.bias.grad", "0.bias"}
    assert set(one[0][0].hashes) - set(two[1][0].hashes) == {"0.weight.grad", "0.weight"}


# -- all-reduce ------------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", ["native", "invariant"])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_the_sum_is_right_and_stays_right(pool: Pool, numerics: Any, degree: int) -> None:
    def work(axis: Axis) -> list[bool]:
        task = AllReduce(Ours(axis, numerics), 4096)
        (first,) = task.checked()
        (again,) = task.checked()
        return [torch.equal(each.tensor, each.expected) for each in (first, again)]

    assert pool(degree, "threads").run(work) == [[True, True]] * degree


def test_a_sum_that_is_not_one_is_found() -> None:
    class Copies(Ours):
        def make_sum(self, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
            return lambda: out.copy_(x).mul_(3)

    task = AllReduce(Copies(None, "native"), 4096)
    (fault,) = faults(task.checked(), {})
    assert fault.startswith("sum of 1 differs")


def test_the_yardstick_copies() -> None:
    task = AllReduce(find_system("memcpy").join(None), 4096)
    (shown,) = task.checked()
    assert torch.equal(shown.tensor, shown.expected)
    assert faults([shown], {}) == []


# -- counting --------------------------------------------------------------------------------------


def test_flops_and_living_bytes_are_counted() -> None:
    x, w = torch.ones(5, 7), torch.ones(7, 3)
    with Counting([x, w]) as counted:
        y = x @ w
        z = torch.zeros(1000)
        del z
        y.add_(1)
    assert counted.flops == 2 * 5 * 7 * 3
    assert counted.peak == x.nbytes + w.nbytes + y.nbytes + 4000
    with Counting([]) as after:
        x.view(35)
    assert (after.flops, after.peak) == (0, x.nbytes)


def test_our_own_kernels_are_counted_while_a_thread_counts_and_left_alone_after(
    pool: Pool,
) -> None:
    before = products.product
    x, w = torch.ones(2, 512), torch.ones(512, 16)
    if not products.are_ours(x, w, 2):
        pytest.skip("the kernels in C are not used here")

    def work(axis: Axis) -> int:
        if axis.rank:
            products.product(x, w)  # of a thread that does not count
            return 0
        with Counting([]) as counted:
            products.product(x, w)
        return counted.flops

    assert pool(2, "threads").run(work) == [2 * 2 * 512 * 16, 0]
    assert products.product is before


@pytest.mark.skipif(mode.missing_products() is not None, reason="needs the kernels in C")
def test_a_product_counts_the_same_however_its_operand_is_given() -> None:
    x, w, bias = torch.ones(2, 12), torch.ones(12, 5), torch.ones(5)
    slices = Cut(12, 3, 1).leaf_slices(0)

    def flops(b: Tensor, *, is_transposed: bool) -> list[int]:
        calls: list[Callable[[], object]] = [
            lambda: products.product(x, b, bias, is_transposed=is_transposed),
            lambda: products.leaf_sum(x, b, slices, bias, is_transposed=is_transposed),
            lambda: products.leaf_nodes(
                x, b, slices, run=range(3), num_leaves=4, is_transposed=is_transposed
            ),
        ]
        found = []
        for call in calls:
            with Counting([]) as counted:
                call()
            found.append(counted.flops)
        return found

    assert flops(w, is_transposed=False) == [2 * 2 * 12 * 5] * 3
    assert flops(w.t(), is_transposed=True) == [2 * 2 * 12 * 5] * 3


def pretend(monkeypatch: pytest.MonkeyPatch, branch: str) -> None:
    """Call products as a process in this BLAS mode does; only their number and memory are right."""
    state = mode.BlasState("auto", branch, own_rows=mode.set_blas_mode().own_rows and 16)
    monkeypatch.setattr(mode, "_state", state)
    monkeypatch.setattr(mode, "self_check", lambda: None)  # it would find other bits, rightly
    mode.addmm_limit.cache_clear()  # as in a process that has computed nothing


HIDDEN, TOKENS = 512, 128  # half of those of the work "scaling"
ACTIVATION, LEAF = TOKENS * HIDDEN * 4, (HIDDEN + TOKENS) * 4 * HIDDEN // 8 * 4  # bytes


def spare_bytes(branch: str | None) -> int:
    """What may be there beside all that is cut: activations, and what a leaf's product needs."""
    state = mode.set_blas_mode()
    is_blas = branch is not None or (state.own_rows < TOKENS and state.took)
    is_leafwise = branch == "leafwise" or (branch is None and state.is_leafwise)
    # Input, target, output and its gradient; two products of BLAS before they are added, one of
    # them another rank's; the operands of one leaf, copied.
    return ACTIVATION * (4 + 2 * is_blas) + LEAF * is_leafwise


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("native-threads", None),
        ("invariant-threads", None),
        ("invariant-threads", "avx512-strict"),
        ("invariant-threads", "leafwise"),
    ],
)
def test_work_memory_and_bytes_shrink_with_the_degree_as_the_formulas_say(
    pool: Pool, name: str, branch: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if branch is not None:
        pretend(monkeypatch, branch)

    def work(axis: Axis) -> dict[str, float]:
        block = feed_forward(HIDDEN, TOKENS)
        return CountedStep(find_system(name).join(axis), block=block, phase=Phase.TRAIN).figures()

    hidden, tokens = HIDDEN, TOKENS
    for degree in (1, 2, 4):
        for found in pool(degree, "threads").run(work):
            assert found["flops"] * degree == 3 * 2 * tokens * hidden * 4 * hidden * 2
            assert found["parameter_bytes"] * degree == 2 * 4 * hidden * hidden * 4
            assert found["peak_bytes"] < 75 * ACTIVATION / degree + spare_bytes(branch)
            assert found["all_reduces"] == (2 if degree > 1 else 0)
            message = 2 * tokens * hidden * 4 if degree > 1 else 0
            assert found["message_bytes"] == message
            assert found["sent_bytes"] == found["formula_bytes"]
            assert found["formula_bytes"] == 2 * (degree - 1) * message // degree


def test_tensors_are_cut_evenly_unless_a_system_differs() -> None:
    layout = Plain(1, 2).layout((8, 6), 1)
    assert (layout.owned, layout.local_shape) == (range(3, 6), (8, 3))
    assert Plain(1, 2).layout((8, 6), None).is_replicated
