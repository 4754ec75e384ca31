"""What a proof is asked for, checked as a whole before anything runs."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from shardproof.errors import UsageError
from shardproof.leaves import check_degree, checked_degree
from shardproof.prover.case import Case
from shardproof.scheme import Scheme, checked_scheme
from shardproof.wording import shown

MOST_DEGREES = 1000


def checked_degrees(degrees: Any, scheme: Scheme | None) -> tuple[int, ...]:
    """The degrees once each, lowest first.

    Args:
        degrees: what was asked for.
        scheme: whose leaves must serve them; None leaves that to the layers.

    Raises:
        DegreeError: one that is no whole number, is not positive, or exceeds the leaves.
        UsageError: there is none, or something else than a list of them.
    """
    try:
        is_text = isinstance(degrees, str | bytes)
        given = None if is_text else tuple(islice(degrees, MOST_DEGREES + 1))
    except TypeError:  # nothing that can be gone through
        given = None
    if given is None:
        raise UsageError(
            f"degrees={shown(degrees)} is not a list of degrees. Write for instance degrees=(1, 2)."
        )
    if len(given) > MOST_DEGREES:
        raise UsageError(
            f"degrees has more than {MOST_DEGREES} entries, and each is a run of its own. Name "
            "fewer, such as (1, 2, 3, 8)."
        )
    ordered = tuple(sorted({checked_degree(degree) for degree in given}))
    if not ordered:
        raise UsageError("no degree to prove. Name one or more, such as 1 and 2.")
    if scheme is not None:
        checked_scheme(scheme)
        for degree in ordered:
            check_degree(degree, scheme.leaves)
    return ordered


def check_function(value: Any, name: str, *, example: str) -> None:
    """Raise unless a user gave something that can be called.

    Raises:
        UsageError: they did not.
    """
    if not callable(value):
        raise UsageError(f"{name}={shown(value)} cannot be called. Give for instance {example}.")


def checked_batch(batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs, always as a tuple, and target.

    Raises:
        UsageError: not a pair of them, or something in it is not a tensor.
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


def check_cases(cases: Sequence[Case]) -> None:
    """Raise unless there is something to run, each under its own name, all of it installed.

    Raises:
        UsageError: no case, a name twice, or an extra that is not installed.
    """
    names = [case.name for case in cases]
    if not names:
        raise UsageError("no case to prove. Name one or more.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"case {twice[0]!r} is there twice. Give every case its own name.")
    for case in cases:
        if not case.is_installed:
            raise UsageError(
                f"case {case.name!r} needs the extra {case.extra!r}, which is not installed. "
                f"Install shardproof[{case.extra}], or leave the case out."
            )
