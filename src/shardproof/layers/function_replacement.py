"""Puts a function of ours in the place of one of torch's, for names imported earlier too.

`from torch.nn.init import normal_` keeps the function object, so that another function under the
same name would not be called. Therefore the object stays and its code changes: it calls ours, which
is given the original as a function of its own.
"""

import types
from collections.abc import Callable
from typing import Any

from shardproof.errors import UsageError

_GUARD = "_shardproof"


def _calls_the_guard(*args: Any, _shardproof: Callable[..., Any], **kwargs: Any) -> Any:
    return _shardproof(*args, **kwargs)


def is_replaced(function: Any) -> bool:
    """True if `replace` was here."""
    return _GUARD in (getattr(function, "__kwdefaults__", None) or {})


def replace(function: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let every call of `function` run `make(original)`; the second time does nothing.

    Args:
        function: a plain function or a method of a class; a decorated one stands for what it
            decorates.
        make: from the original to what is called in its place, with the same arguments.

    Raises:
        UsageError: this version of torch has it as another kind of function.
    """
    while hasattr(function, "__wrapped__") and not is_replaced(function):
        function = function.__wrapped__
    if is_replaced(function):
        return
    if not isinstance(function, types.FunctionType) or function.__code__.co_freevars:
        raise UsageError(
            f"cannot guard {function!r} of this version of torch: it is no plain function. Use the "
            "versions of torch that shardproof names."
        )
    original = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    original.__doc__, original.__annotations__ = function.__doc__, function.__annotations__
    # The default first: between the two assignments another thread may call.
    function.__kwdefaults__ = {**(function.__kwdefaults__ or {}), _GUARD: make(original)}
    function.__code__ = _calls_the_guard.__code__
    function.__defaults__ = None
    function.__wrapped__ = original  # type: ignore[attr-defined] # for inspect.signature
