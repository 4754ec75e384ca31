"""Where a case that is not proved goes wrong: the module, and the operation on cut tensors.

The case is run once more, forward and backward, inside `checked()`, which names the operation. If
every operation is right by itself, what the modules give is compared between two degrees, or with
plain torch, and the first module is named that gives something else.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from shardproof.axis import Axis
from shardproof.comparison import checked
from shardproof.cut.checked import rtol_of
from shardproof.cut.fallback import is_cut
from shardproof.cut.tensor import CutTensor
from shardproof.errors import CheckError, MismatchError, ShardproofError
from shardproof.leaves import Layout
from shardproof.prover.case import Case, Recording, Trial, as_whole
from shardproof.prover.training import Training
from shardproof.scheme import Scheme

_MOST_BYTES = 64 << 20  # of what modules give that one rank keeps


@dataclass(frozen=True)
class Where:
    """Where a case goes wrong.

    Attributes:
        degree: at which it was seen.
        module: whose forward was under way, or which gave what differs; "" is the model itself.
        operation: on cut tensors; "" where modules were compared.
        line: of the model's code; "" likewise.
        detail: what differs, and by how much.
    """

    degree: int
    module: str
    operation: str
    line: str
    detail: str

    def __str__(self) -> str:
        """As a sentence."""
        module = f"module {self.module!r}" if self.module else "the model itself"
        if not self.operation:
            return f"At degree {self.degree} it begins in {module}: {self.detail}"
        return (
            f"At degree {self.degree} it begins in {module}, in the operation {self.operation} at "
            f"{self.line}: {self.detail}"
        )


@dataclass(frozen=True)
class Given:
    """What a module gave, or the gradient that it got.

    Attributes:
        module: its name.
        what: of the two, and which of several.
        value: the whole.
    """

    module: str
    what: str
    value: Tensor


@dataclass(frozen=True)
class Found:
    """What one rank brings home.

    Attributes:
        where: what `checked()` named, if it named something here.
        given: what the modules gave, in order, unless it was checked.
    """

    where: Where | None
    given: tuple[Given, ...] = ()


class _Silent:
    """Records nothing."""

    def record(self, name: str, tensor: Tensor, layout: Layout, how: Recording) -> None:
        """Nothing."""

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Nothing."""


class _Modules:
    """Hooks of every module: which forward is under way, and what was given.

    Args:
        keeps: whether what is given is kept.
    """

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        self.given: list[Given] = []
        self.under_way: list[str] = []
        self._bytes = 0

    @property
    def last(self) -> str:
        """Whose forward is under way: of several the innermost."""
        return self.under_way[-1] if self.under_way else ""

    def hook(self, model: nn.Module) -> None:
        """Hook every module of a model."""
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(name), prepend=True)
            module.register_forward_hook(self._leaving(name))

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda *_: self.under_way.append(name)

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.under_way.pop()
            for number, each in enumerate(tree_leaves(output, is_leaf=is_cut)):
                if self.keeps and isinstance(each, Tensor | CutTensor):
                    self._keep(name, f"output {number}", each)
                    if each.requires_grad and each.grad_fn is not None:
                        each.register_hook(self._of_gradient(name, number))

        return leave

    def _of_gradient(self, name: str, number: int) -> Callable[[Any], None]:
        return lambda grad: self._keep(name, f"the gradient of output {number}", grad)

    def _keep(self, name: str, what: str, value: Any) -> None:
        value = as_whole(value.detach())
        self._bytes += value.numel() * value.element_size()
        if self._bytes <= _MOST_BYTES:
            self.given.append(Given(name, what, value.clone()))


class _Search(Trial):
    """A trial that records nothing, and whose models are hooked."""

    modules: _Modules

    def adopt(self, model: nn.Module) -> nn.Module:
        """As any trial, with hooks."""
        model = super().adopt(model)
        self.modules.hook(model)
        return model


def look(
    axis: Axis | None, *, case: Case, scheme: Scheme | None, seed: int | None, is_checked: bool
) -> Found:
    """Run a case once more on this rank, or in plain torch; all ranks of `axis` call this.

    Args:
        axis: the ranks; None: plain torch.
        case: what to run: one step without an update, if it is a training.
        scheme: leaves and numerics.
        seed: of everything the case draws.
        is_checked: inside `checked()`; else what modules give is kept.

    Comm:
        setup that of `checked()`, or all_gathers in direction "prover".
    """
    trial = _Search(axis=axis, scheme=scheme, seed=seed, recorder=_Silent())
    trial.modules = _Modules(keeps=not is_checked)
    degree = 0 if axis is None else axis.size
    try:
        with checked() if is_checked else nullcontext():
            _short(case.work)(trial)
    except (CheckError, MismatchError) as error:
        operation, line = getattr(error, "operation", ""), getattr(error, "line", "")
        where = Where(degree, trial.modules.last, operation, line, str(error))
        return Found(where, tuple(trial.modules.given))
    except ShardproofError:
        return Found(None)  # another rank found it, and will not come
    except Exception:
        if is_checked:
            return Found(None)  # what the case itself raises, which is raised where it first was
        raise
    return Found(None, tuple(trial.modules.given))


def _short(work: Callable[[Trial], None]) -> Callable[[Trial], None]:
    if isinstance(work, Training):
        return replace(work, steps=1, optimizer=None, clip=None, measures_creation=False)
    return work


def first_apart(
    ours: Sequence[Found], others: Sequence[Given], *, degree: int, other: str, is_close: bool
) -> Where | None:
    """The first module that gives something else than it gave elsewhere.

    Args:
        ours: what every rank brought home.
        others: what modules gave elsewhere.
        degree: of `ours`.
        other: where `others` come from, for the message.
        is_close: what agrees but for rounding is the same; else bit by bit.
    """
    kept = [_by_key(found.given) for found in ours]
    for key, theirs in _by_key(others).items():
        # Of another shape it is a rank's part, which says nothing.
        same = {
            rank: given[key]
            for rank, given in enumerate(kept)
            if key in given and given[key].value.shape == theirs.value.shape
        }
        apart = {
            rank: far
            for rank, own in same.items()
            if (far := _apart(own.value, theirs.value, is_close=is_close)) is not None
        }
        if apart:
            rank, far = next(iter(apart.items()))
            at = f" on rank {rank}" if len(apart) < len(same) else ""
            detail = f"{theirs.what} differs from that {other} by {far:.3g}{at}"
            return Where(degree, theirs.module, "", "", detail)
    return None


def _by_key(given: Sequence[Given]) -> dict[tuple[str, str, int], Given]:
    """By module, what, and which call; in order."""
    found: dict[tuple[str, str, int], Given] = {}
    calls: dict[tuple[str, str], int] = {}
    for each in given:
        call = calls[each.module, each.what] = calls.get((each.module, each.what), 0) + 1
        found[each.module, each.what, call] = each
    return found


def _apart(own: Tensor, theirs: Tensor, *, is_close: bool) -> float | None:
    """How far two are apart; None: they are the same."""
    if torch.equal(own, theirs):
        return None
    worst = float((own.double() - theirs.double()).abs().nan_to_num(torch.inf).max())
    size = float(theirs.double().abs().nan_to_num(0.0, 0.0, 0.0).max())
    if is_close and worst <= rtol_of(own.dtype) * size:
        return None
    return worst


def locate(
    run: Callable[[int, bool], Sequence[Found]],
    differing: Sequence[int],
    degrees: Sequence[int],
) -> Where | None:
    """Where a case goes wrong; None if nothing was found.

    Args:
        run: degree and whether it is checked -> what its ranks bring home; degree 0: plain torch.
        differing: two degrees whose bits differ; empty if plain torch has other numbers.
        degrees: all that were run, lowest first.
    """
    failing = differing[-1] if differing else degrees[-1]
    said = [each.where for each in run(failing, True) if each.where is not None]
    operations = [where for where in said if where.operation]
    if operations:
        return operations[0]
    others, other = (
        (run(differing[0], False)[0], f"at degree {differing[0]}")
        if differing
        else (run(0, False)[0], "of plain PyTorch")
    )
    apart = first_apart(
        run(failing, False), others.given, degree=failing, other=other, is_close=not differing
    )
    return apart or next(iter(said), None)  # a module says more than that ranks disagree
