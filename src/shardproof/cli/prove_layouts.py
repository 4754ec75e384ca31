"""`shardproof prove --layouts`: a training has the same bits in many layouts of its ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from shardproof.checked_values import read_whole
from shardproof.cli.cases import select_cases
from shardproof.cli.output import BAD, GOOD, PlainConsole, console, progress, seconds, table
from shardproof.cli.output_file import OutputFile, checked_picture
from shardproof.cli.ranks_here import check_transport
from shardproof.cli.report_text import ranks_text
from shardproof.data_parallel import BATCH_LEAVES
from shardproof.engines.capacity import check_threads
from shardproof.errors import UsageError
from shardproof.leaves import check_batch_degree, check_degree
from shardproof.prover import Case, curve, layout_map
from shardproof.prover.cases import all_cases
from shardproof.prover.cases.text_training import FEW, TextTraining
from shardproof.prover.rank_layouts import (
    SAMPLE,
    LayoutReport,
    RankLayout,
    all_layouts,
    prove_layouts,
    sampled_layouts,
)
from shardproof.ranks import ENGINES, TRANSPORTS
from shardproof.scheme import Scheme
from shardproof.wording import VALUE, short_repr, short_text

DEFAULT = "sample"
FULL = "full"
_EXAMPLE = "tp=1,2,3:dp=1,2:accumulate=1,2:sequence=off,on"
_SWITCH = {"off": False, "on": True}
_MOST = 512  # layouts of one call
_MOST_RANKS = 64


def parse_layouts(text: str) -> tuple[RankLayout, ...]:
    """The layouts that --layouts names.

    Args:
        text: "sample", "full", or numbers for each dim, as in "tp=1,2:dp=1,3".

    Raises:
        UsageError: it is none of these, or more ranks or layouts than can be run.
    """
    if text == DEFAULT:
        return sampled_layouts(SAMPLE)
    if text == FULL:
        return all_layouts()
    numbers: dict[str, tuple[int, ...]] = {"tp": (1,), "dp": (1,), "accumulate": (1,)}
    sequence: tuple[bool, ...] = (False,)
    for part in text.split(":"):
        name, _, values = part.partition("=")
        if name == "sequence" and set(values.split(",")) <= set(_SWITCH):
            sequence = tuple(_SWITCH[each] for each in sorted(set(values.split(","))))
            continue
        if name == "sequence":
            raise _refusal(text, f"{short_repr(part)} has something else than off and on")
        if name not in numbers:
            raise _refusal(text, f"{short_repr(part)} names no dim of a layout")
        parsed = [read_whole(each) for each in values.split(",")]
        chosen = [each for each in parsed if each is not None and each > 0]
        if len(chosen) != len(parsed):
            raise _refusal(text, f"{short_repr(part)} has something else than positive numbers")
        numbers[name] = tuple(sorted(set(chosen)))
    layouts = all_layouts(**numbers, sequence=sequence)
    largest = max(layouts, key=lambda each: each.num_ranks)
    if len(layouts) > _MOST or largest.num_ranks > _MOST_RANKS:
        raise _refusal(
            text,
            f"these are {len(layouts)} layouts, the largest of {largest.num_ranks} ranks; use at "
            f"most {_MOST}, and {_MOST_RANKS} ranks",
        )
    return layouts


@dataclass(frozen=True)
class LayoutsRun:
    """What the options of the command say.

    Attributes:
        case_names: of --case; none: all that train on text and are installed.
        model: of --model.
        steps: of --steps; None: 4.
        layouts: of --layouts.
        engine: of --engine; None: what the transport connects.
        transport: of --transport.
        threads: of --threads.
    """

    case_names: Sequence[str]
    model: str | None
    steps: int | None
    layouts: str
    engine: str | None
    transport: str
    threads: int | None


def check_options(options: Mapping[str, object]) -> None:
    """Raise if an option is given that does not go with --layouts.

    Args:
        options: as they are written -> their values; false values are not given.

    Raises:
        UsageError: one is.
    """
    for option, value in options.items():
        if value:
            raise UsageError(
                f"{option} does not go with --layouts, which runs one training in many layouts "
                "of ranks that it starts itself. Leave one of the two out."
            )


def run(
    options: LayoutsRun, scheme: Scheme, *, json_file: OutputFile | None, plot_path: str | None
) -> int:
    """Prove the layouts and say the outcome; the exit code.

    Args:
        options: of the command.
        scheme: of the command, without batch leaves.
        json_file: of --json.
        plot_path: of --plot.

    Raises:
        UsageError: an option is invalid.
        DegreeError: the leaves cannot serve a layout.
    """
    layouts = parse_layouts(options.layouts)
    names = options.case_names or (
        [] if options.model else [case.name for case in _cases_on_text()]
    )
    cases, _ = select_cases(names, options.model, None)
    for layout in layouts:
        check_degree(layout.tp, scheme.leaves)
        check_batch_degree(layout.dp, BATCH_LEAVES, where=f"layout {layout}")
    check_threads(
        options.threads or 1,
        max(each.num_ranks for each in layouts),
        setting_text=f"--threads {options.threads}",
    )
    engine = options.engine or next(
        name for name in ENGINES if options.transport in TRANSPORTS[name]
    )
    check_transport(options.transport, engine)
    picture = None
    if plot_path is not None:
        picture = checked_picture(plot_path, is_installed=curve.is_installed(), example="map.png")
    with progress(is_speaker=True) as tell:
        proof = prove_layouts(
            cases,
            layouts,
            engine=engine,
            transport=options.transport,
            threads=options.threads,
            scheme=replace(scheme, batch_leaves=BATCH_LEAVES),
            seed=scheme.seed,
            steps=options.steps or FEW,
            progress=tell,
        )
    return conclude(proof, json_file=json_file, picture=picture)


def _cases_on_text() -> list[Case]:
    """The cases that train on text and are installed."""
    return [
        case for case in all_cases() if isinstance(case.work, TextTraining) and case.is_installed
    ]


def _refusal(text: str, why: str) -> UsageError:
    return UsageError(
        f"--layouts {short_text(text, most=VALUE)}: {why}. Use {DEFAULT}, {FULL}, or numbers for "
        f"each dim, for instance --layouts {_EXAMPLE}."
    )


def conclude(proof: LayoutReport, *, json_file: OutputFile | None, picture: Path | None) -> int:
    """Write, draw and print; the exit code."""
    report = proof.as_dict()
    if json_file is not None:
        json_file.write(report)
    if picture is not None:
        layout_map.draw(report, picture)
    show(report, console())
    return 0 if proof.proved else 1


def show(report: dict[str, Any], out: PlainConsole) -> None:
    """Print a report; the last line is the verdict."""
    for case in report["cases"]:
        out.heading(case["name"])
        out.block(_table(case["layouts"], width=out.width))
        out.whole_line(
            f"plain torch in fp64: {case['torch_difference']:.1e} off at most, in "
            f"{case['torch_tensor']}"
        )
        out.print()
    out.whole_line(
        f"ranks: {ranks_text(report['engine'], report['transport'])}, batch leaves: "
        f"{report['batch_leaves']}, seed: {report['seed']}"
    )
    out.whole_line(f"contract: {report['contract']}")
    out.whole_line(report["verdict"], GOOD if report["proved"] else BAD)


def _table(layouts: Sequence[dict[str, Any]], *, width: int) -> Any:
    shown = table(
        "tp", "dp", "accumulate", "sequence", "ranks", "tensors", "differ", "first", "seconds",
        width=width,
        right=("tp", "dp", "accumulate", "ranks", "tensors", "differ", "seconds"),
    )  # fmt: skip
    for each in layouts:
        differing = each["differing"]
        shown.add_row(
            str(each["tp"]),
            str(each["dp"]),
            str(each["accumulate"]),
            "on" if each["sequence"] else "off",
            str(each["ranks"]),
            str(each["tensors"]),
            Text(str(len(differing)), BAD if differing else GOOD),
            differing[0] if differing else "",
            seconds(each["seconds"]),
        )
    return shown
