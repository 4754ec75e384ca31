"""Measures what torch's optimizers do to cut parameters, and writes what it found.

    python docs/draw_optimizers.py

A small cut model is trained for three steps by every optimizer of `torch.optim`, in every form that
it has, at every degree on ranks that are threads, and the plain model by the same. What stands
between the marks in docs/optimizers.md is written. Exit code 1 if a degree has other bits, or if a
model is further than 1e-9 from plain torch's.
"""

import copy
import inspect
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shardproof as sp  # before the first matrix product: it sets the BLAS mode
from shardproof.layers.step_guard import INSTEAD, is_elementwise
from shardproof.numerics import mode
from shardproof.optim import layouts_of
from shardproof.prover.hashing import hash_tensor, owned_part

PAGE = Path(__file__).with_name("optimizers.md")
BEGIN, END = "<!-- written by draw_optimizers.py -->\n", "<!-- until here -->\n"
DEGREES = (1, 2, 3, 8)
STEPS = 3
TOLERANCE = 1e-9  # relative, in fp64
PLAN = {
    "0": sp.ColumnParallel(), "2": sp.RowParallel(),
    "3": sp.ColumnParallel(), "5": sp.RowParallel(),
}  # fmt: skip

Options = dict[str, Any]

# What a class has beside `lr`, one form each; those of COMMON that it knows come first.
COMMON: tuple[Options, ...] = (
    {}, {"foreach": True}, {"maximize": True}, {"weight_decay": 0.1},
)  # fmt: skip
FORMS: dict[str, tuple[Options, ...]] = {
    "ASGD": ({"lambd": 0.01, "t0": 2},),
    "Adadelta": (),
    "Adafactor": ({"d": 1.5, "beta2_decay": -0.5},),
    "Adagrad": ({"lr_decay": 0.1}, {"initial_accumulator_value": 0.1}),
    "Adam": ({"amsgrad": True}, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "AdamW": ({"amsgrad": True},),
    "Adamax": (),
    "LBFGS": (),
    "Muon": ({"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}),
    "NAdam": ({"decoupled_weight_decay": True, "weight_decay": 0.1},),
    "RAdam": ({"decoupled_weight_decay": True, "weight_decay": 0.1},),
    "RMSprop": ({"momentum": 0.9, "centered": True},),
    "Rprop": (),
    "SGD": ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
    "SparseAdam": (),
}


@dataclass(frozen=True)
class Measured:
    """What came of one class.

    Attributes:
        same: degrees with the bits of degree 1, in every form.
        other: degree -> the first parameter that differs there, and the form.
        off: the largest relative distance from plain torch, in fp64; None if it was refused.
        refusal: what the guard said, or "".
    """

    same: tuple[int, ...] = ()
    other: Mapping[int, str] = field(default_factory=dict)
    off: float | None = None
    refusal: str = ""

    @property
    def holds(self) -> bool:
        """Whether the page may say that it may be used."""
        return not self.other and (self.off is None or self.off < TOLERANCE)


def classes() -> list[str]:
    """Every optimizer of torch.optim."""
    found = ((name, getattr(torch.optim, name)) for name in torch.optim.__all__)
    return sorted(
        name
        for name, kind in found
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    )


def forms_of(name: str) -> list[Options]:
    """The options that are measured, each with those that the class has."""
    known = inspect.signature(getattr(torch.optim, name).__init__).parameters
    common = [form for form in COMMON if set(form) <= set(known)]
    return [*common, *FORMS[name]]


def kind_of(name: str) -> type[torch.optim.Optimizer]:
    """The class that a user of cut parameters is to take."""
    home = sp.optim if name in INSTEAD else torch.optim
    served: type[torch.optim.Optimizer] = getattr(home, name)
    return served


def words(form: Options) -> str:
    """A form as a reader would write it."""
    return ", ".join(f"{key}={value}" for key, value in form.items()) or "defaults"


def whole_model() -> nn.Module:
    """The same numbers every time. 43 and 11 are primes, so that shards are uneven."""
    model = nn.Sequential(
        *(nn.Linear(11, 43), nn.SiLU(), nn.Linear(43, 5)),
        *(nn.Linear(5, 3), nn.SiLU(), nn.Linear(3, 11)),
    )
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=draws)
    return model


WHOLE = whole_model()


def trained(
    axis: sp.Axis | None, kind: Callable[..., Any], form: Options, dtype: torch.dtype
) -> nn.Module:
    """The model after some steps: cut, or plain where there is no axis."""
    model = copy.deepcopy(WHOLE).to(dtype)
    if axis is not None:
        sp.parallelize(model, PLAN, axis)
    takes: Iterable[nn.Parameter] = model.parameters()
    if kind.__name__ == "Muon":
        takes = [parameter for parameter in takes if parameter.ndim == 2]
    optimizer = kind(takes, **form)
    draws = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(9, 11, generator=draws).to(dtype)
        model.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def hashes(axis: sp.Axis, kind: Callable[..., Any], forms: list[Options]) -> dict[str, str | None]:
    """Of every parameter, after every form."""
    return {
        f"{name} ({words(form)})": hash_tensor(weight, layout, axis, who=name)
        for form in forms
        for name, weight, layout, _ in layouts_of(trained(axis, kind, form, torch.float32))
    }


def distance(
    axis: sp.Axis,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    forms: list[tuple[Options, Options]],
) -> float:
    """The largest relative distance of what this rank owns from plain torch, in fp64.

    Args:
        axis: the ranks.
        ours: what trains the cut model.
        theirs: what trains the plain one.
        forms: options of the one and of the other.
    """
    worst = 0.0
    for mine, plain in forms:
        wanted = dict(trained(None, theirs, plain, torch.float64).named_parameters())
        for name, weight, layout, _ in layouts_of(trained(axis, ours, mine, torch.float64)):
            truth, owned = wanted[name].detach(), layout.owned
            part = truth
            if layout.dim is not None:
                part = truth.narrow(layout.dim, owned.start, len(owned))
            apart = owned_part(weight.detach(), layout) - part
            worst = max(worst, float(apart.norm() / truth.norm()))
    return worst


class WithoutCast:
    """A context in which torch's Muon iterates in the dtype of the gradient."""

    def __enter__(self) -> None:
        self._cast = Tensor.bfloat16
        Tensor.bfloat16 = Tensor.clone  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        Tensor.bfloat16 = self._cast  # type: ignore[method-assign]


def measure(name: str, degrees: tuple[int, ...] = DEGREES, kind: Any = None) -> Measured:
    """Train with one class at every degree; `kind` stands in for what is to be taken."""
    given, theirs, forms = kind or kind_of(name), getattr(torch.optim, name), forms_of(name)
    try:
        trained(sp.Axis.solo(), given, {}, torch.float32)
    except sp.errors.UsageError as error:
        return Measured(refusal=str(error))
    (one,) = sp.launch(lambda axis: hashes(axis, given, forms), degree=1)
    same, other = [1], {}
    for degree in (each for each in degrees if each != 1):
        ranks = sp.launch(lambda axis: hashes(axis, given, forms), degree=degree)
        differing = [
            key
            for key, sha in one.items()
            if {sha, None} != {None, *(found[key] for found in ranks)}
        ]
        if differing:
            other[degree] = differing[0]
        else:
            same.append(degree)
    # The cast is taken out of both, or there would be nothing to compare with.
    exact = {"ns_dtype": None} if given is sp.optim.Muon else {}
    pairs = [({**form, **exact}, form) for form in forms]
    with WithoutCast():
        off = max(sp.launch(lambda axis: distance(axis, given, theirs, pairs), degree=max(degrees)))
    return Measured(tuple(same), other, off)


def row(name: str, measured: Measured) -> str:
    """One line of the table."""
    verdict, forms, said, near = "refused", "", "", ""
    if not measured.refusal:
        verdict = f"served by `{INSTEAD[name]}`" if name in INSTEAD else "proved"
        if not measured.holds:
            verdict = "NOT PROVED"
        forms = "; ".join(map(words, forms_of(name)))
        said = ", ".join(map(str, measured.same))
        said += "".join(f"; not {degree}: {key}" for degree, key in measured.other.items())
        near = "yes" if measured.off is not None and measured.off < TOLERANCE else "no"
    known = inspect.signature(getattr(torch.optim, name).__init__).parameters
    fused = "refused" if "fused" in known else ""
    return f"| `{name}` | {verdict} | {forms} | {said} | {near} | {fused} |"


def written(found: Mapping[str, Measured]) -> str:
    """What stands between the marks."""
    lines = [
        "    python docs/draw_optimizers.py",
        "",
        f"{STEPS} steps of a model with matrices of 43 x 11, 5 x 43, 3 x 5 and 11 x 3, cut by "
        f"rows, columns, rows and columns. torch {torch.__version__}, Python "
        f"{platform.python_version()}; contract `{mode.contract(sp.Scheme())}`.",
        "",
        "| torch.optim | cut parameters | forms | degrees with the same bits | torch's within 1e-9 "
        "(fp64) | fused=True |",
        "|---" * 6 + "|",
        *(row(name, measured) for name, measured in found.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the page."""
    found = {name: measure(name) for name in classes()}
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    page = f"{head}{BEGIN}\n{written(found)}\n{END}{rest.split(END)[1]}"
    PAGE.write_text(page, encoding="utf-8")
    wrong = [name for name, measured in found.items() if not measured.holds]
    known = (name for name in found if is_elementwise(getattr(torch.optim, name)))
    wrong += [name for name in known if found[name].refusal]
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
