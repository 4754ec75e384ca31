"""Reinforcement learning: generator and trainer have the same log-probabilities, in all layouts.

It runs examples/policy_gradient.py, whose ranks are threads here, with a few rounds.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardproof as sp
from shardproof import comm, gradient_exchange
from shardproof.numerics import mode
from shardproof.tree import Node

transformers = pytest.importorskip("transformers")

ROUNDS = 2
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
NONE = " 0 of {} log-probabilities differ"


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """The example as a module."""
    if mode.missing_products():
        pytest.skip(f"needs our own products: {mode.missing_products()}")
    branch = mode.set_blas_mode().branch
    if branch != "core":
        pytest.skip(f"the BLAS mode is {branch}: run this with SHARDPROOF_BLAS=core")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDPROOF_BLAS", os.environ.get("SHARDPROOF_BLAS", "auto"))  # put back after
        yield importlib.import_module("examples.policy_gradient")


@pytest.fixture(scope="module")
def alone(example: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of one rank that generates and one that trains."""
    found: str = example.run(tmp_path_factory.mktemp("alone"), degree=1, tp=1, dp=1, rounds=ROUNDS)
    return found


@pytest.mark.parametrize(("degree", "tp", "dp"), [(3, 2, 2), (2, 3, 1), (4, 1, 3)])
def test_the_whole_loop_has_the_same_bits_in_every_layout(
    degree: int,
    tp: int,
    dp: int,
    example: Any,
    alone: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert example.run(tmp_path, degree=degree, tp=tp, dp=dp, rounds=ROUNDS) == alone
    computed = example.ROWS * example.NEW * tp  # each rank of a group has all of its rows
    assert capsys.readouterr().out.count(NONE.format(computed)) == ROUNDS


def test_every_round_changes_the_weights_and_the_tokens(example: Any, tmp_path: Path) -> None:
    """Equal hashes would show nothing of a loop that stands still."""
    tokens = [example.generate(sp.Axis.solo(), tmp_path, step=0)[0]]
    digests = set()
    for rounds in (1, 2):
        digests.add(example.run(tmp_path / f"{rounds}", degree=1, tp=1, dp=1, rounds=rounds))
        tokens.append(example.generate(sp.Axis.solo(), tmp_path / f"{rounds}", step=0)[0])
    assert len(digests) == 2
    prompt = example.PROMPT
    assert all(torch.equal(each[:, :prompt], tokens[0][:, :prompt]) for each in tokens)
    assert len({each.numpy().tobytes() for each in tokens}) == 3


def test_plain_torch_has_the_same_log_probabilities_and_gradients(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 up to rounding: the formula of the policy gradient, written once more."""
    gradients: dict[str, Tensor] = {}
    start = {name: each.detach() for name, each in example.make(sp.Axis.solo()).named_parameters()}

    def keep(model: Any, most: float) -> None:
        gradients.update({name: each.grad.clone() for name, each in model.named_parameters()})

    monkeypatch.setattr(example.sp, "clip_grad_norm_", keep)
    tokens, generated = example.generate(sp.Axis.solo(), tmp_path, step=0)
    example.train(sp.Axis.solo(), tmp_path, 1, (tokens, generated))

    config = transformers.LlamaConfig(vocab_size=257, **example.SIZES, **example.HEADS)
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(start)
    new = tokens[:, example.PROMPT :]
    logits = plain(input_ids=tokens).logits[:, example.PROMPT - 1 : -1] / example.TEMPERATURE
    scores = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
    torch.testing.assert_close(generated, scores.detach(), rtol=0, atol=1e-5)
    rewards = torch.tensor([sum(chr(x) in LETTERS for x in row) / len(row) for row in new.tolist()])
    advantages = (rewards - rewards.mean()) / rewards.std()
    (-(advantages[:, None] * scores).mean()).backward()
    assert gradients.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(
            gradients[name] / scale, parameter.grad / scale, rtol=0, atol=1e-4, msg=name
        )


# ---- planted faults


def _in_the_trainer(
    example: Any, patch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Another formula where there are gradients; the generator keeps its own."""
    original = example.log_probabilities

    def log_probabilities(logits: Tensor, chosen: Tensor) -> Tensor:
        formula = change if torch.is_grad_enabled() else original
        return formula(logits, chosen)

    patch.setattr(example, "log_probabilities", log_probabilities)


def _another_temperature(example: Any, patch: pytest.MonkeyPatch) -> None:
    """The trainer forgets the temperature."""
    original = example.log_probabilities
    _in_the_trainer(
        example, patch, lambda logits, chosen: original(logits * example.TEMPERATURE, chosen)
    )


def _another_formula(example: Any, patch: pytest.MonkeyPatch) -> None:
    """The same numbers, added over the vocabulary in another order."""

    def log_softmax(logits: Tensor, chosen: Tensor) -> Tensor:
        scores = (logits / example.TEMPERATURE).log_softmax(-1)
        return scores.gather(-1, chosen[..., None])[..., 0]

    _in_the_trainer(example, patch, log_softmax)


def _stale_weights(example: Any, patch: pytest.MonkeyPatch) -> None:
    """The generator never reads a checkpoint, which shows from the second round on."""
    original = sp.latest_checkpoint

    def latest_checkpoint(directory: Path) -> Path | None:
        return original(directory) if torch.is_grad_enabled() else None

    patch.setattr(example.sp, "latest_checkpoint", latest_checkpoint)


def _one_token_late(example: Any, patch: pytest.MonkeyPatch) -> None:
    """The trainer takes the logits of the position after the one that chose the token."""
    original = example.log_probabilities
    _in_the_trainer(example, patch, lambda logits, chosen: original(logits.roll(-1, 1), chosen))


GOOD_ROUNDS = {_another_temperature: 0, _another_formula: 0, _one_token_late: 0, _stale_weights: 1}


@pytest.mark.parametrize("plant", GOOD_ROUNDS, ids=lambda each: each.__name__)
def test_a_fault_of_one_side_is_seen(
    plant: Callable[[Any, pytest.MonkeyPatch], None],
    example: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(example, monkeypatch)
    with pytest.raises(AssertionError, match=r"^[1-9]\d* of \d+ log-probabilities differ"):
        example.run(tmp_path, degree=1, tp=1, dp=2, rounds=ROUNDS)
    computed = example.ROWS * example.NEW
    assert capsys.readouterr().out.count(NONE.format(computed)) == GOOD_ROUNDS[plant]


def test_rows_that_are_lost_between_groups_change_the_hash(
    example: Any, alone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the layout alone: all log-probabilities are right, and the hash is another one."""
    original = comm.start_all_reduce_nodes

    def start(nodes: Mapping[Node, Tensor], axis: Any, **options: Any) -> comm.StartedSum:
        if axis.rank:
            nodes = {node: torch.zeros_like(each) for node, each in nodes.items()}
        return original(nodes, axis, **options)

    monkeypatch.setattr(gradient_exchange.comm, "start_all_reduce_nodes", start)
    assert example.run(tmp_path, degree=1, tp=1, dp=2, rounds=ROUNDS) != alone
