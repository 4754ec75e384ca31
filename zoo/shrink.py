"""Small configurations: the default of a configuration class, with every size made small.

A key says what its number is: `hidden_size` is a width in every configuration. Configurations that
are inside others (the tower of a multimodal model) are shrunken the same way.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.exceptions import EXCEPTIONS
from zoo.sizes import DROPOUTS, NEVER, SIZES, STAGED

FIRST_FREE_TOKEN = 3
_SPECIAL = re.compile(r"(token_id|token_index|token_idx)$")


def small(config_class: type, changes: Mapping[str, Any] | None = None, *, dropout: bool) -> Any:
    """A small configuration of `config_class`.

    Args:
        config_class: a class of configurations of transformers.
        changes: keys and their values, over everything that is worked out here; a mapping where
            the value is a configuration of its own.
        dropout: True leaves the probabilities as the defaults have them; False makes all 0.
    """
    kind = getattr(config_class, "model_type", "")
    changes = {**EXCEPTIONS.get(kind, {}), **(changes or {})}
    start = changes.pop("_start", {})
    default = config_class(**start)
    values = {**start, **_values(default, dropout)}
    for key, inner in _inner(default).items():
        values[key] = small(type(inner), changes.pop(key, None), dropout=dropout)
    for key, inner_class in changes.pop("_inner", {}).items():
        values[key] = small(inner_class(), changes.pop(key, None), dropout=dropout)
    values.update(changes)
    return config_class(**{key: value for key, value in values.items() if value is not NEVER})


def _inner(config: Any) -> dict[str, Any]:
    """The configurations that `config` has as attributes."""
    return {
        key: value
        for key, value in vars(config).items()
        if hasattr(value, "model_type") and hasattr(value, "to_dict")
    }


def _values(config: Any, dropout: bool) -> dict[str, Any]:
    """Small values for the keys of `config` that have a size, a token or a probability."""
    own = vars(config)
    found: dict[str, Any] = {}
    token = FIRST_FREE_TOKEN
    for key, value in own.items():
        if key in SIZES and isinstance(value, int | None):
            found[key] = SIZES[key]
        elif key in STAGED and isinstance(value, Sequence):
            found[key] = type(value)(STAGED[key])
        elif _SPECIAL.search(key) and isinstance(value, int):
            found[key], token = token, token + 1
        elif key in NEVER_DROPPED or (not dropout and _is_probability(key, value)):
            found[key] = 0.0
    layers = _layers(config)
    return found | layers


NEVER_DROPPED = DROPOUTS


def _is_probability(key: str, value: object) -> bool:
    return isinstance(value, float) and ("drop" in key)


def _layers(config: Any) -> dict[str, Any]:
    """What `config` says of each layer, for one layer of each kind, or two of the only kind."""
    own = vars(config)
    names = getattr(config, "attribute_map", {})
    count_key = names.get("num_hidden_layers", "num_hidden_layers")
    count = own.get(count_key)
    if not isinstance(count, int):
        return {}
    lists = {
        key: value
        for key, value in own.items()
        if isinstance(value, list | tuple) and len(value) == count and not key.startswith("_")
    }
    seen: dict[str, int] = {}
    for layer in range(count):
        seen.setdefault(repr([each[layer] for each in lists.values()]), layer)
    chosen = sorted(seen.values())
    chosen = chosen * 2 if len(chosen) == 1 else chosen
    if not lists:
        return {}
    return {count_key: len(chosen)} | {
        key: type(value)(value[layer] for layer in chosen) for key, value in lists.items()
    }
