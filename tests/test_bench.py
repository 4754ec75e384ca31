"""The bench's parts without a process: who is measured at what, in which order, and the figures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run as run_module
from benchmarks import systems
from benchmarks.groups import FirstStep, Key, SystemFailure, environment, first_step, stamps
from benchmarks.planning import Plan, Skip, plan
from benchmarks.run import run, turn
from benchmarks.step import Step
from benchmarks.system import System
from benchmarks.systems import SYSTEMS, find_system
from benchmarks.works import WORKS, find_work
from shardproof.errors import UsageError

BASE = Key("torch-2t", 1)
NATIVE = Key("native-threads", 2)
INVARIANT = Key("invariant-threads", 2)
GLOO = Key("invariant-gloo", 2)


def planned(*systems: str, works: tuple[str, ...] = ("linear-row",), **options: Any) -> Plan:
    return plan(works, systems, rounds=options.pop("rounds", None), is_quick=False, **options)


# -- who is measured at what -----------------------------------------------------------------------


def test_the_names_that_others_rely_on() -> None:
    assert tuple(work.name for work in WORKS) == (
        "ffn-1024", "ffn-2048", "decode-1024", "decode-4096", "linear-row", "linear-column",
        "all-reduce", "layer-overhead", "scaling", "llama-step", "llama-generate",
    )  # fmt: skip
    assert {system.name for system in SYSTEMS} >= {
        "torch-2t", "torch-1t", "dtensor", "invariant-shm", "invariant-threads", "invariant-gloo",
        "native-shm", "native-threads", "native-gloo",
    }  # fmt: skip


def test_plain_torch_is_measured_even_if_nobody_asks() -> None:
    (job,) = planned("native-threads").jobs
    assert (job.yardsticks, job.others) == ((BASE,), (NATIVE,))
    (alone,) = planned("torch-2t").jobs
    assert alone.keys == (BASE,)
    assert [job.yardsticks for job in planned("native-threads", works=("all-reduce",)).jobs] == [
        tuple(Key("memcpy", ranks) for ranks in job.variant.ranks)
        for job in planned("native-threads", works=("all-reduce",)).jobs
    ]


def test_a_name_given_twice_is_measured_once() -> None:
    twice = planned("native-threads", "native-threads", works=("linear-row", "linear-row"))
    assert twice == planned("native-threads")


def test_all_is_what_can_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_missing(self: System) -> str | None:
        return "is not here" if self.extra else None

    monkeypatch.setattr(System, "problem", is_missing)
    everything = plan((), (), rounds=None, is_quick=False)
    can_run = {work.name for work in WORKS if work.problem() is None}
    assert {job.work.name for job in everything.jobs} == can_run
    assert can_run >= {work.name for work in WORKS} - {"llama-step", "llama-generate"}
    assert Skip(None, "fairscale", "is not here") in everything.skips
    assert "fairscale" not in {key.system for job in everything.jobs for key in job.keys}
    scaling = [key for job in everything.jobs if job.work.name == "scaling" for key in job.others]
    assert {key.system for key in scaling} == {"native-threads", "invariant-threads"}
    assert {key.ranks for key in scaling} == set(range(1, 9))


def test_a_system_that_says_why_it_cannot_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(System, "problem", lambda self: None)
    made = plan(("linear-column", "ffn-1024"), (), rounds=None, is_quick=False)
    assert [(skip.work, skip.system) for skip in made.skips] == [("linear-column", "megatron")]
    assert "torch.cuda.current_device()" in made.skips[0].reason
    assert Key("megatron", 2) in made.jobs[1].others


def test_quick_is_fewer_rounds_sizes_and_degrees() -> None:
    works = ("all-reduce", "scaling", "linear-row")
    full = plan(works, ("native-threads",), rounds=None, is_quick=False)
    quick = plan(works, ("native-threads",), rounds=None, is_quick=True)
    assert quick.rounds < full.rounds
    assert plan(works, ("native-threads",), rounds=7, is_quick=True).rounds == 7

    def sizes(made: Plan) -> list[int]:
        return [job.variant.keys["bytes"] for job in made.jobs if job.work.name == "all-reduce"]

    assert sizes(full)[0] == 4096
    assert sizes(full)[-1] == 64 << 20
    assert set(sizes(quick)) < set(sizes(full))
    degrees = [key.ranks for key in quick.jobs[-2].others]
    assert degrees == [1, 2, 4]


@pytest.mark.parametrize(
    ("works", "systems", "message"),
    [
        (("ffn-1023",), (), r"no work 'ffn-1023'\. Use one of: ffn-1024, ffn-2048"),
        ((), ("nativ-shm",), r"no system 'nativ-shm'\. Use one of: torch-2t, torch-1t"),
        (("all-reduce",), ("dtensor",), r"--system dtensor has nothing to do in all-reduce: it "
         r"offers no 'sum'"),
        (("ffn-1024",), ("memcpy",), "memcpy has nothing to do in ffn-1024: it is only a yard"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    works: tuple[str, ...], systems: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(works, systems, rounds=None, is_quick=False)


def test_a_system_that_is_not_installed_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer = System("toy", "", lambda axis: None, package="no_such_module", extra="peers")
    monkeypatch.setattr(systems, "SYSTEMS", (*SYSTEMS, peer))
    with pytest.raises(
        UsageError,
        match=r"--system toy needs the extra 'peers', which is not installed\. "
        r"Run: pip install 'shardproof\[peers\]'",
    ):
        planned("toy")


def test_shared_memory_that_was_not_built_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shardproof.c_modules.shm", lambda: None)
    monkeypatch.setattr("shardproof.c_modules.problem", lambda *_: "no compiler")
    with pytest.raises(UsageError, match="native-shm has no shared memory here: no compiler"):
        planned("native-shm")


def test_only_invariant_systems_get_another_blas_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDPROOF_BLAS", "leafwise")
    monkeypatch.setenv("MKL_CBWR", "AVX2,STRICT")
    for system in SYSTEMS:
        variables = environment(system)
        assert variables["SHARDPROOF_BLAS"] == ("leafwise" if system.is_invariant else "off")
        assert "MKL_CBWR" not in variables
    monkeypatch.delenv("SHARDPROOF_BLAS")
    assert environment(find_system("invariant-shm"))["SHARDPROOF_BLAS"] == "auto"


# -- in which order, and what comes of it ----------------------------------------------------------


def test_systems_take_turns_and_none_always_follows_the_same_one() -> None:
    keys = [BASE, NATIVE, INVARIANT, GLOO]
    rounds = [turn(keys, number) for number in range(8)]
    assert all(sorted(each) == sorted(keys) for each in rounds)
    assert {each[0] for each in rounds} == set(keys)
    for key in keys:
        before = {each[each.index(key) - 1] for each in rounds if each.index(key)}
        assert len(before) > 1, key


class Toy:
    """Groups without processes: every system takes the time that it is given."""

    def __init__(self, folder: Path, seconds: dict[Key, list[float]]) -> None:
        self.folder = folder
        self.seconds = seconds
        self.asked: list[tuple[Key, Any]] = []
        self.faults: dict[Key, str] = {}
        self.hashes: dict[Key, str] = {}
        self.failing: dict[Key, Any] = {}
        self.running: set[Key] = set()
        self.steps: list[tuple[str, set[Key]]] = []

    def __enter__(self) -> "Toy":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, keys: tuple[Key, ...]) -> None:
        self.steps.append(("start", set(keys) - self.running))
        self.running |= set(keys)

    def close(self, keys: set[Key]) -> None:
        self.running -= keys
        self.steps.append(("close", keys))

    def run(self, key: Key, fn: Any) -> list[Any]:
        self.asked.append((key, fn))
        if fn.func is self.failing.get(key):
            raise SystemFailure("rank 0 of 2 left")
        if fn.func is first_step:
            faults = (self.faults[key],) if key in self.faults else ()
            hashes = {"output": self.hashes[key]} if key in self.hashes else {}
            return [
                FirstStep("toy", None, faults, hashes, {"flops": 5.0 + rank})
                for rank in range(key.ranks)
            ]
        assert fn.func is stamps
        each = self.seconds[key].pop(0) * 1e9
        ends = [round(each * step) for step in range(fn.keywords["variant"].steps + 1)]
        return [[end - 7 * rank for end in ends] for rank in range(key.ranks)]

    def times(self) -> list[Key]:
        return [key for key, fn in self.asked if fn.func is stamps]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    made = Toy(
        tmp_path,
        {
            BASE: [1.0, 1.0, 2.0, 4.0],
            NATIVE: [0.5, 1.5, 2.0, 2.0],
            INVARIANT: [2.0, 2.0, 2.0, 2.0],
            GLOO: [3.0, 3.0, 3.0, 3.0],
        },
    )
    monkeypatch.setattr(run_module, "Groups", lambda: made)
    return made


TOYS = ("native-threads", "invariant-threads", "invariant-gloo")


def test_all_are_checked_before_any_is_timed_and_then_take_turns(toy: Toy) -> None:
    run(planned(*TOYS, rounds=4), command="")
    assert [fn.func for _, fn in toy.asked] == [first_step] * 4 + [stamps] * 16
    assert toy.asked[0][0] == BASE
    assert [fn.keywords["keeps"] for _, fn in toy.asked[:4]] == [True, False, False, False]
    job = planned(*TOYS).jobs[0]
    assert toy.times() == [key for number in range(4) for key in turn(job.keys, number)]
    assert all(fn.keywords["variant"] is job.variant for _, fn in toy.asked)
    assert toy.steps == [("start", set(job.keys)), ("close", set(job.keys))]


def test_ratios_are_to_plain_torch_in_the_same_rounds(toy: Toy) -> None:
    report = run(planned(*TOYS, rounds=4), command="the command")
    base, native, *_ = report["results"]
    assert (base["system"], base["ratio"], base["ratio_low"], base["ratio_high"]) == (
        "torch-2t", 1.0, 1.0, 1.0,
    )  # fmt: skip
    # Medians over all steps of all rounds: 1.5 s and 1.75 s; by rounds 0.5, 1.5, 1, 0.5.
    assert (base["median_ms"], native["median_ms"]) == (1500.0, 1750.0)
    assert native["ratio"] == pytest.approx(1.75 / 1.5, rel=1e-4)
    assert (native["ratio_low"], native["ratio_high"]) == (0.5, 1.0)
    assert (native["min_ms"], native["p90_ms"]) == (500.0, 2000.0)
    assert native["flops_per_rank"] == 6.0  # the busiest rank's
    assert (native["ranks"], native["threads"], native["transport"]) == (2, 1, "toy")
    assert native["steps"] == 4 * find_work("linear-row").variants[0].steps
    assert report["failed"] == []
    assert (report["command"], report["rounds"], report["quick"]) == ("the command", 4, False)


def test_a_wrong_system_is_reported_and_not_timed(toy: Toy) -> None:
    toy.faults[NATIVE] = "output differs from plain torch by 1.00e+00"
    report = run(planned(*TOYS, rounds=2), command="")
    assert NATIVE not in toy.times()
    assert NATIVE.system not in {row["system"] for row in report["results"]}
    assert report["failed"] == [
        {
            "work": "linear-row",
            "system": "native-threads",
            "ranks": 2,
            "reason": "output differs from plain torch by 1.00e+00 on rank 0; 1 more are wrong",
        }
    ]


def test_other_bits_of_an_invariant_system_are_reported_and_not_timed(toy: Toy) -> None:
    toy.hashes = {INVARIANT: "aa", GLOO: "bb"}
    report = run(planned(*TOYS, rounds=2), command="")
    assert set(toy.times()) == {BASE, NATIVE, INVARIANT}
    (failure,) = report["failed"]
    assert (failure["system"], failure["reason"]) == (
        "invariant-gloo",
        "output has other bits than that of invariant-threads on 2 ranks, on rank 0",
    )


@pytest.mark.parametrize("when", [first_step, stamps])
def test_a_system_that_breaks_is_reported_and_the_others_go_on(toy: Toy, when: Any) -> None:
    toy.failing[NATIVE] = when
    report = run(planned(*TOYS, rounds=2), command="")
    assert [failure["reason"] for failure in report["failed"]] == ["rank 0 of 2 left"]
    expected = {"torch-2t", "invariant-threads", "invariant-gloo"}
    assert {row["system"] for row in report["results"]} == expected
    assert toy.times().count(GLOO) == 2


@pytest.mark.parametrize("when", [first_step, stamps])
def test_without_plain_torch_there_are_no_ratios(toy: Toy, when: Any) -> None:
    toy.failing[BASE] = when
    report = run(planned(*TOYS, rounds=2), command="")
    assert report["results"] == []
    reasons = [failure["reason"] for failure in report["failed"]]
    why = "is not measured, because its yardstick torch-2t fails"
    assert reasons == ["rank 0 of 2 left", why, why, why]


def test_progress_counts_up_to_all_there_is(toy: Toy) -> None:
    told: list[tuple[int, int, str]] = []
    run(planned(*TOYS, rounds=2), command="", progress=lambda *args: told.append(args))
    assert [text for _, _, text in told][:2] == [
        "linear-row: starting 4 systems", "linear-row: checking torch-2t",
    ]  # fmt: skip
    assert told[-1] == (8, 12, "linear-row: round 2 of 2")


def test_whom_the_next_work_does_not_need_is_ended_even_if_a_later_one_does(toy: Toy) -> None:
    works = ("layer-overhead", "linear-row", "scaling")
    made = planned("native-threads", works=works, rounds=1)
    toy.seconds = {key: [1.0] * 20 for job in made.jobs for key in job.keys}
    run(made, command="")
    alone, pair = Key("native-threads", 1), Key("native-threads", 2)
    wide = {Key("native-threads", ranks) for ranks in (1, *range(3, 9))}
    assert [step for step in toy.steps if step[1]] == [
        ("start", {BASE, alone, pair}), ("close", {alone}),  # once for all variants of a work
        ("start", wide), ("close", wide | {BASE, pair}),
    ]  # fmt: skip


def test_what_was_measured_is_kept_after_every_work_but_the_last(toy: Toy) -> None:
    toy.seconds = {key: [1.0] * 20 for key in (BASE, NATIVE, Key("native-threads", 1))}
    kept: list[Any] = []
    works = ("linear-row", "layer-overhead", "linear-column")
    report = run(
        planned("native-threads", works=works, rounds=1),
        command="",
        keep=lambda data: kept.append(json.loads(json.dumps(data))),
    )
    assert [{row["work"] for row in data["results"]} for data in kept] == [
        {"linear-row"}, {"linear-row", "layer-overhead"},
    ]  # fmt: skip
    assert [data["complete"] for data in (*kept, report)] == [False, False, True]
    assert kept[1]["results"] == report["results"][: len(kept[1]["results"])]


# -- the works, in this process --------------------------------------------------------------------

# Of these "scaling" is the step, and "decode-1024" the forward.
SAME = ("ffn-1024", "ffn-2048", "decode-4096")
# Works that need an extra are in a file of their own.
STEPS = [w.name for w in WORKS if w.section == "results" and not w.extra and w.name not in SAME]


@pytest.mark.parametrize("name", STEPS)
def test_every_variant_runs_on_one_rank_and_is_what_plain_torch_computes(name: str) -> None:
    for variant in find_work(name).variants:
        plain = list(variant.make(find_system("torch-1t").join(None)).checked())
        for system in ("native-threads", "invariant-threads"):
            task = variant.make(find_system(system).join(None))
            ours = list(task.checked())
            assert [each.name for each in ours] == [each.name for each in plain]
            for mine, theirs in zip(ours, plain, strict=True):
                torch.testing.assert_close(mine.tensor, theirs.tensor, rtol=1e-4, atol=1e-5)
            assert task.step().isfinite().all()


def test_a_training_step_shows_everything_that_it_computes() -> None:
    variant = find_work("ffn-1024").variants[0]
    task = variant.make(find_system("torch-1t").join(None))
    assert isinstance(task, Step)
    before = {name: value.detach().clone() for name, value in task.model.named_parameters()}
    shown = {each.name: each.tensor for each in task.checked()}
    assert list(shown) == [
        "output", "input.grad", "up.weight.grad", "up.weight", "down.weight.grad", "down.weight",
    ]  # fmt: skip
    for name, value in before.items():
        # An update that is left out must be outside the tolerance.
        update = (shown[name] - value).abs().max()
        assert update > 3 * (1e-5 * value.abs().max() + 1e-6)


def test_inference_records_no_gradients_and_the_recorded_forward_does() -> None:
    rank = find_system("torch-1t").join(None)
    assert not find_work("decode-1024").variants[0].make(rank).step().requires_grad
    found = {
        variant.keys["phase"]: variant.make(rank).step().requires_grad
        for variant in find_work("layer-overhead").variants
    }
    assert found == {"forward": False, "recorded forward": True, "forward+backward": True}
