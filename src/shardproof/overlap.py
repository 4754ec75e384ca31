"""Which sums run while a product is computed: a choice of speed, which never changes a bit."""

from dataclasses import dataclass
from typing import Any

from shardproof.errors import UsageError
from shardproof.quantities import LARGEST, whole_number
from shardproof.wording import shown


@dataclass(frozen=True)
class Overlap:
    """What the layers on an axis do at the same time.

    Attributes:
        backward: the column layer's input gradient is summed over the ranks while the weight
            gradient is computed. None: only where it has been measured to win, which is where the
            transport works by itself meanwhile (torch.distributed; `Transport.is_asynchronous`).
        chunks: into how many parts along the tokens the row layer's forward is cut, so that the
            sum of one part runs while the next one is multiplied; 1 leaves it whole.

    Raises:
        UsageError: `backward` is not True, False or None, or `chunks` no positive whole number.
    """

    backward: bool | None = None
    chunks: int = 1

    def __str__(self) -> str:
        words = {True: ["backward"], False: [], None: ["backward where asynchronous"]}[
            self.backward
        ]
        if self.chunks > 1:
            words.append(f"{self.chunks} chunks")
        return " and ".join(words) or "none"

    def __post_init__(self) -> None:
        if self.backward is not None and not isinstance(self.backward, bool):
            raise UsageError(
                f"Overlap(backward={shown(self.backward)}) is neither True, False nor None. Use "
                "one of them."
            )
        number = whole_number(self.chunks)
        if number is None or not 1 <= number <= LARGEST:
            raise UsageError(
                f"Overlap(chunks={shown(self.chunks)}) is not a positive whole number. Use 1 or "
                "more."
            )
        object.__setattr__(self, "chunks", number)


DEFAULT_OVERLAP = Overlap()

# What users may write instead.
NAMED = {
    "auto": DEFAULT_OVERLAP,
    "on": Overlap(backward=True, chunks=2),
    "off": Overlap(backward=False, chunks=1),
}


def checked_overlap(overlap: Any) -> Overlap:
    """What a user gave as `overlap`: an `Overlap`, or a name of one.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(overlap, Overlap):
        return overlap
    found = NAMED.get(overlap) if isinstance(overlap, str) else None
    if found is None:
        raise UsageError(
            f"overlap={shown(overlap)} is unknown. Use an Overlap, or one of: {', '.join(NAMED)}."
        )
    return found
