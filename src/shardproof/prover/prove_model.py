"""`sp.prove`: the proof for a model of the caller's own."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.checked_objects import checked_model
from shardproof.checked_values import checked_flag, checked_name, checked_whole
from shardproof.errors import UsageError
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.proof import DEGREES, prove_cases
from shardproof.prover.report import Report
from shardproof.prover.training import Batch, MakeOptimizer, Training, make_optimizer
from shardproof.scheme import Scheme, checked_degrees
from shardproof.wording import short_repr

UserBatch = tuple[Tensor | tuple[Tensor, ...], Tensor]  # inputs, target


def prove(
    build: Callable[[Axis | None], nn.Module],
    loss_fn: Callable[[Any, Tensor], Tensor],
    batch: UserBatch,
    *,
    degrees: Sequence[int] = DEGREES,
    optimizer: MakeOptimizer | None = None,
    steps: int = 1,
    engine: str = "threads",
    threads: int | None = None,
    transport: str = "auto",
    scheme: Scheme | None = None,
    name: str = "model",
    audit_creation: bool = True,
    allow_nonfinite: bool = False,
    resume: bool = False,
) -> Report:
    """Prove that a model gives the same bits at every degree and agrees with plain torch.

    Args:
        build: `build(axis)` makes the model of one rank, `build(None)` the plain torch module,
            with the same parameter names and numbers. Draw from a generator of your own.
        loss_fn: computes the loss from `module(*inputs)`, which must be a tensor, and the target.
        batch: inputs (a tensor or a tuple of them) and target.
        degrees: how many ranks; each is run once, lowest first.
        optimizer: makes one for some parameters; None updates nothing.
        steps: how many; agreement with plain torch is judged on the first.
        engine: "threads" or "processes".
        threads: intra-op threads of each rank; by default the ranks share this process's.
        transport: what carries bytes between the ranks, as in `launch`.
        scheme: that every layer must have; None accepts any that all layers have.
        name: of the model in the report.
        audit_creation: False leaves `build` out of the memory audit: it makes a model whole first.
        allow_nonfinite: whether NaN and Inf may be proved; those of a constant mask always may.
        resume: also save the model in the middle, at every degree, and go on at another one.

    Returns:
        A report; `report.proved` is the answer. It is False where a degree above 1 cut nothing.

    Raises:
        UsageError: an argument makes no sense, the module returns no tensor, or schemes differ.
        DegreeError: a degree is not positive or exceeds the leaves.
        NumericsError: the optimizer is a fused one, or this process cannot promise the bits.

    Example:
        >>> prove(build, loss_fn, (x, y), degrees=(1, 2)).proved  # doctest: +SKIP
    """
    degrees = checked_degrees(degrees, scheme)
    work = _training(build, loss_fn, batch, _checked_optimizer(optimizer), steps, audit_creation)
    return prove_cases(
        [Case(checked_name(name, "name"), "a model given to prove()", work)],
        degrees=degrees,
        engine=engine,
        threads=threads,
        transport=transport,
        scheme=scheme,
        seed=None,
        allow_nonfinite=allow_nonfinite,
        resume=checked_flag(resume, "resume"),
    )


def _training(
    build: Callable[[Axis | None], nn.Module],
    loss_fn: Callable[[Any, Tensor], Tensor],
    batch: UserBatch,
    optimizer: MakeOptimizer | None,
    steps: int,
    audit_creation: bool,
) -> Training:
    _check_function(build, "build", example="a function of an axis that returns a module")
    _check_function(loss_fn, "loss_fn", example="torch.nn.functional.mse_loss")
    return Training(
        functools.partial(_build, build),
        functools.partial(_batch, *_checked_batch(batch)),
        functools.partial(_loss, loss_fn),
        optimizer,
        checked_whole(steps, "steps"),
        measures_creation=checked_flag(audit_creation, "audit_creation"),
    )


def _checked_optimizer(make: MakeOptimizer | None) -> MakeOptimizer | None:
    """The function that makes the optimizer; a fused one is refused before any run."""
    if make is not None:
        _check_function(make, "optimizer", example="lambda p: torch.optim.SGD(p, lr=0.1)")
        make_optimizer(make, nn.Linear(1, 1, device="meta").to_empty(device="cpu"))
    return make


def _build(build: Callable[[Axis | None], nn.Module], run: CaseRun) -> nn.Module:
    model = checked_model(build(run.axis), what="what build returned")
    # Plain torch casts and trains the model, which may be the caller's own, from which the ranks
    # are cut later.
    return copy.deepcopy(model) if run.is_reference else model


def _batch(inputs: tuple[Tensor, ...], target: Tensor, run: CaseRun) -> Batch:
    return Batch(inputs, target)


def _loss(
    loss_fn: Callable[[Any, Tensor], Tensor], run: CaseRun, output: Tensor, target: Tensor
) -> Tensor:
    return loss_fn(output, target)


def _check_function(value: Any, name: str, *, example: str) -> None:
    """Raise unless the value can be called.

    Raises:
        UsageError: it cannot.
    """
    if not callable(value):
        raise UsageError(
            f"{name}={short_repr(value)} cannot be called. Give for instance {example}."
        )


def _checked_batch(batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """The inputs as a tuple, and the target.

    Raises:
        UsageError: the batch is no pair, or a member is not a tensor.
    """
    way_out = "Give (inputs, target), inputs being a tensor or a tuple of tensors."
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise UsageError(f"the batch is a {type(batch).__name__}{length}, not a pair. {way_out}")
    inputs, target = batch
    inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if not inputs:
        raise UsageError(f"the batch has no input. {way_out}")
    for what, value in [*(("an input", each) for each in inputs), ("the target", target)]:
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{what} of the batch is of type {type(value).__name__}, not a tensor. {way_out}"
            )
    return inputs, target
