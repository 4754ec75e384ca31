"""What every cut module has: plain local parameters, a Layout for each, state that carries both.

Not a layer itself. A parameter here is an ordinary `nn.Parameter` with the local shape; what it is
a part of stands in `layouts`.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from shardproof.axis import Axis, checked_axis
from shardproof.checked_objects import checked_device, checked_dtype, plain_words
from shardproof.checked_values import LARGEST, checked_name, whole_number
from shardproof.errors import LayoutError, ShapeError, UsageError
from shardproof.layers import guard, registry
from shardproof.layers.init_guard import passes_over
from shardproof.leaves import Cut, Layout, check_degree
from shardproof.numerics import mode
from shardproof.numerics.random import draw_uniform
from shardproof.scheme import Scheme, checked_scheme
from shardproof.wording import TEXT, short_repr

_STATE = "_extra_state"


def is_ours(module: nn.Module) -> bool:
    """Whether the class of a module is one of this package."""
    return type(module).__module__.startswith("shardproof.")


class OwnParameter:
    """A parameter of a layer of ours, as reading its attribute gives it.

    Where a model is cut by names, `reads` of the layer gives the model's own code a cut tensor in
    its place. The layer itself computes with `_parameters`.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        parameter = module._parameters.get(self._name, self)
        if parameter is self:  # nn.Module says what is missing
            raise AttributeError(self._name)
        reads = module.__dict__.get("reads")
        return parameter if reads is None else reads(module, self._name, parameter)


def own(module: Any, name: str) -> Any:
    """What a layer of ours computes with: its parameter, or what a parametrization makes of it.

    Args:
        module: the layer.
        name: of the parameter.
    """
    parameter = module._parameters.get(name, module)
    return getattr(module, name) if parameter is module else parameter


class ShardedModule(nn.Module):
    """Base of modules whose parameters are cut over one axis.

    Attributes:
        axis: the axis over which the parameters are cut.
        name: how messages call the module; also keys its initialisation.
        scheme: leaves, numerics, seed.
        layouts: parameter name -> Layout.
    """

    def __init__(self, *, axis: Axis, name: str | None, scheme: Scheme) -> None:
        super().__init__()
        axis, scheme = checked_axis(axis), checked_scheme(scheme)
        check_degree(axis.size, scheme.leaves)
        self.axis = axis
        self.scheme = scheme
        kind = type(self).__name__
        self.name = axis.next_name(kind) if name is None else checked_name(name, "name")
        self.layouts: dict[str, Layout] = {}
        guard.watch(self)

    def _cut(self, size: int) -> Cut:
        return Cut(size, self.scheme.leaves, self.axis.size)

    def _sizes(self, what: str, **sizes: Any) -> tuple[int, ...]:
        """The sizes as ints, in order; raise unless all of them are sizes of a layer."""
        numbers = tuple(whole_number(size) or 0 for size in sizes.values())
        if all(1 <= number <= LARGEST for number in numbers):
            return numbers
        words = " and ".join(f"{name}={short_repr(size)}" for name, size in sizes.items())
        raise ShapeError(
            f"{self.name!r} ({type(self).__name__}) with {words}: {what} that is cut needs at "
            f"least one of each, as whole numbers, and at most {LARGEST}."
        )

    def _layout(
        self,
        shape: tuple[int, ...],
        dim: int | None = None,
        cut: Cut | None = None,
        held: range | None = None,
    ) -> Layout:
        if dim is None:
            return Layout(shape, self.axis.rank)
        return Layout(shape, self.axis.rank, dim, cut or self._cut(shape[dim]), held)

    def _add_parameter(
        self, name: str, layout: Layout, device: Any = None, dtype: Any = None
    ) -> None:
        device, dtype = checked_device(device), checked_dtype(dtype)
        data = torch.empty(layout.local_shape, device=device, dtype=dtype)
        # The parameter first: the guard of another thread may look at any moment.
        self.register_parameter(name, nn.Parameter(data))
        self.layouts[name] = layout

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's; assignment and `load_state_dict(assign=True)` come here too."""
        registry.remember(self)  # an optimizer may have what is replaced here
        super().register_parameter(name, param)
        registry.note_change()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch's; behind `to`, `half` and `to_empty`, which may replace parameters."""
        registry.remember(self)
        applied = super()._apply(fn, recurse)
        registry.note_change()
        return applied

    def parameters_with_layouts(self) -> Iterator[tuple[str, nn.Parameter, Layout]]:
        """Name, parameter and layout of every parameter that has a layout.

        Raises:
            UsageError: one of them is no longer a parameter of this module itself.
        """
        record = registry.record_of(self)
        for name, layout in record.layouts.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                raise UsageError(
                    f"{record.name!r} ({type(self).__name__}) holds a part of {name!r} and no "
                    "longer has it as a parameter of its own (parametrize and weight_norm take "
                    "it away): nothing says how what came in its place is cut. Remove the "
                    "parametrization, or leave this layer out of the plan."
                )
            yield name, parameter, layout

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """As of torch.

        Raises:
            UsageError: `fn` fills plain layers and would pass over this one.
        """
        for plain, cut in self._small_ones():
            if passes_over(fn, plain, cut):
                raise UsageError(
                    f"the function given to apply fills nn.{type(plain()).__name__} and passes "
                    f"over {self.name!r} ({type(self).__name__}), which has taken the place of "
                    "one. Apply it before the model is cut; or cut the model on the meta device "
                    "and call shardproof.initialize(model); or let the function call "
                    "reset_parameters() of cut layers."
                )
        return super().apply(fn)

    def _small_ones(self) -> Iterator[tuple[Callable[[], nn.Module], Callable[[], nn.Module]]]:
        """How to make the plain layer that this one stands for, and this one, both small."""
        yield from ()

    @torch.no_grad()
    def _draw(self, parameter: str, bound: float) -> None:
        """Fill a parameter leaf by leaf from U(-bound, bound), keyed by (seed, name, leaf)."""
        shard = self.get_parameter(parameter)
        layout = self.layouts[parameter]
        if shard.is_meta:
            return
        for leaf, shape, pieces in layout.held_leaves():
            values = draw_uniform(
                shape,
                -bound,
                bound,
                seed=self.scheme.seed,
                name=f"{self.name}.{parameter}",
                leaf=leaf,
                dtype=shard.dtype,
                device=shard.device,
            )
            for where, part in pieces:
                shard[where].copy_(values[part])

    def get_extra_state(self) -> dict[str, Any]:
        """Layout of every parameter and the contract; plain data."""
        record = registry.record_of(self)
        return {
            "degree": record.axis.size,
            "rank": record.axis.rank,
            "layouts": {name: layout.state() for name, layout in record.layouts.items()},
            "contract": self._contract(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Warn if the state was made under another contract; layouts were checked before."""
        if state["contract"] != self._contract():
            warnings.warn(
                f"the state of {registry.record_of(self).name!r} was saved under the contract "
                f"{short_repr(state['contract'])}, this process has {self._contract()!r}: the "
                "values are right, further bits may differ.",
                stacklevel=2,
            )

    def _contract(self) -> str:
        parameter = next(self.parameters())
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        return mode.contract(registry.record_of(self).scheme, parameter.dtype, device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Before anything is copied: a shard of another rank may well have the same shape.
        self._check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raise unless the state is of this very layout.

        Parameters without a layout beside them may be another rank's, whatever their shape: they
        are taken only where there is one rank.
        """
        mine, record = self.get_extra_state(), registry.record_of(self)
        if prefix + _STATE not in state_dict:
            for name, layout in record.layouts.items():
                value = state_dict.get(prefix + name)
                if not isinstance(value, Tensor):
                    continue
                if record.axis.size > 1 or tuple(value.shape) != layout.local_shape:
                    raise LayoutError(
                        f"cannot load {prefix + name!r} of shape {tuple(value.shape)} into "
                        f"{record.name!r} on {record.axis}, which holds {layout.local_shape} of "
                        f"{layout.shape}: the state has no layout. Load the state that this rank "
                        f"saved, with its {_STATE!r}; or load plain state into the plain module "
                        "and cut that with from_linear or parallelize."
                    )
            return
        state = state_dict[prefix + _STATE]
        if not isinstance(state, dict) or not set(mine) <= set(state):
            raise LayoutError(
                f"cannot load {prefix + _STATE!r} into {record.name!r} on {record.axis}: it is no "
                f"layout but {short_repr(state)}. Load the state that this rank saved."
            )
        for key in ("degree", "rank", "layouts"):
            if plain_words(state[key]) != plain_words(mine[key]):
                raise LayoutError(
                    f"cannot load the state of {prefix.rstrip('.') or record.name!r} into "
                    f"{record.axis}: its {key} is {_detailed(state[key])}, here it is {mine[key]}. "
                    "Load the state that this rank saved at this degree, with the same leaves."
                )
        if not isinstance(state["contract"], str):
            raise LayoutError(
                f"cannot load {prefix + _STATE!r} into {record.name!r} on {record.axis}: its "
                f"contract is {short_repr(state['contract'])}, which is not text. Load the state "
                "that this rank saved."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        guard.watch(self)  # a deep copy comes this way, not through __init__


def _detailed(value: Any) -> str:
    """A layout in full, as far as a message bears it: where two differ may be at their end."""
    words = plain_words(value)
    return short_repr(value) if words is None or len(words) > TEXT else str(value)


def check_state(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raise unless the state fits every cut module of `model`: a hook to run before any is loaded.

    Args:
        model: whose state it is to become.
        state_dict: of the model, possibly among others'.
        prefix: of the model's names in it.

    Raises:
        LayoutError: the state of a module has another layout.
    """
    for name, module in model.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(module, ShardedModule):
            module._check_state(state_dict, f"{name}." if name else "")
