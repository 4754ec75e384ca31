"""`Cutter`: replace modules by cut layers, as the styles of a checked plan say."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.comm.split import Split
from shardproof.heads import Heads
from shardproof.layers.attention import HeadAttention, pad_idle_output, strip_idle_input
from shardproof.layers.embedding import VocabParallelEmbedding
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.layers.norm import HeadRMSNorm, ShardedRMSNorm
from shardproof.layers.shared import link
from shardproof.ops.head_split import HeadSplit
from shardproof.plans.attention_check import ChildAttentionOptions
from shardproof.plans.attention_modules import attends_in_registry
from shardproof.plans.style import (
    Attention,
    ColumnParallel,
    SharedInput,
    Style,
    VocabParallel,
)
from shardproof.scheme import Scheme


class Cutter:
    """Replaces whole modules by cut layers.

    Args:
        model: the model, which is changed in place.
        scheme: leaves, numerics, seed.
        axis: the ranks that share the model.
        head: name of the output head whose logits are gathered later, or None.
        attention_options: name of an attention -> causality and dropout of its attending child.

    Attributes:
        attentions: name of an attention module -> the module that attends on this rank.
        replaced_norms: name of a norm of heads -> the module that it replaced.
    """

    def __init__(
        self,
        model: nn.Module,
        scheme: Scheme,
        axis: Axis,
        head: str | None,
        attention_options: Mapping[str, ChildAttentionOptions],
    ) -> None:
        self.attentions: dict[str, HeadAttention] = {}
        self.replaced_norms: dict[str, nn.Module] = {}
        self._model = model
        self._scheme = scheme
        self._axis = axis
        self._head = head
        self._attention_options = attention_options
        self._ties: dict[int, nn.Parameter | None] = {}
        self._whole_modules: list[nn.Module] = []  # or the id of a weight could be given again

    def cut(self, styles: Mapping[str, Style]) -> None:
        """Cut every module that has a style; styles that link other modules come last."""
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
        """Replace the module of that name."""
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
        """Replace a module; parameters that were shared stay shared."""
        for own, parameter in whole._parameters.items():
            if parameter is not None:
                mine = cut._parameters[own]
                cut._parameters[own] = self._ties.setdefault(id(parameter), mine)
        self._whole_modules.append(whole)
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
            self._add_placeholder_heads(name, style)

    def _attend(self, name: str, style: Attention, heads: Heads) -> None:
        split = HeadSplit(self._axis, heads, self._scheme, name)
        if style.attend is None:
            if attends_in_registry(self._model, style):
                self.attentions[name] = HeadAttention(split)
            return
        whole = self._child(name, style.attend)
        options = self._attention_options[name]
        replacement = HeadAttention(
            split, is_causal=options.is_causal, dropout=options.dropout, is_square=options.is_causal
        )
        self.replace(f"{name}.{style.attend}", replacement.train(whole.training))

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
            whole = self.replaced_norms[split.name] = self._child(name, child)
            self._put(split.name, whole, kind.from_module(whole, split))

    def _add_placeholder_heads(self, name: str, style: Attention) -> None:
        """Add a placeholder head on a rank without heads: models that view with -1 need one."""
        for child in (style.query, style.key, style.value):
            pad_idle_output(self._child(name, child), -1, style.head_dim)
        for norm in (style.query_norm, style.key_norm):
            if norm is None:
                continue
            dim, length = (-1, style.head_dim) if style.norms == "across" else (-2, 1)
            strip_idle_input(self._child(name, norm), dim)
            pad_idle_output(self._child(name, norm), dim, length)
        strip_idle_input(self._child(name, style.output), -1)


class _Scale:
    """A forward hook that scales rows as a scaled embedding of transformers does."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        # Rounded to fp32 and then to the dtype, as the buffer of transformers is.
        return y * torch.tensor(self.scale, dtype=torch.float32, device=y.device).to(y.dtype)
