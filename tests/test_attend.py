"""A child that attends is tried before ours takes its place: it computes the same or is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from places import Pool
from shardproof.axis import Axis
from shardproof.errors import PlanError, UsageError
from shardproof.layers.attention import HeadAttention
from shardproof.plans import attention_check
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.plans.planning import plan
from shardproof.plans.style import Attention

HEADS, KEYS, DIM = 4, 2, 6
STYLE = Attention(HEADS, KEYS, DIM, attend="attend")
sdpa = F.scaled_dot_product_attention


class Parent(nn.Module):
    """An attention module that calls its child with heads as they come, and `options`."""

    def __init__(self, attend: nn.Module, keys: int = KEYS, **options: Any) -> None:
        super().__init__()
        hidden = HEADS * DIM
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj, self.v_proj = nn.Linear(hidden, keys * DIM), nn.Linear(hidden, keys * DIM)
        self.o_proj = nn.Linear(hidden, hidden)
        self.attend = attend
        self.options = options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(each(x)) for each in (self.q_proj, self.k_proj, self.v_proj))
        y: Tensor = self.call(q, k, v, mask)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def call(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        return self.attend(q, k, v, **self.options)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, DIM)).transpose(1, 2)


class Masked(Parent):
    def call(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        return self.attend(q, k, v, mask=mask, **self.options)


class Positional(Parent):
    def call(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        return self.attend(q, k, v, mask)


class TokensFirst(Parent):
    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, DIM))


class Model(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y: Tensor = self.attention(x, **options)
        return y


class Child(nn.Module):
    """Computes what `function` does; attributes are what a test gives it."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return self.function(self, q, k, v, **options)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    bend: Callable[[Tensor], Tensor] = lambda scores: scores,
    drop: Callable[[Tensor], Tensor] = lambda weights: weights,
    repeat: Callable[[Tensor], Tensor] = lambda x: x.repeat_interleave(HEADS // KEYS, 1),
) -> Tensor:
    """Causal attention step by step."""
    k, v = repeat(k), repeat(v)
    scores = bend(q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale))
    length = q.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return drop(scores.masked_fill(later, -torch.inf).softmax(-1)) @ v


def distances(scores: Tensor) -> Tensor:
    places = torch.arange(scores.shape[3], dtype=scores.dtype)
    return places - places[:, None]


def causal(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


# -- right -----------------------------------------------------------------------------------------

RIGHT: dict[str, Callable[[], nn.Module]] = {
    "is_causal in its code": lambda: Parent(Child(causal)),
    "is_causal in its code, and an attribute that says otherwise": lambda: Parent(
        Child(causal, is_causal=False)
    ),
    "an attribute": lambda: Parent(
        Child(
            lambda self, q, k, v: sdpa(q, k, v, is_causal=self.is_causal, enable_gqa=True),
            is_causal=True,
        )
    ),
    "not causal": lambda: Parent(Child(lambda self, q, k, v: sdpa(q, k, v, enable_gqa=True))),
    "step by step": lambda: Parent(Child(lambda self, q, k, v: by_hand(q, k, v))),
    "in fp64 inside": lambda: Parent(
        Child(lambda self, q, k, v: by_hand(q.double(), k.double(), v.double()).to(q.dtype))
    ),
    "the default scale, written": lambda: Parent(
        Child(lambda self, q, k, v: by_hand(q, k, v, scale=DIM**-0.5))
    ),
    "a mask in a buffer": lambda: Parent(
        Child(
            lambda self, q, k, v: masked(q, k, v, self.seen[: q.shape[2], : q.shape[2]]),
            seen=torch.ones(600, 600, dtype=torch.bool).tril(),
        )
    ),
    "is_causal of the call": lambda: Parent(
        Child(lambda self, q, k, v, is_causal: sdpa(q, k, v, is_causal=is_causal, enable_gqa=True)),
        is_causal=True,
    ),
    "a scale of the call": lambda: Parent(
        Child(lambda self, q, k, v, scale: by_hand(q, k, v, scale=scale)), scale=0.3
    ),
    "a softcap of the call": lambda: Parent(
        Child(
            lambda self, q, k, v, softcap: by_hand(
                q, k, v, bend=lambda s: softcap * (s / softcap).tanh()
            )
        ),
        softcap=2.0,
    ),
    "transposed memory": lambda: Parent(
        Child(
            lambda self, q, k, v: causal(self, q, k, v).transpose(1, 2).contiguous().transpose(1, 2)
        )
    ),
}


def answers(axis: Axis, whole: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    model = copy.deepcopy(whole)
    if axis.size:
        model = parallelize(model, {"attention": STYLE}, axis)
    x = x.clone().requires_grad_()
    y = model(x, **options)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


@pytest.mark.parametrize("name", RIGHT)
def test_a_child_that_computes_the_same_is_replaced(name: str, pool: Pool) -> None:
    torch.manual_seed(1)
    whole = Model(RIGHT[name]())
    x = torch.randn(2, 9, HEADS * DIM)
    y = whole(x.requires_grad_())
    y.square().sum().backward()
    ((one, grad),) = pool(1, "threads").run(lambda axis: answers(axis, whole, x.detach()))
    torch.testing.assert_close(one, y.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-5)
    for ours, theirs in pool(3, "threads").run(lambda axis: answers(axis, whole, x.detach())):
        assert torch.equal(ours, one)
        assert torch.equal(theirs, grad)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_that_the_parent_hands_on(dtype: torch.dtype, pool: Pool) -> None:
    whole = Model(
        Masked(
            Child(
                lambda self, q, k, v, mask=None: sdpa(q, k, v, attn_mask=mask, enable_gqa=True),
            )
        )
    )
    x = torch.randn(2, 9, HEADS * DIM)
    numbers = torch.randn(2, 1, 9, 9)
    mask = (numbers > 0) | torch.eye(9, dtype=torch.bool) if dtype == torch.bool else numbers
    for given in (None, mask):
        ((one, _),) = pool(1, "threads").run(lambda axis, m=given: answers(axis, whole, x, mask=m))
        torch.testing.assert_close(one, whole(x, mask=given).detach(), rtol=1e-4, atol=1e-6)
        assert torch.equal(
            pool(3, "threads").run(lambda axis, m=given: answers(axis, whole, x, mask=m))[1][0], one
        )


# -- refused ---------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a scale": (
        lambda: Parent(Child(lambda self, q, k, v: by_hand(q, k, v, scale=1.0))),
        r"tried on small numbers, its outputs differ by up to [\d.]+ of [\d.]+\.",
    ),
    "a scale that is nearly right": (
        lambda: Parent(Child(lambda self, q, k, v: by_hand(q, k, v, scale=1.002 * DIM**-0.5))),
        r"its outputs differ",
    ),
    "a softcap": (
        lambda: Parent(
            Child(lambda self, q, k, v: by_hand(q, k, v, bend=lambda s: 50 * (s / 50).tanh()))
        ),
        r"its outputs differ",
    ),
    "ALiBi": (
        lambda: Parent(
            Child(lambda self, q, k, v: by_hand(q, k, v, bend=lambda s: s + distances(s) * 2**-8))
        ),
        r"its outputs differ",
    ),
    "a bias in a buffer": (
        lambda: Parent(
            Child(
                lambda self, q, k, v: by_hand(q, k, v, bend=lambda s: s + self.bias[: s.shape[3]]),
                bias=torch.arange(600.0).cos() * 0.01,
            )
        ),
        r"its outputs differ",
    ),
    "a window of 100 in its code": (
        lambda: Parent(
            Child(
                lambda self, q, k, v: by_hand(
                    q, k, v, bend=lambda s: s.masked_fill(distances(s) <= -100, -torch.inf)
                )
            )
        ),
        r"its outputs differ",
    ),
    "a window of 700 that it names": (
        lambda: Parent(
            Child(
                lambda self, q, k, v: by_hand(
                    q, k, v, bend=lambda s: s.masked_fill(distances(s) <= -self.window, -torch.inf)
                ),
                window=700,
            )
        ),
        r"its outputs differ",
    ),
    "a window that cannot be tried": (
        lambda: Parent(Child(causal, sliding_window=8192)),
        r"has sliding_window=8192, too many tokens to be tried",
    ),
    "norms of queries and keys": (
        lambda: Parent(
            Child(lambda self, q, k, v: by_hand(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v))
        ),
        r"its outputs differ",
    ),
    "a gradient of its own": (
        lambda: Parent(Child(lambda self, q, k, v: by_hand(q, k.detach(), v))),
        r"its gradients of k differ",
    ),
    "no gradient at all": (
        lambda: Parent(Child(lambda self, q, k, v: by_hand(q, k, v).detach())),
        r"gives outputs without a gradient",
    ),
    "a sink": (
        lambda: Parent(
            Child(lambda self, q, k, v: by_hand(q, k, v, drop=lambda w: w / (1 + 0.01 * w.sum())))
        ),
        r"its outputs differ",
    ),
    "heads in another order": (
        lambda: Parent(
            Child(lambda self, q, k, v: by_hand(q, k, v, repeat=lambda x: x.repeat(1, 2, 1, 1)))
        ),
        r"its outputs differ",
    ),
    "bf16 inside": (
        lambda: Parent(
            Child(lambda self, q, k, v: by_hand(q.bfloat16(), k.bfloat16(), v.bfloat16()).float())
        ),
        r"its outputs differ",
    ),
    "another layout": (
        lambda: Parent(Child(lambda self, q, k, v: by_hand(q, k, v).transpose(1, 2))),
        r"gives shape \(2, 7, 4, 6\) for q of shape \(2, 4, 7, 6\), and .* gives \(2, 4, 7, 6\)",
    ),
    "a tuple": (
        lambda: Parent(Child(lambda self, q, k, v: (by_hand(q, k, v), None))),
        r"gives a tuple, and shardproof's gives one tensor",
    ),
    "weights": (
        lambda: Parent(Child(causal, slopes=nn.Parameter(torch.ones(4)))),
        r"has weights of its own, slopes, which would be lost",
    ),
    "numbers that change": (
        lambda: Parent(Child(lambda self, q, k, v: by_hand(q, k, v) * (1 + torch.rand(()) * 1e-6))),
        r"gives other numbers when it is called again, in evaluation",
    ),
    "a mask that it ignores": (
        lambda: Masked(Child(lambda self, q, k, v, mask=None: masked(q, k, v, None))),
        r"with a mask, its outputs differ",
    ),
    "a mask that means the opposite": (
        lambda: Masked(
            Child(
                lambda self, q, k, v, mask=None: masked(
                    q, k, v, None if mask is None else ~mask if mask.dtype == torch.bool else -mask
                )
            )
        ),
        r"with a mask, its outputs differ",
    ),
    "a mask by position": (
        lambda: Positional(Child(lambda self, q, k, v: by_hand(q, k, v))),
        r"is called by its parent as shardproof's cannot be \(too many positional arguments\)",
    ),
    "a keyword of its own": (
        lambda: Parent(Child(lambda self, q, k, v, window: by_hand(q, k, v)), window=3),
        r"as shardproof's cannot be \(got an unexpected keyword argument 'window'\)",
    ),
    "tokens before heads": (
        lambda: TokensFirst(
            Child(lambda self, q, k, v: by_hand(*(x.transpose(1, 2) for x in (q, k, v))))
        ),
        r"is given q, k and v of shapes \(1, 9, 4, 6\), \(1, 9, 2, 6\), \(1, 9, 2, 6\) for 9 "
        r"tokens, and shardproof's takes \(batch, heads, length, head_dim\)",
    ),
    "dropout that it does not name": (
        lambda: Parent(
            Child(
                lambda self, q, k, v: by_hand(
                    q, k, v, drop=lambda w: F.dropout(w, self.p, self.training)
                ),
                p=0.1,
            )
        ),
        r"computes something else in training, and has no attribute `dropout`",
    ),
    "dropout that it names and does not do": (
        lambda: Parent(Child(causal, dropout=0.1)),
        r"says that it drops 0.1 of the attention weights, and in training it drops 0 of them",
    ),
    "another dropout": (
        lambda: Parent(
            Child(
                lambda self, q, k, v: by_hand(
                    q, k, v, drop=lambda w: F.dropout(w, 0.3, self.training)
                ),
                dropout=0.1,
            )
        ),
        r"says that it drops 0.1 of the attention weights, and in training it drops 0\.\d+ of",
    ),
    "dropout of its outputs": (
        lambda: Parent(
            Child(
                lambda self, q, k, v: F.dropout(by_hand(q, k, v), self.dropout, self.training),
                dropout=0.2,
            )
        ),
        r"says that it drops 0.2",
    ),
    "something else in training": (
        lambda: Parent(Child(lambda self, q, k, v: by_hand(q, k, v) * (2 if self.training else 1))),
        r"computes something else in training",
    ),
    "what cannot be run": (
        lambda: Parent(Child(lambda self, q, k, v: self.nothing)),
        r"cannot be tried: it raises AttributeError",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_child_that_computes_something_else_is_refused(name: str) -> None:
    make, said = WRONG[name]
    model = Model(make())
    with pytest.raises(PlanError, match=said) as caught:
        parallelize(model, {"attention": STYLE}, Axis.solo())
    assert "module 'attention.attend' (Child) " in str(caught.value)
    assert "or leave 'attention' out of the plan" in str(caught.value)
    assert type(model.attention.q_proj) is nn.Linear  # nothing was changed
    with pytest.raises(PlanError, match=said):
        plan(model, {"attention": STYLE}, degree=2)


def test_every_rank_refuses(pool: Pool) -> None:
    model = Model(WRONG["a softcap"][0]())

    def alike(axis: Axis) -> str:
        with pytest.raises(PlanError) as caught:
            parallelize(copy.deepcopy(model), {"attention": STYLE}, axis)
        return str(caught.value)

    assert len(set(pool(3, "threads").run(alike))) == 1


# -- what a trial leaves behind --------------------------------------------------------------------


def dropping(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    self.calls.add_(1)
    p = self.dropout if isinstance(self.dropout, float) else self.dropout.p
    return by_hand(q, k, v, drop=lambda w: F.dropout(w, p, self.training))


@pytest.mark.parametrize("dropout", [0.25, nn.Dropout(0.25)])
def test_a_trial_leaves_nothing_behind(dropout: Any, pool: Pool) -> None:
    child = Child(dropping, calls=torch.zeros(()), dropout=dropout)
    model = Model(Parent(child))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    plan(model, {"attention": STYLE}, degree=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert child.calls == 0
    assert child.training
    assert model.attention.q_proj.weight.grad is None

    def run(axis: Axis) -> tuple[float, bool]:
        cut = parallelize(copy.deepcopy(model), {"attention": STYLE}, axis)
        ours = cut.attention.attend
        return ours.dropout, ours.training

    torch.manual_seed(7)
    assert pool(3, "threads").run(run) == [(0.25, True)] * 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trial_is_apart_from_the_callers_contexts() -> None:
    model = Model(RIGHT["step by step"]())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plan(model, {"attention": STYLE}, degree=2)
    with torch.inference_mode(), torch.device("meta"):
        plan(model, {"attention": STYLE}, degree=2)


def test_a_child_on_the_meta_device_is_tried_elsewhere(pool: Pool) -> None:
    with torch.device("meta"):
        model = Model(RIGHT["is_causal in its code"]())

    def run(axis: Axis) -> tuple[bool, Tensor]:
        cut = initialize(parallelize(copy.deepcopy(model), {"attention": STYLE}, axis))
        return cut.attention.attend.is_causal, cut(torch.ones(1, 5, HEADS * DIM)).detach()

    ((is_causal, one),) = pool(1, "threads").run(run)
    assert is_causal
    assert torch.equal(pool(3, "threads").run(run)[2][1], one)
    with torch.device("meta"):
        wrong = Model(WRONG["a scale"][0]())
        buffered = Model(RIGHT["a mask in a buffer"]())
    with pytest.raises(PlanError, match=r"its outputs differ"):
        plan(wrong, {"attention": STYLE}, degree=2)
    with pytest.raises(PlanError, match=r"has seen on the meta device, so that it cannot be tried"):
        plan(buffered.to("meta"), {"attention": STYLE}, degree=2)


def test_more_keys_than_queries_were_not_compared() -> None:
    model = Model(RIGHT["is_causal in its code"]())
    ours = parallelize(model, {"attention": STYLE}, Axis.solo()).attention.attend
    assert isinstance(ours, HeadAttention)
    q, k = torch.ones(1, HEADS, 2, DIM), torch.ones(1, KEYS, 5, DIM)
    with pytest.raises(UsageError, match=r"2 queries and 5 keys, with is_causal=True"):
        ours(q, k, k)
    seen = torch.ones(2, 5, dtype=torch.bool).tril(3)
    ours(q, k, k, mask=seen, is_causal=False)  # what the message advises


def test_what_the_message_advises_is_served(pool: Pool) -> None:
    """A scale of one's own stands before the child."""

    class Scaled(Parent):
        def call(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
            return self.attend(q * (0.2 * DIM**0.5), k, v)

    whole = Model(Scaled(Child(causal)))
    x = torch.randn(2, 5, HEADS * DIM)
    other = copy.deepcopy(whole)
    other.attention = Parent(Child(lambda self, q, k, v: by_hand(q, k, v, scale=0.2)))
    other.load_state_dict(whole.state_dict())
    ((one, _),) = pool(1, "threads").run(lambda axis: answers(axis, whole, x))
    torch.testing.assert_close(one, other(x).detach(), rtol=1e-4, atol=1e-6)


class Plain(nn.Module):
    """A child with numbers alone, which is what most have."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_hand(q, k, v, scale=self.scale)


def test_children_that_are_alike_are_tried_once_and_others_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []
    run = attention_check._run
    monkeypatch.setattr(attention_check, "_run", lambda *args: tried.append(args) or run(*args))

    def model(*scales: float | None) -> nn.Module:
        return nn.ModuleDict({"blocks": nn.ModuleList(Parent(Plain(scale)) for scale in scales)})

    plan(model(None), {"blocks.*": STYLE}, degree=2)
    once = len(tried)
    plan(model(*[None] * 5), {"blocks.*": STYLE}, degree=2)
    assert len(tried) == 2 * once
    with pytest.raises(PlanError, match=r"module 'blocks.3.attend' .* its outputs differ"):
        plan(model(None, None, DIM**-0.5, 0.2), {"blocks.*": STYLE}, degree=2)
