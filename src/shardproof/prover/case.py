"""What the prover runs: a case, and the object through which one run of it records tensors.

A case is one function of a `CaseRun`. The prover calls it twice without an axis, in plain torch,
and once on every rank of every degree. Each call builds the model, does the work and records
tensors by name.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof import observing, optim
from shardproof.axis import Axis
from shardproof.cut.tensor import CutTensor
from shardproof.errors import UsageError
from shardproof.layers.base import ShardedModule
from shardproof.layers.cut_module import CutModule
from shardproof.layers.registry import record_of
from shardproof.leaves import Layout, replicated
from shardproof.numerics import mode
from shardproof.observing import Observer, Operand, StepEvent, address, tensors_in
from shardproof.ops.unit_moves import joined
from shardproof.prover.compare import OptimizerStep
from shardproof.scheme import Scheme

NOTEBOOK_DEGREE = 2  # the notebooks simulate two devices

Castable = TypeVar("Castable", Tensor, nn.Module)
# Name of a weight, and its shape -> its gradient in the fp64 run; None if that run left none.
PreciseGradient = Callable[[str, tuple[int, ...]], Tensor | None]


class MemoryAudit:
    """The largest storage that one rank allocated.

    An observer sees the outputs of every operation of its own thread, those of backward and of the
    optimizer included, so ranks that are threads are told apart. It counts the full size of a
    storage that an operation made, also where the operation returned a view of it. It does not see
    what a kernel allocates for itself (BLAS and our kernels pack operands), the shared memory that
    a transport maps, nor what numpy allocates.

    Attributes:
        largest_bytes: size of that storage.
        largest_shape: shape of the tensor that it was made for.
    """

    def __init__(self) -> None:
        self.largest_bytes = 0
        self.largest_shape: tuple[int, ...] = ()
        self._data: dict[int, Tensor] = {}
        self._is_running = False
        self._pauses = 0

    def exclude(self, tensor: Tensor) -> None:
        """Mark a tensor as data: its storage is never counted."""
        # Kept alive, or another storage could come to lie at the same address.
        self._data[address(tensor)] = tensor.detach()

    def is_data(self, tensor: Tensor) -> bool:
        """True if the tensor's storage was marked as data."""
        return address(tensor) in self._data

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what this thread allocates inside the block."""
        if self._is_running:
            yield
            return
        self._is_running = True
        try:
            with _AllocationObserver(self._count):
                yield
        finally:
            self._is_running = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what this thread allocates inside the block: the recorder's own work."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def _count(self, tensor: Tensor) -> None:
        size = tensor.untyped_storage().nbytes()
        if self._pauses or size <= self.largest_bytes or self.is_data(tensor):
            return
        self.largest_bytes, self.largest_shape = size, tuple(tensor.shape)


class _AllocationObserver(Observer):
    """Calls back for every tensor that an operation made; views of its inputs are left out."""

    def __init__(self, callback: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._callback = callback

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation and report the tensors that it made."""
        given = tensors_in((args, kwargs))
        before = {address(tensor) for tensor in given}
        result = func(*args, **kwargs)
        # Arguments too: an operation may grow the storage of what it writes into.
        for tensor in (*tensors_in(result), *given):
            if address(tensor) not in before:
                self._callback(tensor)
        return result


@dataclass(frozen=True)
class Check:
    """A claim of a case's own, beyond equal bits and agreement."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class RecordOptions:
    """How one tensor is recorded.

    Attributes:
        judged: it must agree with plain torch.
        step: what is known of the optimizer step, if the tensor is an updated weight.
        may_be_infinite: infinities are no fault, as in a mask that is added to scores.
    """

    judged: bool = True
    step: OptimizerStep | None = None
    may_be_infinite: bool = False


class Recorder(Protocol):
    """Takes the recorded tensors: in plain torch it writes files, on a rank it compares."""

    def record(self, name: str, tensor: Tensor, layout: Layout, how: RecordOptions) -> None:
        """Take one tensor."""

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor that no rank records; called in plain torch only."""


class PartOfTrainings(Protocol):
    """Chooses the steps of a training that a run does."""

    def steps(
        self, run: "CaseRun", model: nn.Module, optimizer: Optimizer | None, total: int, name: str
    ) -> Iterator[int]:
        """The numbers of the steps."""


class CaseRun:
    """One run of a case: what a case reads and what it reports to.

    Attributes:
        axis: the ranks, or None in plain torch.
        scheme: leaves and numerics for the layers. If the proof was given no scheme, it is the one
            of the adopted model's layers.
        seed: random seed of everything that the case draws.
        audit: what this run allocates.
        checks: what the case has claimed so far.
        curves: name of a training -> the loss of each of its steps; a case may train twice.
        activation_bytes: size of the largest output of a module, data excluded; plain torch only.
        share_bytes: size of the largest owned share of a parameter.
        num_cut_parameters: number of parameters of the adopted models that no rank owns whole.
        precise_gradient: reads a gradient of the fp64 run; None except in the fp32 run of plain
            torch.
        has_cut_tensors: code of an adopted model may receive cut tensors.
        device: where the model and the data are moved to; None, the default: they are not moved.
        part: which steps of its trainings the run does; None, the default: all.
        sequence_parallel: language models cut activations between blocks along their tokens.
    """

    def __init__(
        self,
        *,
        axis: Axis | None,
        scheme: Scheme | None,
        seed: int | None,
        recorder: Recorder,
        is_precise: bool = False,
        precise_gradient: PreciseGradient | None = None,
    ) -> None:
        self.axis = axis
        self.scheme = Scheme() if scheme is None else scheme
        self.seed = self.scheme.seed if seed is None else seed
        self.audit = MemoryAudit()
        self.checks: list[Check] = []
        self.curves: dict[str, list[float]] = {}
        self.activation_bytes = 0
        self.share_bytes = 0
        self.num_cut_parameters = 0
        self.has_cut_tensors = False
        self.device: torch.device | None = None
        self.part: PartOfTrainings | None = None
        self.sequence_parallel = False
        self.precise_gradient = precise_gradient
        self._recorder = recorder
        self._is_precise = is_precise
        self._scheme_giver = None if scheme is None else "the proof"
        self._kinds: set[tuple[torch.dtype, torch.device]] = set()

    @property
    def is_reference(self) -> bool:
        """True in plain torch, where only the first step is recorded."""
        return self.axis is None

    @property
    def is_precise(self) -> bool:
        """True in the fp64 run of plain torch."""
        return self._is_precise

    def cast(self, value: Castable) -> Castable:
        """A value on the device of this run, if one is set; in the fp64 run, floats as fp64."""
        if self.device is not None:
            value = value.to(self.device)
        if not self._is_precise:
            return value
        if isinstance(value, nn.Module):
            return value.double()
        return value.double() if value.is_floating_point() else value

    def data(self, tensor: Tensor) -> Tensor:
        """Mark a tensor as data, which the audit leaves out; returns it, cast for this run."""
        tensor = self.cast(tensor)
        self.audit.exclude(tensor)
        return tensor

    @contextmanager
    def measured(self) -> Iterator[None]:
        """A block whose allocations the memory audit counts, on a rank."""
        if self.is_reference:
            yield
            return
        with self.audit.running():
            yield

    def adopt(self, model: nn.Module) -> nn.Module:
        """Read from a model its memory bound and the contract that it runs under; returns it.

        Raises:
            UsageError: a layer has another scheme than the proof, or than another layer.
        """
        for _, parameter, layout, _ in optim.layouts_of(model):
            is_cut = layout.dim is not None
            numel = math.prod(layout.owned_shape) if is_cut else parameter.numel()
            self.share_bytes = max(self.share_bytes, numel * parameter.element_size())
            self.num_cut_parameters += _is_cut(layout)
        if self.is_reference:
            for module in model.modules():
                module.register_forward_hook(self._measure_activation)
        for name, module in model.named_modules():
            self.has_cut_tensors |= isinstance(module, CutModule)
            if isinstance(module, ShardedModule):
                self._adopt_scheme(name or record_of(module).name, module)
        return model

    def _adopt_scheme(self, name: str, layer: ShardedModule) -> None:
        who, scheme = f"layer {name!r}", record_of(layer).scheme
        if self._scheme_giver is not None and scheme != self.scheme:
            raise UsageError(
                f"{who} has {scheme}, {self._scheme_giver} has {self.scheme}, and a report "
                f"speaks of one. Give every layer and the proof the same scheme."
            )
        self.scheme, self._scheme_giver = scheme, self._scheme_giver or who
        parameters = layer.parameters(recurse=False)
        self._kinds |= {(each.dtype, each.device) for each in parameters if not each.is_meta}

    def contract(self) -> str:
        """Everything that the bits of the adopted models depend on; call it on their rank."""
        kinds = self._kinds or {(torch.float32, torch.device("cpu"))}
        lines = {mode.contract(self.scheme, dtype, device) for dtype, device in kinds}
        return "; ".join(sorted(lines))

    def record(
        self,
        name: str,
        tensor: Tensor,
        layout: Layout | None = None,
        *,
        judged: bool = True,
        step: OptimizerStep | None = None,
        may_be_infinite: bool = False,
    ) -> None:
        """Hash a tensor and compare it with plain torch's of the same name.

        Args:
            name: unique within the run. Tensors are reported in the order of the calls.
            tensor: layout.local_shape; or a cut tensor, which is recorded whole.
            layout: how it lies on this rank; replicated if not given.
            judged: whether it must agree with plain torch; if not, only its hash is taken.
            step: what is known of the optimizer step, if the tensor is an updated weight.
            may_be_infinite: infinities are no fault, as in a mask that is added to scores.

        Comm:
            gathers to rank 0 in direction "prover" if the tensor is sharded; all_gathers it, if it
            is a cut tensor.
        """
        if self.is_reference and not judged:
            return
        with self.audit.paused(), torch.no_grad():
            tensor = as_it_lies(tensor, layout)
            layout = replicated(tuple(tensor.shape)) if layout is None else self._here(layout, name)
            how = RecordOptions(judged, step, may_be_infinite)
            if observing.is_on():
                place = observing.placement_of(layout)
                output = Operand(name, tensor.detach(), place)
                observing.tell(StepEvent("record", "prover", name, "", (), output))
            self._recorder.record(name, tensor.detach(), layout, how)

    def _here(self, layout: Layout, name: str) -> Layout:
        """The layout on the ranks of this run: replicated, if it was cut for a single rank.

        Raises:
            UsageError: the tensor is cut over some other number of ranks.
        """
        if self.axis is None or layout.cut is None or layout.cut.degree == self.axis.size:
            return layout
        if layout.cut.degree == 1:
            return replicated(layout.shape)
        raise UsageError(
            f"tensor {name!r} is cut over {layout.cut.degree} ranks, and {self.axis} has "
            f"{self.axis.size}. Cut the model over the axis that build is given."
        )

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor that no rank records, but that judges others; in plain torch only."""
        if self.is_reference:
            self._recorder.set_aside(name, tensor.detach())

    def steps(
        self, model: nn.Module, optimizer: Optimizer | None, total: int, *, name: str = ""
    ) -> Iterator[int]:
        """The numbers of the steps of a training: all, or one side of a checkpoint.

        Args:
            model: as it was created.
            optimizer: as it was created; None if nothing is updated.
            total: number of steps.
            name: of the training, if the case has several.
        """
        if self.part is None:
            return iter(range(total))
        return self.part.steps(self, model, optimizer, total, name)

    def check(self, name: str, passed: bool, detail: str = "") -> None:
        """Claim something; it must hold on every rank at every degree that claims it."""
        if not self.is_reference:
            self.checks.append(Check(name, passed, detail))

    def follow(self, loss: Tensor, *, run: str = "") -> None:
        """Add the loss of one step to the report's curve.

        Args:
            loss: (), Replicate.
            run: which training of the case it belongs to.
        """
        self.curves.setdefault(run, []).append(loss.item())

    def _measure_activation(self, module: nn.Module, inputs: object, output: object) -> None:
        outputs = output if isinstance(output, tuple | list) else (output,)
        for tensor in outputs:
            if isinstance(tensor, Tensor) and not self.audit.is_data(tensor):
                size = tensor.numel() * tensor.element_size()
                self.activation_bytes = max(self.activation_bytes, size)


@dataclass(frozen=True)
class PrintedResult:
    """One result that a teaching notebook prints, to be shown next to ours.

    Attributes:
        label: as the notebook calls it.
        tensor: name of the case's tensor that it corresponds to; "" if the case records none.
        shape: that was printed.
        values: that were printed, row by row.
        exact: whether it was equal to autograd's, bit by bit.
        close: whether it passed `allclose`.
        max_diff: its largest difference from autograd's.
        rank: which of two ranks holds this part; None: the whole tensor.
        is_of_two: the whole tensor, put together from the results of two ranks.
        seed: random seed that `values`, `exact` and `max_diff` depend on; None: not known.
        section: where in the notebook.
    """

    label: str
    tensor: str = ""
    shape: tuple[int, ...] | None = None
    values: tuple[tuple[float, ...], ...] | None = None
    exact: bool | None = None
    close: bool | None = None
    max_diff: float | None = None
    rank: int | None = None
    is_of_two: bool = False
    seed: int | None = None
    section: str = ""


@dataclass(frozen=True)
class Case:
    """Something to prove.

    Attributes:
        name: on the command line and in reports.
        source: file name of the teaching notebook that it comes from, or "".
        description: one line: what it shows.
        work: the run itself.
        extra: the optional extra it needs, or "".
        module: the module that the extra brings; tells whether it is installed.
        elementwise: tensors that must also pass the notebook's elementwise `allclose(atol=1e-6)`.
        accuracy: how many times further from the fp64 run than plain torch's its output, loss and
            gradients may be; 0 claims nothing.
        has_curve: its loss is followed over several steps.
        printed: what the notebook prints of it.
    """

    name: str
    description: str
    work: Callable[[CaseRun], None]
    source: str = ""
    extra: str = ""
    module: str = ""
    elementwise: tuple[str, ...] = ()
    accuracy: float = 0.0
    has_curve: bool = False
    printed: tuple[PrintedResult, ...] = ()

    @property
    def is_installed(self) -> bool:
        """True unless the case needs an extra that is not there."""
        return not self.module or importlib.util.find_spec(self.module) is not None


def _is_cut(layout: Layout) -> bool:
    """True if no rank owns the whole tensor."""
    if layout.cut is None:
        return False
    ranks = range(layout.cut.degree)
    return all(len(layout.cut.owned(rank)) < layout.cut.size for rank in ranks)


def as_it_lies(x: Any, layout: Layout | None) -> Tensor:
    """The local part of a cut tensor if it has this layout, else the whole; plain ones unchanged.

    Comm:
        prover one all_gather of the whole shape, if it is cut and has another layout.
    """
    dim, shape = (None, None) if layout is None else (layout.dim, layout.local_shape)
    if isinstance(x, CutTensor) and (dim, shape) == (x.spec.dim, tuple(x.local.shape)):
        return x.local
    return as_whole(x)


def as_whole(x: Any) -> Tensor:
    """A cut tensor gathered to a plain one without gradient; plain ones are returned unchanged.

    Comm:
        prover one all_gather of the whole shape, if it is cut.
    """
    if not isinstance(x, CutTensor):
        plain: Tensor = x
        return plain
    place = x.spec.region.place(x.spec.cut, x.who)
    return joined(x.local.detach(), x.spec.dim, place, "prover")


def parameter_layouts(model: nn.Module) -> dict[str, Layout]:
    """Parameter name -> layout, for every parameter; those of plain modules are replicated."""
    return {name: layout for name, _, layout, _ in optim.layouts_of(model)}
