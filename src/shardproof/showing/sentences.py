"""The sentences of a scene. They say all that its drawing shows."""

from collections.abc import Iterator, Sequence

from shardproof.showing.actions import RankAction
from shardproof.showing.tensors import SceneTensor
from shardproof.wording import run_words

DIMS = {1: "columns", 2: "rows"}  # counted from the last

_BY_OPERATION = {
    "addition": "The parts are added in the order of the formula, the same at every degree.",
    "bias": "The bias is added once, after the sum. Added before it, it would be counted once per "
    "rank.",
    "update": "Each rank updates the part that it holds, with the gradient of that part.",
    "attention": "Each rank computes the attention of the heads that it holds.",
}
_BY_COLLECTIVE = {
    "all_reduce": "The ranks add up their summands, and each gets the whole sum.",
    "all_gather": "The ranks put their parts side by side, and each gets the whole.",
    "reduce_scatter": "The ranks add up their summands, and each gets its part of the sum.",
    "gather": "One rank gets the parts of all.",
}
CUT_AGAIN = (
    "Each rank takes its own columns of {name}; nothing is sent (backward of the all_gather)."
)


def sentences(
    row: Sequence[RankAction | None], tensors: Sequence[SceneTensor], *, first: str = ""
) -> tuple[str, ...]:
    """The sentences of a scene: what happens, what is sent, and where the result is.

    Args:
        row: what every rank does.
        tensors: what is read and made.
        first: a sentence before all others.
    """
    actions = [action for action in row if action is not None]
    parts = [first, _what_happens(actions, tensors), _leaves(actions)]
    parts += _idle(row)
    parts += _empty(tensors)
    parts.append(_sent(actions))
    parts += [placement_sentence(tensor) for tensor in tensors if tensor.is_result]
    return tuple(filter(None, parts))


def _what_happens(actions: Sequence[RankAction], tensors: Sequence[SceneTensor]) -> str:
    step = actions[0].first
    operands = [tensor for tensor in tensors if not tensor.is_result]
    if step.is_collective:
        return _BY_COLLECTIVE.get(step.operation, "")
    if step.operation == "product":
        return _multiplied(operands)
    if step.operation == "sum of rows" and operands:
        return f"Each rank adds up the rows of {_of(operands[0])}."
    if step.operation == "div" and step.phase == "backward" and len(step.inputs) == 1:
        return _divided(actions[0])
    return _BY_OPERATION.get(step.operation, "")


def _multiplied(operands: Sequence[SceneTensor]) -> str:
    """Which parts are multiplied."""
    factors = [tensor for tensor in operands if tensor.name != "bias"]
    if len(factors) < 2:
        return ""
    sentence = f"Each rank multiplies {_of(factors[0])} by {_of(factors[1])}"
    if len(factors) > 2:
        sentence += f", and adds up {len(factors) // 2} such products"
    bias = next((tensor for tensor in operands if tensor.name == "bias"), None)
    return sentence + (f", and adds {_of(bias)}." if bias else ".")


def _divided(action: RankAction) -> str:
    """The gradient of a mean or of a division."""
    before, after = action.inputs[0].values, action.outputs[0].values if action.outputs else None
    sentence = "A mean, or a division by a number, divides its gradient by the same number"
    if isinstance(before, float) and isinstance(after, float) and after:
        return f"{sentence}, here {before / after:g}."
    return f"{sentence}."


def _leaves(actions: Sequence[RankAction]) -> str:
    """The definition of a leaf, if the scene names leaves."""
    parts = [part for action in actions for part in (*action.inputs, *action.outputs)]
    stops = [part.node[1] for part in parts if part.node is not None]
    if not stops:
        return ""
    return (
        f"A leaf is one of the {max(stops)} parts into which the summed dim is cut, the same at "
        "every degree."
    )


def _idle(row: Sequence[RankAction | None]) -> Iterator[str]:
    idle = [rank for rank, action in enumerate(row) if action is None]
    if not idle:
        return
    actions = [action for action in row if action is not None]
    have_nodes = any(part.node for action in actions for part in action.outputs)
    does, holds = ("does", "it holds") if len(idle) == 1 else ("do", "they hold")
    why = f": {holds} no leaf" if have_nodes else ""
    yield f"{ranks(idle)} {does} nothing in this step{why}.".replace("rank", "Rank", 1)


def _empty(tensors: Sequence[SceneTensor]) -> Iterator[str]:
    """Which ranks hold nothing of a cut tensor."""
    tensors_of: dict[tuple[int, ...], list[str]] = {}
    for tensor in tensors:
        if tensor.dim is None:
            continue
        empty = tuple(p.rank for p in tensor.pieces if not p.part.shape[tensor.dim])
        what = f"no {_what(tensor)} of {tensor.name}"
        if empty and what not in tensors_of.setdefault(empty, []):
            tensors_of[empty].append(what)
    for numbers, things in tensors_of.items():
        listed = ", ".join(things[:-1]) + (" and " if things[1:] else "") + things[-1]
        verb = "holds" if len(numbers) == 1 else "hold"
        yield f"{ranks(numbers)} {verb} {listed}.".replace("rank", "Rank", 1)


def _sent(actions: Sequence[RankAction]) -> str:
    steps = [action.first for action in actions]
    if not steps[0].is_collective:
        return "Nothing is sent."
    if len(steps) == 1:
        return "Nothing is sent: there is one rank."
    amounts = {step.sent_bytes for step in steps}
    if len(amounts) == 1:
        sentence = f"Each rank sends {steps[0].sent_bytes:,} bytes."
    else:
        each = ", ".join(f"rank {step.rank} sends {step.sent_bytes:,}" for step in steps)
        sentence = f"Bytes sent: {each}."
    if any(step.sent_bytes for step in steps) and not any(step.sends for step in steps):
        sentence += (
            " The transport decides which part goes to which rank, and in which order it adds."
        )
    return sentence


def placement_sentence(tensor: SceneTensor) -> str:
    """The placement of a tensor, as a sentence."""
    name = tensor.name
    if tensor.is_broken:
        return f"{name} must be the same on every rank, and IS NOT."
    if tensor.placement == "Replicate":
        return f"{name} is whole on every rank (Replicate)."
    if tensor.placement == "Partial":
        return f"Each rank has a summand of {name} (Partial)."
    if tensor.dim is not None:
        return f"Each rank has its own {_what(tensor)} of {name} ({tensor.placement})."
    if tensor.is_alike:
        return f"{name} is the same on every rank."
    return f"The trace does not know the placement of {name}."


def placement_caption(tensor: SceneTensor) -> str:
    """The placement of a tensor in a word or two, for a caption."""
    if tensor.placement:
        return tensor.placement
    return "the same on every rank" if tensor.is_alike else "placement not known"


def _of(tensor: SceneTensor) -> str:
    """What a rank has of a tensor: "its own columns of x"."""
    if tensor.dim is not None:
        return f"its own {_what(tensor)} of {tensor.name}"
    if tensor.placement == "Partial":
        return f"its summand of {tensor.name}"
    return f"the whole {tensor.name}" if tensor.placement else f"what it has of {tensor.name}"


def _what(tensor: SceneTensor) -> str:
    dim, num_dims = tensor.dim or 0, len(tensor.shape)
    if num_dims == 1:
        return "elements"
    return DIMS.get(num_dims - dim) or f"part of dim {dim}"


def placement_change(tensors: Sequence[SceneTensor]) -> str:
    """The placements before and after a collective: "Partial -> Replicate"."""
    before = [tensor.placement or "unknown" for tensor in tensors if not tensor.is_result]
    after = [tensor.placement or "unknown" for tensor in tensors if tensor.is_result]
    return f"{before[0]} -> {after[0]}" if before and after else ""


def ranks(numbers: Sequence[int]) -> str:
    """Some ranks as words.

    >>> ranks([1]), ranks([0, 2]), ranks([1, 2, 3])
    ('rank 1', 'ranks 0 and 2', 'ranks 1-3')
    >>> ranks([0, 2, 3, 4])
    'ranks 0 and 2-4'
    """
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    words = run_words(numbers)
    start = f"{', '.join(words[:-1])} and " if words[1:] else ""
    return f"ranks {start}{words[-1]}"
