"""What no sum can beat: all ranks copy their own bytes, at the same time and for nobody."""

import ctypes
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.bench.system import Party, Style
from shardproof.errors import UsageError


class Copying(Party):
    """A rank that copies. Its `make_sum` sums nothing."""

    adds = False

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """Nothing to cut.

        Raises:
            UsageError: always.
        """
        raise UsageError("memcpy copies bytes and runs no model. Use it with --work all-reduce.")

    def make_sum(self, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
        """A plain copy of `x` to `out`.

        Comm:
            none.
        """

        def copy() -> Tensor:
            ctypes.memmove(out.data_ptr(), x.data_ptr(), x.nbytes)
            return out

        return copy


def join(axis: Axis | None) -> Party:
    """A rank that needs nothing of the others."""
    return Copying(0, 1) if axis is None else Copying(axis.rank, axis.size)
