"""A plan that was made by watching, as text: what is cut together, where, and what it sends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.padding import Padding
from rich.text import Text

from shardproof.cli.output import WIDE, PlainConsole, ranges, shape, size, table
from shardproof.plans.plan_text import alike, listed, pattern, together
from shardproof.plans.watched_plan import KINDS, Sent, WatchedPlan, shapes_in_words
from shardproof.units import Shared
from shardproof.watching import Family

_MOST_SHAPES = 4  # of one parameter, in a cell


@dataclass(frozen=True)
class Group:
    """Families of layers that are alike.

    Attributes:
        families: all of them.
        parameters: for each parameter of the first its names in all, and the dim.
    """

    families: tuple[Family, ...]
    parameters: tuple[tuple[tuple[str, ...], int], ...]


def groups(made: WatchedPlan) -> list[Group]:
    """Families that differ in numbers in names only, as one."""
    found: dict[object, list[Family]] = {}
    for family in made.families:
        dims = tuple((pattern(name), dim, blocks) for (name, dim), blocks in family.dims.items())
        units = replace(family.units, name=pattern(family.units.name))
        found.setdefault((family.kind, units, dims), []).append(family)
    return [
        Group(
            tuple(families),
            tuple(
                (tuple(key[0] for key in keys), keys[0][1])
                for keys in zip(*(family.dims for family in families), strict=True)
            ),
        )
        for families in found.values()
    ]


def show_watched(made: WatchedPlan, what: str, out: PlainConsole) -> None:
    """Print a head for what is cut together, a line for each parameter, then what it comes to."""
    out.show(Text(f"== {made.model} at degree {made.degree}", "bold"))
    out.show(Text(f"{what}, {made.scheme.leaves} leaves, watched"))
    out.print()
    columns = ["parameter", "dim", "weight", "on a rank", "step"]
    if out.width < WIDE:
        columns = [column for column in columns if column not in ("dim", "weight")]
    grid = table(*columns, width=out.width, right=("dim",))
    grid.columns[0].no_wrap = True  # names are searched for
    left = list(made.rehearsal.sent)
    for group in groups(made):
        grid.add_row(Text(_head(group.families[0], made), "bold"))
        for names, dim in merged(group.parameters):
            sent = _sent_by(names, left)
            left = [each for each in left if each not in sent]
            cells = {
                "parameter": f"  {listed(names)}",
                "dim": str(dim),
                "weight": shape(made.shapes[names[0]]),
                "on a rank": _held(made, names[0]),
                "step": "\n".join(sent_words(sent)),
            }
            grid.add_row(*(cells[column] for column in columns))
    out.show(Padding(grid, (0, 0, 0, 1)))
    out.print()
    if left:
        words = ", ".join(f"{each} of {where}" for where, each in _elsewhere(left))
        out.print(Text(f"sent elsewhere: {words}"), soft_wrap=True)
    for line in made.totals():
        out.print(Text(line), soft_wrap=True)


def merged(parameters: Sequence[tuple[tuple[str, ...], int]]) -> Iterator[tuple[list[str], int]]:
    """Parameters of one family that differ in numbers only, such as experts, as one."""
    firsts = {names[0]: (names, dim) for names, dim in parameters}
    for same in alike((name, dim) for name, (_, dim) in firsts.items()):
        yield [each for name in same for each in firsts[name][0]], firsts[same[0]][1]


def _head(family: Family, made: WatchedPlan) -> str:
    """What is cut together, in words."""
    shared = Shared(family.units, made.scheme.leaves, made.degree)
    words = [f"{KINDS[family.kind]}: {family.units.count} units"]
    if family.units.needers:
        words.append(f"{len(family.units.needers)} shared")
    words.append(f"{shared.cut.num_leaves} leaves")
    idle = made.idle.get(family.name, ())
    if idle:
        words.append(f"rank{'s' if idle[1:] else ''} {ranges(idle)} idle")
    return ", ".join(words)


def _held(made: WatchedPlan, name: str) -> str:
    """The shapes on the ranks, of many those at the ends."""
    shapes = list(dict.fromkeys(made.layout(name, rank).local_shape for rank in range(made.degree)))
    if len(shapes) <= _MOST_SHAPES:
        return shapes_in_words(shapes)
    return f"{shape(max(shapes))} to {shape(min(shapes))}"


def _sent_by(names: Sequence[str], sent: Sequence[Sent]) -> list[Sent]:
    """Collectives that the modules of some parameters make, or the first of several together."""
    modules = {name.rpartition(".")[0] for name in names}
    return [each for each in sent if each.module.split(" + ")[0] in modules]


def sent_words(sent: Sequence[Sent]) -> list[str]:
    """Direction, number, kind and bytes of collectives, each kind once.

    >>> sent_words([Sent("forward", "all_reduce", name, 1, 2048) for name in ("a", "b")])
    ['forward 2 all_reduce 4.0 KiB']
    """
    found: dict[tuple[str, str], list[Sent]] = {}
    for each in sent:
        found.setdefault((each.direction, each.kind), []).append(each)
    return [
        f"{direction} {sum(each.calls for each in same)} {kind} "
        f"{size(sum(each.message_bytes for each in same))}"
        for (direction, kind), same in found.items()
    ]


def _elsewhere(sent: Sequence[Sent]) -> Iterator[tuple[str, str]]:
    """Collectives of modules without a cut parameter of their own, alike ones as one."""
    kinds = {each.module: (each.direction, each.kind) for each in sent}
    for names in alike(kinds.items()):
        for words in sent_words([each for each in sent if each.module in names]):
            yield together(names), words
