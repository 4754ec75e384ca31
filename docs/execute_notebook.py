"""Runs a notebook from its first cell to its last and stores what it shows.

    python docs/execute_notebook.py examples/cut_a_llama.ipynb

Times and machine names are not stored, so that a second run on one machine changes nothing. Needs
nbclient and ipykernel (the extra `dev`), and what the notebook imports.
"""

import argparse
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
SECONDS = 600  # that one cell may take
QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm's, of bars that need ipywidgets


def execute(source: Path, target: Path) -> None:
    """Run `source` and write it with its outputs to `target`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; nothing is written.
    """
    notebook = nbformat.read(source, as_version=4)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    client = NotebookClient(notebook, timeout=SECONDS, record_timing=False)
    client.execute(env=os.environ | QUIET)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})  # without versions
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place}"
        cell.metadata = nbformat.from_dict({})
    nbformat.validate(notebook)
    nbformat.write(notebook, target)


def main() -> None:
    """Execute one notebook in place, or into another file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--output", type=Path, help="where to write it; by default in place")
    options = parser.parse_args()
    execute(options.notebook, options.output or options.notebook)


if __name__ == "__main__":
    main()
