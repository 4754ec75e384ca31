"""`Watching`: the dispatch mode that runs a forward on wrapped tensors and follows the labels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shardproof.watching import contractions, lookups, norm_rules
from shardproof.watching.atoms import Labels, distinct
from shardproof.watching.factors import Factors, compress, varying
from shardproof.watching.kinds import is_random, is_view, kind_of, name_of, written_arguments
from shardproof.watching.labelled import Labelled, insides
from shardproof.watching.moving import expanded, move
from shardproof.watching.record import Record
from shardproof.watching.rules import RULES, see_all

# Importing these modules registers their rules.
RULE_MODULES = (contractions, lookups, norm_rules)

MOST_KNOWN = 1 << 20  # most elements of a tensor whose values are computed
MOST_WRITTEN = 1 << 24  # most elements of a tensor that is written through a view
SHAPED_BY_DATA = frozenset((
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "repeat_interleave",
))  # fmt: skip
INDEXED = frozenset(("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"))

PICKED = frozenset(("index", "index_select", "_unsafe_index"))


class Watching(TorchDispatchMode):
    """A dispatch mode that intercepts every operation of a watched forward.

    Args:
        record: filled with the labels and operations of the forward.
        parameters: labelled parameters, by the id of the plain ones.
        on_meta: whether the wrapped tensors lie on the meta device; else on the CPU.
        leaves_last: whether an unknown mask leaves out the last index of each dim.
    """

    def __init__(
        self,
        record: Record,
        parameters: Mapping[int, Labelled],
        *,
        on_meta: bool,
        leaves_last: bool = False,
    ) -> None:
        super().__init__()
        self.record, self.on_meta, self.leaves_last = record, on_meta, leaves_last
        self._adopted: dict[int, tuple[Tensor | None, Labelled]] = {
            key: (None, each) for key, each in parameters.items()
        }
        self._spoiled: dict[int, Tensor] = {}  # storages whose values are no longer known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation."""
        args, kwargs = tree_map(self.adopt, (args, kwargs or {}))
        name = name_of(func)
        if name == "_fused_sdp_choice":
            return 0  # plain matrix products and a softmax, which have rules
        if name in INDEXED:
            indices = [index for each in args[1] for index in self._places(each)]
            args = (args[0], indices, *args[2:])
        out, values = self._run(func, name, args, kwargs)
        return self._label(func, name, args, kwargs, out, values)

    def adopt(self, each: Any) -> Any:
        """The labelled tensor of a plain one: that of a parameter, or a new one without labels."""
        if not isinstance(each, Tensor) or isinstance(each, Labelled):
            return each
        if id(each) not in self._adopted:
            self._adopted[id(each)] = (each, self.plain(each))
        return self._adopted[id(each)][1]

    def take(self, each: Any) -> Any:
        """The labelled tensor of an input of the forward."""
        labelled = self.adopt(each)
        if isinstance(labelled, Labelled) and labelled is not each:
            labelled.is_data = True
        return labelled

    def plain(self, each: Tensor) -> Labelled:
        """Wrap a copy of a plain tensor, without labels; the original is never written."""
        each = each.detach()
        if not self.on_meta:
            real = torch.zeros_like(each, device="cpu") if each.is_meta else each.cpu().clone()
            return Labelled(real)
        is_known = not each.is_meta and each.numel() <= MOST_KNOWN
        value = each.cpu().clone() if is_known else None
        return Labelled(_shell(each if value is None else value), value=value)

    def value(self, each: Labelled) -> Tensor | None:
        """The values of the elements, if they are still known."""
        if each.value is None or each.value.untyped_storage().data_ptr() in self._spoiled:
            return None
        return each.value

    def _places(self, each: Labelled | None) -> tuple[Labelled | None, ...]:
        """An index as integer tensors, one per dim; an unknown mask picks everything."""
        if each is None or each.dtype not in (torch.bool, torch.uint8):
            return (each,)
        mask = self.value(each) if self.on_meta else each.inside
        if mask is None:
            mask = self._everywhere(each)
        places = mask.nonzero()
        columns = [self.plain(column) for column in places.unbind(1)]
        return tuple(columns)

    def _everywhere(self, each: Labelled) -> Tensor:
        """The assumed value of an unknown mask: all true, or all but the last of each dim."""
        mask = torch.ones(each.shape, dtype=torch.bool, device="cpu")
        if self.leaves_last:
            for dim, size in enumerate(each.shape):
                mask.narrow(dim, size - 1, 1 if size > 1 else 0).zero_()
        return mask

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Run on the wrapped tensors; return the result and its values, or None."""
        if not self.on_meta:
            return func(*insides(args), **insides(kwargs)), None
        if name == "_local_scalar_dense":
            return self._number(args[0]), None
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Labelled)]
        values = [self.value(each) for each in tensors]
        is_known = not is_random(func) and all(value is not None for value in values)
        is_small = sum(each.numel() for each in tensors) <= MOST_KNOWN
        if is_known and is_small and name in SHAPED_BY_DATA:
            return self._by_value(func, args, kwargs)
        if name == "nonzero":
            places = self._everywhere(args[0]).nonzero()
            self.record.guesses += 1
            return places.to("meta"), places
        if name == "equal":
            return self._is_equal(args)
        if name == "_grouped_mm":  # takes only bfloat16 on the meta device
            x, w = insides(args[:2])
            return x.new_empty((*x.shape[:-1], w.shape[-1])), None
        out = func(*insides(args), **_on(insides(kwargs), "meta"))
        outs = [each for each in tree_flatten(out)[0] if isinstance(each, Tensor)]
        if is_known and is_small and sum(each.numel() for each in outs) <= MOST_KNOWN:
            return self._by_value(func, args, kwargs)
        self._spoil(func, args, kwargs)
        return out, None

    def _is_equal(self, args: Any) -> tuple[bool, None]:
        left, right = (self.value(each) for each in args[:2])
        if left is None or right is None:
            self.record.guesses += 1
            return False, None
        return torch.equal(left, right), None

    def _number(self, each: Labelled) -> Any:
        """A number that the forward reads; zero if it depends on parameters."""
        value = self.value(each)
        if value is not None:
            return value.item()
        self.record.guesses += 1
        return torch.zeros((), dtype=each.dtype, device="cpu").item()

    def _by_value(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Run on values; the result on the meta device has their shapes."""
        plain = tree_map(lambda e: self.value(e) if isinstance(e, Labelled) else e, (args, kwargs))
        values = func(*plain[0], **_on(plain[1], "cpu"))
        return tree_map(lambda e: _shell(e) if isinstance(e, Tensor) else e, values), values

    def _spoil(self, func: Any, args: Any, kwargs: Any) -> None:
        """Forget the values of a tensor that is written with unknown values, and of its views."""
        for place in written_arguments(func):
            target = args[place] if place < len(args) else kwargs.get("out")
            if isinstance(target, Labelled) and target.value is not None:
                self._spoiled[target.value.untyped_storage().data_ptr()] = target.value

    def _label(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, values: Any) -> Any:
        """Give the result its labels."""
        flat = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Labelled)]
        self.record.used.update(each.parameter for each in flat if each.parameter)
        outs, spec = tree_flatten(out)
        tensors = [each for each in outs if isinstance(each, Tensor)]
        factors: list[Factors] = [() for _ in tensors]
        if any(each.factors for each in flat):
            factors = self._factors(func, name, args, kwargs, tensors, flat)
        places = written_arguments(func)
        if places:
            target = args[places[0]] if places[0] < len(args) else kwargs.get("out")
            if isinstance(target, Labelled):
                target.is_data = any(each.is_data for each in flat)
                if target.sources:
                    target.sources = self._sources(func, target, factors[0])
                self._write(target, factors[0] if factors else ())
                return target if len(outs) == 1 else tree_unflatten([target, *outs[1:]], spec)
            return tree_map(self.adopt, out)
        results = self._wrap(func, args, kwargs, outs, (factors, values, flat))
        return tree_unflatten(results, spec)

    def _factors(
        self, func: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor], flat: Any
    ) -> list[Factors]:
        """Factors of every output, by the operation's rule."""
        if any(out.numel() == 0 for out in outs) and len(outs) == 1:
            return [() for _ in outs]
        kind = kind_of(func)
        if kind == "move" and (isinstance(args[0], Labelled) or name in ("cat", "stack")):
            return move(func, args, kwargs, outs, self.record)
        rule = RULES.get(name) or RULES.get(f"kind:{kind}")
        if rule is None:
            self.record.unknown[name] = self.record.unknown.get(name, 0) + 1
            see_all((args, kwargs), f"{name} (no rule)", self.record)
            return [() for _ in outs]
        factors = rule(func, args, kwargs, outs, self.record)
        return [*factors, *(() for _ in outs[len(factors) :])]

    def _wrap(self, func: Any, args: Any, kwargs: Any, outs: list[Any], what: Any) -> list[Any]:
        """Outputs as labelled tensors."""
        factors, values, flat = what
        value_by_place = tree_flatten(values)[0] if values is not None else [None] * len(outs)
        is_data = any(each.is_data for each in flat)
        parameter = next((each.parameter for each in flat if each.parameter and not is_data), None)
        if name_of(func) in PICKED and args[0].parameter and args[0].dim() > 2:
            parameter = args[
                0
            ].parameter  # matrices that data picks (experts) still count as parameters
        results, number = [], 0
        for place, each in enumerate(outs):
            if not isinstance(each, Tensor):
                results.append(each)
                continue
            labels = factors[number]
            result = Labelled(
                each, labels, value=value_by_place[place], parameter=parameter, is_data=is_data
            )
            if parameter and isinstance(args[0], Labelled) and args[0].sources:
                result.sources = self._sources(func, args[0], labels)
            self.record.lay_out(labels, name_of(func), is_parameter=parameter is not None)
            if is_view(func) and isinstance(args[0], Labelled):
                which = place if len(outs) > 1 else None
                result.origin = (args[0], func, args[1:], kwargs, which)
            results.append(result)
            number += 1
        return results

    def _sources(self, func: Any, x: Labelled, labels: Factors) -> tuple[int, ...]:
        """For each factor of a result, the parameter's dim it comes from; empty if not known."""
        if kind_of(func) == "move" and name_of(func) not in ("cat", "stack"):
            if len(labels) == len(x.factors):
                return x.sources
        elif name_of(func) not in PICKED:  # the same dims, in some order
            places = dict(zip(map(varying, x.factors), x.sources, strict=True))
            dims = [places.get(varying(factor)) for factor in labels]
            is_clear = len(places) == len(x.factors) and None not in dims
            return tuple(each for each in dims if each is not None) if is_clear else ()
        sources, left = [], list(zip(x.sources, x.factors, strict=True))
        for factor in labels:  # some dims were removed; the others keep their labels
            units = distinct(self.record.atoms.roots(factor))
            while left and not np.array_equal(units, distinct(self.record.atoms.roots(left[0][1]))):
                left.pop(0)
            if not left:
                return ()
            sources.append(left.pop(0)[0])
        return tuple(sources)

    def _write(self, target: Labelled, factors: Factors) -> None:
        """Give a written tensor, and the base of a view, the labels of the written values."""
        target.factors = tuple(factors)
        if target.origin is None or not factors:
            return
        base, func, args, kwargs, which = target.origin
        if base.numel() > MOST_WRITTEN:
            for factor in factors:
                self.record.see("gather", "write into a view", factor)
            return
        zero = np.zeros((1,) * base.dim(), dtype=np.int64)
        array = expanded(base.factors[0] if base.factors else zero, base.shape).clone()
        view = func(array, *insides(args), **insides(kwargs))
        view = view if which is None else view[which]
        view.copy_(expanded(factors[0], view.shape))
        small: Labels | None = compress(array.numpy(), self.record)
        self._write(base, () if small is None else (small,))


def _shell(each: Tensor) -> Tensor:
    """A meta tensor with the same shape and strides."""
    return torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta")


def _on(kwargs: dict[str, Any], device: str) -> dict[str, Any]:
    """The named arguments with `device` replaced."""
    if kwargs.get("device") is None:
        return kwargs
    return {**kwargs, "device": torch.device(device)} | (
        {"pin_memory": None} if "pin_memory" in kwargs else {}
    )
