"""`initialize`: create the weights of a model on the meta device, leaf by leaf."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.checked_objects import checked_device, checked_model
from shardproof.checked_values import checked_real
from shardproof.errors import UsageError
from shardproof.layers import registry
from shardproof.layers.base import ShardedModule
from shardproof.layers.rms_formula import find_formula
from shardproof.leaves import Layout, replicated
from shardproof.numerics.random import draw_normal
from shardproof.scheme import DEFAULT_SCHEME, Scheme, checked_scheme

DEFAULT_STD = 0.02


@torch.no_grad()
def initialize(
    model: nn.Module,
    *,
    device: torch.device | str = "cpu",
    std: float | None = None,
    scheme: Scheme | None = None,
) -> nn.Module:
    """Create every parameter that is on the meta device, with the same values at every degree.

    A plain model gets other values than a cut one, because it has no leaves. To compare with plain
    torch, load weights with `shardproof.hf.load`, or copy the weights of degree 1.

    Matrices are drawn from N(0, std), keyed by (seed, name, leaf), so that each rank draws only the
    leaves that it holds. Biases and padding rows are 0, and norms start as the identity. Tied
    parameters stay tied. Buffers of transformers' rotary embeddings are computed.

    Args:
        model: cut by `parallelize`, or plain; every rank draws all of a plain model.
        device: device of the new parameters.
        std: standard deviation of the draws; by default `model.config.initializer_range`, or 0.02.
        scheme: its seed keys the draws; by default the scheme of the cut modules.

    Returns:
        `model`.

    Raises:
        UsageError: a parameter or a buffer is of an unknown kind.

    Comm:
        none.
    """
    model, device = checked_model(model), checked_device(device) or torch.device("cpu")
    if scheme is not None:
        checked_scheme(scheme)
    if std is None:
        std = getattr(getattr(model, "config", None), "initializer_range", None) or DEFAULT_STD
    rule = "a finite number, 0 or more. Use for instance 0.02"
    std = checked_real(std, "std", rule=rule, holds=lambda number: 0 <= number < math.inf)
    seed = (scheme or _scheme_of(model)).seed
    registry.refresh()  # an optimizer may hold the parameters that are replaced here
    new_parameters: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for own, parameter in list(module._parameters.items()):
            if parameter is None or not (parameter.is_meta or id(parameter) in new_parameters):
                continue
            if id(parameter) not in new_parameters:
                full = f"{name}.{own}" if name else own
                data = _data(module, own, parameter, full, seed=seed, std=std, device=device)
                new_parameters[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
            module._parameters[own] = new_parameters[id(parameter)]
        _make_buffers(model, module, name, device)
    registry.note_change()
    return model


def _scheme_of(model: nn.Module) -> Scheme:
    cut = (registry.record_of(each) for each in model.modules() if isinstance(each, ShardedModule))
    return next((each.scheme for each in cut), DEFAULT_SCHEME)


def _data(
    module: nn.Module,
    own: str,
    parameter: nn.Parameter,
    name: str,
    *,
    seed: int,
    std: float,
    device: torch.device | str,
) -> Tensor:
    """The values of this rank's part of one parameter."""
    data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    constant = _constant(module, own, parameter)
    if constant is not None:
        return data.fill_(constant)
    if parameter.dim() < 2:
        raise UsageError(
            f"parameter {name!r} of a {type(module).__name__} has shape {tuple(parameter.shape)}, "
            "and nothing says what it starts as. Give the model its weights before it is cut."
        )
    layout = _layout(module, own, parameter)
    for leaf, shape, pieces in layout.held_leaves():
        values = draw_normal(
            shape, 0.0, std, seed=seed, name=name, leaf=leaf, dtype=data.dtype, device=device
        )
        for where, part in pieces:
            data[where] = values[part]
    _clear_padding(module, layout, data)
    return data


def _constant(module: nn.Module, own: str, parameter: nn.Parameter) -> float | None:
    """The initial value of a bias or a norm's weight; None for a parameter that is drawn."""
    if own == "bias":
        return 0.0
    if parameter.dim() == 1 and "Norm" in type(module).__name__:
        return 1.0 - _offset(module)
    return None


def _offset(module: nn.Module) -> float:
    """The constant that a norm adds to its weight: 1 in Gemma, else 0."""
    if hasattr(module, "offset"):  # ours
        return float(module.offset)  # type: ignore[arg-type]
    formula = find_formula(module)
    return 0.0 if formula is None else formula.offset


def _layout(module: nn.Module, own: str, parameter: nn.Parameter) -> Layout:
    layouts = registry.record_of(module).layouts if isinstance(module, ShardedModule) else {}
    if own in layouts:
        layout: Layout = layouts[own]
        return layout
    return replicated(tuple(parameter.shape))


def _clear_padding(module: nn.Module, layout: Layout, data: Tensor) -> None:
    padding = getattr(module, "padding_idx", None)
    if padding is None:
        return
    runs = layout.held_runs if layout.dim in (None, 0) else (range(layout.shape[0]),)
    start = 0
    for run in runs:
        if padding in run:
            data[start + padding - run.start] = 0.0
        start += len(run)


def _make_buffers(
    model: nn.Module, module: nn.Module, name: str, device: torch.device | str
) -> None:
    """Compute the buffers of transformers' rotary embeddings; raise for other buffers."""
    missing = {
        own: buffer
        for own, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta
    }
    if not missing:
        return
    owner: Any = next((each for each in model.modules() if hasattr(each, "_init_weights")), None)
    if owner is None or "RotaryEmbedding" not in type(module).__name__:
        raise UsageError(
            f"buffers {', '.join(missing)} of {name!r} ({type(module).__name__}) are on the meta "
            "device, and nothing says what is in them. Build the model on the meta device with "
            "`with torch.device('meta')` around its parameters only, or give it the buffers."
        )
    for own, buffer in missing.items():
        module._buffers[own] = torch.empty_like(buffer, device=device)
    owner._init_weights(module)
