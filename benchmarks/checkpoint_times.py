"""How long a checkpoint takes, beside safetensors in one process on the same disk.

    python -m benchmarks.checkpoint_times --gib 1 --degree 2 --rounds 5

The model has linear layers of 4096 x 4096, cut by columns and by rows in turn, and AdamW has made a
step, so that a checkpoint has three times the bytes of the weights. A round times `sp.save` and
`sp.load` (slowest rank) and `save_file` and `load_file` of the same tensors, one after the other.
The files are flushed to the disk in both (`sp.save` does so itself). The values that were loaded
are compared first. Memory is the peak of resident memory (VmHWM) above what the process had before
the call; for `sp.load` it includes the new state of the optimizer.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import shardproof as sp
from shardproof.axis import Axis
from shardproof.ranks import open_ranks

WIDTH = 4096
MIB = 1 << 20


def resident(field: str) -> int:
    """A value of /proc/self/status in bytes: VmRSS, or VmHWM, the peak."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) << 10


def measured(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds of a call, and by how many bytes it raised the peak of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    began = time.perf_counter()
    call()
    return time.perf_counter() - began, resident("VmHWM") - before


class Rank:
    """The model and the optimizer of one rank, kept between calls."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def build(axis: Axis, layers: int) -> int:
    """Make the model cut, with the state of one step; returns the bytes that this rank holds."""
    parts = [
        (sp.ColumnParallelLinear, sp.RowParallelLinear)[number % 2](
            WIDTH, WIDTH, axis=axis, bias=False, name=f"layer{number}"
        )
        for number in range(layers)
    ]
    Rank.model = nn.Sequential(*parts)
    Rank.optimizer = torch.optim.AdamW(Rank.model.parameters())
    for parameter in Rank.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    Rank.optimizer.step()
    Rank.optimizer.zero_grad()
    return 3 * sum(parameter.numel() * 4 for parameter in Rank.model.parameters())


def saved(axis: Axis, directory: str) -> tuple[float, int]:
    """Seconds of a save, and by how much it raised the peak of memory."""
    return measured(lambda: sp.save(directory, Rank.model, Rank.optimizer))


def loaded(axis: Axis, directory: str) -> tuple[float, int, bool]:
    """Load into the model and a new optimizer; also whether every value is as it was."""
    model, old = Rank.model, Rank.optimizer
    before = [p.detach().double().sum().item() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    old.state.clear()
    Rank.optimizer = torch.optim.AdamW(model.parameters())
    seconds, peak = measured(lambda: sp.load(directory, model, Rank.optimizer))
    after = [p.detach().double().sum().item() for p in model.parameters()]
    return seconds, peak, before == after


def plain_times(path: Path) -> tuple[float, float]:
    """Seconds of `load_file` and `save_file` of all tensors of a checkpoint, in one process."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    began = time.perf_counter()
    files: dict[str, dict[str, Tensor]] = {
        file.name: {name: tensor.clone() for name, tensor in load_file(file).items()}
        for file in sorted(path.glob("*.safetensors"))
    }
    load = time.perf_counter() - began
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        began = time.perf_counter()
        for name, tensors in files.items():
            save_file(tensors, Path(folder) / name)
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        return load, time.perf_counter() - began


def run(gib: float, degree: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Times and memory of every round."""
    layers = max(2, round(gib * (1 << 30) / (WIDTH * WIDTH * 4)))
    found: dict[str, list[float]] = {key: [] for key in ("save", "load", "save_file", "load_file")}
    peaks: dict[str, list[int]] = {"save": [], "load": []}
    directory = str(folder / "checkpoint")
    with open_ranks(degree, "processes") as ranks:
        held = ranks.run(lambda axis: build(axis, layers))
        for _ in range(rounds):
            save = ranks.run(lambda axis: saved(axis, directory))
            load = ranks.run(lambda axis: loaded(axis, directory))
            if not all(same for *_, same in load):
                raise SystemExit("the values that were loaded are not those that were saved")
            found["save"].append(max(seconds for seconds, _ in save))
            found["load"].append(max(seconds for seconds, *_ in load))
            peaks["save"].append(max(peak for _, peak in save))
            peaks["load"].append(max(peak for _, peak, _ in load))
            load_file, save_file = plain_times(Path(directory))
            found["load_file"].append(load_file)
            found["save_file"].append(save_file)
    return {"bytes_of_a_rank": max(held), "seconds": found, "peaks": peaks, "degree": degree}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="How long a checkpoint takes.")
    parser.add_argument("--gib", type=float, default=1.0, help="GiB of weights")
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="on the disk that is measured; /tmp if not given"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = run(options.gib, options.degree, options.rounds, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    middle = {key: statistics.median(each) for key, each in result["seconds"].items()}
    table = Table("call", "seconds", "safetensors", "ratio", "peak above, MiB", "of the shard")
    for key in ("save", "load"):
        peak = statistics.median(result["peaks"][key])
        table.add_row(
            f"sp.{key}",
            f"{middle[key]:.2f}",
            f"{middle[f'{key}_file']:.2f}",
            f"{middle[key] / middle[f'{key}_file']:.2f}",
            f"{peak / MIB:.0f}",
            f"{peak / result['bytes_of_a_rank']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    from benchmarks import checkpoint_times  # ranks find its functions by this name

    checkpoint_times.main()
