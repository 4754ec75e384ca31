"""`watch`: run one forward of a model with labelled parameters; the model does not change."""

import copy
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from shardproof.errors import PlanError, ShardproofError
from shardproof.watching.atoms import Labels
from shardproof.watching.labelled import Labelled, place
from shardproof.watching.record import Record
from shardproof.watching.running import Watching
from shardproof.wording import error_words

_one_at_a_time = threading.Lock()  # ranks as threads may plan the same model
MOST_COPIED = 1 << 28  # parameters of a model that is watched on the CPU
Key = tuple[str, int]  # a parameter and one of its dims


@dataclass(frozen=True)
class Watched:
    """The result of watching one forward.

    Attributes:
        record: joins, needs and operations of the labels.
        labels: the label of each index, by parameter and dim.
        shapes: name -> shape of each parameter; tied parameters under their first name only.
        tied: second and further names of tied parameters -> the first name.
        device: "meta", or "cpu" if the forward depends on data.
        why_cpu: the error that the forward raised on the meta device; empty if it ran there.
        seconds: duration.
    """

    record: Record = field(repr=False)
    labels: Mapping[Key, Labels] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    device: str
    why_cpu: str
    seconds: float


def watch(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Watched:
    """Run one forward in which every index of every parameter carries a label.

    The forward runs on the meta device. If it reads values that depend on parameters, it cannot run
    there, and runs once more on the CPU, on a copy whose meta weights are small random ones. The
    model itself does not change.

    Args:
        model: on any device; it is in evaluation mode while it is watched.
        args: positional example arguments of forward.
        kwargs: named example arguments of forward.
    Raises:
        PlanError: the model's own forward fails with these inputs, or one of its operations cannot
            be watched.
    """
    with _one_at_a_time:
        return _watch(model, (tuple(args), dict(kwargs or {})))


def _watch(model: nn.Module, call: Any) -> Watched:
    start = time.perf_counter()
    failed: list[Exception] = []
    for leaves_last in (False, True):  # the last element of a mask may stand for "no expert"
        try:
            return _watched(model, call, start=start, leaves_last=leaves_last)
        except ShardproofError:
            raise
        except Exception as error:  # whatever a model's code raises where it looks at data
            failed.append(error)
    return _watched_on_cpu(model, call, failed[0], start)


def _watched_on_cpu(model: nn.Module, call: Any, first: Exception, start: float) -> Watched:
    """Watch a copy on the CPU, for a forward that cannot run on the meta device."""
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > MOST_COPIED:
        raise PlanError(
            f"the forward cannot run on the meta device ({error_words(first)}), and {size} "
            f"parameters are too many for a copy on the CPU (at most {MOST_COPIED}). Give inputs "
            "on the CPU, or a smaller model of the same kind."
        ) from first
    try:
        return _watched(_small_copy(model), call, why_cpu=error_words(first), start=start)
    except Exception as error:  # the same
        raise PlanError(_why_it_failed(model, call, error)) from error


def _why_it_failed(model: nn.Module, call: Any, error: Exception) -> str:
    """The error message: the model's own forward fails too, or only the watched one."""
    model_copy = _small_copy(model)
    args, kwargs = tree_map(_real, call)
    try:
        with torch.no_grad(), _randomness_kept():
            model_copy.eval()(*args, **kwargs)
    except Exception as own:  # whatever a model's code raises
        return (
            f"the model's own forward fails with these inputs ({error_words(own)}). Check that the "
            "model runs with them by itself."
        )
    return f"the forward cannot be watched: {error_words(error)}."


def _real(each: Any) -> Any:
    if not isinstance(each, Tensor):
        return each
    return torch.zeros_like(each, device="cpu") if each.is_meta else each.detach().cpu().clone()


def _small_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in which tensors on the meta device become small random ones."""
    small_model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    copies: dict[int, Tensor] = {}  # tied tensors stay tied
    for module in small_model.modules():
        for kind in ("_parameters", "_buffers"):
            for name, each in vars(module)[kind].items():
                if each is None:
                    continue
                if id(each) not in copies:
                    small = _on_cpu(each.detach(), generator)
                    is_parameter = isinstance(each, nn.Parameter)
                    copies[id(each)] = (
                        nn.Parameter(small, requires_grad=False) if is_parameter else small
                    )
                vars(module)[kind][name] = copies[id(each)]
    return small_model


def _on_cpu(each: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor on the CPU, with small random values in place of meta ones."""
    if not each.is_meta:
        return each.cpu()
    if not each.is_floating_point():
        return torch.zeros(each.shape, dtype=each.dtype, device="cpu")
    values = torch.rand(each.shape, generator=generator, device="cpu") * 0.04 + 0.01
    return values.to(each.dtype)


def _watched(
    model: nn.Module, call: Any, *, start: float, why_cpu: str = "", leaves_last: bool = False
) -> Watched:
    on_meta = not why_cpu
    record = Record()
    names: dict[int, str] = {}
    tied: dict[str, str] = {}
    labels: dict[Key, Labels] = {}
    marked: dict[str, Tensor] = {}
    by_id: dict[int, Labelled] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            tied[name] = names[id(parameter)]
            marked[name] = marked[names[id(parameter)]]
            continue
        names[id(parameter)] = name
        shapes[name] = tuple(parameter.shape)
        by_id[id(parameter)] = _mark(name, parameter, labels, record, on_meta)
        marked[name] = by_id[id(parameter)]
    mode = Watching(record, by_id, on_meta=on_meta, leaves_last=leaves_last)
    with _state_kept(model), ExitStack() as stack:
        for name, module in model.named_modules():
            _tell_where(name, module, record)
        model.eval()
        for name, buffer in model.named_buffers(remove_duplicate=False):
            marked[name] = mode.adopt(buffer)
        args, kwargs = tree_map(mode.take, call)
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        output = torch.func.functional_call(model, marked, args, kwargs, tie_weights=False)
    for each in tree_leaves(output):
        for factor in each.factors if isinstance(each, Labelled) else ():
            record.see("output", "output", factor)
    device = "meta" if on_meta else "cpu"
    return Watched(record, labels, shapes, tied, device, why_cpu, time.perf_counter() - start)


def _mark(
    name: str, parameter: Tensor, labels: dict[Key, Labels], record: Record, on_meta: bool
) -> Labelled:
    """A parameter with labels for each dim; for a convolution kernel, for the channels only."""
    nd = parameter.dim()
    factors, sources = [], []
    for dim in range(nd if nd <= 3 else 2):
        if parameter.shape[dim] > 1:
            labels[name, dim] = record.atoms.fresh(parameter.shape[dim])
            factors.append(place(labels[name, dim], dim, nd))
            sources.append(dim)
    inside = parameter.detach()
    inside = inside.to("meta") if on_meta else inside.clone()
    if not parameter.numel():
        return Labelled(inside, parameter=name)
    labelled = Labelled(inside, tuple(factors), parameter=name)
    labelled.sources = tuple(sources)
    return labelled


def _tell_where(name: str, module: nn.Module, record: Record) -> None:
    """Add hooks that tell the record which module runs; they are removed with the other state."""
    module.register_forward_pre_hook(lambda *_: record.enter(name), prepend=True)
    module.register_forward_hook(lambda *_: record.leave(), always_call=True)


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Restore afterwards every module's attributes, hooks and mode, and all generator states."""
    attributes_by_module = [(module, dict(vars(module))) for module in model.modules()]
    containers = [
        (value, copy.copy(value))
        for _, attributes in attributes_by_module
        for value in attributes.values()
        if isinstance(value, dict | list | set)
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _randomness_kept():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for value, content in containers:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        for module, attributes in attributes_by_module:
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Restore the states of all generators afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
