"""What this process can promise: the BLAS mode, read back, and the contract that names it.

MKL's strict mode gives an output element of a matrix product the same bits in a full tensor and
in a shard of it, with any number of threads. It is set once per process and only takes before the
process's first product; `import shardproof` does it. Where it did not take, importing still works,
`native` still works, and the first invariant use raises. Which products need which mode was
measured; tests/test_invariance_table.py keeps the measurements.

Where there is no strict mode (MKL refuses it on every CPU but Intel's) the products are our own
(`core`), if the kernels were built and the CPU has fused multiply-adds; else they are called in
leaf shapes (`leafwise`).
"""

import ctypes
import functools
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from shardproof import c_modules, environment
from shardproof.errors import NumericsError, UsageError
from shardproof.scheme import Scheme
from shardproof.wording import dtype_name
from shardproof.wording import short_text as shortened

SCHEME_VERSION = "tree-3"
SETTINGS = ("auto", "avx512", "avx2", "core", "leafwise", "off")
VARIABLE = "SHARDPROOF_BLAS"

# Products of up to so many rows, in the whole batch, are our own in every mode that has the
# kernels: there MKL's strict mode costs twice what its default does, and copies cost more.
SMALL_ROWS = 16
ANY_ROWS = sys.maxsize

_STRICT = 0x10000
_BRANCHES = {"avx512": 12, "avx2": 10}
_TOO_LATE = -8
_REFUSED = -3


@dataclass(frozen=True)
class BlasState:
    """What was asked of the BLAS library and what it answered.

    Attributes:
        setting: the value of SHARDPROOF_BLAS.
        branch: "avx512-strict", "avx2-strict", "core", "leafwise", "off", or "unset" if nothing
            took.
        return_code: of the library's set function; None if it was not called.
        read_back: the mode that the library reports afterwards; None if it cannot be asked.
        problem: why invariant numerics cannot run, or None.
        own_rows: up to how many rows a batch's products are our own; 0 without the kernels.
    """

    setting: str
    branch: str
    return_code: int | None = None
    read_back: int | None = None
    problem: str | None = None
    own_rows: int = 0

    @property
    def took(self) -> bool:
        """True if invariant numerics can run in this process."""
        return self.problem is None

    @property
    def is_leafwise(self) -> bool:
        """True if every product that is not our own is called in leaf shape."""
        return self.branch == "leafwise"

    @property
    def is_strict(self) -> bool:
        """True if MKL is in a strict mode, which is checked before it is relied on."""
        return self.branch.endswith("-strict")


_state: BlasState | None = None
_lock = threading.Lock()


def set_blas_mode() -> BlasState:
    """Set the mode that SHARDPROOF_BLAS asks for; the first call decides, later ones read."""
    global _state
    if _state is not None:
        return _state
    with _lock:
        if _state is None:
            _state = _set(os.environ.get(VARIABLE, "auto"))
        return _state


def _set(text: str) -> BlasState:
    try:
        setting = environment.setting({VARIABLE: text}, VARIABLE, SETTINGS)
    except UsageError as error:  # importing works all the same
        return BlasState(shortened(text), "unset", problem=str(error))
    if setting == "off":
        return BlasState(
            setting,
            "off",
            problem=f"{VARIABLE}=off leaves the BLAS library in its default mode, in which a "
            f"product of a shard has other bits than the same elements of the full product. "
            f"Unset {VARIABLE}, or use numerics='native'.",
        )
    try:
        missing = missing_products()
    except UsageError as error:  # importing works all the same
        return BlasState(setting, "unset", problem=str(error))
    small = 0 if missing else SMALL_ROWS
    if setting == "core":
        if missing:
            problem = (
                f"{VARIABLE}=core needs our own products, and {missing}. Use {VARIABLE}=auto or "
                f"{VARIABLE}=leafwise."
            )
            return BlasState(setting, "unset", problem=problem)
        return BlasState(setting, "core", own_rows=ANY_ROWS)
    if setting == "leafwise":
        return BlasState(setting, "leafwise", own_rows=small)
    library = _mkl()
    if setting == "auto" and library is None:
        return _without_strict(missing)
    if library is None:
        problem = (
            f"{VARIABLE}={setting} needs a torch build with MKL, and this one "
            f"(torch {torch.__version__}) has none. Use {VARIABLE}=leafwise."
        )
        return BlasState(setting, "unset", problem=problem)
    return _set_strict(library, setting, missing)


def missing_products() -> str | None:
    """Why our own products cannot be used here, or None if they can.

    Raises:
        UsageError: SHARDPROOF_CORE is set to what it does not know.
    """
    kernels = c_modules.kernels()
    if kernels is None:
        return c_modules.problem("kernels")
    return "this CPU has no fused multiply-add" if kernels.path() == "none" else None


def _without_strict(
    missing: str | None, code: int | None = None, read_back: int | None = None
) -> BlasState:
    """What auto takes if MKL has no strict mode, or there is no MKL."""
    if missing:
        return BlasState("auto", "leafwise", code, read_back)
    return BlasState("auto", "core", code, read_back, own_rows=ANY_ROWS)


def _set_strict(library: ctypes.CDLL, setting: str, missing: str | None) -> BlasState:
    widest = "avx512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "avx2"
    branch = widest if setting == "auto" else setting
    mode = _BRANCHES[branch] | _STRICT
    code = 0
    if library.mkl_serv_cbwr_get(-1) != mode:
        code = int(library.mkl_serv_cbwr_set(mode))
    read_back = int(library.mkl_serv_cbwr_get(-1))
    if code == 0 and read_back == mode:
        small = 0 if missing else SMALL_ROWS
        return BlasState(setting, f"{branch}-strict", code, read_back, own_rows=small)
    if setting == "auto" and code == _REFUSED:  # as it does on every CPU but Intel's
        return _without_strict(missing, code, read_back)
    if code == _TOO_LATE:
        why = "this process had already computed a matrix product"
        way_out = (
            "Import shardproof before the first matrix product, or start Python with "
            f"MKL_CBWR={branch.upper()},STRICT in the environment"
        )
    else:
        why = f"MKL refused it (return code {code}, mode {read_back:#x})"
        way_out = f"Start Python with {VARIABLE}=core or {VARIABLE}=leafwise"
    problem = (
        f"the strict BLAS mode {branch} could not be set: {why}. {way_out}, or use "
        "numerics='native', which does not promise bits."
    )
    return BlasState(setting, "unset", code, read_back, problem)


def _mkl() -> ctypes.CDLL | None:
    """The CPU library of torch if it exports MKL's mode switch."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "mkl_serv_cbwr_set") and hasattr(library, "mkl_serv_cbwr_get"):
            return library
    return None


def require_invariant() -> None:
    """Raise unless invariant numerics can run in this process.

    Raises:
        NumericsError: the BLAS mode did not take, the self-check found a difference, or torch may
            round fp32 products to less.
    """
    now = set_blas_mode()
    problem = now.problem or _precision_problem()
    if problem is not None:
        raise NumericsError(problem)
    if now.is_strict:
        mismatch = self_check()
        if mismatch is not None:
            raise NumericsError(
                f"the BLAS mode {now.branch} was set, but {mismatch}. Start Python with "
                f"{VARIABLE}=leafwise, or use numerics='native'."
            )


def _precision_problem() -> str | None:
    """Asked anew each time: anybody may change the switch between two products."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's answer where its older and its newer switches disagree
        precision = "set backend by backend (fp32_precision)"
    if precision == "highest":
        return None
    return (
        f"the precision of fp32 products is {precision}, in which a backend may round them to less "
        "than fp32, differently for a shard and for the whole. Call "
        "torch.set_float32_matmul_precision('highest'), or use numerics='native'."
    )


@functools.cache
def self_check() -> str | None:
    """Whether products of shards have the bits of full products here; what differed, or None.

    A few small products, a few milliseconds, once per process.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((1, 385, 33), (5, 64, 130), (33, 700, 67)):
        a = torch.randn(rows, inner, generator=generator)
        b = torch.randn(columns, inner, generator=generator)
        full = a @ b.t()
        for start, stop in ((0, 1), (3, 20), (columns // 2, columns)):
            if not torch.equal(a @ b[start:stop].t(), full[:, start:stop]):
                return f"a ({rows}, {inner}) x ({inner}, {columns}) product changed with its cut"
    return None


@functools.cache
def addmm_limit(dtype: torch.dtype = torch.float32) -> int:
    """Largest inner size up to which `c.addmm_(a, b)` has the bits of `c + a @ b` here.

    Below it a leaf's product may be accumulated in place. MKL adds the whole product at once as
    long as the inner dim fits one of its blocks, whose length depends on the branch.
    """
    generator = torch.Generator().manual_seed(1)

    def holds(inner: int) -> bool:
        for rows, columns in ((1, 5), (4, 64), (33, 130), (100, 17)):
            a = torch.randn(rows, inner, generator=generator, dtype=dtype)
            b = torch.randn(inner, columns, generator=generator, dtype=dtype)
            c = torch.randn(rows, columns, generator=generator, dtype=dtype)
            if not torch.equal(c + a @ b, c.clone().addmm_(a, b)):
                return False
        return True

    for limit in (384, 256, 128):
        if all(holds(inner) for inner in (1, 7, limit // 2 + 1, limit - 1, limit)):
            return limit
    return 0


def own_rows() -> int:
    """Up to how many rows, in the whole batch, products are our own: fp32 and fp64 on the CPU."""
    return set_blas_mode().own_rows


def is_leafwise(dtype: torch.dtype, device: torch.device) -> bool:
    """True if products of `dtype` on `device` must be called with one leaf's shape each.

    Only those that are not our own. fp32 and fp64 on the CPU have a strict mode; bf16 and fp16 go
    through another library, and a GPU picks its kernel by shape.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return True
    return set_blas_mode().is_leafwise


def contract(
    scheme: Scheme, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> str:
    """Everything that the bits depend on, as one line.

    >>> contract(Scheme())  # doctest: +SKIP
    'tree-3 leaves=8 mkl=avx512-strict small=core fp32 torch=2.13.0+cpu'
    """
    device = torch.device("cpu") if device is None else device
    short = dtype_name(dtype).replace("bfloat", "bf").replace("float", "fp")
    build = f"{short} torch={torch.__version__}"
    if not scheme.is_invariant:
        return f"native {build}"
    of_batch = "" if scheme.batch_leaves is None else f" batch-leaves={scheme.batch_leaves}"
    head = f"{SCHEME_VERSION} leaves={scheme.leaves}{of_batch}"
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device).replace(" ", "-")
        return f"{head} leafwise gpu={name}{_reduction(dtype)} {build}"
    return f"{head} {_products(dtype, device)} {build}"


def _products(dtype: torch.dtype, device: torch.device) -> str:
    """What computes products on the CPU."""
    now = set_blas_mode()
    if now.own_rows == ANY_ROWS and not is_leafwise(dtype, device):
        return "core=fma"
    if is_leafwise(dtype, device):
        large, name = f"leafwise threads={torch.get_num_threads()}", "leafwise"
    else:
        large, name = f"mkl={now.branch}", "mkl"
    if dtype not in (torch.float32, torch.float64):
        return large
    return f"{large} small={'core' if now.own_rows else name}"


def _reduction(dtype: torch.dtype) -> str:
    """In what a GPU may add up within one low-precision product: a switch that changes bits."""
    matmul = torch.backends.cuda.matmul
    if dtype == torch.bfloat16:
        is_reduced = matmul.allow_bf16_reduced_precision_reduction
    elif dtype == torch.float16:
        is_reduced = matmul.allow_fp16_reduced_precision_reduction
    else:
        return ""
    return f" reduction={'reduced' if is_reduced else 'fp32'}"


def child_environment() -> dict[str, str]:
    """Environment with which a started process has this process's mode from its first moment."""
    now = set_blas_mode()
    variables = {VARIABLE: now.setting}
    if now.is_strict:
        variables["MKL_CBWR"] = f"{now.branch.removesuffix('-strict').upper()},STRICT"
    return variables
