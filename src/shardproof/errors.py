"""Every exception shardproof raises on purpose.

ShardproofError
|-- ShapeError    (ValueError)    a tensor or a size is not what the layer or the case takes
|-- DegreeError   (ValueError)    a degree that the leaves cannot serve
|-- PlanError     (ValueError)    a plan does not fit the model
|-- LayoutError   (ValueError)    state of one layout is loaded into another
|-- UsageError    (ValueError)    an option or a name that does not exist
|-- NumericsError (RuntimeError)  this process cannot promise the bits that were asked for
|-- AxisError     (RuntimeError)  the environment, a mesh or a process group is missing or at odds
|-- MismatchError (RuntimeError)  the ranks disagree about one collective
|-- CheckError    (RuntimeError)  an operation on cut tensors differs from the same on whole ones
`-- RankError     (RuntimeError)  a rank raised, was killed, left early or did not come
"""


class ShardproofError(Exception):
    """Base class: catch this to catch everything shardproof raises on purpose."""


class ShapeError(ShardproofError, ValueError):
    """A tensor does not have the promised shape, or a size makes no sense."""


class DegreeError(ShardproofError, ValueError):
    """A degree that the leaves of a plan cannot serve."""


class PlanError(ShardproofError, ValueError):
    """A plan names a module that the model does not have, or that cannot be cut."""


class LayoutError(ShardproofError, ValueError):
    """State that was saved with one layout is loaded into another."""


class UsageError(ShardproofError, ValueError):
    """An option, a name or a path that cannot be used."""


class NumericsError(ShardproofError, RuntimeError):
    """This process cannot promise the bits that were asked for."""


class AxisError(ShardproofError, RuntimeError):
    """The environment, a mesh or a process group is missing or inconsistent."""


class MismatchError(ShardproofError, RuntimeError):
    """The ranks of an axis disagree about one collective."""


class CheckError(ShardproofError, RuntimeError):
    """An operation on cut tensors gives another result than the same on whole tensors.

    `operation` is its name, and `line` is the line of the model's code that called it.
    """

    def __init__(self, message: str, *, operation: str = "", line: str = "") -> None:
        super().__init__(message)
        self.operation = operation
        self.line = line


class RankError(ShardproofError, RuntimeError):
    """A rank raised, was killed, left early or did not come.

    `rank` is the rank that is to blame, or None if it is not known.
    """

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[object, ...]:
        return (_rank_error, (str(self), self.rank))


def _rank_error(message: str, rank: int | None) -> RankError:
    return RankError(message, rank=rank)
