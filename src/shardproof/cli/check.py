"""`shardproof check`: is a tensor-parallel program right, and if not, where and what is it?"""

import os
from pathlib import Path

import click
from rich.text import Text

from shardproof import torchrun
from shardproof.checker.check_program import check as check_program
from shardproof.checker.check_report import CheckReport
from shardproof.checker.drawing import drawing_of
from shardproof.checker.program_file import arguments_of
from shardproof.cli.options import (
    HELP_OPTIONS,
    OutputPath,
    choice_option,
    json_option,
    number_option,
)
from shardproof.cli.output import BAD, GOOD, WIDE, PlainConsole, console, table
from shardproof.cli.output_file import OutputFile, check_different
from shardproof.cli.ranks_here import is_speaker
from shardproof.errors import UsageError
from shardproof.ranks import ENGINES
from shardproof.showing.check_page import check_page

_MARKS = {"same": "same", "rounding": "ok", "inside": "inside", "wrong": "WRONG"}
_INDENT = 2


@click.command(context_settings=HELP_OPTIONS)
@click.argument("file", type=click.Path(path_type=Path))
@number_option(
    "--degree", metavar="D", example=2, help="How many ranks.  [default: the file's, or 2]"
)
@number_option(
    "--steps", metavar="N", example=1, help="How many updates.  [default: the file's, or 1]"
)
@choice_option(
    "--engine",
    ENGINES,
    help="What the ranks are; threads are for models that shardproof cut.  [default: processes]",
)
@click.option("--html", "html_file", type=OutputPath(), metavar="FILE", help="Also write a page.")
@json_option("the report")
def check(
    *,
    file: Path,
    degree: int | None,
    steps: int | None,
    engine: str | None,
    html_file: OutputFile | None,
    json_file: OutputFile | None,
) -> int:
    """Judge the tensor-parallel program in FILE, a file in Python, against a plain one.

    FILE has a function parallel(group), which builds the program on each rank, a function
    reference(), which builds the plain module, a batch, and perhaps a loss, an optimizer and an
    update; docs/check.md says how they are called. Nothing of shardproof needs to be in it. Under
    torchrun, the ranks are torchrun's.

    Exit code 0: right up to rounding. 1: wrong; the last line says where and what. 2: wrong usage,
    or an error that says what to do.
    """
    check_different(html_file, json_file)
    if torchrun.read(os.environ) is not None:
        for option, value in (("--degree", degree), ("--engine", engine)):
            if value is not None:
                raise UsageError(
                    f"{option} {value} cannot be given under torchrun, which has started the "
                    f"ranks. Leave {option} out, or run without torchrun."
                )
    given = {"degree": degree, "steps": steps, "engine": engine}
    options = {name: value for name, value in given.items() if value is not None}
    report = check_program(**(arguments_of(file) | options))
    if is_speaker():
        if html_file is not None:
            html_file.write_text(check_page(report))
        if json_file is not None:
            json_file.write(report.as_dict())
        show(report, console())
    return 0 if report.right else 1


def show(report: CheckReport, out: PlainConsole) -> None:
    """Print a report; the last line is the verdict."""
    _show_layouts(report, out)
    _show_modules(report, out)
    if not report.right:
        _show_fault(report, out)
    if report.note:
        out.whole_line(f"note: {report.note}")
    out.whole_line(report.verdict, GOOD if report.right else BAD)


def _show_layouts(report: CheckReport, out: PlainConsole) -> None:
    out.heading("how the parameters lie")
    is_wide = out.width >= WIDE
    columns = ["parameter", "shape", "found", *(["declared", "ranks hold"] if is_wide else [])]
    grid = table(*columns, width=out.width)
    for each in report.layouts:
        held = "all" if set(each.held) == {"all"} else "; ".join(each.held)
        name = each.name if each.name == each.whole else f"{each.name} of {each.whole}"
        cells = (name, " x ".join(map(str, each.shape)), each.placement, each.declared, held)
        grid.add_row(*cells[: len(columns)])
    out.block(grid)


def _show_modules(report: CheckReport, out: PlainConsole) -> None:
    out.heading(
        "modules: same = no difference, ok = rounding, inside = other tensors with a right result, "
        "- = not compared"
    )
    marks = report.marks()
    for path, class_name in report.modules:
        depth = path.count(".") + 1 if path else 0
        name = path.rpartition(".")[2] or "the model"
        mark = _MARKS.get(marks.get(path, ""), "-")
        is_faulty = path == report.module
        line = f"{mark:>6} {' ' * _INDENT * depth}{name}: {class_name}"
        out.whole_line(f"{line}   <-- here" if is_faulty else line, BAD if is_faulty else "")
    out.print()


def _show_fault(report: CheckReport, out: PlainConsole) -> None:
    out.heading("the first fault")
    if report.source:
        out.whole_line(f"forward of {report.module or 'the model'}: {report.source}")
    wrong = [each for each in report.tensors if each.verdict == "wrong"]
    if wrong:
        first = wrong[0]
        sizes = [
            f"{value:.1e} in {dtype}"
            for value, dtype in ((first.in_fp32, "fp32"), (first.in_fp64, "fp64"))
            if value is not None
        ]
        out.whole_line(
            f"{first.name}: {first.placement}; largest difference "
            f"{' and '.join(sizes) or 'not known'}, of the largest element"
        )
    for each in report.differences:
        out.whole_line(
            f"  rank {each.rank}, index {list(each.index)}: {each.value:.8g}, and should be "
            f"{each.expected:.8g}"
        )
    if report.kind:
        out.show(Text(f"Kind: {report.kind}. {report.evidence[:1].upper()}{report.evidence[1:]}."))
        out.show(Text(report.way_out))
    for line in drawing_of(report.kind, report.degree).lines():
        out.whole_line(f"  {line}")
    out.print()
