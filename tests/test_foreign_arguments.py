"""Arguments and loaded state of every kind: each that cannot be is one error of ours, short."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardproof as sp
from foreign import ODD, outcomes, refusal
from shardproof.axis import Axis
from shardproof.errors import LayoutError, UsageError
from shardproof.leaves import Cut
from shardproof.timeout import LONGEST, checked_timeout

Entry = tuple[Callable[[], object], str]


@pytest.mark.parametrize("label", ODD)
def test_arguments_that_are_of_the_wrong_kind_are_refused(label: str) -> None:
    value = ODD[label]
    one = {"fn": lambda axis: 1, "degree": 1}
    table: dict[str, Entry] = {
        "Scheme, leaves": (lambda: sp.Scheme(leaves=value), "^leaves="),
        "Scheme, seed": (lambda: sp.Scheme(seed=value), "^seed="),
        "Scheme, numerics": (lambda: sp.Scheme(numerics=value), "^unknown numerics"),
        "Axis, name": (lambda: Axis.solo(value), "^name="),
        "Axis, transport": (lambda: Axis("tp", value), r"^Axis\(transport="),
        "Axis.from_group": (lambda: Axis.from_group(value), "Axis.from_group"),
        "Axis.from_mesh": (lambda: Axis.from_mesh(value), "^Axis.from_mesh got"),
        "launch, degree": (lambda: sp.launch(**(one | {"degree": value})), "^degree "),
        "launch, engine": (lambda: sp.launch(**one, engine=value), "^unknown engine"),
        "launch, compare_inputs": (
            lambda: sp.launch(**one, compare_inputs=value),
            "^compare_inputs=",
        ),
        "launch, transport": (lambda: sp.launch(**one, transport=value), "^unknown transport"),
        "grad_norm": (lambda: sp.grad_norm(value), "^the model of grad_norm or clip"),
        "clip, model": (lambda: sp.clip_grad_norm_(value, 1.0), "^the model of grad_norm or clip"),
        "hf.load, model": (lambda: sp.hf.load(value, "."), "^the model is"),
        "hf.load, directory": (lambda: sp.hf.load(nn.Linear(1, 1), value), "^the directory is"),
    }
    if label != "a huge number":
        table["Cut, size"] = (lambda: Cut(value, 8, 2), "^cannot cut a dim of")
    if label != "a function":
        table["launch, fn"] = (lambda: sp.launch(value, degree=1), "^cannot launch")
    if label != "a float of numpy":
        table["launch, timeout"] = (lambda: sp.launch(**one, timeout=value), "^timeout=")
        table["from_env, timeout"] = (lambda: Axis.from_env(timeout=value), "^timeout=")
    if label not in ("a float of numpy", "a huge number"):
        table["clip, max_norm"] = (lambda: sp.clip_grad_norm_(nn.Linear(1, 1), value), "^max_norm=")
    assert outcomes(table) == {}


@pytest.mark.parametrize(
    "timeout", [0, -1, float("nan"), float("inf"), 1e300, 10**400, True, "10", LONGEST + 1]
)
def test_a_timeout_that_nobody_waits_is_refused(timeout: Any) -> None:
    assert str(refusal(lambda: checked_timeout(timeout))).startswith("timeout=")
    assert checked_timeout(LONGEST) == LONGEST
    assert checked_timeout(5) == 5.0


@pytest.mark.parametrize("label", [*ODD, "true", "text", "empty"])
def test_arguments_of_layers_that_are_of_the_wrong_kind_are_refused(label: str) -> None:
    value = {**ODD, "true": True, "text": "8", "empty": ""}[label]
    table: dict[str, Entry] = {}
    for layer, sizes in (
        (sp.ColumnParallelLinear, ("in_features", "out_features")),
        (sp.RowParallelLinear, ("in_features", "out_features")),
        (sp.VocabParallelEmbedding, ("num_embeddings", "embedding_dim")),
    ):
        given: dict[str, Any] = dict.fromkeys(sizes, 8) | {"axis": Axis.solo()}
        others = ["axis", "scheme", "device", "dtype"]
        others += [] if label in ("text",) else ["name"] if label != "true" else []
        others += ["padding_idx"] if "Embedding" in layer.__name__ else []
        others += ["bias"] if "Linear" in layer.__name__ and label != "true" else []
        for name in (*sizes, *others):
            table[f"{layer.__name__}, {name}"] = (
                lambda layer=layer, given=given, name=name: layer(**(given | {name: value})),
                f"{name}=",
            )
        make = getattr(layer, "from_linear", None) or layer.from_embedding
        table[f"{layer.__name__}.from"] = (
            lambda make=make: make(value, axis=Axis.solo()),
            "cannot be made from",
        )
    assert outcomes(table) == {}


# State


def cut() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 37), nn.GELU(), nn.Linear(37, 8))
    return sp.parallelize(model, {"0": "colwise", "2": "rowwise"}, Axis.solo())


STATE = "0._extra_state"


@pytest.mark.parametrize("label", [*ODD, "false", "one with a point", "text", "nothing"])
def test_layouts_that_are_none_are_refused(label: str) -> None:
    others = {"false": False, "one with a point": 1.0, "text": "1", "nothing": None}
    value = {**ODD, **others}[label]
    good = cut().state_dict()

    def load(extra: Any) -> object:
        return cut().load_state_dict({**good, STATE: extra})

    def changed(*keys: str) -> dict[str, Any]:
        extra = copy.deepcopy(good[STATE])
        inner = extra
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return extra

    table: dict[str, Entry] = {"all": (lambda: load(value), "it is no layout but")}
    for key in ("degree", "rank", "layouts"):
        table[key] = (lambda key=key: load(changed(key)), f"its {key} is")
    for key in ("shape", "dim", "leaves", "degree", "rank", "held"):
        where = ("layouts", "weight", key)
        table[f"layout, {key}"] = (lambda where=where: load(changed(*where)), "its layouts is")
    if label != "text":
        table["contract"] = (lambda: load(changed("contract")), "its contract is")
    assert outcomes(table) == {}


@pytest.mark.parametrize("label", [*ODD, "a number", "text", "nothing", "a dict"])
def test_an_optimizer_takes_no_foreign_state_and_stays_as_it_was(label: str) -> None:
    value = {**ODD, "a number": 5, "text": "x", "nothing": None, "a dict": {"a": 1}}[label]
    model = cut()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    good = sp.optimizer_state_dict(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())

    def load(state: Any) -> None:
        sp.load_optimizer_state_dict(model, optimizer, state)

    table: dict[str, Entry] = {
        "all": (lambda: load(value), "^cannot load"),
        "save, model": (lambda: sp.optimizer_state_dict(value, optimizer), "^the model is"),
        "save, optimizer": (lambda: sp.optimizer_state_dict(model, value), "^the optimizer is"),
        "model": (lambda: sp.load_optimizer_state_dict(value, optimizer, good), "^the model is"),
        "optimizer": (lambda: sp.load_optimizer_state_dict(model, value, good), "^the optimizer"),
        "layouts": (lambda: load({**good, "layouts": value}), "^cannot load"),
        "param_groups": (lambda: load({**good, "param_groups": value}), "^cannot load"),
        "a group": (lambda: load({**good, "param_groups": [value]}), "^cannot load"),
    }
    if label != "a dict":
        table["state"] = (lambda: load({**good, "state": value}), "^cannot load")
    assert outcomes(table) == {}
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][key], before["state"][0][key]) for key in ("exp_avg",))


def test_groups_of_another_optimizer_are_refused() -> None:
    model = cut()
    optimizer = torch.optim.AdamW(model.parameters())
    state = sp.optimizer_state_dict(model, optimizer)
    state["param_groups"] = state["param_groups"] * 2
    with pytest.raises(LayoutError, match=r"cannot load the state into AdamW \(ValueError: "):
        sp.load_optimizer_state_dict(model, optimizer, state)


# prove


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((output - target) ** 2).mean()


def arguments() -> dict[str, Any]:
    plain = nn.Linear(4, 4)
    return {
        "build": lambda axis: copy.deepcopy(plain),
        "loss_fn": mse,
        "batch": (torch.ones(3, 4), torch.zeros(3, 4)),
        "degrees": (1,),
    }


@pytest.mark.parametrize("label", [*ODD, "a number", "text", "nothing"])
def test_arguments_of_prove_that_are_of_the_wrong_kind_are_refused(label: str) -> None:
    value = {**ODD, "a number": 0, "text": "x", "nothing": None}[label]
    good = arguments()

    def prove(**changes: Any) -> object:
        return sp.prove(**(good | changes))

    x, y = good["batch"]
    table: dict[str, Entry] = {
        "batch": (lambda: prove(batch=value), "^the batch is|of the batch is"),
        "steps": (lambda: prove(steps=value), "^steps="),
        "audit_creation": (lambda: prove(audit_creation=value), "^audit_creation="),
        "a degree": (lambda: prove(degrees=(1, value)), "^degree "),
        "build gives": (lambda: prove(build=lambda axis: value), "^what build returned is"),
        "optimizer gives": (lambda: prove(optimizer=lambda p: value), "^what the function optim"),
    }
    if label != "a tensor of two":
        table["input"] = (lambda: prove(batch=(value, y)), "of the batch|no input")
        table["target"] = (lambda: prove(batch=(x, value)), "the target of the batch is")
        table["loss gives"] = (lambda: prove(loss_fn=lambda *_: value), "^the loss is")
    if label not in ("a set", "a tensor of two"):  # both are lists of degrees
        table["degrees"] = (lambda: prove(degrees=value), "^degree|^no degree")
    if label != "a function":
        table["build"] = (lambda: prove(build=value), "^build=")
        table["loss_fn"] = (lambda: prove(loss_fn=value), "^loss_fn=")
    if label != "nothing":
        table["scheme"] = (lambda: prove(scheme=value), "^scheme=")
    if label not in ("nothing", "a function"):
        table["optimizer"] = (lambda: prove(optimizer=value), "^optimizer=")
    if label != "text":
        table["name"] = (lambda: prove(name=value), "^name=")
    assert outcomes(table) == {}


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "of many numbers": (lambda out, y: (out - y) ** 2, r"^the loss has shape \(3, 4\)"),
    "of whole numbers": (lambda out, y: torch.tensor(1), "^the loss has shape .* dtype int64"),
    "without a gradient": (lambda out, y: mse(out, y).detach(), "^the loss has no gradient"),
}


@pytest.mark.parametrize("label", LOSSES)
def test_a_loss_from_which_nothing_can_be_learned_is_refused(label: str) -> None:
    loss, says = LOSSES[label]
    table = {label: (lambda: sp.prove(**(arguments() | {"loss_fn": loss})), says)}
    assert outcomes(table) == {}


def test_degrees_without_end_and_inputs_without_one_are_refused() -> None:
    good = arguments()
    table: dict[str, Entry] = {
        "count": (lambda: sp.prove(**(good | {"degrees": itertools.count(1)})), "more than 1000"),
        "text": (lambda: sp.prove(**(good | {"degrees": "1,2"})), "is not a list of degrees"),
        "0-d": (lambda: sp.prove(**(good | {"degrees": torch.tensor(1)})), "is not a list"),
        "inputs": (lambda: sp.prove(**(good | {"batch": ((), good["batch"][1])})), "no input"),
    }
    assert outcomes(table) == {}


def test_degrees_may_be_a_generator_and_numbers_of_numpy() -> None:
    import numpy as np  # noqa: PLC0415

    found = sp.prove(**(arguments() | {"degrees": (each for each in (np.int64(1), 1))}))
    assert found.degrees == (1,)


def test_a_scheme_has_ints_whatever_was_given() -> None:
    import numpy as np  # noqa: PLC0415

    made = sp.Scheme(leaves=np.int64(4), seed=np.int32(7))
    assert made == sp.Scheme(leaves=4, seed=7)
    assert (type(made.leaves), type(made.seed)) == (int, int)
    with pytest.raises(UsageError, match="seed=9223372036854775808 is out of range"):
        sp.Scheme(seed=2**63)
