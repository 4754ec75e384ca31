"""A small drawing of a kind of mistake: what each rank has, what comes of it, what should come."""

from dataclasses import dataclass

from shardproof.checker import mistake_kinds as kinds


@dataclass(frozen=True)
class FaultDrawing:
    """What a drawing shows.

    Attributes:
        ranks: what each rank has.
        result: what comes of it.
        right: what should come of it.
    """

    ranks: tuple[str, ...]
    result: str
    right: str

    def lines(self) -> list[str]:
        """The drawing as text.

        >>> for line in FaultDrawing(("part 0", "part 1"), "part alone", "part 0 + part 1").lines():
        ...     print(line)
        rank 0 [ part 0 ] --+
        rank 1 [ part 1 ] --+--> part alone
                          right: part 0 + part 1
        """
        width = max(map(len, self.ranks))
        drawn = [f"rank {n} [ {each:<{width}} ] --+" for n, each in enumerate(self.ranks)]
        drawn[-1] += f"--> {self.result}"
        drawn.append(f"{'right: ':>{len(drawn[0]) + 4}}{self.right}")
        return drawn


# {r}: the rank; {d}: the number of ranks; {n}: the next rank, from the last to rank 0.
_WORDS: dict[str, tuple[str, str, str]] = {
    kinds.BIAS: ("part {r} + bias", "sum of parts + {d} x bias", "sum of parts + bias"),
    kinds.MISSING_SUM: ("part {r}", "one part alone", "sum of parts"),
    kinds.TWICE: ("whole", "{d} x whole", "whole"),
    kinds.AVERAGED: ("part {r}", "sum of parts / {d}", "sum of parts"),
    kinds.ONE_SHARD: ("slice 0", "slice 0 again and again", "slices 0 to {last}"),
    kinds.SWAPPED: ("blocks b, a of {r}", "b before a", "a before b"),
    kinds.ORDER: ("slice {n}", "slices in another order", "slice r on rank r"),
    kinds.FUSED: ("block {r} of (q k v)", "q, k and v mixed", "q_r, k_r and v_r on rank r"),
    kinds.HEADS: ("features of {r}", "(head_dim, heads)", "(heads, head_dim)"),
    kinds.KEY_VALUE: ("k, v and part {r} of grad", "one part alone", "sum of parts"),
    kinds.REPLICATED: ("weight, part {r} of grad", "one part alone", "sum of parts"),
    kinds.LOSS_AVERAGED: ("loss / {d}", "gradients / {d}", "gradients of the whole batch"),
    kinds.PADDING: ("columns + padding", "softmax over padding too", "softmax over the vocabulary"),
    kinds.NORM: ("norm over {r}", "replicated gradients count {d} times", "each gradient once"),
    kinds.DROPOUT_ALIKE: ("slice {r}, mask a", "one mask for all slices", "a mask for each slice"),
    kinds.DROPOUT_APART: ("whole, mask {r}", "ranks differ", "one mask on all ranks"),
    kinds.POSITIONS: ("heads {r}, slopes 0", "slopes of other heads", "slopes {r} for heads {r}"),
    kinds.LABELS: ("outputs t, labels t+1", "loss of other tokens", "labels of the same tokens"),
    kinds.DECAY: ("weight - 2 x decay", "smaller weights", "weight - decay"),
    kinds.STALE: ("weight of step {r}", "an old weight is used", "the updated weight"),
    kinds.NO_GRADIENT: ("weight, no gradient", "it never changes", "a gradient on each rank"),
    kinds.NOT_FINITE: ("nan", "nan", "numbers"),
    kinds.NOT_DETERMINISTIC: ("run 1 != run 2", "other numbers each time", "the same numbers"),
}


def drawing_of(kind: str | None, degree: int) -> FaultDrawing:
    """The drawing of a kind; of any wrong tensor without one."""
    rank, result, right = _WORDS.get(
        kind or "", ("tensor {r}", "differs from the plain module's", "the plain module's")
    )
    words = {"d": degree, "last": degree - 1}
    return FaultDrawing(
        tuple(rank.format(r=r, n=(r + 1) % degree, **words) for r in range(degree)),
        result.format(r="r", **words),
        right.format(r="r", **words),
    )
