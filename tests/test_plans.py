"""Plans: what a pattern matches, and every way in which a plan does not fit a model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gated_model import PLAN, Model
from places import TOGETHER, Pool
from shardproof.axis import Axis
from shardproof.errors import DegreeError, MismatchError, PlanError
from shardproof.layers.linear import RowParallelLinear
from shardproof.plans.apply import parallelize
from shardproof.plans.match import find, fits
from shardproof.plans.style import ColumnParallel, Plan, RowParallel
from shardproof.scheme import Scheme


def kinds(model: nn.Module) -> dict[str, str]:
    """Every module's class; the identity of every parameter is compared beside it."""
    return {name: type(module).__name__ for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("pattern", "name", "is_match"),
    [
        ("layers.*.up_proj", "layers.0.up_proj", True),
        ("layers.*.up_proj", "layers.0.mlp.up_proj", False),
        ("layers.*", "layers.0.up_proj", False),
        ("*", "head", True),
        ("*", "layers.0", False),
        ("*.*.*_proj", "layers.1.up_proj", True),
        ("layers.[01].up_proj", "layers.1.up_proj", True),
        ("layers.?.up_proj", "layers.10.up_proj", False),
        ("Head", "head", False),
        ("layers.0.up", "layers.0.up_proj", False),
    ],
)
def test_a_star_never_crosses_a_dot(pattern: str, name: str, is_match: bool) -> None:
    assert fits(pattern, name) == is_match


def test_hugging_face_spellings_are_the_two_styles() -> None:
    found = find({"layers.*.up_proj": "colwise", "head": "rowwise"}, Model())
    assert found.problems == []
    assert found.styles == {
        "layers.0.up_proj": ColumnParallel(),
        "layers.1.up_proj": ColumnParallel(),
        "head": RowParallel(),
    }


def test_two_patterns_may_agree_about_a_module() -> None:
    styles = {"head": "colwise", "h*d": ColumnParallel()}
    found = find(styles, Model())
    assert (found.styles, found.problems) == ({"head": ColumnParallel()}, [])


def refusal(model: nn.Module, styles: Any, axis: Axis | None = None) -> str:
    """The message; the model must be as it was, down to its parameters."""
    before = kinds(model)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(PlanError) as caught:
        parallelize(model, styles, axis or Axis.solo())
    assert kinds(model) == before
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    return str(caught.value)


def tied() -> nn.Module:
    model = Model()
    model.head = nn.Linear(6, 10)
    nn.init.zeros_(model.head.bias)
    model.head.weight = model.embed.weight
    return model


def hooked() -> nn.Module:
    model = Model()
    model.head.register_forward_hook(lambda *_: None)
    return model


def hooked_activation() -> nn.Module:
    model = Model()
    model.layers[1].act.register_forward_pre_hook(lambda *_: None)
    return model


def in_place() -> nn.Module:
    return Model(act=lambda: nn.SiLU(inplace=True))


def cut_already() -> nn.Module:
    model = Model()
    model.head = RowParallelLinear(10, 5, axis=Axis.solo())
    return model


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "unknown style": (
        Model,
        {"head": "columnwise"},
        "plan entry 'head': unknown style 'columnwise'. Use ColumnParallel(), RowParallel(), "
        "VocabParallel(), Attention(...), SharedInput(...), or Hugging Face's 'colwise', "
        "'rowwise', ",
    ),
    "no style": (Model, {"head": None}, "plan entry 'head': unknown style None."),
    "no match": (
        Model,
        {"layers.*.up_projection": "colwise"},
        "plan entry 'layers.*.up_projection': ColumnParallel(gather_input=False, "
        "gather_output=False) matches no module of Model. Remove the entry or correct the name; "
        "near names: layers.1.up_proj, layers.0.up_proj",
    ),
    "two styles": (
        Model,
        {"head": "colwise", "he*": "rowwise"},
        "module 'head' is matched by 'head': ColumnParallel(gather_input=False, "
        "gather_output=False) and by 'he*': RowParallel(input_is_parallel=True). Keep one of the "
        "two.",
    ),
    "not a linear": (
        Model,
        {"layers.0": "colwise"},
        "module 'layers.0' is a Mlp, which ColumnParallel(gather_input=False, "
        "gather_output=False) cannot cut: it takes nn.Linear.",
    ),
    "tied weight": (
        tied,
        {"head": "colwise"},
        "module 'head' shares its weight with 'embed': a tied weight cannot be cut on one side "
        "only.",
    ),
    "cut already": (
        cut_already,
        {"head": "rowwise"},
        "module 'head' is cut already (RowParallelLinear).",
    ),
    "hooks": (
        hooked,
        {"head": "rowwise"},
        "module 'head' has hooks, which the Linear that is replaced",
    ),
    "in place": (
        in_place,
        {"head": "rowwise"},
        "module 'layers.0.act' is SiLU(inplace=True): its bits change with the cut",
    ),
    "hooks of an activation": (
        hooked_activation,
        {"head": "rowwise"},
        "module 'layers.1.act' has hooks, which the SiLU that is replaced would lose.",
    ),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_a_plan_that_does_not_fit_is_refused(what: str) -> None:
    make, styles, text = PROBLEMS[what]
    message = refusal(make(), styles)
    assert message.startswith("the plan does not fit Model: ")
    assert text in message


def test_all_problems_come_in_one_error_and_nothing_is_changed(pool: Pool) -> None:
    styles = {
        "layers.*.gate_proj": "colwise",  # this one is fine
        "nowhere": "colwise",
        "norm": "rowwise",
        "layers.*.up_proj": "sideways",
        "head": "colwise",
        "embed": "rowwise",
    }
    for message in pool(2, "threads").run(lambda axis: refusal(tied(), styles, axis)):
        assert message.count("\n- ") == 4
        for text in ("'nowhere'", "'norm' is a RMSNorm", "style 'sideways'",
                     "a tied weight is cut two ways: in 'embed' along dim 1",
                     "and 'head' along dim 0"):  # fmt: skip
            assert text in message


def test_weight_norm_is_refused_and_not_lost() -> None:
    model = Model()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.head)
    assert "module 'head' has hooks" in refusal(model, {"head": "rowwise"})


def test_a_degree_beyond_the_leaves_is_refused_on_all_ranks(pool: Pool) -> None:
    def run(axis: Axis) -> str:
        with pytest.raises(DegreeError) as caught:
            parallelize(Model(), Plan(PLAN, Scheme(leaves=2)), axis)
        return str(caught.value)

    for message in pool(3, "threads").run(run):
        assert message.startswith("degree 3 exceeds leaves=2")
        assert "Use leaves=3 or more" in message


def different(axis: Axis, what: str) -> str:
    """Rank 0 is given something else than the others."""
    first = axis.rank == 0
    model, styles, scheme = Model(), dict(PLAN), Scheme()
    if what == "plan" and first:
        del styles["layers.*.down_proj"]
    if what == "leaves" and first:
        scheme = Scheme(leaves=1)  # which this degree exceeds, but that is not the first trouble
    if what == "shape" and first:
        model = Model(width=44)
    if what == "dtype" and first:
        model = model.double()
    if what == "one dtype":  # the same dtypes on both, the other way round
        model.get_submodule("head" if first else "embed").double()
    if what == "module":
        model.layers[1].act = nn.SiLU() if first else nn.GELU()
    if what == "weights" and first:
        with torch.no_grad():
            model.head.weight[4, 9] += 1
    if what == "frozen" and first:
        model.layers[0].up_proj.requires_grad_(False)
    before = kinds(model)
    with pytest.raises(MismatchError) as caught:
        parallelize(model, Plan(styles, scheme), axis)
    assert kinds(model) == before
    return str(caught.value)


SIDES = {
    "plan": (
        "plans or models: for the order of the plan, rank 0 has ['layers.*.gate_proj', "
        "'layers.*.up_proj']",
        "['layers.*.gate_proj', 'layers.*.up_proj', 'layers.*.down_proj']; 1 more differs. Give",
    ),
    "leaves": (
        "plans or models: for the scheme, rank 0 has Scheme(leaves=1,",
        "Scheme(leaves=8, numerics='invariant', seed=0). Give every rank the same.",
    ),
    "shape": (
        "plans or models: for parameter 'layers.0.gate_proj.weight', rank 0 has (44, 10) float32",
        "(43, 10) float32; 7 more differ. Give",
    ),
    "dtype": (
        "plans or models: for parameter 'embed.weight', rank 0 has (10, 6) float64",
        "(10, 6) float32; 14 more differ. Give",
    ),
    "one dtype": (
        "plans or models: for parameter 'embed.weight', rank 0 has (10, 6) float32",
        "(10, 6) float64; 3 more differ. Give",
    ),
    "module": ("plans or models: for module 'layers.1.act', rank 0 has SiLU", "GELU. Give"),
    "weights": (
        "different weights: for a sample of 'head.weight', rank 0 has ",
        ". The ranks' weights differ: seed every rank alike before the model is built (ranks",
    ),
    "frozen": (
        "plans or models: for parameter 'layers.0.up_proj.weight', rank 0 has (43, 10) float32 "
        "frozen",
        "(43, 10) float32; 1 more differs. Give",
    ),
}


@TOGETHER
@pytest.mark.parametrize("what", SIDES)
def test_different_plans_or_models_raise_on_all_ranks_and_name_both_sides(
    pool: Pool, degree: int, engine: str, what: str
) -> None:
    for message in pool(degree, engine).run(lambda axis: different(axis, what)):
        first, second = message.split(", rank 1 has ")
        assert first.startswith("the ranks of axis 'tp' were given different ")
        assert SIDES[what][0] in first
        assert SIDES[what][1] in second
        assert len(message) < 400


def test_weights_are_compared_whatever_their_size_dtype_and_strides(pool: Pool) -> None:
    """Large, transposed, one element, none, and dtypes that numpy lacks."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = nn.Parameter(torch.arange(30000.0).view(100, 300).t())
            self.low = nn.Parameter(torch.arange(10.0).bfloat16())
            self.one = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
            self.none = nn.Parameter(torch.empty(0, 4))
            self.meta = nn.Parameter(torch.empty(2, device="meta"))
            self.up = nn.Linear(4, 4)
            nn.init.constant_(self.up.weight, 0.5)
            nn.init.zeros_(self.up.bias)

    def run(axis: Axis, change: str) -> str:
        model = Odd()
        with torch.no_grad():
            model.get_parameter(change or "one").add_(axis.rank if change else 0)
        if not change:
            parallelize(model, {"up": "colwise"}, axis)
            return ""
        with pytest.raises(MismatchError) as caught:
            parallelize(model, {"up": "colwise"}, axis)
        return str(caught.value)

    for change in ("", "large", "low", "one"):
        for message in pool(2, "threads").run(lambda axis, c=change: run(axis, c)):
            assert (f"for a sample of '{change}', rank 0 has" in message) == bool(change)


def test_seeds_forgotten_under_a_launcher_are_found(pool: Pool) -> None:
    """Ranks as processes, each with the weights that its own generator drew."""

    def run(axis: Axis) -> str:
        torch.manual_seed(axis.rank)
        model = nn.Sequential(nn.Linear(8, 8))
        with pytest.raises(MismatchError) as caught:
            parallelize(model, {"0": "colwise"}, axis)
        return str(caught.value)

    for message in pool(2, "processes").run(run):
        assert "The ranks' weights differ" in message


@pytest.mark.parametrize(
    "make", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
             nn.FeatureAlphaDropout],
)  # fmt: skip
def test_dropout_is_refused_with_invariant_numerics_alone(make: Callable[..., nn.Module]) -> None:
    """Ranks would hold different activations where all must hold the same."""
    model = nn.Sequential(nn.Linear(4, 4), make(0.1))
    assert refusal(model, {"0": "colwise"}).endswith(
        f"module '1' is {make.__name__}(p=0.1): it draws from the global generator, so that ranks "
        "would hold different activations where they must be the same. Use nn.Dropout, which "
        "becomes dropout by position, p=0, or numerics='native'."
    )
    parallelize(model, Plan({"0": "colwise"}, Scheme(numerics="native")), Axis.solo())
    parallelize(nn.Sequential(nn.Linear(4, 4), make(0.0)), {"0": "colwise"}, Axis.solo())


def test_dropout_in_place_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1, inplace=True))
    assert "Dropout(p=0.1, inplace=True): it draws" in refusal(model, {"0": "colwise"})


class Dropping(nn.Module):
    """What is dropped lies between the two linears, which only the forward knows."""

    def __init__(self, *, of_part: bool) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(4, 16), nn.Linear(16, 4), nn.Dropout(0.5)
        self.of_part = of_part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: Any = self.up(x)
        return self.down(self.dropout(hidden.part if self.of_part else hidden))


def test_dropout_of_a_cut_activation_draws_by_position(pool: Pool) -> None:
    model = Dropping(of_part=False)

    def run(axis: Axis) -> torch.Tensor:
        cut = parallelize(copy.deepcopy(model), {"up": "colwise", "down": "rowwise"}, axis)
        return torch.stack([cut(torch.ones(2, 4)).detach(), cut(torch.ones(2, 4)).detach()])

    (one,) = pool(1, "threads").run(run)
    assert not torch.equal(one[0], one[1])
    for degree in (2, 3):
        assert all(torch.equal(other, one) for other in pool(degree, "threads").run(run))


def test_dropout_of_a_ranks_part_is_seen_when_it_runs(pool: Pool) -> None:
    model = Dropping(of_part=True)

    def run(axis: Axis) -> str:
        cut = parallelize(copy.deepcopy(model), {"up": "colwise", "down": "rowwise"}, axis)
        with pytest.raises(MismatchError) as caught:
            cut(torch.ones(2, 4))
        return str(caught.value)

    for message in pool(2, "threads").run(run):
        assert "'dropout' (Dropout) gets an activation that is cut" in message


def test_dropout_draws_by_position_in_a_sequence(pool: Pool) -> None:
    """Of a cut activation and of a whole one."""
    model = nn.Sequential(
        nn.Linear(4, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 4), nn.Dropout(0.5)
    )

    def run(axis: Axis) -> list[torch.Tensor]:
        cut = parallelize(copy.deepcopy(model), {"0": "colwise", "3": "rowwise"}, axis)
        with torch.no_grad():
            return [cut(torch.ones(3, 4)) for _ in range(2)]

    first, second = pool(1, "threads").run(run)[0]
    assert not torch.equal(first, second)
    for degree in (2, 3):
        for one, two in pool(degree, "threads").run(run):
            assert torch.equal(one, first)
            assert torch.equal(two, second)


def test_a_hook_on_relu_stays() -> None:
    """torch's ReLU keeps its bits, and so it is left as it is."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    relu = model[1]
    relu.register_forward_hook(lambda *_: None)
    assert parallelize(model, {"0": "colwise"}, Axis.solo())[1] is relu
