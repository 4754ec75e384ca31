"""The page of `shardproof plan --html` in a real browser, and the tree that it draws."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardproof as sp
from shardproof.showing.plan_page import plan_page
from shardproof.showing.plan_tree import Node, tree_of
from test_show_page import BROWSER, FRAME, WATCH, browse

needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs a browser on PATH")

# What a reader does: opens, closes, moves by keys; every bar and every name must have its place.
TEST = """<script>
(() => {
  const root = document.documentElement;
  const tree = document.getElementById("tree");
  const expect = (holds, what) => { if (!holds) faults.push(what); };
  const heads = () =>
    [...tree.querySelectorAll("summary")].filter((each) => each.checkVisibility());
  const press = (key) => document.activeElement.dispatchEvent(
    new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const bars = [...document.querySelectorAll(".own")];
  expect(root.scrollWidth <= root.clientWidth, "the page is wider than the window");
  for (const bar of bars) {
    const pieces = [...bar.querySelectorAll("i")];
    const width = pieces.reduce((sum, each) => sum + each.offsetWidth, 0);
    expect(bar.offsetHeight > 0, "a bar is not shown");
    expect(!pieces.length || Math.abs(width - bar.clientWidth) <= pieces.length, "a bar has gaps");
    expect(bar.getAttribute("aria-label"), "a bar says nothing");
  }
  for (const lane of document.querySelectorAll(".lane i")) {
    expect(lane.offsetLeft + lane.offsetWidth <= lane.parentElement.offsetWidth + 1, "a lane");
  }
  const opened = heads().length;
  document.getElementById("close").click();
  const closed = heads().length;
  document.getElementById("open").click();
  expect(heads().length === opened, "open all");
  heads()[0].focus();
  press("ArrowDown"); expect(document.activeElement === heads()[1], "down");
  press("ArrowUp"); expect(document.activeElement === heads()[0], "up");
  press("End"); expect(document.activeElement === heads()[opened - 1], "End");
  press("Home"); press("ArrowRight"); expect(document.activeElement === heads()[1], "right");
  press("ArrowLeft"); expect(!heads()[1].parentElement.open, "left closes");
  press("ArrowRight"); expect(heads()[1].parentElement.open, "right opens");
  const result = document.createElement("pre");
  result.id = "selftest";
  result.textContent = JSON.stringify({
    faults, opened, closed, bars: bars.length, width: root.clientWidth,
    lanes: document.querySelectorAll(".lane .copy").length,
    ticks: document.querySelectorAll(".own b").length,
    dark: window.matchMedia("(prefers-color-scheme: dark)").matches,
  });
  document.body.append(result);
})();
</script>
"""
SHOWN = """<script>
const result = document.createElement("pre");
result.id = "selftest";
result.textContent = JSON.stringify({
  tools: document.querySelector(".tools").offsetHeight,
  bars: [...document.querySelectorAll(".own")].map((each) => each.offsetHeight),
});
document.body.append(result);
</script>
"""


class Attention(nn.Module):
    """Six query heads on two key-value heads, in one weight, and a norm beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 40, bias=False), nn.Linear(24, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).split([24, 8, 8], dim=2)
        q, k, v = (y.unflatten(2, (-1, 4)).transpose(1, 2) for y in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def made() -> sp.WatchedPlan:
    blocks = [Attention() for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(24, 50), nn.GELU(), nn.Linear(50, 24))
    model.add_module("a_<long>_name_&_more_of_it_without_any_blank_in_it_" * 3, nn.Linear(24, 24))
    found = sp.plan(model, degree=8, inputs=torch.ones(2, 5, 24))
    assert isinstance(found, sp.WatchedPlan)
    return found


def page(made: Any) -> str:
    return plan_page(made, batch=2, length=5, source="a <model>")


def with_test(text: str) -> str:
    assert text.count("<main>") == text.count("</body>") == 1
    return text.replace("<main>", WATCH + "<main>").replace("</body>", TEST + "</body>")


def nodes(node: Node) -> list[Node]:
    return [node, *(each for child in node.children for each in nodes(child))]


def test_layers_that_are_alike_are_one_node_with_what_each_sends(made: sp.WatchedPlan) -> None:
    root = tree_of(made, batch=1, length=1)
    alone, folded = root.children[:2]  # the input of the first norm is no parameter's
    assert (alone.name, folded.name, folded.count) == ("0", "1-2", 2)
    names = {node.name: node for node in nodes(folded)}
    assert [(note.kind, note.words) for note in names["out"].notes] == [
        ("forward", "1 all_reduce 960 B")
    ]
    assert names["norm"].bars[0].dim is None
    assert names["norm"].bars[0].how == "'native_layer_norm' in '*.norm' adds up over it."


class Residual(nn.Module):
    """A block whose linears have numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.mlp(x)
        return y


def test_children_that_are_numbered_keep_their_numbers() -> None:
    """Blocks that are alike are one node; the linears in them are two."""
    blocks = nn.Sequential(Residual(), Residual(), Residual(), nn.Linear(12, 12))
    tree = tree_of(sp.plan(blocks, degree=2, inputs=torch.zeros(2, 12)), batch=1, length=1)
    (alike,) = [node for node in tree.children if node.count == 2]
    assert alike.name == "1-2.mlp"
    assert [child.name for child in alike.children] == ["0", "2"]


def test_a_bar_has_the_owners_the_copies_and_the_blocks(made: sp.WatchedPlan) -> None:
    names = {node.name: node for node in nodes(tree_of(made, batch=1, length=1))}
    (bar,) = names["qkv"].bars
    assert bar.starts == (24, 32)
    assert bar.owned[0] == ((0, 4), (24, 28), (32, 36))  # a query head, and the first KV head
    assert bar.copied[0] == ()
    assert (bar.owned[1], bar.copied[1]) == (((4, 8),), ((24, 28), (32, 36)))
    assert bar.idle == (6, 7)
    assert sum(stop - start for runs in bar.owned for start, stop in runs) == 40
    assert bar.held[6] == (0, 24)


def test_what_comes_from_a_user_is_escaped(made: sp.WatchedPlan) -> None:
    text = page(made)
    assert "a &lt;model&gt;" in text
    assert "<model>" not in text
    assert "<long>" not in text
    assert not re.search(r"""(src|href)=["']?http""", text)


def test_the_page_of_a_plan_that_names_modules() -> None:
    plan = {"0": sp.ColumnParallel(), "2": sp.RowParallel()}
    model = nn.Sequential(nn.Linear(6, 40), nn.SiLU(), nn.Linear(40, 5), nn.Linear(5, 5))
    text = page(sp.plan(model, plan, degree=3))
    assert "forward 1 all_reduce 200 B" in text
    assert "whole: the plan does not name it" in text
    assert "rank 0 owns 0-14; rank 1 owns 15-29; rank 2 owns 30-39" in text


def test_a_bar_of_many_runs_is_drawn_with_few_pieces() -> None:
    class Interleaved(nn.Module):
        """Gate and up alternate, as in some fused weights."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 4000), nn.Linear(2000, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(x).unflatten(-1, (500, 8))
            return self.down((y[..., :4] * y[..., 4:]).transpose(-1, -2).flatten(-2))

    made = sp.plan(Interleaved(), degree=2, inputs=torch.ones(3, 8))
    text = page(made)
    assert text.count("<i class") < 1000


@needs_browser
def test_the_page_works_in_a_wide_window(made: sp.WatchedPlan, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(with_test(page(made)), encoding="utf-8")
    found, console = browse(path, "--window-size=1280,900")
    assert found["faults"] == []
    assert found["opened"] > 8
    assert found["closed"] < found["opened"]
    assert found["bars"] > 8
    assert found["lanes"] == 2 * 2 * 4  # keys and values on the ranks that do not own their head
    assert found["ticks"] == 2 * 2
    assert found["width"] > 1000
    assert console == []


@needs_browser
def test_the_page_works_on_a_phone_in_the_dark(made: sp.WatchedPlan, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(with_test(page(made)), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME)
    found, console = browse(frame, "--blink-settings=preferredColorScheme=0")
    assert found["faults"] == []
    assert found["width"] <= 360
    assert found["dark"]
    assert console == []


@needs_browser
def test_all_bars_are_on_paper_without_buttons(made: sp.WatchedPlan, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    text = page(made).replace("@media print", "@media all")  # its rules, on a screen
    text = text.replace("<details open>", "<details>").replace("</body>", SHOWN + "</body>")
    path.write_text(text, encoding="utf-8")
    found, console = browse(path)
    assert found["tools"] == 0
    assert min(found["bars"]) > 5
    assert console == []


@needs_browser
def test_planted_faults_are_found(made: sp.WatchedPlan, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    text = with_test(page(made))
    for right, wrong in (
        ('<p class="quiet">on a rank', '<p class="quiet" style="width:4000px">on a rank'),
        ("flex:", "width:1px;flex-grow:0;order:"),
        ("module.open = false", "module.open = true"),
        ("shown[at + 1]", "shown[at]"),
        ('"use strict";', '"use strict"; setTimeout(() => { planted(); }, 50);'),
    ):
        assert right in text
        text = text.replace(right, wrong)
    path.write_text(text, encoding="utf-8")
    found, _ = browse(path)
    faults = " ".join(found["faults"])
    for fault in ("wider than the window", "a bar has gaps", "left closes", "down"):
        assert fault in faults
