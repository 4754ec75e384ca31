"""The page of `sp.show` in a real browser: every step is drawn, and nothing is wrong.

The page tests itself: at the address #selftest it goes to every position of its slider, presses
its keys, and writes what it found into the document.
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
from shardproof.showing.shown import Shown

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
SECONDS = 90

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"needs a browser on PATH: {', '.join(NAMES)}"
)

# A window of Chromium has at least 500 pixels, and a phone has 360: the page is put in a frame.
FRAME = """<!doctype html><iframe id="frame" src="page.html#selftest"
 style="border:0;width:360px;height:740px"></iframe>
<script>
const timer = setInterval(() => {
  const found = document.getElementById("frame").contentDocument.getElementById("selftest");
  if (found) { clearInterval(timer); document.body.append(found.cloneNode(true)); }
}, 200);
</script>
"""


@pytest.fixture(scope="module")
def step() -> Shown:
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
    if page.name == "page.html":
        command[-1] += "#selftest"
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


def test_every_step_is_drawn_in_a_wide_window(step: Shown, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    step.save(page)
    found, console = browse(page, "--window-size=1280,900")
    assert found["faults"] == []
    assert found["seen"] == list(range(1, len(step.story.scenes) + 1))
    assert len(found["seen"]) > 20
    assert found["width"] > 1000
    assert not found["dark"]
    assert console == []


def test_every_step_is_drawn_on_a_phone_in_the_dark(step: Shown, tmp_path: Path) -> None:
    step.save(tmp_path / "page.html")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME)
    found, console = browse(frame, "--blink-settings=preferredColorScheme=0")
    assert found["faults"] == []
    assert found["seen"] == list(range(1, len(step.story.scenes) + 1))
    assert found["width"] <= 360
    assert found["dark"]
    assert console == []


def test_planted_faults_are_found(step: Shown, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text = step.page()
    for right, wrong in (
        ('<section class="scene meets"', '<section hidden class="scene meets"'),
        (".js .scene.now {", ".now:not([hidden]) {"),
        ("<line ", "<path "),
        ('<p class="told">', '<p class="told" style="width:4000px;max-width:none">'),
        ('"use strict";', '"use strict"; setTimeout(() => { planted(); }, 50);'),
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
    assert any("planted is not defined" in line for line in console)
