"""Single linears: the training step of the seed's 1024 -> 608, and what a tiny layer costs."""

import functools

from torch import nn

from shardproof.bench.system import Style
from shardproof.bench.work import Variant, Work
from shardproof.bench.works.step import Block, Phase, Step, linear

ONLY = "0"  # the linear's name in a sequence of one


def alone(in_features: int, out_features: int, rows: int, style: Style, rate: float) -> Block:
    """A linear with bias."""
    return Block(
        f"linear {in_features} {out_features} {rows}",
        functools.partial(_sequence, in_features, out_features),
        {ONLY: style},
        (rows, in_features),
        (rows, out_features),
        rate=rate,
    )


def _sequence(in_features: int, out_features: int) -> nn.Module:
    return nn.Sequential(linear(in_features, out_features, bias=True))


def _step(name: str, description: str, style: Style) -> Work:
    block = alone(1024, 608, 32, style, rate=0.3)
    make = functools.partial(Step, block=block, phase=Phase.TRAIN)
    return Work(name, description, (Variant(make, block.needs, steps=60, warm_up=15),))


LINEAR_ROW = _step(
    "linear-row",
    "linear 1024 -> 608, batch 32: input cut, output summed, input gradient gathered; step",
    Style.ROW_SCATTERED,
)
LINEAR_COLUMN = _step(
    "linear-column",
    "linear 1024 -> 608, batch 32: output gathered, input gradient summed; step",
    Style.COLUMN_GATHERED,
)


def _tiny(style: Style, phase: Phase) -> Variant:
    block = alone(64, 64, 16, style, rate=0.0)
    return Variant(
        functools.partial(Step, block=block, phase=phase),
        block.needs,
        steps=400,
        warm_up=100,
        ranks=(1, 2),
        keys={"layer": style.value, "phase": phase.value},
    )


LAYER_OVERHEAD = Work(
    "layer-overhead",
    "a 64 x 64 linear, batch 16: what a layer costs beside its arithmetic",
    tuple(
        _tiny(style, phase)
        for style in (Style.COLUMN, Style.ROW)
        for phase in (Phase.INFERENCE, Phase.RECORDED, Phase.BOTH)
    ),
)
