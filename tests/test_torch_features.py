"""Cut linears under what torch offers: each feature works or raises, none is silently wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from cut_block import Block, calls, cut_block, data, parts, run_everywhere
from invariance import bits_equal, normal, strided
from places import Pool
from shardproof.axis import Axis
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear


def test_a_frozen_weight_costs_no_gradient_and_no_collective(pool: Pool) -> None:
    """Frozen `up`, and an input that needs no gradient: nothing is to be reduced backward."""

    def run(axis: Axis) -> tuple[dict[str, int], bool]:
        block = cut_block(axis)
        block.up.requires_grad_(False)
        x, grad_y = data()
        block(x.detach()).backward(grad_y)
        has_none = all(p.grad is None for p in block.up.parameters())
        return calls(axis), has_none and block.down.weight.grad is not None

    for degree in (2, 3):
        for counted, is_right in pool(degree, "threads").run(run):
            assert counted == {"forward": 1, "backward": 0}
            assert is_right


def test_an_input_that_needs_no_gradient_costs_no_collective(pool: Pool) -> None:
    def run(axis: Axis) -> dict[str, int]:
        block, (x, grad_y) = cut_block(axis), data()
        block(x.detach()).backward(grad_y)
        return calls(axis)

    assert pool(2, "threads").run(run) == [{"forward": 1, "backward": 0}] * 2


@pytest.mark.parametrize("frozen", ["up.weight", "up.bias", "down.weight", "down.bias"])
def test_a_frozen_parameter_leaves_the_other_gradients_as_they_are(pool: Pool, frozen: str) -> None:
    def run(axis: Axis, is_frozen: bool) -> dict[str, Tensor]:
        block, (x, grad_y) = cut_block(axis), data()
        block.get_parameter(frozen).requires_grad_(not is_frozen)
        block(x).backward(grad_y)
        grads = {name: p.grad for name, p in block.named_parameters()}
        assert (grads.pop(frozen) is None) == is_frozen
        return {"x": x.grad, **grads}

    frozen_runs = pool(3, "threads").run(lambda axis: run(axis, True))
    for found, wanted in zip(
        frozen_runs, pool(3, "threads").run(lambda axis: run(axis, False)), strict=True
    ):
        assert len(found) == 4
        assert all(bits_equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(pool: Pool, mode: Any) -> None:
    def run(axis: Axis) -> list[Tensor]:
        block, (x, _) = cut_block(axis), data()
        with mode():
            y = block(x)
        assert not y.requires_grad
        return [y.clone(), block(x).detach()]

    without, with_gradients = run_everywhere(pool, run)
    assert bits_equal(without, with_gradients)


def autocast_run(axis: Axis, make: Callable[[Axis], nn.Module]) -> list[Tensor]:
    block, (x, grad_y) = make(axis), data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
    y.backward(grad_y.to(y.dtype))
    assert block.up.weight.grad.dtype == torch.float32
    return [y.detach(), x.grad, *parts(block)]


def test_autocast_gives_the_dtypes_of_nn_linear_and_the_same_bits(pool: Pool) -> None:
    found = run_everywhere(pool, lambda axis: autocast_run(axis, cut_block))
    wanted = autocast_run(Axis.solo(), lambda _: Block())
    assert found[0].dtype == torch.bfloat16
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("cls", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_each_layer_in_bf16(cls: Any, dtype: torch.dtype) -> None:
    layer = cls(14, 9, axis=Axis.solo(), name="up", dtype=dtype)
    x = normal(5, 14).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert nn.functional.linear(x, layer.weight, layer.bias).dtype == y.dtype
    assert y.dtype == torch.bfloat16
    assert bits_equal(y, layer.bfloat16()(x.bfloat16()))


def test_autocast_leaves_fp64_alone_and_ends_where_it_is_switched_off() -> None:
    axis = Axis.solo()
    for cls in (ColumnParallelLinear, RowParallelLinear):
        layer, x = cls(4, 3, axis=axis, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert nn.Linear(4, 3, dtype=torch.float64)(x).dtype == torch.float64
            assert layer(x).dtype == torch.float64
            with torch.autocast("cpu", enabled=False):
                assert cls(4, 3, axis=axis)(x.float()).dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(pool: Pool, use_reentrant: bool) -> None:
    def run(axis: Axis, is_checkpointed: bool) -> list[Tensor]:
        block, (x, grad_y) = cut_block(axis), data()
        y = checkpoint(block, x, use_reentrant=use_reentrant) if is_checkpointed else block(x)
        y.backward(grad_y)
        return [y.detach(), x.grad, *parts(block)]

    found = run_everywhere(pool, lambda axis: run(axis, True))
    wanted = run(Axis.solo(), False)
    assert all(bits_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_second_derivative_raises_instead_of_being_wrong(pool: Pool) -> None:
    def run(axis: Axis) -> str:
        block, (x, _) = cut_block(axis), data()
        (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError) as caught:
            grad.square().sum().backward()
        return str(caught.value)

    for message in pool(2, "threads").run(run):
        assert (
            "trying to differentiate twice a function that was marked with @once_differ" in message
        )


def test_a_term_behind_a_plain_sum_does_not_vanish() -> None:
    """The gradient of a sum wants no gradient, and that of a linear is its weight, which does."""
    x = torch.ones(2, 8, requires_grad=True)
    for make in (ColumnParallelLinear, RowParallelLinear):
        y = make(8, 8, axis=Axis.solo())(x)
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            (grad.square().sum() + y.sum()).backward()


def test_forward_hooks_see_cut_tensors_and_backward_hooks_see_parts(pool: Pool) -> None:
    def run(axis: Axis) -> list[tuple[int, ...]]:
        block, (x, grad_y) = cut_block(axis), data()
        seen: list[tuple[int, ...]] = []
        block.up.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        block.up.register_forward_hook(lambda _, __, y: seen.append(tuple(y.shape)))
        block.down.register_full_backward_hook(lambda _, gx, __: seen.append(tuple(gx[0].shape)))
        block(x).backward(grad_y)
        return seen

    first, second = pool(2, "threads").run(run)
    assert first == [(2, 5, 14), (2, 5, 35), (2, 5, 19)]
    assert second == [(2, 5, 14), (2, 5, 35), (2, 5, 16)]


def test_a_hook_may_change_the_output(pool: Pool) -> None:
    def run(axis: Axis) -> list[Tensor]:
        block, (x, _) = cut_block(axis), data()
        block.up.register_forward_hook(lambda _, __, y: y * 2)
        return [block(x).detach()]

    (found,) = run_everywhere(pool, run)
    plain = Block()
    plain.up.register_forward_hook(lambda _, __, y: y * 2)
    assert_close(found, plain(data()[0]).detach(), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(found, Block()(data()[0]), atol=1e-2)


def test_a_layer_used_twice_accumulates(pool: Pool) -> None:
    def run(axis: Axis, make: Callable[[Axis], nn.Module] = cut_block) -> list[Tensor]:
        block, (x, grad_y) = make(axis), data()
        y = block(torch.tanh(block(x)))
        y.backward(grad_y)
        block(x).backward(grad_y)
        return [y.detach(), x.grad, *parts(block)]

    found = run_everywhere(pool, run)
    for a, b in zip(found, run(Axis.solo(), lambda _: Block()), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_under_a_frozen_weight_no_input_is_kept() -> None:
    """What would keep activations alive that nothing needs."""
    axis, kept = Axis.solo(), []
    for cls in (ColumnParallelLinear, RowParallelLinear):
        for is_frozen in (True, False):
            layer = cls(14, 9, axis=axis, bias=False)
            layer.requires_grad_(not is_frozen)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.append(tuple(x.shape)) or x, lambda x: x
            ):
                layer(data()[0])
            assert kept == ([(9, 14)] if is_frozen else [(2, 5, 14), (9, 14)])
            kept.clear()


def test_train_and_eval_reach_the_cut_layers() -> None:
    block = cut_block(Axis.solo())
    assert not block.eval().up.training
    assert block.train().down.training


def test_one_rank_may_hold_its_input_as_a_view(pool: Pool) -> None:
    def run(axis: Axis, is_mixed: bool) -> list[Tensor]:
        block, (x, grad_y) = cut_block(axis), data()
        if is_mixed and axis.rank % 2:
            x, grad_y = strided(x.detach()).requires_grad_(), strided(grad_y)
            assert not x.is_contiguous()
        y = block(x)
        y.backward(grad_y)
        return [y.detach(), x.grad, *parts(block)]

    found = run_everywhere(pool, lambda axis: run(axis, True))
    assert all(bits_equal(a, b) for a, b in zip(found, run(Axis.solo(), False), strict=True))


def test_gradients_add_up_over_two_backward_passes_until_they_are_set_to_none(pool: Pool) -> None:
    def run(axis: Axis) -> list[Tensor]:
        block, (x, grad_y) = cut_block(axis), data()
        y = block(x)
        y.backward(grad_y, retain_graph=True)
        once = block.down.bias.grad.clone()
        y.backward(grad_y)
        return [once, block.down.bias.grad]

    once, twice = run_everywhere(pool, run)
    assert torch.equal(twice, once * 2)


def test_an_activation_of_torch_is_replaced_and_without_it_the_bits_differ(pool: Pool) -> None:
    """The negative control: a layer's own arithmetic is not to blame for what is between layers."""

    def run(axis: Axis, act: Callable[[Tensor], Tensor]) -> Tensor:
        up = ColumnParallelLinear(14, 203, axis=axis, name="up")
        down = RowParallelLinear(203, 14, axis=axis, name="down")
        return down(act(up(normal(7, 14, seed=8)))).detach()

    def differs(act: Callable[[Tensor], Tensor]) -> bool:
        alone = run(Axis.solo(), act)
        return not all(
            bits_equal(found, alone)
            for degree in (2, 3, 8)
            for found in pool(degree, "threads").run(lambda axis: run(axis, act))
        )

    assert not differs(torch.relu)
    if not differs(nn.functional.silu):
        pytest.skip(f"torch {torch.__version__} computes a shard's silu like the whole one here")
