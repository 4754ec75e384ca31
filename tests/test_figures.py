"""The pictures of docs are what their scripts draw, and their numbers are right."""

import itertools
import re
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import shardproof as sp
from drawn import DOCS, SVG, matrices, script, size_of, sizes, texts, width

PHONE = 360  # pixels
SMALLEST = 10  # of a letter on a phone


@pytest.fixture(scope="module")
def tensor_parallel() -> str:
    drawing = script("draw_tensor_parallel")
    picture: str = drawing.draw(sp.launch(drawing.step, degree=drawing.DEGREE))
    return picture


def test_the_tree_is_what_its_script_draws() -> None:
    assert (DOCS / "tree.svg").read_text() == script("draw_tree").draw()


def test_the_block_on_two_ranks_is_what_its_script_draws(tensor_parallel: str) -> None:
    assert (DOCS / "tensor-parallel.svg").read_text() == tensor_parallel


# -- the block on two ranks: its numbers, by plain torch -------------------------------------------


def what_is_wrong(picture: str) -> list[str]:
    """What a reader finds who computes the block from the x, A and B that are drawn."""
    seen = {name: torch.tensor(rows) for name, rows in matrices(picture).items()}
    x, a, b = (seen[name].double().requires_grad_() for name in ("x", "A", "B"))
    hidden = x @ a
    y = torch.relu(hidden) @ b
    y.sum().backward()
    right = {"y": y, "grad-x": x.grad}
    for rank, part in enumerate((slice(0, 2), slice(2, 4))):
        right |= of_rank(rank, part, x.detach(), a.detach(), b.detach())
    right["p-0"], right["p-1"] = right["summand-0"], right["summand-1"]
    assert set(right) | {"x", "A", "B"} == set(seen), "a matrix that nobody computes"
    return [name for name, value in right.items() if not torch.equal(seen[name].double(), value)]


def of_rank(rank: int, part: slice, x: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """What one rank has, if `part` are its hidden features."""
    hidden = x @ a[:, part]
    grad_hidden = b[part].sum(1) * (hidden > 0)
    return {
        f"x-of-{rank}": x,
        f"a-{rank}": a[:, part],
        f"hidden-{rank}": hidden,
        f"active-{rank}": hidden.clamp(min=0),
        f"b-{rank}": b[part],
        f"summand-{rank}": hidden.clamp(min=0) @ b[part],
        f"grad-x-{rank}": grad_hidden @ a[:, part].t(),
    }


def test_the_numbers_of_the_block_are_right(tensor_parallel: str) -> None:
    assert what_is_wrong(tensor_parallel) == []


def test_a_wrong_number_is_found(tensor_parallel: str) -> None:
    drawing = script("draw_tensor_parallel")
    sides = sp.launch(drawing.step, degree=drawing.DEGREE)
    sides[0].grad_summand[1][0] += 1
    assert what_is_wrong(drawing.draw(sides)) == ["grad-x-0"]


def test_both_ranks_have_the_sums() -> None:
    drawing = script("draw_tensor_parallel")
    first, second = sp.launch(drawing.step, degree=drawing.DEGREE)
    assert (first.y, first.grad_x) == (second.y, second.grad_x)


def test_the_bytes_are_those_of_what_is_sent(tensor_parallel: str) -> None:
    """Of fp32: the gradient of x backward, y forward."""
    seen = matrices(tensor_parallel)
    said = dict(re.findall(r"(forward|backward): all_reduce, (\d+) bytes", tensor_parallel))
    sent = {"forward": "y", "backward": "grad-x"}
    sizes_of = {way: 4 * sum(map(len, seen[name])) for way, name in sent.items()}
    assert {way: int(size) for way, size in said.items()} == sizes_of


def test_hidden_numbers_show_what_relu_does(tensor_parallel: str) -> None:
    """Without a negative number the picture would not show that relu can stand in between."""
    seen = matrices(tensor_parallel)
    assert any(seen[f"hidden-{rank}"] != seen[f"active-{rank}"] for rank in (0, 1))


# -- how it is read --------------------------------------------------------------------------------


def test_the_block_is_readable_on_a_phone(tensor_parallel: str) -> None:
    known, scale = sizes(tensor_parallel), PHONE / width(tensor_parallel)
    assert texts(tensor_parallel)
    for label in texts(tensor_parallel):
        assert size_of(label, known) * scale >= SMALLEST, label.text


def extents(picture: str) -> list[tuple[float, float, float, str]]:
    """Of every text: its baseline, where it begins and ends, and what it says."""
    measure, known = script("drawing").width_of, sizes(picture)
    found = []
    for label in texts(picture):
        classes, words = label.attrib["class"].split(), label.text or ""
        long = measure(words, size_of(label, known), is_mono="mono" in classes)
        long *= 1.08 if "bold" in classes else 1.0
        left = float(label.attrib["x"]) - (long / 2 if "middle" in classes else 0)
        found.append((float(label.attrib["y"]), left, left + long, words))
    return sorted(found)


def badly_placed(picture: str) -> list[str]:
    """Texts that stick out of the picture, or run into the next text of their line."""
    found = extents(picture)
    out = [words for _, left, right, words in found if left < 0 or right > width(picture)]
    for (y, _, right, words), (next_y, left, _, _) in itertools.pairwise(found):
        if y == next_y and right > left:
            out.append(words)
    return out


def out_of_its_box(picture: str) -> list[str]:
    """Texts that begin in a card or a bar and end outside of it."""
    names = ("x", "y", "width", "height")
    rects = ElementTree.fromstring(picture).iter(f"{SVG}rect")
    frames = [[float(r.attrib[n]) for n in names] for r in rects if r.attrib["class"] == "bar"]
    assert frames
    return [
        words
        for y, left, right, words in extents(picture)
        for x, top, wide, high in frames
        if x <= left < x + wide and top <= y <= top + high and right > x + wide
    ]


def test_no_text_of_the_block_is_badly_placed(tensor_parallel: str) -> None:
    assert badly_placed(tensor_parallel) == out_of_its_box(tensor_parallel) == []
    for length in (5, 30):
        planted = tensor_parallel.replace(">rank 0<", f">{'word ' * length}<")
        assert ("word " * length in badly_placed(planted)) == (length == 30)
    planted = tensor_parallel.replace(
        "both ranks have x", "both ranks have x, and all of it at once"
    )
    assert len(out_of_its_box(planted)) == 1


def test_the_block_can_be_read_aloud_and_in_the_dark(tensor_parallel: str) -> None:
    root = ElementTree.fromstring(tensor_parallel)
    named = {child.attrib["id"]: child.text for child in root if "id" in child.attrib}
    assert root.attrib["role"] == "img"
    for name in root.attrib["aria-labelledby"].split():
        assert named[name]
    assert "prefers-color-scheme:dark" in tensor_parallel
    background = root.find(f"{SVG}rect")
    assert background is not None
    assert background.attrib["class"] == "page"
    wanted = root.attrib["viewBox"].split()[2:]
    assert [background.attrib["width"], background.attrib["height"]] == wanted


# -- the cheat sheet, on paper ---------------------------------------------------------------------

MILLIMETRE = 4  # units of the drawing
POINT = 25.4 / 72  # millimetres


@pytest.fixture(scope="module")
def print_out() -> str:
    picture: str = script("cheat_sheet_print").draw_print()
    return picture


def test_the_print_is_what_its_script_draws(print_out: str) -> None:
    assert (DOCS / "cheat-sheet.svg").read_text() == print_out


def test_the_print_is_a_page_of_a4(print_out: str) -> None:
    root = ElementTree.fromstring(print_out)
    assert (root.attrib["width"], root.attrib["height"]) == ("297mm", "210mm")
    assert root.attrib["viewBox"] == f"0 0 {297 * MILLIMETRE} {210 * MILLIMETRE}"
    assert "@page{size:297mm 210mm;margin:0}" in print_out


def test_the_print_can_be_read(print_out: str) -> None:
    """6.5 points or more, five millimetres from the edges of the paper, in black on white."""
    for size in sizes(print_out).values():
        assert size / MILLIMETRE / POINT >= 6.5
    assert badly_placed(print_out) == out_of_its_box(print_out) == []
    margin = 5 * MILLIMETRE
    for y, left, right, words in extents(print_out):
        assert margin <= left < right <= 297 * MILLIMETRE - margin, words
        assert margin <= y <= 210 * MILLIMETRE - margin, words
    assert "prefers-color-scheme" not in print_out


def test_the_print_says_what_the_page_says(print_out: str) -> None:
    """Every tensor, collective and mistake of the data, and every rule."""
    entries = script("cheat_sheet_entries")
    seen = " ".join(label.text or "" for label in texts(print_out))
    for entry in entries.ENTRIES:
        for piece in entry.pieces:
            assert piece.name in seen
        for message in entry.messages:
            assert f"{message.kind} of {message.what}" in seen
        for mistake in entry.mistakes:
            assert f"{mistake.what} {mistake.follows}" in seen
    for rule, why in entries.RULES:
        assert f"{rule} {why}" in seen
