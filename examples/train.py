"""Train a small Llama on Python's own sources; after Ctrl-C go on at any degree.

python examples/train.py DIRECTORY --degree 2    # Ctrl-C saves; the next run goes on
python examples/train.py DIRECTORY --degree 3    # with the same bits
torchrun --nproc-per-node 2 examples/train.py DIRECTORY
"""

import argparse
import math
import os
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shardproof as sp  # before the first matrix product: it sets the BLAS mode

STEPS, EVERY, LR = 24, 12, 3e-3
SIZES = {"hidden_size": 64, "intermediate_size": 171, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
TEXT = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]


def train(axis: sp.Axis, directory: Path, stop: sp.StopSignal) -> None:
    """Train on one rank, from the latest checkpoint of the directory on."""
    with torch.device("meta"):  # no rank ever makes a full weight
        model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **SIZES, **HEADS))
    sp.initialize(sp.parallelize(model, None, axis))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    text = sp.TextBatches(TEXT, rows=8, length=64)
    start = sp.latest_checkpoint(directory)
    step = 0 if start is None else sp.load(start, model, optimizer).step
    stopped = False
    while step < STEPS and not stopped:
        tokens = text.batch(step)  # follows from the step alone
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        sp.clip_grad_norm_(model, 1.0)
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        stopped = stop.is_requested(axis)  # the same on all ranks
        if axis.rank == 0:
            print(f"step {step} of {STEPS}: loss {loss.item():.4f}", flush=True)
        if stopped or step % EVERY == 0:
            sp.save(directory / f"step-{step:08}", model, optimizer, step=step)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--degree", type=int, default=1)
    options = parser.parse_args()
    with sp.StopSignal() as stop:
        if "RANK" in os.environ:  # torchrun has started the ranks
            train(sp.Axis.from_env(), options.directory, stop)
        else:
            sp.launch(lambda axis: train(axis, options.directory, stop), degree=options.degree)
