"""What to write for a model that carries no plan: pairs of linears that were tried, or nothing.

A pair can be cut by 'colwise' and 'rowwise' where all that stands between the two is element-wise.
That is tried with the forward of the module that has both: the first linear is made to give parts
of some numbers, and the second must be given the same parts of what it is given for all of them.
Nothing is allocated but these numbers: a copy of the module runs on the meta device.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from shardproof.plans.probe import arguments_of
from shardproof.plans.text import pattern

_SHAPE = (2, 3)  # rows and tokens of a trial
_SHOWN = 8
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_READ = "docs/plans.md says how a plan is written"

Entries = dict[str, str]


def no_plan(model: nn.Module, start: str, fits: Callable[[Entries], bool]) -> str:
    """What to say about a model without a plan.

    Args:
        model: any.
        start: that it has none.
        fits: whether entries are a plan that can be served.
    """
    entries = suggestion(model)
    if not entries or not fits(entries):
        return (
            f"{start} None of its linears was found, by trying, to be one of a pair that can be "
            f"cut as it stands. Give a plan, or inputs=, an example of what forward takes, and one "
            f"forward is watched; {_READ}."
        )
    shown = list(entries.items())[:_SHOWN]
    written = ", ".join(f'"{entry}": "{style}"' for entry, style in shown)
    more = f" The first {_SHOWN} of {len(entries)} are shown." if len(entries) > len(shown) else ""
    return (
        f"{start} These of its linears can be cut, which was tried: {{{written}}}.{more} An "
        f"attention is Attention(queries=..., keys=..., head_dim=...) under the name of its "
        f"module. Or give inputs=, an example of what forward takes; {_READ}."
    )


def suggestion(model: nn.Module) -> Entries:
    """Pattern -> Hugging Face's word, for linears that can be cut so in every layer alike."""
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        start = f"{name}." if name else ""
        styles = _styles_of(module)
        for child, _ in _linears(module):
            entry, style = pattern(f"{start}{child}"), styles.get(child)
            if found.setdefault(entry, style) != style:
                found[entry] = None  # not in every layer
    entries = {entry: style for entry, style in found.items() if style is not None}
    # Both of a pair, or neither.
    parents = {entry.rpartition(".")[0] for entry in entries}
    complete = {
        parent
        for parent in parents
        if {"colwise", "rowwise"}
        <= {style for entry, style in entries.items() if entry.rpartition(".")[0] == parent}
    }
    return {e: style for e, style in entries.items() if e.rpartition(".")[0] in complete}


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Children that can be replaced."""
    return [
        (name, child)
        for name, child in module.named_children()
        if type(child) is nn.Linear
        and "forward" not in vars(child)
        and not any(getattr(child, kind) for kind in _HOOKS)
    ]


def _styles_of(module: nn.Module) -> dict[str, str]:
    """Child -> style, for pairs of children that were tried."""
    styles: dict[str, str] = {}
    for ups, down in _candidates(module):
        if styles.keys().isdisjoint([*ups, down]) and _are_joined(module, ups, down):
            styles |= dict.fromkeys(ups, "colwise") | {down: "rowwise"}
    return styles


def _candidates(module: nn.Module) -> Iterator[tuple[tuple[str, ...], str]]:
    """Linears whose sizes fit: one or two that give what another one takes back."""
    linears = dict(_linears(module))
    for down, last in linears.items():
        ups = [
            name
            for name, first in linears.items()
            if name != down
            and (first.in_features, first.out_features) == (last.out_features, last.in_features)
        ]
        for together in itertools.chain(itertools.combinations(ups, 2), ((up,) for up in ups)):
            yield together, down


class _UntriedError(Exception):
    """A pair was not tried, or is none."""


class _Followed(Tensor):
    """Numbers of a trial, and all that is computed from them: torch hands the class on."""


class _Gives(nn.Module):
    """Stands for a linear: gives what it was told to, and remembers that it was asked."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y.as_subclass(_Followed)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """x: (*, in_features), on the meta device; what is given is not.

        Raises:
            _UntriedError: it is computed from such numbers.
        """
        if not x.is_meta:
            raise _UntriedError("the numbers do not end in the last linear, and nowhere else")
        self.calls += 1
        return self.y.reshape(*x.shape[:-1], self.y.shape[-1])


class _Takes(nn.Module):
    """Stands for a linear: remembers what it is given."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.given: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """x: (*, in_features), to (*, out_features) on the meta device."""
        self.given.append(x)
        return torch.empty(*x.shape[:-1], self.out_features, device="meta")


def _are_joined(module: nn.Module, ups: tuple[str, ...], down: str) -> bool:
    """True if `ups` can be cut along their output and `down` along its input, with nothing else."""
    try:
        width = dict(_linears(module))[down].in_features
        draws = torch.Generator("cpu").manual_seed(0)
        numbers = [torch.randn(*_SHAPE, width, generator=draws, device="cpu") for _ in ups]
        whole = _given(module, ups, down, numbers)
        # Uneven, so that no part is a number of whole heads.
        edges = sorted({0, 1, width // 2 + 1, width})
        for start, stop in itertools.pairwise(edges):
            part = _given(module, ups, down, [each[..., start:stop] for each in numbers])
            torch.testing.assert_close(part, whole[..., start:stop], rtol=1e-5, atol=1e-6)
    except Exception:  # whatever a model's own code raises: then the pair was not tried
        return False
    return True


def _given(module: nn.Module, ups: tuple[str, ...], down: str, numbers: list[Tensor]) -> Tensor:
    """What `down` is given when `ups` give these numbers.

    Raises:
        _UntriedError: one of them is not called once, or the numbers go somewhere else too.
    """
    first: Any = module.get_submodule(ups[0])
    last: Any = module.get_submodule(down)
    twin = _on_meta(module)
    gives = [_Gives(each) for each in numbers]
    for name, each in zip(ups, gives, strict=True):
        setattr(twin, name, each)
    takes = _Takes(last.out_features)
    setattr(twin, down, takes)
    x = torch.empty(*_SHAPE, first.in_features, device="meta")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        y = twin(**arguments_of(twin, x, head_dim=2))
    leaves = [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor)]
    if [each.calls for each in gives] != [1] * len(gives) or len(takes.given) != 1:
        raise _UntriedError("the linears are not called once each")
    if any(isinstance(leaf, _Followed) for leaf in leaves) or takes.given[0].is_meta:
        raise _UntriedError("the numbers do not end in the last linear, and nowhere else")
    return takes.given[0].as_subclass(Tensor)


def _on_meta(module: nn.Module) -> Any:
    """A copy in training whose weights take no memory, and whose dropout drops nothing.

    In training, for there dropout that its forward calls as a function is seen: no part is alike.
    """
    memo: dict[int, Any] = {
        id(value): nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
        for value in module.parameters()
    }
    memo |= {id(value): torch.empty_like(value, device="meta") for value in module.buffers()}
    twin: Any = copy.deepcopy(module, memo).train()
    for each in twin.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
    return twin
