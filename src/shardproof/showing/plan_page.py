"""A plan as one page of HTML: the model as a tree, each parameter as a bar of its owners.

It needs nothing else, like the page of a step (`showing.page`), whose colours and head it has.
Everything is written into the page beforehand. Without a script all modules can still be opened
and closed, and on paper all are open.
"""

from collections.abc import Iterator, Sequence
from html import escape

from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.plan_text import size
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.showing.page import COLOURS, document, paragraphs, rank_swatches
from shardproof.showing.plan_tree import Bar, Node, Run, num_parameters, tree_of
from shardproof.wording import run_words

MOST_PIECES = 300  # of one bar; beyond, each piece shows the owner of its first index
_ARROWS = {"forward": "forward", "backward": "backward", "bad": ""}


def plan_page(plan: ModelPlan | WatchedPlan, *, batch: int, length: int, source: str = "") -> str:
    """The page.

    Args:
        plan: the plan.
        batch: rows of a step; of a watched plan the inputs say it.
        length: tokens of a row.
        source: what was planned, as a user wrote it.
    """
    title = f"{plan.model} at degree {plan.degree}"
    root = tree_of(plan, batch=batch, length=length)
    sentences = list(plan.totals())
    if isinstance(plan, ModelPlan):
        sentences.append(f"The counts are those of a training step of {batch} x {length} tokens.")
    about = [f"{source}, {plan.scheme.leaves} leaves" if source else f"{plan.scheme.leaves} leaves"]
    notes = "".join(f"<li>{escape(line)}</li>" for line in sentences)
    return document(
        title,
        f"""<header>
<h1>{escape(title)}</h1>
{paragraphs(about)}
{_legend(plan.degree)}
</header>
<main>
{_ranks(plan, batch, length)}
<div class="tools"><button type="button" id="open">Open all</button>
<button type="button" id="close">Close all</button>
<span class="hint quiet">Keys: up, down, left, right</span></div>
<div class="tree" id="tree">
{_inside(root, "the model")}</div>
<section class="told"><h2>In words</h2><ul>{notes}</ul></section>
</main>
""",
        styles=("page.css", "plan_page.css"),
        script="plan_page.js",
    )


def _legend(degree: int) -> str:
    words = (
        '<li><span class="swatch copy s0">&nbsp;</span>held, and owned by another rank</li>'
        '<li><span class="swatch all">&nbsp;</span>whole on every rank</li>'
        '<li><span class="swatch block">&nbsp;</span>a block of a fused weight begins</li>'
    )
    return f'<ul class="legend" aria-label="Legend">{rank_swatches(degree)}{words}</ul>'


def _ranks(plan: ModelPlan | WatchedPlan, batch: int, length: int) -> str:
    """The table of the bytes that each rank holds and sends."""
    held = plan.held_bytes
    most = max(1, *held)
    rows = []
    for rank in range(plan.degree):
        counts = (
            plan.comm(rank=rank)
            if isinstance(plan, WatchedPlan)
            else plan.comm(batch=batch, length=length, rank=rank)
        )
        sent = sum(each["sent_bytes"] for kinds in counts.values() for each in kinds.values())
        colour = rank % COLOURS
        rows.append(
            f'<tr><th scope="row"><span class="swatch r{colour}">{rank}</span></th>'
            f'<td class="held"><div class="bar"><i class="b{colour}" '
            f'style="width:{100 * held[rank] / most:.1f}%"></i></div></td>'
            f'<td class="number">{size(held[rank])}</td><td class="number">{size(sent)}</td></tr>'
        )
    return (
        '<table class="ranks"><caption class="unseen">What each rank holds and sends</caption>'
        '<thead><tr><th scope="col">rank</th><th scope="col" colspan="2">parameters held</th>'
        f'<th scope="col">sent in a step</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _inside(node: Node, name: str) -> str:
    """A module that can be closed, with its parameters and children."""
    alike = f'<span class="times">{node.count} alike, one is shown</span>' if node.count > 1 else ""
    counts = num_parameters(node)
    counted = ", ".join(f"{number} {word}" for word, number in counts.items() if number)
    each = ", each" if node.count > 1 else ""
    notes = "".join(
        f'<span class="chip {note.kind}">'
        f"{escape(f'{_ARROWS[note.kind]} {note.words}{each}'.strip())}</span>"
        for note in node.notes
    )
    bars = "".join(_bar(bar) for bar in node.bars)
    children = "".join(_inside(child, child.name) for child in node.children)
    return (
        f'<details open><summary><span class="name">{escape(name)}</span>{alike}'
        f'<span class="quiet">{counted}</span>{notes}</summary>\n'
        f'<div class="inside">{bars}{children}</div></details>\n'
    )


def _bar(bar: Bar) -> str:
    shape = "x".join(map(str, bar.shape)) or "scalar"
    if bar.dim is None:
        why = escape(bar.how)
        return (
            f'<div class="row whole"><div class="what"><code>{escape(bar.name)}</code> '
            f'<span class="quiet">{shape}</span></div><div class="bars"><div class="own all" '
            f'role="img" aria-label="whole on every rank" title="{why}"></div></div>'
            f'<p class="quiet">whole: {why}</p></div>\n'
        )
    extent = bar.shape[bar.dim]
    idle = ""
    if bar.idle:
        word = f"rank{'s' if bar.idle[1:] else ''} {', '.join(run_words(bar.idle))} idle"
        idle = f' <span class="bad">{word}</span>'
    ticks = "".join(
        f'<b style="left:{100 * start / extent:.3f}%"></b>'
        for start in (bar.starts if len(bar.starts) <= MOST_PIECES else ())
    )
    lanes = "".join(_lanes(bar, extent)) if any(bar.copied) else ""
    return (
        f'<div class="row"><div class="what"><code>{escape(bar.name)}</code> '
        f'<span class="quiet">{shape}, dim {bar.dim}, {escape(bar.how)}</span>{idle}</div>'
        f'<div class="bars"><div class="own" role="img" aria-label="{_owners(bar)}" '
        f'title="{_owners(bar)}">{"".join(_pieces(bar, extent))}{ticks}</div>{lanes}</div>'
        f'<p class="quiet">on a rank: {_shapes(bar)}</p></div>\n'
    )


def _pieces(bar: Bar, extent: int) -> Iterator[str]:
    """One element for every run of one owner, in order."""
    runs = sorted((run, rank) for rank, owned in enumerate(bar.owned) for run in owned)
    if len(runs) > MOST_PIECES:
        runs = _sampled(runs, extent)
    for (start, stop), rank in runs:
        share = 100 * (stop - start) / extent
        number = str(rank) if share >= 2.5 else ""
        yield f'<i class="r{rank % COLOURS}" style="flex:{stop - start} 0 0">{number}</i>'


def _sampled(runs: Sequence[tuple[Run, int]], extent: int) -> list[tuple[Run, int]]:
    """At most MOST_PIECES pieces, each with the owner of its first index."""
    pieces, place = [], 0
    for piece in range(MOST_PIECES):
        start, stop = piece * extent // MOST_PIECES, (piece + 1) * extent // MOST_PIECES
        while runs[place][0][1] <= start:
            place += 1
        if stop > start:
            pieces.append(((start, stop), runs[place][1]))
    return pieces


def _lanes(bar: Bar, extent: int) -> Iterator[str]:
    """A thin line for each rank: what it owns solid, its copies hatched."""
    for rank, (owned, copied) in enumerate(zip(bar.owned, bar.copied, strict=True)):
        colour = rank % COLOURS
        parts = [(run, f"b{colour}") for run in owned]
        parts += [(run, f"copy s{colour}") for run in copied]
        drawn = "".join(
            f'<i class="{kind}" style="left:{100 * start / extent:.3f}%;'
            f'width:{100 * (stop - start) / extent:.3f}%"></i>'
            for (start, stop), kind in sorted(parts)[:MOST_PIECES]
        )
        yield f'<div class="lane" title="{_held(rank, owned, copied)}">{drawn}</div>'


def _held(rank: int, owned: Sequence[Run], copied: Sequence[Run]) -> str:
    also = f"; also holds {_spans(copied)}" if copied else ""
    return f"rank {rank} owns {_spans(owned) or 'nothing'}{also}"


def _owners(bar: Bar) -> str:
    return "; ".join(
        _held(rank, owned, copied)
        for rank, (owned, copied) in enumerate(zip(bar.owned, bar.copied, strict=True))
    )


def _spans(runs: Sequence[Run], most: int = 4) -> str:
    """Runs of indices in words."""
    words = [f"{start}-{stop - 1}" if stop - start > 1 else str(start) for start, stop in runs]
    more = f" and {len(words) - most} more runs" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _shapes(bar: Bar) -> str:
    """The shapes on the ranks; ranks with the same shape share an entry."""
    ranks_of: dict[str, list[int]] = {}
    for rank, shape in enumerate(bar.held):
        ranks_of.setdefault("x".join(map(str, shape)), []).append(rank)
    if len(ranks_of) == 1:
        return next(iter(ranks_of))
    return "; ".join(
        f"{shape} on {', '.join(run_words(ranks))}" for shape, ranks in ranks_of.items()
    )
