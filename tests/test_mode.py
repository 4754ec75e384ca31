"""The BLAS mode: what is asked for, what took, what raises, and the contract that names it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import warm
from fresh_process import run_fresh
from shardproof import c_modules
from shardproof.axis import Axis
from shardproof.errors import NumericsError
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.numerics import mode
from shardproof.scheme import Scheme

TORCH = f"torch={torch.__version__}"
WIDEST = "avx512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "avx2"
HAS_PRODUCTS = mode.missing_products() is None
SMALL = f"small={'core' if HAS_PRODUCTS else 'mkl'}"

needs_mkl = pytest.mark.skipif(
    not mode.set_blas_mode().branch.endswith("-strict"),
    reason=f"needs MKL in strict mode, this process has {mode.set_blas_mode().branch}",
)


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The mode is to be decided again; afterwards everything is as it was."""
    monkeypatch.setattr(mode, "_state", None)
    mode.self_check.cache_clear()
    yield monkeypatch
    mode.self_check.cache_clear()


def decide(monkeypatch: pytest.MonkeyPatch, setting: str) -> mode.BlasState:
    monkeypatch.setattr(mode, "_state", None)
    monkeypatch.setenv("SHARDPROOF_BLAS", setting)
    return mode.set_blas_mode()


@dataclass
class FakeMkl:
    """A library with a mode switch that answers as told."""

    mode: int = 0
    refuses_with: int | None = None
    asked: list[int] = field(default_factory=list)

    def mkl_serv_cbwr_get(self, _: int) -> int:
        return self.mode

    def mkl_serv_cbwr_set(self, wanted: int) -> int:
        self.asked.append(wanted)
        if self.refuses_with is None:
            self.mode = wanted
        return self.refuses_with or 0


def test_this_process_can_promise_bits() -> None:
    """Every other test of bits stands on this one."""
    state = mode.set_blas_mode()
    assert state.took, state.problem
    mode.require_invariant()


@needs_mkl
def test_the_mode_that_was_set_is_read_back() -> None:
    state = mode.set_blas_mode()
    assert state.return_code == 0
    assert state.read_back == {"avx512-strict": 0x1000C, "avx2-strict": 0x1000A}[state.branch]
    assert not state.is_leafwise


@pytest.mark.parametrize(
    ("setting", "branch", "code"),
    [("auto", WIDEST, 0), ("avx512", "avx512", 0), ("avx2", "avx2", 0), (" AVX2 ", "avx2", 0)],
)
def test_settings_choose_the_branch(
    forget: pytest.MonkeyPatch, setting: str, branch: str, code: int
) -> None:
    library = FakeMkl()
    forget.setattr(mode, "_mkl", lambda: library)
    state = decide(forget, setting)
    wanted = {"avx512": 0x1000C, "avx2": 0x1000A}[branch]
    assert library.asked == [wanted]
    assert (state.branch, state.return_code, state.read_back) == (f"{branch}-strict", code, wanted)
    assert state.took
    assert state.setting == setting.strip().lower()


def test_a_mode_that_is_there_already_is_not_set_again(forget: pytest.MonkeyPatch) -> None:
    library = FakeMkl(mode=0x1000A, refuses_with=-8)
    forget.setattr(mode, "_mkl", lambda: library)
    assert decide(forget, "avx2").took
    assert library.asked == []


def test_the_first_decision_stays(forget: pytest.MonkeyPatch) -> None:
    first = decide(forget, "leafwise")
    forget.setenv("SHARDPROOF_BLAS", "off")
    assert mode.set_blas_mode() is first


def test_an_unset_variable_means_auto(forget: pytest.MonkeyPatch) -> None:
    forget.setattr(mode, "_mkl", FakeMkl)
    forget.delenv("SHARDPROOF_BLAS", raising=False)
    assert mode.set_blas_mode().setting == "auto"
    assert decide(forget, "").setting == "auto"


def test_leafwise_needs_no_library(forget: pytest.MonkeyPatch) -> None:
    state = decide(forget, "leafwise")
    assert (state.branch, state.return_code, state.is_leafwise, state.took) == (
        "leafwise", None, True, True,
    )  # fmt: skip
    mode.require_invariant()


@dataclass(frozen=True)
class FakeKernels:
    """Kernels that were built, for a CPU with or without fused multiply-adds."""

    has_fma: bool = True

    def path(self) -> str:
        return "avx2" if self.has_fma else "none"


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_modules, "kernels", lambda: None)
    monkeypatch.setattr(c_modules, "problem", lambda *_: "shardproof._kernels is not there")


@pytest.mark.parametrize("library", [None, FakeMkl(refuses_with=-3)], ids=["no MKL", "refused"])
def test_auto_without_a_strict_mode_takes_our_own_products_or_leaf_shapes(
    forget: pytest.MonkeyPatch, library: FakeMkl | None
) -> None:
    forget.setattr(mode, "_mkl", lambda: library)
    forget.setattr(c_modules, "kernels", FakeKernels)
    state = decide(forget, "auto")
    assert (state.branch, state.took, state.own_rows) == ("core", True, mode.ANY_ROWS)
    assert state.return_code == (None if library is None else -3)
    forget.setattr(c_modules, "kernels", lambda: FakeKernels(has_fma=False))
    assert decide(forget, "auto").is_leafwise
    without_kernels(forget)
    state = decide(forget, "auto")
    assert state.is_leafwise
    assert state.own_rows == 0


def test_core_is_taken_by_name_where_mkl_would_be_strict_too(forget: pytest.MonkeyPatch) -> None:
    library = FakeMkl()
    forget.setattr(mode, "_mkl", lambda: library)
    forget.setattr(c_modules, "kernels", FakeKernels)
    assert decide(forget, "core").branch == "core"
    assert library.asked == []
    mode.require_invariant()


@pytest.mark.parametrize(
    ("kernels", "text"),
    [
        (None, r"=core needs our own products, and shardproof\._kernels is not there\. Use "),
        (FakeKernels(has_fma=False), r"and this CPU has no fused multiply-add\. Use \S+=auto or "),
    ],
)
def test_core_by_name_raises_where_it_is_not(
    forget: pytest.MonkeyPatch, kernels: FakeKernels | None, text: str
) -> None:
    without_kernels(forget)
    forget.setattr(c_modules, "kernels", lambda: kernels)
    assert decide(forget, "core").own_rows == 0
    with pytest.raises(NumericsError, match=text):
        mode.require_invariant()


def test_a_wrong_setting_of_the_core_is_told_at_the_first_invariant_use() -> None:
    code = """
import shardproof as sp
try:
    sp.numerics.mode.require_invariant()
except sp.errors.NumericsError as error:
    print(error)
"""
    found = run_fresh(code, SHARDPROOF_CORE="on")
    assert found.strip() == "SHARDPROOF_CORE='on' is unknown. Use one of: auto, off."


@pytest.mark.parametrize("setting", ["avx2", "leafwise"])
def test_small_batches_are_our_own_in_every_mode_that_has_the_kernels(
    forget: pytest.MonkeyPatch, setting: str
) -> None:
    forget.setattr(mode, "_mkl", FakeMkl)
    forget.setattr(c_modules, "kernels", FakeKernels)
    assert decide(forget, setting).own_rows == mode.SMALL_ROWS
    assert " small=core fp32 " in mode.contract(Scheme())
    without_kernels(forget)
    assert decide(forget, setting).own_rows == 0
    name = {"avx2": "mkl", "leafwise": "leafwise"}[setting]
    assert f" small={name} fp32 " in mode.contract(Scheme())


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (
            "fast",
            r"BLAS='fast' is unknown\. Use one of: auto, avx512, avx2, core, leafwise, off\.",
        ),
        (
            "off",
            r"SHARDPROOF_BLAS=off leaves the BLAS library in its default mode.*numerics='native'",
        ),
    ],
)
def test_settings_that_promise_nothing_raise_at_the_first_invariant_use(
    forget: pytest.MonkeyPatch, setting: str, text: str
) -> None:
    state = decide(forget, setting)
    assert not state.took
    with pytest.raises(NumericsError, match=text):
        mode.require_invariant()


def test_a_branch_without_mkl_raises(forget: pytest.MonkeyPatch) -> None:
    forget.setattr(mode, "_mkl", lambda: None)
    decide(forget, "avx512")
    with pytest.raises(NumericsError, match=r"=avx512 needs a torch build with MKL.*BLAS=leafwise"):
        mode.require_invariant()


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (-8, r"avx2 could not be set: this process had already.*MKL_CBWR=AVX2,STRICT in the"),
        (
            -2,
            r"MKL refused it \(return code -2, mode 0x0\)\. Start Python with SHARDPROOF_BLAS=core",
        ),
    ],
)
def test_a_refusal_is_told_with_its_remedy(
    forget: pytest.MonkeyPatch, code: int, text: str
) -> None:
    forget.setattr(mode, "_mkl", lambda: FakeMkl(refuses_with=code))
    state = decide(forget, "avx2")
    assert (state.branch, state.return_code, state.read_back) == ("unset", code, 0)
    with pytest.raises(NumericsError, match=text):
        mode.require_invariant()


def test_a_mode_that_does_not_read_back_did_not_take(forget: pytest.MonkeyPatch) -> None:
    class Forgetful(FakeMkl):
        def mkl_serv_cbwr_set(self, wanted: int) -> int:
            return 0

    forget.setattr(mode, "_mkl", Forgetful)
    assert not decide(forget, "auto").took


@needs_mkl
def test_a_failing_self_check_raises_before_the_first_product(
    forget: pytest.MonkeyPatch,
) -> None:
    product = torch.Tensor.__matmul__
    calls = 0

    def shaky(a: Any, b: Any) -> Any:
        nonlocal calls
        calls += 1
        return product(a, b) * (1 + calls % 2 * 2**-20)

    forget.undo()  # the real state, and only the product is another
    mode.self_check.cache_clear()
    forget.setattr(torch.Tensor, "__matmul__", shaky)
    with pytest.raises(
        NumericsError,
        match=r"mode \S+-strict was set, but a \(1, 385\) x \(385, 33\) product changed with its "
        r"cut\. Start Python with SHARDPROOF_BLAS=leafwise",
    ):
        ColumnParallelLinear(4, 3, axis=Axis.solo())(torch.ones(2, 4))


LATE = """
import json, torch
torch.ones(1, 1) @ torch.ones(1, 1)
import shardproof as sp
from shardproof.numerics import mode
axis, x = sp.Axis.solo(), torch.ones(2, 4)
native = sp.RowParallelLinear(4, 3, axis=axis, scheme=sp.Scheme(numerics="native"))
found = {"native": list(native(x).shape), "keys": sorted(native.state_dict())}
try:
    found["invariant"] = list(sp.RowParallelLinear(4, 3, axis=axis)(x).shape)
except sp.errors.NumericsError as error:
    found["error"] = str(error)
state = mode.set_blas_mode()
print(json.dumps(found | {"code": state.return_code, "branch": state.branch,
                          "contract": mode.contract(sp.Scheme())}))
"""


@needs_mkl
def test_a_late_import_works_for_native_and_raises_for_invariant() -> None:
    found = json.loads(run_fresh(LATE))
    assert found["native"] == [2, 3]
    assert found["keys"] == ["_extra_state", "bias", "weight"]
    assert "invariant" not in found
    assert (found["code"], found["branch"]) == (-8, "unset")
    assert found["error"] == (
        f"the strict BLAS mode {WIDEST} could not be set: this process had already computed a "
        "matrix product. Import shardproof before the first matrix product, or start Python with "
        f"MKL_CBWR={WIDEST.upper()},STRICT in the environment, or use numerics='native', which "
        "does not promise bits."
    )


@needs_mkl
def test_the_environment_makes_a_late_import_work() -> None:
    found = json.loads(run_fresh(LATE, MKL_CBWR=f"{WIDEST.upper()},STRICT"))
    assert found["invariant"] == [2, 3]
    assert found["contract"] == f"tree-3 leaves=8 mkl={WIDEST}-strict {SMALL} fp32 {TORCH}"


@needs_mkl
def test_a_started_process_gets_this_process_mode(forget: pytest.MonkeyPatch) -> None:
    for setting, branch in (("auto", WIDEST.upper()), ("avx2", "AVX2")):
        forget.setattr(mode, "_mkl", FakeMkl)
        decide(forget, setting)
        assert mode.child_environment() == {
            "SHARDPROOF_BLAS": setting,
            "MKL_CBWR": f"{branch},STRICT",
        }
    decide(forget, "leafwise")
    assert mode.child_environment() == {"SHARDPROOF_BLAS": "leafwise"}


@needs_mkl
def test_the_contract_names_all_that_the_bits_depend_on() -> None:
    mkl = f"mkl={mode.set_blas_mode().branch}"
    bf16 = torch.bfloat16
    assert mode.contract(Scheme()) == f"tree-3 leaves=8 {mkl} {SMALL} fp32 {TORCH}"
    assert (
        mode.contract(Scheme(leaves=5), torch.float64)
        == f"tree-3 leaves=5 {mkl} {SMALL} fp64 {TORCH}"
    )
    assert mode.contract(Scheme(numerics="native")) == f"native fp32 {TORCH}"
    threads = torch.get_num_threads()
    assert (
        mode.contract(Scheme(), bf16) == f"tree-3 leaves=8 leafwise threads={threads} bf16 {TORCH}"
    )


def test_the_contract_of_our_own_products_has_no_threads(forget: pytest.MonkeyPatch) -> None:
    forget.setattr(c_modules, "kernels", FakeKernels)
    decide(forget, "core")
    assert mode.contract(Scheme()) == f"tree-3 leaves=8 core=fma fp32 {TORCH}"
    threads = torch.get_num_threads()
    wanted = f"tree-3 leaves=8 leafwise threads={threads} bf16 {TORCH}"
    assert mode.contract(Scheme(), torch.bfloat16) == wanted


def test_the_leafwise_contract_has_the_thread_count(forget: pytest.MonkeyPatch) -> None:
    decide(forget, "leafwise")
    threads = torch.get_num_threads()
    small = "core" if HAS_PRODUCTS else "leafwise"
    expected = f"tree-3 leaves=8 leafwise threads={threads} small={small} fp32 {TORCH}"
    assert mode.contract(Scheme()) == expected


def test_the_contract_of_a_gpu_has_the_switches_that_change_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Big GPU")
    matmul, gpu = torch.backends.cuda.matmul, torch.device("cuda")
    head = "tree-3 leaves=8 leafwise gpu=Big-GPU"
    assert mode.contract(Scheme(), torch.float32, gpu) == f"{head} fp32 {TORCH}"
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        switch = f"allow_{short}_reduced_precision_reduction"
        before = getattr(matmul, switch)
        try:
            for is_reduced, word in ((True, "reduced"), (False, "fp32")):
                setattr(matmul, switch, is_reduced)
                wanted = f"{head} reduction={word} {short} {TORCH}"
                assert mode.contract(Scheme(), dtype, gpu) == wanted
        finally:
            setattr(matmul, switch, before)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_rounded_fp32_products_are_refused_at_the_next_use(precision: str) -> None:
    layer = ColumnParallelLinear(3, 2, axis=Axis.solo())
    layer(torch.ones(1, 3))
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.raises(NumericsError, match=f"products is {precision}, in which.*'highest'"):
            layer(torch.ones(1, 3))
    finally:
        torch.set_float32_matmul_precision("highest")
    layer(torch.ones(1, 3))


BY_BACKEND = """
import torch, shardproof as sp
layer = sp.ColumnParallelLinear(3, 2, axis=sp.Axis.solo())
layer(torch.ones(1, 3))
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
try:
    layer(torch.ones(1, 3))
except sp.errors.NumericsError as error:
    print(error)
"""


def test_a_precision_set_for_one_backend_is_refused_too() -> None:
    assert "fp32 products is set backend by backend (fp32_precision)" in warm.printed(BY_BACKEND)


def test_only_fp32_and_fp64_on_the_cpu_have_a_strict_mode() -> None:
    cpu = torch.device("cpu")
    here = mode.set_blas_mode().is_leafwise
    assert mode.is_leafwise(torch.float32, cpu) == here
    assert mode.is_leafwise(torch.float64, cpu) == here
    assert mode.is_leafwise(torch.float16, cpu)
    assert mode.is_leafwise(torch.float32, torch.device("meta"))
