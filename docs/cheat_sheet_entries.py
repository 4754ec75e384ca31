"""What the cheat sheet says of each way to cut, and the rules that it gives.

Every number, shape, placement and consequence is checked by tests/test_cheat_sheet.py and
tests/test_cheat_sheet_mistakes.py against runs of the layers.
"""

from cheat_sheet import Entry, Message, Mistake, Piece

RULES = (
    (
        "The gradient of a Replicate tensor that each rank uses differently is Partial.",
        "A rank knows only what its own use adds. The sum is still to be made.",
    ),
    (
        "The gradient of a Replicate tensor that all ranks use alike is Replicate.",
        "Each rank has all of it already: a row bias, a norm, a loss. Nothing is sent.",
    ),
    (
        "The gradient of a Partial tensor is Replicate.",
        "Every summand enters the sum with weight 1.",
    ),
    (
        "The gradient of a Shard(d) tensor is Shard(d).",
        "A rank knows all about its own part.",
    ),
    (
        "A column-parallel weight is stored Shard(0), a row-parallel one Shard(1).",
        "nn.Linear stores (out, in) and computes x @ weight.T: the columns of the matrix in x @ A "
        "are dim 0 of the weight.",
    ),
    (
        "The bias of a row layer is added after the sum.",
        "Before it every rank would add its own, and it would count R times.",
    ),
)

_INPUT = Piece("x", ("T", "H"), "Replicate", "Partial", "Replicate")
_OUTPUT = Piece("y", ("T", "H"), "Replicate", "Replicate")


def _sum(direction: str, what: str, over: str = "") -> Message:
    return Message(direction, "all_reduce", what, ("T", "H"), over=over)


COLUMN = Entry(
    name="Column",
    code=("layer = ColumnParallelLinear(H, F, axis=axis)",),
    idea="Each rank has F_r of the output features, and all of the input.",
    blocks="x:both @ A:columns = y:columns",
    pieces=(
        _INPUT,
        Piece("weight", ("F_r", "H"), "Shard(0)", "Shard(0)"),
        Piece("bias", ("F_r",), "Shard(0)", "Shard(0)"),
        Piece("y", ("T", "F_r"), "Shard(-1)", "Shard(-1)"),
    ),
    messages=(_sum("backward", "the gradient of x (f)", over="F"),),
    mistakes=(
        Mistake(
            "no f",
            "The gradient of x is not summed.",
            "Each rank goes on with its summand, and all layers before this one learn from a "
            "part of the gradient. The loss of this step looks right.",
            made_by="column-input-gradient-not-summed",
        ),
        Mistake(
            "part taken for whole",
            "y is taken for whole.",
            "A softmax, a norm or a mean over its features sees F_r of them.",
        ),
        Mistake(
            "wrong dim",
            "The weight is cut along dim 1, its columns.",
            "Those are input features: it is the part of a row layer, of shape (F, H_r).",
        ),
    ),
)

ROW = Entry(
    name="Row",
    code=("layer = RowParallelLinear(F, H, axis=axis)",),
    idea="Each rank has F_r of the input features, and makes a summand of every output.",
    blocks="x:columns @ B:rows = y:sum",
    pieces=(
        Piece("x", ("T", "F_r"), "Shard(-1)", "Shard(-1)"),
        Piece("weight", ("H", "F_r"), "Shard(1)", "Shard(1)"),
        Piece("summand", ("T", "H"), "Partial", "Replicate"),
        Piece("bias", ("H",), "Replicate", "Replicate"),
        _OUTPUT,
    ),
    messages=(_sum("forward", "the summands (g)", over="F"),),
    mistakes=(
        Mistake(
            "bias",
            "The bias is added before the sum.",
            "It counts R times.",
            made_by="row-bias-on-every-rank",
        ),
        Mistake(
            "summed twice",
            "The gradient of y is summed as well.",
            "It is whole on each rank: the gradients of x, weight and bias come out R times too "
            "large.",
            made_by="row-gradient-summed-again",
        ),
        Mistake(
            "relu of summands",
            "An activation is applied before the sum.",
            "relu(p0) + relu(p1) is not relu(p0 + p1).",
        ),
    ),
)

PAIR = Entry(
    name="The pair",
    code=(
        "up = ColumnParallelLinear(H, F, axis=axis)",
        "down = RowParallelLinear(F, H, axis=axis)",
    ),
    idea="y = down(relu(up(x))): the hidden features stay cut, and nothing is sent in between.",
    blocks="x:both @ A:columns → B:rows = y:sum",
    pieces=(
        _INPUT,
        Piece("up.weight", ("F_r", "H"), "Shard(0)", "Shard(0)"),
        Piece("h", ("T", "F_r"), "Shard(-1)", "Shard(-1)"),
        Piece("down.weight", ("H", "F_r"), "Shard(1)", "Shard(1)"),
        _OUTPUT,
    ),
    messages=(
        _sum("forward", "the summands of y (g)", over="F"),
        _sum("backward", "the gradient of x (f)", over="F"),
    ),
    mistakes=(
        Mistake(
            "gathered in between",
            "h is gathered between the two.",
            "Right, but 4·T·F bytes more are gathered forward and backward.",
        ),
        Mistake(
            "norm in between",
            "A norm or a softmax over h stands in between.",
            "It sees F_r features. Only functions of single elements may stand here.",
        ),
        Mistake(
            "two sums",
            "Two column layers read one x (gate and up), and each sums its gradient.",
            "Two all_reduces where one will do: SharedInput.",
        ),
    ),
)

VOCABULARY = Entry(
    name="Vocabulary",
    code=(
        "embedding = VocabParallelEmbedding(V, H, axis=axis)",
        "head = ColumnParallelLinear(H, V, axis=axis)",
        "vocab_cross_entropy(head(x), target, axis=axis, cut=head.cut)",
    ),
    idea="Each rank has V_r tokens: it picks their rows, and computes their logits.",
    blocks="E:rows → x:sum @ W:columns → loss:",
    pieces=(
        Piece("ids", ("T",), "Replicate", ""),
        Piece("embedding.weight", ("V_r", "H"), "Shard(0)", "Shard(0)"),
        Piece("picked", ("T", "H"), "Partial", "Replicate"),
        Piece("x", ("T", "H"), "Replicate", "Partial", "Replicate"),
        Piece("head.weight", ("V_r", "H"), "Shard(0)", "Shard(0)"),
        Piece("logits", ("T", "V_r"), "Shard(-1)", "Shard(-1)"),
        Piece("losses", ("T",), "Replicate", "Replicate"),
    ),
    messages=(
        _sum("forward", "the picked rows"),
        Message(
            "forward", "all_gather", "3 numbers per token and leaf", ("3", "L", "T"), along="L"
        ),
        _sum("backward", "the gradient of x", over="V"),
    ),
    mistakes=(
        Mistake(
            "not shifted",
            "An id is not shifted by the first token of the rank.",
            "With 2 ranks, token 30 is row 4 of rank 1. A rank that has not the token adds zeros.",
        ),
        Mistake(
            "softmax of a part",
            "Each rank takes the softmax of its own logits.",
            "All probabilities together add up to R.",
            made_by="softmax-over-own-vocabulary",
        ),
        Mistake(
            "gathered logits",
            "The logits are gathered for the loss.",
            "4·T·V bytes are gathered where 12·L·T are enough, and each rank keeps T·V numbers.",
        ),
    ),
)

ATTENTION = Entry(
    name="Attention",
    code=(
        "plan = {name: Attention(queries=Q, keys=K, head_dim=D)}",
        "parallelize(model, plan, axis)",
    ),
    idea="Each rank has Q_r query heads, and holds the K_r key-value heads that they need. Where "
    "ranks hold the same head, its gradient is whole on each of them. (A model that is "
    "not of transformers may give attend=: see docs/plans.md.)",
    blocks="x:both @ qkv:columns → o:rows = y:sum",
    pieces=(
        _INPUT,
        Piece("q_proj.weight", ("Q_r·D", "H"), "Shard(0)", "Shard(0)"),
        Piece("k_proj.weight", ("K_r·D", "H"), "Shard(0), held", "Shard(0), held"),
        Piece("v_proj.weight", ("K_r·D", "H"), "Shard(0), held", "Shard(0), held"),
        Piece("heads", ("T", "Q_r·D"), "Shard(-1)", "Shard(-1)"),
        Piece("o_proj.weight", ("H", "Q_r·D"), "Shard(1)", "Shard(1)"),
        _OUTPUT,
    ),
    messages=(
        _sum("forward", "the summands of y", over="Q"),
        Message(
            "backward",
            "all_gather",
            "P parts of gradients of k and v",
            ("2", "P", "T", "D"),
            along="P",
            when="if ranks share a key-value head",
        ),
        _sum("backward", "the gradient of x", over="Q"),
    ),
    mistakes=(
        Mistake(
            "through a head",
            "Features are shared out without regard to heads.",
            "48 features on 3 ranks are 16 each, which cut through heads of 12. A softmax needs "
            "whole heads.",
        ),
        Mistake(
            "shared head",
            "The gradients of a key-value head on two ranks are not added.",
            "Each rank has only what its own query heads add, and the copies drift apart.",
            made_by="key-value-gradients-not-summed",
        ),
        Mistake(
            "counted twice",
            "A shared head is counted on each rank that holds it.",
            "The gradient norm is too large, and clipping too strong.",
        ),
    ),
)

GATHER = Entry(
    name="Gather",
    code=(
        "first = ColumnParallelLinear(H, F, axis=axis)",
        "last = ColumnParallelLinear(",
        "    F, H, axis=axis, gather_input=True, gather_output=True)",
    ),
    idea="Two column layers in a row: h is gathered before the second, y after it.",
    blocks="x:both @ A:columns → h:both @ B:columns → y:both",
    pieces=(
        _INPUT,
        Piece("h", ("T", "F_r"), "Shard(-1)", "Shard(-1)"),
        Piece("h, gathered", ("T", "F"), "Replicate", "Partial", "Shard(-1)"),
        Piece("last.weight", ("H_r", "F"), "Shard(0)", "Shard(0)"),
        Piece("y, own part", ("T", "H_r"), "Shard(-1)", "Shard(-1)"),
        Piece("y, gathered", ("T", "H"), "Replicate", "Replicate", "Shard(-1)"),
    ),
    messages=(
        Message("forward", "all_gather", "h", ("T", "F"), along="F"),
        Message("forward", "all_gather", "y", ("T", "H"), along="H"),
        Message("backward", "reduce_scatter", "the gradient of h", ("T", "F"), over="H", along="F"),
        _sum("backward", "the gradient of x", over="F"),
    ),
    mistakes=(
        Mistake(
            "partial taken for whole",
            "The gradient of the gathered h is sliced, as if it were whole.",
            "It is Partial: what the other ranks add is missing.",
            made_by="partial-gradient-taken-for-whole",
        ),
        Mistake(
            "whole taken for partial",
            "The gradient of the gathered y is summed, as if it were Partial.",
            "All ranks use y alike: it comes out R times too large.",
            made_by="whole-gradient-taken-for-partial",
        ),
        Mistake(
            "mean of a part",
            "The loss is a mean over y's own part, not gathered.",
            "It divides by T·H_r and not by T·H: gradients are H / H_r times too large.",
            made_by="loss-divided-by-local-elements",
        ),
    ),
)

ENTRIES = (COLUMN, ROW, PAIR, VOCABULARY, ATTENTION, GATHER)
