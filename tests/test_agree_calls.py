"""Ranks that make different calls over a process group: the same error on all, and no number."""

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from agreeing import EVERY_TRANSPORT, check_all_said, drawn, gloo, run, said
from places import Pool
from shardproof import c_modules, comm
from shardproof.axis import Axis
from shardproof.leaves import Cut
from shardproof.ranks import launch
from shardproof.transport import shared_memory


def reduce(axis: Axis, who: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.full(shape, axis.rank + 1.0).to(dtype)
    return comm.all_reduce(x, axis, direction="forward", who=who)


def is_well(axis: Axis) -> bool:
    """After an error, the next collectives are as good as any."""
    found = [reduce(axis, "next", 3).tolist() for _ in range(6)]
    return found == [[3.0] * 3] * 6


def in_another_order(axis: Axis) -> None:
    for who in ("up", "down")[:: 1 - 2 * axis.rank]:
        reduce(axis, who, 3)


def other_integers(axis: Axis) -> None:
    reduce(axis, "down", 3, dtype=(torch.int32, torch.float32)[axis.rank])


def other_length(axis: Axis) -> None:
    reduce(axis, "down", 3 + 1000 * axis.rank)


def other_dims(axis: Axis) -> None:
    reduce(axis, "down", *(((2, 6), (3, 4))[axis.rank]))


def other_direction(axis: Axis) -> None:
    direction = ("forward", "backward")[axis.rank]
    comm.all_reduce(torch.ones(3), axis, direction=direction, who="down")


def gather_against_sum(axis: Axis) -> None:
    if axis.rank:
        axis.agree({"x": 1}, what="things")
    else:
        reduce(axis, "down", 3)


CASES: dict[str, tuple[Callable[[Axis], None], tuple[str, str]]] = {
    "order": (in_another_order, ("rank 0: forward all_reduce of up", "rank 1: forward all_reduce")),
    "dtype of one width": (other_integers, ("int32 (3,)", "float32 (3,)")),
    "length": (other_length, ("float32 (3,)", "float32 (1003,)")),
    "dims": (other_dims, ("float32 (2, 6)", "float32 (3, 4)")),
    "direction": (other_direction, ("forward all_reduce", "backward all_reduce")),
    "kind": (gather_against_sum, ("all_reduce of down", "setup agree of things")),
}


@EVERY_TRANSPORT
@pytest.mark.parametrize(
    ("case", "history"),
    [
        *((case, "nothing before") for case in CASES),
        *((case, "the same before") for case in ("order", "length", "kind")),
        *((case, "others before") for case in ("order", "dims")),
    ],
)
def test_ranks_that_call_something_else_all_raise(
    pool: Pool, engine: str, case: str, history: str
) -> None:
    """Whatever the ranks foresee: nothing, this very call, or another one."""
    differ, words = CASES[case]

    def work(axis: Axis) -> tuple[str, bool]:
        for _ in range(0 if history == "nothing before" else 5):
            if history == "the same before":
                reduce(axis, "up", 3)
                reduce(axis, "down", 3)
            else:
                reduce(axis, "other", 700)
        return said(lambda: differ(axis)), is_well(axis)

    found = run(pool, engine, work)
    assert [well for _, well in found] == [True, True]
    check_all_said([message for message, _ in found], *words, "All ranks must make the same calls")


def test_layers_in_another_order_give_an_error_and_not_a_sum_over_gloo(pool: Pool) -> None:
    """12.0 where 3.0 is right, before."""

    def work(axis: Axis) -> str:
        a, b = torch.full((3,), 1.0 + axis.rank), torch.full((3,), 10.0)
        calls = [("a", a), ("b", b)][:: 1 - 2 * axis.rank]
        every = lambda: [comm.all_reduce(x, axis, direction="forward", who=w) for w, x in calls]  # noqa: E731
        return said(every)

    check_all_said(run(pool, "gloo", work), "all_reduce of a", "all_reduce of b")


def test_two_axes_of_one_group_in_another_order_all_raise(pool: Pool) -> None:
    def work(_: Axis) -> tuple[str, bool]:
        axes = [gloo("a"), gloo("b")]
        reduce(axes[0], "", 3)
        reduce(axes[1], "", 3)
        order = axes[:: 1 - 2 * dist.get_rank()]
        message = said(lambda: [reduce(axis, "", 3) for axis in order])
        return message, is_well(axes[0])

    found = pool(2, "processes").run(work)
    assert [well for _, well in found] == [True, True]
    check_all_said([message for message, _ in found], "on axis ", "of this process group")


@pytest.mark.skipif(c_modules.shm() is None, reason=f"needs the core: {c_modules.problem()}")
@pytest.mark.parametrize("slow", [None, 0, 1])
def test_two_axes_that_share_memory_in_another_order_do_not_wait_for_ever(
    pool: Pool, slow: int | None
) -> None:
    def work(_: Axis) -> tuple[str, list[float]]:
        # A slow rank has not seen the other one wait before that one raises.
        certain = 4.0 if dist.get_rank() == slow else 1.0
        group = dist.group.WORLD
        assert group is not None
        axes = [Axis.from_group(group, name=name, timeout=120.0) for name in "ab"]
        for axis in axes:
            reduce(axis, f"{axis.name}.down", 3)
        order = axes[:: 1 - 2 * dist.get_rank()]
        with mock.patch.object(shared_memory, "_CERTAIN", certain):
            message = said(lambda: [reduce(axis, f"{axis.name}.down", 3) for axis in order])
        return message, reduce(_, "next", 3).tolist()

    before = time.monotonic()
    found = pool(2, "processes").run(work)
    assert time.monotonic() - before < 60
    assert [after for _, after in found] == [[3.0] * 3] * 2
    check_all_said(
        [message for message, _ in found],
        "rank 0: forward all_reduce of a.down",
        "rank 1: forward all_reduce of b.down",
        "on two axes",
    )


def gather(axis: Axis, who: str) -> Tensor:
    """Parts of one size, which gloo gathers straight to their place."""
    cut = Cut(4, 4, axis.size)
    return comm.all_gather(torch.ones(2), axis, dim=0, cut=cut, direction="forward", who=who)


def test_native_sums_and_equal_gathers_are_compared_too(pool: Pool) -> None:
    def work(axis: Axis) -> list[str]:
        who = f"layer {axis.rank}"
        return [said(lambda: reduce(axis, who, 4)), said(lambda: gather(axis, who))]

    first, second = run(pool, "gloo", work)
    assert first == second
    for message, kind in zip(first, ("all_reduce", "all_gather"), strict=True):
        assert f"rank 0: forward {kind} of layer 0" in message


def test_a_sum_that_is_started_is_compared_before_the_next_one(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, bool]:
        def start(who: str) -> comm.StartedSum:
            return comm.start_all_reduce(torch.ones(4), axis, direction="forward", who=who)

        def both() -> None:
            for who in ("a", "a", "a"):
                start(who).wait()
            first = start("a")
            second = start("a" if axis.rank else "b")
            first.wait()
            second.wait()

        return said(both), is_well(axis)

    found = run(pool, "gloo", work)
    assert [well for _, well in found] == [True, True]
    check_all_said([message for message, _ in found], "all_reduce of a", "all_reduce of b")


@EVERY_TRANSPORT
def test_three_ranks_of_which_one_differs_all_raise(pool: Pool, engine: str) -> None:
    def work(axis: Axis) -> str:
        for _ in range(4):
            reduce(axis, "down", 5)
        return said(lambda: reduce(axis, "up" if axis.rank == 2 else "down", 5))

    messages = run(pool, engine, work, 3)
    check_all_said(messages, "ranks 0 and 1: forward all_reduce of down", "rank 2: forward")


def test_ranks_that_catch_the_error_may_return_over_gloo() -> None:
    """One rank learns of it when it begins its call, another when it waits: one call for both."""

    def work(axis: Axis) -> str:
        for _ in range(4):
            reduce(axis, "down", 5)
        return said(lambda: reduce(axis, "up" if axis.rank else "down", 5))

    messages = launch(work, degree=2, engine="processes", transport="gloo", threads=1)
    check_all_said(messages, "rank 0: forward all_reduce of down", "rank 1: forward")


# What it costs ---------------------------------------------------------------------------------


def test_foreseen_calls_send_16_bytes_more_and_nothing_else(pool: Pool) -> None:
    def work(axis: Axis) -> list[int]:
        sent: list[int] = []
        original = axis.transport._all_to_all  # type: ignore[attr-defined]

        def counted(target: Tensor, source: Tensor, received: Any, out: Any) -> Any:
            sent.append(sum(out))
            return original(target, source, received, out)

        axis.transport._all_to_all = counted  # type: ignore[attr-defined]
        cut = Cut(8, 8, 2)
        nodes = {(4 * axis.rank, 4 * axis.rank + 4): drawn(100)}
        for _ in range(6):
            comm.all_reduce_nodes(
                dict(nodes), axis, cut=cut, shape=(100,), like=drawn(1), direction="forward"
            )
        return sent

    for sent in run(pool, "gloo", work):
        assert sent[-2:] == [200 + 16] * 2
