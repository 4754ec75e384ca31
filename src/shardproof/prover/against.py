"""Compares a report with an earlier one, hash by hash: another day, another engine or degree."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardproof.errors import UsageError
from shardproof.prover.report import Report
from shardproof.wording import few, shown

Hashes = Mapping[str, Mapping[str, str]]  # tensor -> degree -> hash

OTHER_BITS = "other bits"
ONLY_HERE = "not in the earlier report"
ONLY_EARLIER = "only in the earlier report"


@dataclass(frozen=True)
class Difference:
    """One tensor in which two reports differ.

    Attributes:
        case, tensor: which.
        what: `OTHER_BITS`, or which report alone has it: `ONLY_HERE`, `ONLY_EARLIER`.
    """

    case: str
    tensor: str
    what: str


@dataclass(frozen=True)
class Comparison:
    """What two reports have in common, and where they differ.

    Attributes:
        compared: how many tensors the cases that both have hold, in either report.
        differences: in the order of this report; what it lacks follows at the end of a case.
    """

    compared: int
    differences: tuple[Difference, ...]

    @property
    def is_same(self) -> bool:
        """True if the cases that both reports have are the same."""
        return not self.differences


def compare_with(report: Report | Mapping[str, Any], earlier: Mapping[str, Any]) -> Comparison:
    """Compare every tensor of the cases that a report and an earlier one have in common.

    With invariant numerics a tensor has one hash, whatever the degree, so degree 4 of one report
    is compared with degree 2 of the other. With native numerics only equal degrees are compared.
    A tensor that one of the two lacks is a difference.

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
                f"the earlier report cannot be compared: its {what} is {shown(earlier[key])}, this "
                f"one's is {shown(now[key])}, and the bits depend on it. Run both with the same "
                f"{what}."
            )
    mine, theirs = _hashes(now), _hashes(earlier)
    across = now["numerics"] == "invariant"
    pairs = {case: (mine[case], theirs[case]) for case in mine if case in theirs}
    if not across:
        pairs = {case: _at_common_degrees(*pair) for case, pair in pairs.items()}
    compared = sum(len(one.keys() | other.keys()) for one, other in pairs.values())
    if not compared:
        raise UsageError(
            f"the earlier report has nothing in common with this one: it has the cases "
            f"{_listed(theirs)}, this one has {_listed(mine)}. Run a case that both have"
            + ("." if across else ", at a degree that both have.")
        )
    differences = [
        Difference(case, tensor, what)
        for case, pair in pairs.items()
        for tensor, what in _differences(*pair, across=across)
    ]
    return Comparison(compared, tuple(differences))


def _differences(mine: Hashes, theirs: Hashes, *, across: bool) -> Iterator[tuple[str, str]]:
    """Tensors of one case that are not the same in both, and what is the matter."""
    for tensor, hashes in mine.items():
        if tensor not in theirs:
            yield tensor, ONLY_HERE
        elif not _is_same(hashes, theirs[tensor], across=across):
            yield tensor, OTHER_BITS
    for tensor in theirs:
        if tensor not in mine:
            yield tensor, ONLY_EARLIER


def _is_same(mine: Mapping[str, str], theirs: Mapping[str, str], *, across: bool) -> bool:
    if across:
        return len({*mine.values(), *theirs.values()}) == 1
    return mine == theirs


def _at_common_degrees(mine: Hashes, theirs: Hashes) -> tuple[Hashes, Hashes]:
    """The hashes at the degrees that both have; tensors without any are left out."""
    degrees = [{degree for hashes in side.values() for degree in hashes} for side in (mine, theirs)]
    both = degrees[0] & degrees[1]
    return _only(mine, both), _only(theirs, both)


def _only(table: Hashes, degrees: set[str]) -> Hashes:
    kept = {
        tensor: {degree: sha for degree, sha in hashes.items() if degree in degrees}
        for tensor, hashes in table.items()
    }
    return {tensor: hashes for tensor, hashes in kept.items() if hashes}


def _hashes(report: Mapping[str, Any]) -> dict[str, Hashes]:
    """Case -> tensor -> degree -> hash, of all that was recorded on ranks."""
    return {
        case["name"]: {
            tensor["name"]: dict(tensor["sha256"]) for tensor in case["tensors"] if tensor["sha256"]
        }
        for case in report["cases"]
    }


def _listed(hashes: Mapping[str, Hashes]) -> str:
    return few((case for case, tensors in hashes.items() if tensors), most=20) or "none"
