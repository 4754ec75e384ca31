"""Build a class of transformers in a small configuration, with inputs, without a network."""

from typing import Any

import torch
import transformers
from torch import nn

from zoo import own
from zoo.example import Example, loss_of, placed, stir, without_dropout
from zoo.exceptions import BY_LIST, BY_NAME
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
    """The model `name`, small, with inputs. The same arguments give the same bits.

    Args:
        name: of a class in one of the lists, or of a model of `zoo.own`.
        device: "cpu", or "meta", where there are shapes without numbers.
        dtype: of parameters and of inputs that are floats.
        dropout: False sets every dropout to 0. Layers are never skipped at random.
        experts: how transformers computes experts: "eager", a loop over those in use;
            "batched_mm", which works on meta and in fp64; "grouped_mm", not in fp64.
        seed: of parameters and inputs.
        changes: keys of the configuration, over the small ones.
    """
    if name in own.NAMES:
        return own.build_own(name, device=device, dtype=dtype, dropout=dropout, seed=seed)
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
    stir(model, seed + 2)
    if not dropout:
        without_dropout(model)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = inputs_of(model, generator, of_classes="image" in where)
    return Example(name, model.train(), placed(inputs, device, dtype), loss_of, where)
