"""Finds where a case goes wrong: the module, and the operation on cut tensors.

The case runs once more, forward and backward, inside `checked()`, which names the operation. If
every operation is right, the outputs of the modules and their gradients are compared between two
degrees, or with plain torch. The first module whose tensor differs is named.
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
from shardproof.prover.case import Case, CaseRun, RecordOptions, as_whole
from shardproof.prover.training import Training
from shardproof.scheme import Scheme

_MOST_BYTES = 64 << 20  # of the module tensors that one rank keeps


@dataclass(frozen=True)
class FaultLocation:
    """Where a case goes wrong.

    Attributes:
        degree: at which the fault was found.
        module: whose forward was running, or whose tensor differs; "" is the model itself.
        operation: on cut tensors; "" if modules were compared.
        line: of the model's code; "" if modules were compared.
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
            return f"At degree {self.degree} the fault begins in {module}: {self.detail}"
        return (
            f"At degree {self.degree} the fault begins in {module}, in the operation "
            f"{self.operation} at {self.line}: {self.detail}"
        )


@dataclass(frozen=True)
class ModuleTensor:
    """An output of a module, or the gradient of one.

    Attributes:
        module: its name.
        what: "output 0", "the gradient of output 0", ...
        value: the whole tensor.
    """

    module: str
    what: str
    value: Tensor


@dataclass(frozen=True)
class RankSearch:
    """What one rank found.

    Attributes:
        where: the place that `checked()` named on this rank, if any.
        tensors: of the modules, in order, if the run was not checked.
    """

    where: FaultLocation | None
    tensors: tuple[ModuleTensor, ...] = ()


class _NoRecorder:
    """Records nothing."""

    def record(self, name: str, tensor: Tensor, layout: Layout, how: RecordOptions) -> None:
        """Nothing."""

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Nothing."""


class _ModuleHooks:
    """Hooks on every module that note which forward is running, and keep outputs and gradients.

    Args:
        keeps: whether outputs and gradients are kept.
    """

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        self.tensors: list[ModuleTensor] = []
        self.running: list[str] = []
        self._bytes = 0

    @property
    def innermost(self) -> str:
        """The innermost module whose forward is running."""
        return self.running[-1] if self.running else ""

    def install(self, model: nn.Module) -> None:
        """Put hooks on every module of a model."""
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(name), prepend=True)
            module.register_forward_hook(self._leaving(name))

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda *_: self.running.append(name)

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.running.pop()
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
            self.tensors.append(ModuleTensor(name, what, value.clone()))


class _HookedRun(CaseRun):
    """A run that records nothing, and whose models have hooks."""

    hooks: _ModuleHooks

    def adopt(self, model: nn.Module) -> nn.Module:
        """Adopt the model, and put hooks on it."""
        model = super().adopt(model)
        self.hooks.install(model)
        return model


def search_on_rank(
    axis: Axis | None, *, case: Case, scheme: Scheme | None, seed: int | None, is_checked: bool
) -> RankSearch:
    """Run a case once more on this rank, or in plain torch; all ranks of `axis` call this.

    Args:
        axis: the ranks; None: plain torch.
        case: what to run. A training makes one step without an update.
        scheme: leaves and numerics.
        seed: random seed of everything that the case draws.
        is_checked: run inside `checked()`; if not, outputs and gradients of modules are kept.

    Comm:
        setup that of `checked()`, or all_gathers in direction "prover".
    """
    run = _HookedRun(axis=axis, scheme=scheme, seed=seed, recorder=_NoRecorder())
    run.hooks = _ModuleHooks(keeps=not is_checked)
    degree = 0 if axis is None else axis.size
    try:
        with checked() if is_checked else nullcontext():
            _one_step(case.work)(run)
    except (CheckError, MismatchError) as error:
        operation, line = getattr(error, "operation", ""), getattr(error, "line", "")
        where = FaultLocation(degree, run.hooks.innermost, operation, line, str(error))
        return RankSearch(where, tuple(run.hooks.tensors))
    except ShardproofError:
        return RankSearch(None)  # another rank raised and has left the collective
    except Exception:
        if is_checked:
            return RankSearch(None)  # an error of the case itself, which the first run has raised
        raise
    return RankSearch(None, tuple(run.hooks.tensors))


def _one_step(work: Callable[[CaseRun], None]) -> Callable[[CaseRun], None]:
    if isinstance(work, Training):
        return replace(work, steps=1, optimizer=None, clip=None, measures_creation=False)
    return work


def first_different_module(
    ours: Sequence[RankSearch],
    others: Sequence[ModuleTensor],
    *,
    degree: int,
    other: str,
    is_close: bool,
) -> FaultLocation | None:
    """The first module with an output or gradient that differs from another run's.

    Args:
        ours: what every rank found.
        others: tensors of the other run.
        degree: of `ours`.
        other: where `others` come from, for the message.
        is_close: a difference within rounding is none; if not, bits are compared.
    """
    tensors_by_rank = [_by_call(search.tensors) for search in ours]
    for key, theirs in _by_call(others).items():
        # A tensor of another shape is a rank's part, which cannot be compared.
        same = {
            rank: tensors[key]
            for rank, tensors in enumerate(tensors_by_rank)
            if key in tensors and tensors[key].value.shape == theirs.value.shape
        }
        distances = {
            rank: far
            for rank, own in same.items()
            if (far := _distance(own.value, theirs.value, is_close=is_close)) is not None
        }
        if distances:
            rank, far = next(iter(distances.items()))
            at = f" on rank {rank}" if len(distances) < len(same) else ""
            detail = f"{theirs.what} differs from that {other} by {far:.3g}{at}"
            return FaultLocation(degree, theirs.module, "", "", detail)
    return None


def _by_call(tensors: Sequence[ModuleTensor]) -> dict[tuple[str, str, int], ModuleTensor]:
    """Module, what, and number of the call -> tensor, in order."""
    table: dict[tuple[str, str, int], ModuleTensor] = {}
    calls: dict[tuple[str, str], int] = {}
    for each in tensors:
        call = calls[each.module, each.what] = calls.get((each.module, each.what), 0) + 1
        table[each.module, each.what, call] = each
    return table


def _distance(own: Tensor, theirs: Tensor, *, is_close: bool) -> float | None:
    """The largest distance of two tensors; None: they are the same."""
    if torch.equal(own, theirs):
        return None
    worst = float((own.double() - theirs.double()).abs().nan_to_num(torch.inf).max())
    size = float(theirs.double().abs().nan_to_num(0.0, 0.0, 0.0).max())
    if is_close and worst <= rtol_of(own.dtype) * size:
        return None
    return worst


def locate(
    run: Callable[[int, bool], Sequence[RankSearch]],
    differing: Sequence[int],
    degrees: Sequence[int],
) -> FaultLocation | None:
    """Where a case goes wrong; None if no place was found.

    Args:
        run: degree and whether the run is checked -> what its ranks found; degree 0: plain torch.
        differing: two degrees whose bits differ; empty if the case does not agree with plain torch.
        degrees: all that were run, lowest first.
    """
    failing = differing[-1] if differing else degrees[-1]
    named = [each.where for each in run(failing, True) if each.where is not None]
    operations = [where for where in named if where.operation]
    if operations:
        return operations[0]
    others, other = (
        (run(differing[0], False)[0], f"at degree {differing[0]}")
        if differing
        else (run(0, False)[0], "of plain PyTorch")
    )
    difference = first_different_module(
        run(failing, False), others.tensors, degree=failing, other=other, is_close=not differing
    )
    # A module says more than that ranks disagree.
    return difference or next(iter(named), None)
