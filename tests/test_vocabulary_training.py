"""A vocabulary that no degree divides changes nothing in a long training, however rough it is.

The setting is that of Megatron-LM issue 1754 in small: vocabulary 50257, one row a step, Adam with
its learning rate of 0.3. There the loss at degree 2 parted from that at degree 1 by 47 after 2000
steps; and training so rough does turn one last bit into another curve, as the control shows.
"""

import functools
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

import shardproof as sp
from places import Pool

transformers = pytest.importorskip("transformers")

VOCABULARY, STEPS, LENGTH = 50257, 60, 4


def tokens() -> Tensor:
    """(STEPS, LENGTH): text by pairs of bytes, spread over the whole vocabulary."""
    text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_bytes()
    pairs = torch.tensor(list(text[: 2 * STEPS * LENGTH])).view(-1, 2)
    return ((pairs[:, 0] * 256 + pairs[:, 1]) * 20011 % VOCABULARY).view(STEPS, LENGTH)


def curve(axis: sp.Axis, *, threads: int = 1, steps: int = STEPS, numerics: str) -> list[float]:
    """The loss of every step on one rank."""
    torch.set_num_threads(threads)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        intermediate_size=21,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    sp.parallelize(model, None, axis, scheme=sp.Scheme(numerics=numerics))
    sp.initialize(model)
    adam = torch.optim.Adam(model.parameters(), lr=0.3, betas=(0.9, 0.95))
    losses = []
    for row in tokens()[:steps]:
        loss = model(input_ids=row[None], labels=row[None], use_cache=False).loss
        loss.backward()
        sp.clip_grad_norm_(model, 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    torch.set_num_threads(1)
    return losses


def test_the_text_is_all_over_the_vocabulary() -> None:
    found = tokens()
    assert int(found.min()) < VOCABULARY // 3
    assert int(found.max()) > 2 * VOCABULARY // 3  # every rank has rows that are looked up


def test_loss_curves_have_the_same_bits(pool: Pool) -> None:
    invariant = functools.partial(curve, numerics="invariant")
    (one,) = pool(1, "threads").run(invariant)
    assert len(one) == STEPS
    assert len(set(one)) > STEPS // 2  # something happens
    assert all(one)
    for losses in pool(3, "threads").run(invariant):
        assert losses == one  # none is 0, so equal floats have the same bits
    (first,) = pool(1, "threads").run(functools.partial(invariant, threads=2, steps=8))
    assert first == one[:8]


def test_one_product_per_shard_makes_another_curve(pool: Pool) -> None:
    native = functools.partial(curve, numerics="native", steps=STEPS // 2)
    (one,) = pool(1, "threads").run(native)
    two = pool(2, "threads").run(native)[0]
    assert one != two
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) > 1e-3
