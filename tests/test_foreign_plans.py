"""A plan may be anything: each that is none is one error that names the entry as it was written."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import shardproof as sp
from foreign import ODD, in_time, outcomes, refusal
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import DegreeError, MismatchError, PlanError, UsageError
from shardproof.plans import match
from shardproof.plans.planning import MOST_SAID

COLUMN, ROW = sp.ColumnParallel(), sp.RowParallel()
GOOD = {"0": COLUMN, "2": ROW}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 37), nn.GELU(), nn.Linear(37, 8))


def cut(plan: Any, **options: Any) -> nn.Module:
    return sp.parallelize(mlp(), plan, Axis.solo(), **options)


def plan(given: Any, **options: Any) -> sp.ModelPlan:
    return sp.plan(mlp(), given, degree=2, **options)


NO_PLANS = {
    **ODD, "a number": 5, "true": True, "a list": [("0", COLUMN)], "pairs": (("0", COLUMN),),
    "text": "colwise", "a generator": (each for each in GOOD.items()), "a style": COLUMN,
}  # fmt: skip


@pytest.mark.parametrize("label", NO_PLANS)
def test_a_plan_that_is_none_is_refused(label: str) -> None:
    value = NO_PLANS[label]
    table = {
        "plan": (lambda: plan(value), "^the plan is .*, which is not a plan"),
        "parallelize": (lambda: cut(value), "^the plan is .*, which is not a plan"),
        "Plan": (lambda: sp.Plan(value), r"^Plan\(styles=.* is not a dict"),
        "scheme": (lambda: sp.Plan(GOOD, scheme=value), "^scheme=.* is not a Scheme"),
        "plan, scheme": (lambda: plan(GOOD, scheme=value), "^scheme=.* is not a Scheme"),
        "parallelize, scheme": (lambda: cut(None, scheme=value), "^scheme=.* is not a Scheme"),
        "style": (lambda: plan({"0": value}), "entry '0': (unknown style|.*matches|.*rowwise)"),
    }
    if value is COLUMN or value == "colwise":
        del table["style"]
    assert outcomes(table) == {}


@pytest.mark.parametrize("label", ["a huge number", "bytes", "nan", "an object", "NotImplemented"])
def test_a_pattern_that_is_no_text_is_refused(label: str) -> None:
    given = {ODD[label]: COLUMN, "2": ROW}
    for do in (plan, cut):
        error = refusal(lambda do=do: do(given))  # type: ignore[misc]
        assert isinstance(error, PlanError)
        assert re.search("^the plan has the pattern .*, and a pattern is text", str(error))


@pytest.mark.parametrize(
    "pattern",
    [
        "[", "[!", "[0-", "?x", "\\0", "0\n", "0 ", " 0", ".", "..", "*.", "(0)", "^0$", "\udcff",
        "\x1b[31m", "\uff10", "[]", "[!012]", "*" * 5000 + "b", "." * 10**6, "x" * 10**6,
        "*" + "a*" * 5000,
    ],
)  # fmt: skip
def test_a_pattern_with_odd_letters_matches_nothing_and_is_named(pattern: str) -> None:
    error = refusal(lambda: plan({pattern: COLUMN}))
    assert re.search(r"plan entry '.*matches no module of Sequential", str(error))


def test_a_name_with_a_bracket_can_be_named() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(8, 8), "b[0]": nn.Linear(8, 8)})
    found = sp.plan(model, {"a[0]": COLUMN, "b[0]": ROW}, degree=2)
    assert list(found.styles) == ["a[0]", "b[0]"]


@pytest.mark.parametrize(
    "entries",
    [
        {f"layer.{place}.nothing": COLUMN for place in range(20_000)},
        {f"layer.*.{place}*": COLUMN for place in range(20_000)},
        {str(place): "sideways" for place in range(20_000)},
        {f"layer{place}" + "x" * 500: COLUMN for place in range(20_000)},
    ],
    ids=["names", "patterns", "styles", "long names"],
)
def test_twenty_thousand_entries_that_name_nothing_are_one_error(entries: dict[str, Any]) -> None:
    with in_time(), pytest.raises(PlanError) as caught:
        plan(entries)
    error = str(caught.value)
    assert error.count("\n- ") <= MOST_SAID + 1
    assert len(error) < 20_000


def test_how_many_entries_were_not_looked_at_is_said() -> None:
    found = match.find({f"x{place}": COLUMN for place in range(20_000)}, mlp())
    assert len(found.problems) == match.MOST_PROBLEMS + 1
    assert found.problems[-1] == "the other 19,950 entries were not looked at."


NO_FLAGS = {**ODD, "one": 1, "none": None, "text": "yes"}
STYLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gather_input": (sp.ColumnParallel, NO_FLAGS),
    "gather_output": (sp.ColumnParallel, NO_FLAGS),
    "input_is_parallel": (sp.RowParallel, NO_FLAGS),
    "scale": (
        sp.VocabParallel,
        {**ODD, "text": "1", "true": True, "infinity": float("inf"), "a float of numpy": None},
    ),
    "members": (
        sp.SharedInput,
        {**ODD, "a number": 5, "text": "up_proj", "nothing": (), "a gap": ("up_proj", "")},
    ),
}
HEADS = {"queries": 4, "keys": 2, "head_dim": 8}


@pytest.mark.parametrize("field", STYLES)
def test_a_field_of_a_style_that_is_of_the_wrong_kind_is_refused(field: str) -> None:
    style, values = STYLES[field]
    table = {
        label: (lambda value=value: style(**{field: value}), rf"^\w+\({field}=.* is not ")
        for label, value in values.items()
    }
    assert outcomes(table) == {}


@pytest.mark.parametrize("field", ["queries", "keys", "head_dim", "query", "norms", "attend"])
def test_a_field_of_an_attention_that_is_of_the_wrong_kind_is_refused(field: str) -> None:
    wrong: dict[str, Any] = {**ODD, "true": True, "zero": 0, "below zero": -1, "empty": ""}
    table = {
        label: (
            lambda value=value: sp.Attention(**(HEADS | {field: value})),
            rf"^Attention\({field}=.* is not ",
        )
        for label, value in wrong.items()
    }
    assert outcomes(table) == {}


def test_numbers_of_numpy_are_numbers() -> None:
    import numpy as np  # noqa: PLC0415

    made = sp.Attention(**{name: np.int64(value) for name, value in HEADS.items()})
    assert made == sp.Attention(**HEADS)
    assert type(made.queries) is int


def test_rows_are_scaled_only_where_the_embedding_does_so() -> None:
    model = nn.Sequential(nn.Embedding(11, 4))
    with pytest.raises(PlanError, match=r"multiplies its rows with nothing. Use VocabParallel\(\)"):
        sp.plan(model, {"0": sp.VocabParallel(1.5)}, degree=2)
    assert sp.plan(model, {"0": sp.VocabParallel()}, degree=2).styles


@pytest.mark.parametrize("label", ODD)
def test_other_arguments_of_a_plan_that_are_of_the_wrong_kind_are_refused(label: str) -> None:
    value = ODD[label]
    made = plan(GOOD)
    step = {"batch": 1, "length": 2}
    table: dict[str, Any] = {
        "plan, model": (lambda: sp.plan(value, GOOD, degree=2), "^the model is"),
        "plan, degree": (lambda: sp.plan(mlp(), GOOD, degree=value), "^degree .*(not a|exceeds)"),
        "parallelize, model": (lambda: sp.parallelize(value, GOOD, Axis.solo()), "^the model is"),
        "parallelize, axis": (lambda: sp.parallelize(mlp(), GOOD, value), "^axis=.* not an Axis"),
        "initialize, model": (lambda: sp.initialize(value), "^the model is"),
        "initialize, scheme": (lambda: sp.initialize(mlp(), scheme=value), "^scheme="),
        "initialize, device": (lambda: sp.initialize(mlp(), device=value), "^device="),
        "comm, module": (lambda: made.comm(**step, module=value), "the plan has no module"),
    }
    if label != "a float of numpy":
        table["initialize, std"] = (lambda: sp.initialize(mlp(), std=value), "^std=")
    for name in ("batch", "length", "logits", "rank", "labels"):
        table[f"comm, {name}"] = (
            lambda name=name: made.comm(**(step | {name: value})),
            f"^{name}=|^rank ",
        )
    assert outcomes(table) == {}


@pytest.mark.parametrize("label", [*ODD, "a dict with a number"])
def test_a_tp_plan_of_the_wrong_kind_is_refused(label: str) -> None:
    value = ODD.get(label, {5: "colwise"})

    def carry(own: Any, base: Any) -> sp.ModelPlan:
        model = mlp()
        model._tp_plan = own
        model.config = SimpleNamespace(base_model_tp_plan=base)
        return sp.plan(model, None, degree=2)

    table = {
        "own": (lambda: carry(value, None), "^the model's _tp_plan is .*, and a tp_plan is a dict"),
        "base": (lambda: carry({}, value), "^the model's config.base_model_tp_plan is"),
    }
    assert outcomes(table) == {}


def different_plans(axis: Axis) -> str:
    given: Any = GOOD if axis.rank == 0 else 5
    with pytest.raises(MismatchError) as caught:
        sp.parallelize(mlp(), given, axis)
    return str(caught.value)


def the_same_wrong_plan(axis: Axis) -> str:
    with pytest.raises(PlanError) as caught:
        sp.parallelize(mlp(), 5, axis)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_wrong_plan_on_one_rank_is_an_error_on_all(pool: Pool) -> None:
    for message in pool(2, "threads").run(different_plans):
        assert "were given different plans or models" in message
    for message in pool(2, "threads").run(the_same_wrong_plan):
        assert message.startswith("the plan is 5, which is not a plan")


def test_two_schemes_are_one_too_many() -> None:
    with pytest.raises(UsageError, match=r"the plan has Scheme\(leaves=4"):
        plan(sp.Plan(GOOD, sp.Scheme(leaves=4)), scheme=sp.Scheme(leaves=2))
    with pytest.raises(DegreeError, match="exceeds leaves=8"):
        sp.plan(mlp(), GOOD, degree=9)
