"""Shared memory: how it is set up, what it refuses, what it says when ranks disagree."""

import gc
import itertools
import mmap
import os
import re
import stat
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from places import Pool
from shardproof import c_modules
from shardproof.axis import Axis
from shardproof.errors import AxisError, MismatchError, ShapeError, UsageError
from shardproof.transport import segment
from shardproof.transport.base import Call, Order, Window, rank_order
from shardproof.transport.distributed import DistributedTransport
from shardproof.transport.shared_memory import SharedTransport
from shardproof.transport.solo import SoloTransport

pytestmark = pytest.mark.skipif(c_modules.shm() is None, reason="the C core was not built")


def group() -> DistributedTransport:
    world = dist.group.WORLD
    assert world is not None
    return DistributedTransport(world, check=False)


def shared() -> SharedTransport:
    return SharedTransport.connect(group(), timeout=60)


def call(numel: int = 4, dtype: torch.dtype = torch.float32, who: str = "layer") -> Call:
    return Call("all_reduce", "forward", who, (numel,), dtype)


# How it is set up ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["memfd", "file"])
def test_memory_is_mapped_by_all_and_has_no_name(way: str, pool: Pool) -> None:
    def work(axis: Axis) -> tuple[int, list[int], list[str]]:
        base = group()
        modes = []
        make = segment._make

        def spied(way: str, length: int) -> tuple[int, str]:
            descriptor, path = make(way, length)
            modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
            return descriptor, path

        segment._make = spied
        try:
            memory = segment.map_together(base, 8192, ways=(way,))
        finally:
            segment._make = make
        memory[axis.rank] = axis.rank + 1
        base.gather_objects(None, call=call())
        left = [name for name in os.listdir("/dev/shm") if name.startswith("shardproof")]
        return sum(memory[:8]), modes, left

    assert pool(3, "processes").run(work) == [(6, [0o600], []), (6, [], []), (6, [], [])]


def test_a_rank_that_cannot_map_is_named_by_all_and_the_group_goes_on(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, list[int], list[str]]:
        base = group()
        opened = segment._open

        def fails(path: str, nonce: bytes, length: int) -> int:
            if axis.rank == 1:
                raise OSError("no room")
            return opened(path, nonce, length)

        segment._open = fails
        try:
            with pytest.raises(AxisError) as caught:
                SharedTransport.connect(base, timeout=60)
        finally:
            segment._open = opened
        left = [name for name in os.listdir("/dev/shm") if name.startswith("shardproof")]
        return str(caught.value), base.gather_objects(axis.rank, call=call()), left

    said = "the ranks cannot share memory. memfd: rank 1: no room; file: rank 1: no room."
    assert pool(3, "processes").run(work) == [(said, [0, 1, 2], [])] * 3


def test_a_rank_without_the_core_is_named_by_all(pool: Pool) -> None:
    def work(axis: Axis) -> str:
        loaded = c_modules.shm
        if axis.rank == 1:
            c_modules.shm = lambda: None  # type: ignore[assignment]
            c_modules.problem = lambda: "there was no compiler"
        try:
            with pytest.raises(AxisError) as caught:
                SharedTransport.connect(group(), timeout=60)
        finally:
            c_modules.shm = loaded
        return str(caught.value)

    said = "rank 1 of 2 cannot share memory: there was no compiler."
    assert pool(2, "processes").run(work) == [said] * 2


def test_other_memory_than_that_of_rank_0_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    nonce, other = bytes(range(segment._NONCE)), bytes(segment._NONCE)
    path.write_bytes(nonce + bytes(100))
    length = path.stat().st_size
    os.close(segment._open(str(path), nonce, length))
    for told in ((other, length), (nonce, length + 1)):
        with pytest.raises(OSError, match="is not the memory that rank 0 has made"):
            segment._open(str(path), *told)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("boot", "ranks 0 and 1 of 2 run on different machines"),
        ("namespace", "ranks 0 and 1 of 2 run in different containers"),
        ("layout", "ranks 0 and 1 of 2 have different versions of shardproof"),
    ],
)
def test_ranks_that_are_not_together_are_told_so(what: str, said: str, pool: Pool) -> None:
    def work(axis: Axis) -> str:
        here = segment.Host.here

        def elsewhere(layout: int, problem: str | None) -> segment.Host:
            host = here(layout, problem)
            return segment.Host(**{**vars(host), what: "other"}) if axis.rank == 1 else host

        segment.Host.here = elsewhere  # type: ignore[method-assign]
        try:
            with pytest.raises(AxisError) as caught:
                SharedTransport.connect(group(), timeout=60)
        finally:
            segment.Host.here = here  # type: ignore[method-assign]
        return str(caught.value)

    for message in pool(2, "processes").run(work):
        assert message.startswith(said)


def test_without_memfd_in_python_all_ranks_use_a_file(pool: Pool) -> None:
    def work(axis: Axis) -> list[float]:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(os, "memfd_create")
            return shared().all_reduce(torch.ones(2), call=call()).tolist()

    assert pool(2, "processes").run(work) == [[2.0, 2.0]] * 2


@pytest.mark.parametrize("name", ["memfd_create", "posix_fallocate"])
def test_what_python_was_built_without_is_a_reason_on_all_ranks(name: str, pool: Pool) -> None:
    def work(axis: Axis) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(os, name)
            with pytest.raises(AxisError) as caught:
                segment.map_together(group(), 8192, ways=("memfd",))
        return str(caught.value)

    said = f"the ranks cannot share memory. memfd: rank 0: module 'os' has no attribute '{name}'."
    assert pool(2, "processes").run(work) == [said] * 2


def test_without_pidfd_in_python_proc_says_who_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    assert not segment.Peer(os.getpid(), segment.began(os.getpid())).has_ended()
    assert segment.Peer(os.getpid(), 1).has_ended()


def test_a_proc_that_cannot_be_read_is_a_hosts_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "readlink", refuse)
    problem = segment.Host.here(0, None).problem
    assert problem == "/proc cannot be read ([Errno 13] Permission denied: '/proc/self/ns/pid')"


def test_too_many_ranks_are_told_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Many(SoloTransport):
        size = 257

        def gather_objects(self, value: object, *, call: Call) -> list[object]:
            return [value] * 257

    said = "257 ranks cannot share memory; no more than 256 can. Use transport='gloo'."
    with pytest.raises(AxisError, match=re.escape(said)):
        SharedTransport.connect(Many(), timeout=1)


def test_another_process_with_the_same_number_is_not_taken_for_the_peer() -> None:
    assert not segment.Peer(os.getpid(), segment.began(os.getpid())).has_ended()
    assert segment.Peer(os.getpid(), 1).has_ended()


def test_a_process_that_is_not_buried_yet_has_ended() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    began = segment.began(pid)
    try:
        deadline = time.monotonic() + 30
        while segment.began(pid):  # until it is a zombie
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert segment.Peer(pid, began or 1).has_ended()
        assert Path(f"/proc/{pid}").exists()
    finally:
        os.waitpid(pid, 0)


def test_a_transport_that_is_gone_leaves_no_descriptor_and_no_mapping(pool: Pool) -> None:
    def count() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("memfd:shardproof")

    def work(axis: Axis) -> bool:
        before = count()
        for _ in range(3):
            transport = shared()
            transport.all_reduce(torch.ones(4), call=call())
        during = count()
        del transport
        return before == count() != during

    assert pool(3, "processes").run(work) == [True] * 3


# What it refuses -------------------------------------------------------------------------------

REFUSED = {
    "bool": (lambda: torch.ones(4, dtype=torch.bool), "wants to add torch.bool"),
    "float8": (lambda: torch.ones(4).to(torch.float8_e4m3fn), "wants to add torch.float8_e4m3fn"),
    "sparse": (lambda: torch.ones(4).to_sparse(), "a sparse_coo tensor of torch.float32 on cpu"),
    "meta": (lambda: torch.ones(4, device="meta"), "a strided tensor of torch.float32 on meta"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(4), 1.0, 0, torch.qint8),
        "a quantized tensor of torch.qint8",
    ),
    "strided": (lambda: torch.ones(8)[::2], r"of shape (4,) and strides (2,)"),
    "conjugated": (
        lambda: torch.ones(4, dtype=torch.complex64).conj(),
        "conjugated or negated by a flag. Use x.resolve_conj()",
    ),
}


@pytest.mark.parametrize("engine", ["threads", "processes"])
@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_cannot_be_added_is_refused_by_name_on_all_ranks(
    what: str, engine: str, pool: Pool
) -> None:
    make, said = REFUSED[what]

    def work(axis: Axis) -> tuple[str, list[float]]:
        transport = shared() if engine == "processes" else axis.transport
        x = make()
        out = torch.zeros(4, dtype=torch.float32 if x.is_quantized else x.dtype)
        with pytest.raises((UsageError, ShapeError)) as caught:
            transport.sum([x], rank_order(2), out, call=call(4, x.dtype))
        y = transport.all_reduce(torch.ones(4), call=call())
        return str(caught.value), y.tolist()

    for rank, (message, total) in enumerate(pool(2, engine).run(work)):
        assert f": rank {rank} of 2 " in message
        assert said in message
        assert total == [2.0] * 4, "and the ranks go on"


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_when_one_rank_alone_refuses_all_raise(engine: str, pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, list[float]]:
        transport = shared() if engine == "processes" else axis.transport
        x = torch.ones(8)[::2] if axis.rank == 1 else torch.ones(4)
        with pytest.raises(MismatchError) as caught:
            transport.sum([x], rank_order(3), torch.empty(4), call=call())
        y = transport.all_reduce(torch.ones(4), call=call())
        return str(caught.value), y.tolist()

    for message, total in pool(3, engine).run(work):
        assert "rank 1: forward all_reduce of layer: float32 (4,), which it refuses: " in message
        assert "of shape (4,) and strides (2,)" in message
        assert "ranks 0 and 2: forward all_reduce of layer: float32 (4,), adds 3 parts" in message
        assert total == [3.0] * 4


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_why_a_rank_refuses_is_told_to_those_who_come_late(engine: str, pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, list[float]]:
        transport = shared() if engine == "processes" else axis.transport
        x = torch.ones(8)[::2] if axis.rank == 1 else torch.ones(4)
        confer = transport._core.confer

        class Late:
            """Comes to the quarrel when the other has waited for a while."""

            def __getattr__(self, name: str) -> object:
                return getattr(core_of_rank, name)

            def confer(self, text: bytes) -> list[str]:
                time.sleep(0.3)
                return confer(text)

        core_of_rank = transport._core
        if axis.rank == 0:
            transport._core = Late()
        with pytest.raises(MismatchError) as caught:
            transport.sum([x], rank_order(2), torch.empty(4), call=call())
        transport._core = core_of_rank
        y = transport.all_reduce(torch.ones(4), call=call())
        return str(caught.value), y.tolist()

    for message, total in pool(2, engine).run(work):
        assert "which it refuses: " in message
        assert "of shape (4,) and strides (2,)" in message
        assert "adds 2 parts of 4 torch.float32" in message
        assert total == [2.0] * 4


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_after_a_quarrel_ranks_that_began_unequal_numbers_of_calls_meet(
    engine: str, pool: Pool
) -> None:
    def work(axis: Axis) -> list[int]:
        transport = shared() if engine == "processes" else axis.transport
        outs = torch.empty(2, 4)
        mine = call(who=f"layer {axis.rank}")
        first = transport.start_sum([torch.ones(4)], rank_order(2), outs[0], call=mine)
        if axis.rank == 1:
            transport.start_sum([torch.ones(4)], rank_order(2), outs[1], call=mine)
        with pytest.raises(MismatchError):
            first.wait()
        return transport.gather_objects(axis.rank, call=call())

    assert pool(2, engine).run(work) == [[0, 1]] * 2


@pytest.mark.parametrize("engine", ["threads", "processes"])
@pytest.mark.parametrize("what", ["length", "order", "result", "window", "gather", "meeting"])
def test_what_a_call_does_not_say_is_compared_too(what: str, engine: str, pool: Pool) -> None:
    order, other = Order((1, 1), (0, 1, -1)), Order((1, 1), (1, 0, -1))
    windows = (Window(1, 4, 1, 0, 2), Window(1, 4, 1, 2, 4))

    def work(axis: Axis) -> tuple[str, list[float]]:
        transport = shared() if engine == "processes" else axis.transport
        numel = 5 if what == "length" and axis.rank else 4
        x, out = torch.ones(numel), torch.empty(numel)

        def collective() -> None:
            if axis.rank == 0:
                transport.sum([x], order, out, call=call())
            elif what == "window":
                transport.sum([x], order, out[:2], call=call(), windows=windows)
            elif what == "gather":
                transport.all_gather(x, torch.empty(8), [4, 4], call=call())
            elif what == "meeting":
                transport.gather_objects("x", call=call(who="other"))
            else:
                result = out.bfloat16() if what == "result" else out
                transport.sum([x], other if what == "order" else order, result, call=call())

        with pytest.raises(MismatchError) as caught:
            collective()
        y = transport.all_reduce(torch.ones(4), call=call())
        return str(caught.value), y.tolist()

    (first, total), (second, _) = pool(2, engine).run(work)
    assert first == second
    assert "rank 0: forward all_reduce of layer: float32 (4,)" in first
    assert "rank 1: forward all_reduce of " in first
    assert total == [2.0] * 4, "and the ranks go on"


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_a_disagreement_about_a_started_sum_ends_it(engine: str, pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, float]:
        transport = shared() if engine == "processes" else axis.transport
        numel = 400_000
        x, out = torch.ones(numel), torch.empty(numel)
        mine = call(numel, who=f"layer {axis.rank}")
        first = transport.start_sum([x], rank_order(2), out, call=mine)
        transport.start_sum([x], rank_order(2), torch.empty(numel), call=call(numel))
        with pytest.raises(MismatchError) as caught:
            first.wait()
        transport.sum([x], rank_order(2), out, call=call(numel))
        return str(caught.value), out.sum().item()

    for message, total in pool(2, engine).run(work):
        assert "rank 0: forward all_reduce of layer 0" in message
        assert "rank 1: forward all_reduce of layer 1" in message
        assert total == 800_000


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_started_sums_are_waited_for_in_order_and_alone(engine: str, pool: Pool) -> None:
    def work(axis: Axis) -> list[str]:
        transport = shared() if engine == "processes" else axis.transport
        messages = []

        def refuses(action: object) -> None:
            with pytest.raises(UsageError) as caught:
                action()  # type: ignore[operator]
            messages.append(str(caught.value))

        def start() -> tuple[Tensor, object]:
            out = torch.empty(4)
            return out, transport.start_sum([torch.ones(4)], rank_order(2), out, call=call())

        (one, first), (two, second) = start(), start()
        refuses(start)
        refuses(second.wait)
        refuses(lambda: transport.sum([torch.ones(4)], rank_order(2), one, call=call()))
        refuses(lambda: transport.gather_objects(1, call=call()))
        first.wait()
        refuses(first.wait)
        second.wait()
        return [*messages, str((one + two).tolist())]

    order = "sums are waited for once, in the order in which they were started."
    idle = "a sum is started; wait for it before the next call"
    expected = ["two sums are started; wait for one before the next", order, idle, idle, order]
    assert pool(2, engine).run(work) == [[*expected, "[4.0, 4.0, 4.0, 4.0]"]] * 2


# What a long wait tells ------------------------------------------------------------------------


def test_only_long_waits_are_observed_and_taken_back(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[list[str], int]:
        seen: list[str] = []
        transport = SharedTransport.connect(
            group(), timeout=60, observer=lambda call: seen.append(str(call))
        )
        before = transport.calls
        for index in range(3):
            if index == 1 and axis.rank == 1:
                time.sleep(0.5)
            transport.all_reduce(torch.ones(4), call=call(who=f"layer {index}"))
        return seen, transport.calls - before

    (waited, count), (late, same) = pool(2, "processes").run(work)
    assert waited == ["forward all_reduce of layer 1: float32 (4,)", "None"]
    assert late == []
    assert (count, same) == (3, 3)


# Arithmetic of one rank alone ------------------------------------------------------------------


def add_alone(parts: list[Tensor], kinds: tuple[int, int], out: Tensor) -> Tensor:
    """`parts` of one rank, by the core."""
    module = c_modules.shm()
    assert module is not None
    area = mmap.mmap(-1, module.area_bytes(1, 65536))
    end = module.Core(area, 0, 1, 65536, lambda *_: None)
    program = (0, *itertools.chain.from_iterable((n, -1) for n in range(1, len(parts))))
    plan = end.plan((len(parts),), program, len(out), *kinds, 1, False, None)
    end.sum(plan, out.data_ptr(), *(part.data_ptr() for part in parts))
    return out


@pytest.mark.parametrize("is_portable", [False, True])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, 2), (torch.float16, 3)], ids=str)
def test_16_bits_are_widened_and_rounded_as_torch_does(
    dtype: torch.dtype, kind: int, is_portable: bool
) -> None:
    module = c_modules.shm()
    assert module is not None
    bits = torch.randint(-(2**31), 2**31, (200_003,), generator=torch.Generator().manual_seed(0))
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    ties = halves.float().nextafter(torch.tensor(float("inf")))
    middles = (halves.float() + halves.float().nextafter(ties)) / 2
    numbers = torch.cat([bits.to(torch.int32).view(torch.float32), ties, middles, halves.float()])
    module.use_portable(is_portable)
    try:
        rounded = add_alone([numbers], (0, kind), torch.empty(len(numbers), dtype=dtype))
        nothing = torch.full((len(halves),), -0.0, dtype=dtype)
        same = add_alone([halves, nothing], (kind, kind), torch.empty_like(halves))
    finally:
        module.use_portable(False)

    wanted = numbers.to(dtype)
    is_nan = wanted.isnan()
    assert torch.equal(rounded.isnan(), is_nan)
    assert torch.equal(rounded.view(torch.int16)[~is_nan], wanted.view(torch.int16)[~is_nan])
    is_nan = halves.isnan()
    assert torch.equal(same.view(torch.int16)[~is_nan], halves.view(torch.int16)[~is_nan])
    assert same[is_nan].isnan().all()


@pytest.mark.parametrize(
    ("counts", "kinds", "said"),
    [
        ((-1, 3), (0, 0), "too many parts, fewer than none"),
        ((1, 65), (0, 0), "too many parts, fewer than none"),
        ((65, 1), (0, 0), "too many parts, fewer than none"),
        ((1, 1), (0, 1), "only 32 bits are rounded, and to 16 bits alone"),
        ((1, 1), (1, 2), "only 32 bits are rounded"),
        ((1, 1), (2, 0), "only 32 bits are rounded"),
        ((1, 1), (2, 3), "only 32 bits are rounded"),
        ((1, 1), (0, 4), "only 32 bits are rounded"),
    ],
)
def test_the_core_refuses_a_plan_that_it_cannot_carry_out(
    counts: tuple[int, int], kinds: tuple[int, int], said: str
) -> None:
    module = c_modules.shm()
    assert module is not None
    area = mmap.mmap(-1, module.area_bytes(2, 65536))
    end = module.Core(area, 0, 2, 65536, lambda *_: None)
    program = (0, *itertools.chain.from_iterable((n, -1) for n in range(1, sum(counts))))
    with pytest.raises(ValueError, match=said):
        end.plan(counts, program, 1024, *kinds, 1, False, None)


def test_plans_share_one_scratch() -> None:
    module = c_modules.shm()
    assert module is not None
    area = mmap.mmap(-1, module.area_bytes(1, 65536))
    end = module.Core(area, 0, 1, 65536, lambda *_: None)
    program = (*range(64), *[-1] * 63)  # all parts are on the stack at once
    x, out = torch.ones(4), torch.empty(4)

    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE

    before = mapped()
    plans = [end.plan((64,), program, 4, 0, 0, 1, False, None) for _ in range(500)]
    for plan in plans:
        end.sum(plan, out.data_ptr(), *[x.data_ptr()] * 64)
    assert mapped() - before < 500 * 64 * 8192 / 4
    assert out.tolist() == [64.0] * 4


def test_many_parts_of_one_rank_are_added_in_order() -> None:
    parts = list(torch.randn(64, 3001, generator=torch.Generator().manual_seed(1)))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert torch.equal(add_alone(parts, (0, 0), torch.empty(3001)), total)
    assert not torch.equal(torch.stack(parts).sum(0), total), "the order shows"
