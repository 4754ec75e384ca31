"""Compares a report with an earlier one, hash by hash, as `prove --against` does.

An earlier report is a file, and may hold anything. `fault_of` checks it first. A report without a
fault can be compared without a further look: its names are text, each occurs once, and its hashes
are hashes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardproof.checked_values import LARGEST, whole_number
from shardproof.errors import UsageError
from shardproof.prover.report import Report
from shardproof.scheme import NUMERICS
from shardproof.wording import few, short_repr

Hashes = Mapping[str, Mapping[str, str]]  # tensor -> degree -> hash

OTHER_BITS = "other bits"
ONLY_HERE = "not in the earlier report"
ONLY_EARLIER = "only in the earlier report"

_NEEDED = ("proved", "leaves", "contract", "cases")
_HASH = re.compile(r"[0-9a-f]{64}")
_DEGREE = re.compile(r"[1-9][0-9]{0,9}")


@dataclass(frozen=True)
class TensorDifference:
    """One tensor in which two reports differ.

    Attributes:
        case, tensor: names of both.
        what: `OTHER_BITS`, `ONLY_HERE` or `ONLY_EARLIER`.
    """

    case: str
    tensor: str
    what: str


@dataclass(frozen=True)
class Comparison:
    """What two reports have in common, and where they differ.

    Attributes:
        compared: number of tensors that either report has in the cases that both have.
        differences: in the order of this report; tensors that it lacks come last in their case.
    """

    compared: int
    differences: tuple[TensorDifference, ...]

    @property
    def is_same(self) -> bool:
        """True if the cases that both reports have are the same."""
        return not self.differences


def compare_with(report: Report | Mapping[str, Any], earlier: Mapping[str, Any]) -> Comparison:
    """Compare every tensor of the cases that a report and an earlier one have in common.

    With invariant numerics a tensor has the same hash at every degree, so degree 4 of one report is
    compared with degree 2 of the other. With native numerics only equal degrees are compared. A
    tensor that only one report has is a difference.

    Args:
        report: the new one.
        earlier: the JSON data of the earlier one, without a fault.

    Raises:
        UsageError: the reports cannot be compared: another contract or seed, or nothing in common.
    """
    now = report.as_dict() if isinstance(report, Report) else report
    for key, what in (("contract", "contract"), ("seed", "seed"), ("numerics", "numerics")):
        if key in earlier and now[key] != earlier[key]:
            raise UsageError(
                f"the earlier report cannot be compared: its {what} is {short_repr(earlier[key])}, "
                f"this one's is {short_repr(now[key])}, and the bits depend on it. Run both with "
                f"the same {what}."
            )
    new, old = _hashes(now), _hashes(earlier)
    across = now["numerics"] == "invariant"
    pairs = {case: (new[case], old[case]) for case in new if case in old}
    if not across:
        pairs = {case: _at_common_degrees(*pair) for case, pair in pairs.items()}
    compared = sum(len(one.keys() | other.keys()) for one, other in pairs.values())
    if not compared:
        raise UsageError(
            f"the earlier report has nothing in common with this one: it has the cases "
            f"{_listed(old)}, this one has {_listed(new)}. Run a case that both have"
            + ("." if across else ", at a degree that both have.")
        )
    differences = [
        TensorDifference(case, tensor, what)
        for case, pair in pairs.items()
        for tensor, what in _differences(*pair, across=across)
    ]
    return Comparison(compared, tuple(differences))


def _differences(new: Hashes, old: Hashes, *, across: bool) -> Iterator[tuple[str, str]]:
    """The tensors of one case that differ, and how."""
    for tensor, hashes in new.items():
        if tensor not in old:
            yield tensor, ONLY_HERE
        elif not _is_same(hashes, old[tensor], across=across):
            yield tensor, OTHER_BITS
    for tensor in old:
        if tensor not in new:
            yield tensor, ONLY_EARLIER


def _is_same(new: Mapping[str, str], old: Mapping[str, str], *, across: bool) -> bool:
    if across:
        return len({*new.values(), *old.values()}) == 1
    return new == old


def _at_common_degrees(new: Hashes, old: Hashes) -> tuple[Hashes, Hashes]:
    """The hashes at the degrees that both have; tensors without a hash there are left out."""
    degrees = [{degree for hashes in side.values() for degree in hashes} for side in (new, old)]
    both = degrees[0] & degrees[1]
    return _only(new, both), _only(old, both)


def _only(table: Hashes, degrees: set[str]) -> Hashes:
    hashes_by_tensor = {
        tensor: {degree: sha for degree, sha in hashes.items() if degree in degrees}
        for tensor, hashes in table.items()
    }
    return {tensor: hashes for tensor, hashes in hashes_by_tensor.items() if hashes}


def _hashes(report: Mapping[str, Any]) -> dict[str, Hashes]:
    """Case -> tensor -> degree -> hash, of the tensors that ranks recorded."""
    return {
        case["name"]: {
            tensor["name"]: dict(tensor["sha256"]) for tensor in case["tensors"] if tensor["sha256"]
        }
        for case in report["cases"]
    }


def _listed(hashes: Mapping[str, Hashes]) -> str:
    return few((case for case, tensors in hashes.items() if tensors), most=20) or "none"


def fault_of(report: Any) -> str:
    """Why JSON data is not a report that can be compared with; "" if it is one."""
    if not isinstance(report, dict):
        return f"it holds a {type(report).__name__}, not an object"
    missing = [key for key in _NEEDED if key not in report]
    if missing:
        return f"it has no {' and no '.join(map(repr, missing))}"
    return _of_head(report) or _of_cases(report["cases"]) or _of_answer(report)


def _of_head(report: dict[str, Any]) -> str:
    leaves = whole_number(report["leaves"])
    if leaves is None or not 1 <= leaves <= LARGEST:
        return f"its leaves are {short_repr(report['leaves'])}, which is not a positive number"
    if not isinstance(report["contract"], str) or not report["contract"]:
        return f"its contract is {short_repr(report['contract'])}, which is not text"
    if "seed" in report and whole_number(report["seed"]) is None:
        return f"its seed is {short_repr(report['seed'])}, which is not a whole number"
    numerics = report.get("numerics", NUMERICS[0])
    if not isinstance(numerics, str) or numerics not in NUMERICS:
        return f"its numerics are {short_repr(numerics)}, which is none of {', '.join(NUMERICS)}"
    if not isinstance(report["proved"], bool):
        return f"'proved' is {short_repr(report['proved'])}, which is neither true nor false"
    return ""


def _of_answer(report: dict[str, Any]) -> str:
    """Why the report's own answer forbids a comparison; "" if it does not.

    A report that was not proved has no single hash to compare with. Native numerics promise no
    equal bits between degrees, so such a report is rarely proved; it is compared degree by degree,
    and the command says that it was not proved.
    """
    if report.get("numerics") == "native":
        return ""
    if not report["proved"]:
        return "it says that it was not proved"
    bad = next((case for case in report["cases"] if case.get("proved", True) is not True), None)
    return "" if bad is None else f"it says that case {short_repr(bad['name'])} was not proved"


def _of_cases(cases: Any) -> str:
    if not isinstance(cases, list):
        return "'cases' is not a list of cases with names and tensors"
    names: set[str] = set()
    for case in cases:
        if not isinstance(case, dict) or not isinstance(case.get("tensors"), list):
            return "'cases' is not a list of cases with names and tensors"
        fault = _of_name(case, names, "a case") or _of_tensors(case)
        if fault:
            return fault
    return ""


def _of_tensors(case: dict[str, Any]) -> str:
    where, names = f"case {short_repr(case['name'])}", set[str]()
    for tensor in case["tensors"]:
        if not isinstance(tensor, dict) or not isinstance(tensor.get("sha256"), dict):
            return f"a tensor of {where} has no hashes"
        fault = _of_name(tensor, names, f"a tensor of {where}")
        if fault:
            return fault
        for degree, sha in tensor["sha256"].items():
            if not _DEGREE.fullmatch(degree):
                return f"a tensor of {where} has a hash at {short_repr(degree)}, which is no degree"
            if not isinstance(sha, str) or not _HASH.fullmatch(sha):
                return (
                    f"tensor {short_repr(tensor['name'])} of {where} has the hash {short_repr(sha)}"
                )
    return ""


def _of_name(what: dict[str, Any], names_before: set[str], kind: str) -> str:
    """The fault of a name; adds the name to the known ones."""
    if "name" not in what:
        return "a case or a tensor has no name"
    name = what["name"]
    if not isinstance(name, str) or not name:
        return f"{kind} has the name {short_repr(name)}, which is not text"
    if name in names_before:
        return f"{kind} has the name {short_repr(name)}, which is there twice"
    names_before.add(name)
    return ""
