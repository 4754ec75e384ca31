"""Layers that are linked and called one by one: who computes what, what is kept, and copies."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from cut_block import run_everywhere
from invariance import bits_equal, normal
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import AxisError, ShapeError
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.layers.shared import SharedInput
from shared_group import LARGER, Group, Tensors, held_part, step

GROUP = Group((6, 2), 8, in_features=40, leading=(2, 5), dtype=torch.float32)
Layers = list[ColumnParallelLinear]


class Block(nn.Module):
    """Query, key and value of one input, added up per head: no attention, every gradient."""

    def __init__(self, axis: Axis, group: Group = GROUP) -> None:
        super().__init__()
        self.q, self.k, self.v = group.layers(axis)
        self.heads = group.heads(axis.size)

    @property
    def layers(self) -> Layers:
        return [self.q, self.k, self.v]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in self.layers)
        return q.square().sum() + (k * v).sum()


def group_of(layer: ColumnParallelLinear) -> SharedInput:
    assert layer._shared is not None
    group = layer._shared[0]
    assert isinstance(group, SharedInput)
    return group


def leaf(group: Group = GROUP) -> Tensor:
    return group.data()[0].requires_grad_()


def functions(*outputs: Tensor) -> list[str]:
    return [type(y.grad_fn).__name__ for y in outputs]


def is_shared(*outputs: Tensor) -> bool:
    """Whether one function computed all of them."""
    nodes = {id(y.grad_fn) for y in outputs}
    return functions(outputs[0]) == ["_SharedColumnsBackward"] and len(nodes) == 1


def are_alone(*outputs: Tensor) -> bool:
    return functions(*outputs) == ["_ColumnLinearBackward"] * len(outputs)


def test_members_that_are_called_with_one_tensor_are_computed_together() -> None:
    q, k, v = GROUP.layers(Axis.solo())
    x = leaf()
    for order in ((q, k, v), (v, q, k)):  # whoever comes first
        assert is_shared(*[layer(x) for layer in order])
    assert group_of(q)._cache is None


def test_another_tensor_is_computed_alone() -> None:
    q, k, v = GROUP.layers(Axis.solo())
    x, other = leaf(), leaf()
    a, b, c, d = q(x), k(other), v(x), k(x)
    assert is_shared(a, c)
    assert are_alone(b)
    assert d.grad_fn is a.grad_fn, "its own is still there"
    assert is_shared(q(other), k(other), v(other))


def test_a_tensor_that_was_written_to_is_computed_anew() -> None:
    q, k, v = GROUP.layers(Axis.solo())
    x = leaf() * 1
    for layer in (q, k, v):
        layer.weight.requires_grad_(False)  # or backward would refuse what was written to
    a = q(x)
    x.add_(1)
    b = k(x)
    assert are_alone(b)
    assert_close(b, nn.functional.linear(x, k.weight, k.bias), rtol=1e-5, atol=1e-5)
    assert is_shared(a)


def test_a_member_that_is_called_twice_is_computed_alone() -> None:
    q, k, v = GROUP.layers(Axis.solo())
    x = leaf()
    a, b = q(x), q(x)
    assert are_alone(b)
    assert bits_equal(a, b)
    assert is_shared(a, k(x), v(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_each_is_computed_alone(mode: Callable[[], Any]) -> None:
    q, k, v = GROUP.layers(Axis.solo())
    x = leaf()
    with_gradient = [layer(x) for layer in (q, k, v)]
    q(x)
    with mode():
        found = [layer(x) for layer in (q, k, v)]
    assert not any(y.requires_grad for y in found)
    assert all(bits_equal(a, b) for a, b in zip(found, with_gradient, strict=True))
    assert is_shared(k(x), v(x))
    assert are_alone(q(x.detach()), k(x.detach()))


def test_a_weight_that_has_changed_is_read_anew() -> None:
    q, k, v = GROUP.layers(Axis.solo())
    x = leaf()
    q(x)
    with torch.no_grad():
        k.weight.mul_(2)
    v.bias = nn.Parameter(v.bias.detach() + 1)
    for layer in (k, v):
        y = layer(x)
        assert are_alone(y)
        assert_close(y, nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_frozen_meanwhile_gets_no_gradient() -> None:
    q, k, _ = GROUP.layers(Axis.solo())
    x = leaf()
    q(x)
    k.weight.requires_grad_(False)
    k(x).sum().backward()
    assert k.weight.grad is None
    assert x.grad is not None


def test_autocast_is_part_of_what_must_agree() -> None:
    q, k, v = GROUP.layers(Axis.solo())
    x = leaf()
    q(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = k(x)
        assert y.dtype == torch.bfloat16
        assert are_alone(y)
    assert k(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [layer(x) for layer in (q, k, v)]
    assert is_shared(*outputs)
    assert {y.dtype for y in outputs} == {torch.bfloat16}


def test_autocast_gives_the_numbers_and_dtypes_of_layers_that_are_not_linked(pool: Pool) -> None:
    def run(axis: Axis, is_linked: bool) -> list[Tensor]:
        block, x = Block(axis, replace(GROUP, is_linked=is_linked)), leaf()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x)
        y.backward()
        return [x.grad, *[layer.weight.grad for layer in block.layers]]

    (linked,), (alone,) = (
        pool(1, "threads").run(lambda axis, is_linked=is_linked: run(axis, is_linked))
        for is_linked in (True, False)
    )
    for a, b in zip(linked, alone, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))
    for degree in (2, 4):  # one head for each leaf: dV is whole on each rank, and so is this
        for found in pool(degree, "threads").run(lambda axis: run(axis, True)):
            assert found[0].dtype == torch.float32


def test_members_of_several_dtypes_are_computed_alone_and_refused_alone() -> None:
    q, k, v = GROUP.layers(Axis.solo())
    v.double()
    x = leaf()
    assert are_alone(q(x), k(x), v(x.double()))
    with pytest.raises(ShapeError, match=r"v: x is torch.float32 on cpu, weight is torch.float64"):
        v(x)


def test_a_parametrized_member_is_computed_alone_and_so_are_the_others() -> None:
    q, k, v = GROUP.layers(Axis.solo())

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(k, "weight", Twice())
    x = leaf()
    outputs = [layer(x) for layer in (q, k, v)]
    assert are_alone(*outputs)
    assert_close(outputs[1], nn.functional.linear(x, k.weight, k.bias), rtol=1e-5, atol=1e-5)


def test_backward_through_one_member_ends_what_was_kept_for_the_others() -> None:
    q, k, v = GROUP.layers(Axis.solo())
    x = leaf()
    q(x).sum().backward()
    outputs = [k(x), v(x)]
    assert is_shared(*outputs)
    torch.autograd.backward([y.sum() for y in outputs])
    wanted = [leaf() for _ in range(3)]
    for layer, alone in zip(GROUP.layers(Axis.solo()), wanted, strict=True):
        layer(alone).sum().backward()
    assert_close(x.grad, sum(alone.grad for alone in wanted), rtol=1e-5, atol=1e-4)


def test_backward_through_one_after_the_other_needs_the_graph_kept() -> None:
    def outputs(x: Tensor) -> list[Tensor]:
        return [layer(x).sum() for layer in GROUP.layers(Axis.solo())]

    x = leaf()
    first, *others = outputs(x)
    first.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        others[0].backward()
    x, whole = leaf(), leaf()
    for y in outputs(x):
        y.backward(retain_graph=True)
    torch.autograd.backward(outputs(whole))
    assert_close(x.grad, whole.grad, rtol=1e-5, atol=1e-5)


def test_the_second_derivative_raises_instead_of_being_wrong() -> None:
    x = leaf()
    (grad,) = torch.autograd.grad(Block(Axis.solo())(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        grad.square().sum().backward()


def test_nothing_is_kept_alive_that_was_handed_out() -> None:
    q, k, v = GROUP.layers(Axis.solo())
    gc.disable()
    try:
        x = leaf() * 1
        kept = weakref.ref(x)
        first, last = q(x), k(x)
        handed_out = weakref.ref(last)
        del last
        assert handed_out() is None
        third = v(x)
        del x, first, third
        assert kept() is None
        q(leaf())  # the others' are left over
        leftover = weakref.ref(group_of(q)._cache.outputs[1])
        assert leftover() is not None
        q(leaf())
        assert leftover() is None
    finally:
        gc.enable()


def test_a_model_is_no_cycle() -> None:
    gc.collect()
    gc.disable()
    try:
        block = Block(Axis.solo())
        block(leaf()).backward()
        dead = [weakref.ref(layer) for layer in block.layers]
        weights = [weakref.ref(layer.weight) for layer in block.layers]
        del block
        assert [ref() for ref in (*dead, *weights)] == [None] * 6
    finally:
        gc.enable()


def test_linked_layers_have_the_names_and_the_state_of_others() -> None:
    linked, alone = Block(Axis.solo()), Block(Axis.solo(), replace(GROUP, is_linked=False))
    assert [name for name, _ in linked.named_modules()] == ["", "q", "k", "v"]
    assert [n for n, _ in linked.named_parameters()] == [n for n, _ in alone.named_parameters()]
    state = alone.state_dict()
    assert list(linked.state_dict()) == list(state)
    linked.load_state_dict(state)
    with pytest.raises(AxisError, match=r"cannot be pickled: .* Save model.state_dict"):
        torch.save(linked, io.BytesIO())


def trained(block: nn.Module) -> list[Tensor]:
    x = leaf()
    for parameter in block.parameters():
        parameter.grad = None
    block(x).backward()
    return [x.grad, *[p.grad for p in block.parameters()]]


def test_a_deep_copy_is_linked_and_its_own(pool: Pool) -> None:
    def run(axis: Axis) -> bool:
        block = Block(axis)
        block.q(leaf())  # something is left over, which cannot be copied
        twin = copy.deepcopy(block)
        assert group_of(twin.q) is group_of(twin.k) is group_of(twin.v)
        assert group_of(twin.q) is not group_of(block.q)
        x = leaf()
        assert is_shared(*[layer(x) for layer in twin.layers])
        before = trained(block)
        axis.transport.ledger.reset()
        found = trained(twin)
        assert axis.transport.ledger.calls("backward", "all_reduce") == 1
        is_same = all(map(bits_equal, before, found))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        changed = trained(twin)
        is_own = axis.rank > 2 or not bits_equal(changed[0], before[0])
        return is_same and is_own and all(map(bits_equal, trained(block), before))

    assert all(pool(2, "threads").run(run))
    assert all(pool(2, "processes").run(run))


def test_a_copy_of_one_member_is_linked_with_nobody() -> None:
    block = Block(Axis.solo())
    lone = copy.deepcopy(block.q)
    parameters = group_of(lone)._parameters
    assert parameters[0] is lone._parameters
    assert parameters[1:] == [None, None]
    x = leaf()
    assert are_alone(lone(x))
    assert is_shared(*[layer(x) for layer in block.layers])
    shallow = copy.copy(block.q)  # shares everything with the original, its place too
    assert is_shared(shallow(x), block.k(x), block.v(x))


def test_a_stranger_at_a_members_place_is_computed_alone() -> None:
    q, k, v = GROUP.layers(Axis.solo())
    other = GROUP.layers(Axis.solo())[0]
    other._shared = q._shared
    x = leaf()
    assert are_alone(other(x))
    assert is_shared(q(x), k(x), v(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("is_inside", [False, True])
def test_checkpointing_gives_the_same_bits_and_one_sum(
    pool: Pool, use_reentrant: bool, is_inside: bool
) -> None:
    """What is run again computes together again; from the very tensor, or from a new one."""

    def run(axis: Axis, is_checkpointed: bool) -> tuple[list[Tensor], int]:
        block, x = Block(axis), leaf()
        run = (lambda h: block(h * 1)) if is_inside else block
        axis.transport.ledger.reset()
        for _ in range(2):
            y = checkpoint(run, x, use_reentrant=use_reentrant) if is_checkpointed else run(x)
            y.backward()
        found = [x.grad, *[layer.weight.grad for layer in block.layers]]
        return found, axis.transport.ledger.calls("backward", "all_reduce")

    for degree in (1, 3):
        ranks = pool(degree, "threads").run(lambda axis: (run(axis, True), run(axis, False)))
        for (found, count), (wanted, wanted_count) in ranks:
            assert count == wanted_count == (2 if degree > 1 else 0)
            assert all(map(bits_equal, found, wanted))


def test_checkpointing_one_member_gives_the_same_numbers() -> None:
    """What is run again for one computes for all, and leaves the others over."""

    def run(is_checkpointed: bool) -> list[Tensor]:
        layers, x = GROUP.layers(Axis.solo()), leaf()
        for _ in range(2):
            outputs = [
                checkpoint(layer, x, use_reentrant=False) if is_checkpointed else layer(x)
                for layer in layers
            ]
            torch.autograd.backward([y.square().sum() for y in outputs])
        return [x.grad, *[layer.weight.grad for layer in layers]]

    for found, wanted in zip(run(True), run(False), strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_hooks_see_and_change_what_they_do_elsewhere() -> None:
    seen: list[str] = []

    def run(is_linked: bool) -> list[Tensor]:
        block, x = Block(Axis.solo(), replace(GROUP, is_linked=is_linked)), leaf()
        block.k.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
        block.v.register_forward_hook(lambda _, __, y: 3 * y)
        block.q.register_full_backward_hook(lambda *_: seen.append("q"))
        block(x).backward()
        return [x.grad, *[layer.weight.grad for layer in block.layers]]

    for found, wanted in zip(run(True), run(False), strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    assert seen == ["q", "q"]


def test_hooks_on_tensors_see_each_gradient_once() -> None:
    block, x = Block(Axis.solo()), leaf()
    seen: list[str] = []
    for name, parameter in block.named_parameters():
        parameter.register_hook(lambda _, n=name: seen.append(n))
    x.register_hook(lambda _: seen.append("x"))
    block(x).backward()
    assert sorted(seen) == sorted(["x", *dict(block.named_parameters())])


def test_steps_of_an_optimizer_have_the_same_bits(pool: Pool) -> None:
    """The same tensor every step, gradients added up over two, and an output that nobody uses."""

    def run(axis: Axis) -> list[Tensor]:
        block, x = Block(axis), leaf()
        optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
        found = []
        for number in range(4):
            if number == 2:
                block.q(x)  # and goes no further
            block(x).backward()
            found.append(x.grad.clone())
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        return found

    assert len(run_everywhere(pool, run)) == 4


def test_linked_and_not_agree_at_every_member_of_a_real_step(pool: Pool) -> None:
    """Every order of calls and every subset of calls that fall out of the group."""

    def run(axis: Axis) -> list[str]:
        group = LARGER[3]
        wanted = step(group, replace(group, is_linked=False).layers(axis))
        wrong: list[str] = []
        for strays in range(8):
            layers, (x, grads) = group.layers(axis), group.data()
            x.requires_grad_()
            outputs = [layer(x * 1 if strays >> i & 1 else x) for i, layer in enumerate(layers)]
            parts = [held_part(g, layer) for g, layer in zip(grads, layers, strict=True)]
            torch.autograd.backward(outputs, parts)
            found: Tensors = {"x.grad": x.grad}
            for name, layer, y in zip(group.names, layers, outputs, strict=True):
                found |= {f"{name}.y": y.detach(), f"{name}.weight.grad": layer.weight.grad}
            for name, value in found.items():
                is_right = (
                    torch.allclose(value, wanted[name], rtol=1e-4, atol=1e-3)
                    if name == "x.grad"
                    else bits_equal(value, wanted[name])
                )
                if not is_right:
                    wrong.append(f"{strays} {name}")
        return wrong

    assert pool(3, "threads").run(run) == [[], [], []]


def test_a_layer_that_is_linked_refuses_a_wrong_width_as_ever() -> None:
    q, *_ = GROUP.layers(Axis.solo())
    with pytest.raises(ShapeError, match=r"takes an input whose last dim is in_features=40"):
        q(normal(2, 41).requires_grad_())
