"""Numbers about all parameters of a cut model: each element once, plain torch's, the same bits."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from hf_zoo import whole_model
from invariance import bits_equal, normal, random_threads
from places import Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import ShapeError, UsageError
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.optim import grad_norm, layouts_of
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, RowParallel, VocabParallel
from shardproof.ranks import launch
from shardproof.reductions import (
    max_over_parameters,
    min_over_parameters,
    num_parameters,
    parameter_norm,
    parameter_norms,
    sum_over_parameters,
    sums_by_parameter,
)

DEGREES = (1, 2, 3, 8)


class Net(nn.Module):
    """Cut weights of every kind, replicated and plain ones, a tied one, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 11)
        self.inner = nn.Linear(11, 11)
        self.up = nn.Linear(11, 43)
        self.act = nn.SiLU()
        self.down = nn.Linear(43, 11)
        self.again = self.inner
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=seed) / 4
        self.inner.bias.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.inner(self.embed(ids)))))


PLAN = {"embed": VocabParallel(), "up": ColumnParallel(), "down": RowParallel()}
PLAIN = Net()
IDS = torch.arange(20).view(4, 5) % 37


def cut(axis: Axis) -> nn.Module:
    return parallelize(copy.deepcopy(PLAIN), PLAN, axis)


def whole(model: nn.Module, values: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, parameter, layout, axis in layouts_of(model):
        value = values(parameter).detach().clone()
        if axis is not None and layout.cut is not None and layout.dim is not None:
            value = comm.all_gather(value, axis, dim=layout.dim, cut=layout.cut, direction="prover")
        found[name] = value
    return found


def same_everywhere(
    pool: Pool, run: Callable[[Axis], list[Tensor]], degrees: Sequence[int] = (3,)
) -> list[Tensor]:
    """The tensors of degree 1, which every rank of every degree must have too."""
    (alone,) = pool(1, "threads").run(run)
    for degree in degrees:
        for rank, found in enumerate(pool(degree, "threads").run(run)):
            for number, (a, b) in enumerate(zip(found, alone, strict=True)):
                assert bits_equal(a, b), f"tensor {number} on rank {rank} of {degree}"
    return alone


def backward(model: nn.Module) -> nn.Module:
    model(IDS).square().sum().backward()
    return model


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "square": torch.square,
    "abs": torch.abs,
    "itself": lambda x: x,
    "is zero": lambda x: x == 0,
    "is positive": lambda x: x > 0,
    "is nan": torch.isnan,
    "whole part": lambda x: (10 * x).long(),
}


def test_sums_are_torchs_with_the_same_bits_at_every_degree(pool: Pool) -> None:
    def run(axis: Axis) -> list[Tensor]:
        model = backward(cut(axis))
        with random_threads(axis.rank):
            return [
                sum_over_parameters(model, function, of=of).detach()
                for function in FUNCTIONS.values()
                for of in ("parameters", "gradients")
            ]

    alone, plain = same_everywhere(pool, run, DEGREES[1:]), backward(copy.deepcopy(PLAIN))
    values = [list(plain.parameters()), [p.grad for p in plain.parameters() if p.grad is not None]]
    for number, function in enumerate(FUNCTIONS.values()):
        for of in (0, 1):
            wanted = sum(function(value.detach().double()).double().sum() for value in values[of])
            found = alone[2 * number + of]
            assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
            share = wanted / 2  # negative control: what a rank of two would say by itself, about
            if wanted:
                assert not torch.allclose(found.double(), share, rtol=1e-2)


def test_counts_are_exact_and_wide() -> None:
    model = nn.Linear(5000, 5000, bias=False)
    found = sum_over_parameters(model, lambda x: x == x)
    assert found.dtype == torch.float64
    assert int(found) == 25_000_000  # above 2^24, which fp32 cannot count


def test_a_penalty_in_a_loss_has_the_gradient_of_plain_torch(pool: Pool) -> None:
    def loss(model: nn.Module, penalty: Tensor) -> Tensor:
        return model(IDS).square().mean() + 0.1 * penalty

    def run(axis: Axis) -> list[Tensor]:
        model = cut(axis)
        with random_threads(axis.rank):
            penalty = sum_over_parameters(model, torch.square, only_trainable=True)
            loss(model, penalty + parameter_norm(model)).backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        grads = whole(model, lambda p: p if p.grad is None else p.grad)
        return [*grads.values(), *whole(model, lambda p: p).values()]

    alone, plain = same_everywhere(pool, run), copy.deepcopy(PLAIN)
    squares = sum(p.square().sum() for p in plain.parameters() if p.requires_grad)
    norm = sum(p.square().sum() for p in plain.parameters()).sqrt()
    loss(plain, squares + norm).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    wanted = [p if p.grad is None else p.grad for p in plain.parameters()]
    for a, b in zip(alone, [*wanted, *plain.parameters()], strict=True):
        assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


def test_a_part_of_the_sum_breaks_it(pool: Pool) -> None:
    """The negative control: what the obvious line says on each rank."""
    shares = pool(2, "threads").run(
        lambda axis: float(sum(p.detach().square().sum() for p in cut(axis).parameters()))
    )
    truth = float(sum_over_parameters(PLAIN, torch.square).detach())
    assert all(abs(share - truth) > 0.1 for share in shares)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(pool: Pool, dtype: torch.dtype) -> None:
    def run(axis: Axis) -> list[Tensor]:
        model = cut(axis).to(dtype)
        total = sum_over_parameters(model, torch.square)
        total.backward()
        return [total.detach(), *whole(model, lambda p: p if p.grad is None else p.grad).values()]

    alone = same_everywhere(pool, run)
    assert alone[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(
        alone[0].double(),
        sum(p.detach().to(dtype).square().double().sum() for p in PLAIN.parameters()),
        rtol=1e-2,
        atol=1e-2,
    )


def test_norms_of_parameters_and_gradients_by_name(pool: Pool) -> None:
    def run(axis: Axis) -> list[Tensor]:
        model = backward(cut(axis))
        of_parameters = parameter_norms(model)
        of_gradients = parameter_norms(model, of="gradients")
        assert set(of_parameters) == {name for name, _ in PLAIN.named_parameters()}
        assert set(of_gradients) == set(of_parameters) - {"inner.bias"}
        total = parameter_norm(model).detach()
        return [total, *of_parameters.values(), *of_gradients.values(), grad_norm(model)]

    alone, plain = same_everywhere(pool, run), backward(copy.deepcopy(PLAIN))
    values = [p.detach() for p in plain.parameters()]
    grads = [p.grad for p in plain.parameters() if p.grad is not None]
    wanted = [torch.cat([v.reshape(-1) for v in values]).norm(), *(v.norm() for v in values)]
    wanted += [*(g.norm() for g in grads), torch.cat([g.reshape(-1) for g in grads]).norm()]
    for a, b in zip(alone, wanted, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_extremes(pool: Pool) -> None:
    def run(axis: Axis) -> list[Tensor]:
        model = backward(cut(axis))
        return [
            max_over_parameters(model),
            min_over_parameters(model),
            max_over_parameters(model, torch.abs),
            max_over_parameters(model, torch.abs, of="gradients"),
            max_over_parameters(model.inner),
            min_over_parameters(model.up, lambda x: x > 100),
        ]

    alone, plain = same_everywhere(pool, run), backward(copy.deepcopy(PLAIN))
    flat = torch.cat([p.detach().reshape(-1) for p in plain.parameters()]).double()
    grads = [p.grad.abs().max() for p in plain.parameters() if p.grad is not None]
    inner = max(float(p.detach().max()) for p in plain.inner.parameters())
    wanted = [flat.max(), flat.min(), flat.abs().max(), max(grads), inner, 0.0]
    assert [float(each) for each in alone] == [float(each) for each in wanted]


def test_a_nan_on_one_rank_is_seen_on_all(pool: Pool) -> None:
    def run(axis: Axis) -> list[float]:
        model = cut(axis)
        if axis.rank == axis.size - 1:
            model.up.weight.data[-1, 0] = float("nan")
        counted = sum_over_parameters(model, lambda x: ~x.isfinite())
        names = [name for name, c in sums_by_parameter(model, torch.isnan).items() if c]
        assert names == ["up.weight"]
        return [float(counted), float(max_over_parameters(model))]

    for degree in (1, 3):
        for counted, largest in pool(degree, "threads").run(run):
            assert counted == 1
            assert largest != largest


def test_the_number_of_parameters_is_that_of_the_whole_model(pool: Pool) -> None:
    wanted = [
        sum(p.numel() for p in PLAIN.parameters()),
        sum(p.numel() for p in PLAIN.parameters() if p.requires_grad),
    ]
    assert num_parameters(PLAIN) == wanted[0]
    for degree in DEGREES:
        for found in pool(degree, "threads").run(
            lambda axis: [num_parameters(cut(axis)), num_parameters(cut(axis), only_trainable=True)]
        ):
            assert found == wanted


@pytest.mark.parametrize("kind", ["llama-one-key-head", "llama-tied-4-2"])
def test_heads_that_several_ranks_hold_count_once(pool: Pool, kind: str) -> None:
    """Ranks share a key-value head: it counts once, and every holder gets its gradient."""
    pytest.importorskip("transformers")
    plain = whole_model(kind)

    def run(axis: Axis) -> list[Tensor]:
        model = parallelize(copy.deepcopy(plain), None, axis)
        total = sum_over_parameters(model, torch.square)
        total.backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, 2 * parameter), name
        assert num_parameters(model) == sum(p.numel() for p in plain.parameters())
        return [total.detach(), max_over_parameters(model, torch.abs)]

    alone = same_everywhere(pool, run, (2, 3))
    assert_close(alone[0], sum(p.detach().square().sum() for p in plain.parameters()))


def test_what_is_no_function_of_each_element_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"'embed\.weight' returned shape \(\) for a leaf"):
        sum_over_parameters(PLAIN, torch.sum)
    with pytest.raises(ShapeError, match="returned float for a leaf"):
        max_over_parameters(PLAIN, lambda x: 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(UsageError, match="of='grads' is unknown"):
        sum_over_parameters(PLAIN, torch.abs, of="grads")  # type: ignore[arg-type]
    for function in (num_parameters, parameter_norms, parameter_norm, max_over_parameters):
        with pytest.raises(UsageError, match=r"the model of .* is \[Param.*Give the model: its"):
            function(list(PLAIN.parameters()))  # type: ignore[operator]


def test_a_model_without_parameters() -> None:
    model = nn.Sequential(nn.ReLU())
    assert float(sum_over_parameters(model, torch.square)) == 0.0
    assert float(max_over_parameters(model)) == -float("inf")
    assert num_parameters(model) == 0
    assert parameter_norms(model) == {}


# Element-wise things of torch on parameters: right where they are, and these show it.


def test_an_average_of_weights_is_elementwise(pool: Pool) -> None:
    """`torch.optim.swa_utils`: a deep copy that is averaged, with ema and without."""

    def averaged(model: nn.Module) -> list[AveragedModel]:
        found = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
        for step in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.0 - 0.1 * step)
            for each in found:
                each.update_parameters(model)
        return found

    def run(axis: Axis) -> list[Tensor]:
        found = averaged(cut(axis))
        return [
            value
            for each in found
            for value in (each(IDS).detach(), *whole(each.module, lambda p: p).values())
        ]

    alone = same_everywhere(pool, run)
    wanted = [
        value
        for each in averaged(copy.deepcopy(PLAIN))
        for value in (each(IDS).detach(), *(p.detach() for p in each.module.parameters()))
    ]
    for a, b in zip(alone, wanted, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_clipping_by_value_is_elementwise(pool: Pool) -> None:
    def run(axis: Axis) -> list[Tensor]:
        model = backward(cut(axis))
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
        return list(whole(model, lambda p: p if p.grad is None else p.grad).values())

    alone, plain = same_everywhere(pool, run), backward(copy.deepcopy(PLAIN))
    torch.nn.utils.clip_grad_value_(plain.parameters(), 0.05)
    for a, p in zip(alone, plain.parameters(), strict=True):
        assert_close(a, p.detach() if p.grad is None else p.grad, rtol=1e-5, atol=1e-6)


def test_functional_call_with_other_weights_is_right(pool: Pool) -> None:
    def run(axis: Axis) -> list[Tensor]:
        model = cut(axis)
        halved = {name: p.detach() / 2 for name, p in model.named_parameters()}
        return [torch.func.functional_call(model, halved, (IDS,))]

    (alone,) = same_everywhere(pool, run)
    # A copy: torch does not give a module with two names its own parameters back.
    plain = copy.deepcopy(PLAIN)
    halved = {name: p.detach() / 2 for name, p in plain.named_parameters()}
    assert_close(alone, torch.func.functional_call(plain, halved, (IDS,)), rtol=1e-5, atol=1e-6)


def test_a_layer_with_a_parametrization_says_what_is_missing() -> None:
    layer = ColumnParallelLinear(3, 5, axis=Axis.solo(), name="up")
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(UsageError, match=r"'up' .* holds a part of 'weight' and no longer has it"):
        sum_over_parameters(layer, torch.square)


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t.softmax(-1),
        lambda t: (t - t.mean()) ** 2,
        lambda t: t / t.norm(),
        lambda t: t.cumsum(-1),
        lambda t: t.sort(-1)[0] * torch.arange(t.shape[-1]),
        torch.rand_like,
    ],
    ids=["softmax", "mean", "norm", "cumsum", "place", "draw"],
)
def test_what_keeps_the_shape_and_is_not_elementwise_is_refused(function: Any) -> None:
    plain = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))

    def work(axis: Axis) -> str:
        model = parallelize(copy.deepcopy(plain), {"0": "colwise", "1": "rowwise"}, axis)
        with pytest.raises(ShapeError, match="is not element-wise") as raised:
            sum_over_parameters(model, function)
        return str(raised.value)

    for degree in (1, 3):
        launch(work, degree=degree)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(UsageError, match="3 is no function of each element"):
        sum_over_parameters(nn.Linear(2, 2), 3)  # type: ignore[arg-type]
