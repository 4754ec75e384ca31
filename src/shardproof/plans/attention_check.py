"""Check that the child of an attention computes what our attention computes, by running both.

`Attention(attend="child")` replaces a module of the user by our attention. That is right only if
both compute the same. So when the plan is made, a copy of the child runs on small numbers, and its
outputs and gradients are compared with ours: with the mask that its parent passes, in training and
in evaluation mode. The child itself, its weights and torch's generators do not change.
"""

import copy
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from shardproof.axis import Axis
from shardproof.heads import Heads
from shardproof.layers.attention import HeadAttention
from shardproof.ops.attention import attention
from shardproof.ops.head_split import HeadSplit
from shardproof.plans.probe import seen_call
from shardproof.plans.style import Attention
from shardproof.scheme import Scheme
from shardproof.wording import error_words

_RULE = "softmax(q k^T * head_dim ** -0.5 + mask) v"
_TOLERANCE = 1e-4  # of the largest number, in fp32
_LENGTH, _SCORES = 512, 1 << 20  # tokens and scores of the long trial
_MOST_SCORES = 1 << 25
_ROWS = 16  # keys that a query must see to count for the share that dropout drops
_lock = threading.Lock()  # ranks that are threads have one generator together


@dataclass(frozen=True)
class ChildAttentionOptions:
    """Options with which our attention computes what a child computes.

    Attributes:
        is_causal: a query sees no later key.
        dropout: probability that an attention weight is dropped in training.
    """

    is_causal: bool
    dropout: float


class _UnlikeError(Exception):
    """A child computes something else; the message says what."""


@dataclass(frozen=True)
class _ChildCall:
    """Arguments that a child is called with.

    Attributes:
        inputs: q, k, v.
        options: further arguments that its parent passes, by their names in our attention.
        masks: tried one after the other; the child must agree with ours for one of them.
        is_short: whether gradients are compared too, and the child is called twice.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    options: Mapping[str, Any]
    masks: tuple[Tensor | None, ...]
    is_short: bool


def attention_options_of(
    name: str,
    style: Attention,
    model: nn.Module,
    options_by_key: dict[Hashable, ChildAttentionOptions],
) -> ChildAttentionOptions | str:
    """Options for our attention, or one sentence that says why it cannot replace the child.

    Args:
        name: name of the attention module.
        style: the style of the module, with `attend` set.
        model: the model; the child's own tensors must not be on the meta device.
        options_by_key: results for children that were checked before, by `_key`; new results
            are added.
    """
    parent = model.get_submodule(name)
    full = f"{name}.{style.attend}" if name else str(style.attend)
    child = parent.get_submodule(str(style.attend))
    try:
        return _attention_options(child, parent, style, options_by_key)
    except _UnlikeError as error:
        return (
            f"module {full!r} ({type(child).__name__}) {error} Attention puts {_RULE} in its "
            f"place. Let the child compute that alone (what else it does can stand before or "
            f"behind it), or leave {name!r} out of the plan."
        )


def _attention_options(
    child: nn.Module,
    parent: nn.Module,
    style: Attention,
    options_by_key: dict[Hashable, ChildAttentionOptions],
) -> ChildAttentionOptions:
    weights = [name for name, _ in child.named_parameters()]
    if weights:
        raise _UnlikeError(f"has weights of its own, {', '.join(weights)}, which would be lost.")
    device = _device(child)
    options, masks = _call(child, parent, style)
    alike = _key(child, style, options, masks)
    if alike in options_by_key:
        return options_by_key[alike]
    try:
        child_copy = copy.deepcopy(child)
    except Exception as error:  # whatever a user's module raises
        raise _UnlikeError(f"cannot be copied to be tried ({error_words(error)}).") from error
    p = _dropout(child)
    split = HeadSplit(
        Axis.solo(),
        Heads(style.queries, style.keys, style.head_dim, 1, 1),
        Scheme(leaves=1, numerics="native"),
    )
    with _lock, _apart(device):
        trials = [
            _trial(2, 7, 3.0, options, masks, style, device),
            _trial(1, _length(child, style.queries), 1.0, options, masks, style, device),
        ]
        is_causal = _agreeing(child_copy.eval(), split, trials, getattr(child, "is_causal", False))
        _check_training(child_copy, trials[0], is_causal, p)
    attention_options = ChildAttentionOptions(is_causal, p)
    if alike is not None:
        options_by_key[alike] = attention_options
    return attention_options


def _key(
    child: nn.Module,
    style: Attention,
    options: Mapping[str, Any],
    masks: tuple[torch.dtype | None, ...],
) -> Hashable:
    """A key that children with equal attributes share; None if an attribute is no plain value."""
    attributes = {**vars(child), **{f"option {name}": value for name, value in options.items()}}
    inside = [value for value in attributes.values() if isinstance(value, dict | set)]
    plain = {name: value for name, value in attributes.items() if not isinstance(value, dict | set)}
    if any(inside) or not all(
        value is None or isinstance(value, bool | int | float | str) for value in plain.values()
    ):
        return None
    return type(child), style, masks, tuple(sorted((name, repr(x)) for name, x in plain.items()))


def _device(child: nn.Module) -> torch.device:
    """The device of a child's tensors, on which it can be run."""
    attributes = {**dict(child.named_buffers()), **vars(child)}
    devices = {
        name: value.device for name, value in attributes.items() if isinstance(value, Tensor)
    }
    on_meta = [name for name, device in devices.items() if device.type == "meta"]
    if on_meta:
        raise _UnlikeError(
            f"has {', '.join(on_meta)} on the meta device, so that it cannot be tried: make the "
            "model elsewhere, or let the child make them when it is called."
        )
    return next(iter(devices.values()), torch.device("cpu"))


def _call(
    child: nn.Module, parent: nn.Module, style: Attention
) -> tuple[dict[str, Any], tuple[torch.dtype | None, ...]]:
    """The arguments beside q, k and v that its parent passes, and the dtypes of its masks."""
    size = getattr(parent.get_submodule(style.query), "in_features", 0)
    length = 2 * style.queries + 1  # unlike any number of heads
    call = seen_call(parent, str(style.attend), size, length, style.head_dim)
    unknown: tuple[torch.dtype | None, ...] = (torch.bool, torch.float32)
    if call is None:
        takes_mask = "mask" in inspect.signature(child.forward).parameters
        return {}, (None, *unknown) if takes_mask else (None,)
    try:
        bound = inspect.signature(HeadAttention.forward).bind(None, *call[0], **call[1]).arguments
    except TypeError as error:
        raise _UnlikeError(
            f"is called by its parent as shardproof's cannot be ({error}): that takes q, k and v, "
            "and by name mask, is_causal, scale, softcap and dropout."
        ) from None
    shapes = [tuple(bound[name].shape) for name in "qkv" if isinstance(bound[name], Tensor)]
    heads = [style.queries, style.keys, style.keys]
    if [shape[1:] for shape in shapes] != [(each, length, style.head_dim) for each in heads]:
        raise _UnlikeError(
            f"is given q, k and v of shapes {', '.join(map(str, shapes))} for {length} tokens, and "
            "shardproof's takes (batch, heads, length, head_dim)."
        )
    options = {name: value for name, value in bound.items() if name not in ("self", *"qkv", "mask")}
    if "mask" not in bound:
        return options, (None,)
    mask = bound["mask"]
    return options, (None, *unknown) if mask is None else (mask.dtype,)


def _dropout(child: nn.Module) -> float:
    """The dropout probability of a child: its attribute `dropout`, or of the `nn.Dropout` in it."""
    named = getattr(child, "dropout", 0.0)
    inside = {module.p for module in child.modules() if isinstance(module, nn.Dropout)}
    if isinstance(named, nn.Module) or (not named and inside):
        return float(max(inside, default=0.0))
    return float(named)


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Run a child without effect on the caller: no hooks, modes or generator states leak."""
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        _disable_current_modes(),  # the prover's audit counts what a model allocates
        torch.device(device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        torch.manual_seed(0)
        yield


def _length(child: nn.Module, queries: int) -> int:
    """Number of tokens of the long trial, more than any window that the child has."""
    length = min(_LENGTH, int((_SCORES / queries) ** 0.5))
    windows = {
        name: value
        for name, value in vars(child).items()
        if isinstance(value, int) and "window" in name and value >= length
    }
    for name, value in windows.items():
        length = max(length, value + 3)
        if queries * length**2 > _MOST_SCORES:
            raise _UnlikeError(f"has {name}={value}, too many tokens to be tried.")
    return length


def _trial(
    batch: int,
    length: int,
    scale: float,
    options: Mapping[str, Any],
    masks: tuple[torch.dtype | None, ...],
    style: Attention,
    device: torch.device,
) -> _ChildCall:
    draws = torch.Generator(device).manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, device=device, dtype=torch.float32)

    heads = (style.queries, style.keys, style.keys)
    q, k, v = (scale * draw(batch, each, length, style.head_dim) for each in heads)

    def mask_of(dtype: torch.dtype | None) -> Tensor | None:
        if dtype is None:
            return None
        numbers = draw(batch, 1, length, length)
        if dtype != torch.bool:
            return numbers.to(dtype)
        return (numbers > 0) | torch.eye(length, dtype=torch.bool, device=device)

    return _ChildCall((q, k, v), options, tuple(mask_of(dtype) for dtype in masks), batch > 1)


@dataclass(frozen=True)
class _OurAttention:
    """Our attention on whole tensors, in evaluation mode."""

    split: HeadSplit
    is_causal: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        options = {"is_causal": self.is_causal} | options | {"dropout": None}
        return attention(q, k, v, self.split, **options)


def _agreeing(
    child: nn.Module, split: HeadSplit, trials: list[_ChildCall], is_causal: object
) -> bool:
    """The `is_causal` with which ours agrees with the child; raise if there is none."""
    differing = []
    for causal in (bool(is_causal), not is_causal):
        difference_found = next(_differences(child, _OurAttention(split, causal), trials), None)
        if difference_found is None:
            return causal
        differing.append(difference_found)
    what, difference, largest = min(differing, key=lambda each: each[1] / each[2])
    raise _UnlikeError(
        f"computes something else: tried on small numbers, {what} differ by up to "
        f"{difference:.2g} of {largest:.2g}."
    )


def _differences(
    child: nn.Module, ours: _OurAttention, trials: list[_ChildCall]
) -> Iterator[tuple[str, float, float]]:
    """Yield every difference: what differs, by how much, and the largest value."""
    for trial in trials:
        plain = [mask for mask in trial.masks if mask is None]
        # With is_causal, ours refuses a mask when it is called: then there is nothing to compare.
        is_refused = ours.is_causal and len(trial.masks) > 1
        unsure = [mask for mask in trial.masks if mask is not None and not is_refused]
        for masks in (plain, unsure):
            differences = [_difference(child, ours, trial, mask) for mask in masks]
            if differences and all(differences):
                yield next(each for each in differences if each is not None)


def _difference(
    child: nn.Module, ours: _OurAttention, trial: _ChildCall, mask: Tensor | None
) -> tuple[str, float, float] | None:
    with_mask = "with a mask, " if mask is not None else ""
    try:
        theirs = _run(child.forward, trial, mask)
        again = _run(child.forward, trial, mask) if trial.is_short else theirs
    except _UnlikeError:
        raise
    except Exception as error:  # whatever a user's module raises
        if len(trial.masks) > 1 and mask is not None:
            return f"{with_mask}it raises {error_words(error)}: outputs", torch.inf, 1.0
        raise _UnlikeError(f"cannot be tried: it raises {error_words(error)}.") from error
    if not all(map(torch.equal, theirs, again)):
        raise _UnlikeError("gives other numbers when it is called again, in evaluation.")
    if ours.is_causal and mask is not None:
        return f"{with_mask}its outputs", torch.inf, 1.0
    names = ("outputs", "gradients of q", "gradients of k", "gradients of v")
    for what, child_value, our_value in zip(names, theirs, _run(ours, trial, mask), strict=False):
        if child_value.shape != our_value.shape:
            raise _UnlikeError(
                f"gives shape {tuple(child_value.shape)} for q of shape "
                f"{tuple(trial.inputs[0].shape)}, and shardproof's gives {tuple(our_value.shape)}."
            )
        largest = float(our_value.abs().max())
        difference = float(
            (child_value.to(our_value.dtype) - our_value).abs().nan_to_num(torch.inf).max()
        )
        if difference > _TOLERANCE * largest:
            return f"{with_mask}its {what}", difference, largest
    return None


def _run(attend: Callable[..., Any], trial: _ChildCall, mask: Tensor | None) -> list[Tensor]:
    """The output, and in a short trial the gradients of q, k and v."""
    inputs = [x.clone().requires_grad_(trial.is_short) for x in trial.inputs]
    options = dict(trial.options) | ({} if mask is None else {"mask": mask.clone()})
    y = attend(*inputs, **options)
    if not isinstance(y, Tensor):
        raise _UnlikeError(f"gives a {type(y).__name__}, and shardproof's gives one tensor.")
    if not trial.is_short:
        return [y]
    if not y.requires_grad:
        raise _UnlikeError("gives outputs without a gradient.")
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad(y, inputs, weights, allow_unused=True)
    zeros = (torch.zeros_like(x) for x in inputs)
    return [y.detach(), *(zero if g is None else g for g, zero in zip(grads, zeros, strict=True))]


def _check_training(child: nn.Module, trial: _ChildCall, is_causal: bool, p: float) -> None:
    """Raise unless the child in training only drops attention weights, with its probability."""
    mask = trial.masks[0]
    in_evaluation = _run(child.eval().forward, trial, mask)
    child.train()
    if not p:
        if not all(map(torch.equal, _run(child.forward, trial, mask), in_evaluation)):
            raise _UnlikeError(
                "computes something else in training, and has no attribute `dropout` that tells "
                "how many attention weights it drops."
            )
        return
    # Of weights that are alike, a share of (1 - p) is kept: the sum of n of them has this variance.
    length = 256
    sizes = [(2, x.shape[1], length, x.shape[3]) for x in trial.inputs]
    q, k, v = torch.zeros(sizes[0]), torch.zeros(sizes[1]), torch.ones(sizes[2])
    y = child.forward(q, k, v, **trial.options)
    num_visible = (
        torch.arange(1.0, length + 1) if is_causal else torch.full((length,), float(length))
    )
    squares = (num_visible[:, None] * (y.detach() - 1) ** 2)[:, :, _ROWS:]
    variance, expected_variance = (
        float(squares.mean().round(decimals=6)),
        p / (1 - p) if p < 1 else torch.inf,
    )
    if not abs(variance - expected_variance) <= 0.3 * expected_variance and p < 1:
        raise _UnlikeError(
            f"says that it drops {p} of the attention weights, and in training it drops "
            f"{variance / (1 + variance):.2g} of them, or something else."
        )
