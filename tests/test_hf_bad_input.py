"""What a model of transformers cannot be asked for: one clear error, on all ranks, at plan time."""

import copy
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_zoo import SIZES, Setting, cut_model, meta_model, whole_model
from places import Pool
from shardproof import hf
from shardproof.axis import Axis
from shardproof.errors import DegreeError, PlanError, ShardproofError, UsageError
from shardproof.layers.base import ShardedModule
from shardproof.layers.dropout import replay_dropout
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.plans.planning import attempt, plan
from shardproof.plans.style import ColumnParallel, RowParallel, VocabParallel
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.scheme import Scheme

transformers = pytest.importorskip("transformers")


def refusal(model: nn.Module, given: Any = None, degree: int = 2) -> str:
    with pytest.raises(ShardproofError) as caught:
        plan(model, given, degree=degree)
    return str(caught.value)


def test_a_degree_above_the_leaves() -> None:
    with pytest.raises(DegreeError, match=r"degree 9 exceeds leaves=8"):
        plan(meta_model("llama"), degree=9)


def unserved(model: nn.Module) -> str:
    """Why the model's own tp_plan does not serve; a forward is watched then."""
    found = attempt(model, None, degree=2)
    assert isinstance(found, str)
    return found


def test_an_entry_that_matches_nothing() -> None:
    model = meta_model("llama")
    model._tp_plan = {"lm_heed": "colwise_gather_output"}
    message = unserved(model)
    assert "plan entry 'lm_heed'" in message
    assert "near names: lm_head" in message


def test_an_unknown_style() -> None:
    model = meta_model("llama")
    model._tp_plan = {"lm_head": "sideways"}
    assert "plan entry 'lm_head': unknown style 'sideways'" in unserved(model)


def test_a_class_without_a_plan_is_told_what_to_write() -> None:
    import transformers  # noqa: PLC0415

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11)
    config.base_model_tp_plan = None
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    model._tp_plan = {}
    assert "GPT2LMHeadModel carries no tp_plan, and no plan is given" in unserved(model)
    assert isinstance(plan(model, degree=2), WatchedPlan)


def test_a_tied_weight_that_is_cut_two_ways() -> None:
    model = meta_model("llama-tied-4-2")
    fits = {"model.embed_tokens": VocabParallel(), "lm_head": ColumnParallel(gather_output=True)}
    plan(model, fits, degree=2)  # both along the vocabulary
    message = refusal(model, {"model.embed_tokens": VocabParallel(), "lm_head": RowParallel()})
    assert "a tied weight is cut two ways" in message
    assert "'model.embed_tokens' along dim 0" in message
    assert "'lm_head' along dim 1" in message


def test_attention_that_is_not_ours_to_replace() -> None:
    model = meta_model("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(PlanError, match=r"'flex_attention', which shardproof does not replace"):
        parallelize(model, None, Axis.solo())
    with pytest.raises(PlanError, match=r"'flex_attention', which shardproof does not replace"):
        plan(model, degree=2)


def test_attention_weights_are_not_kept() -> None:
    model = cut_model(Axis.solo(), Setting("llama", {"attn_implementation": "eager"}))
    with pytest.raises(UsageError, match=r"output_attentions=True"):
        model(torch.tensor([[1, 2]]), output_attentions=True)


def outside(axis: Axis) -> str:
    model = cut_model(axis, Setting("llama"))
    with pytest.raises(ShardproofError) as caught:
        model(torch.tensor([[1, 2, 67]]))
    return str(caught.value)


def test_a_token_outside_the_vocabulary_is_named_on_all_ranks(pool: Pool) -> None:
    for message in pool(3, "threads").run(outside):
        assert "67" in message
        assert "66" in message


def test_recomputed_dropout_is_refused() -> None:
    model = cut_model(Axis.solo(), Setting("llama", {"attention_dropout": 0.2})).train()
    model.activation_checkpointing_enable()
    ids = torch.tensor([[1, 2, 3]])
    loss = model(ids, labels=ids, use_cache=False).loss
    with pytest.raises(UsageError, match=r"is called during backward"):
        loss.backward()


def checkpointed(axis: Axis, enable: bool, dropout: float = 0.0) -> list[torch.Tensor]:
    model = cut_model(axis, Setting("llama", {"attention_dropout": dropout})).train()
    if enable:
        options = {"use_reentrant": False}
        if dropout:
            options["context_fn"] = replay_dropout(model)
        model.activation_checkpointing_enable(options)
    ids = torch.tensor([[1, 2, 3, 9]])
    for _ in range(2):
        model(ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit(dropout: float, pool: Pool) -> None:
    for degree in (1, 3):
        plain, again = (
            pool(degree, "threads").run(
                functools.partial(checkpointed, enable=enable, dropout=dropout)
            )
            for enable in (False, True)
        )
        for one, two in zip(plain, again, strict=True):
            assert all(map(torch.equal, one, two))


# -- directories -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    whole_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def loaded(axis: Axis, directory: Path) -> dict[str, torch.Tensor]:
    model = initialize(parallelize(meta_model("llama"), None, axis))
    hf.load(model, directory)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_every_rank_reads_its_part(saved: Path, pool: Pool) -> None:
    torch.manual_seed(0)
    whole = whole_model("llama").state_dict()
    (alone,) = pool(1, "threads").run(functools.partial(loaded, directory=saved))
    for name, parameter in alone.items():
        assert torch.equal(parameter, whole[name])
    parts = pool(8, "threads").run(functools.partial(loaded, directory=saved))
    rows = torch.cat([part["lm_head.weight"] for part in parts])
    assert torch.equal(rows, whole["lm_head.weight"])
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(torch.cat([part[down] for part in parts], dim=1), whole[down])


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is no directory"):
        hf.load(nn.Linear(1, 1), tmp_path / "nowhere")


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config.json"):
        hf.load(nn.Linear(1, 1), tmp_path)


def test_pickles_are_never_read(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UsageError, match=r"only pickled weights \(pytorch_model.bin\)"):
        loaded(Axis.solo(), saved)


def test_no_weights_at_all(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no weights"):
        loaded(Axis.solo(), saved)


def test_a_file_of_the_index_is_missing(saved: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-2.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"lacks model-2.safetensors"):
        loaded(Axis.solo(), saved)


def test_weights_of_another_model(saved: Path) -> None:
    model = initialize(parallelize(meta_model("llama", vocab_size=50), None, Axis.solo()))
    with pytest.raises(UsageError, match=r"has shape \(67, 32\) .* and \(50, 32\) in the model"):
        hf.load(model, saved)
    more = initialize(parallelize(meta_model("llama", num_hidden_layers=3), None, Axis.solo()))
    with pytest.raises(UsageError, match=r"no tensor for 9 parameters of LlamaForCausalLM"):
        hf.load(more, saved)


def test_weights_that_are_not_there_yet(saved: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"on the meta device have no values: model.embed.* Call shardproof.initialize",
    ):
        hf.load(parallelize(meta_model("llama"), None, Axis.solo()), saved)


FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def test_a_file_of_the_index_that_is_a_pickle(saved: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (saved / INDEX).write_text(json.dumps(index))
    (saved / "pytorch_model.bin").touch()
    with pytest.raises(UsageError, match=r"names pytorch_model.bin, and .* safetensors alone"):
        loaded(Axis.solo(), saved)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["lm_head.weight"]}', "\xff"])
def test_a_corrupt_index(text: str, saved: Path) -> None:
    (saved / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"index.json is no index of safetensors"):
        loaded(Axis.solo(), saved)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_corrupt_file(indexed: bool, saved: Path) -> None:
    if indexed:
        names = dict.fromkeys(whole_model("llama").state_dict(), "model.safetensors")
        (saved / INDEX).write_text(json.dumps({"weight_map": names}))
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=r"model.safetensors cannot be read as safetensors"):
        loaded(Axis.solo(), saved)


def test_an_index_of_tensors_that_the_file_lacks(saved: Path) -> None:
    names = dict.fromkeys(whole_model("llama", num_hidden_layers=3).state_dict(), FILE)
    (saved / INDEX).write_text(json.dumps({"weight_map": names}))
    model = initialize(parallelize(meta_model("llama", num_hidden_layers=3), None, Axis.solo()))
    with pytest.raises(UsageError, match=r"cannot be read as safetensors: .*layers.2"):
        hf.load(model, saved)


def add(directory: Path, **tensors: torch.Tensor) -> None:
    """Write more tensors into a saved model."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    save_file(load_file(directory / FILE) | tensors, directory / FILE)


def test_tensors_that_the_model_does_not_have(saved: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.bias"
    add(saved, **{name: torch.ones(32)})
    with pytest.raises(
        UsageError, match=rf"1 tensors that LlamaForCausalLM has no parameter for: {name}\."
    ):
        loaded(Axis.solo(), saved)


def test_tensors_that_are_known_to_be_left_over(saved: Path) -> None:
    add(saved, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert loaded(Axis.solo(), saved)


def test_a_tied_weight_that_is_stored_twice(tmp_path: Path) -> None:
    whole = whole_model("llama-tied-4-2")
    whole.save_pretrained(tmp_path)
    rows = whole.get_input_embeddings().weight.detach()
    add(tmp_path, **{"lm_head.weight": rows.clone()})
    model = initialize(parallelize(meta_model("llama-tied-4-2"), None, Axis.solo()))
    assert torch.equal(hf.load(model, tmp_path).lm_head.weight, rows)


# -- saving ----------------------------------------------------------------------------------------


def saving(axis: Axis, whole: nn.Module, directory: Path) -> None:
    model = parallelize(copy.deepcopy(whole), None, axis)
    nn.init.zeros_(model.model.norm.weight)
    for each, name in ((model, "model"), (copy.deepcopy(model), "copy")):
        each.save_pretrained(directory / name)
        with pytest.raises(UsageError, match=r"save_pretrained of a cut Llama.* with max_shard_s"):
            each.save_pretrained(directory / "other", max_shard_size="1GB")
        with pytest.raises(UsageError, match=r"with safe_serialization=False"):
            each.save_pretrained(directory / "other", safe_serialization=False)


@pytest.mark.parametrize("degree", [1, 3])
def test_a_cut_model_saves_whole_weights(degree: int, tmp_path: Path, pool: Pool) -> None:
    """Plain transformers reads them, and no parameter is left out."""
    model = whole_model("llama")
    pool(degree, "threads").run(functools.partial(saving, whole=model, directory=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "model"]
    whole = model.state_dict()
    whole["model.norm.weight"] = torch.zeros_like(whole["model.norm.weight"])
    for name in ("model", "copy"):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert again.keys() == whole.keys()
        assert [each for each in whole if not torch.equal(whole[each], again[each])] == []


# -- initialising ----------------------------------------------------------------------------------


def test_what_nothing_can_initialise_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(3, device="meta"))

    with pytest.raises(UsageError, match=r"parameter 'odd.scale' of a Odd"):
        initialize(nn.ModuleDict({"odd": Odd()}))


def test_an_unknown_buffer_is_named() -> None:
    model = nn.BatchNorm1d(3, device="meta")
    with pytest.raises(UsageError, match=r"buffers running_mean"):
        initialize(nn.ModuleDict({"norm": model}))


@pytest.mark.parametrize(("kind", "start"), [("gemma2", 0.0), ("llama", 1.0)])
@pytest.mark.parametrize("numerics", ["native", "invariant"])  # native keeps the model's own
def test_norms_do_nothing_at_first(kind: str, start: float, numerics: str) -> None:
    model = cut_model(Axis.solo(), Setting(kind, numerics=numerics))
    norms = {name: p for name, p in model.named_parameters() if "norm" in name}
    assert norms
    for name, weight in norms.items():
        assert torch.equal(weight, torch.full_like(weight, start)), name


def test_ties_stay_ties() -> None:
    model = cut_model(Axis.solo(), Setting("llama-tied-4-2"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


# -- dropout that is called as a function ----------------------------------------------------------

MLP_ALONE: dict[str, Any] = {
    "model.layers.*.mlp.gate_proj": ColumnParallel(),
    "model.layers.*.mlp.up_proj": ColumnParallel(),
    "model.layers.*.mlp.down_proj": RowParallel(),
}


def with_residual_dropout(family: str, p: float) -> nn.Module:
    import transformers  # noqa: PLC0415

    config = getattr(transformers, f"{family}Config")(
        **(SIZES | {"residual_dropout": p, "attention_dropout": 0.1, "head_dim": 4})
    )
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model


@pytest.mark.parametrize("family", ["SeedOss", "Starcoder2"])
def test_dropout_called_as_a_function_is_planned_by_watching(family: str) -> None:
    model = with_residual_dropout(family, 0.1)
    assert re.search(r"residual_dropout=0.1, .* Set config.residual_dropout = 0", unserved(model))
    made = plan(model, degree=2)
    assert isinstance(made, WatchedPlan)
    assert "residual_dropout=0.1, dropout called as a function" in made.notes[0]
    cut = parallelize(model, None, Axis.solo(), scheme=Scheme(numerics="native"))
    assert any(isinstance(module, ShardedModule) for module in cut.modules())
    served = plan(with_residual_dropout(family, 0.0), degree=2)
    assert not isinstance(served, WatchedPlan)


def test_dropout_that_modules_have_copied_is_told() -> None:
    model = with_residual_dropout("SeedOss", 0.1)
    model.config.residual_dropout = 0.0  # too late
    assert re.search(r"residual_dropout=0.1, .* before the model is made", unserved(model))


def test_dropout_of_attention_that_stays_whole_is_refused() -> None:
    model = meta_model("llama", attention_dropout=0.3)
    with pytest.raises(PlanError, match=r"attention_dropout=0.3, .* leaves whole"):
        plan(model, MLP_ALONE, degree=2)
    plan(model, degree=2)  # its own plan cuts all attention
    plan(meta_model("llama"), MLP_ALONE, degree=2)


def test_dropout_that_is_a_module_is_not_refused() -> None:
    import transformers  # noqa: PLC0415

    def gpt2(attn_pdrop: float) -> nn.Module:
        config = transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=11, attn_pdrop=attn_pdrop
        )
        with torch.device("meta"):
            return transformers.GPT2LMHeadModel(config)

    tied: dict[str, Any] = {
        "transformer.wte": VocabParallel(),
        "lm_head": ColumnParallel(gather_output=True),
    }
    plan(gpt2(0.0), tied, degree=2)
    # A module too, which is only asked for its p.
    with pytest.raises(PlanError, match=r"attn_pdrop=0.1, dropout called as a function"):
        plan(gpt2(0.1), tied, degree=2)
