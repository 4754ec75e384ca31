"""Known mistakes that are told by running the plain module again with other features."""

import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from shardproof.checker import mistake_kinds as kinds
from shardproof.checker.evidence import KnownMistake, relative
from shardproof.checker.judging import Judge
from shardproof.checker.locating import Fault
from shardproof.checker.placement import apart
from shardproof.checker.program import Program
from shardproof.checker.step_recording import TensorPlace, record

Change = Callable[[Tensor], Tensor]
_MOST_REPLAYS = 48  # forwards of the plain module for one kind


def heads_of_other_ranks(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """Each rank computes as if its heads were those of another rank."""
    for rank in range(1, judge.degree):
        shift = -rank

        def moved(x: Tensor, shift: int = shift) -> Tensor:
            blocks = x.tensor_split(judge.degree, -1)
            return torch.cat([blocks[(b - shift) % judge.degree] for b in range(judge.degree)], -1)

        found = _replayed(fault, judge, program, moved)
        if found is None:
            continue
        local, other = fault.judgement.locals[rank], found.tensor_split(judge.degree, -1)[0]
        if local.shape == other.shape and apart(local, other) <= judge.bound(found):
            return KnownMistake(
                kinds.POSITIONS,
                f"rank {rank} computes the {fault.judgement.name} as rank 0 would from the same "
                "queries, keys and values",
                relative(apart(local, other), found),
            )
    return None


def other_heads(fault: Fault, judge: Judge, program: Program) -> KnownMistake | None:
    """Each rank groups its features, or its queries, in another way."""
    judgement = fault.of_module
    size = judgement.locals[0].shape[-1] if judgement.locals[0].ndim else 0
    for words, order, only_first in itertools.islice(_orders(size), _MOST_REPLAYS):
        if _fits_order(fault, judge, program, order, only_first=only_first):
            return KnownMistake(kinds.HEADS, words)
    return None


def _orders(size: int) -> Iterator[tuple[str, Tensor, bool]]:
    """Orders of a rank's features that other heads give.

    Yields:
        Words, the order, and whether it is that of the queries alone.
    """
    for heads in (each for each in range(2, size) if size % each == 0):
        order = torch.arange(size).view(heads, -1)
        words = f"the features of a rank are taken for {heads} heads, transposed"
        yield words, order.T.flatten(), False
        for groups in (each for each in range(2, heads) if heads % each == 0):
            # Query i goes to key-value head i % groups in place of i // (heads / groups).
            moved = order.view(-1, groups, order.shape[1]).transpose(0, 1).flatten()
            words = f"queries meet key-value heads in turn, as {heads} heads in {groups} groups"
            yield words, moved, True


def _fits_order(
    fault: Fault, judge: Judge, program: Program, order: Tensor, *, only_first: bool
) -> bool:
    """Whether the ranks have what comes of features in this order in each rank's block."""

    def moved(x: Tensor) -> Tensor:
        blocks = x.tensor_split(judge.degree, -1)
        return torch.cat(
            [each[..., order] if each.shape[-1] == len(order) else each for each in blocks], -1
        )

    found = _replayed(fault, judge, program, moved, only_first=only_first)
    if found is None:
        return False
    for local, block in zip(
        fault.judgement.locals, found.tensor_split(judge.degree, -1), strict=True
    ):
        put_back = block[..., torch.argsort(order)] if only_first else block
        if local.shape != block.shape or apart(local, put_back) > judge.bound(found):
            return False
    return True


def _replayed(
    fault: Fault,
    judge: Judge,
    program: Program,
    change: Change,
    *,
    only_first: bool = False,
) -> Tensor | None:
    """The faulty tensor of the plain module, if the outputs of the linear layers before change."""
    if fault.place is None or fault.place.side != "input":
        return None
    prefix = f"{fault.module}." if fault.module else ""
    before = []
    for at in judge.places(fault.step):
        if at == fault.place:
            break
        is_inside = at.path.startswith(prefix) and at.path != fault.module
        num_dims = judge.runs.reference.values[at].ndim
        if at.side == "output" and is_inside and num_dims == fault.judgement.whole.ndim:
            before.append(at.path)
    if not before:
        return None
    chosen = before[:1] if only_first else before
    return _value(program, judge, fault.place, dict.fromkeys(chosen, change))


def _value(
    program: Program, judge: Judge, at: TensorPlace, changes: Mapping[str, Change]
) -> Tensor | None:
    """A tensor of the plain module's forward in which the first outputs of some modules change.

    Args:
        program: has the plain module.
        judge: of the runs that are compared.
        at: which tensor.
        changes: by the path of the module.

    Returns:
        None where the plain module cannot go on from such outputs.
    """

    def hook_all(module: nn.Module) -> None:
        for path, change in changes.items():
            module.get_submodule(path).register_forward_hook(_hook(change))

    dtype = torch.float64 if judge.double is not None else torch.float32
    try:
        recording = record(program, None, dtype, before=hook_all, is_forward=True)
    except (RuntimeError, ValueError, IndexError):  # of the plain module's own operations
        return None
    return recording.values.get(at)


def _hook(change: Change) -> Callable[..., Tensor]:
    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return change(output)

    return hook
