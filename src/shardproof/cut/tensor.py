"""`CutTensor`: has the global shape, holds a rank's part, and sends every operation to its rule.

Calls of torch's API arrive in `__torch_function__`, and autograd works on the plain parts. So an
operation costs 2 to 3 microseconds more than a plain one in forward, and nothing in backward. ATen
operations that do not come from the API (inside composite C++ operations) arrive in
`__torch_dispatch__`. docs/decisions/0044-the-cut-tensor.md says why both are used, and not DTensor.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof import observing
from shardproof.checking import is_checked
from shardproof.cut.spec import Spec
from shardproof.errors import UsageError
from shardproof.numerics.elementwise import check_out

Rule = Callable[[Any, str, tuple[Any, ...], dict[str, Any]], Any]

RULES: dict[str, Rule] = {}  # name of an operation -> its rule
composed: list[Callable[..., Any]] = []  # handles ATen operations; set by `cut/fallback.py`
checks: list[Callable[..., Any]] = []  # runs rules inside `checked()`
# With sequence parallelism: finds another rule for tensors that are cut along their tokens.
token_rules: list[Callable[[str, tuple[Any, ...], dict[str, Any]], Rule | None]] = []
_NAMES: dict[Any, str] = {
    F.unfold: "im2col",
    F.fold: "col2im",
}  # `Tensor.unfold` is another operation
_ARITHMETIC = frozenset(
    """add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift eq ne lt le gt ge
    neg pos abs invert getitem setitem""".split()  # noqa: SIM905
)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the operations with these names."""

    def put(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return put


def name_of(func: Any) -> str:
    """The name of an operation, which may come as a function, a method or an operator."""
    name = _NAMES.get(func)
    if name is None:
        name = getattr(func, "__name__", None) or str(func)
        name = getattr(getattr(func, "overloadpacket", None), "__name__", name)  # ATen
        bare = name.strip("_")
        if name.startswith("__"):
            if bare in _ARITHMETIC or (bare[0] == "r" and bare[1:] in _ARITHMETIC):
                name = bare
            elif bare[0] == "i" and bare[1:] in _ARITHMETIC:
                name = f"{bare[1:]}_"
        _NAMES[func] = name
    return name


class CutTensor:
    """A tensor of which this rank holds a part along one dim.

    Attributes:
        local: the part, a plain tensor, which autograd works on.
        spec: the shape of the whole, the dim that is cut, and its cut.
        who: the module from whose weight the cut comes, for messages and the ledger.
    """

    if TYPE_CHECKING:  # all other methods of `torch.Tensor` are added below

        def __getattr__(self, name: str) -> Any: ...
        def __mul__(self, other: Any) -> Any: ...
        def __getitem__(self, index: Any) -> Any: ...

    def __init__(self, local: Tensor, spec: Spec, who: str = "") -> None:
        self.local = local
        self.spec = spec
        self.who = who

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """An operation of torch's API."""
        return run(func, args, dict(kwargs) if kwargs else {})

    @staticmethod
    def by_rule(name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call one of shardproof's own functions by its rule (`operands.meets_cut`)."""
        return run_as(name, func, args, dict(kwargs))

    # What it is.

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        return self.spec.shape

    def size(self, dim: int | None = None) -> Any:
        """Shape of the whole tensor, or its size along one dim."""
        return self.spec.shape if dim is None else self.spec.shape[dim]

    def dim(self) -> int:
        """Number of dims."""
        return len(self.spec.shape)

    ndimension = dim

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.spec.shape)

    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        return self.spec.shape.numel()

    nelement = numel

    def element_size(self) -> int:
        """Bytes of one element."""
        return self.local.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel() * self.local.element_size()

    def __len__(self) -> int:
        return self.spec.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        """Device of the part."""
        return self.local.device

    @property
    def layout(self) -> torch.layout:
        """Layout of the part."""
        return self.local.layout

    @property
    def requires_grad(self) -> bool:
        """Whether the part needs a gradient."""
        return self.local.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.local.requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> "CutTensor":
        """See `torch.Tensor`."""
        self.local.requires_grad_(requires_grad)
        return self

    @property
    def grad_fn(self) -> Any:
        """Autograd node of the part."""
        return self.local.grad_fn

    @property
    def is_leaf(self) -> bool:
        """Whether the part is a leaf of the autograd graph."""
        return self.local.is_leaf

    @property
    def grad(self) -> Any:
        """The gradient as a cut tensor, or None."""
        grad = self.local.grad
        return None if grad is None else cut_tensor(grad, self.spec, self.who)

    @grad.setter
    def grad(self, value: Any) -> None:
        self.local.grad = value.local if isinstance(value, CutTensor) else value

    @property
    def data(self) -> "CutTensor":
        """The same cut tensor without its autograd graph."""
        return cut_tensor(self.local.data, self.spec, self.who)

    @data.setter
    def data(self, value: Any) -> None:
        if not isinstance(value, CutTensor) or value.spec is not self.spec:
            raise UsageError(
                f"the data of a cut tensor ({self.spec!r}) can be set to one that is cut alike, "
                f"not to {type(value).__name__} of shape {tuple(value.shape)}. Use x.copy_(value)."
            )
        self.local.data = value.local

    @property
    def _version(self) -> int:
        return self.local._version

    @property
    def part(self) -> Tensor:
        """This rank's part, a plain tensor that carries gradients; sends nothing."""
        return self.local

    def whole(self) -> Tensor:
        """Gather the whole tensor: a plain tensor, Replicate, that carries gradients.

        Comm:
            forward one all_gather of the whole shape; backward none.
        """
        gathered: Tensor = RULES["whole"](None, "whole", (self,), {})
        return gathered

    def stride(self, dim: int | None = None) -> Any:
        """The strides of a contiguous tensor of the whole shape."""
        strides = torch.empty(self.shape, device="meta").stride()
        return strides if dim is None else strides[dim]

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the part is contiguous."""
        return self.local.is_contiguous(*args, **kwargs)

    def register_hook(self, hook: Callable[[Any], Any]) -> Any:
        """The hook gets a cut tensor, and may return one."""
        spec, who = self.spec, self.who

        def on_part(grad: Tensor) -> Any:
            result = hook(cut_tensor(grad, spec, who))
            return result.local if isinstance(result, CutTensor) else result

        return self.local.register_hook(on_part)

    def retain_grad(self) -> None:
        """See `torch.Tensor`."""
        self.local.retain_grad()

    def __iter__(self) -> Iterator[Any]:
        return iter(run(Tensor.unbind, (self, 0), {}))

    def __repr__(self, **_: Any) -> str:
        return f"CutTensor({self.spec!r}, dtype={self.dtype}, {self.local!r})"

    def __format__(self, form: str) -> str:
        return repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CutTensor":
        return cut_tensor(self.local.__deepcopy__(memo), self.spec, self.who)


def _of_part(name: str) -> Callable[[CutTensor], Any]:
    return lambda self: getattr(self.local, name)


for _flag in (
    "is_cuda",
    "is_meta",
    "is_cpu",
    "is_sparse",
    "is_quantized",
    "is_nested",
    "is_mkldnn",
    "is_xla",
    "is_mps",
    "is_xpu",
    "itemsize",
    "names",
    "is_inference_",
):
    if hasattr(Tensor, _flag):
        setattr(CutTensor, _flag, property(_of_part(_flag)))


class ShownCutTensor(CutTensor, Tensor):  # type: ignore[misc, override]
    """A cut tensor that is a `torch.Tensor` without memory of its own."""

    __hash__ = Tensor.__hash__
    __torch_function__ = CutTensor.__torch_function__  # otherwise torch would install its default

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Handle an ATen operation from inside a composite operation."""
        return composed[-1](func, args, kwargs or {})


_wrapped: Any = Tensor._make_wrapper_subclass


def cut_tensor(local: Tensor, spec: Spec, who: str = "") -> CutTensor:
    """Make a cut tensor; while Dynamo traces, an object that it can trace through."""
    shown_tensor: CutTensor = _wrapped(
        ShownCutTensor, spec.shape, dtype=local.dtype, device=local.device
    )
    shown_tensor.local = local
    shown_tensor.spec = spec
    shown_tensor.who = who
    return shown_tensor


class Adopted(ShownCutTensor):
    """A cut tensor that was made from a whole one in place; C++ does not dispatch its calls."""


def with_dispatch(x: Any) -> Any:
    """The same cut tensor in the class whose calls inside C++ operations are dispatched."""
    return cut_tensor(x.local, x.spec, x.who) if type(x) is Adopted else x


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation by its rule, or without a rule as `cut/fallback.py` does."""
    return run_as(_NAMES.get(func) or name_of(func), func, args, kwargs)


def run_as(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation by the rule of a name."""
    if kwargs and kwargs.get("out") is not None:
        return _into(name, func, args, kwargs)
    function = RULES.get(name) or RULES["others"]
    if token_rules:
        function = token_rules[-1](name, args, kwargs) or function
    if observing.is_on():
        return observing.see_rule(
            name_of(func), args, partial(_run, function, func, name, args, kwargs)
        )
    return _run(function, func, name, args, kwargs)


def _into(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute the result, write it to `out`, and return `out`.

    Raises:
        UsageError: `out` is several tensors, has a gradient, or cannot hold the result's dtype.
    """
    out = kwargs["out"]
    y = run_as(name, func, args, {key: each for key, each in kwargs.items() if key != "out"})
    check_out(name, y, out)
    if out.shape != y.shape:
        out.resize_(y.shape)
    return run_as("copy_", Tensor.copy_, (out, y), {})


def _run(
    rule_function: Rule, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if is_checked():
        return checks[-1](rule_function, func, name, args, kwargs)
    if not _num_modes() or running.is_rule:
        return rule_function(func, name, args, kwargs)
    return unseen(rule_function, func, name, args, kwargs)


def must_call_torch() -> bool:
    """Whether this thread's operations are checked or intercepted, so that none may be skipped."""
    return is_checked() or bool(_num_modes())


def unseen(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function whose operations `Calls` (`cut/module_calls.py`) does not intercept."""
    was, running.is_rule = running.is_rule, True
    try:
        return function(*args, **kwargs)
    finally:
        running.is_rule = was


class _Running(threading.local):
    """State of one thread: whether a rule or a form is running."""

    is_rule = False


running = _Running()
_num_modes = torch._C._len_torch_function_stack


def named(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """Arguments in the order of their names, None for each that is missing."""
    return [args[n] if n < len(args) else kwargs.get(name) for n, name in enumerate(names)]


def _method(name: str) -> Callable[..., Any]:
    func = getattr(Tensor, name)
    torch_name = name_of(func)

    def method(self: CutTensor, *args: Any, **kwargs: Any) -> Any:
        return run_as(torch_name, func, (self, *args), kwargs)

    method.__name__ = name
    return method


def _properties() -> None:
    def transposed(self: CutTensor) -> Any:
        return run(Tensor.permute, (self, *range(self.dim() - 1, -1, -1)), {})

    CutTensor.T = property(transposed)  # type: ignore[attr-defined]
    CutTensor.mT = property(lambda self: run(Tensor.transpose, (self, -2, -1), {}))  # type: ignore[attr-defined]
    CutTensor.real = property(lambda self: run(torch.real, (self,), {}))  # type: ignore[attr-defined]
    CutTensor.imag = property(lambda self: run(torch.imag, (self,), {}))  # type: ignore[attr-defined]


_OWN = {
    "__class__",
    "__new__",
    "__init__",
    "__init_subclass__",
    "__subclasshook__",
    "__getattribute__",
    "__setattr__",
    "__delattr__",
    "__dir__",
    "__torch_function__",
    "__torch_dispatch__",
    "__hash__",
    "__doc__",
    "__module__",
    "__dict__",
    "__weakref__",
    "__sizeof__",
    "__str__",
}
_properties()
for _name in dir(Tensor):
    if _name not in _OWN and _name not in vars(CutTensor) and callable(getattr(Tensor, _name)):
        setattr(CutTensor, _name, _method(_name))
