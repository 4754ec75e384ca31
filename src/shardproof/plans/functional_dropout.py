"""Refuse dropout that a model of transformers calls as a function, without an `nn.Dropout`.

Such a call draws from torch's global generator, so that ranks would hold different activations
where they must be the same. It is recognised by the names of probabilities in the config and in
modules that copied them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from shardproof.hf.detection import is_transformers
from shardproof.plans.style import Attention, Style

_ATTENTION = (
    "attention_dropout"  # the probability that attention modules pass to the attention function
)


def functional_dropout(styles: Mapping[str, Style], model: nn.Module) -> list[str]:
    """One sentence for each dropout probability that a function of torch may use."""
    if not is_transformers(model):
        return []
    by_position = {module.p for module in model.modules() if type(module) is nn.Dropout}
    sentences: dict[str, str] = {}
    for name, value in _probabilities(model):
        if name == _ATTENTION:
            is_ours = _is_cut(styles, model)
        else:
            # Some models read only `p` of the nn.Dropout of their attention weights.
            is_ours = "att" not in name and value in by_position
        if not is_ours:
            sentences.setdefault(name, _sentence(name, value, model))
    return list(sentences.values())


def _probabilities(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Name and value of every attribute above 0 of configs and modules that is named dropout."""
    visited = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        holders: list[Any] = [module]
        if hasattr(config, "__dict__") and id(config) not in visited:
            visited.add(id(config))
            holders.insert(0, config)
        for holder in holders:
            for name, value in vars(holder).items():
                if ("dropout" in name or name.endswith("pdrop")) and _draws(value):
                    yield name, value


def _draws(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_cut(styles: Mapping[str, Style], model: nn.Module) -> bool:
    """Whether every attention with dropout is cut, so that our attention draws its masks."""
    names = [name for name, module in model.named_modules() if _draws(vars(module).get(_ATTENTION))]
    return bool(names) and all(isinstance(styles.get(name), Attention) for name in names)


def _sentence(name: str, value: float, model: nn.Module) -> str:
    uncut = " in attention that the plan leaves whole" if name == _ATTENTION else ""
    also = ", or cut all attention" if name == _ATTENTION else ""
    return (
        f"{type(model).__name__} has {name}={value}, dropout called as a function{uncut}: it draws "
        "from the global generator, so that ranks would hold different activations where they must "
        f"be the same. Set config.{name} = 0.0 before the model is made{also}."
    )
