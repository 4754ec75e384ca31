"""`ShardedOptimizer`: the state of an optimizer is shared out over data-parallel ranks.

Each parameter has one owner among the ranks of the axis. The owner alone updates it and keeps its
state. After an update the owners send the weights. An update of one parameter is computed as
without, so that no bit changes, also where an optimizer works on whole matrices.

Source: Rajbhandari et al. 2020 (arXiv 1910.02054), ZeRO stage 1, by whole parameters.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.checked_objects import checked_optimizer
from shardproof.comm.runs_of_indices import all_gather_sizes
from shardproof.data_parallel import BUCKET_BYTES, DataParallel
from shardproof.errors import UsageError
from shardproof.index_runs import runs_up_to
from shardproof.wording import short_repr

_WHO = "ShardedOptimizer"


@dataclass(frozen=True)
class _TensorForm:
    """What a rank needs to receive a tensor of an optimizer's state."""

    shape: torch.Size
    dtype: torch.dtype
    is_cpu: bool


Entries = dict[str, _TensorForm | Any]


class ShardedOptimizer:
    """Lets each rank of a data-parallel axis update some parameters and send them to the others.

    Args:
        optimizer: of all parameters of the model, without state yet, the same on every rank.
        data_parallel: of the model.

    Attributes:
        optimizer: as given; give it to schedulers. It has state for the parameters of this rank.

    Raises:
        UsageError: an argument is of another kind, the optimizer has state, or it has a parameter
            that the model does not have.

    Example:
        sharded = shardproof.ShardedOptimizer(torch.optim.AdamW(model.parameters()), data_parallel)
        data_parallel.backward(loss_of, len(batch))
        sharded.step()
        with sharded.whole_state():
            if axes["dp"].rank == 0:
                shardproof.save(directory, model, sharded.optimizer)
    """

    def __init__(self, optimizer: Optimizer, data_parallel: DataParallel) -> None:
        self.optimizer = checked_optimizer(optimizer)
        if not isinstance(data_parallel, DataParallel):
            raise UsageError(
                f"data_parallel={short_repr(data_parallel)} is not a DataParallel. Make one of "
                "the model first."
            )
        if optimizer.state:
            raise UsageError(
                "the optimizer has state already, of parameters that another rank may own. Make it "
                "anew, and load its state with whole_state()."
            )
        self._axis = data_parallel.axis
        names = {id(each): name for name, each in data_parallel.model.named_parameters()}
        self._parameters: list[nn.Parameter] = [
            each for group in optimizer.param_groups for each in group["params"]
        ]
        if any(id(each) not in names for each in self._parameters):
            raise UsageError(
                "the optimizer has a parameter that the model of data_parallel does not have. "
                "Give it parameters of that model."
            )
        self._owners = _owners([each.numel() for each in self._parameters], self._axis.size)
        self._axis.agree(
            {"parameters": [names[id(each)] for each in self._parameters]},
            what="optimizers",
        )

    def step(self) -> None:
        """Update the parameters of this rank, and get the others from their owners.

        Comm:
            update as the optimizer, and all_gathers of all parameters over the data-parallel axis.
        """
        gradients = [each.grad for each in self._parameters]
        for parameter, owner in zip(self._parameters, self._owners, strict=True):
            if owner != self._axis.rank:
                parameter.grad = None  # an optimizer passes over it, and makes no state
        try:
            self.optimizer.step()
        finally:
            for parameter, grad in zip(self._parameters, gradients, strict=True):
                parameter.grad = grad
        self._send_weights()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters.

        Args:
            set_to_none: as in torch.
        """
        self.optimizer.zero_grad(set_to_none)

    @contextmanager
    def whole_state(self) -> Iterator[Optimizer]:
        """A block in which the optimizer has the state of all parameters, to save or load it.

        All ranks of the data-parallel axis enter it, and load in it alike.

        Comm:
            setup all_gathers of the whole state; small objects of all ranks, uncounted.
        """
        self._gather_state()
        try:
            yield self.optimizer
        finally:
            for parameter, owner in zip(self._parameters, self._owners, strict=True):
                if owner != self._axis.rank:
                    self.optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def _send_weights(self) -> None:
        if self._axis.size == 1:
            return
        for places in _rounds(self._parameters):
            owned: list[list[int]] = [[] for _ in range(self._axis.size)]
            for place in places:
                owned[self._owners[place]].append(place)
            like = self._parameters[places[0]]
            mine = [self._parameters[place].reshape(-1) for place in owned[self._axis.rank]]
            flat = self._joined(torch.cat(mine) if mine else like.new_empty(0), owned)
            order = [place for each in owned for place in each]
            sizes = [self._parameters[place].numel() for place in order]
            for place, part in zip(order, flat.split(sizes), strict=True):
                if self._owners[place] != self._axis.rank:
                    parameter = self._parameters[place]
                    parameter.copy_(part.view(parameter.shape))

    def _joined(self, mine: Tensor, owned: Sequence[Sequence[int]]) -> Tensor:
        sizes = tuple(sum(self._parameters[place].numel() for place in each) for each in owned)
        return all_gather_sizes(mine, self._axis, dim=0, sizes=sizes, direction="update", who=_WHO)

    @torch.no_grad()
    def _gather_state(self) -> None:
        """Fill in the state of the parameters that other ranks own."""
        state = self.optimizer.state
        mine = [
            _described(state.get(parameter, {})) if owner == self._axis.rank else {}
            for parameter, owner in zip(self._parameters, self._owners, strict=True)
        ]
        told: list[list[Entries]] = self._axis.gather_small(mine, what="the state of an optimizer")
        for place, (parameter, owner) in enumerate(
            zip(self._parameters, self._owners, strict=True)
        ):
            for key, entry in told[owner][place].items():
                is_here = owner == self._axis.rank
                if not isinstance(entry, _TensorForm):
                    state[parameter][key] = entry
                    continue
                device = torch.device("cpu") if entry.is_cpu else parameter.device
                own = state[parameter][key].reshape(-1) if is_here else None
                flat = self._of_owner(own, owner, entry.shape.numel(), entry.dtype, device)
                if not is_here:
                    state[parameter][key] = flat.view(entry.shape)

    def _of_owner(
        self,
        own: Tensor | None,
        owner: int,
        numel: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        if self._axis.size == 1 and own is not None:
            return own
        sizes = tuple(numel if rank == owner else 0 for rank in range(self._axis.size))
        part = torch.empty(0, dtype=dtype, device=device) if own is None else own
        return all_gather_sizes(part, self._axis, dim=0, sizes=sizes, direction="setup", who=_WHO)


def _owners(sizes: Sequence[int], ranks: int) -> tuple[int, ...]:
    """The owner of each parameter: the largest first, each to the rank that has least."""
    loads, owners = [0] * ranks, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda each: (-sizes[each], each)):
        owner = min(range(ranks), key=lambda rank: (loads[rank], rank))
        owners[place] = owner
        loads[owner] += sizes[place]
    return tuple(owners)


def _rounds(parameters: Sequence[nn.Parameter]) -> Iterator[list[int]]:
    """Places of parameters that are sent together: of one dtype and device, and not too many."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, each in enumerate(parameters):
        kinds.setdefault((each.dtype, each.device), []).append(place)
    for places in kinds.values():
        sizes = [parameters[place].numel() * parameters[place].element_size() for place in places]
        for run in runs_up_to(sizes, BUCKET_BYTES):
            yield places[run.start : run.stop]


def _described(state: dict[str, Any]) -> Entries:
    """The form of a tensor; anything else itself."""
    return {
        key: _TensorForm(value.shape, value.dtype, value.is_cpu)
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }
