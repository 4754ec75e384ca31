"""Ours: planned, cut, trained one step at some degrees, and compared with plain torch."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import shardproof as sp
from shardproof.ops import unit_ops
from shardproof.plans.watched import cut_by, plan_by_watching
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.scheme import Scheme
from zoo.example import Example, without_dropout
from zoo.wide import wide

DEGREES = (1, 2, 3)
RATE = 0.01
RTOL = 1e-9  # of the largest gradient of the model
SHARE = 0.9


def step(example: Example, degrees: Sequence[int] = DEGREES) -> dict[str, Any]:
    """Cut share, collectives, whether the bits are the same, and agreement with plain torch.

    The bits are also those with sequence parallelism at the last degree.
    Collectives are those at the second of the degrees, of which the first is 1; the numbers that
    are compared with plain torch are those at the last.
    """
    without_dropout(example.model)
    is_steady = _is_steady(example)
    if not is_steady:
        example.model.eval()
    with wide():
        plan = plan_by_watching(example.model, example.inputs, degree=2, scheme=Scheme())
        found: dict[str, Any] = {
            "share": plan.matrix_share,
            "families": len(plan.families),
            "kinds": _counted(family.kind for family in plan.families),
        }
        if not is_steady:
            found["mode"] = "eval, for in training plain torch draws by other generators"
        if plan.matrix_share < SHARE:
            found["whole"] = dict(list(plan.whole.items())[:8])
        wanted = _trained(copy.deepcopy(example.model), example.model, example)
    ours = {degree: _ranks(plan, degree, example) for degree in degrees}
    for what in ("forward", "backward", "gathered", "variant"):
        found[what] = ours[degrees[1]][0][what]
    tokens_cut = replace(plan, sequence_parallel=True)
    runs: dict[str, Any] = {
        **{str(degree): ranks[0] for degree, ranks in ours.items()},
        f"{degrees[-1]}, sequence parallel": _ranks(tokens_cut, degrees[-1], example)[0],
    }
    hashes = {
        run: {name: _hash(each) for name, each in rank["tensors"].items()}
        for run, rank in runs.items()
    }
    found["differ"] = {
        run: [name for name in hashes["1"] if each.get(name) != hashes["1"][name]][:4]
        for run, each in hashes.items()
    }
    found["is_same"] = not any(found["differ"].values())
    found["error"], found["worst"] = _worst(ours[degrees[-1]][0]["tensors"], wanted)
    reasons = []
    if plan.matrix_share < SHARE:
        reasons.append(f"only {plan.matrix_share:.2f} of the weights of matrices are cut")
    if not found["is_same"]:
        first = next(names[0] for names in found["differ"].values() if names)
        reasons.append(f"the bits differ, first in {first}")
    if not found["error"] <= RTOL:
        reasons.append(f"{found['worst']} is {found['error']:.1e} from plain torch")
    if reasons:
        found["reason"] = "; ".join(reasons)
    return found


def _is_steady(example: Example) -> bool:
    """Whether plain torch, without dropout, gives the same loss twice."""
    with wide(), torch.no_grad():
        losses = [example.loss(copy.deepcopy(example.model)(**example.inputs)) for _ in range(2)]
    return torch.equal(*losses)


def _counted(kinds: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for kind in kinds:
        found[kind] = found.get(kind, 0) + 1
    return found


def _trained(model: nn.Module, _: nn.Module, example: Example) -> dict[str, Tensor]:
    """Loss, gradients and updated weights of plain torch."""
    loss = example.loss(model(**example.inputs))
    loss.backward()
    tensors = {"loss": loss.detach()}
    for name, each in model.named_parameters():
        if each.grad is not None:
            tensors[f"{name}.grad"] = each.grad
    trained = [each for each in model.parameters() if each.grad is not None]
    torch.optim.SGD(trained, lr=RATE).step()
    return tensors | {name: each.detach() for name, each in model.named_parameters()}


def _ranks(plan: WatchedPlan, degree: int, example: Example) -> list[dict[str, Any]]:
    """What every rank found."""
    plan = replace(plan, degree=degree)

    def work(axis: sp.Axis) -> dict[str, Any]:
        torch.set_default_dtype(torch.float64)
        model = copy.deepcopy(example.model)
        region = cut_by(model, plan, axis)
        ledger: Callable[[], Any] = axis.transport.ledger.as_dict
        with wide():
            loss = example.loss(model(**example.inputs))
            forward = ledger().get("forward", {})
            loss.backward()
        counted = dict(region.gathered)
        backward = ledger().get("backward", {})
        tensors = {"loss": loss.detach()}

        def whole(name: str, each: Tensor) -> Tensor:
            if name not in plan.cuts:
                return each
            dim, along = plan.cuts[name]
            return unit_ops.gather(each, dim, region.place(along, "zoo"))

        with torch.no_grad():
            for name, each in model.named_parameters():
                if each.grad is not None:
                    tensors[f"{name}.grad"] = whole(name, each.grad)
            trained = [each for each in model.parameters() if each.grad is not None]
            torch.optim.SGD(trained, lr=RATE).step()
            for name, each in model.named_parameters():
                tensors[name] = whole(name, each.detach())
        return {
            "tensors": tensors,
            "forward": {kind: each["calls"] for kind, each in forward.items()},
            "backward": {kind: each["calls"] for kind, each in backward.items()},
            "gathered": {f"{op} {who}": count for (op, who), count in counted.items()},
            "variant": dict(region.variant),
        }

    return sp.launch(work, degree=degree, engine="threads", timeout=120)


def _hash(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16]


def _worst(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference from plain torch, relative to the largest gradient or value."""
    worst, where = 0.0, ""
    largest = max(float(x.abs().max()) for n, x in wanted.items() if n.endswith(".grad"))
    for name, want in wanted.items():
        if name not in ours:
            return float("inf"), f"{name} (missing)"
        if not want.numel():
            continue
        scale = float(want.abs().max())
        if name.endswith(".grad"):
            scale = max(scale, 1e-3 * largest)
        error = float((ours[name] - want).abs().max()) / max(scale, 1e-12)
        if not error <= worst:
            worst, where = error, name
    return worst, where
