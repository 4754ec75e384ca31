"""A plan that names modules, as text and as data, with what a step of it would send."""

from dataclasses import dataclass
from typing import Any

from rich.padding import Padding
from rich.text import Text

from shardproof.cli.output import WIDE, PlainConsole, listed, ranges, shape, size, table
from shardproof.plans.collective import Counts
from shardproof.plans.model_plan import ModelPlan, describe
from shardproof.plans.module_plan import ModulePlan, Row
from shardproof.plans.plan_text import listed as names

INDENT = 1
GROUPS = ("attention", "shared input")  # their children are named below them


@dataclass(frozen=True)
class Asked:
    """A plan and the step that is looked at.

    Attributes:
        directory: as it was written.
        plan: of the model in it.
        batch, length: rows, and tokens of each.
    """

    directory: str
    plan: ModelPlan
    batch: int
    length: int

    def step(self, rank: int = 0, module: str | None = None) -> Counts:
        """What one training step counts."""
        return self.plan.comm(batch=self.batch, length=self.length, rank=rank, module=module)

    def token(self, rank: int = 0) -> Counts:
        """What generating one more token counts."""
        found = self.plan.comm(batch=self.batch, length=1, labels=False, rank=rank)
        return {direction: kinds for direction, kinds in found.items() if direction == "forward"}


def as_json(asked: Asked) -> dict[str, Any]:
    """The plan as data, with what a step counts on every rank."""
    ranks = range(asked.plan.degree)
    return {
        "directory": asked.directory,
        **asked.plan.as_dict(),
        "comm": {
            "batch": asked.batch,
            "length": asked.length,
            "step": [asked.step(rank) for rank in ranks],
            "token": [asked.token(rank) for rank in ranks],
        },
    }


def show_model(asked: Asked, out: PlainConsole) -> None:
    """Print one line for every kind of layer, then what stays whole and what it comes to."""
    made = asked.plan
    out.show(Text(f"== {made.model} at degree {made.degree}", "bold"))
    out.show(Text(f"{asked.directory}, {made.scheme.leaves} leaves"))
    out.print()
    columns = ["module", "cut", "leaves", "weight", "on a rank", "step"]
    if out.width < WIDE:
        columns = [column for column in columns if column not in ("leaves", "weight")]
    grid = table(*columns, width=out.width, right=("leaves", "weight", "on a rank"))
    for column in (grid.columns[0], grid.columns[-1]):
        column.no_wrap = True  # names are searched for
    parent = ""
    for row in made.rows:
        if row.first.is_cut:
            cells = _cells(row, parent, asked)
            grid.add_row(*(cells[column] for column in columns))
            parent = row.names if row.first.role in GROUPS else parent
    out.show(Padding(grid, (0, 0, 0, INDENT)))
    out.print()
    for line in [*_whole(made), *made.totals(), *_steps(asked)]:
        out.print(Text(line), soft_wrap=True)


def _cells(row: Row, parent: str, asked: Asked) -> dict[str, str]:
    """Column -> what it says of one kind of layer."""
    first, name = row.first, row.names
    if parent and name.startswith(f"{parent}."):
        name = f"  {name.removeprefix(f'{parent}.')}"
    return {
        "module": name,
        "cut": _how(first),
        "leaves": str(first.leaves),
        "weight": ", ".join(
            shape(each.shape) for each in first.parameters if each.name == "weight"
        ),
        "on a rank": _size(_largest(first)) if first.parameters else "",
        "step": "\n".join(
            f"{direction} {len(row.modules) * figures['calls']} {kind} "
            f"{size(len(row.modules) * figures['message_bytes'])}"
            for direction, kinds in sorted(asked.step(module=first.name).items(), reverse=True)
            for kind, figures in kinds.items()
        ),
    }


def _how(module: ModulePlan) -> str:
    """In words, with the ranks that have nothing to do."""
    if not module.idle:
        return describe(module)
    ranks = f"rank{'s' if len(module.idle) > 1 else ''}"
    return f"{describe(module)}; {ranks} {ranges(module.idle)} idle"


def _whole(made: ModelPlan) -> list[str]:
    """What every rank holds, as one line for every reason."""
    reasons: dict[str, list[ModulePlan]] = {}
    for module in made.modules:
        if not module.is_cut:
            reasons.setdefault(module.reason, []).append(module)
    return [
        f"whole on every rank ({reason}): {names(module.name for module in modules)}"
        for reason, modules in reasons.items()
    ]


def _largest(module: ModulePlan) -> int:
    """Bytes on the rank that holds most of it."""
    held = [parameter.held_bytes for parameter in module.parameters if not parameter.tied_to]
    return max((sum(ranks) for ranks in zip(*held, strict=True)), default=0)


def _size(num_bytes: int) -> str:
    return size(num_bytes) if num_bytes else "tied"


def _steps(asked: Asked) -> list[str]:
    """What a training step and a generated token send, as lines."""
    what = f"a training step of {asked.batch} x {asked.length} tokens"
    if asked.plan.degree == 1:
        return [f"{what} sends nothing: there is one rank"]
    return [
        f"{what}: {_directions(asked.step())}",
        f"a generated token of {asked.batch} rows: {_directions(asked.token())}",
    ]


def _directions(counts: Counts) -> str:
    """All that is sent, and how much rank 0 sends of it."""
    sent = sum(figures["sent_bytes"] for kinds in counts.values() for figures in kinds.values())
    parts = [
        f"{direction} {_calls(kinds)}" for direction, kinds in sorted(counts.items(), reverse=True)
    ]
    return f"{'; '.join(parts)}; rank 0 sends {size(sent)}"


def _calls(kinds: dict[str, dict[str, int]]) -> str:
    return listed(
        f"{figures['calls']} {kind} ({size(figures['message_bytes'])})"
        for kind, figures in kinds.items()
    )
