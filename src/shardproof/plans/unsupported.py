"""Messages about modules that no style can cut: what to name or change instead."""

from torch import nn

from shardproof.plans.style import ColumnParallel, RowParallel, Style


def advice(name: str, style: Style, module: nn.Module) -> str:
    """What to do about a module that a plan cuts as a linear and that is not one.

    Args:
        name: name of the module.
        style: the style that the plan gives it.
        module: the module: a subclass of `nn.Linear`, or a module that contains linears.
    """
    inside = [other for other, each in module.named_modules() if type(each) is nn.Linear]
    adapters = [other for other in inside if other.startswith(("lora_A", "lora_B"))]
    if "base_layer" in inside and len(adapters) == 2:
        return _around(name, style, adapters)
    if inside:
        return f"Name the linears inside it ({', '.join(inside[:4])}), or leave it replicated."
    if isinstance(module, nn.Linear):
        return (
            "It may have a forward of its own, which a cut would lose. Use nn.Linear and put the "
            "rest into a module beside it, or leave it replicated."
        )
    return "Leave it replicated."


def _around(name: str, style: Style, adapters: list[str]) -> str:
    """Advice for a low-rank adapter: cut lora_B along the output, or lora_A along the input."""
    is_column = isinstance(style, ColumnParallel)
    if not is_column and not isinstance(style, RowParallel):
        return "It is an adapter around a linear. Merge the adapter into the linear first."
    child = next(each for each in adapters if each.startswith("lora_B" if is_column else "lora_A"))
    word = "ColumnParallel()" if is_column else "RowParallel()"
    return (
        f'It is an adapter around a linear: name {{"{name}.base_layer": {word}, "{name}.{child}": '
        f"{word}}} in its place, or merge the adapter first."
    )


def is_lazy(value: object) -> bool:
    """True for a parameter that has no shape before the first forward."""
    return isinstance(value, nn.parameter.UninitializedParameter)


def problem_of_lazy_model(model: nn.Module) -> str:
    """The error for a model with parameters that have no shape yet; "" if all have one."""
    names = [name for name, value in model.named_parameters() if is_lazy(value)]
    if not names:
        return ""
    return (
        f"parameter {names[0]!r} has no shape yet, like {len(names)} parameters of "
        f"{type(model).__name__} in all: a lazy module gets its shapes in its first forward. Run "
        "one on every rank, with the same input and the same seed, before the model is cut."
    )
