"""What the four teaching notebooks print, and how it compares with a report of the same case.

Cases, lessons and tests read the printed results from here. Every value was copied from the
notebook's own output, with these exceptions. Notebook 000 is kept without outputs: its shapes
follow from its code. The outputs of notebook 001 were drawn without a random seed and cannot be
repeated, so only its shapes and its one comparison are here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardproof.prover.case import NOTEBOOK_DEGREE, PrintedResult

Data = dict[str, Any]

NOT_RECORDED = "not recorded"
WITHOUT_TWO = "run degree 2"  # printed by two ranks, and degree 2 was not run
ROUNDED = 1e-4  # of values that are printed with four decimals

MATMUL = "000_c325d0b38caeb9c9.txt"
FEED_FORWARD = "001_154408528b93d477.txt"
LINEAR = "002_bff0c980e9c9c989.txt"
MLP = "004_3830c7c1f4381139.txt"

# 000: y = x w with w (4, 8), batch 2. Rank is the number of the part less 1.
MATMUL_ROW_PRINTED = (
    PrintedResult("w_row_1.shape", "w (initial)", shape=(2, 8), rank=0),
    PrintedResult("w_row_2.shape", "w (initial)", shape=(2, 8), rank=1),
    PrintedResult("y_1.shape", shape=(2, 8), rank=0),
    PrintedResult("y_2.shape", shape=(2, 8), rank=1),
    PrintedResult("(y_1+y_2).shape", "y", shape=(2, 8)),
    PrintedResult("grad_row_1.shape", "w.grad", shape=(2, 8), rank=0),
    PrintedResult("grad_row_2.shape", "w.grad", shape=(2, 8), rank=1),
)
MATMUL_COLUMN_PRINTED = (
    PrintedResult("w_col_1.shape", "w (initial)", shape=(4, 4), rank=0),
    PrintedResult("w_col_2.shape", "w (initial)", shape=(4, 4), rank=1),
    PrintedResult("y_1.shape", "y", shape=(2, 4), rank=0),
    PrintedResult("y_2.shape", "y", shape=(2, 4), rank=1),
    PrintedResult("y_1_delta.shape", shape=(2, 4), rank=0),
    PrintedResult("y_2_delta.shape", shape=(2, 4), rank=1),
    PrintedResult("grad_col_1.shape", "w.grad", shape=(4, 4), rank=0),
    PrintedResult("grad_col_2.shape", "w.grad", shape=(4, 4), rank=1),
    PrintedResult("grad_col.shape", "w.grad", shape=(4, 8)),
)

# 001: 10 -> 40 -> 10 without bias, one sequence of five words.
FEED_FORWARD_PRINTED = (
    PrintedResult("output.shape", shape=(1, 5, 40)),
    PrintedResult("final_output.shape", "output", shape=(1, 5, 10)),
    PrintedResult("output_parallel_1.shape", shape=(1, 5, 20), rank=0),
    PrintedResult("output_parallel_2.shape", shape=(1, 5, 20), rank=1),
    PrintedResult("final_output_parallel_1.shape", shape=(1, 5, 10), rank=0),
    PrintedResult("final_output_parallel_2.shape", shape=(1, 5, 10), rank=1),
    PrintedResult("final_output_tp.shape", "output", shape=(1, 5, 10)),
    PrintedResult("allclose(final_output, final_output_tp)", "output", close=True),
)

# 002: 1024 -> 608 with bias, batch 32, one update; its gradients are stored transposed.
LINEAR_PLAIN_PRINTED = (
    PrintedResult("dX", "input.grad", shape=(32, 1024), section="regular"),
    PrintedResult("dW", "weight.grad", shape=(1024, 608), section="regular"),
    PrintedResult("db", "bias.grad", shape=(608,), section="regular"),
    PrintedResult("weights matching nn.Linear", "weight", close=True, section="regular"),
    PrintedResult("bias matching nn.Linear", "bias", close=True, section="regular"),
    PrintedResult("grad W matching nn.Linear", "weight.grad", close=True, section="regular"),
    PrintedResult("grad b matching nn.Linear", "bias.grad", close=True, section="regular"),
)
LINEAR_COLUMN_PRINTED = (
    PrintedResult("W_gpu1", "weight (initial)", shape=(304, 1024), rank=0),
    PrintedResult("W_gpu2", "weight (initial)", shape=(304, 1024), rank=1),
    PrintedResult("b_gpu1", "bias (initial)", shape=(1, 304), rank=0),
    PrintedResult("b_gpu2", "bias (initial)", shape=(1, 304), rank=1),
    PrintedResult("X_gpu1", shape=(32, 1024), rank=0),
    PrintedResult("X_gpu2", shape=(32, 1024), rank=1),
    PrintedResult("W_comb", "weight", shape=(608, 1024)),
    PrintedResult("b_comb", "bias", shape=(1, 608)),
    PrintedResult("dW_comb", "weight.grad", shape=(1024, 608)),
    PrintedResult("db_comb", "bias.grad", shape=(608,)),
    PrintedResult("weights matching nn.Linear", "weight", close=True),
    PrintedResult("bias matching nn.Linear", "bias", close=True),
    PrintedResult("grad W matching nn.Linear", "weight.grad", close=True),
    PrintedResult("grad b matching nn.Linear", "bias.grad", close=True),
)
LINEAR_ROW_PRINTED = (
    PrintedResult("W_gpu1", "weight (initial)", shape=(608, 512), rank=0),
    PrintedResult("W_gpu2", "weight (initial)", shape=(608, 512), rank=1),
    PrintedResult("b_gpu1", "bias (initial)", shape=(1, 608), rank=0),
    PrintedResult("b_gpu2", "bias (initial)", shape=(1, 608), rank=1),
    PrintedResult("X_gpu1", shape=(32, 512), rank=0),
    PrintedResult("X_gpu2", shape=(32, 512), rank=1),
    PrintedResult("W_comb", "weight", shape=(608, 1024)),
    PrintedResult("b_comb", "bias", shape=(1, 608)),
    PrintedResult("dW_comb", "weight.grad", shape=(608, 1024)),
    PrintedResult("db_comb", "bias.grad", shape=(608,)),
    PrintedResult("dX", "input.grad", shape=(32, 1024)),
    PrintedResult("weights matching nn.Linear", "weight", close=True),
    PrintedResult("bias matching nn.Linear", "bias", close=True),
    PrintedResult(
        "grad W matching nn.Linear", "weight.grad", close=True, max_diff=4.0978193283081055e-08
    ),
    PrintedResult("grad b matching nn.Linear", "bias.grad", close=True),
)

# 004: 6 -> 4 -> 2 on 32 samples, random seed 12345. The outputs have four decimals and come from
# a GPU.
MLP_SEED, MLP_ATOL = 12345, 1e-4
MLP_OUTPUTS = (
    (0.1546, -0.5383), (0.1222, -0.3119), (0.6736, -0.2439), (0.8124, -0.3054),
    (0.4496, -0.4473), (0.4101, -0.5774), (0.4743, -0.6111), (0.5034, -0.3675),
    (0.3844, -0.3518), (0.5095, -0.5411), (0.6302, -0.4292), (0.0960, -0.5650),
    (0.5374, -0.3396), (0.4914, -0.3475), (0.9440, -0.1130), (0.7744, -0.2111),
    (0.4808, -0.3415), (0.3199, -0.5394), (0.5131, -0.4608), (-0.0191, -0.6592),
    (0.3838, -0.4386), (0.5702, -0.2098), (0.2020, -0.4805), (0.1737, -0.2273),
    (0.6647, -0.2574), (0.6794, -0.2492), (0.6364, -0.3637), (1.0508, -0.2086),
    (0.5117, -0.4432), (0.4517, -0.2172), (0.5502, -0.5689), (0.6571, -0.0120),
)  # fmt: skip


def _cmp(
    section: str,
    label: str,
    tensor: str,
    exact: bool,
    max_diff: float,
    *,
    rank: int | None = None,
) -> PrintedResult:
    """One row of the notebook's `cmp`; all rows say `approximate: True`."""
    return PrintedResult(
        label,
        tensor,
        exact=exact,
        close=True,
        max_diff=max_diff,
        rank=rank,
        is_of_two=section == "two devices" and rank is None,
        seed=MLP_SEED,
        section=section,
    )


MLP_CMP = (
    _cmp("one device", "forward pass", "output", True, 0.0),
    _cmp("two devices", "TP - forward pass", "output", False, 5.960464477539063e-08),
    _cmp("one device", "dW2", "output_layer.weight.grad", False, 2.9802322387695312e-08),
    _cmp("one device", "db2", "output_layer.bias.grad", True, 0.0),
    _cmp("one device", "dW1", "hidden_layer.weight.grad", False, 2.9802322387695312e-08),
    _cmp("one device", "db1", "hidden_layer.bias.grad", False, 1.862645149230957e-09),
    _cmp("two devices", "dW2_0", "output_layer.weight.grad", False, 2.9802322387695312e-08, rank=0),
    _cmp("two devices", "db2_0", "output_layer.bias.grad", False, 5.960464477539063e-08, rank=0),
    _cmp("two devices", "dW2_1", "output_layer.weight.grad", False, 1.4901161193847656e-08, rank=1),
    _cmp("two devices", "db2_1", "output_layer.bias.grad", False, 1.4901161193847656e-08, rank=1),
    _cmp("two devices", "dW1_0", "hidden_layer.weight.grad", False, 7.450580596923828e-09, rank=0),
    _cmp("two devices", "db1_0", "hidden_layer.bias.grad", False, 1.862645149230957e-09, rank=0),
    _cmp("two devices", "dW1_1", "hidden_layer.weight.grad", False, 2.9802322387695312e-08, rank=1),
    _cmp("two devices", "db1_1", "hidden_layer.bias.grad", True, 0.0, rank=1),
    _cmp("update", "manual_nW1", "hidden_layer.weight", False, 2.9802322387695312e-08),
    _cmp("update", "manual_nb1", "hidden_layer.bias", True, 0.0),
    _cmp("update", "manual_nW2", "output_layer.weight", True, 0.0),
    _cmp("update", "manual_nb2", "output_layer.bias", True, 0.0),
)
MLP_SHAPES = (
    PrintedResult("W1.shape", "hidden_layer.weight (initial)", shape=(4, 6)),
    PrintedResult("b1.shape", "hidden_layer.bias (initial)", shape=(4,)),
    PrintedResult("W2.shape", "output_layer.weight (initial)", shape=(2, 4)),
    PrintedResult("b2.shape", "output_layer.bias (initial)", shape=(2,)),
    PrintedResult("W1_0.shape", "hidden_layer.weight (initial)", shape=(2, 6), rank=0),
    PrintedResult("b1_0.shape", "hidden_layer.bias (initial)", shape=(2,), rank=0),
    PrintedResult("W2_0.shape", "output_layer.weight (initial)", shape=(1, 4), rank=0),
    PrintedResult("b2_0.shape", "output_layer.bias (initial)", shape=(1,), rank=0),
    PrintedResult("W1_1.shape", "hidden_layer.weight (initial)", shape=(2, 6), rank=1),
    PrintedResult("b1_1.shape", "hidden_layer.bias (initial)", shape=(2,), rank=1),
    PrintedResult("W2_1.shape", "output_layer.weight (initial)", shape=(1, 4), rank=1),
    PrintedResult("b2_1.shape", "output_layer.bias (initial)", shape=(1,), rank=1),
)
MLP_PRINTED = (
    *MLP_SHAPES,
    PrintedResult("out", "output", values=MLP_OUTPUTS, seed=MLP_SEED),
    *MLP_CMP,
)


def compare_with_notebook(printed: Sequence[PrintedResult], case: Data, *, seed: int) -> list[Data]:
    """Each printed result of a notebook, with ours.

    Args:
        printed: what the notebook prints of the case.
        case: its report as JSON data, with the values shown.
        seed: of that report.
    Returns:
        One row for each printed shape, row of values and comparison: "section", "label", "what",
        "notebook" and "ours", as text, and "same": whether both are equal; None if they may differ
        or ours is missing. If the notebook has another random seed, the first row says so, and one
        row in place of the values says that they are not compared.
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
    one: PrintedResult, tensor: Data | None, *, is_drawn_alike: bool
) -> Iterator[tuple[str, str, str, bool | None]]:
    if one.shape is not None:
        yield _shape(one, tensor)
    if one.values is not None and is_drawn_alike:
        yield from _values(one, tensor)
    elif one.values is not None:
        yield "values", f"{len(one.values)} rows", f"not compared: run seed {one.seed}", None
    if one.close is not None:
        yield from _comparison(one, tensor)


def _shape(one: PrintedResult, tensor: Data | None) -> tuple[str, str, str, bool | None]:
    theirs = _as_text(one.shape or ())
    if tensor is None:
        return "shape", theirs, NOT_RECORDED, None
    ours = tuple(tensor["shape"])
    if one.rank is not None:
        shapes = (tensor["shown"] or {"held": {}})["held"].get(str(NOTEBOOK_DEGREE))
        if shapes is None:
            return "shape", theirs, WITHOUT_TWO, None
        ours = tuple(shapes[one.rank])
    stored = ours[::-1] if ours != one.shape and ours[::-1] == one.shape else ours
    text = _as_text(ours) + (", the transpose" if stored != ours else "")
    same = tuple(size for size in stored if size > 1) == tuple(s for s in one.shape or () if s > 1)
    return "shape", theirs, text, same


def _values(one: PrintedResult, tensor: Data | None) -> Iterator[tuple[str, str, str, bool | None]]:
    values = tensor["shown"] if tensor is not None else None
    ours = values["ours"] if values else None
    for i, theirs in enumerate(one.values or ()):
        text = NOT_RECORDED if ours is None else _numbers(ours[i])
        same = None
        if ours is not None:
            same = max(abs(a - b) for a, b in zip(theirs, ours[i], strict=True)) <= ROUNDED
        yield f"row {i}", _numbers(theirs), text, same


def _comparison(
    one: PrintedResult, tensor: Data | None
) -> Iterator[tuple[str, str, str, bool | None]]:
    """Whether equal, whether close, the distance: the notebook's to autograd's, ours to torch's."""
    result = _compared(one, tensor)
    missing = result if isinstance(result, str) else ""
    exact, close, distance = (None, None, None) if isinstance(result, str) else result
    if one.exact is not None:
        yield "exact", str(one.exact), missing or str(exact), None
    same = None if close is None else close == one.close
    yield "close", str(one.close), missing or str(close), same
    if one.max_diff is not None:
        yield "max diff", f"{one.max_diff:.2e}", missing or _difference(distance), None


def _compared(one: PrintedResult, tensor: Data | None) -> tuple[bool, bool, float | None] | str:
    """Whether equal, whether close, and the distance; or why they are not known.

    A whole tensor has them from the report. The report judges the worst degree, so the results of
    two ranks are computed from the values of degree 2.
    """
    if tensor is None or tensor["torch"] is None:
        return NOT_RECORDED
    if one.rank is None and not one.is_of_two:
        torch_result = tensor["torch"]
        seed_result = tensor["seed_allclose"]
        close = torch_result["allclose"] if seed_result is None else seed_result
        return torch_result["exact"], close, torch_result["max_abs_diff"]
    values = tensor["shown"]
    if not values or values["ours"] is None or values["torch"] is None:
        return NOT_RECORDED
    if values["degree"] != NOTEBOOK_DEGREE:
        return WITHOUT_TWO
    ours, plain = (_part(values, which, one.rank) for which in ("ours", "torch"))
    is_close = torch.allclose(ours, plain)
    return bool((ours == plain).all()), is_close, (ours - plain).abs().max().item()


def _part(values: Data, which: str, rank: int | None) -> Tensor:
    """The part that one of two ranks holds of a tensor; the whole, if it is not cut."""
    tensor, shapes = torch.tensor(values[which]), values["held"][str(NOTEBOOK_DEGREE)]
    if rank is None:
        return tensor
    for dim, size in enumerate(tensor.shape):
        if shapes[rank][dim] != size:
            return tensor.narrow(dim, sum(shape[dim] for shape in shapes[:rank]), shapes[rank][dim])
    return tensor


def _as_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _difference(distance: float | None) -> str:
    return "not a number" if distance is None else f"{distance:.2e}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
