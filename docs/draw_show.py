"""Takes the pictures of docs/show.md: real pages in a real browser, wide, on a phone, in the dark.

Needs Chromium: apt-get install chromium, then python docs/draw_show.py
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent
NARROWEST = 500  # pixels of a window; a phone is narrower


@dataclass(frozen=True)
class Picture:
    """A step of a case, as it is taken.

    Attributes:
        case: its name.
        degree: how many ranks.
        step: that is shown.
        width, height: in pixels.
        is_dark: of a system that prefers dark colours.
    """

    case: str
    degree: int
    step: int
    width: int
    height: int
    is_dark: bool = False


PICTURES = {
    "show-desktop.png": Picture("ffn", degree=2, step=3, width=1280, height=960),
    "show-phone.png": Picture("ffn", degree=2, step=3, width=390, height=844),
    "show-dark.png": Picture(
        "mlp-gathered", degree=3, step=9, width=1280, height=960, is_dark=True
    ),
}
# A phone is narrower than a window can be, so the page is put in a frame, which chooses the step.
FRAME = """<!doctype html><body style="margin:0">
<iframe id="frame" src="page.html" style="border:0;width:{width}px;height:{height}px"></iframe>
<script>
frame.onload = () => {{
  const slider = frame.contentDocument.getElementById("slider");
  slider.value = "{step}";
  slider.dispatchEvent(new Event("input"));
  if ({width} < 500) frame.contentDocument.querySelector(".scene.now").scrollIntoView();
}};
</script>
"""


def take(name: str, what: Picture) -> None:
    """One picture."""
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("there is no chromium on PATH")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        command = [sys.executable, "-m", "shardproof", "show", "--case", what.case]
        command += ["--degree", str(what.degree), "--html", str(page)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        frame = page.with_name("frame.html")
        frame.write_text(FRAME.format(step=what.step, width=what.width, height=what.height))
        options = ["--blink-settings=preferredColorScheme=0"] if what.is_dark else []
        subprocess.run(
            [
                browser, "--headless=new", "--no-sandbox", "--hide-scrollbars",
                "--allow-file-access-from-files", "--virtual-time-budget=3000",
                f"--user-data-dir={folder}/profile", f"--screenshot={DOCS / name}",
                f"--window-size={max(what.width, NARROWEST)},{what.height}", *options,
                frame.as_uri(),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    if what.width < NARROWEST:
        crop(DOCS / name, what.width, what.height)


def crop(path: Path, width: int, height: int) -> None:
    """Cut off what the window has beside the frame."""
    from PIL import Image  # noqa: PLC0415 - comes with matplotlib, which a phone's picture needs

    with Image.open(path) as picture:
        picture.crop((0, 0, width, height)).save(path, optimize=True)


if __name__ == "__main__":
    for name, what in PICTURES.items():
        take(name, what)
