"""Rules for losses over cut classes: each rank's scores stay on that rank."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from shardproof.cut.fallback import gathered
from shardproof.cut.tensor import CutTensor, rule, run
from shardproof.ops import unit_ops

_NAMES = {
    "cross_entropy": (
        "input",
        "target",
        "weight",
        "size_average",
        "ignore_index",
        "reduce",
        "reduction",
        "label_smoothing",
    ),
    "nll_loss": (
        "input",
        "target",
        "weight",
        "size_average",
        "ignore_index",
        "reduce",
        "reduction",
    ),
}
_USUAL = {
    "weight": None,
    "size_average": None,
    "ignore_index": -100,
    "reduce": None,
    "reduction": "mean",
    "label_smoothing": 0.0,
}


@rule("cross_entropy", "nll_loss")
def of_classes(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.cross_entropy` and `F.nll_loss` of scores that are cut along the classes."""
    arguments = _USUAL | dict(zip(_NAMES[name], args, strict=False)) | kwargs
    x, target, weight = arguments["input"], arguments["target"], arguments["weight"]
    if not isinstance(x, CutTensor) or isinstance(target, CutTensor | None):
        return gathered(func, name, args, kwargs)
    classes = min(1, x.dim() - 1)
    if x.spec.dim != classes or isinstance(weight, CutTensor):
        return gathered(func, name, args, kwargs)
    how = arguments["reduction"]
    if arguments["size_average"] is not None or arguments["reduce"] is not None:
        how = _reduction.legacy_get_string(arguments["size_average"], arguments["reduce"])
    if target.dtype.is_floating_point:
        return _of_shares(x, target, weight, classes, how, arguments["label_smoothing"])
    rows = run(Tensor.movedim, (x, classes, -1), {})
    rows = run(Tensor.reshape, (rows, -1, x.shape[classes]), {})
    place = rows.spec.region.place(rows.spec.cut, rows.who)
    options = {"weight": weight, "ignore_index": arguments["ignore_index"], "reduction": how}
    if name == "nll_loss":
        loss = _picked(rows, target.reshape(-1), place, **options)
    else:
        options["label_smoothing"] = arguments["label_smoothing"]
        loss = unit_ops.cross_entropy_cut(rows.local, target.reshape(-1), place, **options)
    return loss.reshape(target.shape) if how == "none" else loss


def _picked(
    x: CutTensor,
    target: Tensor,
    place: Any,
    *,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The loss of (rows, classes) log-probabilities; one rank owns each target."""
    classes_here = torch.from_numpy(x.spec.cut.held(x.spec.region.rank)).to(x.device)
    is_it = classes_here == target[:, None]
    zero = x.local.new_zeros(())
    losses = -unit_ops.sum_cut(torch.where(is_it, x.local, zero), 1, place)
    is_kept = target != ignore_index
    shares = is_kept.to(losses.dtype)
    if weight is not None:
        shares = shares * weight[target.where(is_kept, 0)]
    losses = torch.where(is_kept, losses, zero) * shares
    if reduction == "none":
        return losses
    total = unit_ops.fold(losses, (0,), place=place)
    return total / unit_ops.fold(shares, (0,), place=place) if reduction == "mean" else total


def _of_shares(
    x: CutTensor, target: Tensor, weight: Any, classes: int, reduction: str, smoothing: float
) -> Any:
    """The cross-entropy with targets that are probabilities."""
    if smoothing:
        target = target * (1 - smoothing) + smoothing / x.shape[classes]
    if weight is not None:
        target = target * weight.reshape([-1, *[1] * (x.dim() - classes - 1)])
    losses = -(run(torch.log_softmax, (x, classes), {}) * target).sum(classes)
    if reduction == "none":
        return losses
    place = x.spec.region.place(x.spec.cut, x.who)
    total = unit_ops.fold(losses, tuple(range(losses.dim())), place=place)
    return total / losses.numel() if reduction == "mean" else total
