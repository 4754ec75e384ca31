"""Strong scaling: the same step on 1 to 8 ranks, and what each rank computes, holds and sends."""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from shardproof.bench.system import ANY_DEGREE
from shardproof.bench.systems.ours import Ours
from shardproof.bench.work import Variant, Work
from shardproof.bench.works.feed_forward import feed_forward
from shardproof.bench.works.step import Phase, Step

DEGREES = (1, 2, 3, 4, 5, 6, 7, 8)


class CountedStep(Step):
    """A step of which one more is run to count."""

    def figures(self) -> dict[str, float]:
        """Work, memory and bytes of one step on this rank.

        Returns:
            flops: of products, as torch counts them: two for each multiplication and addition.
            parameter_bytes: held.
            peak_bytes: of all tensors that live at the same time, at most; buffers of a kernel
                or a transport are not tensors.
            all_reduces, message_bytes: in the step.
            sent_bytes: that this rank sent, by the ledger.
            formula_bytes: `2 (d - 1) / d` times the message of each all-reduce.
        """
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


class Counting(TorchDispatchMode):
    """Flops of products and bytes of living tensors, of the operations of one thread.

    Args:
        held: tensors that are there before the first operation.

    Attributes:
        flops: so far.
        peak: the most bytes at the end of an operation.
    """

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.flops = 0
        self.peak = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self._see(held)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        found = result if isinstance(result, tuple | list) else (result,)
        self._see([tensor for tensor in found if isinstance(tensor, Tensor)])
        return result

    def _see(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            self._living[reference.cdata] = reference, storage.nbytes()
        gone = [key for key, (reference, _) in self._living.items() if reference.expired()]
        for key in gone:
            del self._living[key]
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))


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
