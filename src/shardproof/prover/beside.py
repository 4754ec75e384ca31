"""What a notebook prints, and what a report of the same system says: row by row, as plain data."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof.prover.printed import TWO, Printed

Data = dict[str, Any]

NOT_RECORDED = "not recorded"
WITHOUT_TWO = "run degree 2"  # nothing is said of two ranks that were not there
ROUNDED = 1e-4  # of values that are printed with four decimals


def beside(printed: Sequence[Printed], case: Data, *, seed: int) -> list[Data]:
    """The notebook's results, each beside ours.

    Args:
        printed: what the notebook prints of the case.
        case: its report as plain data, made with the values shown.
        seed: of that report.
    Returns:
        One row for each printed shape, row of values, and comparison: "section", "label", "what",
        "notebook" and "ours", as text, and "same": whether both say the same, None if the two may
        differ or ours is missing. If the notebook has another seed, the first row says so, and
        the values have one row that says that they are not compared.
    """
    tensors = {tensor["name"]: tensor for tensor in case["tensors"]}
    rows: list[Data] = []
    others = {each.seed for each in printed} - {None, seed}
    for other in others:
        words = {"section": "", "label": "all numbers", "what": "seed", "notebook": str(other)}
        rows.append(words | {"ours": f"{seed}: other numbers", "same": None})
    for each in printed:
        facts = _facts(each, tensors.get(each.tensor), is_drawn_alike=each.seed not in others)
        for what, theirs, ours, same in facts:
            where = {"section": each.section, "label": each.label, "what": what}
            rows.append(where | {"notebook": theirs, "ours": ours, "same": same})
    return rows


def _facts(
    one: Printed, tensor: Data | None, *, is_drawn_alike: bool
) -> Iterator[tuple[str, str, str, bool | None]]:
    if one.shape is not None:
        yield _shape(one, tensor)
    if one.values is not None and is_drawn_alike:
        yield from _values(one, tensor)
    elif one.values is not None:
        yield "values", f"{len(one.values)} rows", f"not compared: run seed {one.seed}", None
    if one.close is not None:
        yield from _comparison(one, tensor)


def _shape(one: Printed, tensor: Data | None) -> tuple[str, str, str, bool | None]:
    theirs = _as_text(one.shape or ())
    if tensor is None:
        return "shape", theirs, NOT_RECORDED, None
    ours = tuple(tensor["shape"])
    if one.rank is not None:
        held = (tensor["shown"] or {"held": {}})["held"].get(str(TWO))
        if held is None:
            return "shape", theirs, WITHOUT_TWO, None
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
    missing = found if isinstance(found, str) else ""
    exact, close, apart = (None, None, None) if isinstance(found, str) else found
    if one.exact is not None:
        yield "exact", str(one.exact), missing or str(exact), None
    same = None if close is None else close == one.close
    yield "close", str(one.close), missing or str(close), same
    if one.max_diff is not None:
        yield "max diff", f"{one.max_diff:.2e}", missing or _difference(apart), None


def _compared(one: Printed, tensor: Data | None) -> tuple[bool, bool, float | None] | str:
    """The whole tensor as the report judged it; what two ranks made, from the numbers; or why not.

    The report judges the worst degree, so that it cannot say what two ranks made.
    """
    if tensor is None or tensor["torch"] is None:
        return NOT_RECORDED
    if one.rank is None and not one.is_of_two:
        judged = tensor["torch"]
        met = tensor["seed_allclose"]
        close = judged["allclose"] if met is None else met
        return judged["exact"], close, judged["max_abs_diff"]
    shown = tensor["shown"]
    if not shown or shown["ours"] is None or shown["torch"] is None:
        return NOT_RECORDED
    if shown["degree"] != TWO:
        return WITHOUT_TWO
    ours, plain = (_part(shown, which, one.rank) for which in ("ours", "torch"))
    is_close = torch.allclose(ours, plain)
    return bool((ours == plain).all()), is_close, (ours - plain).abs().max().item()


def _part(shown: Data, which: str, rank: int | None) -> Tensor:
    """What one of two ranks holds of a tensor that is cut along one dim, or not at all."""
    tensor, held = torch.tensor(shown[which]), shown["held"][str(TWO)]
    if rank is None:
        return tensor
    for dim, size in enumerate(tensor.shape):
        if held[rank][dim] != size:
            return tensor.narrow(dim, sum(shape[dim] for shape in held[:rank]), held[rank][dim])
    return tensor


def _as_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _difference(apart: float | None) -> str:
    return "not a number" if apart is None else f"{apart:.2e}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
