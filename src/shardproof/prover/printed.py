"""What a notebook prints of a system that is also a case: data, to be shown beside our numbers."""

from dataclasses import dataclass

TWO = 2  # the degree whose ranks a notebook's two devices are


@dataclass(frozen=True)
class Printed:
    """One printed result.

    Attributes:
        label: as the notebook calls it.
        tensor: the tensor of the case that it is about; "" if the case records none.
        shape: that was printed.
        values: that were printed, row by row.
        exact: whether it was equal to autograd's, bit by bit.
        close: whether it passed `allclose`.
        max_diff: its largest difference from autograd's.
        rank: of two ranks, the one whose part it is; None: the whole tensor.
        is_of_two: two ranks made it, and it is put together.
        seed: of the draws on which `values`, `exact` and `max_diff` depend; None: not known.
        section: where in the notebook.
    """

    label: str
    tensor: str = ""
    shape: tuple[int, ...] | None = None
    values: tuple[tuple[float, ...], ...] | None = None
    exact: bool | None = None
    close: bool | None = None
    max_diff: float | None = None
    rank: int | None = None
    is_of_two: bool = False
    seed: int | None = None
    section: str = ""
