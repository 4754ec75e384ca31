"""Makes every mistake of the gallery, and writes what came of it.

    python docs/draw_mistakes.py

Writes docs/mistakes/NAME.svg for each, and what stands between the marks in docs/mistakes.md. Exit
code 1 if the prover does not name a mistake as the gallery says.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from drawing import box, page, style, text

from shardproof.cli.break_ import bounds
from shardproof.mistakes import CHAPTERS, Mistake, all_mistakes
from shardproof.mistakes.outcome import Outcome, amount, make
from shardproof.prover.case_report import TensorReport

PAGE = Path(__file__).with_name("mistakes.md")
PICTURES = Path(__file__).with_name("mistakes")
BEGIN, END = "<!-- written by draw_mistakes.py -->\n", "<!-- until here -->\n"

WIDTH, MARGIN = 480, 56
STRIP, CELL = 62, 18  # where the cells stand, and how high they are
TOP, BOTTOM = 128, 262  # of the curves
HEIGHT = 312
SIZES = {"label": 14, "small": 13, "name": 14}
RIGHT, ROUNDED, WRONG = "is-right", "is-rounded", "is-wrong"  # classes of cells

# What a class is filled or drawn with, in light and in dark. Cells differ in lightness, too.
FILLS = {
    RIGHT: ("#b7dcc5", "#1f4d31"),
    ROUNDED: ("#e0a030", "#b5811f"),
    WRONG: ("#b3203a", "#ff8492"),
    "mark": ("#c8334c", "#ff8492"),
    "text.name": ("#c8334c", "#ff8492"),
    "text.small": ("#555555", "#a8b1bb"),
}
STROKES = {
    "axis": ("#999999", "#6b747e"),
    "right": ("#2f7d4f", "#5fc489"),
    "wrong": ("#c8334c", "#ff8492"),
}
LINES = (
    ".end{text-anchor:end}polyline{fill:none}.right{stroke-width:5;stroke-opacity:.55}"
    ".wrong{stroke-width:2.5;stroke-dasharray:7 3}"
)
PHASES = ("start", "forward", "backward", "update")


def phase_of(name: str, seen: str) -> str:
    """In which part of the step a tensor is recorded, `seen` being that of the one before."""
    if name.endswith(" (initial)"):
        return "start"
    if name.endswith(".grad") or name == "grad_norm":
        return "backward"
    return "forward" if seen in ("start", "forward") else "update"


def class_of(tensor: TensorReport) -> str:
    """Right, wrong by rounding alone, or wrong."""
    if tensor.identical and tensor.agrees:
        return RIGHT
    is_small = tensor.torch is not None and tensor.torch.max_abs_diff and tensor.agrees
    return ROUNDED if is_small else WRONG


def strip(outcome: Outcome) -> Iterator[str]:
    """A cell for every tensor of the step, in the order of the step."""
    tensors = outcome.case.tensors if outcome.case is not None else ()
    phases: list[str] = []
    for tensor in tensors:
        phases.append(phase_of(tensor.name, phases[-1] if phases else "start"))
    gap = 10
    width = (WIDTH - 2 * 14 - gap * (len(PHASES) - 1)) / len(tensors)
    yield text(14, 18, "every tensor of the first step, in its order", "label")
    named = outcome.first.name if outcome.first is not None else None
    for place, (tensor, phase) in enumerate(zip(tensors, phases, strict=True)):
        x = 14 + place * width + gap * PHASES.index(phase)
        if place == 0 or phases[place - 1] != phase:
            if phase == "forward":  # of few cells: its name ends where they end
                last = x + width * phases.count(phase) - 2
                yield text(round(last, 1), STRIP - 8, phase, "small end")
            else:
                yield text(round(x, 1), STRIP - 8, phase, "small")
        cell = box(round(x, 1), STRIP, round(max(width - 2, 1), 1), CELL, class_of(tensor))
        yield f"<g><title>{escape(tensor.name)}</title>{cell}</g>"
        if tensor.name == named:
            middle = x + width / 2 - 1
            classes = "name bold" if middle < WIDTH / 2 else "name bold end"
            yield (f'<path d="M{middle:.1f} {STRIP + CELL + 3} l5 8 h-10 z" class="mark"/>')
            yield text(round(middle, 1), STRIP + CELL + 25, tensor.name, classes)
    if named is None:
        words = "no number is wrong: a rank allocates too much memory"
        yield text(14, STRIP + CELL + 22, words, "name bold")


def curves(outcome: Outcome) -> Iterator[str]:
    """The right losses, and those with the mistake."""
    right, wrong = outcome.right, outcome.wrong
    low, high = bounds(right, wrong)
    step = (WIDTH - MARGIN - 20) / (len(right) - 1)

    def points(losses: Sequence[float]) -> str:
        seen = [(at, loss) for at, loss in enumerate(losses) if math.isfinite(loss)]
        return " ".join(
            f"{MARGIN + step * at:.1f},"
            f"{BOTTOM - (BOTTOM - TOP) * (min(loss, high) - low) / (high - low):.1f}"
            for at, loss in seen
        )

    ground = BOTTOM - (BOTTOM - TOP) * (0.0 - low) / (high - low)
    yield f'<line x1="{MARGIN}" y1="{TOP}" x2="{MARGIN}" y2="{BOTTOM}" class="axis"/>'
    yield (
        f'<line x1="{MARGIN}" y1="{ground:.1f}" x2="{WIDTH - 14}" y2="{ground:.1f}" class="axis"/>'
    )
    yield text(MARGIN - 6, TOP + 5, amount(high), "small end")
    yield text(MARGIN - 6, round(ground + 5, 1), "0", "small end")
    yield f'<polyline points="{points(right)}" class="right"/>'
    yield f'<polyline points="{points(wrong)}" class="wrong"/>'
    y = BOTTOM + 34
    yield f'<line x1="14" y1="{y - 5}" x2="38" y2="{y - 5}" class="right"/>'
    yield text(44, y, "right", "label")
    yield f'<line x1="100" y1="{y - 5}" x2="124" y2="{y - 5}" class="wrong"/>'
    yield text(130, y, f"wrong, degree {outcome.degrees[-1]}", "label")
    yield text(WIDTH - 14, y, f"loss of {len(right)} steps", "label end")


def colours() -> str:
    """The style sheet of what drawing.py does not have."""
    rules = {"": LINES, "dark": ""}
    for table, what in ((FILLS, "fill"), (STROKES, "stroke")):
        for name, (light, dark) in table.items():
            selector = name if name.startswith("text") else f".{name}"
            rules[""] += f"{selector}{{{what}:{light}}}"
            rules["dark"] += f"{selector}{{{what}:{dark}}}"
    return f"<style>{rules['']}@media(prefers-color-scheme:dark){{{rules['dark']}}}</style>"


def picture(outcome: Outcome) -> str:
    """One mistake as SVG."""
    description = (
        f"First tensor that differs: {outcome.difference}; loss right from "
        f"{amount(outcome.right[0])} to {amount(outcome.right[-1])}, wrong from "
        f"{amount(outcome.wrong[0])} to {amount(outcome.wrong[-1])}"
    )
    parts = [style(SIZES), colours(), box(0, 0, WIDTH, HEIGHT, "page")]
    parts += [*strip(outcome), *curves(outcome)]
    return page(WIDTH, HEIGHT, outcome.mistake.name, description, parts)


def row(outcome: Outcome) -> str:
    """One line of the table."""
    name = outcome.mistake.name
    losses = f"{amount(outcome.right[-1])} | {amount(outcome.wrong[-1])}"
    return f"| [{name}](#{name}) | {outcome.difference} | {losses} |"


def section(outcome: Outcome) -> Iterator[str]:
    """What is said of one mistake."""
    mistake = outcome.mistake
    yield from (f"### {mistake.name}", "", mistake.title)
    if mistake.sighting:
        yield f"Seen in: {mistake.sighting}."
    yield from ("", f"In `{mistake.edit.file}`, `{mistake.edit.plain.__qualname__}`:", "")
    yield "```diff"
    yield from (f"- {line}" for line in mistake.edit.right.splitlines())
    yield from (f"+ {line}" for line in mistake.edit.wrong.splitlines())
    yield "```"
    yield from ("", f"![{mistake.name}]({PICTURES.name}/{mistake.name}.svg)", "")
    yield f"**First tensor that differs:** {outcome.difference}."
    yield from ("", f"**Why.** {mistake.why}", "")
    yield f"**The prover says** (`{mistake.setup.name}`: {mistake.setup.description}):"
    yield from ("", f"> {outcome.verdict}", "")
    if mistake.hidden_at:
        yield f"At degrees {' and '.join(map(str, mistake.hidden_at))} nothing shows."
        yield ""
    if outcome.stopped:
        what = outcome.stopped.split(", which must")[0].split(" on ")[0]
        yield f"Outside of the prover shardproof itself stops at the next exchange: *{what}*."
        yield ""


def written(outcomes: Mapping[str, Outcome]) -> str:
    """What stands between the marks."""
    lines = [
        "    python docs/draw_mistakes.py",
        "",
        "| mistake | first tensor that differs | last loss, right | last loss, wrong |",
        "|---|---|---|---|",
        *(row(outcome) for outcome in outcomes.values()),
        "",
    ]
    for title, mistakes in CHAPTERS:
        lines += [f"## {title}", ""]
        for mistake in mistakes:
            lines += section(outcomes[mistake.name])
    return "\n".join(lines).rstrip() + "\n"


def all_outcomes(mistakes: Iterable[Mistake] = ()) -> dict[str, Outcome]:
    """Name -> what came of the mistake; by default of all."""
    return {mistake.name: make(mistake) for mistake in tuple(mistakes) or all_mistakes()}


def main() -> None:
    """Make them all, and write page and pictures."""
    outcomes = all_outcomes()
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    whole = f"{head}{BEGIN}\n{written(outcomes)}\n{END}{rest.split(END)[1]}"
    PAGE.write_text(whole, encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for old in PICTURES.glob("*.svg"):
        if old.stem not in outcomes:
            old.unlink()
    for name, outcome in outcomes.items():
        (PICTURES / f"{name}.svg").write_text(picture(outcome), encoding="utf-8")
    if not all(outcome.is_named for outcome in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
