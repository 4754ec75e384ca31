"""`shardproof plan --layout`: the text of a layout, and its costs as a table."""

from dataclasses import dataclass
from typing import cast, get_args

from rich.text import Text

from shardproof.batch_gradients import Passes
from shardproof.checked_values import LARGEST, read_whole
from shardproof.cli.output import PlainConsole, size, table
from shardproof.data_parallel import BATCH_LEAVES
from shardproof.errors import UsageError
from shardproof.plans.layout_cost import BatchLayout, LayoutCost
from shardproof.wording import VALUE, short_repr, short_text

_EXAMPLE = "--layout tp=8,dp=128,batch_leaves=128"
_ROWS = {
    "tp_bytes": "sent to ranks of the model",
    "dp_bytes": "sent to ranks of the batch",
    "parameter_bytes": "parameters",
    "gradient_bytes": "gradients",
    "node_bytes": "gradients in the exchange",
    "optimizer_bytes": "state of AdamW",
    "flops": "flops of matrix products",
}


@dataclass(frozen=True)
class NamedLayout:
    """What --layout and the options beside it say.

    Attributes:
        tp, dp, accumulate, batch_leaves, ranks_per_host: the numbers in the text.
        passes: "leaf" or "node".
        leaves: of --leaves.
        batch, length: rows of a step, and tokens of each.
    """

    tp: int = 1
    dp: int = 1
    accumulate: int = 1
    batch_leaves: int = BATCH_LEAVES
    ranks_per_host: int | None = None
    passes: Passes = "leaf"
    leaves: int = 1
    batch: int = 1
    length: int = 1

    @property
    def of_batch(self) -> BatchLayout:
        """How the batch is shared."""
        return BatchLayout(
            self.dp, self.accumulate, self.passes, ranks_per_host=self.ranks_per_host
        )

    @property
    def rows_of_leaf(self) -> int:
        """Rows of the largest batch leaf."""
        return -(-self.batch // self.batch_leaves)

    def check_even(self) -> None:
        """Raise unless each batch leaf has as many rows.

        Raises:
            UsageError: it has not.
        """
        if self.batch % self.batch_leaves:
            raise UsageError(
                f"--batch {self.batch} does not give each of {self.batch_leaves} batch leaves as "
                "many rows, and a watched plan knows passes of one size. Use a multiple of "
                f"{self.batch_leaves}."
            )


def parse_layout(text: str) -> NamedLayout:
    """The layout that --layout names.

    Args:
        text: such as "tp=8,dp=128,batch_leaves=128".

    Raises:
        UsageError: a part is unknown, twice there, or has no valid value.
    """
    numbers: dict[str, int] = {}
    passes: str = "leaf"
    names = ("tp", "dp", "accumulate", "batch_leaves", "ranks_per_host", "passes")
    written: set[str] = set()
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in names or name in written:
            why = "is there twice" if name in written else "names nothing of a layout"
            raise _refusal(text, f"{short_repr(part)} {why}; known are {', '.join(names)}")
        written.add(name)
        number = read_whole(value)
        if name == "passes":
            if value not in get_args(Passes):
                raise _refusal(text, f"{short_repr(part)} is not leaf or node")
            passes = value
        elif number is None or not 1 <= number <= LARGEST:
            raise _refusal(text, f"{short_repr(part)} has no positive whole number")
        else:
            numbers[name] = number
    return NamedLayout(passes=cast(Passes, passes), **numbers)


def _refusal(text: str, why: str) -> UsageError:
    return UsageError(
        f"--layout {short_text(text, most=VALUE)}: {why}. Use for instance {_EXAMPLE}."
    )


def show_cost(cost: LayoutCost, source: str, out: PlainConsole) -> None:
    """Print one line for each figure, then what the papers say of activations."""
    num_ranks = len(cost.ranks)
    out.heading(f"{cost.model} on tp {cost.tp} x dp {cost.layout.dp} = {num_ranks} ranks")
    out.show(Text(f"{source}, {cost.batch_leaves} batch leaves, {_step(cost)}"))
    out.print()
    grid = table("a step", "calls", "most on a rank", "on all ranks", width=out.width,
                 right=("calls", "most on a rank", "on all ranks"))  # fmt: skip
    for name, words in _ROWS.items():
        most, total = cost.most(name), cost.total(name)
        axis = name.removesuffix("_bytes")
        calls = str(cost.calls(axis)) if axis in ("tp", "dp") else ""
        if most is None or total is None:
            grid.add_row(words, calls, "unknown", "unknown")
        else:
            show = _flops if name == "flops" else size
            grid.add_row(words, calls, show(most), show(total))
    out.block(grid)
    out.whole_line(f"the largest parameter on a rank: {size(cost.most('largest_bytes') or 0)}")
    if cost.host_bytes is not None:
        out.whole_line(
            f"sent between {len(cost.host_bytes)} hosts of {cost.layout.ranks_per_host} ranks, for "
            f"gradients: {size(max(cost.host_bytes))} at most by a host, "
            f"{size(sum(cost.host_bytes))} by all"
        )
    paper = cost.activations
    if paper is not None:
        out.whole_line(
            f"on paper (arXiv 2205.05198, GPT layers in 16 bits), activations of a pass of "
            f"{paper.rows} x {paper.length} tokens: {size(paper.one_rank)} on one rank, "
            f"{size(paper.tensor_parallel)} at tp {cost.tp}, {size(paper.sequence_parallel)} with "
            "sequence parallelism"
        )
    out.whole_line("left out: the optimizer's own collectives, buffers of transports, and time")


def _step(cost: LayoutCost) -> str:
    """The size of the step, in words."""
    if cost.batch is None:
        return "each of them the example that was watched"
    return f"{cost.batch} x {cost.length} tokens, a pass for each {cost.layout.passes}"


def _flops(number: int) -> str:
    """Floating-point operations with a unit of suitable size.

    >>> _flops(1_500_000), _flops(12)
    ('1.5 MFLOP', '12.0 FLOP')
    """
    amount, units = float(number), ["", "k", "M", "G", "T", "P", "E"]
    while amount >= 1000 and units[1:]:
        amount /= 1000
        units = units[1:]
    return f"{amount:.1f} {units[0]}FLOP"
