"""What a style does to the module that it names. Nothing is checked here: the plan has been."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.comm.split import Split
from shardproof.heads import Heads
from shardproof.layers.attention import HeadAttention, give_stand_in, take_stand_in
from shardproof.layers.embedding import VocabParallelEmbedding
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.layers.norm import HeadRMSNorm, ShardedRMSNorm
from shardproof.layers.shared import link
from shardproof.ops.head_split import HeadSplit
from shardproof.plans.attend import Manner
from shardproof.plans.attention import attends_in_registry
from shardproof.plans.style import (
    Attention,
    ColumnParallel,
    SharedInput,
    Style,
    VocabParallel,
)
from shardproof.scheme import Scheme


class Cutter:
    """Puts cut modules in the place of whole ones.

    Args:
        model: changed in place.
        scheme: leaves, numerics, seed.
        axis: the ranks.
        head: name of an output head whose logits others gather; or None.
        manners: name of an attention -> what its child that attends was found to compute.

    Attributes:
        attentions: name of an attention module -> what computes in it on this rank.
        stood: name of a norm of heads -> the module in whose place it is.
    """

    def __init__(
        self,
        model: nn.Module,
        scheme: Scheme,
        axis: Axis,
        head: str | None,
        manners: Mapping[str, Manner],
    ) -> None:
        self.attentions: dict[str, HeadAttention] = {}
        self.stood: dict[str, nn.Module] = {}
        self._model = model
        self._scheme = scheme
        self._axis = axis
        self._head = head
        self._manners = manners
        self._ties: dict[int, nn.Parameter | None] = {}
        self._kept: list[nn.Module] = []  # or the id of a weight could be given again

    def cut(self, styles: Mapping[str, Style]) -> None:
        """Cut every module that has a style, those that only link others last."""
        for name, style in styles.items():
            if isinstance(style, SharedInput):
                continue
            if isinstance(style, Attention):
                self._cut_attention(name, style)
            else:
                self._cut_alone(name, style)
        for name, style in styles.items():
            if isinstance(style, SharedInput):
                members = [self._child(name, member) for member in style.members]
                link(members, who=name)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of the one of that name."""
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, module)

    def _child(self, name: str, child: str) -> Any:
        return self._model.get_submodule(f"{name}.{child}" if name else child)

    def _cut_alone(self, name: str, style: Style) -> None:
        whole: Any = self._model.get_submodule(name)
        options: dict[str, Any] = {"axis": self._axis, "name": name, "scheme": self._scheme}
        cut: Any
        if isinstance(style, VocabParallel):
            cut = VocabParallelEmbedding.from_embedding(whole, **options)
            if style.scale != 1:
                cut.register_forward_hook(_Scale(style.scale))
        elif isinstance(style, ColumnParallel):
            gathers = style.gather_output and name != self._head
            cut = ColumnParallelLinear.from_linear(
                whole, gather_input=style.gather_input, gather_output=gathers, **options
            )
        else:
            row: Any = style
            cut = RowParallelLinear.from_linear(
                whole, input_is_parallel=row.input_is_parallel, **options
            )
        self._put(name, whole, cut)

    def _put(self, name: str, whole: nn.Module, cut: nn.Module) -> None:
        """Replace, and keep parameters that were one parameter one parameter."""
        for own, parameter in whole._parameters.items():
            if parameter is not None:
                mine = cut._parameters[own]
                cut._parameters[own] = self._ties.setdefault(id(parameter), mine)
        self._kept.append(whole)
        self.replace(name, cut)

    def _cut_attention(self, name: str, style: Attention) -> None:
        heads = Heads(
            style.queries, style.keys, style.head_dim, self._scheme.leaves, self._axis.size
        )
        held = heads.held(self._axis.rank)
        cuts = {
            style.query: (heads.query_cut, None),
            style.key: (heads.key_cut, held),
            style.value: (heads.key_cut, held),
        }
        for child, (cut, holds) in cuts.items():
            whole = self._child(name, child)
            column = ColumnParallelLinear.from_linear(
                whole,
                axis=self._axis,
                name=f"{name}.{child}",
                scheme=self._scheme,
                cut=cut,
                held=holds,
            )
            self._put(f"{name}.{child}", whole, column)
        whole = self._child(name, style.output)
        row = RowParallelLinear.from_linear(
            whole,
            axis=self._axis,
            name=f"{name}.{style.output}",
            scheme=self._scheme,
            cut=heads.query_cut,
        )
        self._put(f"{name}.{style.output}", whole, row)
        link([self._child(name, child) for child in cuts], heads=heads, who=name)
        self._cut_norms(name, style, heads)
        self._attend(name, style, heads)
        if attends_in_registry(self._model, style) and not heads.owned(self._axis.rank):
            self._stand_in(name, style)

    def _attend(self, name: str, style: Attention, heads: Heads) -> None:
        site = HeadSplit(self._axis, heads, self._scheme, name)
        if style.attend is None:
            if attends_in_registry(self._model, style):
                self.attentions[name] = HeadAttention(site)
            return
        whole = self._child(name, style.attend)
        manner = self._manners[name]
        twin = HeadAttention(
            site, is_causal=manner.is_causal, dropout=manner.dropout, is_square=manner.is_causal
        )
        self.replace(f"{name}.{style.attend}", twin.train(whole.training))

    def _cut_norms(self, name: str, style: Attention, heads: Heads) -> None:
        held = heads.held(self._axis.rank)
        for child, cut, holds in (
            (style.query_norm, heads.query_cut, None),
            (style.key_norm, heads.key_cut, held),
        ):
            if child is None:
                continue
            kind = ShardedRMSNorm if style.norms == "across" else HeadRMSNorm
            split = Split(self._axis, cut, self._scheme, f"{name}.{child}", holds)
            whole = self.stood[split.name] = self._child(name, child)
            self._put(split.name, whole, kind.from_module(whole, split))

    def _stand_in(self, name: str, style: Attention) -> None:
        """This rank has no heads; models that count them with -1 need one to look at."""
        for child in (style.query, style.key, style.value):
            give_stand_in(self._child(name, child), -1, style.head_dim)
        for norm in (style.query_norm, style.key_norm):
            if norm is None:
                continue
            dim, length = (-1, style.head_dim) if style.norms == "across" else (-2, 1)
            take_stand_in(self._child(name, norm), dim)
            give_stand_in(self._child(name, norm), dim, length)
        take_stand_in(self._child(name, style.output), -1)


class _Scale:
    """A forward hook: what a scaled embedding of transformers does to its rows."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        # Rounded to fp32 and then to the dtype, as the buffer of transformers is.
        return y * torch.tensor(self.scale, dtype=torch.float32, device=y.device).to(y.dtype)
