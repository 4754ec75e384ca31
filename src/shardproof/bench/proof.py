"""Right first, then fast: what a rank's tensors are compared with before anything is timed.

The yardstick, plain torch, leaves its tensors in files; every rank of every other system compares
its own part with them, by the prover's rule. Ranks with invariant numerics also hash theirs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardproof.bench.work import Evidence
from shardproof.prover.compare import Figures, tolerance


@dataclass(frozen=True)
class Finding:
    """What is wrong with one tensor of one rank.

    Attributes:
        name: of the tensor.
        text: continues the sentence "output ...".
    """

    name: str
    text: str


def keep(evidence: Iterable[Evidence], folder: Path) -> None:
    """Leave a yardstick's tensors, which are whole, for the others."""
    for place, each in enumerate(evidence):
        largest = each.tensor.abs().max()
        torch.save((each.name, each.tensor.contiguous(), largest), folder / f"{place:03}.pt")


def kept(folder: Path) -> dict[str, tuple[Tensor, float]]:
    """Name -> tensor, read from its file where it is touched, and its largest element."""
    found = {}
    for path in sorted(folder.glob("*.pt")):
        name, tensor, largest = torch.load(path, mmap=True, weights_only=True)
        found[name] = tensor, float(largest)
    return found


def findings(
    shown: Sequence[Evidence], reference: Mapping[str, tuple[Tensor, float]]
) -> list[Finding]:
    """What is wrong with a rank's tensors.

    A tensor that the reference has and the rank does not show is wrong too.
    """
    wrong = [found for each in shown for found in _compare(each, reference)]
    missing = set(reference) - {each.name for each in shown}
    return wrong + [Finding(name, "was not computed") for name in sorted(missing)]


def _compare(each: Evidence, reference: Mapping[str, tuple[Tensor, float]]) -> list[Finding]:
    if each.expected is not None:
        expected, largest = each.expected, float(each.expected.abs().max())
    elif each.name in reference:
        whole, largest = reference[each.name]
        if tuple(whole.shape) != each.layout.shape:
            return [Finding(each.name, f"has shape {each.layout.shape}, not {tuple(whole.shape)}")]
        expected = whole
        if each.layout.dim is not None:
            owned = each.layout.owned
            expected = whole.narrow(each.layout.dim, owned.start, len(owned))
    else:
        return [Finding(each.name, "is not what plain torch computes at all")]
    if each.tensor.shape != expected.shape:
        shapes = f"{tuple(each.tensor.shape)}, not {tuple(expected.shape)}"
        return [Finding(each.name, f"is held as {shapes}")]
    rtol, atol = tolerance(each.tensor.dtype)
    figures = _figures(each.tensor, expected, largest)
    if figures.agrees(rtol, atol):
        return []
    if not figures.same_nonfinite:
        return [Finding(each.name, "has NaN or Inf where plain torch has none")]
    allowed = rtol * largest + atol
    return [
        Finding(
            each.name,
            f"differs from plain torch by {figures.max_abs_diff:.2e}, and {allowed:.2e} is allowed",
        )
    ]


def _figures(tensor: Tensor, expected: Tensor, largest: float) -> Figures:
    if not tensor.numel():
        return Figures(max_abs_reference=largest)
    difference = (tensor - expected).abs_().max()
    return Figures(
        same_nonfinite=bool(difference.isfinite()),
        max_abs_diff=float(difference.nan_to_num()),
        max_abs_reference=largest,
    )
