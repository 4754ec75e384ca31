"""Build a class of transformers in a small configuration, with inputs, without a network."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from zoo.exceptions import BY_LIST, BY_NAME
from zoo.example import Example, loss_of
from zoo.inputs import inputs_of
from zoo.lists import lists_of
from zoo.shrink import small

transformers.logging.set_verbosity_error()


def build(
    name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    dropout: bool = True,
    experts: str = "batched_mm",
    seed: int = 0,
    changes: dict[str, Any] | None = None,
) -> Example:
    """The class `name` of transformers, small, with inputs. The same arguments give the same bits.

    Args:
        name: of a class in one of the lists.
        device: "cpu", or "meta", where there are shapes without numbers.
        dtype: of parameters and of inputs that are floats.
        dropout: False sets every dropout to 0. Layers are never skipped at random.
        experts: how transformers computes experts: "eager", a loop over those in use;
            "batched_mm", which works on meta and in fp64; "grouped_mm", not in fp64.
        seed: of parameters and inputs.
        changes: keys of the configuration, over the small ones.
    """
    chosen = getattr(transformers, name)
    where = lists_of(name)
    given = {key: value for which in where for key, value in BY_LIST.get(which, {}).items()}
    changes = {**given, **BY_NAME.get(name, {}), **(changes or {})}
    config = small(chosen.config_class, changes, dropout=dropout)
    config._experts_implementation = experts
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model: nn.Module = chosen(config)
    model = model.to(dtype)
    if device != "meta":
        _stir(model, seed)
    if not dropout:
        _without_dropout(model)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = inputs_of(model, generator, of_classes="image" in where)
    return Example(name, model.train(), _placed(inputs, device, dtype), loss_of, where)


def _stir(model: nn.Module, seed: int) -> None:
    """Add noise to parameters: a bias of 0 or a scale of 1 would hide that it was forgotten."""
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.05 if parameter.dim() > 1 else 0.1) * noise.to(parameter.dtype))


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def _placed(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _placed(each, device, dtype) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_placed(each, device, dtype) for each in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)
