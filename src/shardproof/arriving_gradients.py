"""`Arrivals`: when each gradient of a backward is complete, and whether it stays as it is."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch import Tensor, nn

Take = Callable[[int, Tensor | None], None]


class _State(NamedTuple):
    """A gradient, and what changes when somebody writes into it."""

    grad: Tensor | None = None
    version: int = 0


class Arrivals:
    """The gradients that one backward gives to parameters, in the order in which they come.

    torch calls a hook when it has added a gradient to a parameter. That is once in a backward,
    unless a backward runs inside of it, as in reentrant checkpoints. Code of users may change a
    gradient even later. Both are seen.

    Args:
        named: name and parameter, for each that requires a gradient.
        wanted: places of the parameters whose gradients are taken as they come.
        take: called with the place of such a parameter, and with its gradient.

    Attributes:
        taken: the places for which `take` was called.
        late: places of the parameters whose gradient came again, or changed, after it had come.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], wanted: Collection[int], take: Take
    ) -> None:
        self.taken: set[int] = set()
        self.late: set[int] = set()
        self._named = named
        self._wanted = frozenset(wanted)
        self._take = take
        self._states: dict[int, _State] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A block with one backward."""
        with ExitStack() as stack:
            for place, (_, parameter) in enumerate(self._named):
                handle = parameter.register_post_accumulate_grad_hook(self._hook(place))
                stack.callback(handle.remove)
            yield
        for place, (_, parameter) in enumerate(self._named):
            then, now = self._states.get(place, _State()), _state(parameter)
            if now.grad is not then.grad or now.version != then.version:
                self.late.add(place)

    def _hook(self, place: int) -> Callable[[Tensor], None]:
        def arrive(parameter: Tensor) -> None:
            if place in self._states:
                self.late.add(place)
                return
            if place in self._wanted:
                self.taken.add(place)
                self._take(place, parameter.grad)
            # Read after it was taken: adding it to others may write into it.
            self._states[place] = _state(parameter)

        return arrive


def _state(parameter: Tensor) -> _State:
    grad = parameter.grad
    return _State(grad, 0 if grad is None else grad._version)
