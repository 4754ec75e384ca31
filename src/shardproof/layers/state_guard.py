"""Keeps the state of one rank's optimizer from being loaded by another rank.

Momenta of a shard look like those of any other shard of that size, so that
`torch.load` of what rank 0 has saved would be taken without an error. Once the first cut module
exists, `optimizer.state_dict()` of an optimizer of cut parameters says of which rank it is, and
`optimizer.load_state_dict` compares. State without that word is taken as it is.
"""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from shardproof.errors import LayoutError
from shardproof.layers import registry
from shardproof.layers.function_replacement import replace
from shardproof.wording import short_repr

_RANKS = "shardproof_ranks"  # axis -> [rank, size]


def install() -> None:
    """Guard both methods; the second time does nothing."""
    replace(Optimizer.state_dict, _saving)
    replace(Optimizer.load_state_dict, _loading)


def _ranks_of(optimizer: Optimizer) -> dict[str, list[int]]:
    """The axes over which its parameters are cut, and this rank's place on each."""
    parts, ranks_by_axis = registry.parts(), {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            part = parts.get(id(parameter)) or registry.part_of(parameter)
            if part is not None and part.is_cut and part.axis.size > 1:
                ranks_by_axis[part.axis.name] = [part.axis.rank, part.axis.size]
    return ranks_by_axis


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        state, ranks = original(self, *args, **kwargs), _ranks_of(self)
        return {**state, _RANKS: ranks} if ranks else state

    return guard


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(self: Optimizer, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        saved = state_dict.get(_RANKS) if isinstance(state_dict, dict) else None
        if saved is not None and saved != _ranks_of(self):
            raise LayoutError(
                f"cannot load the state of {type(self).__name__}: it is that of rank, size "
                f"{_rank_and_size(saved)}, and this is rank, size "
                f"{_rank_and_size(_ranks_of(self))}. Let every rank save and load its own; "
                "shardproof.optimizer_state_dict has the layouts too."
            )
        if saved is not None:
            state_dict = {key: value for key, value in state_dict.items() if key != _RANKS}
        return original(self, state_dict, *args, **kwargs)

    return guard


def _rank_and_size(ranks: Any) -> str:
    """For a message: `0, 2 of axis 'tp'`."""
    if not isinstance(ranks, dict) or not ranks:
        return "0, 1" if ranks == {} else short_repr(ranks)
    return "; ".join(
        f"{str(place).strip('[]()')} of axis {axis!r}" for axis, place in ranks.items()
    )
