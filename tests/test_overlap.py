"""Which sums overlap with products: a value on every axis, checked where it is given."""

import dataclasses
from typing import Any

import pytest

from places import ENGINES, Pool
from shardproof.axis import Axis
from shardproof.errors import UsageError
from shardproof.overlap import DEFAULT_OVERLAP, NAMED, Overlap, checked_overlap
from shardproof.ranks import launch, open_ranks


def test_names_stand_for_values() -> None:
    assert checked_overlap("auto") == DEFAULT_OVERLAP == Overlap()
    assert checked_overlap("on") == Overlap(backward=True, chunks=2)
    assert checked_overlap("off") == Overlap(backward=False, chunks=1)
    assert list(NAMED) == ["auto", "on", "off"]


def test_a_value_stays_itself_and_cannot_be_changed() -> None:
    mine = Overlap(backward=False, chunks=3)
    assert checked_overlap(mine) is mine
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.chunks = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backward": 1}, r"Overlap\(backward=1\) is neither True, False nor None"),
        ({"backward": "on"}, r"Overlap\(backward='on'\) is neither True, False nor None"),
        ({"chunks": 0}, r"Overlap\(chunks=0\) is not a positive whole number. Use 1 or more"),
        ({"chunks": 1.5}, r"Overlap\(chunks=1.5\) is not a positive whole number"),
        ({"chunks": True}, r"Overlap\(chunks=True\) is not a positive whole number"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Overlap(**options)


@pytest.mark.parametrize("overlap", ["sometimes", True, None, 2, ["on"]])
def test_what_is_no_overlap_is_refused_everywhere(overlap: Any) -> None:
    for make in (
        checked_overlap,
        lambda overlap: Axis.solo(overlap=overlap),
        lambda overlap: Axis.from_env(overlap=overlap),
        lambda overlap: Axis.from_group(None, overlap=overlap),  # type: ignore[arg-type]
        lambda overlap: launch(lambda axis: None, degree=1, overlap=overlap),
    ):
        with pytest.raises(
            UsageError, match=r"is unknown. Use an Overlap, or one of: auto, on, off\."
        ):
            make(overlap)


def test_an_axis_has_it() -> None:
    assert Axis.solo().overlap == DEFAULT_OVERLAP
    assert Axis.solo(overlap="on").overlap == Overlap(backward=True, chunks=2)
    assert Axis.solo(overlap=Overlap(chunks=5)).overlap.chunks == 5


@ENGINES
def test_ranks_have_what_they_were_started_with(engine: str, pool: Pool) -> None:
    assert pool(2, engine).run(lambda axis: axis.overlap) == [DEFAULT_OVERLAP] * 2
    mine = Overlap(backward=False, chunks=3)
    with open_ranks(1, engine, threads=1, overlap=mine) as ranks:
        assert ranks.run(lambda axis: axis.overlap) == [mine]


@pytest.mark.parametrize(
    "engine_and_transport", [("processes", "gloo"), ("processes", "shm"), ("threads", "auto")]
)
def test_by_default_sums_overlap_only_where_the_transport_works_alone(
    engine_and_transport: tuple[str, str],
) -> None:
    engine, transport = engine_and_transport
    with open_ranks(2, engine, threads=1, transport=transport) as ranks:
        assert ranks.run(lambda axis: axis.overlaps_backward) == [transport == "gloo"] * 2


@ENGINES
def test_who_asks_for_overlap_gets_it(engine: str) -> None:
    for wanted in (True, False):
        with open_ranks(2, engine, threads=1, overlap=Overlap(backward=wanted)) as ranks:
            assert ranks.run(lambda axis: axis.overlaps_backward) == [wanted] * 2
