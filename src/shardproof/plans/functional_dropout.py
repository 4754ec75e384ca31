"""Dropout that a model of transformers calls as a function, where nothing of ours can draw.

It draws from torch's global generator, so that ranks would hold different activations where they
must be the same. Only names tell it: the config's, and what modules copied from it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from shardproof.hf.detection import is_transformers
from shardproof.plans.style import Attention, Style

_ATTENTION = "attention_dropout"  # what modules of attention hand to the function that attends


def functional_dropout(styles: Mapping[str, Style], model: nn.Module) -> list[str]:
    """One sentence for every probability that a function of torch may draw with."""
    if not is_transformers(model):
        return []
    by_position = {module.p for module in model.modules() if type(module) is nn.Dropout}
    sentences: dict[str, str] = {}
    for name, value in _probabilities(model):
        if name == _ATTENTION:
            is_ours = _is_cut(styles, model)
        else:
            # An nn.Dropout of attention weights is often only asked for its p.
            is_ours = "att" not in name and value in by_position
        if not is_ours:
            sentences.setdefault(name, _sentence(name, value, model))
    return list(sentences.values())


def _probabilities(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Name and value of everything above 0 that configs and modules call a dropout."""
    seen = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        holders: list[Any] = [module]
        if hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            holders.insert(0, config)
        for holder in holders:
            for name, value in vars(holder).items():
                if ("dropout" in name or name.endswith("pdrop")) and _draws(value):
                    yield name, value


def _draws(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_cut(styles: Mapping[str, Style], model: nn.Module) -> bool:
    """True if all attention that drops weights is cut: ours then computes in it, by position."""
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
