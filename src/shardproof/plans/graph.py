"""What Dynamo and AOTAutograd see of a cut model; imported while they compile.

A cut model is one node of Dynamo's graph (`nonstrict_trace`). Dynamo runs it once on fake tensors,
to learn the shapes of its results. AOTAutograd then traces it, and sees only operations of torch,
because our kernels and collectives are custom operators (`operators.py`). So the graph holds the
operations of an eager step, in the same order.
"""

import math
import sys
import threading
import types
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import graph_bytecode_inputs
from torch._higher_order_ops.flat_apply import is_graphable
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRangeError

from shardproof.checking import is_checked
from shardproof.cut.deferred import Deferred
from shardproof.cut.module_calls import finished_calls
from shardproof.cut.spec import Spec
from shardproof.cut.tensor import CutTensor, cut_tensor, run
from shardproof.errors import ShardproofError, UsageError
from shardproof.hf.cut_logits import CutLogits
from shardproof.layers.base import is_ours
from shardproof.operators import Numbered

Ties = tuple[tuple[str, str], ...]

_OURS = "_shardproof_"
_OBJECTS = "_shardproof_kept"  # attribute of a model: the objects that its graphs refer to
_SIMPLE = (str, int, float, complex, bool, types.NoneType, torch.dtype, torch.device, type)
_CUT, _NONE = "shardproof.cut", "shardproof.none"


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.table: dict[int, Any] | None = None  # of a thread that has written nothing


class _TablePerThread(MutableMapping[int, Any]):
    """What Dynamo's graphs refer to by a number, for each thread.

    Torch keeps one table for the process. A frame fills it before it runs its graph, and a
    compilation empties it, so that of ranks that are threads one would run another's model, or
    none. A thread that has written nothing, such as one of autograd's, reads what was written last.
    """

    def __init__(self, shared: MutableMapping[int, Any]) -> None:
        self._shared, self._own = shared, _OfThread()

    def _read(self) -> MutableMapping[int, Any]:
        return self._shared if self._own.table is None else self._own.table

    def __getitem__(self, number: int) -> Any:
        return self._read()[number]

    def __setitem__(self, number: int, value: Any) -> None:
        if self._own.table is None:
            self._own.table = {}
        self._own.table[number] = self._shared[number] = value

    def __delitem__(self, number: int) -> None:
        del self._read()[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def clear(self) -> None:
        self._own.table = {}


graph_bytecode_inputs.index_to_external_object_weakref = _TablePerThread(  # type: ignore[assignment]
    graph_bytecode_inputs.index_to_external_object_weakref
)


def called(
    model: nn.Module,
    how: tuple[bool, Ties, tuple[tuple[str, tuple[str, ...]], ...]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The call of a cut model as one node of a graph. Dynamo traces this.

    Args:
        model: the cut model.
        how: whether its numerics are invariant; for each tied parameter its second and its first
            name; for each module the attributes that its forward may branch on.
        args: positional arguments of the call.
        kwargs: named arguments of the call.
    """
    is_invariant, ties, values = how
    # Dynamo guards what it reads, and makes another graph for another model or other values.
    guards: list[bool | int | float | str] = [id(model)]
    for name, attributes in values:
        module = model.get_submodule(name)
        for attribute in attributes:
            value = module.__dict__.get(attribute)
            guards.append(value if isinstance(value, (bool, int, float, str)) else _NONE)
    return _traced(guards, model, is_invariant, ties, _packed(args), _packed(kwargs))


@torch._dynamo.nonstrict_trace
def _traced(*inputs: Any) -> Any:
    """`_recorded`, with errors of a type whose message Dynamo shows."""
    try:
        return _recorded(*inputs)
    except ShardproofError as error:
        # Dynamo hides the message of most other errors and reports an unsupported output.
        raise ValueRangeError(str(error)) from error


def _recorded(
    guards: list[Any],
    model: nn.Module,
    is_invariant: bool,
    ties: Ties,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a cut model with traced or fake tensors.

    Args:
        guards: `id` of the model and attributes of its modules; Dynamo guards them.
        model: the cut model.
        is_invariant: whether its numerics are invariant.
        ties: for each tied parameter its second and its first name.
        args: positional arguments of the call, packed.
        kwargs: named arguments of the call, packed.
    """
    if is_checked():
        raise UsageError(
            f"a cut {type(model).__name__} is compiled inside checked(), which runs each operation "
            "twice. Check the model as it is, without torch.compile."
        )
    if is_invariant:
        _check_backend(model)
    pytree.tree_map(_of_one_size, guards)  # otherwise Dynamo would not guard a float
    args, kwargs = pytree.tree_map(
        _of_one_size, (_unpacked(args), _unpacked(kwargs)), is_leaf=_is_cut
    )
    with _tied(model, ties), _unchanged(model), finished_calls():
        y = nn.Module._call_impl(model, *args, **kwargs)
        if torch.compiler.is_exporting():
            return as_whole(y)
        return _as_tree(y, model.__dict__.setdefault(_OBJECTS, _OpaqueValues()))


def _check_backend(model: nn.Module) -> None:
    """Raise if inductor, which fuses and reorders, would compile invariant numerics."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch._inductor.compile_fx":
            raise UsageError(
                f"torch.compile of a cut {type(model).__name__} with backend='inductor': inductor "
                "fuses and reorders what it compiles, so that numerics='invariant' cannot keep its "
                "bits. Use backend='aot_eager', or Scheme(numerics='native')."
            )
        frame = frame.f_back


def _of_one_size(x: Any) -> Any:
    """Raise for symbolic sizes: a graph of a cut model is valid for one set of sizes only."""
    if isinstance(x, torch.SymInt):
        return int(x)
    if isinstance(x, torch.SymFloat):
        return float(x)
    if isinstance(x, Tensor) and any(isinstance(size, torch.SymInt) for size in x.shape):
        return x.view([int(size) for size in x.shape])
    return x


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore attributes that a forward sets, and raise: a graph would not set them again."""
    before = [
        (name, module, _state_of(module))
        for name, module in model.named_modules()
        if not is_ours(module) and not type(module).__module__.startswith("torch.")
    ]
    changed = []
    try:
        yield
    finally:
        for name, module, state in before:
            keys = _put_back(module, state)
            changed += [f"{name}.{key}" if name else key for key in keys]
    if changed:
        raise UsageError(
            f"the forward of a cut {type(model).__name__} sets {', '.join(changed[:3])}"
            f"{f' and {len(changed) - 3} more' if len(changed) > 3 else ''}. It is compiled as one "
            "node of a graph, which would not set it again. Write into a tensor in place "
            "(buffer.add_), or call this model without torch.compile."
        )


def _state_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Copies of the dicts of attributes, parameters and buffers of a module."""
    own = {name: value for name, value in vars(module).items() if not name.startswith(_OURS)}
    return {"": own} | {kind: dict(vars(module)[kind]) for kind in ("_parameters", "_buffers")}


def _put_back(module: nn.Module, state: dict[str, dict[str, Any]]) -> list[str]:
    """Restore a state; return the names of the attributes that had changed."""
    changed = []
    for where, old in state.items():
        container = vars(module)[where] if where else vars(module)
        now = _state_of(module)[where]
        for key in {**old, **now}:
            if old.get(key, _NONE) is now.get(key, _NONE):
                continue
            changed.append(key)
            if key in old:
                container[key] = old[key]
            else:
                del container[key]
    return changed


@contextmanager
def _tied(model: nn.Module, ties: Ties) -> Iterator[None]:
    """Set a tied parameter under its second name too; Dynamo passes it under one name only."""
    before = []
    for alias, name in ties:
        module, own = _place(model, alias)
        source, other = _place(model, name)
        before.append((module, own, module._parameters[own]))
        module._parameters[own] = source._parameters[other]
    try:
        yield
    finally:
        for module, own, parameter in before:
            module._parameters[own] = parameter


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, own = name.rpartition(".")
    return model.get_submodule(parent), own


def as_whole(y: Any) -> Any:
    """Gather the outputs of an exported program: outside of it, cut tensors have no rules."""
    return pytree.tree_map(_whole, y, is_leaf=_is_cut)


def _whole(x: Any) -> Any:
    return x.whole() if isinstance(x, CutTensor | CutLogits | Deferred) else x


# A graph returns tensors. Dynamo rebuilds everything else that a model returns.


class _Opaque:
    """An object that a graph cannot hold: a `Spec`, a class, a config."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _OpaqueValues(dict[Any, _Opaque]):
    """The objects that the graphs of one model refer to. A copy of the model has its own graphs."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_OpaqueValues":
        return _OpaqueValues()


_numbered = Numbered()


def _number(value: Any, objects: dict[Any, _Opaque]) -> int:
    """A number that stands for an object, always the same while `objects` exists."""
    key = (type(value), value) if isinstance(value, _SIMPLE) else id(value)
    number = objects.get(key)
    if number is None:
        number = objects[key] = _Opaque(value)
    return _numbered.number(number)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _value(number: int) -> Any:
    return _numbered.get(number).value


class _Node:
    """A cut tensor, or an object with tensors inside, in a form that a graph can return.

    Attributes:
        parts: its tensors, lists and dicts.
        how: numbers and names from which Dynamo rebuilds the object.
    """

    def __init__(self, parts: list[Any], how: tuple[Any, ...]) -> None:
        self.parts, self.how = parts, how


def _rebuild(parts: Any, how: Any) -> Any:
    """Rebuild the object of a `_Node`. Dynamo traces this, so it has plain statements only."""
    kind, first, *rest = how
    if kind == _CUT:
        number, sizes = rest
        return GraphTensor(parts[0], _value(number), first, number, sizes)
    names, others = rest
    instance = _value(first).__new__(_value(first))
    for name, value in zip(names, parts):  # noqa: B905 - Dynamo knows no `strict`
        setattr(instance, name, value)
    for name, number in others:
        setattr(instance, name, _value(number))
    return instance


pytree.register_pytree_node(_Node, lambda x: (x.parts, x.how), _rebuild)


def _is_cut(x: Any) -> bool:
    return isinstance(x, CutTensor)


def _as_tree(y: Any, objects: dict[Any, _Opaque]) -> Any:
    """The output of a model, with a `_Node` in place of each object that a graph cannot hold."""

    def node(x: Any) -> Any:
        if isinstance(x, CutTensor):
            return _Node([x.local], (_CUT, x.who, _number(x.spec, objects), tuple(x.spec.shape)))
        if isinstance(x, CutLogits | Deferred):
            return _whole(x)
        if isinstance(x, Tensor) or is_graphable(x):
            return x
        parts = {
            name: _as_tree(each, objects)
            for name, each in vars(x).items()
            if isinstance(each, list | tuple | dict) or _holds_tensors(each)
        }
        others = [
            (name, _number(each, objects)) for name, each in vars(x).items() if name not in parts
        ]
        how = ("object", _number(type(x), objects), tuple(parts), tuple(others))
        return _Node(list(parts.values()), how)

    return pytree.tree_map(node, y, is_leaf=_is_cut)


def _holds_tensors(x: Any) -> bool:
    return any(
        isinstance(leaf, Tensor) or any(map(_holds_tensors, getattr(leaf, "__dict__", {}).values()))
        for leaf in pytree.tree_leaves(x, is_leaf=_is_cut)
    )


class GraphTensor(CutTensor):
    """A cut tensor that a graph returns and that Dynamo can trace through.

    It is not a `torch.Tensor`, because Dynamo cannot build one of a class like ours. Functions and
    methods of torch accept it; `isinstance` does not.

    Attributes:
        number: the number of its `spec`.
        sizes: shape of the whole tensor.
    """

    def __init__(
        self, local: Tensor, spec: Spec, who: str, number: int, sizes: tuple[int, ...]
    ) -> None:
        self.local = local
        self.spec = spec
        self.who = who
        self.number = number
        self.sizes = sizes

    def whole(self) -> Tensor:
        """See `CutTensor.whole`."""
        gathered: Tensor = _call(CutTensor.whole, (self,), {})
        return gathered

    # Attributes that Dynamo can read.

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        return torch.Size(self.sizes)

    def size(self, dim: int | None = None) -> Any:
        """Shape of the whole tensor, or its size along one dim."""
        return torch.Size(self.sizes) if dim is None else self.sizes[dim]

    def dim(self) -> int:
        """Number of dims."""
        return len(self.sizes)

    ndimension = dim
    ndim = property(dim)

    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.sizes)

    nelement = numel

    def __len__(self) -> int:
        return self.sizes[0]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """An operation of torch's API."""
        return _call(func, args, kwargs or {})


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation; while Dynamo traces, it is one node of the graph."""
    if torch.compiler.is_dynamo_compiling():
        number = _number_of(func) + 0  # a symbolic number, which Dynamo can pass on
        return _traced_call(number, _packed(args), _packed(kwargs))
    return run(func, args, kwargs)


_functions: list[Any] = []


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _number_of(func: Any) -> int:
    if func not in _functions:
        _functions.append(func)
    return _functions.index(func)


@torch._dynamo.nonstrict_trace
def _traced_call(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on cut tensors with traced or fake parts."""
    call_args = _unpacked(args), _unpacked(kwargs)
    first = next(filter(_is_cut, pytree.tree_leaves(call_args, is_leaf=_is_cut)))
    return _as_tree(run(_functions[number], *call_args), first.spec.region.graph_objects)


def _packed(x: Any) -> Any:
    """Arguments of a node: a tuple replaces each cut tensor and None. Dynamo traces this."""
    if x is None:
        return (_NONE,)
    if isinstance(x, GraphTensor):
        return (_CUT, x.local, x.number, x.who)
    if isinstance(x, dict):
        return {name: _packed(each) for name, each in x.items()}
    if isinstance(x, list):
        return [_packed(each) for each in x]
    return tuple(_packed(each) for each in x) if isinstance(x, tuple) else x


def _unpacked(x: Any) -> Any:
    """The arguments from which `_packed` was made."""
    if isinstance(x, tuple) and x and isinstance(x[0], str):
        if x[0] == _CUT:
            return cut_tensor(x[1], _value(x[2]), x[3])
        if x[0] == _NONE:
            return None
    if isinstance(x, dict):
        return {name: _unpacked(each) for name, each in x.items()}
    return type(x)(map(_unpacked, x)) if isinstance(x, list | tuple) else x


def _method(name: str) -> Any:
    func = getattr(Tensor, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(func, (self, *args), kwargs)

    return method


for _name, _member in vars(CutTensor).items():
    if getattr(_member, "__qualname__", "").startswith("_method."):  # an operation of torch's
        setattr(GraphTensor, _name, _method(_name))
