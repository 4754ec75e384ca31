"""Policy gradients: generate at degree 3, train at tp 2 x dp 2; the same bits in every layout.

python examples/policy_gradient.py
python examples/policy_gradient.py --generate 1 --tp 1 --dp 3    # other ranks, the same hash

A generator continues Python's own sources, a token at a time, with a KV cache. A trainer computes
the log-probabilities of the new tokens again, each row in one forward, and steps towards more
lower-case letters. Both have the same log-probabilities, to the last bit: the trainer's policy is
the generator's, and no ratio between them has to be corrected.
"""

import argparse
import functools
import hashlib
import os
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

os.environ["SHARDPROOF_BLAS"] = "core"  # our own products: a row's bits do not depend on its batch

import shardproof as sp  # before the first matrix product: it sets the BLAS mode

ROUNDS, ROWS, PROMPT, NEW = 10, 32, 16, 16  # with 16 tokens or more, the KV cache changes no bit
TEMPERATURE, LR = 0.9, 1e-2
SIZES = {"hidden_size": 64, "intermediate_size": 171, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
TEXT = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]


def make(axis: sp.Axis) -> nn.Module:
    """The model on one rank, with the weights of the start."""
    with torch.device("meta"):  # no rank ever makes a full weight
        model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **SIZES, **HEADS))
    sp.initialize(sp.parallelize(model, None, axis, scheme=sp.Scheme(batch_leaves=8)))
    return model


def log_probabilities(logits: Tensor, chosen: Tensor) -> Tensor:
    """Of the chosen tokens, (rows, tokens). Another formula would have other last bits."""
    scaled = logits.flatten(0, 1) / TEMPERATURE
    losses = sp.functional.cross_entropy(scaled, chosen.flatten(), reduction="none")
    return -losses.view(chosen.shape)


def rewards_of(tokens: Tensor) -> Tensor:
    """The share of lower-case letters among the new tokens of each row."""
    new = tokens[:, PROMPT:]
    return ((new >= ord("a")) & (new <= ord("z"))).double().mean(1)


@torch.no_grad()
def generate(axis: sp.Axis, directory: Path, step: int) -> tuple[Tensor, Tensor]:
    """Continue prompts on one rank: all tokens, and the log-probabilities of the new ones."""
    model = make(axis).eval()
    latest = sp.latest_checkpoint(directory)
    if latest is not None:
        sp.load(latest, model, weights_only=True)
    sampler = sp.KeyedSampler(seed=step, temperature=TEMPERATURE)
    parts = [sp.TextBatches(TEXT, rows=ROWS, length=PROMPT).batch(step)]
    cache, scores = None, []
    for _ in range(NEW):  # the first forward reads the prompts, each later one a single token
        output = model(input_ids=parts[-1], past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1:]
        parts.append(sampler(logits))
        scores.append(log_probabilities(logits, parts[-1]))
    return torch.cat(parts, 1), torch.cat(scores, 1)


def train(axis: sp.Axis, directory: Path, dp: int, made: tuple[Tensor, Tensor]) -> tuple[int, int]:
    """Take a step on one rank; how many log-probabilities it computed, and how many differ."""
    tokens, generated = made
    axes = axis.split(dp=dp, tp=axis.size // dp)
    model = make(axes["tp"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95))
    latest = sp.latest_checkpoint(directory)
    step = 0 if latest is None else sp.load(latest, model, optimizer).step
    rewards = rewards_of(tokens)
    advantages = ((rewards - rewards.mean()) / rewards.std().clamp(min=1e-3)).float()
    is_same = []

    def loss_of(samples: slice) -> tuple[Tensor, int]:
        rows = tokens[samples]
        logits = model(input_ids=rows, use_cache=False).logits[:, PROMPT - 1 : -1]
        scores = log_probabilities(logits, rows[:, PROMPT:])
        is_same.append(scores.detach().view(torch.int32) == generated[samples].view(torch.int32))
        return -(advantages[samples, None] * scores).sum(), scores.numel()

    sp.DataParallel(model, axes["dp"]).backward(loss_of, len(tokens))
    sp.clip_grad_norm_(model, 1.0)
    optimizer.step()
    if axes["dp"].rank == 0:  # the other groups have the same weights
        sp.save(directory / f"step-{step + 1:08}", model, optimizer, step=step + 1)
    bits = torch.cat(is_same)
    return bits.numel(), int((~bits).sum())


def run(directory: Path, *, degree: int, tp: int, dp: int, rounds: int = ROUNDS) -> str:
    """Generate and train in turn; SHA-256 of all weights at the end."""
    for step in range(rounds):
        work = functools.partial(generate, directory=directory, step=step)
        made = sp.launch(work, degree=degree)[0]
        learn = functools.partial(train, directory=directory, dp=dp, made=made)
        counts = sp.launch(learn, degree=tp * dp)
        computed, differing = (sum(each) for each in zip(*counts, strict=True))
        verdict = f"{differing} of {computed} log-probabilities differ"
        letters = f"{rewards_of(made[0]).mean():.0%} lower-case letters"
        print(f"round {step + 1:2}: {letters}; on the trainer's ranks {verdict}")
        assert not differing, verdict
    weights = directory / f"step-{rounds:08}" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--generate", type=int, default=3, help="ranks that generate")
    parser.add_argument("--tp", type=int, default=2, help="ranks of the trainer that share a model")
    parser.add_argument("--dp", type=int, default=2, help="groups of them that share a batch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        digest = run(Path(folder), degree=options.generate, tp=options.tp, dp=options.dp)
    print(f"weights {digest[:16]}, the same in every layout")
