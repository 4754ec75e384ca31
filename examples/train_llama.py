"""Train a small Llama of Hugging Face transformers on Python's own sources, byte by byte.

torchrun --nproc-per-node 2 examples/train_llama.py
python examples/train_llama.py    # degree 1: the same losses, to the last bit
"""

import hashlib
import os
import struct
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import shardproof as sp  # before the first matrix product: it sets the BLAS mode

STEPS, ROWS, LENGTH = 20, 8, 64
axis = sp.Axis.from_env() if "RANK" in os.environ else sp.Axis.solo()

files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)
draws = torch.Generator().manual_seed(0)  # every rank reads the same text

with torch.device("meta"):  # shapes alone
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,  # a byte is a token; neither 257 nor 171 divides by anything
            hidden_size=64,
            intermediate_size=171,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    )
sp.parallelize(model, None, axis)  # by the tp_plan that the model carries
sp.initialize(model)  # each rank draws its own leaves; no full weight is ever anywhere
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))

losses = []
for step in range(STEPS):
    starts = torch.randint(len(text) - LENGTH, (ROWS, 1), generator=draws)
    tokens = text[starts + torch.arange(LENGTH)].long()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    sp.clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if axis.rank == 0:
        print(f"step {step + 1:2}: loss {losses[-1]:.4f}")

if axis.rank == 0:
    curve = hashlib.sha256(struct.pack(f"{STEPS}d", *losses)).hexdigest()
    print(f"loss curve {curve[:16]}, the same at every degree")
if dist.is_initialized():
    dist.destroy_process_group()
assert losses[-1] < 0.7 * losses[0], "nothing was learned"
