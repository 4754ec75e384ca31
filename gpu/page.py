"""docs/gpu.md: what ran on a GPU and what came of it, as tables; or that nothing has run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gpu.checks import CHECKS
from gpu.proofs import DEGREES, LLAMA, TEACHING
from gpu.speeds import PLAIN, WORKS, Speed

Check = Callable[[torch.device], None]
PROOFS = (*TEACHING, LLAMA)


@dataclass(frozen=True)
class Outcome:
    """What came of one check or one proof.

    Attributes:
        passed: whether its claim holds; None if it was left out.
        seconds: that it took.
        note: why it was left out or what failed; of a proof, how many tensors it compared.
    """

    passed: bool | None
    seconds: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        note = f": {self.note}" if self.note else ""
        if self.passed is None:
            return f"left out{note}"
        return f"{'holds' if self.passed else '**FAILED**'}, {self.seconds:.1f} s{note}"


@dataclass
class Found:
    """What one run found so far.

    Attributes:
        machine: what to know of it, name -> value.
        outcomes: of checks and proofs, by name.
        speeds: lines of the table.
        notes: what else a reader must know, a sentence each.
        is_complete: the run came to its end.
    """

    machine: Mapping[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    speeds: list[Speed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_complete: bool = False


_NOTHING = """Nothing has run on a GPU yet. Without a GPU, `make gpu` exits with 2, and `make test`
runs the checks below on the CPU, except those that need CUDA. The CPU cannot show whether a
GPU gives the same bits at every degree, nor how fast it is."""

_RUN = """## Run it

```console
$ make gpu
```

It runs every test that is marked `gpu`, proves the cases below with ranks as threads that share
one device, measures a few speeds, and writes this page. It is meant to take less than 8 minutes:
what has not begun by then is left out and named here. The exit code is 0 if everything holds, 1
if something failed, and 2 if torch finds no CUDA device. Then this page is left as it is.

A machine with a GPU often has torch but no network and no pytest. Build the wheels where there is
a network, and carry them together with this folder:

```console
$ pip wheel --no-deps --wheel-dir build/wheels . cloudpickle rich markdown-it-py mdurl pygments
```

Then, on the machine with the GPU (Python 3.11 or newer, torch 2.11 or newer, numpy):

```text
pip install --no-index --no-deps build/wheels/*.whl
python -m gpu.run
```

The Llama is proved where transformers can be imported. Elsewhere it is left out, and its row says
so."""

_SPEEDS = """## Speeds

One training step (forward and backward, no update) of a feed-forward block without biases. Ours
and plain torch take turns in one process. A ratio is our time divided by plain torch's in the
same round. The table has the median over all rounds, and the quartiles of the ratio. Before
anything is timed, the results are compared: *invariant* must have the same bits at every degree,
and all must be close to plain torch. Ranks are threads that share one GPU, so a higher degree
cannot be faster here."""


def page(found: Found | None = None) -> str:
    """The page as text.

    Args:
        found: by a run on a GPU; None: there was none.
    """
    outcomes = found.outcomes if found else {}
    degrees = ", ".join(map(str, DEGREES[:-1])) + f" and {DEGREES[-1]}"
    parts = [
        "# GPU",
        _state(found) if found else _NOTHING,
        _RUN,
        "## Checks\n\nThe tests that are marked `gpu` (tests/test_gpu.py runs them with pytest). "
        f"*The same bits* means: on every rank, at degrees {degrees}.",
        "\n".join(_table(("check", "claim", "result"), _checks(outcomes))),
        "## Proofs\n\nThe cases of `shardproof prove` that come from teaching notebooks, and a "
        f"small Llama of transformers, at degrees {degrees}. Plain torch runs on the same device, "
        "in fp32 and in fp64.",
        "\n".join(_table(("case", "result"), _proofs(outcomes))),
        _SPEEDS,
        "\n".join(_speeds(found.speeds if found else ())),
    ]
    return "\n\n".join(parts) + "\n"


def claim(check: Check) -> str:
    """What a check shows, in one sentence."""
    return (check.__doc__ or "").splitlines()[0]


def name_of(check: Check) -> str:
    """Its name as a table shows it."""
    return check.__name__.replace("_", " ")


def _state(found: Found) -> str:
    failed = [name for name, each in found.outcomes.items() if each.passed is False]
    left_out = [name for name, each in found.outcomes.items() if each.passed is None]
    lines = [
        "This page was written by a run on a GPU; other sources, another GPU or another torch may"
    ]
    lines += ["give other results.", ""]
    lines += [f"- {name}: {value}" for name, value in found.machine.items()]
    if not found.is_complete:
        lines += [
            "- **The run did not come to its end.** What it did not reach is marked *not run*."
        ]
    lines += [f"- failed: {', '.join(failed) or 'nothing'}"]
    lines += [f"- left out: {', '.join(left_out) or 'nothing'}"]
    return "\n".join([*lines, *(f"- {note}" for note in found.notes)])


def _checks(outcomes: Mapping[str, Outcome]) -> Iterator[Sequence[str]]:
    for check in CHECKS:
        name = name_of(check)
        yield name, claim(check), _result(outcomes, name)


def _proofs(outcomes: Mapping[str, Outcome]) -> Iterator[Sequence[str]]:
    for name in PROOFS:
        yield f"`{name}`", _result(outcomes, name)


def _result(outcomes: Mapping[str, Outcome], name: str) -> str:
    return str(outcomes[name]) if name in outcomes else "not run"


def _speeds(speeds: Sequence[Speed]) -> Iterator[str]:
    if not speeds:
        yield "Not measured on a GPU. These steps would be: " + "; ".join(map(str, WORKS)) + "."
        return
    head = ("step", "system", "ms", f"ratio to {PLAIN}", "quartiles")
    yield from _table(
        head,
        (
            (
                each.work,
                each.system,
                f"{each.milliseconds:.3f}",
                f"{each.ratio:.2f}",
                f"{each.low:.2f} to {each.high:.2f}",
            )
            for each in speeds
        ),
    )


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
