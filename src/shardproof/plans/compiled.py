"""A cut model under `torch.compile` and `torch.export`.

Dynamo does not trace into shardproof: a cut model is one node of its graph (`plans/graph.py`), and
an exported program returns whole tensors. See docs/decisions/0047-a-cut-model-is-one-node.md.
"""

import types
from typing import Any

import torch
from torch import nn

from shardproof.layers.base import is_ours

_HOW = "_shardproof_compiled"  # attribute of a model


class Compilable(nn.Module):
    """First base of the class that a cut model gets; the model's own class is the second.

    Attributes:
        eager_class: the class that the model had before it was cut.
    """

    eager_class: type[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; while Dynamo traces, the call is one node of the graph."""
        if torch.compiler.is_dynamo_compiling():  # it would pass over `_call_impl`
            return self._call_impl(*args, **kwargs)
        # What is imported here and below needs torch._dynamo, which is slow to import.
        y = nn.Module.__call__(self, *args, **kwargs)
        if torch.compiler.is_exporting():
            from shardproof.plans.graph import as_whole  # noqa: PLC0415

            return as_whole(y)
        return y

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """The function that `model.compile()` compiles."""
        if torch.compiler.is_dynamo_compiling():
            from shardproof.plans.graph import called  # noqa: PLC0415

            return called(self, self.__dict__[_HOW], args, kwargs)
        return nn.Module._call_impl(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduce as the model's own class does, so that a copy gets a class of this kind too."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        arguments = tuple(self.eager_class if each is type(self) else each for each in arguments)
        return (_made_again, (make, arguments), *rest)


def make_compilable(model: nn.Module, *, is_invariant: bool) -> None:
    """Let `torch.compile` and `torch.export` take a cut model.

    Args:
        model: cut; the root.
        is_invariant: whether its numerics are invariant.
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
    """Attributes that a forward may branch on; a graph is valid for these values only."""
    kinds = bool | float | str if is_ours(module) else bool | int | float | str
    return tuple(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, kinds)
    )


def _class_like(eager: type[nn.Module]) -> type[nn.Module]:
    """A class for one model, since Dynamo keeps only a few graphs for each code object."""
    names = ("__module__", "__qualname__", "__doc__")
    body: dict[str, Any] = {name: getattr(eager, name) for name in names}
    body["eager_class"] = eager
    for name in ("__call__", "_call_impl"):
        body[name] = _copied(getattr(Compilable, name))
    bases = (Compilable, eager)
    return types.new_class(eager.__name__, bases, {}, lambda own: own.update(body))


def _copied(function: Any) -> types.FunctionType:
    """A copy of a function that has its own code object."""
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
    """Rebuild a model whose class was made here, for copies and pickles."""
    model: nn.Module = make(*arguments)
    model.__class__ = _class_like(type(model))
    return model
