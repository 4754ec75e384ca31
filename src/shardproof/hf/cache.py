"""Mark caches that a cut model fills: they hold one rank's heads or channels only."""

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from shardproof.axis import Axis
from shardproof.errors import UsageError

MARK = "held_by"  # attribute of a cache that a cut model filled


def guard_cache(model: nn.Module, axis: Axis) -> None:
    """Mark the caches that a cut model fills, and refuse caches that another model filled.

    Args:
        model: a cut model of transformers.
        axis: its ranks.
    """
    mark = f"rank {axis.rank} of {axis.size}"
    model.register_forward_pre_hook(functools.partial(_check, mark), with_kwargs=True)
    model.register_forward_hook(functools.partial(_mark, mark), with_kwargs=True)


def _check(mark: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for cache in _caches([*args, *kwargs.values()]):
        held_by = getattr(cache, MARK, None)
        if held_by == mark or (held_by is None and not _is_filled(cache)):
            continue
        whose = "an uncut model" if held_by is None else f"{held_by} of a cut one"
        raise UsageError(
            f"past_key_values were filled by {whose}, and this {type(model).__name__} is {mark}: "
            "a cache has the heads or channels that one rank holds. Start from an empty cache, or "
            "from the one that this rank's model has filled."
        )


def _is_filled(cache: Any) -> bool:
    """Whether a cache holds a token."""
    try:
        return bool(cache.get_seq_length())
    except ValueError:  # it counts no tokens: its layers have states and no keys
        return any(any(layer.has_previous_state.values()) for layer in cache.layers)


def _mark(
    mark: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    values = output.values() if isinstance(output, dict) else output
    items = values if isinstance(values, Iterable) else ()
    for cache in _caches([*items, *kwargs.values()]):
        setattr(cache, MARK, mark)


def _caches(values: Iterable[Any]) -> list[Any]:
    """The caches of transformers among some values."""
    return [value for value in values if hasattr(value, "get_seq_length")]
