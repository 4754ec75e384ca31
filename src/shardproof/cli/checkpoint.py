"""`shardproof checkpoint`: look at the directories that `shardproof.save` writes."""

import time
from pathlib import Path

import click

from shardproof.checkpoint.directory import MANIFEST, checked_path
from shardproof.checkpoint.manifest import find_damage, read_manifest
from shardproof.checkpoint.series import checkpoints_of
from shardproof.cli.options import HELP_OPTIONS, json_option
from shardproof.cli.output import BAD, GOOD, console, progress, size
from shardproof.cli.output_file import OutputFile
from shardproof.errors import UsageError
from shardproof.wording import few, short_text

_QUICK = 1.0  # seconds without progress


@click.group(context_settings=HELP_OPTIONS)
def checkpoint() -> None:
    """Look at a checkpoint: verify."""


@checkpoint.command(context_settings=HELP_OPTIONS)
@click.argument("directory", metavar="DIR")
@json_option("what was found")
def verify(directory: str, json_file: OutputFile | None) -> int:
    """Compare every byte of a checkpoint with its manifest, and name what is damaged.

    Exit code 0 if everything agrees, 1 if something is damaged.
    """
    path = checked_path(directory)
    if not path.is_dir():
        raise UsageError(
            f"{short_text(directory)} is no directory. Name one that shardproof.save wrote."
        )
    _check_not_above(path, directory)
    content = read_manifest(path)
    began = time.monotonic()
    with progress(is_speaker=True) as tell:
        tenths = 0

        def report(done: int, total: int) -> None:
            nonlocal tenths
            is_slow = time.monotonic() - began > _QUICK
            if tell is not None and is_slow and total and done * 10 // total > tenths:
                tenths = done * 10 // total
                tell(tenths, 10, f"{size(done)} of {size(total)}")

        damages = find_damage(path, progress=report)
    num_bytes = sum(entry["bytes"] for entry in content["files"].values())
    if json_file is not None:
        json_file.write(
            {
                "directory": str(path),
                "root": content["root"],
                "bytes": num_bytes,
                "is_whole": not damages,
                "damaged": [
                    {"file": each.file, "tensor": each.tensor, "reason": each.reason}
                    for each in damages
                ],
            }
        )
    out = console()
    for damage in damages:
        out.whole_line(f"damaged: {damage}", BAD)
    if not damages:
        files = len(content["files"])
        out.whole_line(f"whole: {files} files, {size(num_bytes)}, root {content['root']}", GOOD)
    return 1 if damages else 0


def _check_not_above(path: Path, text: str) -> None:
    """Raise if a directory has checkpoints and is none."""
    names = sorted(each.name for each in checkpoints_of(path).values())
    if names and not (path / MANIFEST).exists():
        raise UsageError(
            f"{short_text(text)} has checkpoints ({few(names, most=3)}) and is none itself. Name "
            f"one of them, such as {short_text(str(Path(text) / names[-1]))}."
        )
