"""All works, by name, and those that need no other library."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.counting import Counting
from benchmarks.llama import LLAMA_GENERATE, LLAMA_STEP
from benchmarks.step import Block, Phase, Step, linear
from benchmarks.system import ANY_DEGREE, SUM, Style, SystemRank
from benchmarks.work import Checked, Variant, Work
from shardproof.errors import UsageError

KIB, MIB = 1 << 10, 1 << 20
# Message bytes -> steps in one round at 2 ranks: some milliseconds each, but enough for a p99.
ALL_REDUCE_STEPS = {
    4 * KIB: 400,
    16 * KIB: 300,
    64 * KIB: 300,
    256 * KIB: 150,
    1 * MIB: 60,
    4 * MIB: 20,
    16 * MIB: 6,
    64 * MIB: 3,
}
QUICK_SIZES = (4 * KIB, 64 * KIB, 1 * MIB)
LARGEST_AT_4_RANKS = 1 * MIB


class FeedForward(nn.Module):
    """Two linears h -> 4h -> h with a relu between them, without bias.

    Args:
        hidden: h.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = linear(hidden, 4 * hidden, bias=False)
        self.down = linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, h), Replicate, to (tokens, h), Replicate."""
        y: Tensor = self.down(self.up(x).relu())
        return y


def feed_forward(hidden: int, tokens: int) -> Block:
    """Column, then row: one all-reduce forward and one backward."""
    shape = (tokens, hidden)
    return Block(
        f"feed-forward {hidden} {tokens}",
        functools.partial(FeedForward, hidden),
        {"up": Style.COLUMN, "down": Style.ROW},
        shape,
        shape,
        rate=0.5,
    )


def one_linear(in_features: int, out_features: int, rows: int, style: Style, rate: float) -> Block:
    """A linear with bias; its name in the model is "0"."""
    return Block(
        f"linear {in_features} {out_features} {rows}",
        functools.partial(_sequence, in_features, out_features),
        {"0": style},
        (rows, in_features),
        (rows, out_features),
        rate=rate,
    )


def _sequence(in_features: int, out_features: int) -> nn.Module:
    return nn.Sequential(linear(in_features, out_features, bias=True))


class AllReduce:
    """One rank's sum of a tensor, again and again from the same input.

    Args:
        rank: of the system; one that copies is expected to copy.
        num_bytes: of the message, float32.
    """

    def __init__(self, rank: SystemRank, num_bytes: int) -> None:
        self._layout = rank.layout((num_bytes // 4,), None)
        # Small whole numbers: every order of additions gives the same.
        base = torch.arange(num_bytes // 4).remainder(1000).float()
        x = base * (rank.rank + 1)
        total = rank.size * (rank.size + 1) // 2
        self._expected = base * (total if rank.adds else rank.rank + 1)
        self._size = rank.size
        self.step = rank.make_sum(x, torch.empty_like(x))

    def checked(self) -> Iterator[Checked]:
        """The sum, against whole numbers that are added exactly."""
        yield Checked(f"sum of {self._size}", self.step(), self._layout, self._expected)

    def figures(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}


class CountedStep(Step):
    """A step of which one more is run to count."""

    def figures(self) -> dict[str, float]:
        """Work, memory and bytes of one step on this rank, after one that is not counted.

        What a process does once, such as the products that try the BLAS mode, is not the step's.

        Returns:
            flops: of products: one for each multiplication and one for each addition.
            parameter_bytes: held.
            peak_bytes: of all tensors that live at the same time, at most; buffers of a kernel
                or a transport are not tensors.
            all_reduces, message_bytes: in the step.
            sent_bytes: that this rank sent, by the ledger.
            formula_bytes: `2 (d - 1) / d` times the message of each all-reduce.
        """
        self.step()
        before = self._rank.sent()
        with Counting([*self.model.parameters(), self._x, self._target]) as counted:
            self.step()
        after = self._rank.sent()
        message, degree = after.message_bytes - before.message_bytes, self._rank.size
        return {
            "flops": counted.flops,
            "parameter_bytes": sum(value.nbytes for value in self.model.parameters()),
            "peak_bytes": counted.peak,
            "all_reduces": after.calls - before.calls,
            "message_bytes": message,
            "sent_bytes": after.sent_bytes - before.sent_bytes,
            "formula_bytes": 2 * (degree - 1) * message // degree,
        }


def _work(name: str, description: str, block: Block, phase: Phase, steps: int) -> Work:
    make = functools.partial(Step, block=block, phase=phase)
    return Work(name, description, (Variant(make, block.needs, steps, max(1, steps // 4)),))


def _tiny_linears() -> Iterator[Variant]:
    for style in (Style.COLUMN, Style.ROW):
        block = one_linear(64, 64, 16, style, rate=0.0)
        for phase in (Phase.INFERENCE, Phase.RECORDED, Phase.BOTH):
            yield Variant(
                functools.partial(Step, block=block, phase=phase),
                block.needs,
                steps=400,
                warm_up=100,
                ranks=(1, 2),
                keys={"layer": style.value, "phase": phase.value},
            )


def _all_reduces() -> Iterator[Variant]:
    for num_bytes, steps in ALL_REDUCE_STEPS.items():
        yield Variant(
            functools.partial(AllReduce, num_bytes=num_bytes),
            frozenset({SUM}),
            steps,
            warm_up=max(1, steps // 4),
            ranks=(2, 4) if num_bytes <= LARGEST_AT_4_RANKS else (2,),
            keys={"bytes": num_bytes},
            is_quick=num_bytes in QUICK_SIZES,
        )


WORKS: tuple[Work, ...] = (
    _work(
        "ffn-1024",
        "feed-forward 1024 -> 4096 -> 1024, 256 tokens: forward, backward, SGD",
        feed_forward(1024, 256),
        Phase.TRAIN,
        4,
    ),
    _work(
        "ffn-2048",
        "feed-forward 2048 -> 8192 -> 2048, 512 tokens: forward, backward, SGD",
        feed_forward(2048, 512),
        Phase.TRAIN,
        2,
    ),
    _work(
        "decode-1024",
        "feed-forward 1024 -> 4096 -> 1024, 1 token: forward",
        feed_forward(1024, 1),
        Phase.INFERENCE,
        100,
    ),
    _work(
        "decode-4096",
        "feed-forward 4096 -> 16384 -> 4096, 1 token: forward",
        feed_forward(4096, 1),
        Phase.INFERENCE,
        10,
    ),
    _work(
        "linear-row",
        "linear 1024 -> 608, batch 32: input cut, output summed, input gradient gathered; step",
        one_linear(1024, 608, 32, Style.ROW_SCATTERED, rate=0.3),
        Phase.TRAIN,
        60,
    ),
    _work(
        "linear-column",
        "linear 1024 -> 608, batch 32: output gathered, input gradient summed; step",
        one_linear(1024, 608, 32, Style.COLUMN_GATHERED, rate=0.3),
        Phase.TRAIN,
        60,
    ),
    Work(
        "all-reduce",
        "one sum over the ranks, float32, 4 KiB to 64 MiB",
        tuple(_all_reduces()),
        yardstick="memcpy",
        section="all_reduce",
    ),
    Work(
        "layer-overhead",
        "a 64 x 64 linear, batch 16: what a layer costs beside its arithmetic",
        tuple(_tiny_linears()),
    ),
    Work(
        "scaling",
        "feed-forward 1024 -> 4096 -> 1024, 256 tokens, a step on 1 to 8 ranks",
        (
            Variant(
                functools.partial(CountedStep, block=feed_forward(1024, 256), phase=Phase.TRAIN),
                feed_forward(1024, 256).needs | {ANY_DEGREE},
                steps=3,
                warm_up=1,
                ranks=tuple(range(1, 9)),
            ),
        ),
        usual=("native-threads", "invariant-threads"),
        quick_ranks=(1, 2, 4),
    ),
    LLAMA_STEP,
    LLAMA_GENERATE,
)


def find_work(name: str) -> Work:
    """The work of a name.

    Raises:
        UsageError: there is none; names all.
    """
    for work in WORKS:
        if work.name == name:
            return work
    names = ", ".join(work.name for work in WORKS)
    raise UsageError(f"there is no work {name!r}. Use one of: {names}.")
