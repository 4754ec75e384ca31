"""The scenes of a step as one page of HTML that needs nothing else: no network, no other file.

Everything is written into the page beforehand; its script only chooses what is seen. Without a
script, and on paper, all scenes stand one below the other. What comes from a user is escaped.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path

from shardproof.showing.arrows import MOST_ARROWS, STAGES, Arrow, arrow_sentences
from shardproof.showing.scenes import Scene, StepView
from shardproof.showing.sentences import placement_caption, placement_sentence
from shardproof.showing.tensors import EVERY_RANK, Grid, GridLine, SceneTensor, grids_of

COLOURS = 8  # of ranks; further ranks begin again, and their numbers tell them apart
MOST_LINES, FEW_LINES = (12, 20), (6, 6)  # rows and columns of a grid
MOST_BESIDE = 3  # ranks, of which the arrows fit between the matrices
MANY_SCENES = 60  # from which on grids are drawn with few lines

_LANE, _BOX, _ROW = 104, 92, 36  # width for a rank, width and height of its box
_LEFT, _TOP, _GAP = 18, 4, 58  # the room for a stage's number, above, and between two rows
_HEAD = 7  # length of an arrow's head
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page_of(view: StepView) -> str:
    """The page."""
    lines = MOST_LINES if len(view.scenes) < MANY_SCENES else FEW_LINES
    scenes = "\n".join(_scene(scene, view, lines) for scene in view.scenes)
    return document(
        view.title,
        f"""<header>
<h1>{escape(view.title)}</h1>
{paragraphs(view.about)}
{paragraphs(view.omissions, "bad")}
{_legend(view)}
</header>
{_player(view)}
<p id="live" class="unseen" aria-live="polite"></p>
<main>
{scenes}
</main>
{_all_steps(view)}
""",
        styles=("page.css",),
        script="page.js",
    )


def document(title: str, body: str, *, styles: Sequence[str], script: str) -> str:
    """A page that needs nothing else.

    Args:
        title: as text.
        body: as HTML, in which what comes from a user is escaped.
        styles: names of files beside this one, in order.
        script: likewise.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{"".join(_read(name) for name in styles)}</style>
</head>
<body>
{body}<script>
{_read(script)}</script>
</body>
</html>
"""


@cache
def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def paragraphs(sentences: Sequence[str], kind: str = "") -> str:
    """Sentences, each as a paragraph."""
    start = f'<p class="{kind}">' if kind else "<p>"
    return "\n".join(f"{start}{escape(sentence)}</p>" for sentence in sentences)


def rank_swatches(degree: int) -> str:
    """Items of a legend: a colour and a number for every rank."""
    return "".join(
        f'<li><span class="swatch r{rank % COLOURS}">{rank}</span>rank {rank}</li>'
        for rank in range(degree)
    )


def _legend(view: StepView) -> str:
    items = rank_swatches(view.degree)
    words = (
        '<li><span class="swatch all">all</span>the same on every rank</li>'
        "<li>Partial: each rank has a summand, and the tensor is their sum</li>"
        "<li>leaf: one of the parts into which a summed dim is cut, the same at every degree</li>"
    )
    return f'<ul class="legend" aria-label="Legend">{items}{words}</ul>'


def _player(view: StepView) -> str:
    counts: dict[str, int] = {}
    for scene in view.scenes:
        counts[scene.phase] = counts.get(scene.phase, 0) + 1
    track = "".join(
        f'<span class="{phase}" style="flex:{count} 0 0">{phase}</span>'
        for phase, count in counts.items()
    )
    return f"""<nav class="player" aria-label="Player">
<div class="buttons">
<button type="button" id="first">First</button>
<button type="button" id="previous">Previous</button>
<button type="button" id="play" aria-pressed="false">Play</button>
<button type="button" id="next">Next</button>
<span class="hint quiet">Keys: left, right, space</span>
<span class="where" id="where"></span>
</div>
<label for="slider">Step</label>
<input type="range" id="slider" min="1" max="{max(1, len(view.scenes))}" value="1">
<div class="track" aria-hidden="true">{track}</div>
</nav>
<noscript><p>Scripts are off: all steps stand one below the other.</p></noscript>"""


def _scene(scene: Scene, view: StepView, lines: tuple[int, int]) -> str:
    meets = " meets" if scene.is_collective else ""
    num_arrows = len(scene.arrows)
    formula = f"<p><code>{escape(scene.formula)}</code></p>" if scene.formula else ""
    operands = [tensor for tensor in scene.tensors if not tensor.is_result]
    results = [tensor for tensor in scene.tensors if tensor.is_result]
    words = ("Before", "After") if scene.is_collective else ("Read", "Made")
    lines = (min(lines[0], FEW_LINES[0]), lines[1]) if scene.is_collective else lines
    arrows = _arrow_drawing(scene.arrows, view.degree) if scene.arrows else ""
    beside = " beside" if arrows and view.degree <= MOST_BESIDE else ""
    drawn = (_group(words[0], operands, lines), arrows, _group(words[1], results, lines))
    number = scene.number
    return f"""<section class="scene{meets}" id="step-{number}" data-phase="{scene.phase}" \
data-arrows="{num_arrows}" aria-labelledby="title-{number}">
<h2 id="title-{number}">Step {number}, <span class="phase {scene.phase}">{scene.phase}</span>: \
{escape(scene.title)}</h2>
{formula}
<p class="told">{escape(" ".join(scene.sentences))}</p>
<div class="parts{beside}">
<div class="drawn">
{"".join(drawn)}
</div>
<div class="memory">{_memory(scene, view)}</div>
</div>
</section>"""


def _group(word: str, tensors: Sequence[SceneTensor], lines: tuple[int, int]) -> str:
    if not tensors:
        return ""
    drawn = "".join(_tensor(each, lines) for each in tensors)
    return f'<div class="group"><h3>{word}</h3>{drawn}</div>'


def _tensor(tensor: SceneTensor, lines: tuple[int, int]) -> str:
    grids = grids_of(tensor, most_rows=lines[0], most_columns=lines[1])
    tables = "".join(_table(grid, tensor) for grid in grids)
    part = ", a part of it" if any(grid.is_part for grid in grids) else ""
    bad = (
        f' <span class="bad">{escape(placement_sentence(tensor))}</span>'
        if tensor.is_broken
        else ""
    )
    return (
        f"<figure><figcaption><strong>{escape(tensor.name)}</strong> {tensor.shape} "
        f'<span class="quiet">{escape(placement_caption(tensor))}{part}</span>{bad}</figcaption>'
        f'<div class="grids">{tables}</div></figure>\n'
    )


def _table(grid: Grid, tensor: SceneTensor) -> str:
    """A grid as an HTML table with the index and the rank of each row and column."""
    name = escape(f"{tensor.name}, {grid.label}" if grid.label else tensor.name)
    caption = (
        f"<caption>{escape(grid.label)}</caption>"
        if grid.label
        else f'<caption class="unseen">{name}</caption>'
    )
    by_rows = grid.cut == "rows"
    corner = "<td></td>" * (2 if by_rows else 1)
    head = ""
    if grid.cut == "columns":
        owners = "".join(
            f'<th class="owner" scope="colgroup" colspan="{count}">{_rank(owner, count)}</th>'
            for owner, count in _runs(grid.columns)
        )
        head = f"<tr>{corner}{owners}</tr>"
    heads = "".join(f'<th scope="col">{line.head}</th>' for line in grid.columns)
    body = "".join(_rows(grid))
    return (
        f'<div class="scroll" data-label="{name}">'
        f'<table class="matrix">{caption}<thead>{head}<tr>{corner}{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _rank(owner: int | None, count: int) -> str:
    return "" if owner is EVERY_RANK else f"rank {owner}" if count > 1 else f"r{owner}"


def _rows(grid: Grid) -> Iterator[str]:
    column_edges = _starts(grid.columns) if grid.cut == "columns" else set()
    row_edges = _starts(grid.rows) if grid.cut == "rows" else set()
    counts = dict(_starts_and_counts(grid.rows)) if grid.cut == "rows" else {}
    for place, (row, cells) in enumerate(zip(grid.rows, grid.cells, strict=True)):
        owner = ""
        if place in counts:
            owner = (
                f'<th class="owner" scope="rowgroup" rowspan="{counts[place]}">'
                f"{_rank(row.owner, 2)}</th>"
            )
        html_cells = []
        for column, cell in enumerate(cells):
            rank = grid.owner_of(place, column)
            kinds = "all" if rank is EVERY_RANK else f"r{rank % COLOURS}"
            kinds += " edge-left" if column in column_edges and column else ""
            html_cells.append(f'<td class="{kinds}">{escape(cell)}</td>')
        edge = ' class="edge-top"' if place in row_edges and place else ""
        yield f'<tr{edge}>{owner}<th scope="row">{row.head}</th>{"".join(html_cells)}</tr>'


def _runs(lines: Sequence[GridLine]) -> Iterator[tuple[int | None, int]]:
    for start, count in _starts_and_counts(lines):
        yield lines[start].owner, count


def _starts_and_counts(lines: Sequence[GridLine]) -> list[tuple[int, int]]:
    starts = [*sorted(_starts(lines)), len(lines)]
    return [(start, end - start) for start, end in pairwise(starts)]


def _starts(lines: Sequence[GridLine]) -> set[int]:
    return {
        place
        for place, line in enumerate(lines)
        if place == 0 or line.owner != lines[place - 1].owner
    }


def _memory(scene: Scene, view: StepView) -> str:
    most = max(1, view.most_held)
    rows = "".join(
        _memory_row(scene, rank, 100 * held / most) for rank, held in enumerate(scene.held)
    )
    return (
        '<table class="ranks"><caption class="unseen">Memory and bytes of each rank</caption>'
        '<thead><tr><th scope="col">rank</th><th scope="col" colspan="2">bytes held</th>'
        f'<th scope="col">sent</th></tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="quiet">A full bar is {most:,} bytes: the most that any rank holds after any '
        "step. Only the tensors that the trace has seen count.</p>"
    )


def _memory_row(scene: Scene, rank: int, percent: float) -> str:
    colour = rank % COLOURS
    return (
        f'<tr><th scope="row"><span class="swatch r{colour}">{rank}</span></th>'
        f'<td class="held"><div class="bar"><i class="b{colour}" style="width:{percent:.1f}%">'
        f'</i></div></td><td class="number">{scene.held[rank]:,}</td>'
        f'<td class="number">{_sent(scene, rank)}</td></tr>'
    )


def _sent(scene: Scene, rank: int) -> str:
    action = scene.actions[rank]
    return f"{action.first.sent_bytes:,}" if action and scene.is_collective else "-"


def _all_sent(scene: Scene) -> str:
    sent = sum(action.first.sent_bytes for action in scene.actions if action is not None)
    return f"{sent:,}" if sent else "-"


def _all_steps(view: StepView) -> str:
    rows = "".join(
        f'<tr><td><a href="#step-{scene.number}">{scene.number}</a></td>'
        f'<td class="{scene.phase}">{scene.phase}</td><td>{escape(scene.title)}</td>'
        f"<td>{_all_sent(scene)}</td></tr>"
        for scene in view.scenes
    )
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("step", "phase", "what", "bytes sent")
    )
    return (
        "<details><summary>All steps</summary>"
        '<table class="steps"><caption class="unseen">All steps</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></details>"
    )


def _arrow_drawing(arrows: Sequence[Arrow], degree: int) -> str:
    """A collective as an SVG: above what each rank sends, below who gets it; then as a list."""
    stages = sorted({arrow.stage for arrow in arrows})
    width, height = _LEFT + degree * _LANE, _y(len(stages)) + _ROW + 4
    drawn = "".join(
        part
        for level, stage in enumerate(stages)
        for arrow in arrows
        if arrow.stage == stage
        for part in [_line(arrow, level)]
    )
    for level in range(len(stages) + 1):
        stage = stages[level] if level < len(stages) else None
        drawn += "".join(
            _box(rank, level, _sent_bytes(arrows, rank, stage)) for rank in range(degree)
        )
    if len(stages) > 1:
        drawn += "".join(
            f'<text x="8" y="{_y(level) + _ROW + _GAP / 2 + 5}">{stage}</text>'
            for level, stage in enumerate(stages)
        )
    lists = _arrow_lists(arrows, is_brief=degree > MOST_ARROWS)
    if degree > MOST_ARROWS:
        each = _arrow_lists(arrows, is_brief=False)
        lists += f"<details><summary>Each arrow</summary>{each}</details>"
    return (
        '<div class="arrows"><div class="scroll" data-label="Arrows">'
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'aria-hidden="true">{drawn}</svg></div>{lists}</div>'
    )


def _arrow_lists(arrows: Sequence[Arrow], *, is_brief: bool) -> str:
    """The pieces that are sent, as lists, a list for each stage."""
    written = ""
    stages = sorted({arrow.stage for arrow in arrows})
    for stage in stages:
        sentences = arrow_sentences([a for a in arrows if a.stage == stage], is_brief=is_brief)
        items = "".join(
            f"<li>rank {arrow.sender} to {escape(text)}</li>" for arrow, text in sentences
        )
        head = f"<p>{stage}. {STAGES[stage - 1]}</p>" if len(stages) > 1 else ""
        written += f"{head}<ul>{items}</ul>"
    return written


def _sent_bytes(arrows: Sequence[Arrow], rank: int, stage: int | None) -> int:
    return sum(a.num_bytes for a in arrows if a.sender == rank and a.stage == stage)


def _line(arrow: Arrow, level: int) -> str:
    start_y, end_y = _y(level) + _ROW, _y(level + 1) - 1
    start_x = _middle(arrow.sender)
    # Side by side at the receiver, in the order of the senders.
    end_x = _middle(arrow.receiver) + (10 if arrow.sender > arrow.receiver else -10)
    length = ((end_x - start_x) ** 2 + (end_y - start_y) ** 2) ** 0.5
    along_x, along_y = (end_x - start_x) / length, (end_y - start_y) / length
    base_x, base_y = end_x - _HEAD * along_x, end_y - _HEAD * along_y
    points = " ".join(
        f"{x:.1f},{y:.1f}"
        for x, y in (
            (end_x, end_y),
            (base_x - 4 * along_y, base_y + 4 * along_x),
            (base_x + 4 * along_y, base_y - 4 * along_x),
        )
    )
    return (
        f'<g class="s{arrow.sender % COLOURS}">'
        f'<line x1="{start_x}" y1="{start_y}" x2="{base_x:.1f}" y2="{base_y:.1f}"/>'
        f'<polygon points="{points}"/></g>'
    )


def _box(rank: int, level: int, sent: int) -> str:
    x, y, kind = _middle(rank) - _BOX / 2, _y(level), f"r{rank % COLOURS}"
    middle, name_y = _middle(rank), y + (15 if sent else 22)
    label = f'<text x="{middle}" y="{y + 30}">{sent:,} bytes</text>' if sent else ""
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{_BOX}" height="{_ROW}" rx="4"/>'
        f'<text x="{middle}" y="{name_y}">rank {rank}</text>{label}'
    )


def _middle(rank: int) -> float:
    return _LEFT + rank * _LANE + _LANE / 2


def _y(level: int) -> int:
    """The top of a row of boxes."""
    return _TOP + level * (_ROW + _GAP)
