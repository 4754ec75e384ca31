"""Where an axis comes from: alone, a process group, a DeviceMesh, or torchrun's environment."""

import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import warm
from places import CARRIER
from shardproof.axis import Axis
from shardproof.engines.engine import Ranks
from shardproof.errors import AxisError
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.torchrun import VARIABLES
from shardproof.transport.base import Call

Pool = Callable[[int, str], Ranks]
SRC = Path(__file__).parents[1] / "src"


def describe(axis: Axis) -> tuple[str, int, int, str]:
    return axis.name, axis.rank, axis.size, axis.transport.name


def ranks_on(axis: Axis) -> list[int]:
    """Global ranks in the order of the axis: proof that it joins the ones it should."""
    return axis.transport.gather_objects(dist.get_rank(), call=Call("agree", "setup", "test"))


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of a worker's environment for a while."""
    before = os.environ[name]
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ[name] = before


def error_of(make: Callable[[], Any]) -> str:
    with pytest.raises(AxisError) as caught:
        make()
    return str(caught.value)


def test_solo_needs_nothing() -> None:
    assert describe(Axis.solo()) == ("tp", 0, 1, "solo")
    assert describe(Axis.solo("other")) == ("other", 0, 1, "solo")
    assert str(Axis.solo()) == "rank 0 of 1 on axis 'tp'"


def test_unnamed_layers_are_named_by_position_on_their_own_axis() -> None:
    first, second = Axis.solo(), Axis.solo()
    assert [first.next_name("linear"), first.next_name("linear")] == ["linear-0", "linear-1"]
    assert second.next_name("linear") == "linear-0"


def test_unnamed_layers_on_one_group_are_counted_over_all_its_axes(pool: Pool) -> None:
    """As where every layer is built on an axis of its own: equal names would draw alike."""

    def work(axis: Axis) -> tuple[list[str], bool]:
        groups = [dist.new_group([rank]) for rank in range(2)]
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        alone, pair = groups[dist.get_rank()], dist.new_group([0, 1])
        names = [
            make().next_name("linear")
            for make in (
                lambda: Axis.from_group(pair),
                lambda: Axis.from_group(pair),
                lambda: Axis.from_mesh(mesh["tp"]),
                lambda: Axis.from_mesh(mesh["tp"]),
                lambda: Axis.from_group(alone),
                lambda: Axis.from_group(alone),
            )
        ]
        first, second = (
            ColumnParallelLinear(4, 4, axis=Axis.from_group(pair)).weight for _ in range(2)
        )
        return names, torch.equal(first, second)

    wanted = ["linear-0", "linear-1"] * 3
    assert pool(2, "processes").run(work) == [(wanted, False)] * 2


def test_a_group_becomes_an_axis_in_its_own_order(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[object, ...]:
        whole = Axis.from_group(dist.group.WORLD, name="whole", check=True)
        pair = dist.new_group([0, 2])
        if dist.get_rank() == 1:
            return describe(whole), ranks_on(whole), error_of(lambda: Axis.from_group(pair))
        part = Axis.from_group(pair)
        return describe(whole), ranks_on(whole), (describe(part), ranks_on(part))

    first, second, third = pool(3, "processes").run(work)
    for rank, (whole, ranks, _) in enumerate((first, second, third)):
        assert whole == ("whole", rank, 3, CARRIER)
        assert ranks == [0, 1, 2]
    assert first[2] == (("tp", 0, 2, CARRIER), [0, 2])
    assert third[2] == (("tp", 1, 2, CARRIER), [0, 2])
    assert "which is not a process group that this process is in" in second[2]


def test_a_group_of_one_is_solo(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, int, int, str]:
        groups = [dist.new_group([rank]) for rank in range(2)]
        return describe(Axis.from_group(groups[dist.get_rank()]))

    assert pool(2, "processes").run(work) == [("tp", 0, 1, "solo")] * 2


def test_a_mesh_of_one_dim_becomes_an_axis_with_its_name(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[object, ...]:
        unnamed = Axis.from_mesh(init_device_mesh("cpu", (2,)))
        named = Axis.from_mesh(init_device_mesh("cpu", (2,), mesh_dim_names=("model",)))
        grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        part = Axis.from_mesh(grid["tp"], check=True)
        return describe(unnamed), describe(named), describe(part), ranks_on(part)

    for rank, found in enumerate(pool(2, "processes").run(work)):
        assert found == (
            ("tp", rank, 2, CARRIER),
            ("model", rank, 2, CARRIER),
            ("tp", rank, 2, CARRIER),
            [0, 1],
        )


def test_other_meshes_are_refused(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[str, ...]:
        grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        bare = init_device_mesh("cpu", (1, 2))
        return (
            error_of(lambda: Axis.from_mesh(grid)),
            error_of(lambda: Axis.from_mesh(bare)),
            error_of(lambda: Axis.from_mesh(None)),  # type: ignore[arg-type]
        )

    for grid, bare, none in pool(2, "processes").run(work):
        assert "DeviceMesh of shape (1, 2) with dims ('dp', 'tp')" in grid
        assert 'mesh["tp"]' in grid
        assert "DeviceMesh of shape (1, 2) with unnamed dims" in bare
        assert "Axis.from_mesh got None, which is not a DeviceMesh" in none


def test_a_mesh_without_this_rank_is_refused(pool: Pool) -> None:
    def work(axis: Axis) -> object:
        mesh = dist.DeviceMesh("cpu", [0, 2], mesh_dim_names=("tp",))
        if dist.get_rank() == 1:
            return error_of(lambda: Axis.from_mesh(mesh))
        return ranks_on(Axis.from_mesh(mesh))

    first, second, third = pool(3, "processes").run(work)
    assert first == third == [0, 2]
    assert "global rank 1 is not in the DeviceMesh of 2 ranks" in str(second)


def test_the_environment_finds_what_is_initialised(pool: Pool) -> None:
    def work(axis: Axis) -> tuple[object, ...]:
        found = Axis.from_env(name="tp", check=True)
        return describe(found), ranks_on(found)

    found = pool(2, "processes").run(work)
    assert found == [(("tp", rank, 2, CARRIER), [0, 1]) for rank in range(2)]


def test_an_axis_does_not_keep_a_group_that_was_destroyed(pool: Pool) -> None:
    """gloo's threads end with the group; left to the end of the interpreter, they abort it."""

    def work(axis: Axis) -> tuple[bool, str]:
        group = dist.new_group([0, 1])
        alive, found = weakref.ref(group), Axis.from_group(group, transport="gloo")
        ranks_on(found)
        dist.destroy_process_group(group)
        del group
        return alive() is None, error_of(lambda: ranks_on(found))

    for is_gone, message in pool(2, "processes").run(work):
        assert is_gone
        assert "of 2 was destroyed. Make an axis from a new one after" in message


def test_a_world_size_at_odds_is_refused_everywhere(pool: Pool) -> None:
    def work(axis: Axis) -> list[str]:
        mesh = init_device_mesh("cpu", (2,))
        with variable("WORLD_SIZE", "4"):
            return [
                error_of(Axis.from_env),
                error_of(lambda: Axis.from_group(dist.group.WORLD)),
                error_of(lambda: Axis.from_mesh(mesh)),
            ]

    for messages in pool(2, "processes").run(work):
        assert len(messages) == 3
        for message in messages:
            assert "has WORLD_SIZE=4, but torch.distributed was initialised with 2" in message


def test_without_torch_distributed_the_way_out_is_named() -> None:
    assert not dist.is_initialized()
    message = error_of(lambda: Axis.from_group(None))  # type: ignore[arg-type]
    assert "needs torch.distributed, which is not initialised" in message
    assert "Axis.from_env() under torchrun" in message


FULL = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict.fromkeys(FULL), "no RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_POR"),
        ({"LOCAL_RANK": None}, "the environment has no LOCAL_RANK, which torchrun sets"),
        ({"RANK": None, "MASTER_PORT": None}, "the environment has no RANK, MASTER_PORT, which"),
        ({"RANK": "one"}, "has RANK='one', which is not a whole number"),
        ({"WORLD_SIZE": ""}, "has WORLD_SIZE='', which is not a whole number"),
        ({"RANK": "2"}, "has RANK=2 and WORLD_SIZE=2, and a rank is at least 0 and below"),
        ({"RANK": "-1"}, "has RANK=-1 and WORLD_SIZE=2"),
    ],
)
def test_a_broken_environment_is_named(
    changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuple(FULL) == VARIABLES
    for name, value in (FULL | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)

    found = error_of(Axis.from_env)

    assert message in found
    assert "torchrun --nproc-per-node N script.py" in found
    assert not dist.is_initialized()


SUM_SCRIPT = """
import sys
import torch
import torch.distributed as dist
from shardproof.axis import Axis
from shardproof.transport.base import Call

axis = Axis.from_env(check=True)
x = torch.full((2,), axis.rank + 1.0)
total = axis.transport.all_reduce(x, call=Call("all_reduce", "forward", "script", (2,), x.dtype))
sys.stdout.write(f"{axis}, {axis.transport.name}, {total.tolist()}\\n")
dist.destroy_process_group()
"""


def test_the_environment_of_torchrun_makes_an_axis(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SUM_SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    done = warm.run_as_ranks([sys.executable, script], ranks=2, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"rank 0 of 2 on axis 'tp', {CARRIER}, [3.0, 3.0]",
        f"rank 1 of 2 on axis 'tp', {CARRIER}, [3.0, 3.0]",
    ]
