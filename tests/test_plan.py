"""`plan`: what it says of any module is what a cut module has and what its step sends."""

import copy
import json
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardproof as sp
from gated_model import PLAN, Model
from invariance import normal
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import DegreeError, PlanError, UsageError
from shardproof.layers.base import ShardedModule
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.plan_text import together
from shardproof.plans.planning import plan
from shardproof.plans.style import (
    Attention,
    ColumnParallel,
    Plan,
    RowParallel,
    SharedInput,
    Style,
    VocabParallel,
)
from shardproof.scheme import NUMERICS, Numerics, Scheme

DEGREES = pytest.mark.parametrize("degree", [1, 3, 8])
Styles = Mapping[str, Style | str]

# Every option of both linears, on the gated model: what is cut, and what must be whole between.
WAYS: dict[str, Styles] = {
    "paired": PLAN,
    "shared input": PLAN | {"layers.*": SharedInput()},
    "gathered": {"embed": ColumnParallel(gather_output=True), "head": RowParallel(False)},
    "all": {**PLAN, "embed": "colwise_rep", "head": "rowwise_split_input"},
}


class Chain(nn.Module):
    """Two column-parallel linears, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 13), nn.Linear(13, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def step(axis: Axis, model: nn.Module, styles: Any, tokens: tuple[int, ...]) -> dict[str, Any]:
    """What the ledger counts of forward and backward; every input has a gradient."""
    cut = sp.parallelize(copy.deepcopy(model), styles, axis)
    x = normal(*tokens, 6).to(next(cut.parameters()).dtype).requires_grad_()
    axis.transport.ledger.reset()
    y = cut(x)
    y.backward(torch.ones_like(y))
    return axis.transport.ledger.as_dict()


@DEGREES
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_sends_what_the_plan_says(
    pool: Pool, degree: int, numerics: Numerics, way: str
) -> None:
    model, styles = Model(), Plan(WAYS[way], Scheme(numerics=numerics))
    made = plan(model, styles, degree=degree)
    counted = pool(degree, "threads").run(lambda axis: step(axis, model, styles, (3, 5)))
    for rank, found in enumerate(counted):
        assert found == made.comm(batch=3, length=5, rank=rank)
    assert bool(counted[0]) == (degree > 1)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gathered_input_in_another_dtype(
    pool: Pool, numerics: Numerics, dtype: torch.dtype
) -> None:
    styles = Plan(
        {"first": ColumnParallel(), "second": ColumnParallel(True, True)}, Scheme(numerics=numerics)
    )
    model = Chain().to(dtype)
    made = plan(model, styles, degree=3)
    for rank, found in enumerate(
        pool(3, "threads").run(lambda axis: step(axis, model, styles, (2, 7)))
    ):
        assert found == made.comm(batch=2, length=7, rank=rank)


def test_a_module_says_its_own_part() -> None:
    made = plan(Model(), WAYS["shared input"], degree=2)
    (kinds,) = made.comm(batch=3, length=5, module="layers.0").values()
    assert kinds["all_reduce"]["message_bytes"] == 3 * 5 * 10 * 4
    assert made.comm(batch=3, length=5, module="layers.0.gate_proj") == {}
    assert set(made.comm(batch=3, length=5, module="layers.0.down_proj")) == {"forward"}


def without(styles: Styles, entry: str) -> dict[str, Style | str]:
    return {pattern: style for pattern, style in styles.items() if pattern != entry}


def test_a_shared_input_that_is_not_in_the_plan_is_noticed(pool: Pool) -> None:
    """The planted fault: a plan that forgets one of its entries predicts something else."""
    model, styles = Model(), WAYS["shared input"]
    made = plan(model, without(styles, "layers.*"), degree=2)
    counted = pool(2, "threads").run(lambda axis: step(axis, model, dict(styles), (3, 5)))
    assert counted[0] != made.comm(batch=3, length=5)


@DEGREES
def test_layouts_are_those_of_the_cut_modules(pool: Pool, degree: int) -> None:
    model = Model()
    made = plan(model, WAYS["all"], degree=degree)

    def run(axis: Axis) -> dict[str, Any]:
        cut = sp.parallelize(copy.deepcopy(model), WAYS["all"], axis)
        held = sum(each.numel() * each.element_size() for each in cut.parameters())
        layouts = {
            f"{name}.{own}": layout
            for name, module in cut.named_modules()
            if isinstance(module, ShardedModule)
            for own, layout in module.layouts.items()
        }
        return {"held": held, "layouts": layouts}

    for rank, found in enumerate(pool(degree, "threads").run(run)):
        planned = {
            f"{module.name}.{parameter.name}": parameter.layouts[rank]
            for module in made.modules
            if module.is_cut
            for parameter in module.parameters
        }
        assert planned == found["layouts"]
        assert made.held_bytes[rank] == found["held"]


def test_bytes_and_shares() -> None:
    made = plan(Model(), PLAN, degree=3)
    whole = sum(each.numel() * 4 for each in Model().parameters())
    assert made.total_bytes == whole
    # What is not cut: embed, norm, head, and the biases of both row layers.
    kept = 4 * (6 * 10 + 10 + 10 + 10 * 5 + 5 + 2 * 10)
    assert made.whole_bytes == kept
    assert made.share == 1 - kept / whole
    cut = next(module for module in made.modules if module.name == "layers.0.up_proj")
    weight = next(each for each in cut.parameters if each.name == "weight")
    assert (cut.role, cut.leaves, cut.idle) == ("column", 8, ())
    assert weight.shape == (43, 10)
    assert [each.local_shape for each in weight.layouts] == [(18, 10), (15, 10), (10, 10)]
    assert weight.held_bytes == weight.owned_bytes == (720, 600, 400)


def test_idle_ranks_are_named() -> None:
    made = plan(nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 6)), {"0": "colwise"}, degree=5)
    assert (made.modules[0].leaves, made.modules[0].idle) == (3, (3, 4))


def test_what_stays_whole_says_why() -> None:
    made = plan(Model(), {**PLAN, "head": "replicate"}, degree=2)
    reasons = {module.name: module.reason for module in made.modules if not module.is_cut}
    assert reasons == {
        "embed": "the plan does not name it",
        "norm": "small, its input is Replicate",
        "head": "the plan says so",
    }
    assert made.notes == ()
    made = plan(Model(), without(PLAN, "layers.*.gate_proj"), degree=2)
    assert made.notes == (
        "layers.0-1.gate_proj: whole on every rank, for the plan cuts these layers without them.",
    )


def test_a_plan_is_plain_data() -> None:
    made = plan(Model(), WAYS["shared input"], degree=3)
    assert pickle.loads(pickle.dumps(made)) == made
    data = json.loads(json.dumps(made.as_dict()))
    assert data["plan"]["layers.*"] == {"style": "SharedInput", "members": ["gate_proj", "up_proj"]}
    assert data["held_bytes"] == list(made.held_bytes)
    (up,) = [module for module in data["modules"] if module["name"] == "layers.1.up_proj"]
    assert up["parameters"][0]["ranks"][2] == {
        "shape": [10, 10],
        "owned": [[33, 43]],
        "held_bytes": 400,
        "owned_bytes": 400,
    }
    (group,) = [module for module in data["modules"] if module["name"] == "layers.1"]
    (sent,) = group["collectives"]
    assert (sent["kind"], sent["elements_per_token"], sent["fixed_elements"]) == (
        "all_reduce", 10, 0,
    )  # fmt: skip


def test_repeated_layers_are_one_line() -> None:
    text = str(plan(Model(), PLAN, degree=2))
    assert text.splitlines()[0] == "Model at degree 2"
    assert len(re.findall(r"^layers\.0-1\.up_proj +column +8 ", text, re.MULTILINE)) == 1
    assert "layers.1" not in text
    assert "parameters: " in text


def test_names_are_put_together() -> None:
    assert together(["a.0.b", "a.2.b", "a.3.b"]) == "a.0,2-3.b"
    assert together(["a.0.b.1", "a.1.b.1"]) == "a.0-1.b.1"
    assert together(["a.0.b.1", "a.1.b.2"]) == "a.*.b.* (2)"


def test_styles_come_back_under_patterns_and_names() -> None:
    made = plan(Model(), {**PLAN, "layers.1.up_proj": "colwise"}, degree=2)
    assert set(made.plan.styles) == set(PLAN)
    assert set(made.styles) == {
        f"layers.{layer}.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")
    }
    only = plan(Model(), {"layers.1.up_proj": "colwise"}, degree=2)
    assert set(only.plan.styles) == {"layers.1.up_proj"}


def test_nothing_is_allocated() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 20, 1 << 20))
    made = plan(model, {"0": "colwise"}, degree=2)
    assert made.held_bytes == (2 * (1 << 40) + 2 * (1 << 20),) * 2


# -- ties ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self, rows: int = 11) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(rows, 6), nn.Linear(6, rows, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_weight_is_counted_once() -> None:
    made = plan(Tied(), {"embed": VocabParallel(), "head": "colwise"}, degree=2)
    assert made.total_bytes == 11 * 6 * 4
    assert made.held_bytes == (7 * 6 * 4, 4 * 6 * 4)  # leaves of 2, 2, 2, 1 and four of 1
    tied = {module.name: module.parameters[0].tied_to for module in made.modules}
    assert tied == {"embed": "", "head": "embed.weight"}


TIES: dict[str, tuple[Styles, str]] = {
    "one side": (
        {"head": "colwise"},
        "module 'head' shares its weight with 'embed': a tied weight cannot be cut on one side "
        "only. Cut both along the vocabulary (",
    ),
    "the other side": (
        {"embed": VocabParallel()},
        "module 'embed' shares its weight with 'head': a tied weight cannot be cut on one side "
        "only.",
    ),
    "two ways": (
        {"embed": VocabParallel(), "head": "rowwise"},
        "a tied weight is cut two ways: in 'embed' along dim 0 (by 8 leaves of 11) and 'head' "
        "along dim 1 (by 6 leaves of 6). Cut both along the vocabulary (VocabParallel() for the "
        "embedding, ColumnParallel() for the linear), untie them, or leave both out of the plan.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TIES)
def test_a_tied_weight_is_cut_alike_or_not_at_all(what: str) -> None:
    styles, text = TIES[what]
    with pytest.raises(PlanError, match=re.escape(text)):
        plan(Tied(), styles, degree=2)


# -- attention -------------------------------------------------------------------------------------


class Heads(nn.Module):
    """The parts of an attention, without the sum."""

    def __init__(
        self, queries: int = 4, keys: int = 2, head_dim: int = 8, norms: str | None = None
    ) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, queries * head_dim), nn.Linear(6, keys * head_dim)
        self.v, self.o = nn.Linear(6, keys * head_dim), nn.Linear(queries * head_dim, 6)
        if norms is not None:
            wide = norms == "across"
            self.q_norm = nn.RMSNorm(queries * head_dim if wide else head_dim)
            self.k_norm = nn.RMSNorm(keys * head_dim if wide else head_dim)


def other_norms(norm: nn.Module) -> Heads:
    heads = Heads()
    heads.q_norm = norm
    return heads


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention


NAMES = {"query": "q", "key": "k", "value": "v", "output": "o"}


def cut_heads(queries: int = 4, keys: int = 2, head_dim: int = 8, **options: Any) -> Attention:
    return Attention(queries, keys, head_dim, **NAMES | options)


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 8])
def test_heads_are_held_where_they_are_needed(degree: int) -> None:
    made = plan(Block(Heads()), {"attn": cut_heads()}, degree=degree)
    modules = {module.name: module for module in made.modules}
    ones = [1] * 4 + [0] * (degree - 4)
    queries = {1: [4], 2: [2, 2], 3: [2, 1, 1]}.get(degree, ones)
    keys = {1: [2], 2: [1, 1], 3: [1, 1, 1]}.get(degree, ones)
    found = (
        [each.local_shape[0] // 8 for each in modules[name].parameters[0].layouts]
        for name in ("attn.q", "attn.k")
    )
    assert [*found] == [queries, keys]
    # A key-value head that several ranks hold is owned by one.
    assert sum(modules["attn.k"].parameters[0].owned_bytes) == 2 * 8 * 6 * 4
    assert modules["attn"].idle == tuple(range(4, degree))
    assert modules["attn.k"].idle == tuple(range(4, degree))
    assert (modules["attn.q"].leaves, modules["attn.k"].leaves) == (4, 2)


def test_what_an_attention_sends() -> None:
    def sent(degree: int, name: str, **options: Any) -> dict[str, Any]:
        made = plan(
            Block(Heads(norms=options.get("norms"))), {"attn": cut_heads(**options)}, degree=degree
        )
        found = made.comm(batch=2, length=5, module=name)
        return {
            direction: {
                kind: (each["calls"], each["message_bytes"]) for kind, each in kinds.items()
            }
            for direction, kinds in found.items()
        }

    tokens = 2 * 5 * 4  # bytes of one element of every token
    assert sent(2, "attn") == {"backward": {"all_reduce": (1, 6 * tokens)}}
    assert sent(2, "attn.o") == {"forward": {"all_reduce": (1, 6 * tokens)}}
    # Two query heads of one key-value head are on two ranks: a node of K and one of V from each.
    assert sent(3, "attn")["backward"]["all_gather"] == (1, 2 * 2 * 8 * tokens)
    assert sent(4, "attn")["backward"]["all_gather"] == (1, 2 * 4 * 8 * tokens)
    norms = {"query_norm": "q_norm", "key_norm": "k_norm"}
    assert sent(2, "attn.q_norm", norms="heads", **norms) == {
        "backward": {"all_reduce": (1, 8 * 4)}
    }
    assert sent(2, "attn.k_norm", norms="across", **norms) == {
        "forward": {"all_reduce": (1, tokens)},
        "backward": {"all_reduce": (1, tokens)},
    }


# -- what does not fit -----------------------------------------------------------------------------

Made = Callable[[], nn.Module]


class Spiky(nn.Embedding):
    """Not only a lookup."""


PROBLEMS: dict[str, tuple[Made, Styles, str]] = {
    "heads that do not divide": (
        lambda: Block(Heads()),
        {"attn": cut_heads(queries=4, keys=3)},
        "module 'attn': 4 query heads cannot share 3 key-value heads of 8 features: every "
        "key-value head serves the same number of query heads. Correct Attention(",
    ),
    "heads of another number": (
        lambda: Block(Heads()),
        {"attn": cut_heads(queries=8, keys=2)},
        "module 'attn.q' has out_features=32, which is not 8 query heads of 8 features (64). "
        "Correct Attention(queries=..., keys=..., head_dim=...).",
    ),
    "no such child": (
        lambda: Block(Heads()),
        {"attn": Attention(4, 2, 8)},
        "module 'attn' (Heads) has no child 'q_proj', which its Attention names. Its children: "
        "q, k, v, o.",
    ),
    "no such attend": (
        lambda: Block(Heads()),
        {"attn": cut_heads(attend="core")},
        "module 'attn' (Heads) has no child 'core'",
    ),
    "a child twice": (
        lambda: Block(Heads()),
        {"attn": cut_heads(value="k")},
        "names a child twice. Name each once.",
    ),
    "a child of its own": (
        lambda: Block(Heads()),
        {"attn": cut_heads(), "attn.q": "colwise"},
        "module 'attn.q' is cut by the Attention of 'attn' and by an entry of its own, "
        "ColumnParallel(gather_input=False, gather_output=False). Remove that entry.",
    ),
    "norms of another width": (
        lambda: Block(Heads(norms="across")),
        {"attn": cut_heads(query_norm="q_norm", norms="heads")},
        "module 'attn.q_norm' has parameters of shapes {'weight': (32,)}, and one with "
        "norms='heads' has (8,).",
    ),
    "norms of another formula": (
        lambda: Block(other_norms(nn.LayerNorm(8))),
        {"attn": cut_heads(query_norm="q_norm", norms="heads")},
        "module 'attn.q_norm' is a LayerNorm with weight, bias, and a norm of an Attention must be "
        "an RMSNorm over one dim, of a kind that shardproof knows, with a weight. Use nn.RMSNorm, "
        "or leave 'attn' out of the plan.",
    ),
    "norms without a weight": (
        lambda: Block(other_norms(nn.RMSNorm(8, elementwise_affine=False))),
        {"attn": cut_heads(query_norm="q_norm", norms="heads")},
        "module 'attn.q_norm' is a RMSNorm with no weight, and a norm of an Attention must be",
    ),
    "a projection that is no linear": (
        lambda: Block(Heads(norms="heads")),
        {"attn": cut_heads(key="q_norm")},
        "module 'attn.q_norm' is no nn.Linear but a RMSNorm, which Attention cannot cut.",
    ),
    "the model itself": (
        lambda: nn.Linear(4, 4),
        {"": ColumnParallel()},
        "names the model itself, which cannot be replaced: put it into a module",
    ),
    "a linear as a vocabulary": (
        Model,
        {"embed": VocabParallel()},
        "module 'embed' is a Linear, which VocabParallel(scale=1.0) cannot cut: it takes "
        "nn.Embedding. Use ColumnParallel() for a linear, or leave it out of the plan.",
    ),
    "an embedding as a linear": (
        Tied,
        {"embed": "colwise"},
        "module 'embed' is a Embedding, which ColumnParallel(gather_input=False, "
        "gather_output=False) cannot cut: it takes nn.Linear.",
    ),
    "an embedding that computes": (
        lambda: nn.Sequential(Spiky(5, 4)),
        {"0": VocabParallel()},
        "module '0' is a Spiky, which VocabParallel(scale=1.0) cannot cut: it does not compute "
        "what nn.Embedding computes. So leave it out of the plan.",
    ),
    "an embedding with options": (
        lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)),
        {"0": VocabParallel()},
        "it has max_norm=1.0. Set max_norm=None, or leave it out of the plan.",
    ),
    "shared by one": (
        Model,
        {**PLAN, "layers.0": SharedInput(("up_proj",))},
        "SharedInput(members=('up_proj',)) of module 'layers.0': its members must be two or more, "
        "each named once.",
    ),
    "shared by rows": (
        Model,
        {**PLAN, "layers.0": SharedInput(("up_proj", "down_proj"))},
        "'layers.0.down_proj' is RowParallel(input_is_parallel=True), and its members must be "
        "ColumnParallel() whose input comes whole. Add the entry, or remove this one.",
    ),
    "shared and not named": (
        Model,
        {"layers.0": SharedInput()},
        "'layers.0.gate_proj' is not named by the plan, and its members must be ColumnParallel()",
    ),
    "no common input": (
        Model,
        {"embed": "colwise_rep", "head": "colwise_rep", "": SharedInput(("embed", "head"))},
        "of the model: its members have in_features 6, 10, and read no common input.",
    ),
    "no common width": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 5)),
        {"*": "colwise", "": SharedInput(("0", "1"))},
        "its members have out_features 5, 6, and share one sum only where these are equal.",
    ),
    "experts": (
        Model,
        {"layers.*.up_proj": "grouped_gemm"},
        "plan entry 'layers.*.up_proj': style 'grouped_gemm' cannot be served: mixture of experts "
        "is not supported yet. Give a plan of your own that leaves these modules whole.",
    ),
    "a parameter": (
        Model,
        {"layers.*.up_proj.weight": "colwise"},
        "names a parameter, and only modules can be cut. Name the module, or remove the entry.",
    ),
    "near names": (
        Model,
        {"haed": "colwise"},
        "matches no module of Model. Remove the entry or correct the name; near names: head",
    ),
    "a norm of no heads": (
        Model,
        {"norm": "replicated_with_grad_allreduce"},
        "module 'norm': 'replicated_with_grad_allreduce' is understood for norms of queries and "
        "keys beside the linears of an attention, and this is none.",
    ),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_a_plan_that_does_not_fit_is_refused(what: str) -> None:
    make, styles, text = PROBLEMS[what]
    with pytest.raises(PlanError, match=re.escape(text)) as caught:
        plan(make(), styles, degree=2)
    assert str(caught.value).startswith("the plan does not fit ")


def test_what_many_layers_have_alike_is_said_once() -> None:
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ReLU() for _ in range(12)), "head": nn.Linear(4, 4)}
    )
    with pytest.raises(PlanError) as caught:
        plan(model, {"layers.*": "colwise", "haed": "colwise"}, degree=2)
    message = str(caught.value)
    assert message.count("\n- ") == 2
    assert "module 'layers.0' is a ReLU" in message
    assert message.endswith("(11 more like this.)")
    assert "layers.1'" not in message


def test_a_module_without_a_plan_is_told_to_give_inputs() -> None:
    with pytest.raises(PlanError) as caught:
        plan(Model(), degree=2)
    assert str(caught.value) == (
        "Model carries no tp_plan, and no plan is given. Give an example of what forward takes "
        "(inputs=): what can be cut is found by watching one forward. Or write a plan: "
        "docs/plans.md says how."
    )


@pytest.mark.parametrize(("degree", "text"), [(9, "degree 9 exceeds leaves=8"), (0, "degree 0 is"),
                                              (1.5, r"degree 1\.5 is not a whole")])  # fmt: skip
def test_degrees_that_cannot_be(degree: Any, text: str) -> None:
    with pytest.raises(DegreeError, match=text):
        plan(Model(), PLAN, degree=degree)


def test_two_schemes_are_one_too_many() -> None:
    styles = Plan(PLAN, Scheme(leaves=4))
    assert plan(Model(), styles, degree=2).scheme.leaves == 4
    assert plan(Model(), PLAN, degree=2, scheme=Scheme(leaves=4)).scheme.leaves == 4
    with pytest.raises(UsageError, match=r"the plan has Scheme\(leaves=4.*, and Scheme\(leaves=6"):
        plan(Model(), styles, degree=2, scheme=Scheme(leaves=6))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch": 0}, "batch=0 is not a positive whole number"),
        ({"length": 1.5}, r"length=1\.5 is not a positive"),
        ({"logits": 6}, "logits=6 of length=5 tokens: there are not so many"),
        ({"rank": 2}, "rank 2 is not one of 2. Use 0 to 1"),
    ],
)
def test_steps_that_cannot_be(options: dict[str, Any], text: str) -> None:
    made = plan(Model(), PLAN, degree=2)
    with pytest.raises(UsageError, match=text):
        made.comm(**{"batch": 2, "length": 5} | options)


def test_a_module_that_is_not_in_the_plan() -> None:
    made: ModelPlan = plan(Model(), PLAN, degree=2)
    with pytest.raises(
        PlanError, match=r"no module 'layers\.2\.up_proj'; near names: layers\.1\.up"
    ):
        made.comm(batch=1, length=1, module="layers.2.up_proj")


def test_what_is_cut_already_is_refused() -> None:
    cut = sp.parallelize(Model(), {"head": RowParallel()}, Axis.solo())
    with pytest.raises(PlanError, match=r"module 'head' is cut already \(RowParallelLinear\)"):
        plan(cut, {"head": RowParallel()}, degree=2)
