"""A cut model under `torch.compile` and `torch.export`.

Dynamo does not look into our Python: a cut model is one node of its graph (`plans/graph.py`), and
what leaves an exported program is whole. See docs/decisions/0047-a-cut-model-is-one-node.md.
"""

import threading
import types
import weakref
from typing import Any

import torch
from torch import nn

_lock = threading.Lock()
_HOW = "_shardproof_compiled"  # attribute of a model
_classes: "weakref.WeakKeyDictionary[type[nn.Module], type[nn.Module]]" = (
    weakref.WeakKeyDictionary()
)


class Compilable(nn.Module):
    """Base of the classes that cut models get; stands before the class that they had.

    Attributes:
        eager_class: the class that the model had.
    """

    eager_class: type[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; while Dynamo traces, one node of its graph."""
        # What is imported here needs torch._dynamo, which is slow to import.
        if torch.compiler.is_dynamo_compiling():
            from shardproof.plans.graph import traced  # noqa: PLC0415

            # With its `id`, Dynamo gives no other model a graph that was made for this one.
            return traced(id(self), self, self.__dict__[_HOW], args, kwargs)
        y = nn.Module.__call__(self, *args, **kwargs)
        if torch.compiler.is_exporting():
            from shardproof.plans.graph import as_whole  # noqa: PLC0415

            return as_whole(y)
        return y

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
    model.__dict__[_HOW] = (is_invariant, ties)
    if not isinstance(model, Compilable):
        model.__class__ = _class_of(type(model))


def _class_of(eager: type[nn.Module]) -> type[nn.Module]:
    with _lock:
        found = _classes.get(eager)
        if found is None:
            names = ("__module__", "__qualname__", "__doc__")
            body: dict[str, Any] = {name: getattr(eager, name) for name in names}
            body["eager_class"] = eager
            bases = (Compilable, eager)
            found = types.new_class(eager.__name__, bases, {}, lambda own: own.update(body))
            _classes[eager] = found
        return found


def _made_again(make: Any, arguments: tuple[Any, ...]) -> nn.Module:
    """A model of a class that was made here, for copies and pickles."""
    model: nn.Module = make(*arguments)
    model.__class__ = _class_of(type(model))
    return model
