"""State carries its layout: it goes back to where it came from, and nowhere else."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from invariance import contract_of_one_thread, normal
from places import EVERYWHERE, Pool
from shardproof.axis import Axis
from shardproof.errors import LayoutError
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, Plan, RowParallel
from shardproof.scheme import Scheme

State = dict[str, Any]


class Model(nn.Module):
    """A plain layer before the cut ones: loaded first, if loading is not checked before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        for number, layer in enumerate((self.up, self.down)):
            layer.weight.data = normal(*layer.weight.shape, seed=number)
            layer.bias.data = normal(*layer.bias.shape, seed=9 + number)


def cut_model(axis: Axis, seed: int = 0, leaves: int = 8) -> nn.Module:
    """16 units: at degree 2 both 4 and 8 leaves give shards of the same shapes."""
    scheme = Scheme(leaves=leaves, seed=seed)
    plan = Plan({"up": ColumnParallel(), "down": RowParallel()}, scheme)
    model = parallelize(Model(), plan, axis)
    for layer in (model.up, model.down):
        layer.reset_parameters()
    with torch.no_grad():
        model.norm.weight.fill_(1 + seed)
    return model


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def through_a_file(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def round_trip(axis: Axis) -> bool:
    old, new = cut_model(axis), cut_model(axis, seed=1)
    assert axis.size > 4 or not equal(values(old), values(new))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = new.load_state_dict(through_a_file(old.state_dict()))
    assert not found.missing_keys
    assert not found.unexpected_keys
    return equal(values(old), values(new))


@EVERYWHERE
def test_state_goes_through_a_file_and_back(pool: Pool, degree: int, engine: str) -> None:
    assert pool(degree, engine).run(round_trip) == [True] * degree


def extra(axis: Axis) -> list[State]:
    column = ColumnParallelLinear(5, 16, axis=axis)
    row = RowParallelLinear(3, 5, axis=axis, bias=False, scheme=Scheme(leaves=4))
    return [column.state_dict()["_extra_state"], row.state_dict()["_extra_state"]]


def test_extra_state_is_the_layout_and_the_contract(pool: Pool) -> None:
    ours = {"leaves": 8, "degree": 3, "rank": 1, "held": [3, 6]}
    column, row = pool(3, "threads").run(extra)[1]
    assert column == {
        "degree": 3,
        "rank": 1,
        "layouts": {
            "weight": {"shape": [16, 5], "dim": 0, **ours},
            "bias": {"shape": [16], "dim": 0, **ours},
        },
        "contract": contract_of_one_thread(),
    }
    assert row == {
        "degree": 3,
        "rank": 1,
        "layouts": {
            "weight": {"shape": [5, 3], "dim": 1, "leaves": 4, "degree": 3, "rank": 1,
                       "held": [1, 2]},
        },
        "contract": contract_of_one_thread(Scheme(leaves=4)),
    }  # fmt: skip


def refusal(axis: Axis, state: State, **options: Any) -> str:
    """The message for a state that does not belong here; nothing may have changed."""
    model = cut_model(axis, seed=3)
    before = values(model)
    with pytest.raises(LayoutError) as caught:
        model.load_state_dict(state, **options)
    assert equal(values(model), before), "not even the plain layers before"
    return str(caught.value)


def states(pool: Pool, degree: int, leaves: int = 8) -> list[State]:
    ranks = pool(degree, "threads").run(lambda axis: cut_model(axis, leaves=leaves).state_dict())
    return [through_a_file(state) for state in ranks]


def test_another_degree_is_refused(pool: Pool) -> None:
    state = states(pool, 2)[0]
    assert refusal(Axis.solo(), state).startswith(
        "cannot load the state of 'up' into rank 0 of 1 on axis 'tp': its degree is 2, here it "
        "is 1. Load the state that this rank saved at this degree, with the same leaves."
    )
    for rank, message in enumerate(pool(3, "threads").run(lambda axis: refusal(axis, state))):
        assert f"into rank {rank} of 3 on axis 'tp': its degree is 2, here it is 3." in message


def test_another_rank_is_refused_although_the_shapes_fit(pool: Pool) -> None:
    first, second = states(pool, 2)
    shapes = [
        {name: x.shape for name, x in s.items() if isinstance(x, Tensor)} for s in (first, second)
    ]
    assert shapes[0] == shapes[1]
    messages = pool(2, "threads").run(lambda axis: refusal(axis, [second, first][axis.rank]))
    assert "into rank 0 of 2 on axis 'tp': its rank is 1, here it is 0." in messages[0]
    assert "into rank 1 of 2 on axis 'tp': its rank is 0, here it is 1." in messages[1]


def test_other_leaves_are_refused_although_the_shapes_fit(pool: Pool) -> None:
    found = states(pool, 2, leaves=4)
    for message in pool(2, "threads").run(lambda axis: refusal(axis, found[axis.rank])):
        assert "its layouts is {'weight': {'shape': [16, 8], 'dim': 0, 'leaves': 4" in message
        assert "here it is {'weight': {'shape': [16, 8], 'dim': 0, 'leaves': 8" in message


@pytest.mark.parametrize("is_strict", [True, False])
def test_plain_state_of_the_whole_model_is_refused(pool: Pool, is_strict: bool) -> None:
    plain = Model().state_dict()
    for rank, message in enumerate(
        pool(2, "threads").run(lambda axis: refusal(axis, plain, strict=is_strict))
    ):
        assert message == (
            f"cannot load 'up.weight' of shape (16, 8) into 'up' on rank {rank} of 2 on axis "
            "'tp', which holds (8, 8) of (16, 8): the state has no layout. Load the state that "
            "this rank saved, with its '_extra_state'; or load plain state into the plain module "
            "and cut that with from_linear or parallelize."
        )


@pytest.mark.parametrize("is_strict", [True, False])
def test_state_that_lost_its_layout_is_refused_although_the_shapes_fit(
    pool: Pool, is_strict: bool
) -> None:
    """It may be another rank's: here it is."""
    bare = [{k: v for k, v in s.items() if isinstance(v, Tensor)} for s in states(pool, 2)]
    for message in pool(2, "threads").run(
        lambda axis: refusal(axis, bare[1 - axis.rank], strict=is_strict)
    ):
        assert "cannot load 'up.weight' of shape (8, 8) into 'up'" in message
        assert "the state has no layout" in message


def test_a_layer_alone_refuses_state_that_lost_its_layout(pool: Pool) -> None:
    def run(axis: Axis) -> bool:
        layer = RowParallelLinear(16, 4, axis=axis, name="down")
        before = values(layer)
        with pytest.raises(LayoutError, match="the state has no layout"):
            layer.load_state_dict({"weight": torch.ones(4, 8)}, strict=False)
        return equal(values(layer), before)

    assert pool(2, "threads").run(run) == [True, True]


def test_one_rank_takes_plain_state_and_strict_names_the_missing_key() -> None:
    model, plain = cut_model(Axis.solo(), seed=1), Model().state_dict()
    missing = ["up._extra_state", "down._extra_state"]
    assert model.load_state_dict(plain, strict=False).missing_keys == missing
    assert equal(values(model), plain)
    with pytest.raises(RuntimeError, match=r'Missing key.*"up._extra_state"'):
        model.load_state_dict(plain)


@pytest.mark.parametrize("foreign", [None, 3, {"degree": 1}])
def test_extra_state_that_is_no_layout_is_refused(foreign: Any) -> None:
    layer = ColumnParallelLinear(4, 3, axis=Axis.solo(), name="up")
    state = {**layer.state_dict(), "_extra_state": foreign}
    with pytest.raises(LayoutError, match=r"'_extra_state' into 'up' on rank 0 .* it is no layout"):
        layer.load_state_dict(state)


def test_a_layer_alone_is_left_as_it_was(pool: Pool) -> None:
    """Without a hook of `parallelize`: the layer itself checks before it copies."""

    def run(axis: Axis) -> bool:
        layer = RowParallelLinear(16, 4, axis=axis, name="down")
        state = layer.state_dict()
        state = {name: x + 1 if isinstance(x, Tensor) else x for name, x in state.items()}
        state["_extra_state"] = {**state["_extra_state"], "rank": 1 - axis.rank}
        before = values(layer)
        with pytest.raises(LayoutError, match="its rank is"):
            layer.load_state_dict(state)
        return equal(values(layer), before)

    assert pool(2, "threads").run(run) == [True, True]


def test_state_of_another_contract_warns_and_loads() -> None:
    layer = ColumnParallelLinear(4, 3, axis=Axis.solo(), name="up")
    state = {name: x + 1 if isinstance(x, Tensor) else x for name, x in layer.state_dict().items()}
    wanted = state["weight"].clone()
    contract = "tree-3 leaves=8 mkl=avx2-strict fp32 torch=1.0"
    state["_extra_state"] = {**state["_extra_state"], "contract": contract}
    with pytest.warns(
        UserWarning, match=r"'up' was saved under the contract 'tree-3 .* torch=1\.0'"
    ):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight, wanted)


def train(axis: Axis, make: Callable[..., torch.optim.Optimizer]) -> bool:
    """Whether a run that is stopped, saved and resumed goes on as one that is not."""
    x = torch.linspace(-1, 1, 24).view(3, 8)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model.down(torch.relu(model.up(model.norm(x)))).square().sum().backward()
        optimizer.step()

    straight = cut_model(axis)
    optimizer = make(straight.parameters())
    step(straight, optimizer)
    saved = through_a_file({"model": straight.state_dict(), "optimizer": optimizer.state_dict()})
    step(straight, optimizer)

    resumed = cut_model(axis, seed=5)
    resumed.load_state_dict(saved["model"])
    again = make(resumed.parameters())
    again.load_state_dict(saved["optimizer"])
    step(resumed, again)
    return equal(values(resumed), values(straight))


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_a_resumed_run_goes_on_with_the_same_bits(
    pool: Pool, make: Callable[..., torch.optim.Optimizer]
) -> None:
    assert pool(3, "threads").run(lambda axis: train(axis, make)) == [True] * 3
