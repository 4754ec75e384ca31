"""The proof on ranks that exist already: torchrun's.

The degree is torchrun's, and degree 1 runs on rank 0 alone. Whatever one rank does alone is
followed by an exchange of how it went, so that all ranks raise or none does. Inside a case there
is no such exchange: a rank that raises there leaves the others in a collective, and torchrun ends
them when it exits.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from shardproof.axis import Axis
from shardproof.errors import RankError
from shardproof.prover.case import Case
from shardproof.prover.given import check_cases, checked_degrees
from shardproof.prover.proof import (
    DEFAULT_SEED,
    Carrier,
    Progress,
    Proof,
    References,
    Results,
    Teller,
)
from shardproof.prover.report import Report
from shardproof.prover.runs import RankResult
from shardproof.scheme import Scheme
from shardproof.telling import text_of
from shardproof.torchrun import host_of
from shardproof.transport.base import Call

T = TypeVar("T")


def prove_under_torchrun(
    cases: Sequence[Case],
    axis: Axis,
    *,
    threads: int | None = None,
    scheme: Scheme = Scheme(),  # noqa: B008 - frozen
    seed: int = DEFAULT_SEED,
    progress: Progress | None = None,
    skipped: Sequence[dict[str, str]] = (),
    allow_nonfinite: bool = False,
    few: int = 0,
) -> Report | None:
    """Run every case on torchrun's ranks, and on rank 0 alone; every rank calls this.

    Args:
        cases: what to run; each name once, the same on every rank.
        axis: torchrun's ranks, from `Axis.from_env()`.
        threads: intra-op threads of each rank; None leaves them as they are.
        scheme: leaves and numerics.
        seed: of everything the cases draw.
        progress: called on rank 0 before each run, and once at the end.
        skipped: cases left out, for the report: name and extra.
        allow_nonfinite: whether a tensor with NaN or Inf may be proved.
        few: show the numbers of tensors with at most so many in the report; 0 shows none.

    Returns:
        The report on rank 0, None on the others.

    Raises:
        DegreeError, UsageError, NumericsError: as `prove_cases` does, on every rank.
        RankError: on the ranks that did nothing wrong, if another one raised.
    """
    degrees = checked_degrees({1, axis.size}, scheme)
    if threads is not None:
        torch.set_num_threads(threads)
    proof = Proof(cases, scheme, seed, skipped, allow_nonfinite, few)
    tell = Teller(progress if axis.rank == 0 else None, total=len(cases) * (1 + len(degrees)))
    with tempfile.TemporaryDirectory(prefix="shardproof-") as folder:
        references = _share_references(proof, axis, Path(folder), tell)
        alone = _together(axis, lambda: _run_alone(proof, axis, references, tell))[0]
        mine = _run_all(proof, axis, references, tell) if axis.size > 1 else {}
        # Also the last sight of the references: before it, no host may remove them.
        everyone = axis.transport.gather_objects(mine, call=Call("gather", "prover", "report"))
        if axis.rank:
            return None
        results: Results = {case.name: {1: [alone[case.name]]} for case in cases}
        if axis.size > 1:
            for case in cases:
                results[case.name][axis.size] = [rank[case.name] for rank in everyone]
        judged = proof.judge(results, references)
    tell("done")
    return proof.report(
        judged,
        results,
        degrees=degrees,
        engine="torchrun",
        carrier=Carrier(axis.transport.name, axis.transport_note, axis.overlap),
    )


def _share_references(proof: Proof, axis: Axis, folder: Path, tell: Teller) -> References:
    """The references of this host: its first rank makes them, the others are told where."""
    host, is_first = host_of(os.environ)

    def make() -> tuple[str, References | None]:
        check_cases(proof.cases)
        if not is_first:
            return host, None
        return host, proof.make_references(folder, tell)

    for other, references in _together(axis, make):
        if other == host and references is not None:
            return references
    raise RankError(
        f"no rank on host {host!r} has LOCAL_RANK=0, so nobody there made the reference. "
        f"Start the ranks with torchrun, which sets it."
    )


def _run_alone(
    proof: Proof, axis: Axis, references: References, tell: Teller
) -> dict[str, RankResult]:
    """Degree 1, on rank 0; the others have nothing to do."""
    return {} if axis.rank else _run_all(proof, Axis.solo(overlap=axis.overlap), references, tell)


def _run_all(
    proof: Proof, axis: Axis, references: References, tell: Teller
) -> dict[str, RankResult]:
    results = {}
    for case in proof.cases:
        tell(f"{case.name}, degree {axis.size}")
        results[case.name] = proof.work(case, references)(axis)
    return results


def _together(axis: Axis, do: Callable[[], T]) -> list[T]:
    """Call `do` on every rank, without collectives in it; every rank's result, or all raise.

    Raises:
        RankError: another rank raised; this one's own error is raised as it is.
    """
    error: Exception | None = None
    value: Any = None
    try:
        value = do()
    except Exception as raised:  # told to the others, then raised again
        error = raised
    told = (value, None if error is None else text_of(error))
    everyone = axis.transport.gather_objects(told, call=Call("gather", "prover", "outcome"))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise RankError(f"rank {rank} of {axis.size} raised {message}", rank=rank)
    return [value for value, _ in everyone]
