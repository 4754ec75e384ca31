"""What a notebook prints, and what a report of the same system says: row by row, as plain data."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof.prover.printed import Printed

Data = dict[str, Any]

NOT_RECORDED = "not recorded"
ROUNDED = 1e-4  # of values that are printed with four decimals
TWO = "2"  # the degree whose ranks a notebook's two devices are


def beside(printed: Sequence[Printed], case: Data) -> list[Data]:
    """The notebook's results, each beside ours.

    Args:
        printed: what the notebook prints of the case.
        case: its report as plain data, made with the values shown.
    Returns:
        One row for each printed shape, row of values, and comparison: "section", "label", "what",
        "notebook" and "ours", as text, and "same": whether both say the same, None where ours
        need not (which bits plain torch has) or is not there.
    """
    tensors = {tensor["name"]: tensor for tensor in case["tensors"]}
    rows: list[Data] = []
    for each in printed:
        for what, theirs, ours, same in _facts(each, tensors.get(each.tensor)):
            where = {"section": each.section, "label": each.label, "what": what}
            rows.append(where | {"notebook": theirs, "ours": ours, "same": same})
    return rows


def _facts(one: Printed, tensor: Data | None) -> Iterator[tuple[str, str, str, bool | None]]:
    if one.shape is not None:
        yield _shape(one, tensor)
    if one.values is not None:
        yield from _values(one, tensor)
    if one.close is not None:
        yield from _comparison(one, tensor)


def _shape(one: Printed, tensor: Data | None) -> tuple[str, str, str, bool | None]:
    theirs = _as_text(one.shape or ())
    if tensor is None:
        return "shape", theirs, NOT_RECORDED, None
    ours = tuple(tensor["shape"])
    if one.rank is not None:
        held = (tensor["shown"] or {"held": {}})["held"].get(TWO)
        if held is None:
            return "shape", theirs, "run degree 2", None
        ours = tuple(held[one.rank])
    stored = ours[::-1] if ours != one.shape and ours[::-1] == one.shape else ours
    text = _as_text(ours) + (", the transpose" if stored != ours else "")
    same = tuple(size for size in stored if size > 1) == tuple(s for s in one.shape or () if s > 1)
    return "shape", theirs, text, same


def _values(one: Printed, tensor: Data | None) -> Iterator[tuple[str, str, str, bool | None]]:
    shown = tensor["shown"] if tensor is not None else None
    ours = shown["ours"] if shown else None
    for i, theirs in enumerate(one.values or ()):
        text = NOT_RECORDED if ours is None else _numbers(ours[i])
        apart = (
            None if ours is None else max(abs(a - b) for a, b in zip(theirs, ours[i], strict=True))
        )
        yield f"row {i}", _numbers(theirs), text, None if apart is None else apart <= ROUNDED


def _comparison(one: Printed, tensor: Data | None) -> Iterator[tuple[str, str, str, bool | None]]:
    """Equal, close, how far apart: the notebook's from autograd's, ours from plain torch's."""
    found = _compared(one, tensor)
    exact, close, apart = found if found is not None else (None, None, None)
    if one.exact is not None:
        yield "exact", str(one.exact), _word(exact), None
    same = None if close is None else close == one.close
    yield "close", str(one.close), _word(close), same
    if one.max_diff is not None:
        yield (
            "max diff",
            f"{one.max_diff:.2e}",
            NOT_RECORDED if apart is None else f"{apart:.2e}",
            None,
        )


def _compared(one: Printed, tensor: Data | None) -> tuple[bool, bool, float] | None:
    """The whole tensor as the report judged it; of one rank's part, from the numbers."""
    if tensor is None or tensor["torch"] is None:
        return None
    if one.rank is None:
        judged = tensor["torch"]
        met = tensor["seed_allclose"]
        close = judged["allclose"] if met is None else met
        return judged["exact"], close, judged["max_abs_diff"]
    shown = tensor["shown"]
    if not shown or shown["ours"] is None or shown["torch"] is None or TWO not in shown["held"]:
        return None
    ours, plain = (_part(shown, which, one.rank) for which in ("ours", "torch"))
    is_close = torch.allclose(ours, plain)
    return bool((ours == plain).all()), is_close, (ours - plain).abs().max().item()


def _part(shown: Data, which: str, rank: int) -> Tensor:
    """What one of two ranks holds of a tensor that is cut along one dim, or not at all."""
    tensor, held = torch.tensor(shown[which]), shown["held"][TWO]
    for dim, size in enumerate(tensor.shape):
        if held[rank][dim] != size:
            return tensor.narrow(dim, sum(shape[dim] for shape in held[:rank]), held[rank][dim])
    return tensor


def _as_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _word(answer: bool | None) -> str:
    return NOT_RECORDED if answer is None else str(answer)
