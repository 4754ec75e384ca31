"""A rank of two needs half of the memory in which plain torch makes and trains a model.

Measured as `benchmarks/llama_memory.py` does, which has the same on a GiB of weights.
"""

import pytest

import shardproof as sp
from places import Pool

pytest.importorskip("transformers")

from benchmarks import llama_memory as memory

SIZE, SHARE = "48MiB", 0.55


@pytest.fixture(scope="module")
def plain_tensors(pool: Pool) -> int:
    (peak,) = pool(1, "threads").run(lambda axis: memory.train(None, SIZE))
    assert abs(peak.weights / (48 << 20) - 1) < 0.01
    assert 4 * peak.weights < peak.tensors < 5 * peak.weights  # gradients, two moments, activations
    return peak.tensors


def test_a_rank_of_two_needs_little_more_than_half(plain_tensors: int, pool: Pool) -> None:
    peaks = pool(2, "threads").run(lambda axis: memory.train(axis, SIZE))
    for peak in peaks:
        assert peak.tensors > 4 * peak.weights  # nothing was overlooked
        assert peak.tensors <= SHARE * plain_tensors
    assert peaks[0].losses == peaks[1].losses


def test_what_stays_whole_is_seen(plain_tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the vocabulary, 35 % of the weights stay whole."""
    layers = {
        f"model.layers.*.{name}": sp.RowParallel()
        if name == "mlp.down_proj"
        else sp.ColumnParallel()
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    original = memory.cut
    monkeypatch.setattr(memory, "cut", lambda size, axis: original(size, axis, layers))
    (peak, _) = sp.launch(lambda axis: memory.train(axis, SIZE), degree=2)
    assert peak.tensors > SHARE * plain_tensors
