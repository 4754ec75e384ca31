"""`Comm:` lines are contracts: what a docstring claims is what the ledger counts.

The form of a claim, one sentence per variant:

    [variant: ]direction [also ]none | one KIND of [name ](SHAPE)[ per ...]; direction ...

A function that is told the direction claims for `direction`, in backticks; the uses below say
"forward". Checked is every public function and class of the modules that communicate, and of all
in `functional` and `layers`, unless it is named as silent.

`also` adds to the claim without a variant. A shape is in the names of the arguments, `*` for the
leading dims; it is compared by its bytes, those of fp32: an index of int64 counts as two.
"""

import importlib
import inspect
import math
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import crossing_uses
import shardproof.comm
import shardproof.layers
import shardproof.ops
import shardproof.optim
from places import Pool
from shardproof import comm, optim, recut, reductions
from shardproof.axis import Axis
from shardproof.comm import check, gathers, plans, reporting, runs_of_indices, started, sums
from shardproof.comm import differentiable as collectives
from shardproof.comm import split as split_module
from shardproof.comm.split import Split
from shardproof.heads import Heads
from shardproof.layers import (
    activations,
    base,
    cut_module,
    data_parallel_guard,
    function_replacement,
    grad_scaler,
    guard,
    init_guard,
    norm,
    parallel_linear,
    refused_functions,
    registry,
    replicated_input,
    rms_formula,
    state_guard,
    step_guard,
)
from shardproof.layers import attention as attention_layers
from shardproof.layers import dropout as dropout_layers
from shardproof.layers import embedding as embedding_layers
from shardproof.layers import linear as layers
from shardproof.layers import shared as shared_layers
from shardproof.leaves import Cut
from shardproof.ops import attention as attention_functions
from shardproof.ops import (
    class_targets,
    cut_norms,
    dropout,
    embedding,
    head_split,
    linear,
    linear_products,
    linear_steps,
    losses,
    norms,
    rms_norm,
    rows,
    sampling,
    shared,
    shared_units,
    tokens,
    unit_linear,
    unit_softmax,
    vocabulary,
    vocabulary_blocks,
)
from shardproof.ops.attention import attention
from shardproof.ops.head_split import HeadSplit
from shardproof.ops.tokens import TokenCut
from shardproof.optim import adafactor, layouts, orthogonal, state
from shardproof.optim import gradient_norms as norm_functions
from shardproof.optim import whole_optimizer as optimizer_base
from shardproof.scheme import Scheme
from shardproof.tree import Node, nodes_of_run
from shardproof.units import Block, CutDim, Shared, Units

IN, OUT, LEADING = 20, 12, (2, 3)
SIZES = {
    "*": 6,
    "in_features": IN,
    "out_features": OUT,
    "cut.size": IN,
    "along.size": IN,
    "size": IN,
    "shape": 6 * IN,
    "sum of sizes": IN,
    # Of attention: nine query heads on one key-value head have five parts at degree 2 and at 3.
    "2 * parts": 2 * 5,
    "batch": 2,
    "S": 3,
    "head_dim": 4,
    "embedding_dim": OUT,
    "rows": 6,
    "blocks": 8,
    "ranks": 0,  # of the degree of a run, which `lies` says
    "2 * ranks": 0,
    # Of matrices that are updated.
    "rows.size": OUT,
    "columns.size": IN,
    "short": 6,
    "long": IN,
    **{str(number): number for number in (2, 3, 4)},
    **crossing_uses.SIZES,
}
# What a claim counts "per": the number of them in the runs below.
PER = {
    "cut parameter": 3,
    "cut parameter that has a gradient": 2,
    # Of two matrices in one iteration, or of one in two; one of the two is turned.
    "iteration": 2,
    "product": 4,
    "turn": 2,
    "parameter": 2,  # of a LayerNorm
}

_CLAUSE = re.compile(
    r"(?P<direction>forward|backward|update|`direction`) (?P<also>also )?"
    r"(?:none|one (?P<kind>\w+) of (?:\w+ )?\((?P<shape>[^)]*)\)(?: per (?P<per>[\w ]+))?)"
    r"(?:, or one (?P<kind2>\w+) of \((?P<shape2>[^)]*)\) if `(?P<if>\w+)` is given)?"
)
Claim = Counter[tuple[str, str, int]]  # (direction, kind, message bytes of fp32) -> calls


def numel(shape: str) -> int:
    """Elements of a shape in words: "*, in_features" is 6 * 20; what follows the dim, 1."""
    names = [name.strip() for name in shape.split(",") if name.strip()]
    return math.prod(
        SIZES[name] for name in (names[:-1] if names[1:] and names[-1] == "*" else names)
    )


def comm_lines(doc: str) -> str:
    found = re.search(r"^ *Comm:\n(?P<lines>(?: +\S.*\n?)+)", inspect.cleandoc(doc) + "\n", re.M)
    assert found, "the docstring has no Comm: lines"
    # The block ends where something stands at the indentation of `Comm:` again.
    kept = []
    for line in found["lines"].splitlines():
        if not line.startswith(" "):
            break
        kept.append(line.strip())
    return " ".join(kept)


def claims(doc: str) -> dict[str, Claim]:
    """Variant ("" for the plain one) -> what it claims."""
    found: dict[str, Claim] = {}
    for sentence in re.split(r"\.(?:\s+|$)", comm_lines(doc)):
        if not sentence:
            continue
        variant, _, rest = sentence.rpartition(": ")
        claim: Claim = Counter()
        adds = False
        for clause in rest.split(";"):
            match = _CLAUSE.fullmatch(clause.strip())
            assert match, f"not a claim: {clause!r}"
            adds |= bool(match["also"])
            direction = "forward" if match["direction"] == "`direction`" else match["direction"]
            if match["kind"]:
                per = match["per"]
                calls = PER[per] if per else 1
                claim[direction, match["kind"], 4 * numel(match["shape"])] += calls
            if match["kind2"]:
                other: Claim = Counter()
                other[direction, match["kind2"], 4 * numel(match["shape2"])] += 1
                found[match["if"]] = other
        found[variant] = found[""] + claim if adds else claim
    return found


@dataclass
class Run:
    """One use of one function on one rank, forward and backward."""

    axis: Axis
    cut: Cut = field(init=False)
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.cut = Cut(IN, 8, self.axis.size)
        self.x = torch.ones(*LEADING, IN, requires_grad=True)

    @property
    def lead(self) -> Tensor:
        return torch.ones(*LEADING, requires_grad=True)

    @property
    def part(self) -> Tensor:
        owned = self.cut.owned(self.axis.rank)
        return torch.ones(*LEADING, len(owned), requires_grad=True)

    def split(self, size: int) -> Split:
        return Split(self.axis, Cut(size, 8, self.axis.size), Scheme())

    @property
    def rows(self) -> Tensor:
        """The whole input, as rows."""
        return self.x.detach().flatten(0, 1)

    @property
    def part_of_out(self) -> Tensor:
        """Rows of what this rank owns of the output."""
        owned = Cut(OUT, 8, self.axis.size).owned(self.axis.rank)
        return torch.ones(LEADING[0] * LEADING[1], len(owned))

    def column(self, **options: Any) -> Tensor:
        layer = layers.ColumnParallelLinear(IN, OUT, axis=self.axis, **options)
        return layer(self.part if options.get("gather_input") else self.x)

    def shared(self, x: Tensor | None = None, tokens: TokenCut | None = None) -> Tensor:
        place = shared.SharedSum.of([self.split(OUT), self.split(OUT)])
        x = self.x if x is None else x
        return sum(shared.shared_columns(x, [self.weights(0)] * 2, [None] * 2, place, tokens))

    @property
    def tokens(self) -> TokenCut:
        return TokenCut(self.split(LEADING[1]))

    @property
    def own_tokens(self) -> Tensor:
        length = len(self.tokens.split.cut.owned(self.axis.rank))
        return torch.ones(LEADING[0], length, IN, requires_grad=True)

    @property
    def scale(self) -> Tensor:
        return torch.ones(IN, requires_grad=True)

    def linked(self) -> Tensor:
        members = [layers.ColumnParallelLinear(IN, OUT, axis=self.axis) for _ in range(3)]
        shared_layers.link(members, who="attention")
        return sum(member(self.x) for member in members)

    def row(self, **options: Any) -> Tensor:
        layer = layers.RowParallelLinear(IN, OUT, axis=self.axis, **options)
        return layer(self.x if options else self.part)

    @property
    def ids(self) -> Tensor:
        return torch.arange(6).view(LEADING)

    @property
    def table(self) -> Tensor:
        return torch.ones(len(self.cut.owned(self.axis.rank)), OUT, requires_grad=True)

    def vocabulary(self, function: Callable[..., Tensor], *given: Tensor, **options: Any) -> Tensor:
        logits = self.part.flatten(0, 1)
        return function(logits, *given, axis=self.axis, cut=self.cut, **options)

    def weights(self, dim: int) -> Tensor:
        shape = [OUT, IN]
        shape[dim] = len(Cut(shape[dim], 8, self.axis.size).owned(self.axis.rank))
        return torch.ones(shape, requires_grad=True)

    @property
    def nodes(self) -> dict[Node, Tensor]:
        return {node: self.x.detach() for node in nodes_of_run(8, self.cut.run(self.axis.rank))}

    def attention(self, keys: int, *, is_module: bool = False) -> Tensor:
        """Nine query heads; where they share one key-value head, so do the ranks."""
        heads = Heads(9, keys, 4, 8, self.axis.size)
        place = HeadSplit(self.axis, heads, Scheme())
        sizes = (len(place.owned), len(place.held), len(place.held))
        q, k, v = (torch.ones(2, size, 3, 4, requires_grad=True) for size in sizes)
        if is_module:
            return attention_layers.HeadAttention(place)(q, k, v)
        return attention(q, k, v, place)

    def norm(self, *, of_heads: bool) -> Split:
        cut = Heads(9, 9, 4, 8, self.axis.size).query_cut if of_heads else self.cut
        return Split(self.axis, cut, Scheme())

    def normalised(self, function: Callable[..., Tensor], *, of_heads: bool) -> Tensor:
        """A cut norm as a function, or as a module."""
        site, rms_formula = self.norm(of_heads=of_heads), rms_norm.RmsFormula(1e-6)
        x = self.part
        if of_heads:
            x = torch.ones(*LEADING, len(site.held_indices) // 4, 4, requires_grad=True)
        if inspect.isclass(function):
            return function(rms_formula, site)(x)
        weight = torch.ones(4 if of_heads else len(site.held_indices), requires_grad=True)
        return function(x, weight, site, rms_formula)

    @property
    def along(self) -> CutDim:
        """Two blocks of ten units."""
        shared = Shared(Units("features", IN // 2), 8, self.axis.size)
        return CutDim(shared, (Block(IN // 2, 0, 1), Block(IN // 2, 0, 1)))

    @property
    def each(self) -> list[Any]:
        return [self.along.owned(rank) for rank in range(self.axis.size)]

    @property
    def block_part(self) -> Tensor:
        return torch.ones(*LEADING, len(self.each[self.axis.rank]))

    @property
    def route(self) -> dict[str, Any]:
        return {
            "rows": Cut(OUT, 8, self.axis.size), "columns": self.cut, "direction": "forward"
        }  # fmt: skip

    def turned(self) -> Tensor:
        part = torch.ones(OUT, len(self.cut.owned(self.axis.rank)))
        held = [self.route["rows"].run(rank) for rank in range(self.axis.size)]
        return recut.to_rows(part, self.axis, held=held, **self.route)

    def orthogonal(self) -> Tensor:
        rank, rows = self.axis.rank, Cut(6, 8, self.axis.size)
        spread = orthogonal.spread_of(self.cut, rows, rank, self.cut.run(rank), "")
        iteration = orthogonal.Iteration((1.0, 1.0, 1.0), 2, torch.float32)
        x = torch.ones(6, len(self.cut.owned(rank)))
        return orthogonal.orthogonalize(x, spread, iteration, self.axis)

    def muon(self) -> None:
        """Two matrices, cut along the shorter and along the longer side."""
        of = [layer(IN, 6, axis=self.axis, bias=False) for layer in (
            layers.ColumnParallelLinear, layers.RowParallelLinear)]  # fmt: skip
        for layer in of:
            layer.weight.grad = torch.ones_like(layer.weight)
        weights = [layer.weight for layer in of]
        optim.Muon(weights, ns_steps=1, ns_dtype=torch.float32).step()

    def squares(self) -> Tensor:
        layer = layers.ColumnParallelLinear(IN, OUT, axis=self.axis)
        place = layouts.ParameterLayout(layer.layouts["weight"], self.axis)
        return norm_functions.sum_squares_of(layer.weight.detach(), place)

    def optimizer(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = self.model()
        return model, torch.optim.SGD(model.parameters())

    def model(self) -> nn.Module:
        """Two cut parameters with gradients, one without, and a plain layer."""
        model = nn.Sequential(
            layers.ColumnParallelLinear(IN, OUT, axis=self.axis, bias=False),
            layers.RowParallelLinear(IN, OUT, axis=self.axis),
            layers.ColumnParallelLinear(IN, OUT, axis=self.axis, bias=False),
            nn.Linear(3, 2),
        )
        for parameter in [*model[0].parameters(), *model[1].parameters(), *model[3].parameters()]:
            parameter.grad = torch.ones_like(parameter)
        return model


# (function, variant of its Comm: lines) -> a use of it, which is differentiated if it can be.
USES: dict[tuple[Callable[..., Any], str], Callable[[Run], Any]] = {
    (comm.all_gather, ""): lambda run: comm.all_gather(
        run.part.detach(), run.axis, dim=-1, cut=run.cut, direction="forward"
    ),
    (comm.all_reduce, ""): lambda run: comm.all_reduce(
        run.lead.detach(), run.axis, direction="forward"
    ),
    (comm.start_all_reduce, ""): lambda run: comm.start_all_reduce(
        run.lead.detach(), run.axis, direction="forward"
    ).wait(),
    (comm.reduce_scatter, ""): lambda run: comm.reduce_scatter(
        run.x.detach(), run.axis, dim=-1, cut=run.cut, direction="forward"
    ),
    (comm.all_reduce_nodes, ""): lambda run: comm.all_reduce_nodes(
        run.nodes, run.axis, cut=run.cut, shape=run.x.shape, like=run.x, direction="forward"
    ),
    (comm.start_all_reduce_nodes, ""): lambda run: comm.start_all_reduce_nodes(
        run.nodes, run.axis, cut=run.cut, shape=run.x.shape, like=run.x, direction="forward"
    ).wait(),
    (comm.reduce_scatter_nodes, ""): lambda run: comm.reduce_scatter_nodes(
        run.nodes,
        run.axis,
        cut=run.cut,
        into=comm.ShardOf(tuple(run.x.shape), 2, run.cut),
        like=run.x,
        direction="forward",
    ),
    (comm.gather, ""): lambda run: comm.gather(
        run.part.detach()[0, 0], run.axis, sizes=run.cut.sizes(), dst=1, direction="forward"
    ),
    (collectives.all_reduce_grad, ""): lambda run: collectives.all_reduce_grad(run.lead, run.axis),
    (collectives.all_reduce, ""): lambda run: collectives.all_reduce(run.lead, run.axis),
    (collectives.shard, ""): lambda run: collectives.shard(run.x, run.axis, dim=-1, cut=run.cut),
    (collectives.all_gather, 'grad="replicate"'): lambda run: collectives.all_gather(
        run.part, run.axis, dim=-1, cut=run.cut, grad="replicate"
    ),
    (collectives.all_gather, 'grad="partial"'): lambda run: collectives.all_gather(
        run.part, run.axis, dim=-1, cut=run.cut, grad="partial"
    ),
    (collectives.reduce_scatter, ""): lambda run: collectives.reduce_scatter(
        run.x, run.axis, dim=-1, cut=run.cut
    ),
    (linear.column_linear, ""): lambda run: linear.column_linear(
        run.x, run.weights(0), None, run.split(OUT)
    ),
    (linear.column_linear, "gathers.input"): lambda run: linear.column_linear(
        run.part, run.weights(0), None, run.split(OUT), linear.Gathers(run.split(IN))
    ),
    (linear.row_linear, ""): lambda run: linear.row_linear(
        run.part, run.weights(1), None, run.split(IN)
    ),
    (linear.column_linear, "gathers.output"): lambda run: linear.column_linear(
        run.x, run.weights(0), None, run.split(OUT), linear.Gathers(output=True)
    ),
    (linear.row_linear, "splits_input"): lambda run: linear.row_linear(
        run.x, run.weights(1), None, run.split(IN), splits_input=True
    ),
    (linear.column_linear, "gathers.tokens"): lambda run: linear.column_linear(
        run.own_tokens, run.weights(0), None, run.split(OUT), linear.Gathers(tokens=run.tokens)
    ),
    (linear.row_linear, "tokens"): lambda run: linear.row_linear(
        run.part, run.weights(1), None, run.split(IN), tokens=run.tokens
    ),
    (shared.shared_columns, "tokens"): lambda run: run.shared(run.own_tokens, run.tokens),
    (norms.whole_rms_norm, "tokens"): lambda run: norms.whole_rms_norm(
        run.own_tokens, run.scale, rms_norm.RmsFormula(1e-6), run.tokens
    ),
    (norms.layer_norm, "tokens"): lambda run: norms.layer_norm(
        run.own_tokens, run.scale, run.scale, tokens=run.tokens
    ),
    (dropout.dropout_part, ""): lambda run: dropout.dropout_part(
        run.x, 0.5, dropout.MaskKey(0, "a", 0), shape=run.x.shape, dim=1, at=slice(0, LEADING[1])
    ),
    (linear_products.product, ""): lambda run: linear_products.product(
        run.rows, run.weights(0), None, run.split(OUT)
    ),
    (linear_products.plain_linear, ""): lambda run: linear_products.plain_linear(
        run.rows, torch.ones(OUT, IN), None, run.split(OUT)
    ),
    (linear_products.weight_gradient, ""): lambda run: linear_products.weight_gradient(
        run.part_of_out, run.rows, run.split(OUT)
    ),
    (linear_products.bias_gradient, ""): lambda run: linear_products.bias_gradient(
        run.part_of_out, run.split(OUT), is_cut=True
    ),
    (linear_products.add_bias, ""): lambda run: linear_products.add_bias(
        torch.ones(2, OUT), torch.ones(OUT), run.split(IN)
    ),
    (linear_products.product_columns, ""): lambda run: linear_products.product_columns(
        run.split(IN), torch.ones(2, OUT), run.weights(1).detach(), "grad_x"
    ),
    (shared.shared_columns, ""): lambda run: run.shared(),
    (shared_layers.link, ""): lambda run: run.linked(),
    (shared_layers.SharedInput, ""): lambda run: run.linked(),
    (layers.ColumnParallelLinear, ""): lambda run: run.column(),
    (layers.ColumnParallelLinear, "gather_input"): lambda run: run.column(gather_input=True),
    (layers.ColumnParallelLinear, "gather_output"): lambda run: run.column(gather_output=True),
    (layers.RowParallelLinear, ""): lambda run: run.row(),
    (layers.RowParallelLinear, "input_is_parallel=False"): lambda run: run.row(
        input_is_parallel=False
    ),
    (attention, ""): lambda run: run.attention(9),
    (attention, "split.cut"): lambda run: run.attention(1),
    (attention_layers.HeadAttention, ""): lambda run: run.attention(9, is_module=True),
    (attention_layers.HeadAttention, "split.cut"): lambda run: run.attention(1, is_module=True),
    (losses.mse_loss, ""): lambda run: losses.mse_loss(run.x, torch.zeros_like(run.x)),
    (losses.mse_loss, "axis"): lambda run: losses.mse_loss(
        run.part, torch.zeros_like(run.part), axis=run.axis, cut=run.cut
    ),
    (losses.cross_entropy, ""): lambda run: losses.cross_entropy(
        run.x[0], torch.zeros(3, dtype=torch.int64)
    ),
    (embedding.vocab_embedding, ""): lambda run: embedding.vocab_embedding(
        run.ids, run.table, Split(run.axis, run.cut, Scheme())
    ),
    (embedding_layers.VocabParallelEmbedding, ""): lambda run: (
        embedding_layers.VocabParallelEmbedding(IN, OUT, axis=run.axis)(run.ids)
    ),
    (vocabulary.vocab_cross_entropy, ""): lambda run: run.vocabulary(
        vocabulary.vocab_cross_entropy, run.ids.view(-1)
    ),
    (vocabulary.vocab_cross_entropy, "label_smoothing"): lambda run: run.vocabulary(
        vocabulary.vocab_cross_entropy, run.ids.view(-1), label_smoothing=0.1
    ),
    (vocabulary.vocab_log_softmax, ""): lambda run: run.vocabulary(vocabulary.vocab_log_softmax),
    (norms.rms_norm, ""): lambda run: norms.rms_norm(run.x, None, eps=1e-6),
    (norms.whole_rms_norm, ""): lambda run: norms.whole_rms_norm(
        run.x, None, rms_norm.RmsFormula(1e-6)
    ),
    (norms.layer_norm, ""): lambda run: norms.layer_norm(run.x, None, None),
    (norm.RMSNorm, ""): lambda run: norm.RMSNorm(IN, rms_norm.RmsFormula(1e-6))(run.x),
    (norm.LayerNorm, ""): lambda run: norm.LayerNorm(IN)(run.x),
    **{
        (function, ""): lambda run, f=function, h=of_heads: run.normalised(f, of_heads=h)
        for function, of_heads in (
            (cut_norms.sharded_rms_norm, False),
            (cut_norms.head_rms_norm, True),
            (norm.ShardedRMSNorm, False),
            (norm.HeadRMSNorm, True),
        )
    },
    (sampling.keyed_scores, ""): lambda run: sampling.keyed_scores(
        run.x, seed=1, name="a", temperature=1.0, top_k=None
    ),
    (sampling.KeyedSampler, ""): lambda run: sampling.KeyedSampler(1)(run.x),
    (dropout.dropout, ""): lambda run: dropout.dropout(run.x, 0.5, dropout.MaskKey(0, "a", 0)),
    (dropout_layers.Dropout, ""): lambda run: dropout_layers.Dropout(
        0.5, name="a", seed=0, axis=run.axis, cut=run.cut
    )(run.part),
    (recut.to_columns, ""): lambda run: recut.to_columns(
        torch.ones(len(run.route["rows"].owned(run.axis.rank)), IN), run.axis, **run.route
    ),
    (recut.to_rows, ""): Run.turned,
    (runs_of_indices.all_gather_sizes, ""): lambda run: runs_of_indices.all_gather_sizes(
        run.block_part, run.axis, dim=2, sizes=tuple(map(len, run.each)), direction="forward"
    ),
    (runs_of_indices.move, ""): lambda run: runs_of_indices.move(
        run.block_part, run.axis, dim=2, have=run.each, want=run.each, direction="forward"
    ),
    **{key: lambda run, f=use: f(run.axis) for key, use in crossing_uses.USES.items()},
    (orthogonal.orthogonalize, ""): Run.orthogonal,
    (optim.Muon, ""): Run.muon,
    (norm_functions.sum_squares_of, ""): Run.squares,
    (optim.grad_norm, ""): lambda run: optim.grad_norm(run.model()),
    (optim.clip_grad_norm_, ""): lambda run: optim.clip_grad_norm_(run.model(), 1.0),
    (optim.optimizer_state_dict, ""): lambda run: optim.optimizer_state_dict(*run.optimizer()),
    (optim.load_optimizer_state_dict, ""): lambda run: optim.load_optimizer_state_dict(
        *(given := run.optimizer()), optim.optimizer_state_dict(*given)
    ),
    (reductions.num_parameters, ""): lambda run: reductions.num_parameters(run.model()),
    (reductions.sum_over_parameters, ""): lambda run: reductions.sum_over_parameters(
        run.model(), torch.square
    ),
    (reductions.sums_by_parameter, ""): lambda run: sum(
        reductions.sums_by_parameter(run.model(), torch.square).values()
    ),
    (reductions.parameter_norm, ""): lambda run: reductions.parameter_norm(run.model()),
    (reductions.parameter_norms, ""): lambda run: reductions.parameter_norms(run.model()),
    (reductions.max_over_parameters, ""): lambda run: reductions.max_over_parameters(run.model()),
    (reductions.min_over_parameters, ""): lambda run: reductions.min_over_parameters(run.model()),
}
# Public, and of no tensor's doing.
SILENT = {
    check: {"check_degree_of", "check_part"},
    collectives: set(),
    gathers: {"gather_parts"},
    plans: {"ShardOf", "SumPlan"},
    reporting: {"count", "sends_of_sum", "sends_to_all", "sends_whole", "tell_sum", "step_event"},
    split_module: {"Split"},
    started: {"StartedSum", "recorded_sum", "start_planned"},
    sums: set(),
    linear: {"Gathers"},
    linear_steps: {"tell", "tell_alone", "tell_bias_gradient", "tell_linear", "tell_parts"},
    attention_functions: {"AttentionOptions"},
    vocabulary: {"LossOptions"},
    **crossing_uses.SILENT,
    recut: {"swap"},
    rows: {"are_alike", "as_rows", "cast", "check_alike", "is_autocast", "shaped"}
    | {"prepared", "wants_gradient", "without_autocast"},
    shared: {"SharedSum", "is_spent"},
    head_split: {"HeadSplit", "serving_heads"},
    vocabulary_blocks: {"VocabularyBlocks", "parts"},
    tokens: {"TokenCut", "forget_input"},  # counted in the functions that use it
    class_targets: {"check_kind", "check_reduction", "counting_rows", "reduce_rows"},
    layouts: {"ParameterLayout", "layouts_of"},
    optimizer_base: {"WholeOptimizer", "check_scalar", "scalar", "write"},
    adafactor: {"Adafactor"},  # counted in test_whole_optimizers: messages of two sizes
    orthogonal: {"LeafGroup", "Iteration", "Spread"},
    state: {"state_layout"},
    registry: {"ParameterPart", "add_module", "axes_of", "changes", "cut_modules", "cut_parameters"}
    | {"is_cut_module", "name_by_memory", "name_of", "note_change", "note_replaced", "part_of"}
    | {"memory_of", "parts", "parts_by_memory", "parts_of", "refresh", "remember"}
    | {"record_of", "replaced_name"},
    step_guard: {"declare_elementwise", "install", "is_elementwise", "serve"},
    base: {"OwnParameter", "ShardedModule", "check_state", "is_ours", "own"},
    cut_module: {"CutModule", "CutRecord", "become_cut", "cut_parameters", "new_ties"},
    guard: {"watch"},
    sampling: {"check_options"},
    init_guard: {"passes_over"},
    refused_functions: {"install"},
    grad_scaler: {"install"},
    data_parallel_guard: {"install"},
    state_guard: {"install"},
    function_replacement: {"is_replaced", "replace"},
    activations: {"Tanh", "Sigmoid", "SiLU", "GELU", "Softplus", "QuickGELU", "Mish"}
    | {"ClippedGELU", "SqrtSoftplus", "ELU", "CELU", "SELU", "Softshrink"}
    | {"invariant_replacement", "why_refused"},
    rms_norm: {"RmsFormula", "RowSums", "normalise", "wide_rows"},
    dropout: {"MaskKey"},
    dropout_layers: {"Drawing", "dropout_replacement", "replay_dropout"},
    rms_formula: {"find_formula"},
    norm: {"norm_replacement"},
    parallel_linear: {"ParallelLinear", "like"},
    attention_layers: {"pad_idle_output", "strip_idle_input"},
    replicated_input: {"SameOnAllRanks"},
}


def totals(claim: Claim) -> dict[tuple[str, str], tuple[int, int]]:
    """Calls and bytes of each direction and kind, as the ledger keeps them."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for (direction, kind, size), more in claim.items():
        calls, total = found.get((direction, kind), (0, 0))
        found[direction, kind] = (calls + more, total + more * size)
    return found


def measured(run: Run, use: Callable[[Run], Any]) -> dict[tuple[str, str], tuple[int, int]]:
    """What the ledger counts for one use, forward and backward: calls and bytes."""
    y = use(run)
    if isinstance(y, Tensor) and y.requires_grad:
        y.sum().backward()
    return {
        (direction, kind): (count.calls, count.message_bytes)
        for direction, kind, count in run.axis.transport.ledger
    }


def lies(axis: Axis, function: Any, doc: str) -> list[str]:
    """Variants of a docstring whose claim is not what the ledger counts."""
    found = []
    # All ranks of a run write the same.
    SIZES["ranks"], SIZES["2 * ranks"] = axis.size, 2 * axis.size
    for variant, claim in claims(doc).items():
        axis.transport.ledger.reset()
        counted = measured(Run(axis), USES[function, variant])
        if counted != totals(claim):
            name = f"{function.__name__} {variant}".strip()
            found.append(f"{name} claims {totals(claim)}, the ledger has {counted}")
    return found


def public(module: Any) -> Iterator[Any]:
    """Functions and classes that a module defines for others."""
    for name, value in vars(module).items():
        is_own = getattr(value, "__module__", None) == module.__name__
        if (
            is_own
            and not name.startswith("_")
            and (inspect.isfunction(value) or inspect.isclass(value))
        ):
            yield value


def modules_of(package: ModuleType) -> list[ModuleType]:
    return [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for found in pkgutil.iter_modules(package.__path__)
    ]


MODULES = [
    *modules_of(shardproof.comm), recut, reductions,
    *modules_of(shardproof.ops), *modules_of(shardproof.layers),
    *modules_of(shardproof.optim),
]  # fmt: skip
FUNCTIONS = [
    function
    for module in MODULES
    for function in public(module)
    if function.__name__ not in SILENT.get(module, ())
]


def test_what_is_silent_is_there() -> None:
    for module, names in SILENT.items():
        assert module in MODULES
        assert names <= {function.__name__ for function in public(module)}


@pytest.mark.parametrize(
    "function", FUNCTIONS, ids=lambda f: f"{f.__module__.rpartition('.')[2]}.{f.__name__}"
)
def test_comm_lines_tell_what_the_ledger_counts(pool: Pool, function: Any) -> None:
    doc = inspect.getdoc(function) or ""
    assert {variant for used, variant in USES if used is function} == set(claims(doc))
    for degree in (2, 3):
        for found in pool(degree, "threads").run(lambda axis: lies(axis, function, doc)):
            assert found == []


@pytest.mark.parametrize(
    ("function", "truth", "lie"),
    [
        (collectives.all_reduce, "backward none", "backward one all_reduce of (*)"),
        (collectives.shard, "one all_gather of (*, cut.size, *)", "none"),
        (comm.gather, "one gather", "one all_gather"),
        (
            unit_linear.column,
            "backward one all_reduce of grad_x (*, in_features)",
            "backward none",
        ),
        (unit_softmax.max_cut, "of int64 (*, 2 * ranks)", "of int64 (*, ranks)"),
        (shared_units.serve, "backward one all_gather of (*, parts, sources)", "backward none"),
        (comm.all_reduce_nodes, "of (shape)", "of (*)"),
        (
            linear.row_linear,
            "all_reduce of y (*, out_features)",
            "all_reduce of y (*, in_features)",
        ),
        (layers.ColumnParallelLinear, "backward one all_reduce", "backward one all_gather"),
        (layers.RowParallelLinear, "backward also one all_gather", "forward also one all_gather"),
        (optim.grad_norm, " per cut parameter that has a gradient", ""),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_docstring_that_lies_is_found(pool: Pool, function: Any, truth: str, lie: str) -> None:
    doc = inspect.getdoc(function) or ""
    assert doc.count(truth) == 1 or function is layers.ColumnParallelLinear
    planted = doc.replace(truth, lie)
    for found in pool(2, "threads").run(lambda axis: lies(axis, function, planted)):
        assert len(found) >= 1
        assert found[0].startswith(function.__name__)


def test_claims_are_read_as_they_are_written() -> None:
    doc = """Does.

    Comm:
        forward none; backward one all_reduce of grad_x (*, in_features).
        gather: forward also one all_gather of
        y (*, out_features).

    Example:
        forward one all_reduce of ().
    """
    first: Claim = Counter({("backward", "all_reduce", 480): 1})
    assert claims(doc) == {
        "": first,
        "gather": first + Counter({("forward", "all_gather", 288): 1}),
    }
    with pytest.raises(AssertionError, match="not a claim: 'forward two all_reduces'"):
        claims("Does.\n\nComm:\n    forward two all_reduces.\n")
    with pytest.raises(AssertionError, match="has no Comm: lines"):
        claims("Does.")
