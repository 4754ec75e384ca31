"""A collective as arrows: above what each rank sends, below who gets it."""

from collections.abc import Sequence
from html import escape

from shardproof.showing.sends import MOST_ARROWS, STAGES, Arrow, told_arrows

_LANE, _BOX, _ROW = 104, 92, 36  # width for a rank, width and height of its box
_LEFT, _TOP, _GAP = 18, 4, 58  # the room for a stage's number, above, and between two rows
_HEAD = 7  # length of an arrow's head


def drawing(arrows: Sequence[Arrow], degree: int, *, num_colours: int) -> str:
    """An SVG with a line for every sender and receiver, and the same as a list.

    Args:
        arrows: of one collective.
        degree: how many ranks.
        num_colours: after which the colours begin again.
    """
    stages = sorted({arrow.stage for arrow in arrows})
    width, height = _LEFT + degree * _LANE, _y(len(stages)) + _ROW + 4
    drawn = "".join(
        part
        for level, stage in enumerate(stages)
        for arrow in arrows
        if arrow.stage == stage
        for part in [_line(arrow, level, num_colours)]
    )
    for level in range(len(stages) + 1):
        stage = stages[level] if level < len(stages) else None
        drawn += "".join(
            _box(rank, level, _sent(arrows, rank, stage), num_colours) for rank in range(degree)
        )
    if len(stages) > 1:
        drawn += "".join(
            f'<text x="8" y="{_y(level) + _ROW + _GAP / 2 + 5}">{stage}</text>'
            for level, stage in enumerate(stages)
        )
    lists = _lists(arrows, is_brief=degree > MOST_ARROWS)
    if degree > MOST_ARROWS:
        lists += f"<details><summary>Each arrow</summary>{_lists(arrows, is_brief=False)}</details>"
    return (
        '<div class="arrows"><div class="scroll" data-label="Arrows">'
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'aria-hidden="true">{drawn}</svg></div>{lists}</div>'
    )


def _lists(arrows: Sequence[Arrow], *, is_brief: bool) -> str:
    """What travels, in words, stage by stage."""
    written = ""
    stages = sorted({arrow.stage for arrow in arrows})
    for stage in stages:
        told = told_arrows([a for a in arrows if a.stage == stage], is_brief=is_brief)
        items = "".join(f"<li>rank {arrow.sender} to {escape(text)}</li>" for arrow, text in told)
        head = f"<p>{stage}. {STAGES[stage - 1]}</p>" if len(stages) > 1 else ""
        written += f"{head}<ul>{items}</ul>"
    return written


def _sent(arrows: Sequence[Arrow], rank: int, stage: int | None) -> int:
    return sum(a.num_bytes for a in arrows if a.sender == rank and a.stage == stage)


def _line(arrow: Arrow, level: int, num_colours: int) -> str:
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
        f'<g class="s{arrow.sender % num_colours}">'
        f'<line x1="{start_x}" y1="{start_y}" x2="{base_x:.1f}" y2="{base_y:.1f}"/>'
        f'<polygon points="{points}"/></g>'
    )


def _box(rank: int, level: int, sent: int, num_colours: int) -> str:
    x, y, kind = _middle(rank) - _BOX / 2, _y(level), f"r{rank % num_colours}"
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
