"""Generate at degree 3 with a KV cache, score in training mode at degrees 1 and 2: the same bits.

python examples/score_what_was_generated.py

Reinforcement learning computes the log-probability of a token twice: once when a model generates
the token, and again when a trainer scores it. Here both give the same number, to the last bit.
"""

import copy
import os

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

os.environ["SHARDPROOF_BLAS"] = "core"  # our own products: a row's bits do not depend on its batch

import shardproof as sp  # before the first matrix product: it sets the BLAS mode
from shardproof import hf

PROMPT, NEW, ROWS = 16, 24, 4
config = LlamaConfig(
    vocab_size=257,
    hidden_size=64,
    intermediate_size=171,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    pad_token_id=0,
    eos_token_id=None,
)
torch.manual_seed(0)
whole = LlamaForCausalLM(config)
prompts = torch.randint(1, 257, (ROWS, PROMPT))


def log_probabilities(logits: Tensor, chosen: Tensor) -> Tensor:
    """Of the tokens that were chosen: (rows, new)."""
    return logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]


def generate(axis: sp.Axis) -> tuple[Tensor, Tensor]:
    """Sample, one token at a time; the sequences, and the log-probabilities of their new tokens."""
    model = sp.parallelize(copy.deepcopy(whole), None, axis).eval()
    output = model.generate(
        prompts,
        max_new_tokens=NEW,
        do_sample=False,
        logits_processor=[hf.KeyedSampling(seed=1)],  # it samples, alike on all ranks
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(output.logits, 1)
    return output.sequences, log_probabilities(logits, output.sequences[:, PROMPT:])


def score(axis: sp.Axis) -> tuple[Tensor, Tensor]:
    """Forward and backward over whole sequences, as a batch and one by one, in training mode."""
    model = sp.parallelize(copy.deepcopy(whole), None, axis).train()
    found = []
    for batch in (sequences, *sequences.split(1)):
        logits = model(input_ids=batch).logits[:, PROMPT - 1 : -1]
        scores = log_probabilities(logits, batch[:, PROMPT:])
        (-scores.mean()).backward()
        found.append(scores.detach())
    return found[0], torch.cat(found[1:])


sequences, generated = sp.launch(generate, degree=3)[0]
print(f"degree 3 generated {ROWS} x {NEW} tokens, log-probability {generated.mean():.6f} each")
is_same = True
for degree in (1, 2):
    as_batch, by_row = sp.launch(score, degree=degree)[0]
    for how, scores in (("as a batch", as_batch), ("row by row", by_row)):
        apart = (scores - generated).abs().max().item()
        is_same &= torch.equal(scores, generated)
        print(f"degree {degree} scored them {how}: largest difference {apart:.1e}")

plain = copy.deepcopy(whole).train()
with torch.no_grad():
    logits = plain(input_ids=sequences).logits[:, PROMPT - 1 : -1]
apart = (log_probabilities(logits, sequences[:, PROMPT:]) - generated).abs().max().item()
print(f"plain torch: largest difference {apart:.1e}")
print(f"generator and trainer have the same log-probabilities: {is_same}")
if not is_same or apart > 1e-4:
    raise SystemExit(1)
