"""Takes the picture of docs/plans.md: the page of `shardproof plan --html`, in a real browser.

The model is the one of that page: its block of code is written to a file and planned.
Needs Chromium: apt-get install chromium, then python docs/draw_plan.py
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
WIDTH, HEIGHT = 1280, 1130  # pixels


def model_of_the_page() -> str:
    """The file that docs/plans.md shows as mymodel.py."""
    page = (DOCS / "plans.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n# mymodel.py\n(.*?)```", page, re.DOTALL)
    return str(code)


def take(target: Path) -> None:
    """The picture."""
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("there is no chromium on PATH")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "mymodel.py").write_text(model_of_the_page(), encoding="utf-8")
        command = [sys.executable, "-m", "shardproof", "plan", "mymodel.py:build", "--degree", "3"]
        subprocess.run(
            [*command, "--html", "plan.html"], check=True, cwd=folder, stdout=subprocess.DEVNULL
        )
        subprocess.run(
            [
                browser, "--headless=new", "--no-sandbox", "--hide-scrollbars",
                f"--user-data-dir={folder}/profile", f"--screenshot={target}",
                f"--window-size={WIDTH},{HEIGHT}", Path(folder, "plan.html").as_uri(),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip


if __name__ == "__main__":
    take(DOCS / "plan-page.png")
