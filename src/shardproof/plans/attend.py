"""What the child of an attention computes: found out by running it beside ours, not from its name.

`Attention(attend="child")` puts our attention in the place of a module of the user's. That is right
only where both compute the same, so a copy of the child is run on small numbers when the plan is
made: outputs and gradients, with the mask that its parent gives it, in training and in evaluation.
The child itself, its weights and torch's generators stay as they were.
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
class Manner:
    """How our attention computes what a child computes.

    Attributes:
        is_causal: a query sees no key behind its own place.
        dropout: of attention weights, in training.
    """

    is_causal: bool
    dropout: float


class _UnlikeError(Exception):
    """What is wrong with a child; becomes a sentence."""


@dataclass(frozen=True)
class _Trial:
    """What a child is called with.

    Attributes:
        given: q, k, v.
        options: what else its parent gives it, by the names that ours has.
        masks: tried one after the other; of several, one must agree (nothing says which is meant).
        is_short: gradients are compared too, and the child is called twice.
    """

    given: tuple[Tensor, Tensor, Tensor]
    options: Mapping[str, Any]
    masks: tuple[Tensor | None, ...]
    is_short: bool


def manner_of(
    name: str, style: Attention, model: nn.Module, known: dict[Hashable, Manner]
) -> Manner | str:
    """How ours computes what a child computes, or one sentence why it cannot.

    Args:
        name: of the attention module.
        style: its style, with `attend`.
        model: whose module it is; the child's own tensors must not be on the meta device.
        known: what was found before, of children that are alike in all that they have; is added to.
    """
    parent = model.get_submodule(name)
    full = f"{name}.{style.attend}" if name else str(style.attend)
    child = parent.get_submodule(str(style.attend))
    try:
        return _manner(child, parent, style, known)
    except _UnlikeError as error:
        return (
            f"module {full!r} ({type(child).__name__}) {error} Attention puts {_RULE} in its "
            f"place. Let the child compute that alone (what else it does can stand before or "
            f"behind it), or leave {name!r} out of the plan."
        )


def _manner(
    child: nn.Module, parent: nn.Module, style: Attention, known: dict[Hashable, Manner]
) -> Manner:
    weights = [name for name, _ in child.named_parameters()]
    if weights:
        raise _UnlikeError(f"has weights of its own, {', '.join(weights)}, which would be lost.")
    device = _device(child)
    options, masks = _call(child, parent, style)
    alike = _key(child, style, options, masks)
    if alike in known:
        return known[alike]
    try:
        twin = copy.deepcopy(child)
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
        is_causal = _agreeing(twin.eval(), split, trials, getattr(child, "is_causal", False))
        _check_training(twin, trials[0], is_causal, p)
    manner = Manner(is_causal, p)
    if alike is not None:
        known[alike] = manner
    return manner


def _key(
    child: nn.Module,
    style: Attention,
    options: Mapping[str, Any],
    masks: tuple[torch.dtype | None, ...],
) -> Hashable:
    """What children that compute alike have in common; None if a child has more than numbers."""
    held = {**vars(child), **{f"option {name}": value for name, value in options.items()}}
    inside = [value for value in held.values() if isinstance(value, dict | set)]
    plain = {name: value for name, value in held.items() if not isinstance(value, dict | set)}
    if any(inside) or not all(
        value is None or isinstance(value, bool | int | float | str) for value in plain.values()
    ):
        return None
    return type(child), style, masks, tuple(sorted((name, repr(x)) for name, x in plain.items()))


def _device(child: nn.Module) -> torch.device:
    """Where a child can be run: where its tensors are."""
    held = {**dict(child.named_buffers()), **vars(child)}
    found = {name: value.device for name, value in held.items() if isinstance(value, Tensor)}
    on_meta = [name for name, device in found.items() if device.type == "meta"]
    if on_meta:
        raise _UnlikeError(
            f"has {', '.join(on_meta)} on the meta device, so that it cannot be tried: make the "
            "model elsewhere, or let the child make them when it is called."
        )
    return next(iter(found.values()), torch.device("cpu"))


def _call(
    child: nn.Module, parent: nn.Module, style: Attention
) -> tuple[dict[str, Any], tuple[torch.dtype | None, ...]]:
    """With what its parent calls a child beside q, k and v, and with masks of which dtypes."""
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
    """The probability that a child names: its `dropout`, or the `nn.Dropout` inside it."""
    named = getattr(child, "dropout", 0.0)
    inside = {module.p for module in child.modules() if isinstance(module, nn.Dropout)}
    if isinstance(named, nn.Module) or (not named and inside):
        return float(max(inside, default=0.0))
    return float(named)


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Where a child is tried: nothing of the caller's is seen, and nothing is left behind."""
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
    """Tokens of the long trial: more than a window that the child names."""
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
) -> _Trial:
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

    return _Trial((q, k, v), options, tuple(mask_of(dtype) for dtype in masks), batch > 1)


@dataclass(frozen=True)
class _Ours:
    """Our attention in evaluation, on the whole."""

    split: HeadSplit
    is_causal: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        options = {"is_causal": self.is_causal} | options | {"dropout": None}
        return attention(q, k, v, self.split, **options)


def _agreeing(child: nn.Module, split: HeadSplit, trials: list[_Trial], is_causal: object) -> bool:
    """Whether ours computes what the child does with is_causal, as it says or the other way."""
    differing = []
    for causal in (bool(is_causal), not is_causal):
        found = next(_differences(child, _Ours(split, causal), trials), None)
        if found is None:
            return causal
        differing.append(found)
    what, difference, largest = min(differing, key=lambda each: each[1] / each[2])
    raise _UnlikeError(
        f"computes something else: tried on small numbers, {what} differ by up to "
        f"{difference:.2g} of {largest:.2g}."
    )


def _differences(
    child: nn.Module, ours: _Ours, trials: list[_Trial]
) -> Iterator[tuple[str, float, float]]:
    """What differs, by how much, of what size."""
    for trial in trials:
        plain = [mask for mask in trial.masks if mask is None]
        # With is_causal, ours refuses a mask when it is called: then there is nothing to compare.
        is_refused = ours.is_causal and len(trial.masks) > 1
        unsure = [mask for mask in trial.masks if mask is not None and not is_refused]
        for masks in (plain, unsure):
            found = [_difference(child, ours, trial, mask) for mask in masks]
            if found and all(found):
                yield next(each for each in found if each is not None)


def _difference(
    child: nn.Module, ours: _Ours, trial: _Trial, mask: Tensor | None
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
    for what, got, wanted in zip(names, theirs, _run(ours, trial, mask), strict=False):
        if got.shape != wanted.shape:
            raise _UnlikeError(
                f"gives shape {tuple(got.shape)} for q of shape {tuple(trial.given[0].shape)}, and "
                f"shardproof's gives {tuple(wanted.shape)}."
            )
        largest = float(wanted.abs().max())
        difference = float((got.to(wanted.dtype) - wanted).abs().nan_to_num(torch.inf).max())
        if difference > _TOLERANCE * largest:
            return f"{with_mask}its {what}", difference, largest
    return None


def _run(attend: Callable[..., Any], trial: _Trial, mask: Tensor | None) -> list[Tensor]:
    """Outputs, and in a short trial gradients of q, k and v."""
    given = [x.clone().requires_grad_(trial.is_short) for x in trial.given]
    options = dict(trial.options) | ({} if mask is None else {"mask": mask.clone()})
    y = attend(*given, **options)
    if not isinstance(y, Tensor):
        raise _UnlikeError(f"gives a {type(y).__name__}, and shardproof's gives one tensor.")
    if not trial.is_short:
        return [y]
    if not y.requires_grad:
        raise _UnlikeError("gives outputs without a gradient.")
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad(y, given, weights, allow_unused=True)
    zeros = (torch.zeros_like(x) for x in given)
    return [y.detach(), *(zero if g is None else g for g, zero in zip(grads, zeros, strict=True))]


def _check_training(child: nn.Module, trial: _Trial, is_causal: bool, p: float) -> None:
    """In training, the child drops attention weights as it says, and does nothing else."""
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
    sizes = [(2, x.shape[1], length, x.shape[3]) for x in trial.given]
    q, k, v = torch.zeros(sizes[0]), torch.zeros(sizes[1]), torch.ones(sizes[2])
    y = child.forward(q, k, v, **trial.options)
    seen = torch.arange(1.0, length + 1) if is_causal else torch.full((length,), float(length))
    squares = (seen[:, None] * (y.detach() - 1) ** 2)[:, :, _ROWS:]
    got, wanted = float(squares.mean().round(decimals=6)), p / (1 - p) if p < 1 else torch.inf
    if not abs(got - wanted) <= 0.3 * wanted and p < 1:
        raise _UnlikeError(
            f"says that it drops {p} of the attention weights, and in training it drops "
            f"{got / (1 + got):.2g} of them, or something else."
        )
