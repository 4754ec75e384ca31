"""What plain PyTorch computed: tensors in files, of which a rank reads only its own part.

The runs happen before the ranks start, outside of them, and are exempt from the memory rule. Two
of them: `PRECISE` in fp64, and `PLAIN` as the case is written, from the same numbers. Files and
numbers only: nothing here runs a model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardproof.errors import ShapeError
from shardproof.leaves import Layout
from shardproof.wording import dtype_name

PLAIN, PRECISE = "plain", "fp64"
_MANIFEST = "manifest.json"
_INTEGERS = {torch.bfloat16: torch.int16}  # dtypes that numpy lacks travel as integers


class ReferenceWriter:
    """Leaves the tensors of one run in a directory: one file of raw bytes each, and a list.

    Raw, for ranks as threads read at the same time: numpy parses the head of an .npy file with
    `ast.literal_eval`, which fails now and then when threads of CPython 3.11 call it together.

    Attributes:
        activation_bytes: of the largest activation that was seen; read by `ReferenceReader`.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._entries: dict[str, dict[str, Any]] = {}
        self._asides: dict[str, dict[str, Any]] = {}
        self.activation_bytes = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Keep one tensor."""
        self._entries[name] = self._keep(tensor)

    def set_aside(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor that no rank records, but that others are judged by."""
        self._asides[name] = self._keep(tensor)

    def _keep(self, tensor: Tensor) -> dict[str, Any]:
        file = f"{len(self._entries) + len(self._asides):04d}.bin"
        dtype = dtype_name(tensor.dtype)
        _as_numpy(tensor.detach().cpu().contiguous()).tofile(self._directory / file)
        return {"file": file, "dtype": dtype, "shape": list(tensor.shape)}

    def close(self) -> None:
        """Write the list of what is there."""
        manifest = {
            "activation_bytes": self.activation_bytes,
            "tensors": self._entries,
            "asides": self._asides,
        }
        (self._directory / _MANIFEST).write_text(json.dumps(manifest))


class ReferenceReader:
    """Reads what a `ReferenceWriter` left; safe for many ranks at once."""

    def __init__(self, directory: Path) -> None:
        manifest = json.loads((directory / _MANIFEST).read_text())
        self._directory = directory
        self._entries: dict[str, dict[str, Any]] = manifest["tensors"]
        self._asides: dict[str, dict[str, Any]] = manifest["asides"]
        self.activation_bytes: int = manifest["activation_bytes"]

    def names(self) -> tuple[str, ...]:
        """The tensors that are there, in execution order."""
        return tuple(self._entries)

    def has_aside(self, name: str) -> bool:
        """True if a tensor of this name was set aside."""
        return name in self._asides

    def misfit(self, name: str, layout: Layout, dtype: torch.dtype) -> str:
        """How a tensor's shape or dtype differs from plain torch's; "" if neither does."""
        entry, ours = self._entries[name], dtype_name(dtype)
        shape = tuple(entry["shape"])
        if shape != layout.shape:
            hint = " (if it is sharded: gather it, or give its layout)"
            return (
                f"its shape is {layout.shape}, plain torch's {shape}"
                f"{hint if layout.is_replicated else ''}"
            )
        if entry["dtype"] != ours:
            return f"its dtype is {ours}, plain torch's {entry['dtype']}"
        return ""

    def read(self, name: str, layout: Layout) -> Tensor:
        """The part of one tensor that a rank owns, as a copy; no more is read from the file.

        Args:
            name: as it was written or set aside.
            layout: how the tensor lies on the rank.

        Raises:
            ShapeError: the tensor has another shape than the layout says.
        """
        entry = self._entries[name] if name in self._entries else self._asides[name]
        if tuple(entry["shape"]) != layout.shape:
            raise ShapeError(
                f"tensor {name!r} has shape {layout.shape} on the ranks together and "
                f"{tuple(entry['shape'])} in plain torch. Record both with the same global shape; "
                f"an output that is sharded needs a layout that says so, or gather_output=True."
            )
        dtype = getattr(torch, entry["dtype"])
        part = torch.empty(layout.owned_shape, dtype=dtype, device="cpu")
        if part.numel():
            target = _as_numpy(part)
            file = self._directory / entry["file"]
            mapped = np.memmap(file, target.dtype, mode="r", shape=layout.shape)
            if layout.dim is None:
                target[...] = mapped
                return part
            before, start = (slice(None),) * layout.dim, 0
            for run in layout.owned_runs:
                stop = start + len(run)
                target[(*before, slice(start, stop))] = mapped[
                    (*before, slice(run.start, run.stop))
                ]
                start = stop
        return part


def _as_numpy(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The same memory for numpy; dtypes that it lacks as integers."""
    return tensor.view(_INTEGERS.get(tensor.dtype, tensor.dtype)).numpy()


@dataclass(frozen=True)
class Reference:
    """Where the two runs of one case lie.

    Attributes:
        directory: private to this proof; has one directory for each run.
    """

    directory: Path

    def plain(self) -> ReferenceReader:
        """The run as the case is written."""
        return ReferenceReader(self.directory / PLAIN)

    def precise(self) -> ReferenceReader:
        """The fp64 run."""
        return ReferenceReader(self.directory / PRECISE)
