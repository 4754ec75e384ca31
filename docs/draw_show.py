"""Takes the pictures of docs/show.md: real pages in a real browser, wide, on a phone, in the dark.

Needs Chromium: apt-get install chromium, then python docs/draw_show.py
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
DARK = ("--blink-settings=preferredColorScheme=0",)
# file -> case, degree, step, width, height, options. A phone is narrower than a window can be, so
# the page is put in a frame, and the frame chooses the step.
PICTURES: dict[str, tuple[str, int, int, int, int, tuple[str, ...]]] = {
    "show-desktop.png": ("ffn", 2, 3, 1280, 1010, ()),
    "show-phone.png": ("ffn", 2, 11, 390, 844, ()),
    "show-dark.png": (
        "mlp-gathered",
        3,
        4,
        1280,
        800,
        ("--blink-settings=preferredColorScheme=0",),
    ),
}
FRAME = """<!doctype html><body style="margin:0">
<iframe id="frame" src="page.html" style="border:0;width:{width}px;height:{height}px"></iframe>
<script>
frame.onload = () => {{
  const slider = frame.contentDocument.getElementById("slider");
  slider.value = "{step}";
  slider.dispatchEvent(new Event("input"));
}};
</script>
"""


def take(
    name: str, case: str, degree: int, step: int, width: int, height: int, options: tuple[str, ...]
) -> None:
    """One picture."""
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("there is no chromium on PATH")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        command = [sys.executable, "-m", "shardproof", "show", "--case", case]
        command += ["--degree", str(degree), "--html", str(page)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        frame = page.with_name("frame.html")
        frame.write_text(FRAME.format(step=step, width=width, height=height))
        subprocess.run(
            [
                browser, "--headless=new", "--no-sandbox", "--hide-scrollbars",
                "--allow-file-access-from-files", "--virtual-time-budget=3000",
                f"--user-data-dir={folder}/profile", f"--screenshot={DOCS / name}",
                f"--window-size={max(width, 500)},{height}", *options, frame.as_uri(),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    if width < 500:
        crop(DOCS / name, width, height)


def crop(path: Path, width: int, height: int) -> None:
    """Cut off what the window has beside the frame."""
    from PIL import Image  # noqa: PLC0415 - comes with matplotlib, which a phone's picture needs

    with Image.open(path) as picture:
        picture.crop((0, 0, width, height)).save(path, optimize=True)


if __name__ == "__main__":
    for name, what in PICTURES.items():
        take(name, *what)
