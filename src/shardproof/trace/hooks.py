"""Torch's global hooks of modules and optimizers: where a rank is in its model.

The hooks are registered while any rank traces. They call `enter_module`, `leave_module`,
`enter_step` and `leave_step` of the observers that have them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizers
from torch.utils._pytree import tree_map

from shardproof import observing
from shardproof.cut.fallback import is_cut

_lock = threading.Lock()
_num_tracing = 0
_handles: list[Any] = []


@contextmanager
def listening() -> Iterator[None]:
    """Keep the hooks in place inside the block."""
    global _num_tracing
    with _lock:
        _num_tracing += 1
        if _num_tracing == 1:
            _handles.extend(_register())
    try:
        yield
    finally:
        with _lock:
            _num_tracing -= 1
            if not _num_tracing:
                for handle in _handles:
                    handle.remove()
                _handles.clear()


def _register() -> Iterator[Any]:
    yield torch_modules.register_module_forward_pre_hook(_before_forward)
    yield torch_modules.register_module_forward_hook(_after_forward, always_call=True)
    yield torch_optimizers.register_optimizer_step_pre_hook(_before_step)
    yield torch_optimizers.register_optimizer_step_post_hook(_after_step)


def _each(do: Callable[[Any], None]) -> None:
    for observer in observing.observers():
        if hasattr(observer, "enter_module"):
            do(observer)


def _before_forward(module: nn.Module, args: Any) -> None:
    _each(lambda listener: listener.enter_module(module))


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    _each(lambda listener: listener.leave_module(module, args, output))


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _each(lambda listener: listener.enter_step(optimizer))


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _each(lambda listener: listener.leave_step(optimizer))


def first_tensor(tree: Any) -> Tensor | None:
    """The first tensor of a module's arguments or output; of a cut one, this rank's part."""
    parts = tree_map(lambda x: x.local if is_cut(x) else x, tree, is_leaf=is_cut)
    return next(iter(observing.tensors_in(parts)), None)
