"""`Bucket`: gradients of one dtype and device that are sent together."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.index_runs import runs_up_to
from shardproof.numerics.precision import node_dtype

LOSS = -1  # the place of the loss, behind those of all parameters


@dataclass(frozen=True)
class Bucket:
    """Gradients that are sent together, flat and one after the other.

    Attributes:
        name: for messages.
        places: of the parameters, or LOSS.
        sizes: number of elements of each.
        dtype, device: of the nodes.
    """

    name: str
    places: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        """The values of a node; zeros for what took no part.

        Args:
            parts: for each place, its tensor; a single one is not copied.
        """
        flat = [
            torch.zeros(size, dtype=self.dtype, device=self.device)
            if part is None
            else part.reshape(-1).to(self.dtype)
            for part, size in zip(parts, self.sizes, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat)


def loss_bucket(dtype: torch.dtype, device: torch.device) -> Bucket:
    """The bucket of the loss alone."""
    return Bucket("the loss", (LOSS,), (1,), dtype, device)


def buckets_of(
    named: Sequence[tuple[str, Tensor]], places: Iterable[int], most_bytes: int
) -> Iterator[Bucket]:
    """The gradients of some parameters as buckets, in reverse order of the parameters.

    Args:
        named: name and parameter, for each that requires a gradient.
        places: of the parameters that are sent.
        most_bytes: of a bucket; a larger gradient is a bucket by itself.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place in sorted(places, reverse=True):
        parameter = named[place][1]
        kinds.setdefault((node_dtype(parameter.dtype), parameter.device), []).append(place)
    for (dtype, device), alike in kinds.items():
        sizes = [named[place][1].numel() for place in alike]
        for run in runs_up_to(sizes, most_bytes // dtype.itemsize):
            at = slice(run.start, run.stop)
            first, last = named[alike[run.start]][0], named[alike[run.stop - 1]][0]
            name = f"gradients of {first}" + ("" if first == last else f" to {last}")
            yield Bucket(name, tuple(alike[at]), tuple(sizes[at]), dtype, device)
