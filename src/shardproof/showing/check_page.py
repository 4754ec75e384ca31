"""A report of `check` as one page of HTML: the verdict, the first fault, and every module.

It needs nothing else, like the page of a step (`showing.page`), whose colours and head it has.
"""

from html import escape

from shardproof.checker.check_report import CheckedTensor, CheckReport
from shardproof.checker.drawing import FaultDrawing, drawing_of
from shardproof.showing.page import document

_MARKS = {
    "same": "same",
    "rounding": "rounding",
    "inside": "other inside",
    "wrong": "wrong",
    "": "not compared",
}
_LETTER, _LINE, _PAD = 7.4, 34, 10  # of the drawing: width of a letter, height of a row


def check_page(report: CheckReport) -> str:
    """The page."""
    return document(
        "Right" if report.right else f"Wrong: {report.module or 'the model'}",
        f"""<header>
<h1 class="{"good" if report.right else "bad"}">{escape(report.verdict)}</h1>
{_about(report)}
</header>
<main>
{"" if report.right else _fault(report)}
<section><h2>Modules</h2>
<div class="tools"><button type="button" id="open">Open all</button>
<button type="button" id="close">Close all</button></div>
<div class="tree" id="tree">
{_tree(report)}</div></section>
<section><h2>How the parameters lie</h2>
{_layouts(report)}</section>
</main>
""",
        styles=("page.css", "plan_page.css", "check_page.css"),
        script="plan_page.js",
    )


def _about(report: CheckReport) -> str:
    lines = [f"Degree {report.degree}; judged in {report.precision}."]
    if report.note:
        lines.append(f"Note: {report.note}.")
    return "".join(f'<p class="quiet">{escape(line)}</p>' for line in lines)


def _fault(report: CheckReport) -> str:
    told = []
    if report.kind:
        told.append(
            f"<p>Consistent with <b>{escape(report.kind)}</b>: {escape(report.meaning)}.</p>"
        )
        told.append(f"<p>{escape(report.evidence[:1].upper() + report.evidence[1:])}.</p>")
        told.append(f"<p>{escape(report.way_out)}</p>")
    if report.source:
        told.append(f"<p>Forward: <code>{escape(report.source)}</code></p>")
    rows = "".join(
        f"<tr><td>{escape(each.tensor)}</td><td>{each.rank}</td><td>{list(each.index)}</td>"
        f"<td>{each.value:.8g}</td><td>{each.expected:.8g}</td></tr>"
        for each in report.differences
    )
    head = "<th>tensor</th><th>rank</th><th>index</th><th>value</th><th>should be</th>"
    table = f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>' if rows else ""
    return (
        f"<section><h2>The first fault: {escape(report.module or 'the model')}</h2>"
        f"{''.join(told)}{_svg(drawing_of(report.kind, report.degree))}{table}</section>"
    )


def _svg(drawing: FaultDrawing) -> str:
    """The drawing: a box for each rank, and lines to what comes of it."""
    width = max(map(len, drawing.ranks)) * _LETTER + 2 * _PAD
    left = 64 + width
    height = _LINE * max(len(drawing.ranks), 2)
    end = left + 90 + max(len(drawing.result), len(drawing.right) + 8) * _LETTER
    middle = height / 2
    shapes = []
    for rank, words in enumerate(drawing.ranks):
        y = _LINE * rank
        shapes.append(
            f'<text x="0" y="{y + 21}">rank {rank}</text>'
            f'<rect x="60" y="{y + 4}" width="{width:.0f}" height="{_LINE - 8}" rx="4" '
            f'class="r{rank % 8}"/><text x="{60 + _PAD}" y="{y + 21}">{escape(words)}</text>'
            f'<path d="M{left:.0f} {y + 17} L{left + 60:.0f} {middle:.0f}"/>'
        )
    shapes.append(
        f'<g transform="translate({left + 68:.0f} {middle:.0f})">'
        f'<text class="bad" y="-3">{escape(drawing.result)}</text>'
        f'<text y="15">right: {escape(drawing.right)}</text></g>'
    )
    said = f"Each rank has {drawing.ranks[0]}. It gives: {drawing.result}. Right: {drawing.right}."
    return (
        f'<div class="wide"><svg class="fault" role="img" aria-label="{escape(said)}" '
        f'viewBox="0 0 {end:.0f} {height}" width="{end:.0f}" height="{height}">'
        f"{''.join(shapes)}</svg></div>"
    )


def _tree(report: CheckReport) -> str:
    """The modules as nested parts, each with its tensors; the faulty one is open."""
    marks = report.marks()
    names = dict(report.modules)
    children: dict[str, list[str]] = {path: [] for path in names}
    for path in names:
        if path:
            children[path.rpartition(".")[0]].append(path)
    tensors: dict[str, list[CheckedTensor]] = {}
    for each in report.tensors:
        tensors.setdefault(each.module, []).append(each)

    def node(path: str) -> str:
        mark = marks.get(path, "")
        is_faulty = path == report.module
        is_open = is_faulty or not path or (report.module or "").startswith(f"{path}.")
        here = ' <b class="bad">here</b>' if is_faulty else ""
        name = path.rpartition(".")[2] or "the model"
        inner = "".join(node(child) for child in children[path])
        return (
            f"<details{' open' if is_open else ''}><summary><b>{escape(name)}</b> "
            f'<span class="quiet">{escape(names[path])}</span> '
            f'<span class="mark {mark or "none"}">{_MARKS[mark]}</span>{here}</summary>'
            f'<div class="inside">{_table(tensors.get(path, []))}{inner}</div></details>'
        )

    return node("") if "" in names else ""


def _table(tensors: list[CheckedTensor]) -> str:
    if not tensors:
        return ""
    rows = "".join(
        f'<tr class="{each.verdict}"><td>{escape(each.name)}</td><td>{each.step}</td>'
        f"<td>{escape(each.placement)}</td><td>{_figure(each.in_fp32)}</td>"
        f"<td>{_figure(each.in_fp64)}</td><td>{each.verdict}</td></tr>"
        for each in tensors
    )
    head = "".join(
        f"<th>{each}</th>"
        for each in ("tensor", "step", "placement", "off in fp32", "off in fp64", "verdict")
    )
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _layouts(report: CheckReport) -> str:
    rows = "".join(
        f"<tr><td>{escape(each.name)}</td><td>{escape(each.whole)}</td>"
        f"<td>{' x '.join(map(str, each.shape))}</td><td>{escape(each.placement)}</td>"
        f"<td>{escape(each.declared)}</td><td>{escape('; '.join(each.held))}</td></tr>"
        for each in report.layouts
    )
    head = "".join(
        f"<th>{each}</th>"
        for each in (
            "parameter",
            "of",
            "whole shape",
            "found",
            "declared",
            "held by ranks 0, 1, ...",
        )
    )
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
