"""`shardproof checkpoint`: look at the directories that `shardproof.save` writes."""

import click

from shardproof.checkpoint.directory import checked_path
from shardproof.checkpoint.manifest import find_damage, read_manifest
from shardproof.cli.options import HELP_OPTIONS, json_option
from shardproof.cli.output import BAD, GOOD, console, progress, size
from shardproof.cli.output_file import OutputFile
from shardproof.errors import UsageError
from shardproof.wording import short_text


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
    content = read_manifest(path)
    with progress(is_speaker=True) as tell:
        tenths = 0

        def report(done: int, total: int) -> None:
            nonlocal tenths
            if tell is not None and total and done * 10 // total > tenths:
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
