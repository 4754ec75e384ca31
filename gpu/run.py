"""Run every GPU test, prove the cases on the GPU, measure a few speeds, and write docs/gpu.md.

    python -m gpu.run

Needs torch with a CUDA device and shardproof, as a wheel or from `src`; no pytest and no network.
The exit code is 0 if everything holds, 1 if something failed, and 2 if there is no CUDA device.
"""

import argparse
import faulthandler
import hashlib
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import shardproof
from gpu.checks import CHECKS, CUDA_ONLY
from gpu.page import PROOFS, Check, Found, Outcome, name_of, page
from gpu.proofs import DEGREES, prove, why_not
from gpu.speeds import WORKS, Work, measure
from shardproof import c_modules

LIMIT = 450.0  # seconds; what has not begun by then is left out
LAST_PROOF, LAST_SPEED = 0.7, 0.9  # of the limit: no proof and no work begins later
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
ROUNDS = 30


class Run:
    """One run: it does what is asked for, tells what it is doing, and keeps the page up to date.

    Args:
        device: where everything runs.
        path: of the page; written again after each step, so that a run that dies leaves it.
        limit: seconds for all.
    """

    def __init__(self, device: torch.device, path: Path, *, limit: float = LIMIT) -> None:
        self.found = Found(machine=machine(device))
        self._device, self._path, self._limit = device, path, limit
        self._start = time.monotonic()

    @property
    def has_failed(self) -> bool:
        """Whether a check, a proof or a comparison failed."""
        return any(each.passed is False for each in self.found.outcomes.values())

    def tell(self, text: str) -> None:
        """Say on standard error what comes next."""
        sys.stderr.write(f"[{self._gone():5.0f} s] {text}\n")
        sys.stderr.flush()

    def checks(self, checks: Sequence[Check] = CHECKS) -> None:
        """Every check that this device can run."""
        for check in checks:
            left_out = check in CUDA_ONLY and self._device.type != "cuda"
            why = f"needs a CUDA device, and this is {self._device}" if left_out else self._late(1)
            self._do(name_of(check), why, lambda check=check: check(self._device) or (True, ""))

    def proofs(self, names: Sequence[str] = PROOFS, degrees: Sequence[int] = DEGREES) -> None:
        """Every case, by itself."""

        def work(name: str) -> tuple[bool, str]:
            told = lambda done, total, text: self.tell(f"  {done}/{total} {text}")  # noqa: E731
            report = prove(name, self._device, degrees=degrees, progress=told)
            self.found.machine = {**self.found.machine, "contract": report.contract}
            tensors = sum(len(case.tensors) for case in report.cases)
            return report.proved, f"{tensors} tensors" if report.proved else report.answer

        for name in names:
            why = why_not(name) or self._late(LAST_PROOF)
            self._do(name, why, lambda name=name: work(name))

    def speeds(self, works: Sequence[Work] = WORKS, rounds: int = ROUNDS) -> None:
        """The table of speeds."""

        def do(work: Work) -> tuple[bool, str]:
            found = measure(work, self._device, rounds=rounds, tell=self.tell)
            self.found.speeds += found
            return True, ""

        for work in works:
            self._do(f"speed of {work}", self._late(LAST_SPEED), lambda work=work: do(work))

    def end(self) -> None:
        """Say on the page that this was all."""
        self.found.is_complete = True
        self.found.notes.append(f"the run took {self._gone():.0f} s")
        self._write()

    def _do(self, name: str, why_not: str, work: Callable[[], tuple[bool, str]]) -> None:
        """Do one thing, unless there is a reason not to; keep what came of it."""
        if why_not:
            outcome = Outcome(None, note=why_not)
        else:
            self.tell(name)
            outcome = self._tried(work)
        self.tell(f"{name}: {outcome}")
        self.found.outcomes[name] = outcome
        self._write()

    def _tried(self, work: Callable[[], tuple[bool, str]]) -> Outcome:
        start = time.monotonic()
        try:
            passed, note = work()
        except Exception as error:  # shown on standard error and on the page; the others go on
            traceback.print_exc()
            lines = str(error).strip().splitlines() or ["no message"]
            passed, note = False, f"{type(error).__name__}: {lines[0]}"
        return Outcome(passed, time.monotonic() - start, note)

    def _late(self, share: float) -> str:
        if self._gone() < share * self._limit:
            return ""
        return f"{self._gone():.0f} s of {self._limit:.0f} s had gone"

    def _gone(self) -> float:
        return time.monotonic() - self._start

    def _write(self) -> None:
        self._path.write_text(page(self.found))


def machine(device: torch.device) -> dict[str, str]:
    """What the results depend on, for the page."""
    found = {"device": str(device)}
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        size = f"{known.total_memory / 2**30:.0f} GiB"
        found["device"] = f"{known.name}, {size}, compute capability {known.major}.{known.minor}"
    return {
        **found,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "Python": platform.python_version(),
        "shardproof": f"{shardproof.__version__}, sources {digest()}, {_modules()}",
    }


def digest() -> str:
    """A short SHA-256 of the sources of shardproof that are imported here."""
    folder, hasher = Path(shardproof.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        hasher.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return hasher.hexdigest()[:12]


def _modules() -> str:
    missing = [
        name
        for name, has in (("kernels", c_modules.kernels()), ("shm", c_modules.shm()))
        if not has
    ]
    return f"without the C modules {', '.join(missing)}" if missing else "with both C modules"


def main(given: Sequence[str] | None = None) -> int:
    """Run on the first CUDA device."""
    parser = argparse.ArgumentParser(prog="gpu.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT, metavar="SECONDS", help="default: %(default)s"
    )
    options = parser.parse_args(given)
    if not torch.cuda.is_available():
        sys.stderr.write(
            f"torch {torch.__version__} finds no CUDA device on this machine, so nothing was run "
            f"and {options.page.name} was not changed.\n"
        )
        return 2
    # A rank that hangs is an error, not a wait without end.
    faulthandler.dump_traceback_later(options.limit + 20, exit=True)
    run = Run(torch.device("cuda", 0), options.page, limit=options.limit)
    run.checks()
    run.proofs()
    run.speeds()
    run.end()
    faulthandler.cancel_dump_traceback_later()
    run.tell(
        f"{'something FAILED' if run.has_failed else 'everything holds'}; {options.page} is written"
    )
    return int(run.has_failed)


if __name__ == "__main__":
    sys.exit(main())
