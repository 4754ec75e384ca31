"""Small configurations: the default of a configuration class, with every size made small.

A key says what its number is: `hidden_size` is a width in every configuration. Configurations that
are inside others (the tower of a multimodal model) are shrunken the same way.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.exceptions import EXCEPTIONS
from zoo.sizes import LATENT, OFF, SIZES, TOKENS

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
    values = _values(default, dropout)
    for key, inner in _inner(default).items():
        given = {**start.get(key, {}), **changes.pop(key, {})}
        values[key] = small(type(inner), given, dropout=dropout)
    values |= changes
    return config_class(**values)


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
        elif key in TOKENS:
            found[key] = None if value is None else TOKENS[key]
        elif _SPECIAL.search(key) and isinstance(value, int):
            found[key], token = token, token + 1
        elif key in OFF or (not dropout and isinstance(value, float) and _is_of_chance(key)):
            found[key] = 0.0
        elif not dropout and isinstance(value, list | tuple) and "drop_" in key:
            found[key] = type(value)(0.0 for _ in value)
    if "qk_rope_head_dim" in own:
        found |= LATENT
    return found | _layers(config)


def _is_of_chance(key: str) -> bool:
    return "drop" in key or "jitter" in key


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
        if isinstance(value, list | tuple) and len(value) == count and not _is_of_indices(value)
    }
    seen: dict[str, int] = {}
    for layer in range(count):
        seen.setdefault(repr([each[layer] for each in lists.values()]), layer)
    chosen = sorted(seen.values())
    chosen = chosen * 2 if len(chosen) == 1 else chosen
    if not lists:
        return {}
    found: dict[str, Any] = {count_key: len(chosen)}
    for key, value in lists.items():
        small_one = SIZES.get(key)
        found[key] = type(value)(small_one or value[layer] for layer in chosen)
    return found


def _is_of_indices(value: Sequence[Any]) -> bool:
    """Whether `value` says which layers are of a kind, and nothing of each layer."""
    return all(isinstance(each, int) for each in value) and list(value) == sorted(set(value))
