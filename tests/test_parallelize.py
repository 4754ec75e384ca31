"""`parallelize`: what a cut model is made of, and that it keeps every bit at every degree."""

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from fresh_process import run_fresh
from gated_model import PLAN, Model
from invariance import bits_equal, normal, random_threads
from places import Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import MismatchError
from shardproof.layers import activations
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.numerics import mode
from shardproof.optim import layouts_of
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, Plan, RowParallel
from shardproof.scheme import Scheme


class PlainSilu(nn.Module):
    """What no replacement can see: a function, called in a forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


def test_linears_are_cut_under_their_names_with_their_options() -> None:
    styles = {"embed": ColumnParallel(gather_output=True), "head": RowParallel(False)}
    scheme = Scheme(leaves=3, seed=4)
    given = Model()
    model = parallelize(given, Plan(styles, scheme), Axis.solo())
    assert model is given
    assert isinstance(model.embed, ColumnParallelLinear)
    assert isinstance(model.head, RowParallelLinear)
    assert (model.embed.name, model.embed.gather_output) == ("embed", True)
    assert (model.head.name, model.head.input_is_parallel) == ("head", False)
    assert model.embed.scheme == model.head.scheme == scheme
    gathered = parallelize(Model(), {"embed": ColumnParallel(gather_input=True)}, Axis.solo())
    assert gathered.embed.gather_input


ACTIVATIONS: list[tuple[Callable[[], nn.Module], type[nn.Module]]] = [
    (nn.SiLU, activations.SiLU),
    (nn.GELU, activations.GELU),
    (lambda: nn.GELU("tanh"), activations.GELU),
    (nn.Sigmoid, activations.Sigmoid),
    (nn.Softplus, activations.Softplus),
    (nn.Tanh, activations.Tanh),
]


@pytest.mark.parametrize(
    ("act", "twin"), ACTIVATIONS, ids=lambda value: getattr(value, "__name__", "tanh")
)
def test_activations_are_replaced_only_with_invariant_numerics(
    act: Callable[[], nn.Module], twin: type[nn.Module]
) -> None:
    model = Model(act=act).eval()
    wanted = model(normal(3, 6))
    invariant = parallelize(copy.deepcopy(model), PLAN, Axis.solo())
    native = parallelize(copy.deepcopy(model), Plan(PLAN, Scheme(numerics="native")), Axis.solo())
    assert [type(layer.act) for layer in invariant.layers] == [twin] * 2
    assert [type(layer.act) for layer in native.layers] == [type(act())] * 2
    assert not invariant.layers[0].act.training
    assert_close(invariant(normal(3, 6)), wanted, rtol=1e-5, atol=1e-5)


def test_options_of_an_activation_are_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Softplus(beta=2.0, threshold=5.0), nn.GELU("tanh"))
    model = parallelize(model, {"0": "colwise"}, Axis.solo())
    assert (model[1].beta, model[1].threshold, model[2].approximate) == (2.0, 5.0, "tanh")


def trained(
    axis: Axis, act: Callable[[], nn.Module] = nn.SiLU, seed: int | None = 0
) -> dict[str, Tensor]:
    """Output, and every gradient and weight after a step, put together from all ranks.

    `seed` is that of a schedule of 1 and 2 threads; None leaves the thread count alone.
    """
    model = parallelize(Model(act=act), PLAN, axis)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = normal(7, 6, seed=90).requires_grad_()
    with nullcontext() if seed is None else random_threads(100 * seed + axis.rank):
        y = model(x)
        y.backward(normal(7, 5, seed=91))
        optimizer.step()
    found = {"y": y.detach(), "x.grad": x.grad}
    for name, parameter, layout, owner in layouts_of(model):
        for key, value in ((name, parameter.detach()), (f"{name}.grad", parameter.grad)):
            found[key] = value
            if owner is not None and layout.cut is not None and layout.dim is not None:
                found[key] = comm.all_gather(
                    value, axis, dim=layout.dim, cut=layout.cut, direction="prover"
                )
    return found


def differing(pool: Pool, act: Callable[[], nn.Module], schedules: int) -> set[str]:
    alone = trained(Axis.solo(), act)
    return {
        name
        for degree in (1, 3, 8)
        for seed in range(schedules)
        for found in pool(degree, "threads").run(lambda axis, s=seed: trained(axis, act, s))
        for name in found
        if not bits_equal(found[name], alone[name])
    }


@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU, nn.Sigmoid])
def test_a_model_keeps_every_bit_at_every_degree(pool: Pool, act: Callable[[], nn.Module]) -> None:
    assert differing(pool, act, schedules=1) == set()


def test_a_function_of_torch_in_a_forward_breaks_the_bits(pool: Pool) -> None:
    """The negative control: `parallelize` cannot see it, the prover names it."""
    found = differing(pool, PlainSilu, schedules=1)
    if not found:
        pytest.skip(f"torch {torch.__version__} computes a shard's silu like the whole one here")
    assert any(name.startswith("layers.0") for name in found)


def test_a_model_agrees_with_itself_uncut() -> None:
    plain, found = Model(), trained(Axis.solo())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    y = plain(normal(7, 6, seed=90))
    y.backward(normal(7, 5, seed=91))
    optimizer.step()
    assert_close(found["y"], y.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in plain.named_parameters():
        assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-5)


def on_meta(axis: Axis) -> dict[str, Tensor]:
    """Cut on meta, given memory, drawn: nothing whole is ever there."""
    with torch.device("meta"):
        model = Model()
    model = parallelize(model, PLAN, axis)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    found = {}
    for name, parameter, layout, owner in layouts_of(model):
        if owner is None or layout.cut is None or layout.dim is None:
            continue
        model.get_submodule(name.rpartition(".")[0]).reset_parameters()
        found[name] = comm.all_gather(
            parameter.detach(), axis, dim=layout.dim, cut=layout.cut, direction="prover"
        )
    return found


def test_a_model_on_meta_is_cut_there_and_drawn_alike_at_every_degree(pool: Pool) -> None:
    alone = on_meta(Axis.solo())
    assert len(alone) == 8
    assert not torch.equal(alone["layers.0.up_proj.weight"], alone["layers.1.up_proj.weight"])
    for degree in (3, 8):
        for found in pool(degree, "threads").run(on_meta):
            assert all(bits_equal(found[name], alone[name]) for name in alone)


def test_a_cut_model_can_be_copied_with_its_hook() -> None:
    model = parallelize(Model(), PLAN, Axis.solo())
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(normal(3, 6)), model(normal(3, 6)))


THERE = """
from invariance import bits_equal
from shardproof.numerics import mode
from shardproof.ranks import launch
from test_parallelize import trained

def fixed(axis):
    return trained(axis, seed=None)

alone = launch(fixed, degree=1, threads=1)[0]
print(mode.set_blas_mode().branch)
print(len(alone))
for degree in (3, 8):
    for found in launch(fixed, degree=degree, threads=1):
        print("\\n".join(name for name in found if not bits_equal(found[name], alone[name])))
"""


def test_a_model_keeps_every_bit_in_leafwise_mode_too() -> None:
    """One fixed thread count: without a strict mode it is part of the contract."""
    branch, count, *differs = run_fresh(THERE, SHARDPROOF_BLAS="leafwise").split()
    assert branch == "leafwise"
    assert int(count) == 2 + 2 * len(list(Model().parameters()))
    assert differs == []


def test_ranks_that_would_compute_with_different_products_raise(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node without a compiler lacks the kernels: mixed arithmetic, and no error elsewhere."""
    contract, met = mode.contract, threading.Barrier(2)

    def of_this_rank(*given: Any) -> str:
        is_odd = met.wait() == 1
        return contract(*given).replace("tree", "other" if is_odd else "tree")

    monkeypatch.setattr(mode, "contract", of_this_rank)

    model = nn.Sequential(nn.Linear(4, 8))

    def run(axis: Axis) -> str:
        with pytest.raises(MismatchError) as caught:
            parallelize(copy.deepcopy(model), {"0": ColumnParallel()}, axis)
        return str(caught.value)

    for message in pool(2, "threads").run(run):
        assert "were given different arithmetic: for contract, rank 0 has " in message
        assert "without a C compiler lacks the kernels" in message
