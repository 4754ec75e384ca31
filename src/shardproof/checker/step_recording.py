"""What one run of a program shows: outputs and gradients of modules, parameters, losses, dropout.

Hooks copy the tensors of every module, on one rank. Nothing of the program is changed, except that
dropout is off where the numbers are compared.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shardproof.checker.program import Program, call, is_floating
from shardproof.cut.tensor import CutTensor

T = TypeVar("T")

SEED = 0
INPUT, OUTPUT = "input", "output"
# What wrappers of torch put into the names of modules and parameters.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True, order=True)
class TensorPlace:
    """Where in a run a tensor appears.

    Attributes:
        step: number of the step; the one after the last update has a forward only.
        path: of the module.
        side: "input" or "output".
        call: how often the module was called before in this step.
        index: number of the tensor among the inputs or outputs.
    """

    step: int
    path: str
    side: str
    call: int
    index: int


@dataclass(frozen=True)
class Draw:
    """One dropout.

    Attributes:
        path: of the module that draws.
        call: how often it drew before.
        x: what elements are dropped of, where dropout was off.
        kept: which elements stay, where it was on.
    """

    path: str
    call: int
    x: Tensor
    kept: Tensor | None = None


@dataclass(frozen=True)
class ParameterRecord:
    """A parameter on one rank.

    Attributes:
        value: at the start.
        declared: how it lies, as a DTensor or Megatron's attributes say; empty if nothing does.
        offsets: where its first element lies in the whole, as a DTensor says.
    """

    value: Tensor
    declared: str = ""
    offsets: tuple[int, ...] | None = None


@dataclass
class Recording:
    """One run on one rank.

    Attributes:
        values: of each place, in order of appearance.
        gradients: of the same places, in order of appearance in backward.
        losses: of each step.
        parameters: at the start, by name.
        parameter_gradients: by step and name, after backward.
        used_gradients: by step and name, when the optimizer used them.
        weights: by step and name, after the update.
        state: by step and name of parameter and entry, of the optimizer.
        draws: dropout, in order.
        sources: file and line of the forward of each module.
        classes: name of the class of each module.
        buffers: their names.
    """

    values: dict[TensorPlace, Tensor] = field(default_factory=dict)
    gradients: dict[TensorPlace, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    parameters: dict[str, ParameterRecord] = field(default_factory=dict)
    parameter_gradients: dict[tuple[int, str], Tensor | None] = field(default_factory=dict)
    used_gradients: dict[tuple[int, str], Tensor | None] = field(default_factory=dict)
    weights: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    state: dict[tuple[int, str, str], Tensor] = field(default_factory=dict)
    draws: list[Draw] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)

    def without(self, prefix: str) -> "Recording":
        """The recording with paths and names as if a module around all others was not there.

        Args:
            prefix: what paths begin with, with its last dot; "" changes nothing.
        """
        if not prefix:
            return self

        def plain(name: str) -> str:
            return "" if f"{name}." == prefix else name.removeprefix(prefix)

        def at(place: TensorPlace) -> TensorPlace:
            return replace(place, path=plain(place.path))

        # The module around all others has the same place as the one inside, which counts.
        inner = [each for each in self.values if f"{each.path}.".startswith(prefix)]
        return replace(
            self,
            values={at(each): self.values[each] for each in inner},
            gradients={
                at(each): value
                for each, value in self.gradients.items()
                if f"{each.path}.".startswith(prefix)
            },
            parameters={plain(name): each for name, each in self.parameters.items()},
            parameter_gradients=_renamed(self.parameter_gradients, plain),
            used_gradients=_renamed(self.used_gradients, plain),
            weights=_renamed(self.weights, plain),
            state={(step, plain(n), entry): x for (step, n, entry), x in self.state.items()},
            draws=[replace(each, path=plain(each.path)) for each in self.draws],
            sources={plain(path): each for path, each in self.sources.items() if path},
            classes={plain(path): each for path, each in self.classes.items() if path},
        )


def common_prefix(names: Iterable[str], others: Iterable[str]) -> str:
    """What all names begin with, and the others do not.

    >>> common_prefix(["model.norm.weight", "model.head.weight"], ["norm.weight", "head.weight"])
    'model.'
    >>> common_prefix(["norm.weight"], ["norm.weight"])
    ''
    """
    names, known, prefix = list(names), set(others), ""
    while names and known.isdisjoint(names):
        first = names[0].partition(".")[0] + "."
        if not all(each.startswith(first) for each in names):
            return ""
        prefix += first
        names = [each.removeprefix(first) for each in names]
    return prefix


def _renamed(
    values: Mapping[tuple[int, str], T], plain: Callable[[str], str]
) -> dict[tuple[int, str], T]:
    return {(step, plain(name)): value for (step, name), value in values.items()}


def record(
    program: Program,
    group: Any | None,
    dtype: torch.dtype = torch.float32,
    *,
    draws: bool = False,
    before: Callable[[nn.Module], None] | None = None,
    is_forward: bool = False,
) -> Recording:
    """Run a program, and record it. Torch's default dtype is `dtype` afterwards.

    Args:
        program: what runs.
        group: of the ranks; None: the plain module.
        dtype: of parameters and floating-point inputs.
        draws: whether dropout is on.
        before: called with the module before the first step.
        is_forward: whether to run the first forward alone.
    """
    torch.set_default_dtype(dtype)
    torch.manual_seed(SEED)
    module = program.build(group)
    if any(each.dtype != dtype for each in _floating(module)):
        module.to(dtype)
    if before is not None:
        before(module)
    torch.manual_seed(SEED)
    recorder = _StepRecorder(program, group, module, draws=draws)
    run = recorder.forward if is_forward else recorder.run
    return run(program.make_batch(dtype))


def plain_name(name: str) -> str:
    """The name of a module or parameter without what wrappers of torch add.

    >>> plain_name("module._orig_mod.layers.0.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def local_of(tensor: Tensor) -> Tensor:
    """A copy of what this rank holds of a tensor."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if isinstance(tensor, CutTensor):
        tensor = tensor.local
    return tensor.detach().clone().contiguous()


class _StepRecorder:
    def __init__(
        self, program: Program, group: Any | None, module: nn.Module, *, draws: bool
    ) -> None:
        self._program = program
        self._group = group
        self._module = module
        self._draws = _DropoutMode(self, is_on=draws)
        self._found = Recording()
        self._step = 0
        self._is_forward = False
        self._calls: Counter[str] = Counter()
        self._stack: list[tuple[str, int]] = []
        self._hooked: dict[int, Tensor] = {}  # kept alive, so that no id is used again

    def run(self, batch: Any) -> Recording:
        for name, parameter in _named(self._module):
            self._found.parameters[plain_name(name)] = _parameter_record(parameter)
        self._found.buffers = [plain_name(name) for name, _ in self._module.named_buffers()]
        optimizer = self._program.make_optimizer(self._module)
        optimizer.register_step_pre_hook(self._note_used)
        with self._hooks():
            for step in range(self._program.steps):
                self._step = step
                optimizer.zero_grad()
                loss = self._forward(batch)
                loss.backward()
                self._note_gradients(self._found.parameter_gradients)
                self._program.step(self._module, optimizer, self._group)
                self._note_update(optimizer)
            self._step = self._program.steps
            with torch.no_grad():
                self._forward(batch)
        self._found.draws = self._draws.found
        return self._found

    def forward(self, batch: Any) -> Recording:
        with self._hooks(), torch.no_grad():
            self._forward(batch)
        return self._found

    def draw_place(self) -> str:
        """The path of the module that runs; empty in the forward of the whole."""
        return self._stack[-1][0] if self._stack else ""

    @property
    def draws_count(self) -> bool:
        """Whether dropout is recorded now: in the first forward."""
        return self._is_forward and self._step == 0

    def _forward(self, batch: Any) -> Tensor:
        torch.manual_seed(SEED + 1 + self._step)
        self._calls.clear()
        self._is_forward = True
        with self._draws:
            output = call(self._module, batch)
            self._is_forward = False
            loss = self._program.loss_of(output, batch, self._group)
        self._found.losses.append(local_of(loss).reshape(()))
        return loss

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for path, module in _named_modules(self._module):
            self._found.classes.setdefault(path, type(module).__name__)
            self._found.sources.setdefault(path, _source(module))
            handles += [
                module.register_forward_pre_hook(self._before(path), with_kwargs=True),
                module.register_forward_hook(self._after(path), with_kwargs=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self._is_forward:
                number = self._calls[path]
                self._calls[path] += 1
                self._stack.append((path, number))
                self._note(path, INPUT, number, (args, kwargs))

        return hook

    def _after(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            if self._is_forward:
                self._note(path, OUTPUT, self._stack.pop()[1], output)

        return hook

    def _note(self, path: str, side: str, number: int, values: Any) -> None:
        tensors = [each for each in pytree.tree_leaves(values) if is_floating(each)]
        for index, tensor in enumerate(tensors):
            place = TensorPlace(self._step, path, side, number, index)
            if place in self._found.values:  # a wrapper has the same path as what it wraps
                continue
            self._found.values[place] = local_of(tensor)
            if tensor.requires_grad and id(tensor) not in self._hooked:
                self._hooked[id(tensor)] = tensor
                tensor.register_hook(self._gradient_of(place))

    def _gradient_of(self, place: TensorPlace) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self._found.gradients[place] = local_of(gradient)

        return hook

    def _note_gradients(self, found: dict[tuple[int, str], Tensor | None]) -> None:
        for name, parameter in _named(self._module):
            found[self._step, plain_name(name)] = _gradient_of(parameter)

    def _note_used(self, *_: Any) -> None:
        self._note_gradients(self._found.used_gradients)

    def _note_update(self, optimizer: torch.optim.Optimizer) -> None:
        names: dict[nn.Parameter, str] = {}
        for name, parameter in _named(self._module):
            names.setdefault(parameter, plain_name(name))
            self._found.weights[self._step, plain_name(name)] = local_of(parameter)
        for parameter, name in names.items():
            for entry, value in optimizer.state.get(parameter, {}).items():
                if is_floating(value) and value.ndim:
                    self._found.state[self._step, name, entry] = local_of(value)
        self._hooked.clear()


class _DropoutMode(TorchFunctionMode):
    """Turns dropout off, or records what it keeps."""

    def __init__(self, recorder: _StepRecorder, *, is_on: bool) -> None:
        super().__init__()
        self._recorder = recorder
        self._is_on = is_on
        self._calls: Counter[str] = Counter()
        self.found: list[Draw] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            if not self._is_on and kwargs.get("dropout_p"):
                kwargs["dropout_p"] = 0.0
            if not self._is_on and len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            return func(*args, **kwargs)
        if func not in (F.dropout, torch.dropout):
            return func(*args, **kwargs)
        x, p, training = _dropout_arguments(*args, **kwargs)
        if not training or not p:
            return func(*args, **kwargs)
        y = torch.dropout(x, p, True) if self._is_on else x.clone()
        if self._recorder.draws_count:
            path = self._recorder.draw_place()
            kept = local_of(y) != 0 if self._is_on else None
            self.found.append(Draw(path, self._calls[path], local_of(x), kept))
            self._calls[path] += 1
        return y


def _dropout_arguments(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    train: bool | None = None,
) -> tuple[Tensor, float, bool]:
    return input, p, training if train is None else train


def _parameter_record(parameter: nn.Parameter) -> ParameterRecord:
    if not isinstance(parameter, DTensor):
        # Megatron's layers, and those that learnt from them, say the dim that is cut.
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        declared = f"partition_dim={getattr(parameter, 'partition_dim', '?')}" if is_cut else ""
        return ParameterRecord(local_of(parameter), declared)
    _, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    declared = ", ".join(str(each) for each in parameter.placements)
    return ParameterRecord(local_of(parameter), declared, tuple(offsets))


def _gradient_of(parameter: nn.Parameter) -> Tensor | None:
    """What this rank holds of a gradient, laid out as its parameter."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        # DTensor itself sums a Partial gradient when the optimizer uses it.
        gradient = gradient.redistribute(placements=parameter.placements)
    return None if gradient is None else local_of(gradient)


def _named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, each in module.named_modules():
        yield plain_name(name), each


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters by all their names: tied ones have several."""
    return module.named_parameters(remove_duplicate=False)


def _source(module: nn.Module) -> str:
    """File and line of the forward of a module; empty if it is not written in Python."""
    forward = inspect.unwrap(type(module).forward)
    try:
        return f"{inspect.getsourcefile(forward)}:{inspect.getsourcelines(forward)[1]}"
    except (OSError, TypeError):
        return ""


def _floating(module: nn.Module) -> Iterator[Tensor]:
    for each in (*module.parameters(), *module.buffers()):
        if each.is_floating_point():
            yield each
