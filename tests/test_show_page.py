"""The page of `sp.show` in a real browser: every step is drawn, and nothing is wrong.

A script that the test puts into the page goes to every position of the slider, presses the keys,
plays, and writes what it found into the document.
"""

import html
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardproof as sp
from shardproof.showing.show import ShownStep

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
SECONDS = 90

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"needs a browser on PATH: {', '.join(NAMES)}"
)

# Before the page's own script: what goes wrong in it.
WATCH = """<script>
const faults = [];
window.addEventListener("error", (event) => faults.push(String(event.message)));
window.addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
</script>
"""

# After it: every position of the slider is tried, the keys, links and buttons, and playing.
TEST = """<script>
(() => {
  const seen = [], root = document.documentElement;
  const get = (id) => document.getElementById(id);
  const scenes = [...document.querySelectorAll(".scene")];
  const slider = get("slider"), live = get("live"), play = get("play");
  const expect = (holds, what) => { if (!holds) faults.push(what); };
  const place = () => scenes.findIndex((scene) => scene.offsetHeight > 0);
  const press = (key) => document.body.dispatchEvent(
    new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const moveTo = (to) => {
    slider.value = String(to + 1);
    slider.dispatchEvent(new Event("input", { bubbles: true }));
  };
  function tryScene(scene, at) {
    moveTo(at);
    const shown = scenes.filter((each) => each.offsetHeight > 0), name = `step ${at + 1}`;
    expect(shown.length === 1 && shown[0] === scene, `${name} is not shown`);
    expect(scene.querySelectorAll("td").length > 0, `${name} has no cells`);
    const drawn = scene.querySelectorAll(".arrows line").length;
    expect(drawn === Number(scene.dataset.arrows), `${name} has ${drawn} arrows`);
    const title = scene.querySelector("h2").textContent;
    expect(live.textContent.includes(title), `${name} is not said`);
    expect(slider.getAttribute("aria-valuetext") === title, `${name} has no name`);
    expect(root.scrollWidth <= root.clientWidth, `${name} is wider than the window`);
    for (const bar of scene.querySelectorAll(".bar i")) {
      expect(bar.offsetWidth <= bar.parentElement.offsetWidth, `a bar of ${name}`);
    }
    for (const box of scene.querySelectorAll(".scroll")) {
      const isWide = box.scrollWidth > box.clientWidth + 1;
      expect(isWide === (box.tabIndex === 0), `${name}: a tab stop that ${isWide} scrolls`);
    }
    seen.push(at + 1);
  }
  scenes.forEach(tryScene);
  const last = scenes.length - 1;
  press("Home"); expect(place() === 0, "Home");
  press("End"); expect(place() === last, "End");
  press("Home"); press("ArrowRight"); expect(place() === 1, "ArrowRight");
  press("ArrowLeft"); expect(place() === 0, "ArrowLeft");
  get("next").click(); get("previous").click(); expect(place() === 0, "the buttons");
  document.querySelector("details").open = true;
  document.querySelector("a[href='#step-3']").click(); expect(place() === 2, "a link of the list");
  window.location.hash = "#step-5";
  setTimeout(() => {
    expect(place() === 4, "the address");
    const meets = scenes.findIndex((scene) => scene.dataset.arrows !== "0");
    moveTo(meets);
    const said = live.textContent;
    press(" ");
    if (root.clientWidth < 700) {
      const box = scenes[meets].querySelector(".arrows svg").getBoundingClientRect();
      const floor = document.querySelector(".player").getBoundingClientRect().top;
      expect(box.top >= 0 && box.bottom <= floor, `arrows at ${box.top}-${box.bottom} of ${floor}`);
    }
    setTimeout(() => {
      const reached = place();
      expect(reached > meets, "playing");
      expect(live.textContent === said, "it speaks while it plays");
      press(" ");
      setTimeout(() => {
        expect(place() === reached, "pausing");
        const result = document.createElement("pre");
        result.id = "selftest";
        result.textContent = JSON.stringify({
          seen, faults, width: root.clientWidth,
          dark: window.matchMedia("(prefers-color-scheme: dark)").matches,
        });
        document.body.append(result);
      }, 4000);
    }, 4500);
  }, 100);
})();
</script>
"""

# What stands below one another where no script moves the page, or on paper.
ALL_SHOWN = """<script>
const height = (found) => [...document.querySelectorAll(found)].map((each) => each.offsetHeight);
const result = document.createElement("pre");
result.id = "selftest";
result.textContent = JSON.stringify({ scenes: height(".scene"), player: height(".player"),
  arrows: document.querySelectorAll(".arrows svg").length, tables: height(".matrix") });
document.body.append(result);
</script>
"""

# A window of Chromium has at least 500 pixels, and a phone has 360: the page is put in a frame.
FRAME = """<!doctype html><iframe id="frame" src="page.html"
 style="border:0;width:360px;height:740px"></iframe>
<script>
const timer = setInterval(() => {
  const found = document.getElementById("frame").contentDocument.getElementById("selftest");
  if (found) { clearInterval(timer); document.body.append(found.cloneNode(true)); }
}, 200);
</script>
"""


def with_test(page: str) -> str:
    """The page with the test in it."""
    assert page.count("<main>") == page.count("</body>") == 1
    return page.replace("<main>", WATCH + "<main>").replace("</body>", TEST + "</body>")


@pytest.fixture(scope="module")
def step() -> ShownStep:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 40), nn.SiLU(), nn.Linear(40, 5))
    model.add_module("a <long> name & more_of_it_without_any_blank_in_it_" * 3, nn.Identity())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    plan = {"0": sp.ColumnParallel(), "2": sp.RowParallel()}
    x = torch.randn(3, 6, generator=generator).requires_grad_()
    return sp.show(model, x, degree=3, plan=plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def browse(page: Path, *options: str) -> tuple[dict[str, Any], list[str]]:
    """What the page's own test found, and what stands in the console of the browser."""
    command = [
        str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
        "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=20000",
        f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        try:
            document, log = running.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            raise
    found = re.search(r'<pre id="selftest">(.*?)</pre>', document, re.DOTALL)
    assert found, f"the page did not test itself: {log[-3000:]}"
    console = [line for line in log.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])), console


def test_every_step_is_drawn_in_a_wide_window(step: ShownStep, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(with_test(step.page()), encoding="utf-8")
    found, console = browse(page, "--window-size=1280,900")
    assert found["faults"] == []
    assert found["seen"] == list(range(1, len(step.view.scenes) + 1))
    assert len(found["seen"]) > 15
    assert found["width"] > 1000
    assert not found["dark"]
    assert console == []


def test_every_step_is_drawn_on_a_phone_in_the_dark(step: ShownStep, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(with_test(step.page()), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME)
    found, console = browse(frame, "--blink-settings=preferredColorScheme=0")
    assert found["faults"] == []
    assert found["seen"] == list(range(1, len(step.view.scenes) + 1))
    assert found["width"] <= 360
    assert found["dark"]
    assert console == []


@pytest.mark.parametrize("how", ["no script", "paper"])
def test_all_steps_stand_below_one_another_without_a_script_and_on_paper(
    how: str, step: ShownStep, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    start, script, end = re.split(r"(<script>.*</script>)", step.page(), flags=re.DOTALL)
    if how == "paper":  # its rules, on a screen
        start = start.replace("@media print", "@media all")
    else:
        script = ""
    page.write_text(start + script + ALL_SHOWN + end, encoding="utf-8")
    found, console = browse(page)
    assert len(found["scenes"]) == len(step.view.scenes)
    assert min(found["scenes"]) > 50
    assert found["player"] == [0]
    assert found["arrows"] == sum(1 for scene in step.view.scenes if scene.arrows) == 2
    assert min(found["tables"]) > 0
    assert console == []


def test_planted_faults_are_found(step: ShownStep, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = with_test(step.page())
    for right, wrong in (
        ('<section class="scene meets"', '<section hidden class="scene meets"'),
        (".js .scene.now {", ".now:not([hidden]) {"),
        ("<line ", "<path "),
        ('<p class="told">', '<p class="told" style="width:4000px;max-width:none">'),
        ('"use strict";', '"use strict"; setTimeout(() => { planted(); }, 50);'),
        ("Home: 0, End: scenes.length - 1", "Home: 0, End: 0"),
        ("if (!timer) {", "if (true) {"),
        ("if (isWide) box.setAttribute", "if (!isWide) box.setAttribute"),
    ):
        assert right in text
        text = text.replace(right, wrong, 1)
    page.write_text(text, encoding="utf-8")
    found, console = browse(page)
    faults = " ".join(found["faults"])
    assert "is not shown" in faults
    assert "arrows" in faults
    assert "step 1 is wider than the window" in faults
    assert "planted is not defined" in faults
    assert "End" in faults
    assert "it speaks while it plays" in faults
    assert "a tab stop that" in faults
    assert any("planted is not defined" in line for line in console)
