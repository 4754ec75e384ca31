"""What a scene says in sentences, for the reader who sees no picture and for the one who does."""

from collections.abc import Iterator, Sequence

from shardproof.showing.figure import Figure
from shardproof.showing.moments import Moment
from shardproof.wording import run_words

DIMS = {1: "columns", 2: "rows"}  # counted from the last

_DONE = {
    "addition": "The parts are added in the order of the formula, the same at every degree.",
    "bias": "The bias is added once, after the sum. Added before it, it would be counted once per "
    "rank.",
    "update": "Each rank updates the part that it holds, with the gradient of that part.",
    "attention": "Each rank computes the attention of the heads that it holds.",
}
_MET = {
    "all_reduce": "The ranks add up their summands, and each gets the whole sum.",
    "all_gather": "The ranks put their parts side by side, and each gets the whole.",
    "reduce_scatter": "The ranks add up their summands, and each gets its part of the sum.",
    "gather": "One rank gets the parts of all.",
}
CUT_AGAIN = (
    "Each rank takes its own columns of {name}; nothing is sent (backward of the all_gather)."
)


def sentences(
    row: Sequence[Moment | None], figures: Sequence[Figure], *, first: str = ""
) -> tuple[str, ...]:
    """What happens, what is sent, and how the result lies.

    Args:
        row: what every rank does.
        figures: what is read and made.
        first: a sentence before all others.
    """
    moments = [moment for moment in row if moment is not None]
    said = [first, _done(moments, figures), _leaves(moments)]
    said += _idle(row)
    said += _empty(figures)
    said.append(_sent(moments))
    said += [lying(figure) for figure in figures if figure.is_result]
    return tuple(filter(None, said))


def _done(moments: Sequence[Moment], figures: Sequence[Figure]) -> str:
    step = moments[0].first
    given = [figure for figure in figures if not figure.is_result]
    if step.is_collective:
        return _MET.get(step.operation, "")
    if step.operation == "product":
        return _multiplied(given)
    if step.operation == "sum of rows" and given:
        return f"Each rank adds up the rows of {_of(given[0])}."
    if step.operation == "div" and step.phase == "backward" and len(step.inputs) == 1:
        return _divided(moments[0])
    return _DONE.get(step.operation, "")


def _multiplied(given: Sequence[Figure]) -> str:
    """Which part is multiplied by which, as they lie."""
    factors = [figure for figure in given if figure.name != "bias"]
    if len(factors) < 2:
        return ""
    said = f"Each rank multiplies {_of(factors[0])} by {_of(factors[1])}"
    if len(factors) > 2:
        said += f", and adds up {len(factors) // 2} such products"
    bias = next((figure for figure in given if figure.name == "bias"), None)
    return said + (f", and adds {_of(bias)}." if bias else ".")


def _divided(moment: Moment) -> str:
    """The gradient of a mean or of a division."""
    given, made = moment.inputs[0].values, moment.outputs[0].values if moment.outputs else None
    said = "A mean, or a division by a number, divides its gradient by the same number"
    if isinstance(given, float) and isinstance(made, float) and made:
        return f"{said}, here {given / made:g}."
    return f"{said}."


def _leaves(moments: Sequence[Moment]) -> str:
    """What a leaf is, where parts of a sum are named by leaves."""
    parts = [part for moment in moments for part in (*moment.inputs, *moment.outputs)]
    stops = [part.node[1] for part in parts if part.node is not None]
    if not stops:
        return ""
    return (
        f"A leaf is one of the {max(stops)} parts into which the summed dim is cut, the same at "
        "every degree."
    )


def _idle(row: Sequence[Moment | None]) -> Iterator[str]:
    idle = [rank for rank, moment in enumerate(row) if moment is None]
    if not idle:
        return
    moments = [moment for moment in row if moment is not None]
    have_nodes = any(part.node for moment in moments for part in moment.outputs)
    does, holds = ("does", "it holds") if len(idle) == 1 else ("do", "they hold")
    why = f": {holds} no leaf" if have_nodes else ""
    yield f"{ranks(idle)} {does} nothing in this step{why}.".replace("rank", "Rank", 1)


def _empty(figures: Sequence[Figure]) -> Iterator[str]:
    """Which ranks hold nothing of a cut tensor."""
    found: dict[tuple[int, ...], list[str]] = {}
    for figure in figures:
        if figure.dim is None:
            continue
        empty = tuple(p.rank for p in figure.pieces if not p.part.shape[figure.dim])
        what = f"no {_what(figure)} of {figure.name}"
        if empty and what not in found.setdefault(empty, []):
            found[empty].append(what)
    for numbers, things in found.items():
        listed = ", ".join(things[:-1]) + (" and " if things[1:] else "") + things[-1]
        verb = "holds" if len(numbers) == 1 else "hold"
        yield f"{ranks(numbers)} {verb} {listed}.".replace("rank", "Rank", 1)


def _sent(moments: Sequence[Moment]) -> str:
    steps = [moment.first for moment in moments]
    if not steps[0].is_collective:
        return "Nothing is sent."
    if len(steps) == 1:
        return "Nothing is sent: there is one rank."
    amounts = {step.sent_bytes for step in steps}
    if len(amounts) == 1:
        said = f"Each rank sends {steps[0].sent_bytes:,} bytes."
    else:
        each = ", ".join(f"rank {step.rank} sends {step.sent_bytes:,}" for step in steps)
        said = f"Bytes sent: {each}."
    if any(step.sent_bytes for step in steps) and not any(step.sends for step in steps):
        said += " The transport decides which part goes to which rank, and in which order it adds."
    return said


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
        return f"Each rank has its own {_what(figure)} of {name} ({figure.placement})."
    if figure.is_alike:
        return f"{name} is the same on every rank."
    return f"The trace does not know the placement of {name}."


def placed(figure: Figure) -> str:
    """The same in a word or two, for a caption."""
    if figure.placement:
        return figure.placement
    return "the same on every rank" if figure.is_alike else "placement not known"


def _of(figure: Figure) -> str:
    """What a rank has of a tensor: "its own columns of x"."""
    if figure.dim is not None:
        return f"its own {_what(figure)} of {figure.name}"
    if figure.placement == "Partial":
        return f"its summand of {figure.name}"
    return f"the whole {figure.name}" if figure.placement else f"what it has of {figure.name}"


def _what(figure: Figure) -> str:
    dim, num_dims = figure.dim or 0, len(figure.shape)
    if num_dims == 1:
        return "elements"
    return DIMS.get(num_dims - dim) or f"part of dim {dim}"


def changed(figures: Sequence[Figure]) -> str:
    """Which placement a collective makes of which: "Partial -> Replicate"."""
    before = [figure.placement or "unknown" for figure in figures if not figure.is_result]
    after = [figure.placement or "unknown" for figure in figures if figure.is_result]
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
