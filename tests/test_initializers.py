"""Filling the parameters of a cut model: by leaf, before the cut, or not at all."""

import copy
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.utils import prune, skip_init

from fresh_process import run_fresh
from invariance import bits_equal, normal
from places import Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import UsageError
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.layers.refused_functions import CONSTANTS, DRAWS
from shardproof.layers.registry import name_by_memory
from shardproof.optim import layouts_of
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.plans.style import ColumnParallel, RowParallel, VocabParallel

# Arguments that a function needs beside the tensor.
NEEDS: dict[str, tuple[Any, ...]] = {"sparse_": (0.5,), "constant_": (0.25,)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 11)
        self.inner = nn.Linear(11, 11)
        self.up = nn.Linear(11, 43)
        self.down = nn.Linear(43, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.inner(self.embed(ids)))))


PLAN = {"embed": VocabParallel(), "up": ColumnParallel(), "down": RowParallel()}


MODEL = Net()  # once: ranks as threads share one generator


def cut(axis: Axis) -> nn.Module:
    return parallelize(copy.deepcopy(MODEL), PLAN, axis)


def whole(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter, layout, axis in layouts_of(model):
        value = parameter.detach().clone()
        if axis is not None and layout.cut is not None and layout.dim is not None:
            value = comm.all_gather(value, axis, dim=layout.dim, cut=layout.cut, direction="prover")
        found[name] = value
    return found


def test_every_function_of_torch_is_refused_or_a_constant() -> None:
    deprecated = {name for name in init.__all__ if f"{name}_" in init.__all__}
    assert {*init.__all__} - deprecated - {"calculate_gain"} == {*DRAWS, *CONSTANTS}


def test_a_draw_into_a_shard_is_refused_on_every_rank(pool: Pool) -> None:
    names = [name for name in DRAWS if name != "dirac_"]

    def run(axis: Axis) -> list[str]:
        model = cut(axis)
        before, messages = whole(model), []
        for name in names:
            draw, given = getattr(init, name), NEEDS.get(name, ())
            with pytest.raises(UsageError) as up:
                draw(model.up.weight, *given)
            with pytest.raises(UsageError) as down:
                draw(tensor=model.down.weight, **options(name))
            with pytest.raises(UsageError) as embed:
                draw(model.embed.weight.data, *given)
            messages += [str(caught.value) for caught in (up, down, embed)]
        assert all(bits_equal(value, before[key]) for key, value in whole(model).items())
        return messages

    wanted = [
        f"torch.nn.init.{name} would fill this rank's shard of '{parameter}.weight'"
        for name in names
        for parameter in ("up", "down", "embed")
    ]
    for degree in (1, 2, 8):  # behaviour does not depend on the degree; eight ranks leave some idle
        for messages in pool(degree, "threads").run(run):
            for message, begins in zip(messages, wanted, strict=True):
                assert begins in message
                assert "shardproof.initialize(model)" in message


def options(name: str) -> dict[str, Any]:
    return {"sparsity": 0.5} if name == "sparse_" else {}


def test_dirac_of_a_shard_is_refused_and_old_names_too() -> None:
    layer = ColumnParallelLinear(3, 5, axis=Axis.solo(), name="up")
    with pytest.raises(UsageError, match="dirac_ would fill"):
        init.dirac_(layer.weight.data[..., None])
    with (
        pytest.warns(FutureWarning, match="deprecated"),
        pytest.raises(UsageError, match="xavier_normal_ would fill"),
    ):
        init.xavier_normal(layer.weight)
    with pytest.raises(UsageError, match=r"shard of 'up\.bias'"):
        init.normal_(layer.bias)
    with pytest.raises(UsageError, match=r"of shape \(2, 3\)"):
        init.normal_(layer.weight[:2])


def test_constants_are_right_in_every_part(pool: Pool) -> None:
    def run(axis: Axis) -> dict[str, Tensor]:
        model = cut(axis)
        for name, value in (("ones_", model.up.bias), ("zeros_", model.down.weight)):
            getattr(init, name)(value)
        init.constant_(model.up.weight, 0.25)
        return whole(model)

    (alone,) = pool(1, "threads").run(run)
    assert alone["up.weight"].unique().tolist() == [0.25]
    for degree in (2, 3, 8):
        for found in pool(degree, "threads").run(run):
            assert all(bits_equal(found[name], alone[name]) for name in alone)


def test_whole_parameters_of_a_cut_model_may_be_drawn(pool: Pool) -> None:
    def run(axis: Axis) -> dict[str, Tensor]:
        model, generator = cut(axis), torch.Generator().manual_seed(3)
        init.xavier_uniform_(model.inner.weight, generator=generator)
        init.normal_(model.down.bias, generator=generator)
        return whole(model)

    (alone,) = pool(1, "threads").run(run)
    for found in pool(3, "threads").run(run):
        assert all(bits_equal(found[name], alone[name]) for name in alone)


def test_reset_parameters_draws_the_same_at_every_degree(pool: Pool) -> None:
    def run(axis: Axis) -> dict[str, Tensor]:
        model = cut(axis)
        for module in (model.up, model.down):
            module.reset_parameters()
        return whole(model)

    (alone,) = pool(1, "threads").run(run)
    assert not torch.equal(alone["up.weight"][:11], alone["up.weight"][11:22]), "twin shards"
    bound = 1 / 43**0.5  # of the whole: torch's own for 43 inputs
    assert 0.9 * bound < alone["down.weight"].abs().max() <= bound
    for degree in (2, 3, 8):
        for found in pool(degree, "threads").run(run):
            assert all(bits_equal(found[name], alone[name]) for name in alone)


def test_skip_init_of_a_cut_layer_and_reset_parameters(pool: Pool) -> None:
    def run(axis: Axis) -> Tensor:
        layer = skip_init(RowParallelLinear, 43, 11, axis=axis, name="down")
        layer.reset_parameters()
        return whole(layer)["weight"]

    (alone,) = pool(1, "threads").run(run)
    assert alone.isfinite().all()
    for found in pool(3, "threads").run(run):
        assert bits_equal(found, alone)


def test_initialize_draws_by_leaf(pool: Pool) -> None:
    def run(axis: Axis) -> dict[str, Tensor]:
        with torch.device("meta"):
            model = Net()
        return whole(initialize(parallelize(model, PLAN, axis)))

    (alone,) = pool(1, "threads").run(run)
    for degree in (2, 3, 8):
        for found in pool(degree, "threads").run(run):
            assert all(bits_equal(found[name], alone[name]) for name in alone)


EARLIER = """
from torch.nn.init import (
    eye_, kaiming_normal_, kaiming_uniform_, normal_, orthogonal_, sparse_, trunc_normal_,
    uniform_, xavier_normal_, xavier_uniform_, zeros_,
)
from torch.nn.utils import parameters_to_vector, vector_to_parameters
import inspect, json, torch
from torch import nn

FUNCTIONS = (eye_, kaiming_normal_, kaiming_uniform_, normal_, orthogonal_, trunc_normal_,
             uniform_, xavier_normal_, xavier_uniform_)

def drawn():
    found = []
    for f in FUNCTIONS:
        torch.manual_seed(0)
        found.append(f(torch.empty(3, 4)).tolist())
    plain = nn.Linear(3, 2)
    return found, parameters_to_vector(plain.parameters()).numel(), [
        str(inspect.signature(f)) for f in FUNCTIONS]

before = drawn()
import shardproof as sp
layer = sp.RowParallelLinear(3, 2, axis=sp.Axis.solo(), name="down")
refused = []
for f in FUNCTIONS:
    try:
        f(layer.weight)
    except sp.errors.UsageError as error:
        refused.append(str(error))
for act in (lambda: sparse_(layer.weight, 0.5), lambda: parameters_to_vector(layer.parameters()),
            lambda: vector_to_parameters(torch.ones(8), layer.parameters())):
    try:
        act()
    except sp.errors.UsageError as error:
        refused.append(str(error))
zeros_(layer.weight)
print(json.dumps([before == drawn(), refused, layer.weight.abs().sum().item()]))
"""


def test_names_imported_before_shardproof_are_guarded_and_plain_tensors_as_before() -> None:
    is_same, refused, total = json.loads(run_fresh(EARLIER))
    assert is_same
    assert len(refused) == 12
    assert all("shard of 'down.weight'" in message for message in refused)
    assert total == 0.0


def test_a_guarded_function_says_what_it_is() -> None:
    ColumnParallelLinear(3, 5, axis=Axis.solo())  # installs
    assert list(inspect.signature(init.normal_).parameters) == [
        "tensor",
        "mean",
        "std",
        "generator",
    ]
    assert init.normal_.__name__ == "normal_"
    assert "normal distribution" in str(init.normal_.__doc__)
    with pytest.raises(TypeError, match="argument"):
        init.normal_()  # type: ignore[call-arg]


def views(x: Tensor) -> Iterator[Tensor]:
    yield from (
        x,
        x.data,
        x.t(),
        x[:1],
        x[:, 1:],
        x.detach(),
        x.view(-1),
        x[None].expand(2, -1, -1),
    )


def test_a_view_of_a_shard_is_known_and_a_copy_is_not() -> None:
    layer = ColumnParallelLinear(3, 5, axis=Axis.solo(), name="up")
    for view in views(layer.weight):
        assert name_by_memory(view) == "up.weight"
    assert name_by_memory(layer.weight.clone()) is None
    assert name_by_memory(normal(3, 5)) is None
    assert name_by_memory(None) is None


NORMS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
    "spectral_norm": lambda layer: torch.nn.utils.parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: torch.nn.utils.parametrizations.orthogonal(layer, "weight"),
    "spectral_norm, the old one": lambda layer: torch.nn.utils.spectral_norm(layer),
    "l1": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "random": lambda layer: prune.random_unstructured(layer, name="weight", amount=0.5),
    "structured": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    "global": lambda layer: prune.global_unstructured(
        [(layer, "weight")], pruning_method=prune.L1Unstructured, amount=0.5
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_a_whole_weight_and_pruning_are_refused(pool: Pool, name: str) -> None:
    def run(axis: Axis) -> str:
        model = cut(axis)
        NORMS[name](model.inner)  # what is not cut may be
        with pytest.raises(UsageError) as caught:
            NORMS[name](model.down)
        assert "weight" in model.down._parameters
        return str(caught.value)

    for message in pool(2, "threads").run(run):
        known = "on 'weight' of 'down' (RowParallelLinear), of which this rank holds a part"
        assert known in message or (name == "global" and "shard of 'down.weight'" in message)


def test_the_old_weight_norm_is_refused() -> None:
    layer = ColumnParallelLinear(3, 5, axis=Axis.solo(), name="up")
    with pytest.raises(UsageError, match="weight_norm on 'weight' of 'up'"):
        torch.nn.utils.weight_norm(layer)


def fill_linears(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        init.trunc_normal_(module.weight, std=0.02)


def fill_data(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        module.weight.data.normal_(0.0, 0.02)


def fill_by_reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        module.reset_parameters()


def fill_with(std: float, module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, std=std)


class Initializer:
    def __init__(self, std: float) -> None:
        self.std = std

    def __call__(self, module: nn.Module) -> None:
        self._fill(module, self.std)
        if type(module) is nn.Linear:
            module.weight.data.uniform_(-self.std, self.std)

    def _fill(self, module: nn.Module, std: float) -> None:
        """Nothing."""

    def method(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            module.weight.data.copy_(torch.ones_like(module.weight))


FILLS: dict[str, tuple[Callable[[nn.Module], None], str, str]] = {
    "nn.init": (fill_linears, "Linear", "up"),
    "data": (fill_data, "Embedding", "embed"),
    "reset_parameters": (fill_by_reset, "Embedding", "embed"),
    "an object": (Initializer(0.1), "Linear", "up"),
    "a method": (Initializer(0.1).method, "Embedding", "embed"),
    "a partial": (functools.partial(fill_with, 0.02), "Linear", "up"),
    "a lambda": (
        lambda m: init.ones_(m.weight) if isinstance(m, nn.Linear) else None, "Linear", "up"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILLS)
def test_a_function_that_passes_over_cut_layers_is_refused(pool: Pool, name: str) -> None:
    function, kind, layer = FILLS[name]

    def run(axis: Axis) -> str:
        model = cut(axis)
        with pytest.raises(UsageError) as caught:
            model.apply(function)
        return str(caught.value)

    for degree in (1, 2, 8):  # ranks that hold nothing say the same
        for message in pool(degree, "threads").run(run):
            assert f"fills nn.{kind} and passes over {layer!r}" in message
            assert "Apply it before the model is cut" in message


def fill_all(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def set_biases(module: nn.Module) -> None:
    if getattr(module, "bias", None) is not None:
        init.constant_(module.bias, 0.5)


def test_a_function_that_fills_cut_layers_too_is_right(pool: Pool) -> None:
    def run(axis: Axis) -> dict[str, Tensor]:
        model = cut(axis)
        for module in (model.up, model.down, model.embed):
            module.apply(fill_all)
        model.apply(set_biases)
        return whole(model)

    (alone,) = pool(1, "threads").run(run)
    assert alone["up.bias"].unique().tolist() == [0.5]
    for degree in (2, 3, 8):
        for found in pool(degree, "threads").run(run):
            assert all(bits_equal(found[name], alone[name]) for name in alone)


def test_other_functions_are_applied_once_and_leave_the_generator_alone(pool: Pool) -> None:
    model, seen = cut(Axis.solo()), []
    model.apply(lambda module: seen.append(type(module).__name__))
    assert seen == [
        "VocabParallelEmbedding", "Linear", "ColumnParallelLinear", "RowParallelLinear", "Net",
    ]  # fmt: skip
    model.apply(lambda module: module.requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    state = torch.get_rng_state()
    model.up.apply(lambda m: m.weight.data.normal_() if isinstance(m, nn.Conv2d) else None)
    assert torch.equal(state, torch.get_rng_state())


def test_a_duck_typed_draw_is_refused_by_the_name_of_the_layer() -> None:
    def fill(module: nn.Module) -> None:
        if hasattr(module, "weight"):
            init.normal_(module.weight)

    with pytest.raises(UsageError, match=r"normal_ would fill .* shard of 'embed\.weight'"):
        cut(Axis.solo()).apply(fill)
