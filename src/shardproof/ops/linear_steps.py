"""What observers are told of the products of a cut linear. Nothing here computes."""

from collections.abc import Sequence

from torch import Tensor

from shardproof import observing
from shardproof.comm.plans import written_sum
from shardproof.comm.split import Split
from shardproof.observing import PARTIAL, REPLICATE, Operand, Placement, StepEvent
from shardproof.tree import node_name, nodes_of_run


def tell(split: Split, operation: str, phase: str, detail: str, *tensors: Operand) -> None:
    """Tell of an operation of one rank; the last of `tensors` is the result.

    Args:
        split: of the layer.
        operation: "product", "sum of rows", ...
        phase: "forward" or "backward".
        detail: a formula.
        tensors: the operands, then the result.
    """
    observing.tell(StepEvent(operation, phase, split.name, detail, tensors[:-1], tensors[-1]))


def tell_linear(
    split: Split,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    y: Tensor,
    places: tuple[Placement, Placement],
) -> None:
    """Tell of `y = x @ weight.T + bias` in forward.

    Args:
        split: of the layer.
        tensors: x, weight and bias.
        y: the result.
        places: of weight and bias, and of the result.
    """
    x, weight, bias = tensors
    of_weight, of_y = places
    inputs = [Operand("x", x, REPLICATE), Operand("weight", weight, of_weight)]
    if bias is not None:
        inputs.append(Operand("bias", bias, of_weight))
    what = "y = x @ weight.T" + ("" if bias is None else " + bias")
    tell(split, "product", "forward", what, *inputs, Operand("y", y, of_y))


def tell_bias_gradient(split: Split, grad_y: Tensor, grad: Tensor, *, is_cut: bool) -> None:
    """Tell of the sum of the rows of `grad_y` in backward.

    Args:
        split: of the layer.
        grad_y: (M, N).
        grad: (N,).
        is_cut: along N.
    """
    source = Operand("grad_y", grad_y, split.placement(1) if is_cut else REPLICATE)
    output = Operand("grad_bias", grad, split.placement(0) if is_cut else REPLICATE)
    what = "grad_bias = the sum of the rows of grad_y"
    tell(split, "sum of rows", "backward", what, source, output)


def tell_alone(
    split: Split, a: Tensor, b: Tensor, y: Tensor, direction: str, bias: Tensor | None = None
) -> None:
    """Tell of a contraction on one rank, which adds all leaves by itself.

    Args:
        split: of the contracted dim.
        a: as in `tell_parts`.
        b: likewise.
        y: the result.
        direction: "forward" or "backward".
        bias: that was added.
    """
    what, inputs, name = _contraction(split, a, b, direction)
    if bias is not None:
        what, inputs = f"{what} + bias", [*inputs, Operand("bias", bias, REPLICATE)]
    output = Operand(name, y, REPLICATE)
    tell(split, "product", direction, what, *inputs, output)
    if split.cut.num_leaves > 1:
        tell(split, "addition", direction, written_sum(split.cut), output)


def tell_parts(split: Split, a: Tensor, b: Tensor, parts: Sequence[Tensor], direction: str) -> None:
    """Tell of this rank's parts of a contraction that is summed over the axis.

    Args:
        split: of the contracted dim.
        a: (M, held), the input in forward and the gradient of the output in backward.
        b: the weight, (N, held) in forward and (held, N) in backward.
        parts: (M, N), each.
        direction: "forward" or "backward".
    """
    if split.axis.size == 1:
        tell_alone(split, a, b, parts[0], direction)
        return
    if not split.arithmetic.is_invariant:
        own = split.leaves.own
        owned = b[:, own] if direction == "forward" else b[own]
        what, inputs, name = _contraction(split, a[:, own], owned, direction)
        tell(split, "product", direction, what, *inputs, Operand(name, parts[0], PARTIAL))
        return
    leaves = split.leaves
    for node, part in zip(nodes_of_run(leaves.num_leaves, leaves.run), parts, strict=True):
        first, last = node[0] - leaves.run.start, node[1] - 1 - leaves.run.start
        at = slice(leaves.slices[first].start, leaves.slices[last].stop)
        owned = b[:, at] if direction == "forward" else b[at]
        held = split.cut.units(range(*node))
        what, inputs, name = _contraction(split, a[:, at], owned, direction, held)
        output = Operand(f"{name}, {node_name(node)}", part, PARTIAL, node)
        tell(split, "product", direction, f"{what}, {node_name(node)}", *inputs, output)


def _contraction(
    split: Split, a: Tensor, b: Tensor, direction: str, held: range | None = None
) -> tuple[str, list[Operand], str]:
    """The formula of a product over the cut dim, its operands, and its result's name."""
    is_forward = direction == "forward"
    x, y = ("x", "y") if is_forward else ("grad_y", "grad_x")
    held = split.cut.units(split.leaves.run) if held is None else held
    inputs = [
        Operand(x, a, split.placement(1, held)),
        Operand("weight", b, split.placement(1 if is_forward else 0, held)),
    ]
    return f"{y} = {x} @ weight{'.T' if is_forward else ''}", inputs, y
