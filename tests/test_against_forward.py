"""A plan by names is compared with one forward: what would be wrong is an error, not a number."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from places import Pool
from shardproof.axis import Axis
from shardproof.errors import PlanError
from shardproof.plans.apply import parallelize
from shardproof.plans.planning import plan

PAIR = {"up": "colwise", "down": "rowwise"}
X = torch.linspace(-2, 2, 2 * 3 * 12).view(2, 3, 12)


class Between(nn.Module):
    """Two linears with something in between, or behind."""

    def __init__(
        self,
        between: Callable[..., Tensor],
        after: Callable[[Tensor, Tensor], Any] = lambda y, hidden: y,
        width: int = 36,
        **modules: nn.Module,
    ) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 36), nn.Linear(width, 12)
        self.between, self.after = between, after
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        hidden = self.up(x)
        return self.after(self.down(self.between(self, hidden)), hidden)


class Scaled(Between):
    """A parameter of the module's own takes part."""

    def __init__(self, size: int) -> None:
        super().__init__(lambda self, x: x * self.scale)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, size))


def attention(self: Any, x: Tensor) -> Tensor:
    """Three heads of four features, from one linear for queries, keys and values."""
    q, k, v = (each.unflatten(-1, (-1, 4)).transpose(1, 2) for each in x.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# What is between -> what the message must say.
WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a norm": (
        lambda: Between(lambda self, x: F.layer_norm(x, x.shape[-1:])),
        "'native_layer_norm' in the forward adds up over the features that 'up' cuts",
    ),
    "a norm that is a module": (
        lambda: Between(lambda self, x: self.norm(x), norm=nn.LayerNorm(36)),
        "'native_layer_norm' in 'norm' adds up over the features that 'up' cuts",
    ),
    "a softmax": (
        lambda: Between(lambda self, x: x.softmax(-1)),
        "'_softmax' in the forward needs all of the features that 'up' cuts",
    ),
    "a softmax that is a module": (
        lambda: Between(lambda self, x: self.act(x), act=nn.Softmax(-1)),
        "'_softmax' in 'act' needs all of",
    ),
    "a mean": (lambda: Between(lambda self, x: x - x.mean(-1, keepdim=True)), "adds up over"),
    "a sum": (lambda: Between(lambda self, x: x / x.norm()), "adds up over"),
    "a sort": (lambda: Between(lambda self, x: x.sort(-1).values), "'sort' in the forward needs"),
    "a cumulative sum": (lambda: Between(lambda self, x: x.cumsum(-1)), "'cumsum' in the forward"),
    "halves that are multiplied": (
        lambda: Between(lambda self, x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], width=18),
        "belong together, and the plan gives them to rank 0 and rank 1",
    ),
    "a gated unit": (
        lambda: Between(lambda self, x: self.act(x), width=18, act=nn.GLU()),
        "together",
    ),
    "a fused attention": (lambda: Between(attention, width=12), "belong together"),
    "halves that change places": (
        lambda: Between(lambda self, x: torch.cat([x[..., 18:], x[..., :18]], -1)),
        "belong together",
    ),
    "a flip": (lambda: Between(lambda self, x: x.flip(-1)), "belong together"),
    "a part": (lambda: Between(lambda self, x: x[..., :5], width=5), "belong together"),
    "a roll": (lambda: Between(lambda self, x: x.roll(1, -1)), "belong together"),
    "a constant by feature": (
        lambda: Between(lambda self, x: x * torch.arange(36.0)),
        "uses a tensor with another element for each of the features that the plan cuts",
    ),
    "a parameter by feature": (
        lambda: Scaled(36),
        "'scale' stays whole, and its dim 0 has entries",
    ),
    "one parameter for all": (lambda: Scaled(1), "uses 'scale' for each of the features"),
    "PReLU": (
        lambda: Between(lambda self, x: self.act(x), act=nn.PReLU()),
        "uses 'act.weight' for each of the features that 'up' cuts",
    ),
    "a gate for all": (
        lambda: Between(
            lambda self, x: x * self.gate(X.to(x.dtype)).sigmoid(), gate=nn.Linear(12, 1)
        ),
        "uses an activation that is not cut for each of the features that 'up' cuts",
    ),
    "attention over tokens": (
        lambda: Between(
            lambda self, x: self.q(X.to(x.dtype)) @ X.mT.to(x.dtype) @ x, q=nn.Linear(12, 12)
        ),
        "uses an activation that is not cut for each of",
    ),
    "hidden numbers added": (
        lambda: Between(lambda self, x: x, lambda y, hidden: y + hidden.sum()),
        "adds up over",
    ),
    "a whole linear": (
        lambda: Between(lambda self, x: self.more(x), more=nn.Linear(36, 36)),
        "'more.weight' stays whole, and its dim 1 has entries for each of the features",
    ),
    "dropout by function": (
        lambda: Between(lambda self, x: F.dropout(x, 0.5, self.training)),
        "draws random numbers for the features that 'up' cuts",
    ),
}

RIGHT: dict[str, Callable[[], nn.Module]] = {
    "nothing": lambda: Between(lambda self, x: x),
    "silu": lambda: Between(lambda self, x: F.silu(x)),
    "gelu": lambda: Between(lambda self, x: F.gelu(x, approximate="tanh")),
    "tanh and exp": lambda: Between(lambda self, x: x.tanh() * torch.exp(-x.square())),
    "logsigmoid": lambda: Between(lambda self, x: F.logsigmoid(x)),
    "an activation that is a module": lambda: Between(lambda self, x: self.act(x), act=nn.SiLU()),
    "a residual": lambda: Between(lambda self, x: x.relu(), lambda y, hidden: y + 1),
    "zeros like it": lambda: Between(lambda self, x: x + torch.zeros_like(x) + x.new_ones(x.shape)),
    "a mask of tokens": lambda: Between(
        lambda self, x: x * torch.tensor([1.0, 0.0, 1.0])[:, None] * torch.ones(x.shape[-1])
    ),
    "attention of heads": lambda: Between(
        lambda self, x: (
            F.scaled_dot_product_attention(
                *(x.unflatten(-1, (-1, 1)).movedim(-2, 1) for _ in range(3))
            )
            .movedim(1, -2)
            .flatten(-2)
        )
    ),
    "another call": lambda: Between(lambda self, x: x + self.up(X.flip(0))),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_would_be_wrong_is_said_at_plan_time(name: str) -> None:
    make, said = WRONG[name]
    with pytest.raises(PlanError) as caught:
        plan(make(), PAIR, degree=2, inputs=X)
    assert said in str(caught.value)
    assert "give None in its place and an example of what forward takes" in str(caught.value)
    if "together" not in said:  # one rank has all that belongs together
        with pytest.raises(PlanError) as caught:
            parallelize(make(), PAIR, Axis.solo(), inputs=X)
        assert said in str(caught.value)


@pytest.mark.parametrize("name", WRONG)
def test_the_same_model_is_right_by_watching(name: str, pool: Pool) -> None:
    """What the message says as the way out."""
    whole = WRONG[name][0]().double().eval()
    x = X.double()

    def step(model: nn.Module) -> Tensor:
        y = model(x)
        y = y.whole() if hasattr(y, "whole") else y
        y.square().sum().backward()
        return y.detach()

    truth = step(whole)
    plain = copy.deepcopy(whole)
    plain.zero_grad()

    def run(axis: Axis) -> tuple[Tensor, dict[str, Tensor]]:
        model = parallelize(copy.deepcopy(plain), None, axis, inputs=x)
        y = step(model)
        whole_parts = {
            own: value.grad
            for own, value in model.named_parameters()
            if value.shape == dict(whole.named_parameters())[own].shape
        }
        return y, whole_parts

    for y, grads in pool(2, "threads").run(run):
        torch.testing.assert_close(y, truth, rtol=1e-9, atol=1e-9)
        for own, grad in grads.items():
            torch.testing.assert_close(
                grad, dict(whole.named_parameters())[own].grad, rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_has_one_set_of_bits(name: str, pool: Pool) -> None:
    torch.manual_seed(1)
    whole = RIGHT[name]()
    plain = copy.deepcopy(whole)
    truth = plain(X)
    truth.square().sum().backward()

    def run(axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
        model: Any = parallelize(copy.deepcopy(whole), PAIR, axis, inputs=X)
        x = X.clone().requires_grad_()
        model(X)
        y = model(x)
        y.square().sum().backward()
        return y.detach(), x.grad, model.down.bias.grad

    (one,) = pool(1, "threads").run(run)
    torch.testing.assert_close(one[0], truth.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one[2], plain.down.bias.grad, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    for degree in (2, 3):
        for other in pool(degree, "threads").run(run):
            assert all(map(torch.equal, one, other))


class Tied(nn.Module):
    """The weight of an embedding, or of a head, is used by a function."""

    def __init__(self, *, loss: bool) -> None:
        super().__init__()
        self.emb, self.body, self.loss = nn.Embedding(24, 8), nn.Linear(8, 8), loss

    def forward(self, ids: Tensor) -> Tensor:
        logits = F.linear(self.body(self.emb(ids)), self.emb.weight)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten()) if self.loss else logits


@pytest.mark.parametrize("loss", [False, True])
def test_a_cut_weight_that_other_code_reads(loss: bool) -> None:
    ids = torch.arange(6).view(2, 3)
    said = "'emb.weight' is cut, and the code of the model itself uses it too"
    with pytest.raises(PlanError, match=said):
        plan(Tied(loss=loss), {"emb": "embedding_rowwise"}, degree=2, inputs=ids)
    with pytest.raises(PlanError, match=said):
        parallelize(Tied(loss=loss), {"emb": "embedding_rowwise"}, Axis.solo(), inputs=ids)


def test_a_draw_of_the_models_own_is_keyed(pool: Pool) -> None:
    class Drops(Between):
        def forward(self, x: Tensor) -> Any:
            return F.dropout(super().forward(x), 0.5, self.training)

    whole = Drops(lambda self, x: F.silu(x))

    def run(axis: Axis) -> Tensor:
        model = parallelize(copy.deepcopy(whole), PAIR, axis, inputs=X)
        return torch.stack([model(X).detach(), model(X).detach()])

    (one,) = pool(1, "threads").run(run)
    assert 20 < int((one == 0).sum()) < 124
    assert not torch.equal(one[0], one[1])
    for other in pool(3, "threads").run(run):
        assert torch.equal(other, one)
