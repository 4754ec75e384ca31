"""The text that the cases learn from: real, whole, and the same whoever reads it."""

import hashlib
import sysconfig
from pathlib import Path

import pytest
import torch

from shardproof.errors import UsageError
from shardproof.leaves import Cut
from shardproof.prover.cases import text_training

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def test_every_byte_of_every_module_is_a_token() -> None:
    joined = b"".join((STDLIB / name).read_bytes() for name in sorted(text_training.MODULES))
    found = text_training.standard_library()
    assert bytes(found.content.tolist()) == joined
    assert found.digest == hashlib.sha256(joined).hexdigest()
    assert len(joined) > 400_000


def test_the_order_of_the_files_does_not_matter() -> None:
    forwards = text_training.read(STDLIB, text_training.MODULES)
    backwards = text_training.read(STDLIB, tuple(reversed(text_training.MODULES)))
    assert torch.equal(forwards.content, backwards.content)
    assert forwards.digest == backwards.digest


def test_another_text_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "b.py").write_text("two")
    assert bytes(text_training.read(tmp_path, ("b.py", "a.py")).content.tolist()) == b"onetwo"
    assert (
        text_training.read(tmp_path, ("a.py",)).digest
        != text_training.read(tmp_path, ("b.py",)).digest
    )


def test_it_says_what_it_is() -> None:
    found = text_training.standard_library()
    digest = found.digest[:16]
    assert str(found).endswith(
        f"bytes of the Python {_version()} standard library, sha256 {digest}"
    )


def _version() -> str:
    return sysconfig.get_python_version()


def as_bytes(tokens: torch.Tensor, vocabulary: int = 256) -> bytes:
    byte_of = {
        token: byte for byte, token in enumerate(text_training.token_of_byte(vocabulary).tolist())
    }
    return bytes(byte_of[token] for token in tokens.tolist())


def test_windows_are_runs_of_the_text() -> None:
    found = text_training.standard_library()
    whole = bytes(found.content.tolist())
    for vocabulary in (256, 257, 50257):
        drawn = found.windows(seed=3, step=0, rows=5, length=40, vocabulary=vocabulary)
        assert drawn.shape == (5, 40)
        assert drawn.dtype == torch.int64
        assert all(as_bytes(row, vocabulary) in whole for row in drawn)


@pytest.mark.parametrize("vocabulary", [256, 257, 300, 50257])
def test_every_rank_has_rows_of_the_vocabulary_that_are_read(vocabulary: int) -> None:
    tokens = text_training.token_of_byte(vocabulary)
    assert len(set(tokens.tolist())) == 256
    assert tokens.max() < vocabulary
    cut = Cut(vocabulary, leaves=8, degree=8)
    ascii_tokens = tokens[:128].tolist()
    for rank in range(8):
        assert sum(token in cut.owned(rank) for token in ascii_tokens) >= 12


def test_a_vocabulary_that_lacks_bytes() -> None:
    with pytest.raises(UsageError, match="256 tokens, one for each byte, and the model knows 255"):
        text_training.token_of_byte(255)


def test_windows_are_keyed_by_seed_and_step() -> None:
    found = text_training.standard_library()

    def draw(seed: int, step: int) -> torch.Tensor:
        return found.windows(seed=seed, step=step, rows=4, length=16)

    before = torch.get_rng_state()
    assert torch.equal(draw(1, 2), draw(1, 2))
    assert not torch.equal(draw(1, 2), draw(1, 3))
    assert not torch.equal(draw(1, 2), draw(2, 2))
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not touched"


def test_a_window_may_be_the_whole_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\x00\xffxyz")
    found = text_training.read(tmp_path, ("a.py",))
    assert as_bytes(found.windows(seed=0, step=0, rows=1, length=5)[0]) == b"\x00\xffxyz"


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"argparse.py cannot be read: No such file.*sources"):
        text_training.read(tmp_path)
