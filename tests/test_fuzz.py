"""Random small models: the same bits at every degree, and the numbers of plain torch.

Two judges for every tensor: its bits at degree 1 against those at the degree that was drawn, and
its value against plain torch in fp64, in the measure of plain torch's own rounding. `make test`
gives it ten seconds or 20 models from a fixed seed. An hour from another seed, without time limits:

    pytest tests/test_fuzz.py --fuzz-seconds 3600 --fuzz-seed 7
        --timeout 0 -o faulthandler_timeout=0

hypothesis shrinks what fails and prints the `Spec`; `check(Spec(...), pool)` runs it again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

from fuzz_models import DTYPES, Model, Spec, laid_out, specs, styles_of
from invariance import bits_equal, threads
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import MismatchError
from shardproof.layers.linear import RowParallelLinear
from shardproof.leaves import Layout
from shardproof.numerics import mode
from shardproof.optim import layouts_of
from shardproof.plans.apply import parallelize
from shardproof.plans.style import Plan
from shardproof.prover.hashing import owned_part
from shardproof.scheme import Scheme

LEARNING_RATE = 0.05
# Ours may err this many times as much as plain torch does, and by so much of the largest element.
TIMES_TORCH = 8.0
# In fp64 plain torch is not exact either: it adds 1100 rows one by one, each sum by 2**-53 off.
OF_LARGEST = {"fp32": 4e-6, "fp64": 2e-13, "bf16": 3e-2}
GRADIENT = ("gradient", ".grad")  # ends of the names of gradients
ROUND = 20  # models between two looks at the clock
TRIES = 50  # of a smaller model, once one has failed

Parts = dict[str, tuple[Tensor, Layout | None]]


@dataclass(frozen=True)
class Numbers:
    """What a model is given."""

    x: Tensor
    grad_y: Tensor


def numbers(spec: Spec, dtype: torch.dtype) -> Numbers:
    generator = torch.Generator().manual_seed(1000 + spec.seed)
    width = spec.classes or spec.hidden
    grad_y = torch.randn(*spec.shape, width, generator=generator).to(dtype)
    if spec.vocabulary:
        x = torch.randint(spec.vocabulary, spec.shape, generator=generator)
    else:
        x = torch.randn(*spec.shape, spec.hidden, generator=generator).to(dtype)
    return Numbers(laid_out(x, spec.memory) if x.dim() else x, laid_out(grad_y, spec.grad_memory))


def run(spec: Spec, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, gradients and updated parameters of one step; of a cut model, this rank's part."""
    given_ = numbers(spec, dtype)
    x = given_.x
    if x.is_floating_point():
        # A leaf of the same strides: `requires_grad_` on a view of a buffer would be one, too.
        x = x.detach().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=spec.momentum)
    y = model(x)
    found = {"output": y.detach()}
    y.backward(given_.grad_y)
    if x.is_floating_point():
        assert x.grad is not None
        found["input gradient"] = x.grad
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"{name}.grad"] = parameter.grad.clone()
    if spec.dtype != "bf16":  # torch's optimizers do not keep the bits of bf16 weights
        optimizer.step()
        found |= {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return found


def plain(spec: Spec, dtype: torch.dtype) -> dict[str, Tensor]:
    return run(spec, Model(spec).to(dtype), dtype)


def work(spec: Spec) -> Callable[[Axis], Parts]:
    """What a rank does: cut, run, and hand over what it owns."""

    def of_rank(axis: Axis) -> Parts:
        with threads(spec.threads if has_free_threads() else 1):  # the ranks are others' too
            return run_cut(axis)

    def run_cut(axis: Axis) -> Parts:
        model = Model(spec).to(DTYPES[spec.dtype])
        model = parallelize(model, Plan(styles_of(spec), Scheme(leaves=spec.leaves)), axis)
        layouts = {name: layout for name, _, layout, _ in layouts_of(model)}
        found: Parts = {}
        for name, tensor in run(spec, model, DTYPES[spec.dtype]).items():
            layout = layouts.get(name.removesuffix(".grad"))
            found[name] = (owned_part(tensor, layout) if layout else tensor, layout)
        return found

    return of_rank


def has_free_threads() -> bool:
    """Whether the contract promises the same bits for any number of threads."""
    return "threads=" not in mode.contract(Scheme(), torch.float32, torch.device("cpu"))


def joined(ranks: list[Parts]) -> dict[str, Tensor]:
    """The whole tensors; raises if ranks differ in one that each of them has whole."""
    whole: dict[str, Tensor] = {}
    for name, (first, layout) in ranks[0].items():
        pieces = [rank[name][0] for rank in ranks]
        if layout is None or layout.dim is None:
            for number, piece in enumerate(pieces):
                assert bits_equal(piece, first), f"{name} of rank {number} is not that of rank 0"
            whole[name] = first
        else:
            whole[name] = torch.cat(pieces, layout.dim)
    return whole


def check(spec: Spec, pool: Pool) -> None:
    """Raise unless the two judges are content."""
    alone = joined(pool(1, "threads").run(work(spec)))
    cut = joined(pool(spec.degree, spec.engine).run(work(spec)))
    assert alone.keys() == cut.keys()
    for name, value in alone.items():
        assert bits_equal(value, cut[name]), f"{name}: other bits at degree {spec.degree}"
    rounded, exact = plain(spec, DTYPES[spec.dtype]), plain(spec, torch.float64)
    assert alone.keys() == rounded.keys()
    # A gradient that is zero but for rounding is measured by the largest one of the model.
    steepest = max(largest(value) for name, value in exact.items() if name.endswith(GRADIENT))
    for name, value in alone.items():
        assert value.shape == rounded[name].shape, f"{name}: {tuple(value.shape)}"
        distance = largest(value.double() - exact[name])
        size = steepest if name.endswith(GRADIENT) else largest(exact[name])
        floor = OF_LARGEST[spec.dtype] * size + 1e-12
        if distance > floor + TIMES_TORCH * largest(rounded[name].double() - exact[name]):
            allowed = floor + TIMES_TORCH * sensitivity(spec, name, exact[name])
            assert distance <= allowed, f"{name}: {distance} off plain torch, not {allowed}"


def sensitivity(spec: Spec, name: str, exact: Tensor) -> float:
    """How far plain torch in fp64 moves when every parameter is rounded to the spec's dtype.

    One run of plain torch in that dtype may be near the truth by luck; this may not.
    """
    eps, moved = torch.finfo(DTYPES[spec.dtype]).eps, 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        model = Model(spec).double()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.mul_(1 + eps * noise)
        moved = max(moved, largest(run(spec, model, torch.float64)[name] - exact))
    return moved


def largest(x: Tensor) -> float:
    return x.double().abs().max().item() if x.numel() else 0.0


class Shrinking:
    """Calls `check`, and ends the search for a smaller model that fails after some tries.

    hypothesis itself goes on for up to five minutes, which is the time limit of a test.
    """

    def __init__(self, check: Callable[[Spec, Pool], None]) -> None:
        self._check = check
        self._failed: set[Spec] = set()
        self._tries = 0

    def __call__(self, spec: Spec, pool: Pool) -> None:
        self._tries += bool(self._failed)
        if self._tries > TRIES and spec not in self._failed:
            return
        try:
            self._check(spec, pool)
        except BaseException:
            self._failed.add(spec)
            raise


def fuzz(pool: Pool, *, seconds: float, seed: int, check: Callable[[Spec, Pool], None]) -> int:
    """Rounds of random models until the time is over; the number of rounds."""
    end, rounds = time.monotonic() + seconds, 0
    check = Shrinking(check)
    while not rounds or time.monotonic() < end:
        hypothesis.seed(seed + rounds)(
            settings(
                max_examples=ROUND,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
            )(given(specs())(lambda spec: check(spec, pool)))
        )()
        rounds += 1
    return rounds


def test_random_models_keep_their_bits_and_torchs_numbers(
    pool: Pool, pytestconfig: pytest.Config
) -> None:
    seconds, seed = (pytestconfig.getoption(f"--fuzz-{name}") for name in ("seconds", "seed"))
    assert fuzz(pool, seconds=seconds, seed=seed, check=check) >= 1


def find(pool: Pool, patch: Callable[[pytest.MonkeyPatch], Any]) -> str:
    """The text of what the fuzzer says of a planted fault, on two threads alone."""

    def on_threads(spec: Spec, pool: Pool) -> None:
        check(replace(spec, engine="threads", degree=2), pool)

    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        with pytest.raises((AssertionError, MismatchError)) as caught:
            fuzz(pool, seconds=0, seed=0, check=on_threads)
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def test_a_bias_that_every_rank_adds_is_found_and_shrunk(pool: Pool) -> None:
    original = RowParallelLinear.forward

    def biased(self: RowParallelLinear, x: Tensor) -> Tensor:
        y = original(self, x)
        return y if self.bias is None else y + self.bias * (self.axis.size - 1)

    said = find(pool, lambda patch: patch.setattr(RowParallelLinear, "forward", biased))
    assert "other bits at degree" in said
    # One block of one unit is enough to show it.
    assert "hidden=1" in said
    assert said.count("Part(") == 1


def test_a_fault_that_all_degrees_share_is_found(pool: Pool) -> None:
    original = RowParallelLinear.forward

    def shifted(self: RowParallelLinear, x: Tensor) -> Tensor:
        return original(self, x) * (1 + 2e-4)

    said = find(pool, lambda patch: patch.setattr(RowParallelLinear, "forward", shifted))
    assert "off plain torch" in said


def test_ranks_that_drift_apart_are_found(pool: Pool) -> None:
    original = RowParallelLinear.forward

    def drifting(self: RowParallelLinear, x: Tensor) -> Tensor:
        y = original(self, x)
        return y + 1e-6 if self.axis.rank else y

    said = find(pool, lambda patch: patch.setattr(RowParallelLinear, "forward", drifting))
    # What comes first depends on the model that was shrunk: the ranks notice it themselves in the
    # input of the next layer, or it is seen in the output of a rank, or in a later sum.
    signs = ("disagree about the input of", "is not that of rank 0", "other bits at degree")
    assert any(sign in said for sign in signs), said


def test_memory_lies_as_it_is_asked() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    for memory in ("transposed", "sliced", "offset", "stepped"):
        y = laid_out(x, memory)
        assert torch.equal(y, x)
        assert not y.is_contiguous() or y.storage_offset()
    assert laid_out(x, "permuted").stride() == (4, 8, 1)
    assert laid_out(x, "expanded").stride()[0] == 0
