"""Whether checkpoints are the same files everywhere, and resumed runs the unbroken run.

    python -m benchmarks.checkpoint_matrix

Five models (the decoder, Llama and Qwen 3 of the cases on text, the classifier of digits, and a
plain module with dropout and BatchNorm) with three optimizers (momentum SGD, AdamW, Muon). Each is
trained and saved at degrees 1, 2, 3, 5 and 8 on threads, at degree 2 over shared memory and at
degree 3 over gloo; then one run goes from degree 2 to 3, 1 and 8. SHA-256 of every file must be
that of degree 1, and of the run that never stopped. It exits with 1 if one is not.
"""

import argparse
import functools
import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from shardproof.axis import Axis
from shardproof.prover.case import CaseRun
from shardproof.prover.cases import digits, gpt, text_training, transformers_models
from shardproof.ranks import open_ranks
from shardproof.scheme import Scheme

PLACES = (
    *((degree, "threads", "auto") for degree in (1, 2, 3, 5, 8)),
    (2, "processes", "shm"),
    (3, "processes", "gloo"),
)
CHAIN = (2, 3, 1, 8)  # degrees of the run that is resumed
STEPS = 2  # of each part of it
DROPOUT = 0.1
Optimizers = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "muon": lambda model: sp.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-3),
}
MODELS = ("gpt", "llama", "qwen", "digits", "plain")


def build(name: str, axis: Axis) -> nn.Module:
    """A cut model, with the same numbers at every degree."""
    run = CaseRun(axis=axis, scheme=Scheme(), seed=1, recorder=NullRecorder())
    if name == "digits":
        return digits.build(run)
    if name == "plain":
        with torch.random.fork_rng(devices=[]):
            layers = (nn.Linear(20, 37), nn.Dropout(DROPOUT), nn.BatchNorm1d(37), nn.Linear(37, 10))
        model = nn.Sequential(*layers)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return sp.parallelize(model, None, axis, inputs=torch.zeros(4, 20))
    return _source(name).build(run, dropout=DROPOUT)


def _source(name: str) -> Any:
    if name == "gpt":
        return gpt.DecoderSource()
    make = transformers_models.make_llama if name == "llama" else transformers_models.make_qwen
    return transformers_models.ModelSource(make)


class NullRecorder:
    """Takes tensors of a run, and leaves them."""

    def record(self, *_: Any) -> None:
        """Do nothing."""

    def set_aside(self, *_: Any) -> None:
        """Do nothing."""


def loss_of(name: str, model: nn.Module, step: int) -> Tensor:
    """The loss of a step, on data that follows from its number."""
    generator = torch.Generator().manual_seed(step)
    if name == "digits":
        x = torch.rand(30, 64, generator=generator)
        target = torch.randint(10, (30,), generator=generator)
        return sp.functional.cross_entropy(model(x), target)
    if name == "plain":
        x = torch.randn(6, 20, generator=generator)
        return F.mse_loss(model(x), torch.ones(6, 10))
    source = _source(name)
    vocabulary = source.vocabulary
    text = text_training.standard_library()
    tokens = text.windows(seed=1, step=step, rows=2, length=16, vocabulary=vocabulary)
    run = CaseRun(axis=None, scheme=None, seed=1, recorder=NullRecorder())
    loss: Tensor = source.score(run, model, tokens).loss
    return loss


def train(
    axis: Axis, *, name: str, optimizer: str, first: int, last: int, start: str, to: str
) -> None:
    """Train from a checkpoint, or from the beginning, and save."""
    model = build(name, axis).train()
    updates = OPTIMIZERS[optimizer](model)
    if start and sp.load(start, model, updates).step != first:
        raise RuntimeError(f"{start} has another step")
    for step in range(first, last):
        updates.zero_grad()
        loss_of(name, model, step).backward()
        updates.step()
    sp.save(to, model, updates, step=last)


def hashes(directory: Path) -> dict[str, str]:
    """Name of a file -> its SHA-256."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def differences(name: str, optimizer: str, folder: Path) -> Iterator[str]:
    """Where a file has another hash than at degree 1, or than in the unbroken run."""

    def run(place: tuple[int, str, str], first: int, last: int, start: str, to: Path) -> None:
        degree, engine, transport = place
        work = functools.partial(
            train, name=name, optimizer=optimizer, first=first, last=last, start=start, to=str(to)
        )
        with open_ranks(degree, engine, transport=transport) as ranks:
            ranks.run(work)

    expected: dict[str, str] = {}
    for place in PLACES:
        to = folder / "-".join(map(str, place))
        run(place, 0, STEPS, "", to)
        expected = expected or hashes(to)
        if hashes(to) != expected:
            yield f"degree {place[0]}, {place[1]}, {place[2]}"
    before = ""
    for number, degree in enumerate(CHAIN):
        to = folder / f"part {number}"
        run((degree, "threads", "auto"), number * STEPS, (number + 1) * STEPS, before, to)
        before = str(to)
    whole = folder / "unbroken"
    run((1, "threads", "auto"), 0, len(CHAIN) * STEPS, "", whole)
    if hashes(Path(before)) != hashes(whole):
        yield f"resumed at degrees {', '.join(map(str, CHAIN))}"


def main() -> None:
    """Print a table, and exit with 1 if a file differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one")
    parser.add_argument("--optimizer", action="append", choices=tuple(OPTIMIZERS), help="only it")
    options = parser.parse_args()
    table = Table("model", "optimizer", "files", "other bytes")
    is_same = True
    for name in options.model or MODELS:
        for optimizer in options.optimizer or OPTIMIZERS:
            with tempfile.TemporaryDirectory(prefix="shardproof-") as folder:
                found = list(differences(name, optimizer, Path(folder)))
                count = len(hashes(Path(folder) / "unbroken"))
            is_same &= not found
            table.add_row(name, optimizer, str(count), "; ".join(found) or "none")
            sys.stderr.write(f"{name} {optimizer}: {'; '.join(found) or 'same'}\n")
    Console().print(table)
    sys.exit(not is_same)


if __name__ == "__main__":
    main()
