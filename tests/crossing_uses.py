"""Uses of the crossings of `functional` for `test_comm_lines`, on a dim of two blocks of units."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardproof.axis import Axis
from shardproof.comm.split import Split
from shardproof.leaves import Cut
from shardproof.ops import (
    embedding,
    input_gradients,
    shared_units,
    unit_contract,
    unit_linear,
    unit_lookup,
    unit_moves,
    unit_products,
    unit_softmax,
    unit_split,
    unit_sums,
)
from shardproof.ops.tokens import TokenCut
from shardproof.scheme import Scheme
from shardproof.units import Block, CutDim, Shared, Units

SIZE, OUT, LEADING = 20, 12, (2, 3)
# Names in claims that only crossings have. Nine queries on one key have five parts at 2 and at 3.
SIZES = {"M": 4, "N": 5, "columns": OUT, "classes": SIZE, "parts": 5, "sources": 4}


def at(axis: Axis, *, is_plain: bool = False) -> unit_split.UnitSplit:
    """Twenty indices: ten units in two blocks, or twenty units."""
    blocks = (Block(SIZE, 0, 1),) if is_plain else (Block(SIZE // 2, 0, 1),) * 2
    shared = Shared(Units("features", blocks[0].size), 8, axis.size)
    return unit_split.UnitSplit.of(axis, CutDim(shared, blocks), Scheme())


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


def part(axis: Axis, *, is_plain: bool = False) -> Tensor:
    return ones(*LEADING, at(axis, is_plain=is_plain).length)


def column(axis: Axis) -> Tensor:
    where = at(axis)
    return unit_linear.column(ones(*LEADING, SIZE), ones(where.length, SIZE), None, where)


def columns(axis: Axis) -> Tensor:
    where, x, handle = at(axis), ones(*LEADING, SIZE), input_gradients.Entering()
    found = [
        unit_linear.column(x, ones(where.length, SIZE), None, where, entering=handle)
        for _ in range(2)
    ]
    return found[0] + found[1]


def row(axis: Axis) -> Tensor:
    where = at(axis)
    return unit_linear.row(part(axis), ones(OUT, where.length), None, where)


def tokens_of(axis: Axis) -> TokenCut:
    """The middle one of the dims of an input, cut."""
    return TokenCut(Split(axis, Cut(LEADING[1], 8, axis.size), Scheme()))


def column_of_tokens(axis: Axis) -> Tensor:
    where, tokens = at(axis), tokens_of(axis)
    x = ones(LEADING[0], len(tokens.split.cut.owned(axis.rank)), SIZE)
    return unit_linear.column(x, ones(where.length, SIZE), None, where, tokens=tokens)


def row_of_tokens(axis: Axis) -> Tensor:
    where = at(axis)
    weight = ones(OUT, where.length)
    return unit_linear.row(part(axis), weight, None, where, tokens=tokens_of(axis))


def summed_to_tokens(axis: Axis) -> Tensor:
    where = at(axis)
    a, b = torch.ones(4, where.length), torch.ones(where.length, 5)
    term = unit_products.ProductTerm(a, b, where)
    tokens = TokenCut(Split(axis, Cut(2, 8, axis.size), Scheme()))
    return unit_products.sum_to_tokens([term], tokens, a, "forward", "")


def contract(axis: Axis) -> Tensor:
    where = at(axis)
    a, b = ones(*LEADING, 4, where.length), ones(*LEADING, where.length, 5)
    return unit_contract.contract(a, b, where)


def largest(axis: Axis) -> Tensor:
    return unit_softmax.max_cut(part(axis), -1, at(axis))[0]


def along(function: Callable[..., Tensor], *, is_plain: bool = False) -> Callable[[Axis], Tensor]:
    def use(axis: Axis) -> Tensor:
        return function(part(axis, is_plain=is_plain), -1, at(axis, is_plain=is_plain))

    return use


def loss(*, is_plain: bool, **options: Any) -> Callable[[Axis], Tensor]:
    def use(axis: Axis) -> Tensor:
        where, target = at(axis, is_plain=is_plain), torch.arange(6)
        return unit_softmax.cross_entropy_cut(ones(6, where.length), target, where, **options)

    return use


def lookup(axis: Axis, function: Callable[..., Tensor], dim: int) -> Tensor:
    where, shape = at(axis), [SIZE, OUT]
    shape[dim] = where.length
    return function(ones(*shape), torch.arange(6).view(LEADING), where)


def product(function: Callable[..., Tensor], axis: Axis) -> Tensor:
    where = at(axis)
    held = where.length
    given = {
        "linear": (ones(4, 3), ones(held, 3), None),
        "product_rows": (ones(held, 3), ones(3, 4)),
        "product_columns": (ones(4, 3), ones(3, held)),
    }
    return function(*given[function.__name__], where).detach()


def started(axis: Axis) -> Tensor:
    where = at(axis)
    a, b = torch.ones(4, where.length), torch.ones(where.length, 5)
    term = unit_products.ProductTerm(a, b, where)
    return unit_products.start_sum([term], a, "forward", "").wait()


def served(axis: Axis, *, keys: int) -> Tensor:
    """Nine queries on nine keys, or on one that ranks share, of four indices each."""
    needers = tuple(tuple(range(9)[key::keys]) for key in range(keys))
    shared = Shared(Units("heads", 9, needers), 8, axis.size)
    source, target = (
        unit_split.UnitSplit.of(axis, CutDim(shared, (Block(count * 4, first, 4),)), Scheme())
        for count, first in ((keys, 9), (9, 0))
    )
    sources = tuple(4 * (query % keys) + index for query in range(9) for index in range(4))
    return shared_units.serve(ones(*LEADING, source.length), -1, source, target, sources)


_OF_LINES = (unit_softmax.log_softmax_cut, unit_softmax.softmax_cut)
USES: dict[tuple[Callable[..., Any], str], Callable[[Axis], Any]] = {
    (unit_linear.column, ""): column,
    (unit_linear.column, "all columns of one `entering` whose trees are alike"): columns,
    (unit_linear.row, ""): row,
    (unit_linear.column, "tokens"): column_of_tokens,
    (unit_linear.row, "tokens"): row_of_tokens,
    (unit_contract.contract, ""): contract,
    (unit_softmax.max_cut, ""): largest,
    (unit_softmax.amax_cut, ""): lambda axis: unit_softmax.amax_cut(
        part(axis).detach(), -1, at(axis)
    ),
    (unit_softmax.amax_cut, "a gradient is wanted"): along(unit_softmax.amax_cut),
    **{(each, "place.plain"): along(each, is_plain=True) for each in _OF_LINES},
    **{(each, "other"): along(each) for each in _OF_LINES},
    (unit_softmax.cross_entropy_cut, "place.plain, no weight"): loss(is_plain=True),
    (unit_softmax.cross_entropy_cut, "the same with label_smoothing"): loss(
        is_plain=True, label_smoothing=0.1
    ),
    (unit_softmax.cross_entropy_cut, "other"): loss(is_plain=False),
    (unit_lookup.lookup_rows, ""): lambda axis: lookup(axis, unit_lookup.lookup_rows, 0),
    (unit_lookup.lookup_columns, ""): lambda axis: lookup(axis, unit_lookup.lookup_columns, 1),
    (unit_moves.joined, ""): lambda axis: unit_moves.joined(
        part(axis).detach(), 2, at(axis), "forward"
    ),
    (unit_moves.gather, ""): along(unit_moves.gather),
    **{
        (function, ""): lambda axis, f=function: f(ones(*LEADING, SIZE), -1, at(axis))
        for function in (unit_moves.take, unit_moves.held_part)
    },
    **{
        (function, ""): lambda axis, f=function: product(f, axis)
        for function in (
            unit_products.linear,
            unit_products.product_rows,
            unit_products.product_columns,
        )
    },
    (unit_products.start_sum, ""): started,
    (unit_products.sum_to_tokens, ""): summed_to_tokens,
    (unit_sums.sum_held, ""): lambda axis: unit_sums.sum_held(
        torch.ones(at(axis).length, 5), at(axis), torch.ones(()), "forward"
    ),
    (unit_sums.spread, ""): lambda axis: unit_sums.spread(
        ones(*LEADING, 1), (*LEADING, at(axis).length), -1, at(axis)
    ),
    (unit_sums.expand, ""): lambda axis: unit_sums.expand(ones(3, 1), (*LEADING, 4)),
    (unit_sums.fold, ""): lambda axis: unit_sums.fold(ones(*LEADING, 4), (0, 2)),
    (unit_sums.sum_cut, ""): along(unit_sums.sum_cut),
    (unit_sums.mean_cut, ""): along(unit_sums.mean_cut),
    (shared_units.serve, ""): lambda axis: served(axis, keys=9),
    (shared_units.serve, "several ranks hold a source"): lambda axis: served(axis, keys=1),
}
SILENT = {
    unit_moves: {"checked_dim", "is_compared", "not_compared"},
    unit_products: {"ProductTerm", "tell", "tell_bias"},
    embedding: {"as_integers", "check_ids", "copy_rows", "padding_row", "pick"}
    | {"gradient_of_table"},
    input_gradients: {"PendingTerms", "Entering", "will_sum"},
    unit_split: {"Pieces", "UnitSplit", "Selection"},
    shared_units: {"Recipe", "recipe_of", "where_served"},
}
