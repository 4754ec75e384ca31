"""Compares a report with an earlier one, hash by hash: another day, another engine or degree."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardproof.errors import UsageError
from shardproof.prover.report import Report

Hashes = dict[tuple[str, str], dict[str, str]]  # (case, tensor) -> degree -> hash


@dataclass(frozen=True)
class Comparison:
    """What two reports have in common, and where they differ.

    Attributes:
        compared: how many tensors both have.
        differences: (case, tensor) of those whose hashes are not all the same, in order.
    """

    compared: int
    differences: tuple[tuple[str, str], ...]

    @property
    def is_same(self) -> bool:
        """True if everything that both reports have is the same."""
        return not self.differences


def compare_with(report: Report | Mapping[str, Any], earlier: Mapping[str, Any]) -> Comparison:
    """Compare every hash that a report and an earlier one have in common.

    With invariant numerics a tensor has one hash, whatever the degree, so degree 4 of one report
    is compared with degree 2 of the other. With native numerics only equal degrees are compared.

    Args:
        report: the one just made.
        earlier: the plain data of another, as `--json` wrote it.

    Raises:
        UsageError: the reports cannot be compared: another contract or seed, or nothing in common.
    """
    now = report.as_dict() if isinstance(report, Report) else report
    for key, what in (("contract", "contract"), ("seed", "seed"), ("numerics", "numerics")):
        if key in earlier and now[key] != earlier[key]:
            raise UsageError(
                f"the earlier report cannot be compared: its {what} is {earlier[key]!r}, this "
                f"one's is {now[key]!r}, and the bits depend on it. Run both with the same {what}."
            )
    mine, theirs = _hashes(now), _hashes(earlier)
    across = now["numerics"] == "invariant"
    common = [key for key in mine if key in theirs and (across or mine[key].keys() & theirs[key])]
    if not common:
        raise UsageError(
            f"the earlier report has nothing in common with this one: it has the cases "
            f"{_cases(theirs)}, this one has {_cases(mine)}. Run a case that both have"
            + ("." if across else ", at a degree that both have.")
        )
    differences = [key for key in common if not _is_same(mine[key], theirs[key], across=across)]
    return Comparison(len(common), tuple(differences))


def _is_same(mine: Mapping[str, str], theirs: Mapping[str, str], *, across: bool) -> bool:
    if across:
        return len({*mine.values(), *theirs.values()}) == 1
    return all(mine[degree] == theirs[degree] for degree in mine.keys() & theirs.keys())


def _hashes(report: Mapping[str, Any]) -> Hashes:
    return {
        (case["name"], tensor["name"]): dict(tensor["sha256"])
        for case in report["cases"]
        for tensor in case["tensors"]
        if tensor["sha256"]
    }


def _cases(hashes: Hashes) -> str:
    return ", ".join(dict.fromkeys(case for case, _ in hashes)) or "none"
