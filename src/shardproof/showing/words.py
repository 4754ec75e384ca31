"""What a scene says in sentences, for the reader who sees no picture and for the one who does."""

from collections.abc import Sequence

from shardproof.showing.figure import Figure
from shardproof.trace.step import Step

_DONE = {
    "product": "Each rank multiplies what it holds.",
    "addition": "The parts are added in the order of the formula, the same at every degree.",
    "bias": "The bias is added once, after the sum: before it, every rank would add its own.",
    "update": "Each rank updates the part that it holds, with the gradient of that part.",
    "attention": "Each rank computes the attention of the heads that it holds.",
}
_MET = {
    "all_reduce": "The ranks add up their summands, and each gets the whole sum.",
    "all_gather": "The ranks put their parts side by side, and each gets the whole.",
    "reduce_scatter": "The ranks add up their summands, and each gets its part of the sum.",
    "gather": "One rank gets the parts of all.",
}
_DIMS = {1: "columns", 2: "rows"}  # counted from the last


def sentences(row: Sequence[Step | None], figures: Sequence[Figure]) -> tuple[str, ...]:
    """What happens, what is sent, and how the result lies."""
    steps = [step for step in row if step is not None]
    first = steps[0]
    said = []
    known = (_MET if first.is_collective else _DONE).get(first.operation)
    if known:
        said.append(known)
    idle = [rank for rank, step in enumerate(row) if step is None]
    if idle:
        said.append(f"Nothing to do for {ranks(idle)}.")
    said.append(_sent(steps))
    said += [lying(figure) for figure in figures if figure.is_result]
    if first.is_rest:
        said.append("It is a further part of the collective before.")
    return tuple(said)


def _sent(steps: Sequence[Step]) -> str:
    if not steps[0].is_collective:
        return "Nothing is sent."
    if len(steps) == 1:
        return "Nothing is sent: there is one rank."
    amounts = {step.sent_bytes for step in steps}
    if len(amounts) == 1:
        return f"Each rank sends {amounts.pop():,} bytes."
    each = ", ".join(f"rank {step.rank} sends {step.sent_bytes:,}" for step in steps)
    return f"Bytes sent: {each}."


def lying(figure: Figure) -> str:
    """How a tensor lies on the ranks, in a sentence."""
    name = figure.name
    if figure.is_broken:
        return f"{name} must be the same on every rank, and IS NOT."
    if figure.placement == "Replicate":
        return f"{name} is whole on every rank (Replicate)."
    if figure.placement == "Partial":
        return f"Each rank has a summand of {name} (Partial)."
    if figure.dim is not None:
        return f"Each rank has {_own(figure)} of {name} ({figure.placement})."
    if figure.is_alike:
        return f"{name} is the same on every rank."
    return f"How {name} lies on the ranks is not known to the trace."


def placed(figure: Figure) -> str:
    """The same in a word or two, for a caption."""
    if figure.placement:
        return figure.placement
    return "the same on every rank" if figure.is_alike else "placement not known"


def _own(figure: Figure) -> str:
    dim, num_dims = figure.dim or 0, len(figure.shape)
    if num_dims == 1:
        return "its own elements"
    return f"its own {_DIMS.get(num_dims - dim) or f'part of dim {dim}'}"


def changed(figures: Sequence[Figure]) -> str:
    """Which placement a collective makes of which: "Partial -> Replicate"."""
    before = [figure.placement or "unknown" for figure in figures if not figure.is_result]
    after = [figure.placement or "unknown" for figure in figures if figure.is_result]
    return f"{before[0]} -> {after[0]}" if before and after else ""


def ranks(numbers: Sequence[int]) -> str:
    """Some ranks as words.

    >>> ranks([1]), ranks([0, 2]), ranks([1, 2, 3])
    ('rank 1', 'ranks 0 and 2', 'ranks 1-3')
    """
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    is_run = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    if is_run and len(numbers) > 2:
        return f"ranks {numbers[0]}-{numbers[-1]}"
    words = [str(number) for number in numbers]
    return f"ranks {', '.join(words[:-1])} and {words[-1]}"
