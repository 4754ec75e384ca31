"""`Axis`: the ranks that share tensors, seen from one of them."""

import functools
import itertools
import math
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from shardproof import checking, torchrun
from shardproof.checked_values import checked_flag, checked_name, checked_whole
from shardproof.errors import AxisError, MismatchError, UsageError
from shardproof.timeout import START_TIMEOUT, checked_timeout
from shardproof.transport.base import Call, Transport
from shardproof.transport.choose import AUTO, BY_NAME, GLOO, checked_transport, choose, meet
from shardproof.transport.disabled import refuse_inherited
from shardproof.transport.distributed import DistributedTransport
from shardproof.transport.solo import SoloTransport
from shardproof.transport.subgroups import subgroup
from shardproof.transport.threads import ThreadsTransport
from shardproof.wording import short_repr, short_text

# Number of unnamed layers per process group, so that two axes of one group give other names.
_unnamed_of_group: weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()


@dataclass(frozen=True)
class Axis:
    """A name, a rank, a size and a transport. Pass it to layers and functions that communicate.

    Attributes:
        name: name of the axis for messages ("tp").
        transport: sends bytes between the ranks.
        transport_note: why shared memory (or, with threads, the C core) is not used, or not
            between all ranks; empty if it is.
        group: the process group that the ranks are, weakly; None if they are none.
    """

    name: str
    transport: Transport
    transport_note: str = field(default="", compare=False)
    _unnamed: Iterator[int] = field(
        default_factory=itertools.count, repr=False, compare=False, kw_only=True
    )
    group: "weakref.ref[dist.ProcessGroup] | None" = field(
        default=None, repr=False, compare=False, kw_only=True
    )

    def __post_init__(self) -> None:
        checked_name(self.name, "name")
        if not isinstance(self.transport, Transport):
            raise UsageError(
                f"Axis(transport={short_repr(self.transport)}) is not a transport. Use "
                "Axis.solo(), Axis.from_group(group) or Axis.from_env()."
            )

    @classmethod
    def solo(cls, name: str = "tp") -> "Axis":
        """An axis of one rank, in any process, at any time.

        Args:
            name: name for messages.
        """
        return cls(name, SoloTransport())

    @classmethod
    def from_group(
        cls,
        group: dist.ProcessGroup,
        *,
        name: str = "tp",
        check: bool = False,
        compare_inputs: bool = True,
        transport: str = AUTO,
        timeout: float | None = None,
    ) -> "Axis":
        """The ranks of a process group of torch.distributed; all of them call this.

        Args:
            group: this process must be in it.
            name: for messages.
            check: compare the calls of the ranks before every collective of tensors on GPUs, at
                the cost of one more small collective; if calls differ, all ranks raise. Over
                shared memory and gloo calls are always compared, at no cost.
            compare_inputs: compare in every exchange a few elements of the inputs of layers since
                the last exchange; ranks with different batches then raise. This takes a few
                microseconds per layer. Tensors on GPUs are not compared.
            transport: "auto" uses shared memory ("shm") if all ranks of a gloo group are on one
                machine and can share memory. If each of several machines has as many ranks, it
                uses shared memory inside each and gloo between them ("hosts"). Otherwise it uses
                the group itself; `transport_note` then says why. "shm", "gloo" and "nccl" use
                that transport or raise.
            timeout: seconds that a rank waits for the others in one collective; by default that of
                torch.distributed. Pass it to `init_process_group` too: a process whose collective
                timed out cannot end before the group's own timeout.

        Raises:
            UsageError: an option is invalid, or the transport that was requested by name cannot be
                used.
            MismatchError: the ranks request different transports.
            AxisError: torch.distributed is not initialised, this process is not in the group or is
                a fork of a member, or the number of processes is not WORLD_SIZE.
        """
        timeout = checked_timeout(timeout)
        transport = checked_transport(transport)
        check = checked_flag(check, "check")
        _require_initialised("Axis.from_group(group)")
        torchrun.check_world_size(os.environ, dist.get_world_size())
        if not isinstance(group, dist.ProcessGroup):
            raise AxisError(
                f"Axis.from_group got {_describe(group)}, which is not a process group that this "
                "process is in. Pass one that it is in, such as torch.distributed.group.WORLD."
            )
        refuse_inherited(group)
        with _lock:
            unnamed = _unnamed_of_group.setdefault(group, itertools.count())
        if group.size() == 1:
            return cls(name, SoloTransport(), _unnamed=unnamed)
        base = DistributedTransport(group, check=check, timeout=timeout)
        choice = choose(base, transport, timeout=timeout, compare_inputs=compare_inputs)
        group_ref = weakref.ref(group)
        return cls(name, choice.transport, choice.note, _unnamed=unnamed, group=group_ref)

    @classmethod
    def from_mesh(
        cls,
        mesh: DeviceMesh,
        *,
        check: bool = False,
        compare_inputs: bool = True,
        transport: str = AUTO,
        timeout: float | None = None,
    ) -> "Axis":
        """The ranks of a DeviceMesh of one dim, which gives the axis its name ("tp" if unnamed).

        Args:
            mesh: of one dim; of several dims, pick one: `mesh["tp"]`.
            check: as in `from_group`.
            compare_inputs: as in `from_group`.
            transport: as in `from_group`.
            timeout: as in `from_group`.

        Raises:
            UsageError, MismatchError: as `from_group` does.
            AxisError: the mesh has several dims or does not contain this process, or the number of
                processes is not WORLD_SIZE.
        """
        if not isinstance(mesh, DeviceMesh):
            raise AxisError(
                f"Axis.from_mesh got {_describe(mesh)}, which is not a DeviceMesh. Make one with "
                'torch.distributed.device_mesh.init_device_mesh("cpu", (degree,)).'
            )
        names = mesh.mesh_dim_names
        if mesh.ndim != 1:
            dims = f"dims {names}" if names else "unnamed dims"
            raise AxisError(
                f"Axis.from_mesh got a DeviceMesh of shape {tuple(mesh.shape)} with {dims}, and "
                'an axis is one dim. Name the dims and pick one, as in mesh["tp"].'
            )
        if mesh.get_coordinate() is None:
            raise AxisError(
                f"global rank {dist.get_rank()} is not in the DeviceMesh of {mesh.size()} ranks "
                "that Axis.from_mesh got. Call it only on ranks of the mesh."
            )
        return cls.from_group(
            mesh.get_group(),
            name=names[0] if names else "tp",
            check=check,
            compare_inputs=compare_inputs,
            transport=transport,
            timeout=timeout,
        )

    @classmethod
    def from_env(
        cls,
        *,
        name: str = "tp",
        check: bool = False,
        compare_inputs: bool = True,
        transport: str = AUTO,
        timeout: float | None = None,
    ) -> "Axis":
        """An axis of all processes that torchrun started.

        Initialises torch.distributed unless that was done: with gloo for tensors on CPUs, and nccl
        for tensors on GPUs if every rank of the machine has its own GPU. End it with
        `torch.distributed.destroy_process_group()`.

        Args:
            name: for messages.
            check: as in `from_group`.
            compare_inputs: as in `from_group`.
            transport: as in `from_group`.
            timeout: seconds that a rank waits for the others in one collective, on any transport;
                by default that of torch.distributed. It does not apply to the start, in which
                ranks still import torch.

        Raises:
            UsageError, MismatchError: as `from_group` does.
            AxisError: variables of torchrun are missing or invalid, or torch.distributed is
                initialised with another number of processes than WORLD_SIZE.
        """
        timeout = checked_timeout(timeout)
        transport = checked_transport(transport)
        if not dist.is_initialized():
            _initialise(os.environ, timeout)
        world = dist.group.WORLD
        if world is None:
            raise AxisError("torch.distributed is initialised and has no default process group.")
        return cls.from_group(
            world,
            name=name,
            check=check,
            compare_inputs=compare_inputs,
            transport=transport,
            timeout=timeout,
        )

    def split(self, **sizes: int) -> "dict[str, Axis]":
        """Arrange the ranks in a grid, and give each dim of it an axis; all ranks call this.

        The last dim varies fastest, as in a DeviceMesh: `split(dp=2, tp=3)` puts ranks 0, 1 and 2
        on one axis "tp", and ranks 0 and 3 on one axis "dp".

        Args:
            sizes: name of a dim -> its number of ranks; their product is the size of this axis.

        Returns:
            Name of a dim -> the axis of this rank along it.

        Raises:
            UsageError: a size is not a whole number from 1 up.
            AxisError: the product of the sizes is not the number of ranks, or the ranks have a
                transport of the user's own.
            MismatchError: the ranks give different sizes.

        Comm:
            setup none in the ledger: small objects of all ranks go to all, uncounted.

        Example:
            axes = axis.split(dp=2, tp=2)
            model = shardproof.parallelize(model, plan, axes["tp"])
        """
        sizes = {name: checked_whole(size, name) for name, size in sizes.items()}
        written = ", ".join(f"{name}={size}" for name, size in sizes.items())
        if math.prod(sizes.values()) != self.size or not sizes:
            raise AxisError(
                f"split({written}) makes a grid of {math.prod(sizes.values())} ranks, and axis "
                f"{self.name!r} has {self.size}. Give sizes whose product is {self.size}."
            )
        self.agree({"sizes": written}, what="sizes of a grid")
        return {name: self._along(name, ranks) for name, ranks in _lines(self.rank, sizes).items()}

    def _along(self, name: str, ranks: list[int]) -> "Axis":
        """The axis of some ranks, among them this one."""
        if len(ranks) == 1:
            return Axis.solo(name)
        if isinstance(self.transport, ThreadsTransport):
            return Axis(name, self.transport.part(ranks), self.transport_note)
        group = None if self.group is None else self.group()
        if group is None:
            raise AxisError(
                f"the ranks of axis {self.name!r} are neither threads of one process nor a process "
                "group, and cannot be split. Use Axis.from_group(group) for each dim."
            )
        part_group = subgroup(group, ranks, timeout=self.transport.timeout)
        # Ranks of several hosts fell back to gloo, and those of one host may share memory.
        is_by_name = self.transport.name == GLOO and self.transport_note == BY_NAME
        return Axis.from_group(
            part_group,
            name=name,
            compare_inputs=self.transport.notes is not None,
            transport=GLOO if is_by_name else AUTO,
            timeout=self.transport.timeout,
        )

    @property
    def size(self) -> int:
        """Number of ranks: the degree."""
        return self.transport.size

    @property
    def rank(self) -> int:
        """This rank's place on the axis, not its global rank."""
        return self.transport.rank

    def note(self, x: Tensor, *, who: str, what: str = "input", whole: bool = False) -> None:
        """Note a Replicate tensor that a layer received; the next exchange compares the notes.

        Args:
            x: (*), Replicate.
            who: name of the layer.
            what: its role in the layer, for messages.
            whole: compare all elements, not a few.

        Raises:
            MismatchError: inside `shardproof.checked()`, if the ranks' tensors differ.

        Comm:
            none; inside `checked()` a hash of the tensor, in direction setup, uncounted.
        """
        if self.transport.size == 1:
            return
        if checking.is_checked():
            self._compare(x, who, what)
        elif self.transport.notes is not None:
            self.transport.notes.add(x, who, what, whole=whole)

    def note_result(self, x: Tensor, *, who: str, what: str = "output") -> None:
        """Note a Replicate output of a layer, which is compared only inside `shardproof.checked()`.

        Args:
            x: (*), Replicate.
            who: name of the layer.
            what: its role in the layer, for messages.

        Raises:
            MismatchError: the ranks' tensors differ.

        Comm:
            none; inside `checked()` a hash of the tensor, in direction setup, uncounted.
        """
        if self.transport.size > 1 and checking.is_checked():
            self._compare(x, who, what)

    def gather_small(self, value: Any, *, what: str) -> list[Any]:
        """Gather a small picklable value of every rank, in rank order.

        Args:
            value: the value of this rank.
            what: a description of it; the same on all ranks.

        Comm:
            setup none in the ledger: small objects of all ranks go to all, uncounted.
        """
        return self.transport.gather_objects(value, call=Call("agree", "setup", what))

    def agree(
        self, value: Mapping[str, Any], *, what: str, way_out: str = "Give every rank the same."
    ) -> None:
        """Raise on all ranks unless all have the same `value`.

        Args:
            value: name -> a small, picklable, comparable value that must be the same.
            what: one word for all values, for the message.
            way_out: the end of the message.

        Raises:
            MismatchError: it names the first rank that differs from rank 0, the first entry that
                differs, and both values.

        Comm:
            setup none in the ledger: small objects of all ranks go to all, uncounted.
        """
        values = self.gather_small(dict(value), what=what)
        for rank, other in enumerate(values):
            if other == values[0]:
                continue
            names = [*values[0], *(name for name in other if name not in values[0])]
            differing = [name for name in names if values[0].get(name) != other.get(name)]
            first, more = differing[0], len(differing) - 1
            raise MismatchError(
                f"the ranks of axis {self.name!r} were given different {what}: for {first}, rank 0 "
                f"has {short_text(str(values[0].get(first, 'nothing')))}, rank {rank} has "
                f"{short_text(str(other.get(first, 'nothing')))}"
                + (f"; {more} more {'differs' if more == 1 else 'differ'}" if more else "")
                + f". {way_out}"
            )

    def _compare(self, x: Tensor, who: str, what: str) -> None:
        checking.compare(
            x,
            f"the {what} of {who!r}",
            functools.partial(self.gather_small, what=f"the {what} of {who}"),
            way_out="Give all ranks of an axis the same batch, and draw, scale and update alike on "
            "them.",
        )

    def next_name(self, kind: str) -> str:
        """A name for a layer that has none, by its position among the unnamed layers.

        Layers are counted per process group, over all axes made from it (by `from_group`,
        `from_mesh`, `from_env`), or else per axis object: each `Axis.solo()` and each `launch`
        starts at 0. Ranks build their layers in the same order, so the name does not depend on the
        degree.
        """
        return f"{kind}-{next(self._unnamed)}"

    def __deepcopy__(self, memo: dict[int, object]) -> "Axis":
        """Return the axis itself: a copied model communicates with the same ranks."""
        return self

    def __reduce__(self) -> tuple[object, ...]:
        raise AxisError(
            f"{self} cannot be pickled: it is this process's end of what connects the ranks. Save "
            "model.state_dict(), which carries the layout, and make the axis where it is used."
        )

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} on axis {self.name!r}"


def _lines(rank: int, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Name of a dim -> the ranks on the line of a grid through `rank` along that dim."""
    lines = {}
    step = math.prod(sizes.values())
    for name, size in sizes.items():
        step //= size
        first = rank - (rank // step % size) * step
        lines[name] = [first + place * step for place in range(size)]
    return lines


def _initialise(environment: Mapping[str, str], timeout: float | None) -> None:
    """Initialise torch.distributed from torchrun's variables."""
    here = torchrun.check_all(environment)
    if torch.cuda.is_available() and here.num_ranks <= torch.cuda.device_count():
        torch.cuda.set_device(here.rank)
        _meet("cpu:gloo,cuda:nccl", timeout)
    else:
        _meet("gloo", timeout)


def _meet(backend: str, timeout: float | None) -> None:
    """Initialise the backend, and wait long for ranks that are still importing torch.

    The user's timeout is set on the group afterwards: a process whose collective timed out cannot
    end before the backend's own timeout of that collective.
    """
    if timeout is None:
        meet(backend)
        return
    meet(backend, timeout=timedelta(seconds=max(timeout, START_TIMEOUT)))
    distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))


def _require_initialised(what: str) -> None:
    if not dist.is_initialized():
        raise AxisError(
            f"{what} needs torch.distributed, which is not initialised. Call "
            "torch.distributed.init_process_group first, or use Axis.from_env() under torchrun."
        )


def checked_axis(axis: object) -> Axis:
    """Return the argument `axis` of a user.

    Raises:
        UsageError: it is not an `Axis`.
    """
    if not isinstance(axis, Axis):
        raise UsageError(
            f"axis={short_repr(axis)} is not an Axis. Use the one that launch gives, Axis.solo(), "
            "Axis.from_env() or Axis.from_mesh(mesh)."
        )
    return axis


def _describe(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {short_repr(value)}"
