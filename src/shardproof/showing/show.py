"""`show`: one training step of a user's own module, to print, as a page and as data."""

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from shardproof import files
from shardproof.checked_values import checked_flag, checked_name
from shardproof.errors import UsageError
from shardproof.leaves import check_degree, checked_degree
from shardproof.plans.apply import parallelize
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Plan, Style
from shardproof.scheme import DEFAULT_SCHEME, Scheme
from shardproof.showing.page import page_of
from shardproof.showing.scenes import StepView, view_of
from shardproof.showing.step_runs import MEAN_OF_SQUARES, BuildModel, step_work, traced
from shardproof.showing.terminal import lines_of
from shardproof.trace.trace import Trace
from shardproof.wording import short_repr as as_text
from shardproof.wording import short_text, spelt_out

AnyPlan = ModelPlan | Plan | Mapping[str, Style | str] | None
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]

WIDTH = 80  # columns of `print`
_HEIGHT = 720  # pixels in a notebook
_WAY_OUT = "Name a file in a directory where you may create files, such as step.html."
OWN_LOSS = "No loss was given: this run takes the loss that the model returns."
SQUARES = "No loss was given: this run takes the mean of the squares of the output."


@dataclass(frozen=True)
class ShownStep:
    """One training step, to look at.

    `print` writes it as text; a notebook shows the page.

    Attributes:
        trace: of all ranks, of the step alone.
        view: its scenes, and what is said about them.
    """

    trace: Trace
    view: StepView

    def page(self) -> str:
        """The page as text: HTML that needs no other file and no network."""
        return page_of(self.view)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file.

        Raises:
            UsageError: the file cannot be written.
        """
        where = checked_page(path)
        try:
            where.write_text(self.page(), encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"html={short_text(str(where))} cannot be written: {files.why(error)}. {_WAY_OUT}"
            ) from None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; "nan", "inf" and "1j" stand for what JSON has no numbers for."""
        plain: dict[str, Any] = spelt_out(self.view.as_dict())
        return plain

    def __str__(self) -> str:
        console = Console(width=WIDTH, no_color=True, force_terminal=False, highlight=False)
        with console.capture() as capture:
            for line in lines_of(self.view, values=False, width=WIDTH):
                console.print(line, soft_wrap=True)
        return capture.get().rstrip()

    def _repr_html_(self) -> str:
        """In a notebook, the page in a frame of its own."""
        return (
            f'<iframe title="{escape(self.view.title)}" srcdoc="{escape(self.page())}" '
            f'style="width:100%;height:{_HEIGHT}px;border:0"></iframe>'
        )


def show(
    model: nn.Module | BuildModel,
    inputs: Inputs,
    *,
    degree: int = 2,
    plan: AnyPlan = None,
    loss: Callable[..., Tensor] | None = None,
    target: Any = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    html: str | os.PathLike[str] | None = None,
    values: bool = True,
    engine: str = "threads",
    scheme: Scheme = DEFAULT_SCHEME,
    name: str = "",
) -> ShownStep:
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
        The step: `trace`, `view`, `page()`, `save(path)`, `as_dict()`.
    Raises:
        UsageError, DegreeError, PlanError: an argument makes no sense, or does not fit another.
        RankError: the model, the loss or the optimizer raised on a rank.
    Example:
        >>> two = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        >>> step = show(two, torch.ones(2, 4), plan={"0": "colwise", "1": "rowwise"})
        >>> [scene.title for scene in step.view.scenes if scene.arrows]
        ['1: all_reduce']
    """
    degree, page = checked_degree(degree), None if html is None else checked_page(html)
    build = _checked_build(model, plan, degree, scheme)
    arguments = _checked_inputs(inputs)
    _check_functions(loss, target, optimizer)
    title = checked_name(name, "name") if name else _name_of(model)
    work = step_work(build, arguments, loss=loss, target=target, optimizer=optimizer)
    values = checked_flag(values, "values")
    trace = traced(work, degree=degree, engine=engine, values=values).trace
    about = _about(loss, arguments, optimizer, trace)
    step = ShownStep(trace, view_of(trace, title=f"{title} at degree {degree}", about=about))
    if page is not None:
        step.save(page)
    return step


def _checked_build(model: Any, plan: Any, degree: int, scheme: Scheme) -> BuildModel:
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
    built: BuildModel = model
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


def checked_page(path: Any) -> Path:
    """Check the path of a page before any work.

    Raises:
        UsageError: it is no path, no regular file, or in a directory that is not there.
    """
    where = files.path_of(path, what="html", way_out=_WAY_OUT)
    try:
        is_other = where.exists() and not where.is_file()
    except OSError as error:
        raise UsageError(
            f"html={short_text(str(where))} cannot be written: {files.why(error)}. {_WAY_OUT}"
        ) from None
    if is_other:
        kind = "a directory" if where.is_dir() else "no regular file"
        raise UsageError(f"html={short_text(str(where))} is {kind}. {_WAY_OUT}")
    if not where.absolute().parent.is_dir():
        raise UsageError(
            f"html={short_text(str(where))}: there is no directory "
            f"{short_text(str(where.absolute().parent))}. {_WAY_OUT}"
        )
    return where
