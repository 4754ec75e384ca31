"""torch's encoder layer in eval mode reads the weights of its linears: not if they are cut."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from invariance import bits_equal, normal
from shardproof.axis import Axis
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, Plan, RowParallel
from shardproof.ranks import launch
from shardproof.scheme import Numerics, Scheme

DEGREES = (1, 3, 8)


def layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(12, 4, dim_feedforward=37, dropout=0.0, batch_first=True)
    made.dropout, made.dropout1, made.dropout2 = nn.Identity(), nn.Identity(), nn.Identity()
    return made.eval()


PLAIN = layer()
STACK = nn.TransformerEncoder(copy.deepcopy(PLAIN), 2).eval()
PAD = torch.tensor([[False] * 5, [False, False, False, True, True]])


def cut(model: nn.Module, axis: Axis, numerics: Numerics) -> nn.Module:
    styles = {"linear1": ColumnParallel(), "linear2": RowParallel()}
    plan = {
        name: styles[name.rpartition(".")[2]]
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in styles
    }
    return parallelize(copy.deepcopy(model), Plan(plan, Scheme(numerics=numerics)), axis)


@pytest.mark.parametrize("numerics", ["invariant", "native"])
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_layer_in_eval_mode_is_right(numerics: Numerics, with_grad: bool) -> None:
    x = normal(2, 5, 12, seed=1)

    def work(axis: Axis) -> Tensor:
        model = cut(PLAIN, axis, numerics)
        with torch.set_grad_enabled(with_grad):
            return model(x).detach()

    wanted = PLAIN(x).detach()
    outputs = [y for d in DEGREES for y in launch(work, degree=d, threads=1)]
    for y in outputs:
        assert_close(y, wanted, rtol=1e-4, atol=1e-6)
        assert numerics == "native" or bits_equal(y, outputs[0])


def test_a_stack_with_padding_in_eval_mode_is_right() -> None:
    x = normal(2, 5, 12, seed=2)

    def work(axis: Axis) -> Tensor:
        with torch.no_grad():
            return cut(STACK, axis, "invariant")(x, src_key_padding_mask=PAD)

    wanted = STACK(x, src_key_padding_mask=PAD).detach()
    for degree in DEGREES:
        for y in launch(work, degree=degree, threads=1):
            assert_close(y[~PAD], wanted[~PAD], rtol=1e-4, atol=1e-6)


def test_a_plain_layer_keeps_its_shortcut() -> None:
    x = normal(2, 5, 12, seed=3)
    with torch.no_grad():
        launch(lambda axis: cut(PLAIN, axis, "native")(x), degree=1, threads=1)
        PLAIN(x)
    assert PLAIN.activation_relu_or_gelu == 1
