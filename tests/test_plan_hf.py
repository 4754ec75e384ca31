"""Plans that models of transformers carry: how they are read, and that steps send what they say."""

import copy
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardproof as sp
from families import FAMILIES, small
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import MismatchError, PlanError
from shardproof.plans import module_planner
from shardproof.plans.hf_plan import entries_of
from shardproof.plans.planning import attempt, plan
from shardproof.plans.style import (
    HEAD_NORM,
    REFUSED,
    SPELLINGS,
    WHOLE,
    Attention,
    ColumnParallel,
    RowParallel,
    SharedInput,
    VocabParallel,
)
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.scheme import Numerics, Scheme

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

BATCH, LENGTH = 3, 8
MLP = "model.layers.*.mlp"
HEAD = ColumnParallel(gather_output=True)


def steps(axis: Axis, model: nn.Module, scheme: Scheme) -> dict[str, Any]:
    """What steps count: with labels, without, in generation, and with a loss of one's own."""
    cut = sp.parallelize(copy.deepcopy(model), None, axis, scheme=scheme)
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 101
    ledger, found = axis.transport.ledger, {}
    ledger.reset()
    cut(input_ids=ids, labels=ids).loss.backward()
    found["step"] = ledger.as_dict()
    cut.eval()
    with torch.no_grad():
        ledger.reset()
        cut(input_ids=ids)
        found["logits"] = ledger.as_dict()
        ledger.reset()
        cache = cut(input_ids=ids, logits_to_keep=1).past_key_values
        found["prompt"] = ledger.as_dict()
        ledger.reset()
        cut(input_ids=ids[:, :1], past_key_values=cache)
        found["token"] = ledger.as_dict()
    ledger.reset()
    cut(input_ids=ids, logits_to_keep=2).logits.sum().backward()
    found["own loss"] = ledger.as_dict()
    return found


def forward(counts: dict[str, Any]) -> dict[str, Any]:
    return {direction: kinds for direction, kinds in counts.items() if direction == "forward"}


def said(made: sp.ModelPlan, rank: int) -> dict[str, Any]:
    """The same, from the plan."""
    silent = {"labels": False, "rank": rank, "batch": BATCH}
    return {
        "step": made.comm(batch=BATCH, length=LENGTH, rank=rank),
        "logits": forward(made.comm(length=LENGTH, **silent)),
        "prompt": forward(made.comm(length=LENGTH, logits=1, **silent)),
        "token": forward(made.comm(length=1, **silent)),
        "own loss": made.comm(length=LENGTH, logits=2, **silent),
    }


def differing(pool: Pool, model: nn.Module, made: sp.ModelPlan) -> list[tuple[int, str]]:
    """Ranks and steps of which the plan says something else than the ledger."""
    counted = pool(made.degree, "threads").run(lambda axis: steps(axis, model, made.scheme))
    return [
        (rank, what)
        for rank, found in enumerate(counted)
        for what in found
        if found[what] != said(made, rank)[what]
    ]


# Degree 3 shares a key-value head of 2 among ranks. Degree 8 leaves ranks without heads.
@pytest.mark.parametrize(
    ("family", "degree", "numerics"),
    [(family, 3, "invariant") for family in FAMILIES]
    + [(family, 3, "native") for family in ("Llama", "Qwen3", "Gemma2", "Olmo2")]
    + [("Llama", 2, "invariant"), ("Llama", 1, "native"), ("Qwen3", 8, "invariant")],
)
def test_a_step_sends_what_the_plan_says(
    pool: Pool, family: str, degree: int, numerics: Numerics
) -> None:
    model = small(family, num_hidden_layers=2 if family in ("Gemma2", "Qwen3") else 1)
    made = plan(model, degree=degree, scheme=Scheme(numerics=numerics))
    assert differing(pool, model, made) == []


@pytest.mark.parametrize("family", ["Qwen3", "Olmo2"])
def test_a_step_in_16_bits_and_one_key_head(pool: Pool, family: str) -> None:
    model = small(family, num_hidden_layers=1, num_key_value_heads=1, tie_word_embeddings=True)
    model = model.bfloat16()
    assert differing(pool, model, plan(model, degree=3)) == []


def test_a_forgotten_gradient_of_shared_heads_is_noticed(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: a prediction that overlooks heads that two ranks hold."""
    model = small("Llama")
    monkeypatch.setattr(module_planner, "shared_keys", lambda heads: ())
    made = plan(model, degree=3)
    monkeypatch.undo()
    assert differing(pool, model, made) == [
        (rank, what) for rank in range(3) for what in ("step", "own loss")
    ]


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_cut_but_for_its_norms(family: str) -> None:
    made = plan(small(family, device="meta"), degree=2)
    across = "across" if family == "Olmo2" else "heads"
    norms = ("q_norm", "k_norm") if family in ("Qwen3", "Olmo2") else (None, None)
    attention = Attention(4, 2, 8, query_norm=norms[0], key_norm=norms[1], norms=across)
    assert made.plan.styles == {
        "model.embed_tokens": VocabParallel(32**0.5 if family == "Gemma2" else 1.0),
        "model.layers.*.self_attn": attention,
        MLP: SharedInput(),
        f"{MLP}.gate_proj": ColumnParallel(),
        f"{MLP}.up_proj": ColumnParallel(),
        f"{MLP}.down_proj": RowParallel(),
        "lm_head": HEAD,
    }
    assert made.head == "lm_head"
    whole = [module for module in made.modules if not module.is_cut]
    assert {module.reason for module in whole} == {"small, its input is Replicate"}
    assert all("norm" in module.name for module in whole)
    assert made.share > 0.97
    gathers = (
        "model.layers.0-1.self_attn: the tp_plan gathers queries, keys and values, for their norms "
        "go across the heads; here they stay cut by heads, and only the norms' sums cross the "
        "ranks.",
    )
    assert made.notes == (gathers if family == "Olmo2" else ())


def test_a_base_model_and_an_older_library() -> None:
    """The plan of the config is for the base model, and was merged by nobody in older versions."""
    model = small("Llama", device="meta")
    merged = entries_of(model)
    base = model.model
    assert entries_of(base) == {
        name.removeprefix("model."): style for name, style in merged.items() if name != "lm_head"
    }
    made = plan(base, degree=2)
    assert (made.head, made.plan.styles["embed_tokens"]) == (None, VocabParallel())
    model._tp_plan = {"lm_head": "colwise_gather_output"}
    assert entries_of(model) == {k: v for k, v in merged.items() if "embed" not in k}
    assert plan(model, degree=2).plan == plan(small("Llama", device="meta"), degree=2).plan
    model._tp_plan = merged
    model.base_model_prefix = "language_model"  # which it has not: Llama 4 says so too
    assert model.base_model is model
    assert entries_of(model) == merged


def test_a_plan_of_ones_own_cuts_heads_too() -> None:
    model = small("Qwen3", device="meta")
    made = plan(model, dict(model.tp_plan), degree=2)
    attention = plan(model, degree=2).plan.styles["model.layers.*.self_attn"]
    assert made.plan.styles["model.layers.*.self_attn"] == attention
    assert MLP not in made.plan.styles  # nobody asked for it
    assert made.notes == (
        "model.layers.0-1.self_attn: the plan cuts linears of an attention, which are heads; they "
        "are cut by whole heads.",
    )
    assert made.head == "lm_head"


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_tied_head_is_cut_with_the_embedding(family: str) -> None:
    model = small(family, device="meta", tie_word_embeddings=True)
    made = plan(model, degree=3)
    tied = {each.name: each.parameters[0].tied_to for each in made.modules if each.parameters}
    assert tied["lm_head"] == "model.embed_tokens.weight"
    whole = sum(each.numel() for each in model.parameters()) * 4
    assert made.total_bytes == whole


def test_a_head_that_the_plan_does_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("Llama", device="meta")
    monkeypatch.delitem(model._tp_plan, "lm_head")
    made = plan(model, degree=2)
    (head,) = [module for module in made.modules if module.name == "lm_head"]
    assert (head.reason, made.head) == ("the tp_plan does not name it", None)
    tied = small("Llama", device="meta", tie_word_embeddings=True)
    monkeypatch.delitem(tied._tp_plan, "lm_head")
    made = plan(tied, degree=2)
    assert made.plan.styles["lm_head"] == HEAD
    assert made.notes == (
        "lm_head is cut too, for it has the weight of model.embed_tokens; the tp_plan is silent.",
    )


def test_a_linear_that_the_plan_forgets_is_noted() -> None:
    model = small("Llama", device="meta")
    for layer in model.model.layers:
        layer.mlp.extra_proj = nn.Linear(32, 32, device="meta")
    made = plan(model, degree=2)
    assert made.notes == (
        "model.layers.0-1.mlp.extra_proj: whole on every rank, for the tp_plan cuts these layers "
        "without them.",
    )


def test_gathered_projections_without_norms_stay_gathered() -> None:
    """Phi-3: one fused projection, which is gathered before it is taken apart."""
    model = small("Phi3", device="meta")
    made = plan(model, degree=2)
    assert made.plan.styles["model.layers.*.self_attn.qkv_proj"] == HEAD
    assert made.plan.styles["model.layers.*.self_attn.o_proj"] == RowParallel(False)


# -- what cannot be served -------------------------------------------------------------------------

Change = Callable[[Any], object]


def entry(name: str, style: str | None) -> Change:
    """Set or remove an entry of the model's own plan."""

    def change(model: Any) -> None:
        if style is None:
            del model._tp_plan[name]
            base = type(model.config).base_model_tp_plan
            model.config.base_model_tp_plan = {
                other: value for other, value in base.items() if f"model.{other}" != name
            }
        else:
            model._tp_plan[name] = style

    return change


def in_every_layer(change: Change) -> Change:
    return lambda model: [change(layer) for layer in model.model.layers]


def set_config(name: str, value: int) -> Change:
    return lambda model: setattr(model.config, name, value)


def norm(size: int) -> nn.Module:
    return nn.RMSNorm(size, device="meta")


ATTN = "model.layers.*.self_attn"
PROBLEMS: dict[str, tuple[str, Change, str]] = {
    "no match": (
        "Llama",
        entry("model.layers.*.mlp.upp_proj", "colwise"),
        "plan entry 'model.layers.*.mlp.upp_proj': ColumnParallel(gather_input=False, "
        "gather_output=False) matches no module of LlamaForCausalLM. Remove the entry or correct "
        "the name; near names: model.layers.1.mlp.up_proj, model.layers.0.mlp.up_proj",
    ),
    "unknown style": (
        "Llama",
        entry(f"{MLP}.up_proj", "columnwise"),
        f"plan entry '{MLP}.up_proj': unknown style 'columnwise'.",
    ),
    "experts": (
        "Llama",
        entry(f"{MLP}.up_proj", "moe_tp_experts"),
        f"plan entry '{MLP}.up_proj': style 'moe_tp_experts' cannot be served: mixture of experts "
        "is not supported yet.",
    ),
    "half an attention": (
        "Llama",
        entry(f"{ATTN}.v_proj", None),
        "module 'model.layers.0.self_attn' (LlamaAttention) is an attention, which is cut by "
        "heads, and the plan cuts q_proj, k_proj, o_proj of it but not v_proj. Name all of them, "
        "or none; projections that are fused into one, or shared by layers, are not supported "
        "yet. (1 more like this.)",
    ),
    "no way back": (
        "Llama",
        entry(f"{ATTN}.o_proj", None),
        "one of its linears must be 'rowwise' to take the heads back, and the plan has none.",
    ),
    "rows for columns": (
        "Llama",
        entry(f"{ATTN}.q_proj", "rowwise"),
        "must be 'rowwise' to take the heads back, and the plan has q_proj, o_proj.",
    ),
    "nothing takes the shards": (
        "Llama",
        entry(f"{MLP}.down_proj", None),
        "module 'model.layers.0.mlp': the tp_plan cuts model.layers.0.mlp.gate_proj, "
        "model.layers.0.mlp.up_proj by 'colwise' and nothing in it by 'rowwise', so that nothing "
        "takes the shards.",
    ),
    "other heads": (
        "Llama",
        set_config("num_attention_heads", 8),
        "module 'model.layers.0.self_attn' (LlamaAttention) is an attention of 8 query and 2 "
        "key-value heads of 8 features, says its config, but q_proj has out_features=32, not 64. "
        "Leave it out of the plan, or name it with Attention(...).",
    ),
    "more in the attention": (
        "Llama",
        in_every_layer(lambda layer: layer.self_attn.add_module("sub_norm", norm(32))),
        "and has further weights, sub_norm, which would see a part of the heads.",
    ),
    "norms of both kinds": (
        "Qwen3",
        in_every_layer(lambda layer: setattr(layer.self_attn, "q_norm", norm(32))),
        "of its q_norm and k_norm one goes over each head and the other across all.",
    ),
    "norms of neither kind": (
        "Qwen3",
        in_every_layer(lambda layer: setattr(layer.self_attn, "q_norm", norm(16))),
        "the weight of its q_norm has 16 elements, neither those of a head (8) nor of all heads "
        "(32).",
    ),
    "a norm between linears": (
        "Llama",
        in_every_layer(lambda layer: layer.mlp.add_module("sub_norm", norm(44))),
        "module 'model.layers.0.mlp.sub_norm' (RMSNorm) is or stands between linears that are "
        "cut, and its weight of shape (44,) is not as wide as their input: it would see a shard.",
    ),
    "an activation with weights": (
        "Llama",
        in_every_layer(lambda layer: setattr(layer.mlp, "act_fn", nn.PReLU(device="meta"))),
        "module 'model.layers.0.mlp.act_fn' (PReLU) is or stands between linears that are cut",
    ),
    "a norm of no heads": (
        "Llama",
        entry("model.norm", HEAD_NORM),
        "module 'model.norm': 'replicated_with_grad_allreduce' is understood for norms of queries",
    ),
    "a tied weight, two ways": (
        "Gemma2",
        entry("lm_head", "rowwise_split_input"),
        "a tied weight is cut two ways: in 'model.embed_tokens' along dim 0 (by 8 leaves of 101) "
        "and 'lm_head' along dim 1 (by 8 leaves of 32). Cut both along the vocabulary",
    ),
    "a tied weight, one side": (
        "Gemma2",
        entry("lm_head", WHOLE),
        "module 'model.embed_tokens' shares its weight with 'lm_head': a tied weight cannot be "
        "cut on one side only.",
    ),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_what_cannot_be_served_is_said(what: str) -> None:
    family, change, text = PROBLEMS[what]
    model = small(family, device="meta")
    change(model)
    said = unserved(model)
    assert text in said
    assert said.startswith(f"its tp_plan does not fit {family}ForCausalLM: ")
    assert said.count("\n- ") == 0, "one trouble, said once"


def unserved(model: nn.Module) -> str:
    """Why the model's own tp_plan does not serve; a forward is watched then."""
    found = attempt(model, None, degree=2)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("what", ["unknown style", "half an attention", "no way back"])
def test_where_a_tp_plan_does_not_serve_a_forward_is_watched_and_a_note_says_why(what: str) -> None:
    family, change, _ = PROBLEMS[what]
    model = small(family, device="meta")
    change(model)
    made = plan(model, degree=2)
    assert isinstance(made, WatchedPlan)
    assert made.share > 0.9
    assert made.notes[0].startswith(f"its tp_plan does not fit {family}ForCausalLM: ")
    assert (
        "So one forward was watched, with inputs that the config gives: input_ids (2, "
        in (made.notes[0])
    )


def test_a_model_whose_forward_fails_is_told_both() -> None:
    family, change, text = PROBLEMS["other heads"]
    model = small(family, device="meta")
    change(model)
    model.model.norm = None
    with pytest.raises(PlanError, match="the model's own forward fails") as caught:
        plan(model, degree=2)
    assert text in str(caught.value)
    assert "Give an example of what forward takes: inputs=." in str(caught.value)


def test_gates_in_the_attention() -> None:
    model = small("Llama", device="meta")
    for layer in model.model.layers:
        layer.self_attn.g_proj = nn.Linear(32, 32, device="meta")
    model._tp_plan[f"{ATTN}.g_proj"] = "colwise"
    assert "the plan also cuts g_proj in it, of which nothing says" in unserved(model)


def test_heads_that_differ_by_layer_and_heads_that_nobody_tells() -> None:
    class Config:
        """Like a config of transformers whose layers differ."""

        @property
        def num_attention_heads(self) -> int:
            raise RuntimeError("'num_attention_heads' is a per-layer attribute")

    model = small("Llama", device="meta")
    for layer in model.model.layers:
        layer.self_attn.config = Config()
    with pytest.raises(PlanError, match="its heads differ from layer to layer, which its config"):
        plan(model, degree=2)
    entries = {name: style for name, style in entries_of(model).items() if "self_attn" in name}
    inner = nn.ModuleDict({"model": model.model})
    for layer in model.model.layers:
        layer.self_attn.config = None
    assert set(plan(inner, entries, degree=2).plan.styles) == set(entries)


def test_cross_attention() -> None:
    model = small("Llama", device="meta")
    for layer in model.model.layers:
        layer.cross_attn = layer.self_attn
        del layer.self_attn
    model._tp_plan = {
        name.replace("self_attn", "cross_attn"): style for name, style in model._tp_plan.items()
    }
    model.config.base_model_tp_plan = {}
    with pytest.raises(PlanError, match="cross-attention is not supported yet"):
        plan(model, degree=2)


def test_an_embedding_that_computes_stays_whole_with_what_it_is_tied_to() -> None:
    class Spiky(nn.Embedding):
        """Not only a lookup."""

    model = small("Llama", device="meta", tie_word_embeddings=True)
    spiky = Spiky(101, 32, device="meta")
    spiky.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = spiky
    made = plan(model, degree=2)
    assert made.notes == (
        "model.embed_tokens stays whole: it is a Spiky, which does not only look up rows.",
        "lm_head stays whole: it has the weight of model.embed_tokens.",
        "model.embed_tokens.weight: whole by its tp_plan; one forward shows that a cut is "
        "possible. With inputs= it is made.",
    )
    assert not {"model.embed_tokens", "lm_head"} & set(made.styles)


def test_a_plan_that_a_model_carries_is_told_from_one_that_is_given() -> None:
    """The first keeps plain parts between the layers, also where it was planned before."""
    model = small("Llama")
    made = plan(model, degree=1)
    assert made.is_carried
    assert plan(model, made, degree=1).is_carried  # type: ignore[arg-type]
    assert not plan(model, made.plan, degree=1).is_carried
    ids = torch.arange(6).view(1, 6)

    def kinds(given: Any) -> set[str]:
        cut = sp.parallelize(copy.deepcopy(model), given, Axis.solo())
        seen: set[str] = set()
        layer: Any = cut.get_submodule("model.layers.0.mlp.up_proj")
        layer.register_forward_hook(lambda m, a, y: seen.add(type(y).__name__))
        cut(ids)
        return seen

    assert kinds(None) == kinds(made) == {"Tensor"}
    assert kinds(made.plan) == {"ShownCutTensor"}


def test_ranks_agree_on_who_carries_the_plan(pool: Pool) -> None:
    model = small("Llama")
    made = plan(model, degree=2)

    def run(axis: Axis) -> str:
        given = made.plan if axis.rank else made
        with pytest.raises(MismatchError) as caught:
            sp.parallelize(copy.deepcopy(model), given, axis)
        return str(caught.value)

    for message in pool(2, "threads").run(run):
        assert (
            "for whether the model carries the plan, rank 0 has True, rank 1 has False" in message
        )


def test_models_without_a_plan() -> None:
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1))
        opt = transformers.OPTForCausalLM(transformers.OPTConfig(num_hidden_layers=2, dropout=0.0))
    assert unserved(gpt2).startswith("GPT2LMHeadModel carries no tp_plan, and no plan is given. ")
    made = plan(gpt2, degree=2)
    assert made.share > 0.9
    assert made.notes[0].startswith(
        "GPT2LMHeadModel carries no tp_plan, and no plan is given. So one forward was watched"
    )
    said = unserved(opt)
    assert said.startswith("OPTForCausalLM carries no tp_plan, and no plan is given. ")
    assert plan(opt, PAIRS, degree=2).share > 0.1


PAIRS = {
    f"model.decoder.layers.*.{name}": style
    for name, style in (("fc1", "colwise"), ("fc2", "rowwise"))
}


def test_a_plan_for_a_model_without_one_is_right(pool: Pool) -> None:
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, ffn_dim=61, num_attention_heads=4, vocab_size=60,
        word_embed_proj_dim=32, dropout=0.0, max_position_embeddings=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    opt = transformers.OPTForCausalLM(config)
    ids = torch.arange(20).view(2, 10)
    truth = opt(ids, labels=ids)

    def run(axis: Axis) -> tuple[torch.Tensor, torch.Tensor]:
        out = sp.parallelize(copy.deepcopy(opt), PAIRS, axis)(ids, labels=ids)
        return out.loss.detach(), out.logits.detach()

    ((loss, logits),) = pool(1, "threads").run(run)
    torch.testing.assert_close(loss, truth.loss.detach())
    torch.testing.assert_close(logits, truth.logits.detach(), rtol=1e-4, atol=1e-5)
    for other, others in pool(3, "threads").run(run):
        assert torch.equal(other, loss)
        assert torch.equal(others, logits)


# -- all that the library knows --------------------------------------------------------------------


def configurations() -> dict[str, dict[str, str]]:
    """Config class -> its tp_plan, for every class of the library that has one."""
    found: dict[str, dict[str, str]] = {}
    for package in pkgutil.iter_modules(transformers.models.__path__):
        name = f"transformers.models.{package.name}.configuration_{package.name}"
        if importlib.util.find_spec(name) is None:
            continue
        module = importlib.import_module(name)
        for value in vars(module).values():
            styles = getattr(value, "base_model_tp_plan", None)
            if isinstance(value, type) and value.__module__ == name and styles:
                found[f"{name}.{value.__name__}"] = styles
    return found


def test_every_style_of_the_library_is_understood_or_refused_by_name() -> None:
    found = configurations()
    assert len(found) > 100
    strings = {style for styles in found.values() for style in styles.values()}
    known = {*SPELLINGS, WHOLE, HEAD_NORM, *REFUSED}
    assert strings - known == set()
    assert {"colwise", "rowwise", "moe_tp_experts", HEAD_NORM} <= strings
    registered = set(transformers.distributed.parallel_utils.ALL_PARALLEL_STYLES)
    assert registered - known == set(), "the library has learnt a style that none of its plans uses"
    model = nn.Sequential(nn.Linear(4, 4))
    for style in REFUSED:
        with pytest.raises(PlanError, match=f"plan entry '0': style '{style}' cannot be served: "):
            plan(model, {"0": style}, degree=2)
