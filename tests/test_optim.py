"""Norm, clipping and updates of a cut model: torch's numbers, each element once, the same bits."""

import io
import json
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad, parametrize
from torch.testing import assert_close

from fresh_process import run_fresh
from invariance import Tally, bits_equal, normal, random_cut, random_threads
from places import Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import LayoutError, UsageError
from shardproof.layers import guard
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.optim import (
    clip_grad_norm_,
    grad_norm,
    layouts_of,
    load_optimizer_state_dict,
    optimizer_state_dict,
)
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, RowParallel

Tensors = dict[str, Tensor]
Make = Callable[[object], torch.optim.Optimizer]


class Model(nn.Module):
    """Cut weights, a cut bias, a replicated bias, plain weights; widths that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(11, 11)
        self.up = nn.Linear(11, 43)
        self.act = nn.SiLU()
        self.down = nn.Linear(43, 11)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=seed) / 4

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.inner(x))))


PLAN = {"up": ColumnParallel(), "down": RowParallel()}


def backward(model: nn.Module, seed: int = 0) -> nn.Module:
    model(normal(2, 9, 11, seed=50 + seed)).backward(normal(2, 9, 11, seed=70 + seed))
    return model


def with_gradients(axis: Axis) -> nn.Module:
    return backward(parallelize(Model(), PLAN, axis))


def whole_of(model: nn.Module, values: Callable[[nn.Parameter], Tensor]) -> Tensors:
    """Something of every parameter, put together from all ranks."""
    found = {}
    for name, parameter, layout, axis in layouts_of(model):
        found[name] = values(parameter).detach().clone()
        if axis is not None and layout.cut is not None and layout.dim is not None:
            found[name] = comm.all_gather(
                found[name], axis, dim=layout.dim, cut=layout.cut, direction="prover"
            )
    return found


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def clipped(axis: Axis, max_norm: float) -> tuple[Tensor, Tensor, Tensors]:
    model = with_gradients(axis)
    with random_threads(axis.rank):
        before = grad_norm(model)
        returned = clip_grad_norm_(model, max_norm)
    return before, returned, whole_of(model, gradient)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_norm_and_clipping_are_those_of_torch_and_keep_their_bits(
    pool: Pool, max_norm: float
) -> None:
    plain = backward(Model())
    wanted = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
    alone = clipped(Axis.solo(), max_norm)
    assert_close(alone[0], wanted, rtol=1e-6, atol=0)
    for name, parameter in plain.named_parameters():
        assert_close(alone[2][name], gradient(parameter), rtol=1e-5, atol=1e-6)
    for degree, engine in ((3, "threads"), (8, "threads"), (2, "processes")):
        for before, returned, grads in pool(degree, engine).run(
            lambda axis: clipped(axis, max_norm)
        ):
            assert bits_equal(before, alone[0])
            assert bits_equal(returned, alone[0])
            assert all(bits_equal(grads[name], alone[2][name]) for name in grads)


def per_rank_norms(axis: Axis) -> tuple[Tensor, Tensor]:
    """Wrong answers: of this rank's gradients alone, and of all with replicated ones per rank."""
    model = with_gradients(axis)
    own = torch.stack([gradient(p).square().sum() for p in model.parameters()]).sum()
    return own.sqrt(), comm.all_reduce(own, axis, direction="prover").sqrt()


def test_replicated_parameters_count_once(pool: Pool) -> None:
    """The negative controls: both wrong norms are far outside the tolerance above."""
    right = clipped(Axis.solo(), 1.0)[0]
    for rank, (own, summed) in enumerate(pool(3, "threads").run(per_rank_norms)):
        assert abs(own / right - 1) > 1e-2, rank
        assert abs(summed / right - 1) > 1e-2


def test_a_model_without_gradients_has_norm_zero() -> None:
    model = parallelize(Model(), PLAN, Axis.solo())
    assert grad_norm(model).item() == 0.0
    assert clip_grad_norm_(model, 1.0).item() == 0.0
    gradients = [p.grad for p in model.parameters()]
    assert gradients == [None] * 6


def test_frozen_parameters_count_nothing(pool: Pool) -> None:
    def run(axis: Axis) -> tuple[Tensor, int]:
        model = parallelize(Model(), PLAN, axis)
        for name in ("up", "inner"):
            model.get_submodule(name).requires_grad_(False)
        norm = grad_norm(backward(model))
        return norm, axis.transport.ledger.calls("update", "all_reduce")

    plain = Model()
    for layer in (plain.up, plain.inner):
        layer.requires_grad_(False)
    backward(plain)
    wanted = torch.nn.utils.get_total_norm([gradient(p) for p in plain.down.parameters()])
    for norm, calls in pool(3, "threads").run(run):
        assert_close(norm, wanted, rtol=1e-6, atol=0)
        assert calls == 1, "the weight of `down`; its bias is replicated"


class Tied(nn.Module):
    """One cut layer under two names, and a name for its weight that comes before both."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        layer = ColumnParallelLinear(5, 16, axis=axis, name="up", bias=False)
        self.alias = layer.weight
        self.first = layer
        self.second = layer
        self.plain = nn.Linear(2, 2)
        self.again = self.plain
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)


def test_tied_parameters_count_once_and_as_what_they_are(pool: Pool) -> None:
    for degree in (1, 3):
        for norm in pool(degree, "threads").run(lambda axis: grad_norm(Tied(axis))):
            assert norm.item() == pytest.approx((5 * 16 + 6) ** 0.5, rel=1e-6)


class Doubled(nn.Module):
    """A parametrization: the weight is computed from another parameter."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_parametrized_cut_weight_is_refused_by_both_norms(pool: Pool) -> None:
    """Nothing says how the parameter is cut from which the weight is computed."""

    def run(axis: Axis) -> list[str]:
        model = parallelize(Model(), PLAN, axis)
        parametrize.register_parametrization(model.up, "weight", Doubled())
        backward(model)
        messages = []
        for act in (
            lambda: grad_norm(model),
            lambda: clip_grad_norm_(model, 1.0),
            lambda: torch.nn.utils.clip_grad_norm_(model.up.parametrizations.parameters(), 1.0),
        ):
            with pytest.raises(UsageError) as caught:
                act()
            messages.append(str(caught.value))
        torch.nn.utils.clip_grad_norm_(model.inner.parameters(), 1.0)
        return messages

    for ours, clips, torchs in pool(2, "threads").run(run):
        assert ours == clips
        assert ours.startswith("'up' (ParametrizedColumnParallelLinear) holds a part of 'weight'")
        assert "Remove the parametrization" in ours
        assert "rank's shard of 'up.parametrizations.weight.original' alone" in torchs


def test_a_parameter_that_was_added_to_a_cut_layer_is_replicated(pool: Pool) -> None:
    def run(axis: Axis) -> Tensor:
        layer = ColumnParallelLinear(5, 16, axis=axis, name="up", bias=False)
        layer.scale = nn.Parameter(torch.ones(4))
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        return grad_norm(layer)

    for degree in (1, 3):
        for norm in pool(degree, "threads").run(run):
            assert norm.item() == pytest.approx((5 * 16 + 4) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0, -1.5, float("nan")])
def test_a_norm_that_nothing_can_have_is_refused(max_norm: float) -> None:
    with pytest.raises(UsageError, match=rf"max_norm={max_norm} is not positive"):
        clip_grad_norm_(nn.Linear(2, 2), max_norm)


def test_parameters_instead_of_the_model_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the model of grad_norm .* is \[Param.*\. Modules know"):
        grad_norm(list(nn.Linear(2, 2).parameters()))  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match=r"is <generator.*: write clip_grad_norm_\(model, max_norm\)"
    ):
        clip_grad_norm_(nn.Linear(2, 2).parameters(), 1.0)  # type: ignore[arg-type]


def test_bf16_is_clipped_by_an_unrounded_factor() -> None:
    layer = RowParallelLinear(64, 64, axis=Axis.solo(), bias=False, dtype=torch.bfloat16)
    before = normal(64, 64).bfloat16()
    layer.weight.grad = before.clone()
    norm = clip_grad_norm_(layer, 1.0)
    assert norm.dtype == torch.float32
    factor = 1 / (norm + 1e-6)
    assert bits_equal(layer.weight.grad, (before.float() * factor).bfloat16())
    assert not bits_equal(layer.weight.grad, before * factor.bfloat16())


def torch_on_shards(axis: Axis) -> list[str]:
    """What torch's own functions say of a cut model's gradients."""
    model = with_gradients(axis)
    grads = [gradient(p) for p in model.parameters()]
    messages = []
    for act in (
        lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        lambda: torch.nn.utils.clip_grad_norm_(model.up.weight, 1.0),
        lambda: torch.nn.utils.get_total_norm(grads),
        lambda: torch.nn.utils.get_total_norm(model.parameters()),
    ):
        before = whole_of(model, gradient)
        with pytest.raises(UsageError) as caught:
            act()
        messages.append(str(caught.value))
        after = whole_of(model, gradient)
        assert all(torch.equal(after[name], before[name]) for name in before)
    plain = torch.nn.utils.get_total_norm([gradient(p) for p in model.inner.parameters()])
    assert plain > 0, "what is not cut may be asked for"
    return messages


def test_torch_refuses_shards_instead_of_clipping_each_rank_differently(pool: Pool) -> None:
    for degree, engine in ((2, "threads"), (2, "processes")):
        for messages in pool(degree, engine).run(torch_on_shards):
            for message in messages:
                assert "the norm of this rank's shard of 'up.weight' alone" in message
                assert "Use shardproof.clip_grad_norm_(model, max_norm)" in message


class Interrupted(ColumnParallelLinear):
    """Another thread asks for a norm just before each parameter is there."""

    def register_parameter(self, name: str, parameter: nn.Parameter | None) -> None:
        torch.nn.utils.get_total_norm([torch.ones(2)])
        super().register_parameter(name, parameter)


def test_the_guard_may_look_at_a_layer_that_is_being_built() -> None:
    layer = Interrupted(3, 2, axis=Axis.solo(), name="up")
    with pytest.raises(UsageError, match=r"rank's shard of 'up\.bias' alone"):
        torch.nn.utils.get_total_norm([layer.bias])


BY_NAME = """
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
import json, torch
from torch import nn
plain = nn.Linear(3, 2)
grads = [torch.full_like(p, 0.3) for p in plain.parameters()]

def clip():
    for p, g in zip(plain.parameters(), grads):
        p.grad = g.clone()
    norm = clip_grad_norm_((p for p in plain.parameters()), 0.5, norm_type=1.0)
    return [norm.item(), get_total_norm(grads).item(), plain.weight.grad.tolist()]

before = clip()
import shardproof as sp
layer = sp.RowParallelLinear(3, 2, axis=sp.Axis.solo(), name="down")
for p in layer.parameters():
    p.grad = torch.ones_like(p)
errors = []
for act in (lambda: clip_grad_norm_(layer.parameters(), 1.0),
            lambda: get_total_norm([p.grad for p in layer.parameters()])):
    try:
        act()
    except sp.errors.UsageError as error:
        errors.append(str(error))
clip_grads_with_norm_(layer.parameters(), 1.0, torch.tensor(2.0))
print(json.dumps([before == clip(), errors, layer.bias.grad.tolist()]))
"""


def test_names_imported_before_shardproof_are_guarded_and_plain_models_untouched() -> None:
    is_same, errors, bias = json.loads(run_fresh(BY_NAME))
    assert is_same
    assert len(errors) == 2
    assert all("rank's shard of 'down.weight' alone" in error for error in errors)
    assert bias == pytest.approx([0.5, 0.5]), "clipping by a norm that the caller has is fine"


def test_the_guard_also_fits_a_torch_that_decorates_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def norm(tensors: list[Tensor], *_: object) -> Tensor:
        return torch.tensor(float(len(tensors)))

    monkeypatch.setattr(clip_grad, "_get_total_norm", norm)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)
    layer = RowParallelLinear(3, 2, axis=Axis.solo(), name="down")  # watches, and so installs
    layer.weight.grad = torch.ones(2, 3)
    guard.watch(layer)
    for act in (
        lambda: torch.nn.utils.clip_grad_norm_([layer.weight], 1.0),
        lambda: torch.nn.utils.get_total_norm([layer.weight.grad]),
    ):
        with pytest.raises(UsageError, match=r"shard of 'down\.weight' alone"):
            act()
    assert torch.nn.utils.get_total_norm([torch.ones(2)]).item() == 1.0


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
}


def trained(axis: Axis, make: Make, steps: int = 3) -> list[Tensors]:
    """Weights and every optimizer state after a few clipped steps."""
    model = parallelize(Model(), PLAN, axis)
    optimizer = make(model.parameters())
    with random_threads(17 * axis.rank + axis.size):
        for step in range(steps):
            optimizer.zero_grad()
            backward(model, seed=step)
            clip_grad_norm_(model, 2.0)
            optimizer.step()
    keys = sorted(key for key in optimizer.state[model.up.weight] if key != "step")
    assert keys
    found = [whole_of(model, lambda p: p)]
    return found + [whole_of(model, lambda p, k=key: optimizer.state[p][k]) for key in keys]


def test_updates_and_optimizer_states_keep_their_bits(pool: Pool) -> None:
    for name, make in OPTIMIZERS.items():
        alone = trained(Axis.solo(), make)
        initial = dict(Model().named_parameters())
        assert not any(torch.equal(alone[0][key], initial[key]) for key in initial)
        for degree in (3, 8):
            for found in pool(degree, "threads").run(lambda axis, m=make: trained(axis, m)):
                for a, b in zip(found, alone, strict=True):
                    differs = [key for key in a if not bits_equal(a[key], b[key])]
                    assert differs == [], f"{name} at degree {degree}"


def test_a_step_agrees_with_plain_torch() -> None:
    for name, make in OPTIMIZERS.items():
        plain = Model()
        optimizer = make(plain.parameters())
        torch.nn.utils.clip_grad_norm_(backward(plain).parameters(), 2.0)
        optimizer.step()
        for key, value in trained(Axis.solo(), make, steps=1)[0].items():
            wanted = plain.get_parameter(key).detach()
            assert_close(
                value, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )


def test_torch_does_not_update_bf16_alike_in_a_shard_and_in_the_whole() -> None:
    """The negative control, and why updated bf16 weights are promised nothing: keep fp32."""
    tally = Tally()
    w, g = (normal(50, 203, seed=seed).bfloat16() for seed in (0, 1))
    for dtype in (torch.float32, torch.bfloat16):
        whole = w.to(dtype).add(g.to(dtype), alpha=-0.3)
        is_alike = all(
            bits_equal(w[:, at].to(dtype).add(g[:, at].to(dtype), alpha=-0.3), whole[:, at])
            for at in random_cut(203, random.Random(0))
        )
        if dtype == torch.float32:
            assert is_alike
        else:
            tally.add(is_alike)
    tally.expect_breaks("add with alpha in bf16")


def stepped(axis: Axis, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an AdamW that has made a step; two groups, against the model's order."""
    model = parallelize(Model(), PLAN, axis)
    groups = [{"params": model.down.parameters()}, {"params": model.up.parameters(), "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    backward(model, seed)
    optimizer.step()
    return model, optimizer


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        value.clone()
        for group in optimizer.param_groups
        for parameter in group["params"]
        for value in optimizer.state[parameter].values()
    ]


def saved_by(pool: Pool, degree: int) -> list[dict[str, object]]:
    """Every rank's optimizer state, through a file."""
    states = []
    for state in pool(degree, "threads").run(lambda axis: optimizer_state_dict(*stepped(axis))):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        states.append(torch.load(file, weights_only=True))
    return states


def test_optimizer_state_goes_back_to_its_own_rank(pool: Pool) -> None:
    states = saved_by(pool, 2)
    assert states[1]["layouts"][0] == {
        "name": "down.weight", "shape": [11, 43], "dim": 1, "leaves": 8, "degree": 2, "rank": 1,
        "held": [4, 8],
    }  # fmt: skip

    def run(axis: Axis) -> bool:
        wanted = moments(stepped(axis)[1])
        model, optimizer = stepped(axis, seed=5)
        assert not all(map(torch.equal, moments(optimizer), wanted))
        load_optimizer_state_dict(model, optimizer, states[axis.rank])
        return all(map(torch.equal, moments(optimizer), wanted))

    assert pool(2, "threads").run(run) == [True, True]


Spoil = Callable[[list[dict[str, object]], int], dict[str, object]]
FOREIGN: dict[str, tuple[Spoil, str]] = {
    "another rank's": (lambda states, rank: states[1 - rank], "'down.weight': it was saved for {"),
    "no layouts": (
        lambda states, rank: {k: v for k, v in states[rank].items() if k != "layouts"},
        "without 'layouts' for parameters that are cut",
    ),
    "fewer parameters": (
        lambda states, rank: {**states[rank], "layouts": []},
        "state of 0 parameters into an optimizer of 4",
    ),
    "no list": (lambda states, rank: {**states[rank], "layouts": 3}, "state with 3 into an"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_optimizer_state_of_other_parts_is_refused(pool: Pool, what: str) -> None:
    spoil, text = FOREIGN[what]
    states = saved_by(pool, 2)

    def run(axis: Axis) -> str:
        model, optimizer = stepped(axis, seed=5)
        before = moments(optimizer)
        with pytest.raises(LayoutError) as caught:
            load_optimizer_state_dict(model, optimizer, spoil(states, axis.rank))
        assert all(map(torch.equal, moments(optimizer), before))
        return str(caught.value)

    for message in pool(2, "threads").run(run):
        assert text in message


def test_optimizer_state_of_another_degree_is_refused_and_one_rank_takes_torchs(
    pool: Pool,
) -> None:
    model, optimizer = stepped(Axis.solo())
    with pytest.raises(LayoutError, match=r"'degree': 2.* here is .*'degree': 1"):
        load_optimizer_state_dict(model, optimizer, saved_by(pool, 2)[0])
    other, again = stepped(Axis.solo(), seed=5)
    load_optimizer_state_dict(other, again, optimizer.state_dict())
    assert all(map(torch.equal, moments(again), moments(optimizer)))


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    """As one that was made before the model was cut."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    parallelize(model, PLAN, Axis.solo())
    with pytest.raises(UsageError, match=r"parameter 2 of shape \(43, 11\) is not one of Model"):
        optimizer_state_dict(model, optimizer)
