"""Draws docs/tree.svg: the canonical tree over 8 leaves, and who adds what at degrees 2 and 3.

Drawn from the package's own `tree` and `leaves`, so that the picture cannot differ from the code:
python docs/draw_tree.py
"""

from pathlib import Path

from shardproof.leaves import Cut
from shardproof.tree import Node, children, nodes_of_run

LEAVES = 8
STEP, RISE, RADIUS = 52, 58, 17
COLOURS = ("#4477aa", "#ee6677", "#228833")
PANEL = LEAVES * STEP + 40


def place(node: Node) -> tuple[float, float]:
    """Middle of a node in its panel."""
    start, stop = node
    level = (stop - start - 1).bit_length()
    return 30 + (start + stop - 1) / 2 * STEP + STEP / 4, 60 + (3 - level) * RISE


def all_nodes(node: Node) -> list[Node]:
    """A node and everything below it."""
    if node[1] - node[0] == 1:
        return [node]
    left, right = children(node)
    return [node, *all_nodes(left), *all_nodes(right)]


def panel(degree: int, left: float) -> list[str]:
    """One tree, with each rank's share coloured and the nodes that it sends ringed."""
    cut = Cut(LEAVES, LEAVES, degree)
    sent = {node: rank for rank in range(degree) for node in nodes_of_run(LEAVES, cut.run(rank))}
    owner = {low: rank for node, rank in sent.items() for low in all_nodes(node)}
    title = f"degree {degree}"
    lines = [f'<text x="{left + PANEL / 2:.0f}" y="26" class="title">{title}</text>']
    for node in all_nodes((0, LEAVES)):
        if node[1] - node[0] > 1:
            lines += [edge(node, child, left) for child in children(node)]
    for node in all_nodes((0, LEAVES)):
        x, y = place(node)
        colour = COLOURS[owner[node]] if node in owner else "#ffffff"
        ring = ' stroke="#222222" stroke-width="3"' if node in sent else ' stroke="#999999"'
        lines.append(
            f'<circle cx="{left + x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{colour}"{ring}/>'
        )
        label = "".join(map(str, range(*node))) if node[1] - node[0] < 5 else "0..7"
        shade = "light" if node in owner else "dark"
        lines.append(f'<text x="{left + x:.1f}" y="{y + 4:.1f}" class="{shade}">{label}</text>')
    for rank in range(degree):
        names = " and ".join("".join(map(str, range(*n))) for n, r in sent.items() if r == rank)
        y = 60 + 3 * RISE + 44 + 20 * rank
        text = f"rank {rank} adds its leaves and sends {names}"
        lines.append(
            f'<rect x="{left + 44:.0f}" y="{y - 11}" width="12" height="12" fill="'
            f'{COLOURS[rank]}"/>'
        )
        lines.append(f'<text x="{left + 64:.0f}" y="{y}" class="legend">{text}</text>')
    return lines


def edge(node: Node, child: Node, left: float) -> str:
    """A line from a node to one of the two that it adds."""
    (x1, y1), (x2, y2) = place(node), place(child)
    return (
        f'<line x1="{left + x1:.1f}" y1="{y1:.1f}" x2="{left + x2:.1f}" y2="{y2:.1f}" '
        'stroke="#999999"/>'
    )


def draw() -> str:
    """The whole picture."""
    height = 60 + 3 * RISE + 44 + 60
    style = (
        "text{font-family:Helvetica,Arial,sans-serif;font-size:11px}"
        ".title{font-size:15px;text-anchor:middle}.legend{font-size:12px}"
        ".light{fill:#ffffff;text-anchor:middle}.dark{fill:#222222;text-anchor:middle}"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * PANEL} {height}" role="img" '
        'aria-label="The same additions at degree 2 and degree 3">',
        f"<style>{style}</style>",
        f'<rect width="{2 * PANEL}" height="{height}" fill="#ffffff"/>',
        *panel(2, 0),
        *panel(3, PANEL),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("tree.svg").write_text(draw(), encoding="utf-8")
