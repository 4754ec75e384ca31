"""Modules that no style can cut as they are, and what to write in their place."""

from torch import nn

from shardproof.plans.style import ColumnParallel, RowParallel, Style


def instead(name: str, style: Style, module: nn.Module) -> str:
    """What to do about a module that is to be cut as a linear and is none.

    Args:
        name: of the module.
        style: that a plan gives it.
        module: not an `nn.Linear`, but perhaps a subclass, or around some.
    """
    inside = [other for other, each in module.named_modules() if type(each) is nn.Linear]
    adapters = [other for other in inside if other.startswith(("lora_A", "lora_B"))]
    if "base_layer" in inside and len(adapters) == 2:
        return _around(name, style, adapters)
    if inside:
        return f"Name the linears inside it ({', '.join(inside[:4])}), or leave it replicated."
    if isinstance(module, nn.Linear):
        return (
            "Its forward may be its own, which would be lost. Use nn.Linear, with what else it "
            "does in a module beside it, or leave it replicated."
        )
    return "Leave it replicated."


def _around(name: str, style: Style, adapters: list[str]) -> str:
    """Of an adapter of low rank: along the output its second linear is cut, else its first."""
    is_column = isinstance(style, ColumnParallel)
    if not is_column and not isinstance(style, RowParallel):
        return "It is an adapter around a linear. Merge it into that first."
    child = next(each for each in adapters if each.startswith("lora_B" if is_column else "lora_A"))
    word = "ColumnParallel()" if is_column else "RowParallel()"
    return (
        f'It is an adapter around one: name {{"{name}.base_layer": {word}, "{name}.{child}": '
        f"{word}}} in its place, or merge the adapter first."
    )


def is_lazy(value: object) -> bool:
    """True for a parameter that has no shape before the first forward."""
    return isinstance(value, nn.parameter.UninitializedParameter)


def lazy(model: nn.Module) -> str:
    """What is wrong with a model that does not know all its shapes; "" if it does."""
    names = [name for name, value in model.named_parameters() if is_lazy(value)]
    if not names:
        return ""
    return (
        f"parameter {names[0]!r} has no shape yet (so it is with {len(names)} parameters of "
        f"{type(model).__name__}): a lazy module gets it in its first forward. Run one on every "
        "rank, on the same input and seeded alike, before the model is cut."
    )
