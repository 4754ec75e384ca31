"""What the prover runs: a case, and the trial that one run of it is given.

A case is one function of a trial. It is called with no axis for plain torch, twice, and on every
rank of every degree; each time it builds its model, does its work and records tensors by name.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from shardproof import observing, optim
from shardproof.axis import Axis
from shardproof.cut.tensor import CutTensor
from shardproof.errors import UsageError
from shardproof.layers.base import ShardedModule
from shardproof.layers.cut_module import CutModule
from shardproof.layers.registry import record_of
from shardproof.leaves import Layout, replicated
from shardproof.numerics import mode
from shardproof.observing import Operand, Told
from shardproof.ops.unit_moves import joined
from shardproof.prover.audit import Audit
from shardproof.prover.printed import Printed
from shardproof.prover.reference import ReferenceReader
from shardproof.prover.rounding import Step
from shardproof.scheme import Scheme

Castable = TypeVar("Castable", Tensor, nn.Module)


@dataclass(frozen=True)
class Check:
    """A claim of a case's own, beyond equal bits and agreement."""

    name: str
    passed: bool
    detail: str


class Recorder(Protocol):
    """What becomes of a recorded tensor: a file in plain torch, figures on a rank."""

    def record(self, name: str, tensor: Tensor, layout: Layout, how: "Recording") -> None:
        """Take one tensor."""

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Keep one that is not recorded; in plain torch alone."""


@dataclass(frozen=True)
class Recording:
    """How one tensor is recorded.

    Attributes:
        judged: it must agree with plain torch.
        step: of an updated weight, what is known of its update.
        may_be_infinite: infinities in it are no fault, as in a mask that is added to scores.
    """

    judged: bool = True
    step: Step | None = None
    may_be_infinite: bool = False


class Trial:
    """One run of a case, as the case sees it.

    Attributes:
        axis: the ranks, or None in plain torch.
        scheme: leaves and numerics for the layers; that of the adopted model's own layers, if the
            proof was given none.
        seed: of everything the case draws.
        audit: what this run allocates.
        checks: what the case has claimed so far.
        curves: run -> the loss of each of its steps; a case may train more than once.
        activation_bytes: of the largest output of a module, data excluded; plain torch only.
        share_bytes: of the largest owned share of a parameter.
        num_cut_parameters: of the adopted models, those of which no rank owns all.
        precise: what the fp64 run left; in the other run of plain torch alone.
        has_cut_tensors: code of an adopted model may meet cut tensors.
    """

    def __init__(
        self,
        *,
        axis: Axis | None,
        scheme: Scheme | None,
        seed: int | None,
        recorder: Recorder,
        is_precise: bool = False,
        precise: ReferenceReader | None = None,
    ) -> None:
        self.axis = axis
        self.scheme = Scheme() if scheme is None else scheme
        self.seed = self.scheme.seed if seed is None else seed
        self.audit = Audit()
        self.checks: list[Check] = []
        self.curves: dict[str, list[float]] = {}
        self.activation_bytes = 0
        self.share_bytes = 0
        self.num_cut_parameters = 0
        self.has_cut_tensors = False
        self.precise = precise
        self._recorder = recorder
        self._is_precise = is_precise
        self._scheme_giver = None if scheme is None else "the proof"
        self._kinds: set[tuple[torch.dtype, torch.device]] = set()

    @property
    def is_reference(self) -> bool:
        """True in plain torch: after the first step there is nothing more to record."""
        return self.axis is None

    @property
    def is_precise(self) -> bool:
        """True in the fp64 run of plain torch."""
        return self._is_precise

    def cast(self, value: Castable) -> Castable:
        """Floating point to fp64 in the fp64 run, as it is in all others."""
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
        """A phase between creation and update, whose allocations count on a rank."""
        if self.is_reference:
            yield
            return
        with self.audit.running():
            yield

    def adopt(self, model: nn.Module) -> nn.Module:
        """Learn what bounds the memory of this case, and under which contract it runs.

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
                module.register_forward_hook(self._see_activation)
        for name, module in model.named_modules():
            self.has_cut_tensors |= isinstance(module, CutModule)
            if isinstance(module, ShardedModule):
                self._learn_contract(name or record_of(module).name, module)
        return model

    def _learn_contract(self, name: str, layer: ShardedModule) -> None:
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
        step: Step | None = None,
        may_be_infinite: bool = False,
    ) -> None:
        """Hash a tensor and compare it with plain torch's of the same name.

        Args:
            name: unique within the run; the order of calls is the execution order.
            tensor: layout.local_shape; or a cut tensor, which is recorded whole.
            layout: how it lies on this rank; replicated if not given.
            judged: whether it must agree with plain torch; if not, only its hash is taken.
            step: of an updated weight, what is known of its update.
            may_be_infinite: infinities in it are no fault, as in a mask that is added to scores.
        Comm:
            gathers to rank 0 in direction "prover" if the tensor is sharded; all_gathers it, if it
            is a cut tensor.
        """
        if self.is_reference and not judged:
            return
        with self.audit.paused(), torch.no_grad():
            tensor = as_it_lies(tensor, layout)
            layout = replicated(tuple(tensor.shape)) if layout is None else self._here(layout, name)
            how = Recording(judged, step, may_be_infinite)
            if observing.is_on():
                place = observing.placement_of(layout)
                output = Operand(name, tensor.detach(), place)
                observing.tell(Told("record", "prover", name, "", (), output))
            self._recorder.record(name, tensor.detach(), layout, how)

    def _here(self, layout: Layout, name: str) -> Layout:
        """A layout on the ranks of this run: what was cut for one rank is whole on each of many.

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
        """Keep a tensor that is not recorded, but that others are judged by; in plain torch."""
        if self.is_reference:
            self._recorder.set_aside(name, tensor.detach())

    def check(self, name: str, passed: bool, detail: str = "") -> None:
        """Claim something; it must hold on every rank at every degree that claims it."""
        if not self.is_reference:
            self.checks.append(Check(name, passed, detail))

    def follow(self, loss: Tensor, *, run: str = "") -> None:
        """Keep the loss of one step for the report's curve.

        Args:
            loss: (), Replicate.
            run: which training of the case it is of.
        """
        self.curves.setdefault(run, []).append(loss.item())

    def _see_activation(self, module: nn.Module, inputs: object, output: object) -> None:
        outputs = output if isinstance(output, tuple | list) else (output,)
        for tensor in outputs:
            if isinstance(tensor, Tensor) and not self.audit.is_data(tensor):
                size = tensor.numel() * tensor.element_size()
                self.activation_bytes = max(self.activation_bytes, size)


@dataclass(frozen=True)
class Case:
    """Something to prove.

    Attributes:
        name: on the command line and in reports.
        source: the seed document it comes from, or "".
        description: one line: what it shows.
        work: the run itself.
        extra: the optional extra it needs, or "".
        module: the module that the extra brings; tells whether it is installed.
        elementwise: tensors that must also meet the seed's elementwise `allclose(atol=1e-6)`.
        accuracy: how many times further from the fp64 run than plain torch's its output, loss and
            gradients may be; 0 claims nothing.
        has_curve: its loss is followed over several steps.
        printed: what the seed document prints of it.
    """

    name: str
    description: str
    work: Callable[[Trial], None]
    source: str = ""
    extra: str = ""
    module: str = ""
    elementwise: tuple[str, ...] = ()
    accuracy: float = 0.0
    has_curve: bool = False
    printed: tuple[Printed, ...] = ()

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
    """The part of a cut tensor that lies so on this rank; where it lies otherwise, the whole."""
    lies = (None, None) if layout is None else (layout.dim, layout.local_shape)
    if isinstance(x, CutTensor) and lies == (x.spec.dim, tuple(x.local.shape)):
        return x.local
    return as_whole(x)


def as_whole(x: Any) -> Tensor:
    """A cut tensor as a plain one, any other as it is; without a gradient.

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
