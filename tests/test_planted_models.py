"""Planted faults of a model of transformers: heads, vocabulary, ties, norms, dropout, the loss.

A small Llama is cut by its own plan and trained for a clipped step; where the fault is the
loader's, it reads its numbers from a checkpoint. The controls run the set-ups as they are. Faults
that people make come from `shardproof.mistakes`, which plants them in a smaller model, too.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planted import expect_bits, expect_not_the_same, expect_proved, expect_torch
from planted_llama import EMBEDDING, HEAD, LAYER, VOCABULARY, Change, Steps, differing, prove
from shardproof import comm
from shardproof.axis import Axis
from shardproof.comm.split import Split
from shardproof.hf import head, weights
from shardproof.layers.dropout import Dropout
from shardproof.leaves import Layout
from shardproof.mistakes import find_mistake
from shardproof.numerics.sums import sum_squares
from shardproof.ops.head_split import HeadSplit
from shardproof.optim import gradient_norms
from shardproof.optim.layouts import ParameterLayout, layouts_of

pytest.importorskip("transformers")


def add_dropout(model: Any) -> None:
    """Dropout of what every rank has."""
    model.model.norm = nn.Sequential(model.model.norm, nn.Dropout(0.3))


QKV = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
TIED = {"tie_word_embeddings": True}
DROPPING = {"config": {"attention_dropout": 0.3}, "extend": add_dropout, "drops": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a checkpoint with the numbers that `Steps` starts from."""
    from safetensors.torch import save_file  # noqa: PLC0415 - comes with transformers

    folder: Path = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text("{}")
    alone = Steps().cut(Axis.solo())
    kept = {name: parameter.detach() for name, parameter in alone.named_parameters()}
    save_file(kept, folder / "model.safetensors")
    return folder


def loading(checkpoint: Path) -> Change:
    """Read the numbers again."""
    return lambda model, axis: weights.load(model, checkpoint)


@pytest.mark.parametrize(
    ("degrees", "parts"),
    [
        ((1, 2, 3, 4), {"count": 2}),
        ((1, 2), {"config": TIED}),
        ((1, 3), {"count": 2, **DROPPING}),
    ],
    ids=["steps", "tied", "dropout"],
)
def test_controls_are_proved(degrees: tuple[int, ...], parts: dict[str, Any]) -> None:
    expect_proved(prove(degrees=degrees, **parts))


def test_a_checkpoint_that_is_read_right_is_proved(checkpoint: Path) -> None:
    expect_proved(prove(degrees=(1, 2, 4), change=loading(checkpoint)))


def local_key_gradients(site: HeadSplit, partials: Tensor) -> Tensor:
    """Of what this rank's own query heads have."""
    own = [[*site._of_queries(key, partials).values()] for key in site.held]
    sums = [functools.reduce(torch.add, each) for each in own]
    return torch.stack(sums, 2) if sums else partials


def test_gradients_of_shared_key_value_heads_not_summed() -> None:
    """Each rank keeps what its own query heads say; right where no two ranks share a head."""
    with find_mistake("key-value-gradients-not-summed").planted():
        report = prove(degrees=(1, 2, 3, 4))  # 2: no two ranks share a head
    # A layer's norms are its last parameters: the one before k and v is recorded before them.
    expect_bits(report, f"{LAYER}.input_layernorm.weight.grad", degrees=(1, 3))
    own = {f"{LAYER}.self_attn.{each}_proj.weight" for each in ("k", "v")}
    wrong = {f"{LAYER}.input_layernorm.weight", EMBEDDING} | own
    assert differing(report, ".grad") == {f"{name}.grad" for name in wrong}
    assert not differing(report, degree=2)
    assert differing(report, "v_proj.weight.grad", degree=4)


def test_gradients_of_key_value_heads_summed_for_their_owner_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every sum over the ranks counts the owner's, and every hash: the copies must be looked at."""
    correct = HeadSplit.key_gradients

    def for_owner(self: HeadSplit, partials: Tensor) -> Tensor:
        summed = correct(self, partials)
        owned = self.heads.key_cut.run(self.axis.rank)
        if self.cut is None or all(key in owned for key in self.held):
            return summed
        local = local_key_gradients(self, partials)
        own = torch.tensor([key in owned for key in self.held])
        return torch.where(own[:, None, None], summed, local)

    monkeypatch.setattr(HeadSplit, "key_gradients", for_owner)
    report = prove(degrees=(1, 4))
    assert not differing(report)
    assert not report.proved
    assert (
        f"tensor {LAYER}.self_attn.v_proj.weight.grad is the first that is not identical "
        "(copies differ at degree 4: leaf 0 of rank 1 differs from that of rank 0; "
    ) in str(report)


def read_as(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, Layout], Layout]) -> None:
    """Let the loader read every weight for another layout, which `change` gives."""
    correct = weights.matched

    def planted(model: nn.Module, directory: Path) -> list[weights.Match]:
        return [
            (replace(entry, layout=change(entry.name, entry.layout)), file, stored)
            for entry, file, stored in correct(model, directory)
        ]

    monkeypatch.setattr(weights, "matched", planted)


def test_every_rank_loads_the_projections_of_rank_zero(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vllm-gguf issue 103: all shapes fit, and the text is nonsense."""

    def of_rank_zero(name: str, layout: Layout) -> Layout:
        return layout.of(0) if name.endswith(QKV) else layout

    read_as(monkeypatch, of_rank_zero)
    report = prove(change=loading(checkpoint))
    expect_bits(report, f"{LAYER}.self_attn.{QKV[0]} (initial)")
    assert differing(report, "(initial)") == {f"{LAYER}.self_attn.{x} (initial)" for x in QKV}


def test_the_copy_of_a_key_head_that_another_rank_owns_is_wrong(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At degree 4 rank 1 reads head 1 for head 0; what each rank owns is right."""

    def neighbour(name: str, layout: Layout) -> Layout:
        is_copy = layout.rank == 1 and not layout.owned and name.endswith("k_proj.weight")
        return layout.of(2) if is_copy else layout

    read_as(monkeypatch, neighbour)
    report = prove(degrees=(1, 4), change=loading(checkpoint))
    assert not report.proved
    assert (
        f"tensor {LAYER}.self_attn.k_proj.weight (initial) is the first that is not identical "
        "(copies differ at degree 4: leaf 0 of rank 1 differs from that of rank 0)"
    ) in str(report)


def is_tail(rows: Tensor, degree: int) -> Tensor:
    """Rows that are left over where every rank takes as many."""
    return rows >= VOCABULARY // degree * degree


def test_vocabulary_rows_dropped_by_the_loader(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """67 // 2 rows of the embedding and of the head for each rank: the last row is zeros."""
    names = (EMBEDDING, HEAD)
    correct = weights.load

    def floored(model: nn.Module, directory: Path) -> nn.Module:
        loaded = correct(model, directory)
        for given, parameter, layout, _ in layouts_of(loaded):
            if given in names and layout.cut is not None:
                rows = is_tail(torch.tensor(layout.held_indices), layout.cut.degree)
                parameter.data[rows] = 0
        return loaded

    monkeypatch.setattr(weights, "load", floored)
    report = prove(change=loading(checkpoint))
    expect_bits(report, f"{EMBEDDING} (initial)")
    assert differing(report, "(initial)") == {f"{name} (initial)" for name in names}


def test_vocabulary_rows_that_no_rank_looks_up() -> None:
    with find_mistake("last-tokens-of-nobody").planted():
        expect_bits(prove(), "logits")


def test_vocabulary_rows_that_the_loss_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are right; the last class is missing from the sum of exponentials."""

    def floored(self: Split) -> tuple[slice, ...]:
        blocks = self.leaves.slices
        if self.axis.size > 1 and self.axis.rank == self.axis.size - 1:
            blocks = (*blocks[:-1], slice(blocks[-1].start, blocks[-1].stop - 1))
        return blocks

    monkeypatch.setattr(Split, "blocks", property(floored))
    expect_bits(prove(), "loss")


def add_both_uses(model: Any, axis: Axis) -> None:
    """What the embedding has and what the head has: one tensor, which has both already."""
    model.model.embed_tokens.weight.grad.add_(model.lm_head.weight.grad)


def add_both_uses_of_many(model: nn.Module, axis: Axis) -> None:
    if axis.size > 1:
        add_both_uses(model, axis)


def test_tied_gradient_summed_twice() -> None:
    """Where there are ranks: their bits differ. At every degree: only plain torch knows."""
    report = prove(config=TIED, synchronize=add_both_uses_of_many)
    expect_bits(report, f"{EMBEDDING}.grad")
    assert differing(report, ".grad") == {f"{EMBEDDING}.grad"}
    expect_torch(prove(config=TIED, synchronize=add_both_uses), f"{EMBEDDING}.grad")


def test_tied_gradient_counted_twice_in_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each name that the weight has; no degree differs from another."""
    correct = gradient_norms.layouts_of

    def by_name(model: nn.Module) -> Any:
        known = {id(entry[1]): entry for entry in correct(model)}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            yield known[id(parameter)]

    monkeypatch.setattr(gradient_norms, "layouts_of", by_name)
    expect_torch(prove(config=TIED), "grad_norm")


def test_replicated_gradients_counted_once_per_rank_in_the_norm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every rank adds what it has of the norms' weights; all ranks agree on what is too large."""
    correct, layouts_of = gradient_norms.sum_squares_of, gradient_norms.layouts_of

    def on_an_axis(model: Any) -> Any:
        for name, parameter, layout, _ in layouts_of(model):
            yield name, parameter, layout, getattr(model.lm_head, "axis", None)

    def counted(grad: Tensor, place: ParameterLayout) -> Tensor:
        layout, axis, square = place.layout, place.axis, correct(grad, place)
        if layout.cut is not None:
            return square
        assert axis is not None
        return comm.all_reduce(square, axis, direction="update")

    monkeypatch.setattr(gradient_norms, "layouts_of", on_an_axis)
    monkeypatch.setattr(gradient_norms, "sum_squares_of", counted)
    report = prove()
    expect_bits(report, "grad_norm")
    assert not report.cases[0].first_difference()["detail"], "no replicas differ"


def test_held_key_value_gradients_counted_once_per_holder_in_the_norm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A key-value head that two ranks hold counts twice; right where none is shared."""
    correct = gradient_norms.sum_squares_of

    def counted(grad: Tensor, place: ParameterLayout) -> Tensor:
        layout, axis, square = place.layout, place.axis, correct(grad, place)
        if axis is None or not place.name.endswith(QKV[1:]):
            return square
        is_copy = [each not in layout.owned for each in layout.held_indices]
        copies = sum_squares(grad[torch.tensor(is_copy, dtype=torch.bool)])
        return square + comm.all_reduce(copies, axis, direction="update")

    monkeypatch.setattr(gradient_norms, "sum_squares_of", counted)
    report = prove(degrees=(1, 2, 3))
    expect_bits(report, "grad_norm", degrees=(1, 3))
    assert not differing(report, degree=2)


def test_attention_dropout_drawn_by_rank() -> None:
    with find_mistake("attention-dropout-counted-from-zero").planted():
        expect_bits(prove(**DROPPING), "logits")


def seed_by_rank(model: nn.Module, axis: Axis) -> None:
    for module in model.modules():
        if isinstance(module, Dropout):
            module.seed += axis.rank


def test_dropout_of_a_whole_activation_drawn_by_rank() -> None:
    """As in a residual stream: what all ranks must have alike, each drops as it likes."""
    expect_bits(prove(change=seed_by_rank, **DROPPING), "logits")


def test_loss_of_the_rank_s_own_part_of_the_vocabulary() -> None:
    detail = "replicas differ at degree 2: rank 1 differs from rank 0"
    with find_mistake("softmax-over-own-vocabulary").planted():
        expect_not_the_same(prove(), "loss", detail)


def test_loss_averaged_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of the ranks' means, each over a row of its own: tokens of short rows weigh more."""
    correct = head._causal_loss

    def mean_of_means(layer: Any, logits: Tensor, labels: Tensor, *args: Any, **named: Any) -> Any:
        rows, size = torch.arange(len(labels))[:, None], layer.axis.size
        parts = [labels.masked_fill(rows % size != rank, -100) for rank in range(size)]
        means = [correct(layer, logits, part, *args, **named) for part in parts]
        return sum(means[1:], means[0]) / size

    monkeypatch.setattr(head, "_causal_loss", mean_of_means)
    report = prove()
    expect_bits(report, "loss")
    assert not report.cases[0].first_difference()["detail"], "no replicas differ"


def test_gradient_of_the_loss_averaged_over_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ranks have other data: the loss is right, all gradients are too small."""
    correct = head._causal_loss

    def averaged(layer: Any, *args: Any, **named: Any) -> Tensor:
        loss = correct(layer, *args, **named)
        return loss.detach() + (loss - loss.detach()) / layer.axis.size

    monkeypatch.setattr(head, "_causal_loss", averaged)
    expect_bits(prove(), f"{HEAD}.grad")


def rotate(offset: Callable[[Axis], int]) -> Change:
    """Begin the angles of a head so many features too late."""

    def change(model: Any, axis: Axis) -> None:
        def roll(module: nn.Module, given: Any, angles: tuple[Tensor, Tensor]) -> Any:
            return tuple(each.roll(offset(axis), -1) for each in angles)

        model.model.rotary_emb.register_forward_hook(roll)

    return change


def test_rotary_applied_at_the_wrong_head_offset() -> None:
    """Angles counted from the rank's first feature, not the head's; or so at every degree."""
    expect_bits(prove(change=rotate(lambda axis: axis.rank)), "logits")
    expect_torch(prove(change=rotate(lambda axis: 1)), "logits")


def test_rotary_positions_that_begin_with_the_rank() -> None:
    """Attention sees how far apart places are and not where: rounding alone gives it away."""

    def change(model: Any, axis: Axis) -> None:
        def later(module: nn.Module, given: Any, named: dict[str, Any]) -> Any:
            shifted = {"position_ids": named["position_ids"] + axis.rank}
            return given, named | shifted

        model.model.rotary_emb.register_forward_pre_hook(later, with_kwargs=True)

    report = prove(change=change)
    expect_bits(report, "logits")
    assert report.agrees_with_torch, "no tolerance finds it"


def test_query_heads_counted_from_the_rank_s_first() -> None:
    with find_mistake("wrong-key-value-head").planted():
        report = prove(degrees=(1, 2, 3))
    expect_bits(report, "logits", degrees=(1, 3))
    assert not differing(report, degree=2)
