"""A story as one page of HTML that needs nothing else: no network, no fonts, no other file.

Everything is written into the page beforehand; its script only chooses what is seen. Without a
script, and on paper, all scenes stand one below the other. What comes from a user is escaped.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path

from shardproof.showing.arrows import drawing
from shardproof.showing.figure import Figure
from shardproof.showing.grids import EVERY, Grid, Line, grids_of
from shardproof.showing.story import Scene, Story
from shardproof.showing.words import lying, placed

COLOURS = 8  # of ranks; further ranks begin again, and their numbers tell them apart
MOST_LINES, FEW_LINES = (12, 20), (6, 6)  # rows and columns of a grid
MOST_BESIDE = 3  # ranks, of which the arrows fit between the matrices
MANY_SCENES = 60  # from which on grids are drawn with few lines

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page_of(story: Story) -> str:
    """The page."""
    lines = MOST_LINES if len(story.scenes) < MANY_SCENES else FEW_LINES
    scenes = "\n".join(_scene(scene, story, lines) for scene in story.scenes)
    return document(
        story.title,
        f"""<header>
<h1>{escape(story.title)}</h1>
{paragraphs(story.about)}
{paragraphs(story.omissions, "bad")}
{_legend(story)}
</header>
{_player(story)}
<p id="live" class="unseen" aria-live="polite"></p>
<main>
{scenes}
</main>
{_all_steps(story)}
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


def _legend(story: Story) -> str:
    items = rank_swatches(story.degree)
    words = (
        '<li><span class="swatch all">all</span>the same on every rank</li>'
        "<li>Partial: each rank has a summand, and the tensor is their sum</li>"
        "<li>leaf: one of the parts into which a summed dim is cut, the same at every degree</li>"
    )
    return f'<ul class="legend" aria-label="Legend">{items}{words}</ul>'


def _player(story: Story) -> str:
    counts: dict[str, int] = {}
    for scene in story.scenes:
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
<input type="range" id="slider" min="1" max="{max(1, len(story.scenes))}" value="1">
<div class="track" aria-hidden="true">{track}</div>
</nav>
<noscript><p>Scripts are off: all steps stand one below the other.</p></noscript>"""


def _scene(scene: Scene, story: Story, lines: tuple[int, int]) -> str:
    meets = " meets" if scene.is_collective else ""
    num_arrows = len(scene.arrows)
    formula = f"<p><code>{escape(scene.formula)}</code></p>" if scene.formula else ""
    read = [figure for figure in scene.figures if not figure.is_result]
    made = [figure for figure in scene.figures if figure.is_result]
    words = ("Before", "After") if scene.is_collective else ("Read", "Made")
    lines = (min(lines[0], FEW_LINES[0]), lines[1]) if scene.is_collective else lines
    arrows = drawing(scene.arrows, story.degree, num_colours=COLOURS) if scene.arrows else ""
    beside = " beside" if arrows and story.degree <= MOST_BESIDE else ""
    drawn = (_group(words[0], read, lines), arrows, _group(words[1], made, lines))
    number = scene.number
    return f"""<section class="scene{meets}" id="step-{number}" data-phase="{scene.phase}" \
data-arrows="{num_arrows}" aria-labelledby="title-{number}">
<h2 id="title-{number}">Step {number}, <span class="phase {scene.phase}">{scene.phase}</span>: \
{escape(scene.title)}</h2>
{formula}
<p class="told">{escape(" ".join(scene.told))}</p>
<div class="parts{beside}">
<div class="drawn">
{"".join(drawn)}
</div>
<div class="memory">{_memory(scene, story)}</div>
</div>
</section>"""


def _group(word: str, figures: Sequence[Figure], lines: tuple[int, int]) -> str:
    if not figures:
        return ""
    drawn = "".join(_figure(each, lines) for each in figures)
    return f'<div class="group"><h3>{word}</h3>{drawn}</div>'


def _figure(figure: Figure, lines: tuple[int, int]) -> str:
    grids = grids_of(figure, most_rows=lines[0], most_columns=lines[1])
    tables = "".join(_table(grid, figure) for grid in grids)
    part = ", a part of it" if any(grid.is_part for grid in grids) else ""
    bad = f' <span class="bad">{escape(lying(figure))}</span>' if figure.is_broken else ""
    return (
        f"<figure><figcaption><strong>{escape(figure.name)}</strong> {figure.shape} "
        f'<span class="quiet">{escape(placed(figure))}{part}</span>{bad}</figcaption>'
        f'<div class="grids">{tables}</div></figure>\n'
    )


def _table(grid: Grid, figure: Figure) -> str:
    """A table with the index of every row and column, and above or before them its rank."""
    name = escape(f"{figure.name}, {grid.label}" if grid.label else figure.name)
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
    return "" if owner is EVERY else f"rank {owner}" if count > 1 else f"r{owner}"


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
        written = []
        for column, cell in enumerate(cells):
            rank = grid.owner_of(place, column)
            kinds = "all" if rank is EVERY else f"r{rank % COLOURS}"
            kinds += " edge-left" if column in column_edges and column else ""
            written.append(f'<td class="{kinds}">{escape(cell)}</td>')
        edge = ' class="edge-top"' if place in row_edges and place else ""
        yield f'<tr{edge}>{owner}<th scope="row">{row.head}</th>{"".join(written)}</tr>'


def _runs(lines: Sequence[Line]) -> Iterator[tuple[int | None, int]]:
    for start, count in _starts_and_counts(lines):
        yield lines[start].owner, count


def _starts_and_counts(lines: Sequence[Line]) -> list[tuple[int, int]]:
    starts = [*sorted(_starts(lines)), len(lines)]
    return [(start, end - start) for start, end in pairwise(starts)]


def _starts(lines: Sequence[Line]) -> set[int]:
    return {
        place
        for place, line in enumerate(lines)
        if place == 0 or line.owner != lines[place - 1].owner
    }


def _memory(scene: Scene, story: Story) -> str:
    most = max(1, story.most_held)
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
    moment = scene.moments[rank]
    return f"{moment.first.sent_bytes:,}" if moment and scene.is_collective else "-"


def _all_sent(scene: Scene) -> str:
    sent = sum(moment.first.sent_bytes for moment in scene.moments if moment is not None)
    return f"{sent:,}" if sent else "-"


def _all_steps(story: Story) -> str:
    rows = "".join(
        f'<tr><td><a href="#step-{scene.number}">{scene.number}</a></td>'
        f'<td class="{scene.phase}">{scene.phase}</td><td>{escape(scene.title)}</td>'
        f"<td>{_all_sent(scene)}</td></tr>"
        for scene in story.scenes
    )
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("step", "phase", "what", "bytes sent")
    )
    return (
        "<details><summary>All steps</summary>"
        '<table class="steps"><caption class="unseen">All steps</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></details>"
    )
