"""The scripts of docs that draw, and how a test reads what they drew."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

DOCS = Path(__file__).parents[1] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def script(name: str) -> ModuleType:
    """A module of docs, as its own command would import it."""
    if str(DOCS) not in sys.path:
        sys.path.append(str(DOCS))
    return importlib.import_module(name)


def texts(picture: str) -> list[ElementTree.Element]:
    """Every text of a picture, in the order in which it is drawn."""
    return list(ElementTree.fromstring(picture).iter(f"{SVG}text"))


def width(picture: str) -> float:
    """Of the drawing, in its own units."""
    return float(ElementTree.fromstring(picture).attrib["viewBox"].split()[2])


def sizes(picture: str) -> dict[str, float]:
    """Class -> font size, from the style sheet."""
    return {
        name: float(size) for name, size in re.findall(r"\.(\w+)\{font-size:([\d.]+)px\}", picture)
    }


def size_of(text: ElementTree.Element, known: dict[str, float]) -> float:
    """The font size of one text."""
    (size,) = [known[name] for name in text.attrib["class"].split() if name in known]
    return size


def matrices(picture: str) -> dict[str, list[list[int]]]:
    """Name -> the numbers that a reader sees in that matrix, row by row."""
    found = {}
    for group in ElementTree.fromstring(picture).iter(f"{SVG}g"):
        rows: dict[float, list[int]] = {}
        for label in group.iter(f"{SVG}text"):
            number = int((label.text or "").replace("\N{MINUS SIGN}", "-"))
            rows.setdefault(float(label.attrib["y"]), []).append(number)
        found[group.attrib["id"]] = list(rows.values())
    return found
