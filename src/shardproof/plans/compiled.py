"""A cut model under `torch.compile` and `torch.export`.

Dynamo does not look into our Python: a cut model is one node of its graph (`plans/graph.py`), and
what leaves an exported program is whole. See docs/decisions/0047-a-cut-model-is-one-node.md.
"""

import types
from typing import Any

import torch
from torch import nn

from shardproof.layers.base import is_ours

_HOW = "_shardproof_compiled"  # attribute of a model


class Compilable(nn.Module):
    """Base of the classes that cut models get; stands before the class that they had.

    Attributes:
        eager_class: the class that the model had.
    """

    eager_class: type[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; while Dynamo traces, one node of its graph."""
        if torch.compiler.is_dynamo_compiling():  # it would pass over `_call_impl`
            return self._call_impl(*args, **kwargs)
        # What is imported here and below needs torch._dynamo, which is slow to import.
        y = nn.Module.__call__(self, *args, **kwargs)
        if torch.compiler.is_exporting():
            from shardproof.plans.graph import as_whole  # noqa: PLC0415

            return as_whole(y)
        return y

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """What `model.compile()` compiles."""
        if torch.compiler.is_dynamo_compiling():
            from shardproof.plans.graph import called  # noqa: PLC0415

            return called(self, self.__dict__[_HOW], args, kwargs)
        return nn.Module._call_impl(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of the class that the model had, so that copies are made of this one."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        arguments = tuple(self.eager_class if each is type(self) else each for each in arguments)
        return (_made_again, (make, arguments), *rest)


def make_compilable(model: nn.Module, *, is_invariant: bool) -> None:
    """Let `torch.compile` and `torch.export` take a cut model.

    Args:
        model: cut; the root.
        is_invariant: its numerics are.
    """
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    pairs = [(name, first.setdefault(id(parameter), name)) for name, parameter in named]
    ties = tuple(pair for pair in pairs if pair[0] != pair[1])
    values = tuple((name, _values_of(module)) for name, module in model.named_modules())
    model.__dict__[_HOW] = (is_invariant, ties, values)
    if not isinstance(model, Compilable):
        model.__class__ = _class_like(type(model))


def _values_of(module: nn.Module) -> tuple[str, ...]:
    """Attributes that a forward may branch on: a graph is good for the values it was made of."""
    kinds = bool | float | str if is_ours(module) else bool | int | float | str
    return tuple(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, kinds)
    )


def _class_like(eager: type[nn.Module]) -> type[nn.Module]:
    """A class for one model: Dynamo keeps graphs by the code that it compiled, and few of them."""
    names = ("__module__", "__qualname__", "__doc__")
    body: dict[str, Any] = {name: getattr(eager, name) for name in names}
    body["eager_class"] = eager
    for name in ("__call__", "_call_impl"):
        body[name] = _copied(getattr(Compilable, name))
    bases = (Compilable, eager)
    return types.new_class(eager.__name__, bases, {}, lambda own: own.update(body))


def _copied(function: Any) -> types.FunctionType:
    """The same function with code of its own."""
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__doc__ = function.__doc__
    return copy


def _made_again(make: Any, arguments: tuple[Any, ...]) -> nn.Module:
    """A model of a class that was made here, for copies and pickles."""
    model: nn.Module = make(*arguments)
    model.__class__ = _class_like(type(model))
    return model
