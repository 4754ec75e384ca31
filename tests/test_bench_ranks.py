"""One rank of the bench on real ranks: what it finds wrong, what it hashes and what it counts."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.bench import proof
from shardproof.bench.rank import Desk, Drop, Prepare, Time, stamps
from shardproof.bench.system import Party, Style, System
from shardproof.bench.systems.catalog import find_system
from shardproof.bench.systems.ours import Ours
from shardproof.bench.systems.plain import Plain
from shardproof.bench.work import Evidence
from shardproof.bench.works.all_reduce import AllReduce
from shardproof.bench.works.catalog import find_work
from shardproof.bench.works.counting import Counting
from shardproof.engines.engine import Ranks
from shardproof.errors import UsageError
from shardproof.leaves import Cut, Layout, replicated
from shardproof.numerics import mode, products

Pool = Callable[[int, str], Ranks]
WORK = "linear-row"


def prepare(folder: Path, *, work: str = WORK, keeps: bool = False) -> Prepare:
    return Prepare(work, 0, folder, keeps)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("reference")
    desk = Desk(find_system("torch-1t"), None)
    desk.join()
    assert desk.obey(prepare(folder, keeps=True)).findings == ()
    return folder


def findings(system: System, folder: Path, *, work: str = WORK) -> list[tuple[str, str]]:
    desk = Desk(system, None)
    desk.join()
    prepared = desk.obey(prepare(folder, work=work))
    return [(finding.name, finding.text) for finding in prepared.findings]


# -- what is found wrong ---------------------------------------------------------------------------


def test_what_plain_torch_computes_is_right(reference: Path) -> None:
    assert findings(find_system("torch-2t"), reference) == []
    assert findings(find_system("native-threads"), reference) == []


class Wrong(Plain):
    """Plain torch with a module of the test's around the model."""

    def __init__(self, spoil: Callable[[nn.Module], None]) -> None:
        super().__init__(0, 1)
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
    found = dict(findings(wrong(spoil), reference))
    assert re.search(text, found[name])


def test_a_lost_update_is_found(reference: Path) -> None:
    system = System("wrong", "", lambda axis: Forgetful(lose_update), engine="alone")
    found = findings(system, reference)
    assert [name for name, _ in found] == ["0.weight", "0.bias"]


def test_a_tensor_of_another_shape_is_found(tmp_path: Path) -> None:
    proof.keep([Evidence("y", torch.ones(4, 2), replicated((4, 2)))], tmp_path)
    kept = proof.kept(tmp_path)

    def look(tensor: Tensor, layout: Layout, name: str = "y") -> list[str]:
        return [found.text for found in proof.findings([Evidence(name, tensor, layout)], kept)]

    half = Layout((4, 2), 1, 0, Cut(4, 2, 2))
    assert look(torch.ones(2, 2), half) == []
    assert look(torch.ones(4, 2), replicated((4, 2))) == []
    assert look(torch.ones(4, 2), half) == ["is held as (4, 2), not (2, 2)"]
    assert look(torch.ones(2, 4), replicated((2, 4))) == ["has shape (2, 4), not (4, 2)"]
    assert look(torch.ones(4, 2), replicated((4, 2)), "z") == [
        "is not what plain torch computes at all", "was not computed",
    ]  # fmt: skip


# -- orders ----------------------------------------------------------------------------------------


def test_stamps_are_taken_after_the_warm_up_and_after_every_step() -> None:
    calls: list[int] = []
    found = stamps(lambda: calls.append(len(calls)), Time(warm_up=3, steps=5))
    assert len(calls) == 8
    assert len(found) == 6
    assert found == sorted(found)


def test_a_trial_can_be_dropped_and_made_again(reference: Path) -> None:
    desk = Desk(find_system("torch-1t"), None)
    with pytest.raises(UsageError, match="torch-1t gets an order and has not joined"):
        desk.obey(Drop())
    desk.join()
    with pytest.raises(UsageError, match="torch-1t is to be timed and has prepared nothing"):
        desk.obey(Time(1, 1))
    desk.obey(prepare(reference))
    assert len(desk.obey(Time(1, 2))) == 3
    desk.obey(Drop())
    with pytest.raises(UsageError, match="has prepared nothing"):
        desk.obey(Time(1, 1))


def test_ranks_agree_with_plain_torch_and_hash_the_whole(reference: Path, pool: Pool) -> None:
    def work(axis: Axis) -> Any:
        desk = Desk(find_system("invariant-threads"), axis)
        hello = desk.join()
        return hello, desk.obey(prepare(reference))

    one, two, three = (pool(degree, "threads").run(work) for degree in (1, 2, 3))
    assert two[0][0].transport == "threads"
    assert two[0][0].contract == one[0][0].contract
    for found in (one, two, three):
        assert all(prepared.findings == () for _, prepared in found)
        assert found[0][1].hashes == one[0][1].hashes
    # Every rank hashes what it holds whole; of what is cut, the first rank speaks for all.
    assert set(two[1][1].hashes) == {"output", "input.grad", "0.bias.grad", "0.bias"}
    assert set(one[0][1].hashes) - set(two[1][1].hashes) == {"0.weight.grad", "0.weight"}


def test_native_ranks_hash_nothing(reference: Path, pool: Pool) -> None:
    def work(axis: Axis) -> Any:
        desk = Desk(find_system("native-threads"), axis)
        desk.join()
        return desk.obey(prepare(reference))

    assert all(prepared.hashes == {} for prepared in pool(2, "threads").run(work))


# -- all-reduce ------------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", ["native", "invariant"])
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_the_sum_is_right_and_stays_right(pool: Pool, numerics: Any, degree: int) -> None:
    def work(axis: Axis) -> list[bool]:
        trial = AllReduce(Ours(axis, numerics), 4096)
        (first,) = trial.evidence()
        (again,) = trial.evidence()
        return [torch.equal(each.tensor, each.expected) for each in (first, again)]

    assert pool(degree, "threads").run(work) == [[True, True]] * degree


def test_a_sum_that_is_not_one_is_found(tmp_path: Path) -> None:
    class Copies(Ours):
        def make_sum(self, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
            return lambda: out.copy_(x).mul_(3)

    trial = AllReduce(Copies(Axis.solo(), "native"), 4096)
    found = proof.findings(list(trial.evidence()), {})
    assert [finding.name for finding in found] == ["sum of 1"]


def test_the_yardstick_copies(tmp_path: Path) -> None:
    trial = AllReduce(find_system("memcpy").join(None), 4096)
    (shown,) = trial.evidence()
    assert torch.equal(shown.tensor, shown.expected)
    assert proof.findings([shown], {}) == []


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


HIDDEN, TOKENS = 1024, 256
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
        trial = find_work("scaling").variants[0].make(find_system(name).join(axis))
        return trial.figures()

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


def test_parties_cut_evenly_unless_they_say_otherwise() -> None:
    layout = Party.layout(Plain(1, 2), (8, 6), 1)
    assert (layout.owned, layout.local_shape) == (range(3, 6), (8, 3))
    assert Party.layout(Plain(1, 2), (8, 6), None).is_replicated
