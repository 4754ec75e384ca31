"""A collective as arrows: above what each rank sends, below who gets it."""

from collections.abc import Iterator, Sequence
from html import escape

from shardproof.showing.story import Arrow
from shardproof.showing.words import ranks

_LANE, _BOX, _ROW = 112, 72, 24  # width for a rank, width and height of its box
_TOP, _BOTTOM = 22, 104
_HEAD = 7  # length of an arrow's head


def drawing(arrows: Sequence[Arrow], degree: int, num_colours: int) -> str:
    """An SVG with a line for every sender and receiver, and the same as a list.

    Args:
        arrows: of one collective.
        degree: how many ranks.
        num_colours: after which the colours begin again.
    """
    width, height = degree * _LANE, _BOTTOM + _ROW + 4
    said = "; ".join(_said(arrow) for arrow in arrows)
    sent = {arrow.sender: arrow.num_bytes for arrow in arrows}
    lines = "".join(part for arrow in arrows for part in _lines(arrow, num_colours))
    boxes = "".join(_boxes(rank, sent.get(rank), num_colours) for rank in range(degree))
    items = "".join(f"<li>{escape(_said(arrow))}</li>" for arrow in arrows)
    return (
        '<div class="arrows"><div class="scroll" role="region" tabindex="0" aria-label="Arrows">'
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(said)}">{lines}{boxes}</svg></div><ul>{items}</ul></div>'
    )


def _said(arrow: Arrow) -> str:
    carried = " and ".join(f"{name} {shape}" for name, shape in arrow.carried)
    return f"rank {arrow.sender} to {ranks(arrow.receivers)}: {carried}, {arrow.num_bytes:,} bytes"


def _lines(arrow: Arrow, num_colours: int) -> Iterator[str]:
    start_y, end_y = _TOP + _ROW, _BOTTOM - 1
    for receiver in arrow.receivers:
        start_x = _middle(arrow.sender)
        # Side by side at the receiver, in the order of the senders.
        end_x = _middle(receiver) + (10 if arrow.sender > receiver else -10)
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
        yield (
            f'<g class="s{arrow.sender % num_colours}">'
            f'<line x1="{start_x}" y1="{start_y}" x2="{base_x:.1f}" y2="{base_y:.1f}"/>'
            f'<polygon points="{points}"/></g>'
        )


def _boxes(rank: int, sent: int | None, num_colours: int) -> str:
    x, kind = _middle(rank) - _BOX / 2, f"r{rank % num_colours}"
    label = "" if sent is None else f"{sent:,} bytes"
    return f'<text x="{_middle(rank)}" y="{_TOP - 7}">{label}</text>' + "".join(
        f'<rect class="{kind}" x="{x}" y="{y}" width="{_BOX}" height="{_ROW}" rx="4"/>'
        f'<text x="{_middle(rank)}" y="{y + 16}">rank {rank}</text>'
        for y in (_TOP, _BOTTOM)
    )


def _middle(rank: int) -> float:
    return rank * _LANE + _LANE / 2
