"""What stands between two cut layers: never a wrong number in silence."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import shardproof as sp
from between import (
    BATCH,
    HIDDEN,
    IN,
    LENGTH,
    Between,
    check,
    check_runs,
    cut_alike,
    forced,
    run,
    run_by_names,
    watched,
)
from shardproof.errors import PlanError, UsageError
from shardproof.units import Block

HALF = HIDDEN // 2
Make = Callable[[], nn.Module]


def _of(middle: Any, parts: Any = None, width: int | None = HIDDEN) -> Make:
    return partial(Between, middle, parts, width)


def _module(make: Callable[[], nn.Module], width: int | None = HIDDEN) -> Make:
    """A module between the two."""
    return _of(lambda m, h: m.part(h), lambda: {"part": make()}, width)


def _scale(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"scale": nn.Parameter(torch.randn(shape))}


def _targets() -> Tensor:
    return torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) * 5 % HIDDEN


def _mask(*shape: int) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()) * 7 % 3 == 0).reshape(shape)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 3 * x * x


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum((0, 1))


def _gate(m: Any, h: Tensor) -> Tensor:
    one, two = h.chunk(2, dim=-1)
    return F.silu(one) * two


def _prelu_of_rows(m: Any, h: Tensor) -> Tensor:
    return m.part(h.view(-1, HIDDEN)).view(h.shape)


def _in_place_slice(m: Any, h: Tensor) -> Tensor:
    h = h * 1.0
    h[..., 3:9] = 0.5
    h[:, 0] = 2.0
    return h


def _in_place_half(m: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h[..., :HALF] += h[..., HALF:]
    return h


def _filled(m: Any, h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y[..., ::2] = h[..., 1::2]
    return y


def _filled_whole(m: Any, h: Tensor) -> Tensor:
    y = torch.zeros(BATCH, LENGTH, HIDDEN, dtype=h.dtype)
    y[:, 1:] = h[:, :-1]
    return y


def _negative_zero(m: Any, h: Tensor) -> Tensor:
    h = h + 0
    h[h < 0] = 0.1
    return h


def _mul_in_place(m: Any, h: Tensor) -> Tensor:
    h = h + 0
    h.mul_(m.scale).add_(1.0)
    return h.clamp_(-1, 2)


def _product_in_place(m: Any, h: Tensor) -> Tensor:
    heads = h.view(BATCH, LENGTH, 4, 6).transpose(1, 2)
    scores = heads @ heads.transpose(-2, -1)
    scores += 1
    return (scores.softmax(-1) @ heads).transpose(1, 2).reshape(h.shape)


def _hooked(m: Any, h: Tensor) -> Tensor:
    h = h * 2
    if h.requires_grad:  # the planner watches without gradients
        h.register_hook(lambda grad: grad * 3)
    return h.tanh()


def _twice(m: Any, h: Tensor) -> Tensor:
    return h * m.up(torch.tanh(h) @ m.fold)


def _tied(m: Any, h: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, m.part.weight).flatten(0, 1), _targets().flatten())


def _loss(m: Any, h: Tensor, **options: Any) -> Tensor:
    loss = F.cross_entropy(h.view(-1, h.size(-1)), _targets().view(-1), **options)
    return loss if loss.dim() == 0 else loss.square().sum()


def _loss_ignored(m: Any, h: Tensor) -> Tensor:
    target = _targets()
    target[:, :2] = -100
    return F.cross_entropy(h.flatten(0, 1), target.flatten(), label_smoothing=0.2)


def _loss_weighted(m: Any, h: Tensor) -> Tensor:
    weight = torch.arange(1, HIDDEN + 1, dtype=h.dtype) / HIDDEN
    return nn.CrossEntropyLoss(weight, label_smoothing=0.1)(h.transpose(1, 2), _targets())


def _nll(m: Any, h: Tensor, **options: Any) -> Tensor:
    logp = F.log_softmax(h, dim=-1)
    return F.nll_loss(logp.view(-1, HIDDEN), _targets().view(-1), **options)


def _policy(m: Any, h: Tensor) -> Tensor:
    logp = h.log_softmax(-1)
    return -(logp.gather(-1, _targets()[..., None]).squeeze(-1) * 0.3).mean()


def _soft_targets(m: Any, h: Tensor) -> Tensor:
    shares = torch.ones(BATCH, LENGTH, HIDDEN, dtype=h.dtype).cumsum(-1).softmax(-1)
    return F.cross_entropy(h.transpose(1, 2), shares.transpose(1, 2), label_smoothing=0.1)


def _distilled(m: Any, h: Tensor) -> Tensor:
    shares = torch.ones(BATCH, LENGTH, HIDDEN, dtype=h.dtype).cumsum(-1).softmax(-1)
    return F.kl_div(h.log_softmax(-1), shares, reduction="batchmean")


def _z_loss(m: Any, h: Tensor) -> Tensor:
    return _loss(m, h) + 1e-2 * h.logsumexp(-1).square().mean()


def _functional(m: Any, h: Tensor) -> Tensor:
    weight = m.up.weight * torch.sigmoid(m.up.weight)
    return h + F.linear(torch.ones(LENGTH, IN, dtype=h.dtype), weight, m.up.bias)


def _called(m: Any, h: Tensor) -> Tensor:
    given = {name: each * 1.5 for name, each in m.up.named_parameters()}
    return h + torch.func.functional_call(m.up, given, (torch.ones(LENGTH, IN, dtype=h.dtype),))


def _normed_weight(m: Any, h: Tensor) -> Tensor:
    weight = m.up.weight / m.up.weight.norm(dim=1, keepdim=True)
    return h * F.linear(torch.ones(IN, dtype=h.dtype), weight)


def _penalty(m: Any, h: Tensor) -> Tensor:
    return h + 1e-2 * m.up.weight.pow(2).sum() + m.up.weight.abs().mean()


def _transposed_weight(m: Any, h: Tensor) -> Tensor:
    return h @ m.up.weight


def _checkpointed(m: Any, h: Tensor, *, reentrant: bool) -> Tensor:
    return checkpoint(lambda x: F.silu(x) * torch.tanh(x), h, use_reentrant=reentrant)


def _whole_block(m: Any, h: Tensor, *, reentrant: bool) -> Tensor:
    given = torch.ones(BATCH, LENGTH, IN, dtype=h.dtype).requires_grad_()
    return h + checkpoint(lambda x: F.gelu(m.up(x)), given, use_reentrant=reentrant)


def _with_no_grad(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.abs().amax(dim=-1, keepdim=True) + h.mean()
    return h / scale + h.detach()


def _chosen(m: Any, h: Tensor) -> Tensor:
    if (h > 1e9).any() or float(h.detach().sum()) > 1e9 or h.shape[-1] != HIDDEN:
        return h
    return h * (h > 0).float().mean().item()


def _gathered_features(m: Any, h: Tensor) -> Tensor:
    index = (torch.arange(HIDDEN) * 5 % HIDDEN).expand(BATCH, LENGTH, HIDDEN)
    return h.gather(-1, index) + torch.take_along_dim(h, h.argsort(-1), -1)


def _list_of_features(m: Any, h: Tensor) -> Tensor:
    return h[..., [3, 1, 20, 5]]


def _groups(m: Any, h: Tensor) -> Tensor:
    return m.part(h.transpose(1, 2)).transpose(1, 2)


def _outer(m: Any, h: Tensor) -> Tensor:
    return torch.einsum("bti,btj->btij", h, h).sum(-1)


def _topk(m: Any, h: Tensor) -> Tensor:
    values, index = h.topk(6, dim=-1)
    return torch.zeros_like(h).scatter(-1, index, values.softmax(-1))


# Those that the planner of before got wrong without a word.
SILENT: dict[str, Make] = {
    "glu": _module(lambda: nn.GLU(-1), HALF),
    "chunk": _of(_gate, None, HALF),
    "softmax": _module(lambda: nn.Softmax(-1)),
    "prelu": _of(_prelu_of_rows, lambda: {"part": nn.PReLU(HIDDEN)}),
    "learned scale": _of(lambda m, h: h * m.scale, _scale(HIDDEN)),
    "tied head": _of(_tied, lambda: {"part": nn.Embedding(31, HIDDEN)}, None),
    "loss of a cut head": _of(_loss, None, None),
    "loss smoothed": _of(partial(_loss, label_smoothing=0.1), None, None),
    "loss ignored": _of(_loss_ignored, None, None),
    "loss of log-probabilities": _of(_nll, None, None),
    "silu": _of(lambda m, h: F.silu(h)),
}

NEIGHBOURS: dict[str, Make] = {
    # losses
    "loss sum": _of(partial(_loss, reduction="sum"), None, None),
    "loss none": _of(partial(_loss, reduction="none"), None, None),
    "loss weighted": _of(_loss_weighted, None, None),
    "nll sum": _of(partial(_nll, reduction="sum", ignore_index=5), None, None),
    "nll weighted": _of(
        lambda m, h: _nll(m, h, weight=m.scale.detach().abs()), _scale(HIDDEN), None
    ),
    "policy gradient": _of(_policy, None, None),
    "soft targets": _of(_soft_targets, None, None),
    "kl": _of(_distilled, None, None),
    "z loss": _of(_z_loss, None, None),
    "mse": _of(
        lambda m, h: F.mse_loss(h, torch.ones(HIDDEN, dtype=h.dtype).expand(h.shape)), None, None
    ),
    "bce": _of(lambda m, h: F.binary_cross_entropy_with_logits(h, torch.zeros_like(h)), None, None),
    "smooth l1": _of(lambda m, h: F.smooth_l1_loss(h, h.detach() * 0.5), None, None),
    # activations
    "one prelu": _module(nn.PReLU),
    "gelu tanh": _of(lambda m, h: F.gelu(h, approximate="tanh")),
    "mish": _of(lambda m, h: F.mish(h)),
    "elu in place": _of(lambda m, h: F.elu(h * 1, inplace=True)),
    "softplus": _module(nn.Softplus),
    "scalar scale": _of(lambda m, h: h * m.scale, _scale()),
    "scale by place": _of(lambda m, h: h * m.scale, _scale(LENGTH, 1)),
    "bilinear gate": _of(lambda m, h: h * torch.sigmoid(h @ m.scale), _scale(HIDDEN, HIDDEN)),
    # reductions
    "mean of features": _of(lambda m, h: h - h.mean(-1, keepdim=True)),
    "sum of all": _of(lambda m, h: h * h.sum()),
    "mean of places": _of(lambda m, h: h.mean(1)),
    "mean of both": _of(lambda m, h: h / h.abs().mean((1, 2), keepdim=True)),
    "largest feature": _of(lambda m, h: h / h.max(-1, keepdim=True).values),
    "amax": _of(lambda m, h: h - h.amax(-1, keepdim=True)),
    "var": _of(lambda m, h: h / h.var(-1, keepdim=True)),
    "std unbiased": _of(lambda m, h: h / h.std(dim=-1, keepdim=True, unbiased=False)),
    "norm": _of(lambda m, h: h / h.norm(dim=-1, keepdim=True)),
    "normalize": _of(lambda m, h: F.normalize(h, dim=-1)),
    "prod": _of(lambda m, h: h + h.prod(1, keepdim=True)),
    "logsumexp": _of(lambda m, h: h - h.logsumexp(-1, keepdim=True)),
    "median": _of(lambda m, h: h - h.median(-1, keepdim=True).values),
    "cosine": _of(lambda m, h: h * F.cosine_similarity(h, h.roll(1, 1), dim=-1)[..., None]),
    # shapes
    "rows of places": _of(lambda m, h: h.reshape(BATCH, -1).view(BATCH, HIDDEN, LENGTH).mT),
    "mixed": _of(lambda m, h: h.transpose(1, 2).reshape(BATCH, LENGTH, HIDDEN)),
    "flat": _of(lambda m, h: h.reshape(-1).softmax(0).view(h.shape)),
    "heads": _of(_product_in_place),
    "five in a row": _of(lambda m, h: h.reshape(BATCH, 5, 4, 6).sum(2), None, 6),
    "flipped": _of(lambda m, h: h.flip(-1)),
    "rolled": _of(lambda m, h: h.roll(1, -1)),
    "padded": _of(lambda m, h: F.pad(h[..., :-2], (1, 1))),
    "repeated": _of(lambda m, h: h.repeat(1, 1, 2), None, 2 * HIDDEN),
    "interleaved": _of(lambda m, h: h.repeat_interleave(2, -1)[..., ::2]),
    # indexing
    "one feature": _of(lambda m, h: h * h[..., 3:4]),
    "every other": _of(lambda m, h: h[..., ::2], None, HALF),
    "listed": _of(_list_of_features, None, 4),
    "masked rows": _of(lambda m, h: h[_mask(BATCH, LENGTH)]),
    "masked features": _of(lambda m, h: h[..., _mask(HIDDEN)], None, 8),
    "selected": _of(lambda m, h: h.index_select(-1, torch.arange(HIDDEN - 1, -1, -1))),
    "gathered": _of(_gathered_features),
    # written in place
    "slices": _of(_in_place_slice),
    "halves": _of(_in_place_half),
    "filled": _of(_filled),
    "filled whole": _of(_filled_whole),
    "where negative": _of(_negative_zero),
    "scaled in place": _of(_mul_in_place, _scale(HIDDEN)),
    "index_add": _of(
        lambda m, h: torch.zeros_like(h).index_add(1, torch.tensor([0, 0, 1, 3, 3]), h)
    ),
    # functional weights
    "weight computed": _of(_functional),
    "functional call": _of(_called),
    "weight normed": _of(_normed_weight),
    "weight penalised": _of(_penalty),
    "weight read transposed": _of(_transposed_weight, None, IN),
    "used twice": _of(_twice, lambda: {"fold": nn.Parameter(torch.randn(HIDDEN, IN))}),
    "parametrized": _of(
        lambda m, h: h + m.part(torch.ones(IN, dtype=h.dtype)),
        lambda: {"part": parametrizations.weight_norm(nn.Linear(IN, HIDDEN))},
    ),
    # norms and lines
    "layer norm": _module(lambda: nn.LayerNorm(HIDDEN)),
    "rms norm": _module(lambda: nn.RMSNorm(HIDDEN)),
    "group norm": _of(_groups, lambda: {"part": nn.GroupNorm(4, HIDDEN)}),
    "batch norm": _of(_groups, lambda: {"part": nn.BatchNorm1d(HIDDEN)}),
    "instance norm": _of(_groups, lambda: {"part": nn.InstanceNorm1d(HIDDEN, affine=True)}),
    "depthwise": _of(
        _groups, lambda: {"part": nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)}
    ),
    "grouped convolution": _of(
        _groups, lambda: {"part": nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=4)}
    ),
    "grouped convolution to more": _of(
        _groups, lambda: {"part": nn.Conv1d(HIDDEN, 40, 3, padding=1, groups=4, bias=False)}, 40
    ),
    "depthwise to more": _of(
        _groups, lambda: {"part": nn.Conv1d(HIDDEN, 48, 3, padding=1, groups=HIDDEN)}, 48
    ),
    "parametrized convolution": _of(
        _groups,
        lambda: {
            "part": parametrizations.weight_norm(
                nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=4), dim=2
            )
        },
    ),
    "parametrized as one": _of(
        lambda m, h: h + m.part(torch.ones(IN, dtype=h.dtype)),
        lambda: {"part": parametrizations.weight_norm(nn.Linear(IN, HIDDEN), dim=None)},
    ),
    "convolution": _of(_groups, lambda: {"part": nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)}),
    "cumsum": _of(lambda m, h: h.cumsum(-1)),
    "cumsum of places": _of(lambda m, h: h.cumsum(1)),
    "sorted": _of(lambda m, h: h.sort(-1, descending=True).values),
    "topk": _of(_topk),
    "differences": _of(lambda m, h: h.diff(dim=-1, prepend=h[..., :1])),
    # two operands
    "where": _of(lambda m, h: torch.where(h > 0, h, m.scale), _scale(HIDDEN)),
    "masked_fill": _of(
        lambda m, h: h.masked_fill(h < -0.2, -1.0).masked_fill(_mask(LENGTH, 1), 0.5)
    ),
    "masked_fill whole": _of(lambda m, h: h.masked_fill(_mask(HIDDEN), 0.5)),
    "cat of cut and whole": _of(
        lambda m, h: torch.cat([h, m.scale.expand(BATCH, LENGTH, 6)], -1), _scale(6), HIDDEN + 6
    ),
    "cat of places": _of(
        lambda m, h: torch.cat([m.scale.expand(BATCH, 1, HIDDEN), h], 1), _scale(HIDDEN)
    ),
    "cat of halves": _of(lambda m, h: torch.cat([h[..., :HALF], h[..., HALF:]], 1), None, HALF),
    "stacked": _of(lambda m, h: torch.stack([h, h.flip(1)], 1).prod(1)),
    "outer": _of(_outer),
    "cosine with a weight": _of(
        lambda m, h: h * F.cosine_similarity(h, m.scale.expand(h.shape), dim=-1)[..., None],
        _scale(HIDDEN),
    ),
    "tensordot": _of(lambda m, h: torch.tensordot(h, m.scale, ([2], [1])), _scale(7, HIDDEN), 7),
    "tensordot of several": _of(
        lambda m, h: torch.tensordot(m.scale, h, dims=([0, 2], [2, 1])).T[:, None],
        _scale(HIDDEN, 7, LENGTH),
        7,
    ),
    "tensordot of the last": _of(lambda m, h: torch.tensordot(h, m.scale, 1), _scale(HIDDEN, 7), 7),
    "inner": _of(lambda m, h: torch.inner(h, m.scale), _scale(7, HIDDEN), 7),
    "inner of more": _of(lambda m, h: h.inner(m.scale).sum(-1), _scale(7, 3, HIDDEN), 7),
    "diagonal": _of(lambda m, h: h * m.scale.diagonal(), _scale(HIDDEN, HIDDEN)),
    "diagonal beside": _of(
        lambda m, h: h[..., :3] * m.scale.diagonal(21), _scale(HIDDEN, HIDDEN), 3
    ),
    "diagonal below": _of(
        lambda m, h: h[..., :4] * torch.diagonal(m.scale, -20, 1, 2).sum(0),
        _scale(2, HIDDEN, HIDDEN),
        4,
    ),
    "diagonal of features": _of(lambda m, h: h.diagonal(dim1=-1, dim2=1)[:, None], None, LENGTH),
    "diagonal of places": _of(
        lambda m, h: h.unsqueeze(1).expand(-1, 3, -1, -1).diagonal(0, 1, 2).transpose(1, 2)
    ),
    "spectral": _of(
        lambda m, h: h + m.part(torch.ones(IN, dtype=h.dtype)),
        lambda: {"part": parametrizations.spectral_norm(nn.Linear(IN, HIDDEN)).eval()},
    ),
    "bilinear": _of(lambda m, h: F.bilinear(h, h, m.scale), _scale(3, HIDDEN, HIDDEN), 3),
    "cdist": _of(lambda m, h: torch.cdist(h, m.scale), _scale(7, HIDDEN), 7),
    "differentiated": _of(
        lambda m, h: h + torch.autograd.grad(h.sum() * 2, h)[0] if h.requires_grad else h
    ),
    "recurrent": _of(
        lambda m, h: m.part(h)[0], lambda: {"part": nn.GRU(HIDDEN, 6, batch_first=True)}, 6
    ),
    "attention of torch": _of(
        lambda m, h: m.part(h, h, h, need_weights=False)[0],
        lambda: {"part": nn.MultiheadAttention(HIDDEN, 4, batch_first=True)},
    ),
    "trilinear": _of(
        lambda m, h: F.interpolate(h.transpose(1, 2), scale_factor=2.0, mode="linear").mT
    ),
    "unfolded": _of(lambda m, h: h.unfold(1, 3, 1).amax(-1)),
    "fft": _of(lambda m, h: torch.fft.rfft(h, dim=-1).abs(), None, HALF + 1),
    "lerp": _of(lambda m, h: torch.lerp(h, h.flip(1), m.scale.sigmoid()), _scale(HIDDEN)),
    "local response": _of(lambda m, h: F.local_response_norm(h.transpose(1, 2), 3).transpose(1, 2)),
    "pixel shuffle": _of(
        lambda m, h: (
            F.pixel_shuffle(h.mT.reshape(BATCH, HIDDEN, 1, 5), 2).flatten(2).mT.repeat(1, 1, 4)
        )
    ),
    "embedding of argmax": _of(
        lambda m, h: h + m.part(h.argmax(-1)), lambda: {"part": nn.Embedding(HIDDEN, HIDDEN)}
    ),
    "einsum": _of(lambda m, h: torch.einsum("bth,sh->bts", h, m.scale), _scale(7, HIDDEN), 7),
    "gram": _of(lambda m, h: (h.mT @ h) @ m.scale, _scale(HIDDEN, 3), 3),
    "addcmul": _of(lambda m, h: torch.addcmul(h, h, m.scale, value=0.5), _scale(HIDDEN)),
    # autograd
    "function": _of(lambda m, h: _Cube.apply(h)),
    "function with a scale": _of(lambda m, h: _Scaled.apply(h, m.scale), _scale(HIDDEN)),
    "no_grad": _of(_with_no_grad),
    "decided": _of(_chosen),
    "hooked": _of(_hooked),
    "checkpoint": _of(partial(_checkpointed, reentrant=False)),
    "checkpoint reentrant": _of(partial(_checkpointed, reentrant=True)),
    "checkpoint of up": _of(partial(_whole_block, reentrant=False)),
    "checkpoint of up reentrant": _of(partial(_whole_block, reentrant=True)),
    "initialised": _of(
        lambda m, h: h + nn.init.uniform_(torch.empty(HIDDEN, dtype=h.dtype), 0.5, 0.5)
    ),
    "half precision": _of(lambda m, h: h.to(torch.float16).to(h.dtype)),
}


EVERY = SILENT | NEIGHBOURS
# What data decides cannot be rehearsed without data, and a GRU not be watched: the plan may say so.
REFUSED = ("recurrent", "decided", "masked rows", "masked features")


@pytest.mark.filterwarnings("ignore:None of the inputs")  # the planner watches without gradients
@pytest.mark.parametrize("name", EVERY)
def test_as_planned_and_with_every_feature_a_unit(name: str) -> None:
    """The planner often makes every feature a unit itself, which is then not run twice."""
    make, every = EVERY[name], forced(EVERY[name])
    try:
        plan = watched(make)
    except PlanError:
        assert name in REFUSED
        plan = every
    if name in SILENT and name != "softmax":
        assert "up.weight" in plan.cuts, plan.whole
    if cut_alike(plan, every):
        check(make, plan, (1, 5))
    else:
        check(make, plan, (1, 3))
        check(make, every, (1, 5))


@pytest.mark.parametrize("name", EVERY)
def test_by_names(name: str) -> None:
    """A plan that names the two linears, and has seen no forward."""
    check_runs(EVERY[name], partial(run_by_names, EVERY[name]), (1, 3))


def test_a_convolution_whose_groups_are_cut_is_refused() -> None:
    """Units of one channel, and groups of six: parts of a group cannot be convolved."""
    make = EVERY["grouped convolution"]
    plan = forced(make)
    (family,) = plan.families
    block = (Block(HIDDEN, 0, 1),)
    dims = {**family.dims, ("part.weight", 0): block, ("part.bias", 0): block}
    plan = replace(plan, families=(replace(family, dims=dims),))
    with pytest.raises(UsageError, match=r"'part\.weight' would be whole on every rank"):
        run(make, plan, 3)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive_max_pool1d": lambda h: F.adaptive_max_pool1d(h, 2),
    "max_pool1d": lambda h: F.max_pool1d(h, 2),
    "avg_pool1d": lambda h: F.avg_pool1d(h, 2),
    "max_pool3d": lambda h: F.max_pool3d(h[..., None, None], 1)[..., 0, 0],
    "with places": lambda h: F.adaptive_max_pool1d(h, 2, return_indices=True)[0],
}


@pytest.mark.parametrize("name", POOLS)
def test_a_rank_without_channels_pools_nothing(name: str) -> None:
    """Two channels on three ranks."""

    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(IN, 2), nn.Linear(2, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(POOLS[name](self.up(x).transpose(1, 2)).transpose(1, 2))
            return y

    def step(model: nn.Module) -> list[Tensor]:
        given = x.clone().requires_grad_()
        y = model(given)
        y.square().sum().backward()
        assert given.grad is not None
        return [y.detach(), given.grad]

    def work(axis: sp.Axis) -> list[Tensor]:
        return step(sp.parallelize(copy.deepcopy(whole), plans[axis.size], axis))

    torch.manual_seed(0)
    whole, x = Pools(), torch.randn(2, 6, IN)
    plans = {degree: sp.plan(whole, degree=degree, inputs=x) for degree in (1, 3)}
    (one,) = sp.launch(work, degree=1)
    for mine, true in zip(one, step(whole), strict=True):
        torch.testing.assert_close(mine, true)
    for other in sp.launch(work, degree=3):
        assert all(map(torch.equal, other, one))
