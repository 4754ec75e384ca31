"""What an earlier report must say before anything is compared with it.

A report is a file, and may be anything. One that has passed here can be compared without a
further look: its names are text and each is there once, and its hashes are hashes.
"""

import re
from typing import Any

from shardproof.quantities import LARGEST, whole_number
from shardproof.scheme import NUMERICS
from shardproof.wording import shown

_NEEDED = ("proved", "leaves", "contract", "cases")
_HASH = re.compile(r"[0-9a-f]{64}")
_DEGREE = re.compile(r"[1-9][0-9]{0,9}")


def fault_of(report: Any) -> str:
    """What keeps plain data from being a report that proves something; empty if nothing does."""
    if not isinstance(report, dict):
        return f"it holds a {type(report).__name__}, not an object"
    missing = [key for key in _NEEDED if key not in report]
    if missing:
        return f"it has no {' and no '.join(map(repr, missing))}"
    return _of_head(report) or _of_cases(report["cases"]) or _of_answer(report)


def _of_head(report: dict[str, Any]) -> str:
    leaves = whole_number(report["leaves"])
    if leaves is None or not 1 <= leaves <= LARGEST:
        return f"its leaves are {shown(report['leaves'])}, which is not a positive number"
    if not isinstance(report["contract"], str) or not report["contract"]:
        return f"its contract is {shown(report['contract'])}, which is not text"
    if "seed" in report and whole_number(report["seed"]) is None:
        return f"its seed is {shown(report['seed'])}, which is not a whole number"
    numerics = report.get("numerics", NUMERICS[0])
    if not isinstance(numerics, str) or numerics not in NUMERICS:
        return f"its numerics are {shown(numerics)}, which is none of {', '.join(NUMERICS)}"
    if not isinstance(report["proved"], bool):
        return f"'proved' is {shown(report['proved'])}, which is neither true nor false"
    return ""


def _of_answer(report: dict[str, Any]) -> str:
    """Why its own answer is no basis: what was not the same then can be like nothing now.

    Native numerics promise no bits over degrees, so that such a report is seldom proved; it is
    compared degree by degree, and whoever compares says that it was not.
    """
    if report.get("numerics") == "native":
        return ""
    if not report["proved"]:
        return "it says that it was not proved"
    bad = next((case for case in report["cases"] if case.get("proved", True) is not True), None)
    return "" if bad is None else f"it says that case {shown(bad['name'])} was not proved"


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
    where, names = f"case {shown(case['name'])}", set[str]()
    for tensor in case["tensors"]:
        if not isinstance(tensor, dict) or not isinstance(tensor.get("sha256"), dict):
            return f"a tensor of {where} has no hashes"
        fault = _of_name(tensor, names, f"a tensor of {where}")
        if fault:
            return fault
        for degree, sha in tensor["sha256"].items():
            if not _DEGREE.fullmatch(degree):
                return f"a tensor of {where} has a hash at {shown(degree)}, which is no degree"
            if not isinstance(sha, str) or not _HASH.fullmatch(sha):
                return f"tensor {shown(tensor['name'])} of {where} has the hash {shown(sha)}"
    return ""


def _of_name(what: dict[str, Any], known: set[str], kind: str) -> str:
    """The fault of a name, which is added to those that are known."""
    if "name" not in what:
        return "a case or a tensor has no name"
    name = what["name"]
    if not isinstance(name, str) or not name:
        return f"{kind} has the name {shown(name)}, which is not text"
    if name in known:
        return f"{kind} has the name {shown(name)}, which is there twice"
    known.add(name)
    return ""
