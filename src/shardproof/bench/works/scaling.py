"""Strong scaling: the same step on 1 to 8 ranks, and what each rank computes, holds and sends."""

import functools

from shardproof.bench.system import ANY_DEGREE
from shardproof.bench.systems.ours import Ours
from shardproof.bench.work import Variant, Work
from shardproof.bench.works.counting import Counting
from shardproof.bench.works.feed_forward import feed_forward
from shardproof.bench.works.step import Phase, Step

DEGREES = (1, 2, 3, 4, 5, 6, 7, 8)


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
        sent = self._sent()
        with Counting([*self.model.parameters(), self._x, self._target]) as counted:
            self.step()
        after = self._sent()
        calls, message, moved = (b - a for a, b in zip(sent, after, strict=True))
        degree = self._party.size
        return {
            "flops": counted.flops,
            "parameter_bytes": sum(value.nbytes for value in self.model.parameters()),
            "peak_bytes": counted.peak,
            "all_reduces": calls,
            "message_bytes": message,
            "sent_bytes": moved,
            "formula_bytes": 2 * (degree - 1) * message // degree,
        }

    def _sent(self) -> tuple[int, int, int]:
        """Collectives, message bytes and sent bytes of steps so far."""
        if not isinstance(self._party, Ours):
            return 0, 0, 0
        counts = [
            count
            for direction, _, count in self._party.axis.transport.ledger
            if direction in ("forward", "backward")
        ]
        return (
            sum(count.calls for count in counts),
            sum(count.message_bytes for count in counts),
            sum(count.sent_bytes for count in counts),
        )


SCALING = Work(
    "scaling",
    "feed-forward 1024 -> 4096 -> 1024, 256 tokens, a step on 1 to 8 ranks",
    (
        Variant(
            functools.partial(CountedStep, block=feed_forward(1024, 256), phase=Phase.TRAIN),
            feed_forward(1024, 256).needs | {ANY_DEGREE},
            steps=3,
            warm_up=1,
            ranks=DEGREES,
        ),
    ),
    usual=("native-threads", "invariant-threads"),
    quick_ranks=(1, 2, 4),
)
