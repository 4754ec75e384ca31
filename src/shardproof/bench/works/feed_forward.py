"""The feed-forward block h -> 4h -> h without bias: a training step, and one token of decoding."""

import functools

from torch import Tensor, nn

from shardproof.bench.system import Style
from shardproof.bench.work import Variant, Work
from shardproof.bench.works.step import Block, Phase, Step, linear


class FeedForward(nn.Module):
    """Two linears with a relu between them.

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


def _work(name: str, description: str, block: Block, phase: Phase, steps: int) -> Work:
    make = functools.partial(Step, block=block, phase=phase)
    warm_up = max(1, steps // 4)
    return Work(name, description, (Variant(make, block.needs, steps, warm_up),))


FFN_1024 = _work(
    "ffn-1024",
    "feed-forward 1024 -> 4096 -> 1024, 256 tokens: forward, backward, SGD",
    feed_forward(1024, 256),
    Phase.TRAIN,
    4,
)
FFN_2048 = _work(
    "ffn-2048",
    "feed-forward 2048 -> 8192 -> 2048, 512 tokens: forward, backward, SGD",
    feed_forward(2048, 512),
    Phase.TRAIN,
    2,
)
DECODE_1024 = _work(
    "decode-1024",
    "feed-forward 1024 -> 4096 -> 1024, 1 token: forward",
    feed_forward(1024, 1),
    Phase.INFERENCE,
    100,
)
DECODE_4096 = _work(
    "decode-4096",
    "feed-forward 4096 -> 16384 -> 4096, 1 token: forward",
    feed_forward(4096, 1),
    Phase.INFERENCE,
    10,
)
