"""How close a report's tensors are to fp64, ours against plain torch's."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Accuracy:
    """Errors against fp64, ours over plain torch's.

    Attributes:
        median: of the ratios; None if there is none.
        ratios: (case, tensor) -> ratio; infinite where torch is exact and ours is not.
        both_exact: tensors without any error on either side: 0/0 is no ratio, they are left out.
        without_number: tensors with NaN, Inf or an error of a zero tensor; left out too.
    """

    median: float | None
    ratios: Mapping[tuple[str, str], float]
    both_exact: int
    without_number: int


def accuracy(report: Mapping[str, Any], *, cases: Iterable[str] | None = None) -> Accuracy:
    """Ratios of fp64 errors in a report's plain data.

    Args:
        report: what `Report.as_dict` returns.
        cases: names of the cases to count; all if not given.
    """
    wanted = None if cases is None else set(cases)
    ratios: dict[tuple[str, str], float] = {}
    both_exact = without_number = 0
    for case in report["cases"]:
        if wanted is not None and case["name"] not in wanted:
            continue
        for tensor in case["tensors"]:
            errors = tensor["fp64"]
            if errors is None:
                continue
            ours, torch = errors["ours"], errors["torch"]
            if ours is None or torch is None:
                without_number += 1
            elif ours == torch == 0.0:
                both_exact += 1
            else:
                ratios[case["name"], tensor["name"]] = ours / torch if torch else math.inf
    median = statistics.median(ratios.values()) if ratios else None
    return Accuracy(median, ratios, both_exact, without_number)
