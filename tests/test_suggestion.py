"""What a message suggests for a model without a plan was tried: copied, it is right."""

import copy
import json
import re
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
from shardproof.plans.suggestion import suggestion


class SelfAttention(nn.Module):
    """As nanoGPT has it: one linear for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (
            each.view(shape).transpose(1, 2) for each in self.c_attn(x).split(x.shape[2], dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(y.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 3 * width + 1), nn.Linear(3 * width + 1, width)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(x))))
        return y


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = SelfAttention(width, 2), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class NanoGPT(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(31, width),
                "h": nn.ModuleList(Block(width) for _ in range(2)),
            }
        )
        self.lm_head = nn.Linear(width, 31, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids)
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x)
        y: Tensor = self.lm_head(x)
        return y


def entries_in(message: str) -> dict[str, str]:
    found = re.search(r"\{.*?\}", message)
    assert found is not None
    entries: dict[str, str] = json.loads(found[0])
    return entries


def said(model: nn.Module, degree: int = 2) -> str:
    with pytest.raises(PlanError) as caught:
        plan(model, degree=degree)
    return str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_nano_gpt_is_told_what_can_be_copied(device: str) -> None:
    model = NanoGPT().to(device)
    assert entries_in(said(model)) == {
        "transformer.h.*.mlp.c_fc": "colwise",
        "transformer.h.*.mlp.c_proj": "rowwise",
    }
    with pytest.raises(PlanError, match=r"which was tried"):
        parallelize(model, None, Axis.solo())


def test_what_is_suggested_is_right_at_every_degree(pool: Pool) -> None:
    torch.manual_seed(0)
    whole, ids = NanoGPT(), torch.arange(20).view(2, 10)
    entries = entries_in(said(whole))
    truth = whole(ids)
    truth.square().sum().backward()

    def run(axis: Axis) -> tuple[Tensor, Tensor]:
        model = parallelize(copy.deepcopy(whole), entries, axis)
        y = model(ids)
        y.square().sum().backward()
        return y.detach(), model.transformer["wte"].weight.grad

    ((one, grad),) = pool(1, "threads").run(run)
    torch.testing.assert_close(one, truth.detach(), rtol=1e-4, atol=1e-5)
    embedding: Any = whole.transformer["wte"]
    torch.testing.assert_close(grad, embedding.weight.grad, rtol=1e-4, atol=1e-4)
    for degree in (2, 3, 8):
        for y, other in pool(degree, "threads").run(run):
            assert torch.equal(y, one)
            assert torch.equal(other, grad)


class Between(nn.Module):
    """Two linears with something in between, or behind."""

    def __init__(
        self,
        between: Callable[..., Tensor],
        after: Callable[[Tensor, Tensor], Any] = lambda y, hidden: y,
        **modules: nn.Module,
    ) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 36), nn.Linear(36, 12)
        self.between, self.after = between, after
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        hidden = self.up(x)
        return self.after(self.down(self.between(self, hidden)), hidden)


PAIR = {"up": "colwise", "down": "rowwise"}
SERVED: dict[str, Callable[[], nn.Module]] = {
    "an activation": lambda: Between(lambda self, x: torch.tanh(x)),
    "nothing": lambda: Between(lambda self, x: x),
    "dropout that is a module": lambda: Between(lambda self, x: self.drop(x), drop=nn.Dropout(0.4)),
    "a residual around": lambda: Between(lambda self, x: x.relu(), lambda y, hidden: y + 1),
}
NOT: dict[str, Callable[[], nn.Module]] = {
    "a norm": lambda: Between(lambda self, x: F.layer_norm(x, x.shape[-1:])),
    "a norm that is a module": lambda: Between(lambda self, x: self.norm(x), norm=nn.LayerNorm(36)),
    "a softmax": lambda: Between(lambda self, x: x.softmax(-1)),
    "halves that change places": lambda: Between(
        lambda self, x: torch.cat([x[..., 18:], x[..., :18]], -1)
    ),
    "heads": lambda: Between(lambda self, x: x.unflatten(2, (-1, 6)).softmax(-1).flatten(2)),
    "a flip": lambda: Between(lambda self, x: x.flip(-1)),
    "a scale by feature": lambda: Between(lambda self, x: x * torch.arange(36.0)),
    "a sum over features": lambda: Between(lambda self, x: x / x.norm()),
    "dropout by function": lambda: Between(lambda self, x: F.dropout(x, 0.5, self.training)),
    "hidden numbers handed on": lambda: Between(lambda self, x: x, lambda y, h: (y, h)),
    "hidden numbers added": lambda: Between(lambda self, x: x, lambda y, h: y + h.sum()),
    "another linear is asked": lambda: Between(lambda self, x: self.up(x.new_ones(2, 3, 12))),
    "what cannot be run": lambda: Between(lambda self, x: self.nothing),
}


@pytest.mark.parametrize("name", SERVED)
def test_pairs_that_can_be_cut_are_found(name: str) -> None:
    model = SERVED[name]()
    assert suggestion(model) == PAIR
    assert suggestion(nn.ModuleDict({"blocks": nn.ModuleList([model, SERVED[name]()])})) == {
        f"blocks.*.{child}": style for child, style in PAIR.items()
    }
    parallelize(model, PAIR, Axis.solo())(torch.ones(2, 3, 12))


@pytest.mark.parametrize("name", NOT)
def test_pairs_that_cannot_be_cut_are_not_suggested(name: str) -> None:
    model = NOT[name]()
    assert suggestion(model) == {}
    message = said(model)
    assert "None of its linears was found, by trying" in message
    assert "colwise" not in message


def test_only_what_holds_in_every_layer_is_suggested() -> None:
    layers = nn.ModuleList([SERVED["an activation"](), NOT["a softmax"]()])
    assert suggestion(nn.ModuleDict({"layers": layers})) == {}


def test_other_kinds_of_linears_are_not_suggested() -> None:
    model = SERVED["an activation"]()
    model.up.register_forward_hook(lambda *_: None)
    assert suggestion(model) == {}
    other = SERVED["an activation"]()
    other.down = nn.Bilinear(36, 36, 12)
    assert suggestion(other) == {}


def test_gated_and_chained_linears() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = (
                nn.Linear(12, 36), nn.Linear(12, 36), nn.Linear(36, 12),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.gate(x).sigmoid() * self.up(x))
            return y

    assert suggestion(Gated()) == {"gate": "colwise", "up": "colwise", "down": "rowwise"}
    chain = nn.Sequential(
        nn.Linear(12, 36), nn.ReLU(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 36), nn.Tanh(),
        nn.Linear(36, 12),
    )  # fmt: skip
    # The names of both pairs differ in numbers alone, and so no pattern names one of them.
    assert suggestion(chain) == {}


def test_trying_leaves_nothing_behind() -> None:
    model = NOT["dropout by function"]()
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    model.eval()
    suggestion(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_suggestion_that_the_plan_would_refuse_is_not_made() -> None:
    """The weight of one of the pair is tied to something that stays whole."""
    model = SERVED["an activation"]()
    model.other = nn.Linear(36, 12)
    model.other.weight = model.down.weight
    assert "None of its linears was found" in said(model)
