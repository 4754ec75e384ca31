"""The products of a cut linear that no rank has to share, and what observers are told of them."""

from torch import Tensor
from torch.nn import functional as F

from shardproof import observing
from shardproof.comm.split import Split
from shardproof.observing import REPLICATE, Operand
from shardproof.ops import linear_steps as steps


def product(rows: Tensor, weight: Tensor, bias: Tensor | None, split: Split) -> Tensor:
    """`rows @ weight.T + bias`, cut along out_features.

    Args:
        rows: (M, K), Replicate.
        weight: (held, K), Shard(0).
        bias: (held,), Shard(0), or None.
        split: of out_features.
    Returns:
        (M, held), Shard(1).
    Comm:
        forward none; backward none.
    """
    y = split.arithmetic.linear(rows, weight, bias, split.held_slices)
    if observing.is_on():
        places = split.placement(0), split.placement(1)
        steps.tell_linear(split, (rows, weight, bias), y, places)
    return y


def weight_gradient(grad_rows: Tensor, rows: Tensor, split: Split) -> Tensor:
    """`grad_rows.T @ rows`, cut along out_features.

    Args:
        grad_rows: (M, held), Shard(1).
        rows: (M, K), Replicate.
        split: of out_features.
    Returns:
        (held, K), Shard(0).
    Comm:
        forward none; backward none.
    """
    grad = split.arithmetic.product_rows(grad_rows.t(), rows, split.held_slices, over_batch=True)
    if observing.is_on():
        steps.tell(
            split, "product", "backward", "grad_weight = grad_y.T @ x",
            Operand("grad_y", grad_rows, split.placement(1)), Operand("x", rows, REPLICATE),
            Operand("grad_weight", grad, split.placement(0)),
        )  # fmt: skip
    return grad


def bias_gradient(grad_rows: Tensor, split: Split, *, is_cut: bool) -> Tensor:
    """The sum of the rows.

    Args:
        grad_rows: (M, N), Shard(1) if `is_cut`, else Replicate.
        split: of the layer.
        is_cut: the bias is cut.
    Returns:
        (N,), Shard(0) if `is_cut`, else Replicate.
    Comm:
        forward none; backward none.
    """
    grad = split.arithmetic.sum_batch_rows(grad_rows)
    if observing.is_on():
        steps.tell_bias_gradient(split, grad_rows, grad, is_cut=is_cut)
    return grad


def add_bias(y: Tensor, bias: Tensor, split: Split) -> Tensor:
    """Add the bias of a row linear to the sum, in place.

    Args:
        y: (M, N), Replicate, written.
        bias: (N,), Replicate.
        split: of in_features.
    Returns:
        `y`.
    Comm:
        forward none; backward none.
    """
    if not observing.is_on():
        return y.add_(bias)
    inputs = Operand("y", observing.before_write(y), REPLICATE), Operand("bias", bias, REPLICATE)
    output = Operand("y", y.add_(bias), REPLICATE)
    steps.tell(split, "bias", "forward", "y + bias, once, after the sum", *inputs, output)
    return y


def product_columns(
    split: Split, a: Tensor, b: Tensor, name: str, *, over_batch: bool = False
) -> Tensor:
    """`grad_x` or `grad_weight`: a whole gradient times a matrix that is cut by columns.

    Args:
        split: of in_features.
        a: (M, N), Replicate.
        b: (N, owned), Shard(1).
        name: of the result.
        over_batch: N are the rows of a batch.
    Returns:
        (M, owned), Shard(1).
    Comm:
        forward none; backward none.
    """
    y = split.arithmetic.product_columns(a, b, split.leaves.slices, over_batch=over_batch)
    if observing.is_on():
        is_grad_x = name == "grad_x"
        cut = split.placement(1, split.owned)
        steps.tell(
            split, "product", "backward",
            f"{name} = {'grad_y @ weight' if is_grad_x else 'grad_y.T @ x'}",
            Operand("grad_y", a if is_grad_x else a.t(), REPLICATE),
            Operand("weight" if is_grad_x else "x", b, cut), Operand(name, y, cut),
        )  # fmt: skip
    return y


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: Split) -> Tensor:
    """Torch's own linear: one rank, native numerics.

    Args:
        x: (*, in_features), Replicate.
        weight: (out_features, in_features), Replicate.
        bias: (out_features,), Replicate, or None.
        split: of the layer.
    Returns:
        (*, out_features), Replicate.
    Comm:
        forward none; backward none.
    """
    y = F.linear(x, weight, bias)
    if observing.is_on():
        steps.tell_linear(split, (x, weight, bias), y, (REPLICATE, REPLICATE))
    return y
