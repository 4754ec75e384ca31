"""An optimizer that looks at a whole matrix, or at the wrong parameters, raises at its step."""

import copy
import io
import json
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import swa_utils

import shardproof as sp
import warm
from invariance import bits_equal
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import NumericsError, UsageError
from shardproof.layers import registry, step_guard
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.optim import declare_elementwise
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.plans.style import ColumnParallel
from shardproof.ranks import launch
from shardproof.scheme import Scheme
from whole_matrix import PLAN, Model, backward, cut_model, is_matrix, parameters_of, train

Optimizer = torch.optim.Optimizer


class Lars(torch.optim.SGD):
    """A trust ratio: the step is relative to the norm of the whole matrix."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(parameter.norm() / parameter.grad.norm())
        super().step(closure)


class Lamb(Optimizer):
    """The same on its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    ratio = parameter.norm() / parameter.grad.norm()
                    parameter.sub_(parameter.grad * ratio * group["lr"])


def of_matrices(kind: Callable[..., Optimizer]) -> Callable[[nn.Module], Optimizer]:
    return lambda model: kind(filter(is_matrix, model.parameters()))


# Name -> an optimizer, and what its refusal says to use.
WHOLE: dict[str, tuple[Callable[[nn.Module], Optimizer], str]] = {
    "Adafactor": (
        lambda m: torch.optim.Adafactor(m.parameters()),
        "Use shardproof.optim.Adafactor.",
    ),
    "Muon": (of_matrices(torch.optim.Muon), "Use shardproof.optim.Muon."),
    "LBFGS": (lambda m: torch.optim.LBFGS(m.parameters()), "such as torch.optim.AdamW"),
    "SparseAdam": (lambda m: torch.optim.SparseAdam(m.parameters()), "such as torch.optim.AdamW"),
    "Lars": (lambda m: Lars(m.parameters(), lr=0.1), "shardproof.declare_elementwise(Lars)."),
    "Lamb": (lambda m: Lamb(m.parameters()), "shardproof.declare_elementwise(Lamb)."),
}  # fmt: skip


def refusal(optimizer: Any, *args: Any, kind: type[Exception] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        optimizer.step(*args)
    return str(caught.value)


def refused(axis: Axis) -> dict[str, str]:
    """What every whole-matrix optimizer says; nothing changes and no closure is called."""
    model = cut_model(axis)
    backward(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    found = {}
    for name, (make, _) in WHOLE.items():
        args = (lambda: pytest.fail("the closure was called"),) if name == "LBFGS" else ()
        found[name] = refusal(make(model), *args)
        assert all(torch.equal(model.get_parameter(key), before[key]) for key in before)
    return found


@pytest.mark.parametrize("degree", [1, 3])
def test_an_optimizer_that_looks_at_a_whole_matrix_is_refused(pool: Pool, degree: int) -> None:
    for rank, found in enumerate(pool(degree, "threads").run(refused)):
        for name, message in found.items():
            assert message.startswith(f"{name} was asked to update 'up.weight', of whose dim 0")
            assert f"rank {rank} of {degree} on axis 'tp' holds" in message
            assert WHOLE[name][1] in message
        assert "(that SGD is says nothing of a class derived from it)" in found["Lars"]
        assert "declare_elementwise" not in found["LBFGS"] + found["Muon"]


def test_a_plain_model_is_updated_by_any_optimizer() -> None:
    cut_model(Axis.solo())
    plain = nn.Linear(3, 2)
    for make in (torch.optim.Adafactor, torch.optim.LBFGS, Lamb):
        plain.zero_grad()
        plain(torch.ones(1, 3)).sum().backward()
        before = plain.weight.clone()
        make(plain.parameters()).step(lambda: torch.zeros(()))
        assert not torch.equal(plain.weight, before) or make is torch.optim.LBFGS


def test_replicated_parameters_of_cut_layers_may_be_looked_at_whole(pool: Pool) -> None:
    def run(axis: Axis) -> Tensor:
        model = cut_model(axis)
        backward(model)
        Lamb([model.mid.bias, model.down.bias]).step()
        with pytest.raises(UsageError, match=r"'up\.bias'"):
            Lamb([model.mid.bias, model.up.bias]).step()
        return model.mid.bias.detach()

    first, *rest = pool(3, "threads").run(run)
    assert all(bits_equal(first, other) for other in rest)


class Declared(torch.optim.SGD):
    """Element-wise, and says so."""


class Heir(Declared):
    """Says nothing."""


def test_what_is_declared_passes_and_its_heirs_do_not() -> None:
    model = cut_model(Axis.solo())
    optimizer = Declared(model.parameters(), lr=0.1)
    assert "Declared was asked" in refusal(optimizer)
    assert declare_elementwise(Declared) is Declared
    optimizer.step()
    message = refusal(Heir(model.parameters(), lr=0.1))
    assert "(that Declared is says nothing" in message
    assert step_guard.is_elementwise(Declared)
    assert not step_guard.is_elementwise(Heir)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.optim.SGD([nn.Parameter(torch.ones(1))]), "an instance of SGD"),
        (nn.Linear, "got <class 'torch.nn.modules.linear.Linear'>"),
        ("SGD", "got 'SGD'"),
    ],
)
def test_only_classes_of_optimizers_are_declared(given: Any, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        declare_elementwise(given)


def test_a_class_of_the_name_of_torchs_is_not_torchs() -> None:
    namesake = type("Adam", (torch.optim.Adam,), {})
    assert "Adam was asked" in refusal(namesake(cut_model(Axis.solo()).parameters()))


def test_fused_kernels_are_refused_where_bits_are_promised(pool: Pool) -> None:
    def run(axis: Axis) -> str:
        model = cut_model(axis)
        backward(model)
        message = refusal(torch.optim.AdamW(model.parameters(), fused=True), kind=NumericsError)
        plain = torch.optim.AdamW(model.inner.parameters(), fused=True)
        plain.step()  # nothing of it is cut
        plain.add_param_group({"params": model.up.parameters(), "fused": False})
        plain.step()
        native = cut_model(axis, Scheme(numerics="native"))
        backward(native)
        torch.optim.SGD(native.parameters(), lr=0.1, fused=True).step()
        return message

    for message in pool(2, "threads").run(run):
        assert message.startswith("AdamW(fused=True) was asked to update 'up.weight'")
        assert "Use fused=False" in message


def test_a_state_that_makes_an_optimizer_fused_is_noticed() -> None:
    """torch takes `fused` from the state that is loaded."""
    model = cut_model(Axis.solo())
    backward(model)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"] = True
    optimizer.load_state_dict(state)
    assert "AdamW(fused=True)" in refusal(optimizer, kind=NumericsError)


def test_groups_that_come_later_are_looked_at() -> None:
    model = cut_model(Axis.solo())
    backward(model)
    optimizer = Lamb(model.inner.parameters())
    optimizer.step()
    optimizer.add_param_group({"params": model.down.parameters()})
    assert "'down.weight'" in refusal(optimizer)
    optimizer = Lamb(model.inner.parameters())
    optimizer.step()
    optimizer.param_groups[0]["params"].append(model.up.bias)
    assert "'up.bias'" in refusal(optimizer)


def test_a_model_that_is_cut_later_is_noticed() -> None:
    layer = nn.Linear(3, 8)
    optimizer = Lamb(layer.parameters())
    optimizer.step()
    model = parallelize(nn.ModuleDict({"up": layer}), {"up": ColumnParallel()}, Axis.solo())
    assert "parameter of shape (8, 3) was 'up.weight'" in refusal(optimizer)
    assert "'up.weight'" in refusal(Lamb(model.parameters()))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, sp.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_that_was_made_before_the_cut_is_refused(kind: Any) -> None:
    """It would update the whole weights, which the model no longer has."""
    model = Model()
    optimizer = kind(model.parameters())
    cut: Any = parallelize(model, PLAN, Axis.solo())
    backward(cut)
    message = refusal(optimizer)
    assert message.startswith(f"{kind.__name__} was made before the model was cut")
    assert "parameter of shape (43, 11) was 'up.weight'" in message
    assert "after parallelize" in message
    torch.optim.AdamW([*cut.inner.parameters()]).step()  # what is not cut is the model's still


def test_the_whole_model_that_was_copied_first_may_be_trained_on() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parallelize(copy.deepcopy(model), PLAN, Axis.solo())
    layer = ColumnParallelLinear.from_linear(model.up, axis=Axis.solo())
    backward(model)
    before = model.up.weight.clone()
    optimizer.step()
    assert not torch.equal(model.up.weight, before)
    assert torch.equal(layer.weight, before)


def replaced_by_initialize() -> tuple[Any, Optimizer]:
    with torch.device("meta"):
        model = parallelize(Model(), PLAN, Axis.solo())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.ndim == 2])
    return initialize(model), optimizer


def replaced(change: Callable[[Any], object]) -> tuple[Any, Optimizer]:
    model = cut_model(Axis.solo())
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    change(model)
    return model, optimizer


def assign(model: Any) -> None:
    model.up.weight = nn.Parameter(torch.zeros(43, 11))


def assigned_state(model: Any) -> None:
    state = {key: copy.deepcopy(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


REPLACED: dict[str, Callable[[], tuple[Any, Optimizer]]] = {
    "initialize": replaced_by_initialize,
    "to_empty": lambda: replaced(lambda m: m.to("meta").to_empty(device="cpu")),
    "assignment": lambda: replaced(assign),
    "load_state_dict(assign=True)": lambda: replaced(assigned_state),
}


@pytest.mark.parametrize("how", REPLACED)
def test_parameters_that_were_replaced_later_are_noticed(how: str) -> None:
    """An optimizer of the old ones would update nothing of the model, without a word."""
    model, optimizer = REPLACED[how]()
    message = refusal(optimizer)
    assert "AdamW has a parameter of shape (43, 11) that was 'up.weight' and is not" in message
    assert "Make the optimizer afterwards" in message
    assert "'up.weight'" in refusal(Lamb(model.parameters())), "the new ones are cut as well"
    torch.optim.AdamW(model.parameters()).step()


KEPT: dict[str, Callable[[Any], Any]] = {
    "to(dtype)": lambda model: model.double(),
    "load_state_dict": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
    "requires_grad_": lambda model: model.requires_grad_(True),
    "eval": lambda model: model.eval(),
}


@pytest.mark.parametrize("how", KEPT)
def test_what_keeps_parameters_keeps_the_optimizer(how: str) -> None:
    model = cut_model(Axis.solo())
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    model = KEPT[how](model)
    before = model.up.weight.clone()
    backward(model)
    optimizer.step()
    assert not torch.equal(model.up.weight, before)
    assert "'up.weight'" in refusal(Lamb(model.parameters()))


def test_copies_of_a_cut_model_are_cut_too() -> None:
    """Also the running average of `torch.optim.swa_utils`, a copy."""
    model = cut_model(Axis.solo())
    assert "'up.weight'" in refusal(Lamb(copy.deepcopy(model).parameters()))
    assert "'up.weight'" in refusal(Lamb(swa_utils.AveragedModel(model).parameters()))


def test_a_tied_weight_is_cut_if_one_of_its_modules_says_so() -> None:
    layer = ColumnParallelLinear(5, 16, axis=Axis.solo(), name="up", bias=False)
    plain = nn.Linear(5, 16, bias=False)
    plain.weight = layer.weight
    other = RowParallelLinear(16, 5, axis=Axis.solo(), name="down", bias=False)
    other.layouts["extra"] = other.layouts["weight"]
    other._parameters["extra"] = layer.weight
    assert re.search("'(up.weight|down.extra)'", refusal(Lamb(plain.parameters())))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_what_a_parametrization_computes_with_is_a_part_of_unknown_kind() -> None:
    model = cut_model(Axis.solo())
    optimizer = torch.optim.AdamW(model.parameters())
    parametrize.register_parametrization(model.up, "weight", Doubled())
    backward(model)
    optimizer.step()  # the parameter is the same, and element-wise it may be updated
    message = refusal(Lamb(model.up.parametrizations.parameters()))
    assert "'up.parametrizations.weight.original', from which a part is computed" in message
    with pytest.raises(UsageError, match=r"nothing says how it is cut\. Remove the param"):
        sp.optim.Adafactor(model.parameters()).step()


def test_schedulers_and_scalers_do_not_hide_an_optimizer() -> None:
    model = cut_model(Axis.solo())
    backward(model)
    optimizer = Lars(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "'up.weight'" in refusal(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a CUDA device it is disabled, and warns
        scaler = torch.amp.GradScaler("cuda")
    with pytest.raises(UsageError, match="Lars was asked"):
        scaler.step(optimizer)


def test_a_step_inside_backward_is_looked_at() -> None:
    model = cut_model(Axis.solo())
    optimizer = Lamb([model.up.weight])
    model.up.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(UsageError, match=r"Lamb was asked to update 'up\.weight'"):
        backward(model)


def test_a_wrapper_is_looked_through_to_the_optimizer_that_steps() -> None:
    """One that is no `torch.optim.Optimizer`, as those of accelerate and others."""

    class Wrapper:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            self.optimizer.step()

    assert "Lars was asked" in refusal(Wrapper(Lars(cut_model(Axis.solo()).parameters(), lr=0.1)))


FRESH = """
import json, warnings
import torch
from torch import nn
import shardproof as sp
from torch.optim import optimizer
hooks = optimizer._global_optimizer_pre_hooks

def message(optimizer, *args):
    try:
        optimizer.step(*args)
    except sp.errors.UsageError as error:
        return str(error)

plain = nn.Linear(3, 2)
torch.optim.LBFGS(plain.parameters()).step(lambda: torch.zeros(()))
before = len(hooks)
optimizer.register_optimizer_step_pre_hook(lambda *a: None)
layers = [sp.ColumnParallelLinear(3, 8, axis=sp.Axis.solo(), name="up") for _ in range(3)]
after = len(hooks)
hooks.clear()
layer = sp.ColumnParallelLinear(3, 8, axis=sp.Axis.solo(), name="up")
for p in layer.parameters():
    p.grad = torch.ones_like(p)
again = message(torch.optim.LBFGS(layer.parameters()), lambda: 1 / 0)

import torch.distributed as dist
warnings.simplefilter("ignore")  # of torch.jit, as torch.distributed.optim imports it
from torch.distributed.optim import ZeroRedundancyOptimizer
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
zero = ZeroRedundancyOptimizer(layer.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)
print(json.dumps([before, after, again, message(zero)]))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def fresh() -> list[Any]:
    """What a process of its own says."""
    found: list[Any] = json.loads(warm.printed(FRESH))
    return found


def test_the_hook_comes_with_the_first_cut_module_once_and_again_if_it_was_removed(
    fresh: list[Any],
) -> None:
    before, after, again, _ = fresh
    assert (before, after) == (0, 2)
    assert again.startswith("LBFGS was asked")


def test_an_optimizer_that_spreads_parameters_over_ranks_is_refused(fresh: list[Any]) -> None:
    """Over the ranks of the axis it would overwrite each rank's part with another's."""
    assert fresh[-1].startswith("ZeroRedundancyOptimizer was asked to update 'up.weight'")


def test_the_look_is_one_comparison_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cut_model(Axis.solo())
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, [optimizer], steps=1)
    monkeypatch.setattr(registry, "refresh", lambda: pytest.fail("looked again"))
    train(model, [optimizer], steps=2)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    torch.save(state, io.BytesIO())


def test_an_update_by_a_shards_own_norm_is_wrong(pool: Pool) -> None:
    """The negative control: what is refused is far off at degree 3, and is declared here."""

    class Forced(Lamb):
        """Not element-wise, and declared to be."""

    declare_elementwise(Forced)

    def run(axis: Axis) -> dict[str, Tensor]:
        model = cut_model(axis)
        train(model, [Forced(model.parameters())], steps=1)
        return parameters_of(model)

    plain = Model()
    train(plain, [Lamb(plain.parameters())], steps=1)
    wanted = plain.up.weight.detach()
    off = (pool(3, "threads").run(run)[0]["up.weight"] - wanted).abs().max()
    assert off > 1e-2


@pytest.mark.parametrize(
    "alike", [lambda p: nn.Parameter(p.data), lambda p: p.detach().requires_grad_()]
)
def test_a_parameter_in_the_memory_of_a_part_counts_as_the_part(alike: Any) -> None:
    def work(axis: Axis) -> None:
        model = parallelize(nn.Sequential(nn.Linear(6, 16)), {"0": "colwise"}, axis)
        others = [alike(p) for p in model.parameters()]
        for each in others:
            each.grad = torch.ones_like(each)
        torch.optim.AdamW(others).step()
        with pytest.raises(UsageError, match=r"Adafactor was asked to update '0\.weight'"):
            torch.optim.Adafactor(others).step()

    launch(work, degree=1)
