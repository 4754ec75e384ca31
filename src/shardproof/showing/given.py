"""`show`: one training step of a user's own module, traced and made into scenes."""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.cut.tensor import CutTensor
from shardproof.errors import UsageError
from shardproof.functional import mse_loss
from shardproof.leaves import check_degree, checked_degree
from shardproof.objects import checked_model, checked_optimizer
from shardproof.observing import Placement, observers
from shardproof.operands import FLOATS
from shardproof.plans.apply import parallelize
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Plan, Style
from shardproof.quantities import checked_flag, checked_name
from shardproof.scheme import DEFAULT_SCHEME, Scheme
from shardproof.showing.run import Window, Work, traced
from shardproof.showing.shown import Shown, checked_page
from shardproof.showing.story import story_of
from shardproof.trace.rank import RankTrace
from shardproof.trace.trace import Trace
from shardproof.wording import shown as as_text

Build = Callable[[Axis], nn.Module]
GivenPlan = ModelPlan | Plan | Mapping[str, Style | str] | None
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

MEAN_OF_SQUARES = "mean_of_squares"  # what a trace calls it
OWN_LOSS = "No loss was given: this run takes the loss that the model returns."
SQUARES = "No loss was given: this run takes the mean of the squares of the output."


def show(
    model: nn.Module | Build,
    inputs: Inputs,
    *,
    degree: int = 2,
    plan: GivenPlan = None,
    loss: Callable[..., Tensor] | None = None,
    target: Any = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    html: str | os.PathLike[str] | None = None,
    values: bool = True,
    engine: str = "threads",
    scheme: Scheme = DEFAULT_SCHEME,
    name: str = "",
) -> Shown:
    """Show one training step on ranks: who holds what, who sends what, number by number.

    `print` it in a terminal; in a notebook it is a page that can be played.

    Args:
        model: a module, of which every rank cuts a copy by `plan`; or a function of an axis that
            returns the model of one rank, as for `prove`.
        inputs: of the model, each Replicate: a tensor, a tuple, or a dict of keyword arguments.
            Those that require gradients get them.
        degree: how many ranks.
        plan: as `parallelize` takes it; None: the one that a model of transformers carries.
        loss: of the output, and of `target` if there is one. None: the `loss` that the model
            returns, or else the mean of the squares of the output.
        target: for `loss`, Replicate.
        optimizer: makes one for some parameters; None updates nothing.
        html: also write the page to this file.
        values: keep numbers, of tensors above 1,024 elements a corner.
        engine: "threads" or "processes".
        scheme: to cut a module with.
        name: a title; by default that of the model's class.

    Returns:
        The step: `trace`, `story`, `page()`, `save(path)`, `as_dict()`.
    Raises:
        UsageError, DegreeError, PlanError: an argument makes no sense, or does not fit another.
        RankError: the model, the loss or the optimizer raised on a rank.
    Example:
        >>> two = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        >>> step = show(two, torch.ones(2, 4), plan={"0": "colwise", "1": "rowwise"})
        >>> [scene.title for scene in step.story.scenes if scene.arrows]
        ['1: all_reduce']
    """
    degree, page = checked_degree(degree), None if html is None else checked_page(html)
    build = _checked_build(model, plan, degree, scheme)
    arguments = _checked_inputs(inputs)
    _check_functions(loss, target, optimizer)
    title = checked_name(name, "name") if name else _name_of(model)
    work = step_work(build, arguments, loss=loss, target=target, optimizer=optimizer)
    found = traced(work, degree=degree, engine=engine, values=checked_flag(values, "values"))
    title = f"{title} at degree {degree}"
    about = _about(loss, arguments, optimizer, found.trace)
    made = Shown(found.trace, story_of(found.trace, title=title, about=about))
    if page is not None:
        made.save(page)
    return made


def step_work(
    build: Build,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    loss: Callable[..., Tensor] | None = None,
    target: Any = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
) -> Work:
    """Build, forward, loss, backward and update, as every rank runs them.

    Args:
        build: makes the model of a rank.
        inputs: arguments and keyword arguments; every rank copies them.
        loss: as in `show`.
        target: as in `show`.
        optimizer: as in `show`.
    """

    def work(axis: Axis, window: Window) -> None:
        model = checked_model(build(axis), what="what the function of an axis returned")
        stepping = None
        if optimizer is not None:
            stepping = checked_optimizer(
                optimizer(model.parameters()), what="what the function optimizer returned"
            )
        # A copy each: ranks as threads would share gradients, and what is written in place.
        arguments, options, label = _copied((*inputs, target))
        with window():
            output = model(*arguments, **options)
            lost = _loss_of(output, loss, label, axis)
            lost.backward()
        if stepping is not None:
            with window():
                stepping.step()

    return work


def _loss_of(output: Any, loss: Callable[..., Tensor] | None, target: Any, axis: Axis) -> Tensor:
    place = _place(output)
    if loss is not None:
        lost = loss(output) if target is None else loss(output, target)
    elif isinstance(getattr(output, "loss", None), Tensor):
        lost = output.loss
    elif isinstance(output, Tensor):
        if place is not None and place.kind == "Shard" and axis.size > 1:
            raise UsageError(
                f"the output of the model is cut, {place}: each rank has a part of it, and the "
                "mean of the squares wants all. Gather it ('colwise_gather_output' in the plan), "
                "or give loss=, a function of this rank's part."
            )
        lost = mse_loss(output, torch.zeros_like(output), who=MEAN_OF_SQUARES)
    else:
        raise UsageError(
            f"the model returns a {type(output).__name__} without a loss. Give loss=, a function "
            "of it."
        )
    is_number = isinstance(lost, Tensor) and lost.numel() == 1 and lost.dtype in FLOATS
    if not is_number or not lost.requires_grad:
        raise UsageError(
            f"the loss is {as_text(lost)}, and a step needs one number that depends on a "
            "parameter. Return what a loss of torch gives, such as its mean."
        )
    if place is not None and place.kind == "Shard":
        axis.agree(
            {"loss": lost.item()},
            what="losses",
            way_out=f"The output of the model is cut, {place}: the loss must add the ranks' parts.",
        )
    return lost


def _place(output: Any) -> Placement | None:
    """How the output lies, as far as this rank's trace knows."""
    if not isinstance(output, Tensor) or isinstance(output, CutTensor):
        return None
    traces = (each for each in observers() if isinstance(each, RankTrace))
    return next((trace.placement(output) for trace in traces), None)


def _checked_build(model: Any, plan: Any, degree: int, scheme: Scheme) -> Build:
    if not isinstance(scheme, Scheme):
        raise UsageError(f"scheme={as_text(scheme)} is no Scheme. Use shardproof.Scheme(...).")
    if isinstance(model, nn.Module):
        leaves = plan.scheme.leaves if isinstance(plan, Plan | ModelPlan) else scheme.leaves
        check_degree(degree, leaves)
        return lambda axis: parallelize(copy.deepcopy(model), plan, axis, scheme=scheme)
    if not callable(model):
        raise UsageError(
            f"cannot show {as_text(model)}: it is neither a module of torch nor a function of an "
            "axis that returns one."
        )
    if plan is not None:
        raise UsageError(
            "plan= is for a module, and a function of an axis was given. Let the function return "
            "shardproof.parallelize(module, plan, axis)."
        )
    built: Build = model
    return built


def _checked_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        wrong = [key for key in inputs if not isinstance(key, str)]
        if wrong:
            raise UsageError(
                f"inputs has the key {as_text(wrong[0])}, and the keys of a dict are keyword "
                "arguments of the model. Use strings."
            )
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise UsageError(
        f"inputs={as_text(inputs)} are no inputs of a model. Give a tensor, a tuple of arguments, "
        "or a dict of keyword arguments."
    )


def _check_functions(loss: Any, target: Any, optimizer: Any) -> None:
    for value, name, example in (
        (loss, "loss", "torch.nn.functional.mse_loss"),
        (optimizer, "optimizer", "lambda p: torch.optim.SGD(p, lr=0.1)"),
    ):
        if value is not None and not callable(value):
            raise UsageError(
                f"{name}={as_text(value)} cannot be called. Give for instance {example}."
            )
    if loss is None and target is not None:
        raise UsageError(
            "target is given, and there is no loss to compare it with the output. Give for "
            "instance loss=torch.nn.functional.mse_loss."
        )


def _copied(tree: Any) -> Any:
    """Tensors as leaves of their own, with the caller's `requires_grad`; all else as it is."""
    if isinstance(tree, Tensor):
        return tree.detach().clone().requires_grad_(tree.requires_grad)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(_copied, tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map(_copied, tree))
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return tree


def _name_of(model: Any) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    name = getattr(model, "__name__", "")
    return name if name and name != "<lambda>" else "model"


def _is_mean_of_squares(trace: Trace) -> bool:
    """Whether the model returned no loss."""
    steps = (step for steps in trace.ranks for step in steps)
    return any((step.operation, step.module) == ("loss", MEAN_OF_SQUARES) for step in steps)


def _about(
    loss: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]], optimizer: Any, trace: Trace
) -> list[str]:
    tensors = [x for x in (*inputs[0], *inputs[1].values()) if isinstance(x, Tensor)]
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
    about = [f"One training step with inputs of shape {shapes}."]
    if loss is None:
        about.append(SQUARES if _is_mean_of_squares(trace) else OWN_LOSS)
    if optimizer is None:
        about.append("No optimizer was given: nothing is updated.")
    return about
