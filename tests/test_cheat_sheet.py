"""The cheat sheet says of shapes, placements, gradients and bytes what the layers do."""

import functools
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardproof as sp
from drawn import DOCS, script
from shardproof.axis import Axis
from shardproof.comm.plans import tree_plan
from shardproof.mistakes import find_mistake
from shardproof.tree import nodes_of_run
from sheet_runs import IDS, RUNS, SHEET, GroupedAttention, Ledger, Pieces, Step, X

ENTRIES = {entry.name: entry for entry in script("cheat_sheet_entries").ENTRIES}
PLACEMENTS = ("Replicate", "Shard(0)", "Shard(1)", "Partial")


@dataclass(frozen=True)
class Measured:
    entry: Any
    degree: int
    ranks: list[Step]
    plain: Pieces

    def values(self, name: str, what: str) -> tuple[list[Tensor], Tensor]:
        """One tensor, or its gradient, on every rank, and whole."""
        parts = [getattr(step.pieces[name], what) for step in self.ranks]
        whole = self.plain[name]
        return parts, whole.value if what == "value" else whole.gradient


_MEASURED: dict[tuple[str, int], Measured] = {}


@pytest.fixture(
    params=[(name, degree) for name in ENTRIES for degree in SHEET.DEGREES],
    ids=lambda place: f"{place[0]} at {place[1]}",
)
def measured(request: pytest.FixtureRequest) -> Measured:
    """One entry at one degree, run once for all tests."""
    name, degree = place = request.param
    if place not in _MEASURED:
        run, plain = RUNS[name]
        ranks = sp.launch(run, degree=degree)
        _MEASURED[place] = Measured(ENTRIES[name], degree, ranks, plain())
    return _MEASURED[place]


def is_close(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5)


def lies(placement: str, parts: list[Tensor], whole: Tensor) -> bool:
    """Whether the ranks' parts of a tensor lie as a placement says."""
    degree = len(parts)
    if placement == "Replicate":
        return all(is_close(each, whole) for each in parts)
    if placement == "Partial":
        is_whole = any(is_close(each, whole) for each in parts)
        have_its_shape = all(each.shape == whole.shape for each in parts)
        return have_its_shape and not is_whole and is_close(sum(parts), whole)
    if placement == "Shard(0), held":
        held = [SHEET.heads(degree).held(rank) for rank in range(degree)]
        heads = whole.unflatten(0, (SHEET.SIZES["K"], -1))
        wanted = [heads[rows.start : rows.stop].flatten(0, 1) for rows in held]
        return all(is_close(each, right) for each, right in zip(parts, wanted, strict=True))
    dim = int(placement.removeprefix("Shard(").removesuffix(")"))
    if any(each.dim() != whole.dim() or each.shape == whole.shape for each in parts):
        return False
    others = [[*each.shape[:dim], *each.shape[dim:][1:]] for each in parts]
    return len(set(map(tuple, others))) == 1 and is_close(torch.cat(parts, dim), whole)


def test_the_sheet_and_the_runs_name_the_same(measured: Measured) -> None:
    names = {piece.name for piece in measured.entry.pieces}
    assert len(names) == len(measured.entry.pieces)
    assert names == set(measured.plain)
    assert all(names == set(step.pieces) for step in measured.ranks)


def test_shapes_are_those_of_the_ranks(measured: Measured) -> None:
    for piece in measured.entry.pieces:
        for rank, step in enumerate(measured.ranks):
            said = SHEET.shape(piece, measured.degree, rank)
            assert tuple(step.pieces[piece.name].value.shape) == said, piece


def places_of(piece: Any) -> list[tuple[str, str]]:
    said = [("value", piece.placement), ("gradient", piece.gradient), ("after", piece.after)]
    return [(what, placement) for what, placement in said if placement]


def test_placements_are_those_of_the_ranks(measured: Measured) -> None:
    for piece in measured.entry.pieces:
        for what, placement in places_of(piece):
            parts, whole = measured.values(piece.name, what)
            assert lies(placement, parts, whole), (piece.name, what, placement)


def test_no_other_placement_would_do(measured: Measured) -> None:
    """What the test before calls right is right for one placement alone."""
    for piece in measured.entry.pieces:
        for what, placement in places_of(piece):
            parts, whole = measured.values(piece.name, what)
            same = {placement, "Shard(0)"} if "held" in placement else {placement}
            if placement == "Shard(-1)":
                same = {f"Shard({whole.dim() - 1})"}
            others = [other for other in PLACEMENTS if other not in same]
            others = others if whole.dim() > 1 else [o for o in others if o != "Shard(1)"]
            assert not any(lies(other, parts, whole) for other in others), (piece.name, what)


def said_of(entry: Any, degree: int, rank: int) -> Ledger:
    """The messages of the sheet as a ledger counts them."""
    table: Ledger = {}
    for message in entry.messages:
        size = SHEET.message_bytes(message, degree)
        if not size:
            assert message.when, f"{message} is never sent"
            continue
        counts = table.setdefault(message.direction, {})
        count = counts.setdefault(message.kind, {"calls": 0, "message_bytes": 0, "sent_bytes": 0})
        count["calls"] += 1
        count["message_bytes"] += size
        count["sent_bytes"] += SHEET.sent_bytes(message, degree, rank)
    return table


def test_messages_and_bytes_are_those_of_the_ledger(measured: Measured) -> None:
    for rank, step in enumerate(measured.ranks):
        assert step.ledger == said_of(measured.entry, measured.degree, rank)


@pytest.mark.parametrize("name", ENTRIES)
def test_costs_and_shapes_hold_for_four_ranks(name: str) -> None:
    """A degree of which the page has no example."""
    for rank, step in enumerate(sp.launch(RUNS[name][0], degree=4)):
        assert step.ledger == said_of(ENTRIES[name], 4, rank)
        for piece in ENTRIES[name].pieces:
            assert tuple(step.pieces[piece.name].value.shape) == SHEET.shape(piece, 4, rank)


@pytest.mark.parametrize("name", ENTRIES)
def test_one_rank_has_all_and_sends_nothing(name: str) -> None:
    (step,) = sp.launch(RUNS[name][0], degree=1)
    assert step.ledger == {}
    for piece in ENTRIES[name].pieces:
        assert tuple(step.pieces[piece.name].value.shape) == SHEET.shape(piece, 1, 0), piece


def test_what_depends_on_the_degree_is_sent_at_one_of_them() -> None:
    for entry in ENTRIES.values():
        for message in entry.messages:
            sizes = [SHEET.message_bytes(message, degree) for degree in SHEET.DEGREES]
            assert any(sizes)
            assert bool(message.when) == (not all(sizes)), message


def test_letters_of_the_example_can_be_told_apart() -> None:
    """Two sizes that are equal would let a wrong letter pass."""
    sizes = [SHEET.SIZES[letter] for letter in SHEET.SIZES]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_nodes_of_sixteen_bits_travel_in_fp32(rank: int) -> None:
    """What the sheet says of bf16: the message has 2 bytes for a number, a node has 4."""
    cut, (tokens, width) = SHEET.cut("F", 3), (SHEET.SIZES["T"], SHEET.SIZES["H"])
    plan = tree_plan("forward", "", (tokens, width), torch.bfloat16, cut, rank)
    nodes, own = len(nodes_of_run(cut.num_leaves, cut.run(rank))), tokens * width // 3
    assert plan.message_bytes == 2 * tokens * width
    assert plan.sent_bytes == 4 * nodes * 2 * own + 2 * 2 * own


def test_gradients_follow_the_rules() -> None:
    """Of Shard(d) Shard(d), of Partial Replicate, of Replicate one of two."""
    allowed = {"Replicate": {"Partial", "Replicate", ""}, "Partial": {"Replicate"}}
    for entry in ENTRIES.values():
        for piece in entry.pieces:
            assert piece.gradient in allowed.get(piece.placement, {piece.placement}), piece


# -- the code --------------------------------------------------------------------------------------


def made_by(entry: Any, axis: Axis) -> dict[str, Any]:
    """The names that the code of an entry makes, when it is run."""
    names: dict[str, Any] = {letter: SHEET.SIZES[letter] for letter in "HFVQKD"}
    names |= {"axis": axis, "x": X, "target": IDS, "parallelize": sp.parallelize, "name": "block"}
    layers = ("ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding")
    names |= {layer: getattr(sp, layer) for layer in layers}
    names["vocab_cross_entropy"] = sp.functional.vocab_cross_entropy
    # The model of these tests is not of transformers.
    names["Attention"] = functools.partial(sp.Attention, attend="attend")
    names["model"] = nn.ModuleDict({"block": GroupedAttention()})
    exec("\n".join(entry.code), names)
    return names


@pytest.mark.parametrize("name", ENTRIES)
def test_the_code_makes_what_the_table_has(name: str) -> None:
    entry = ENTRIES[name]
    weights = [p for p in entry.pieces if p.name.endswith(("weight", "bias"))]
    assert weights

    def work(axis: Axis) -> list[tuple[int, ...]]:
        made = made_by(entry, axis)
        owner = made.get("layer")
        shapes = []
        for piece in weights:
            first, *rest = piece.name.split(".")
            tensor = getattr(owner, first) if owner is not None else made.get(first)
            tensor = made["model"].block.get_submodule(first) if tensor is None else tensor
            shapes.append(tuple(functools.reduce(getattr, rest, tensor).shape))
        return shapes

    for rank, shapes in enumerate(sp.launch(work, degree=3)):
        assert shapes == [SHEET.shape(piece, 3, rank) for piece in weights]


# -- the page --------------------------------------------------------------------------------------


def test_the_page_is_what_its_script_writes() -> None:
    assert (DOCS / "cheat-sheet.md").read_text() == script("draw_cheat_sheet").write_page()


def test_a_mistake_of_the_gallery_has_its_name_and_its_heading() -> None:
    headings = (DOCS / "mistakes.md").read_text().splitlines()
    page = (DOCS / "cheat-sheet.md").read_text()
    names = [each.made_by for entry in ENTRIES.values() for each in entry.mistakes if each.made_by]
    assert len(names) == len(set(names)) >= 8
    for name in names:
        assert find_mistake(name).name == name
        assert f"### {name}" in headings
        assert f"[`shardproof break {name}`](mistakes.md#{name})" in page


def test_words_of_the_page_have_a_line_each() -> None:
    page = (DOCS / "cheat-sheet.md").read_text()
    for word in ("f", "g", "leaf", "node", "held"):
        assert len(re.findall(rf"^\| `{word}` \| .+\. \|$", page, re.MULTILINE)) == 1, word


def test_nodes_are_as_many_as_the_page_says() -> None:
    """With 8 leaves one node at every degree but 3, and there at most two."""
    most = []
    for degree in range(1, 9):
        cut = SHEET.cut("F", degree)
        runs = [cut.run(rank) for rank in range(degree)]
        most.append(max(len(nodes_of_run(cut.num_leaves, run)) for run in runs))
    assert most == [1, 1, 2, 1, 1, 1, 1, 1]
