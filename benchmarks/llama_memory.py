"""How much memory one rank needs to train a Llama of Hugging Face transformers, beside plain torch.

    python -m benchmarks.llama_memory --size 1GiB --degree 2

Plain: the class as it is, made whole in plain torch. Cut: made on the meta device, cut by its own
`tp_plan`, then given numbers leaf by leaf. Both train for two steps with AdamW(foreach=False) on
one short batch; every rank is a process. *Tensors* is the largest sum of bytes of living tensors,
seen after every operation from the first weight to the last update; *resident* is by how much the
process itself grew, shared memory of the transport included. Needs the extra `hf`.
"""

import argparse
import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shardproof as sp  # before the first matrix product: it sets the BLAS mode
from benchmarks.counting import Counting

MIB = 1 << 20
STEPS, ROWS, LENGTH = 2, 2, 16

# Name -> how large fp32 weights are, and the model: its vocabulary divides by no degree.
SIZES: dict[str, dict[str, int]] = {
    "1GiB": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": 17,
        "vocab_size": 33135,
    },
    "48MiB": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 11,
        "vocab_size": 8737,
    },
}


@dataclass(frozen=True)
class Peak:
    """What one rank needed.

    Attributes:
        weights: bytes of the parameters that it holds.
        tensors: the most bytes of living tensors.
        resident: by how many bytes the process grew.
        losses: of the steps.
    """

    weights: int
    tensors: int
    resident: int
    losses: tuple[float, ...]


def train(axis: sp.Axis | None, size: str) -> Peak:
    """Make the model and train it, on one rank; None: in plain torch."""
    before = resident()
    tokens = torch.randint(
        SIZES[size]["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    with Counting([tokens]) as counting:
        model = make(size) if axis is None else cut(size, axis)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        losses = []
        for _ in range(STEPS):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    weights = sum(each.nbytes for each in model.parameters())
    return Peak(weights, counting.peak, resident() - before, tuple(losses))


def make(size: str) -> Any:
    """The model as transformers makes it."""
    return LlamaForCausalLM(LlamaConfig(**SIZES[size]))


def cut(size: str, axis: sp.Axis, plan: dict[str, sp.ColumnParallel] | None = None) -> Any:
    """This rank's part of it; nothing whole ever exists. None: cut by its own plan."""
    with torch.device("meta"):
        model = make(size)
    return sp.initialize(sp.parallelize(model, plan, axis))


def resident() -> int:
    """The most bytes of memory that this process has had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(size: str, degree: int, *, engine: str) -> tuple[Peak, list[Peak]]:
    """Plain torch, and every rank of a cut model."""
    (plain,) = sp.launch(lambda axis: train(None, size), degree=1, engine=engine)
    return plain, sp.launch(lambda axis: train(axis, size), degree=degree, engine=engine)


def table(plain: Peak, ranks: list[Peak]) -> str:
    """Markdown, in MiB, with each rank's share of plain torch."""
    lines = ["| run | weights | tensors | resident |", "|---|---|---|---|"]
    for name, peak in [("plain torch", plain)] + [
        (f"rank {rank} of {len(ranks)}", peak) for rank, peak in enumerate(ranks)
    ]:
        cells = []
        for kind in ("weights", "tensors", "resident"):
            mine, whole = getattr(peak, kind), getattr(plain, kind)
            share = "" if peak is plain else f" ({mine / whole:.3f})"
            cells.append(f"{mine / MIB:,.0f} MiB{share}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1GiB")
    parser.add_argument("--degree", type=int, default=2)
    options = parser.parse_args()
    print(table(*measure(options.size, options.degree, engine="processes")))


if __name__ == "__main__":
    main()
