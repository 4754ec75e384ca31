"""What the four teaching notebooks print: the one place that has it, for cases, lessons and tests.

Every value was copied from the notebook's own output, with these exceptions. Notebook 000 is kept
without outputs: its shapes follow from its code. The outputs of notebook 001 are unseeded draws,
which nobody can repeat, so only its shapes and its one comparison are here.
"""

from shardproof.prover.printed import Printed

MATMUL = "000_c325d0b38caeb9c9.txt"
FEED_FORWARD = "001_154408528b93d477.txt"
LINEAR = "002_bff0c980e9c9c989.txt"
MLP = "004_3830c7c1f4381139.txt"

# 000: y = x w with w (4, 8), batch 2. Rank is the number of the part less 1.
MATMUL_ROW_PRINTED = (
    Printed("w_row_1.shape", "w (initial)", shape=(2, 8), rank=0),
    Printed("w_row_2.shape", "w (initial)", shape=(2, 8), rank=1),
    Printed("y_1.shape", shape=(2, 8), rank=0),
    Printed("y_2.shape", shape=(2, 8), rank=1),
    Printed("(y_1+y_2).shape", "y", shape=(2, 8)),
    Printed("grad_row_1.shape", "w.grad", shape=(2, 8), rank=0),
    Printed("grad_row_2.shape", "w.grad", shape=(2, 8), rank=1),
)
MATMUL_COLUMN_PRINTED = (
    Printed("w_col_1.shape", "w (initial)", shape=(4, 4), rank=0),
    Printed("w_col_2.shape", "w (initial)", shape=(4, 4), rank=1),
    Printed("y_1.shape", "y", shape=(2, 4), rank=0),
    Printed("y_2.shape", "y", shape=(2, 4), rank=1),
    Printed("y_1_delta.shape", shape=(2, 4), rank=0),
    Printed("y_2_delta.shape", shape=(2, 4), rank=1),
    Printed("grad_col_1.shape", "w.grad", shape=(4, 4), rank=0),
    Printed("grad_col_2.shape", "w.grad", shape=(4, 4), rank=1),
    Printed("grad_col.shape", "w.grad", shape=(4, 8)),
)

# 001: 10 -> 40 -> 10 without bias, one sequence of five words.
FEED_FORWARD_PRINTED = (
    Printed("output.shape", shape=(1, 5, 40)),
    Printed("final_output.shape", "output", shape=(1, 5, 10)),
    Printed("output_parallel_1.shape", shape=(1, 5, 20), rank=0),
    Printed("output_parallel_2.shape", shape=(1, 5, 20), rank=1),
    Printed("final_output_parallel_1.shape", shape=(1, 5, 10), rank=0),
    Printed("final_output_parallel_2.shape", shape=(1, 5, 10), rank=1),
    Printed("final_output_tp.shape", "output", shape=(1, 5, 10)),
    Printed("allclose(final_output, final_output_tp)", "output", close=True),
)

# 002: 1024 -> 608 with bias, batch 32, one update; its gradients are stored transposed.
LINEAR_PLAIN_PRINTED = (
    Printed("dX", "input.grad", shape=(32, 1024), section="regular"),
    Printed("dW", "weight.grad", shape=(1024, 608), section="regular"),
    Printed("db", "bias.grad", shape=(608,), section="regular"),
    Printed("weights matching nn.Linear", "weight", close=True, section="regular"),
    Printed("bias matching nn.Linear", "bias", close=True, section="regular"),
    Printed("grad W matching nn.Linear", "weight.grad", close=True, section="regular"),
    Printed("grad b matching nn.Linear", "bias.grad", close=True, section="regular"),
)
LINEAR_COLUMN_PRINTED = (
    Printed("W_gpu1", "weight (initial)", shape=(304, 1024), rank=0),
    Printed("W_gpu2", "weight (initial)", shape=(304, 1024), rank=1),
    Printed("b_gpu1", "bias (initial)", shape=(1, 304), rank=0),
    Printed("b_gpu2", "bias (initial)", shape=(1, 304), rank=1),
    Printed("X_gpu1", shape=(32, 1024), rank=0),
    Printed("X_gpu2", shape=(32, 1024), rank=1),
    Printed("W_comb", "weight", shape=(608, 1024)),
    Printed("b_comb", "bias", shape=(1, 608)),
    Printed("dW_comb", "weight.grad", shape=(1024, 608)),
    Printed("db_comb", "bias.grad", shape=(608,)),
    Printed("weights matching nn.Linear", "weight", close=True),
    Printed("bias matching nn.Linear", "bias", close=True),
    Printed("grad W matching nn.Linear", "weight.grad", close=True),
    Printed("grad b matching nn.Linear", "bias.grad", close=True),
)
LINEAR_ROW_PRINTED = (
    Printed("W_gpu1", "weight (initial)", shape=(608, 512), rank=0),
    Printed("W_gpu2", "weight (initial)", shape=(608, 512), rank=1),
    Printed("b_gpu1", "bias (initial)", shape=(1, 608), rank=0),
    Printed("b_gpu2", "bias (initial)", shape=(1, 608), rank=1),
    Printed("X_gpu1", shape=(32, 512), rank=0),
    Printed("X_gpu2", shape=(32, 512), rank=1),
    Printed("W_comb", "weight", shape=(608, 1024)),
    Printed("b_comb", "bias", shape=(1, 608)),
    Printed("dW_comb", "weight.grad", shape=(608, 1024)),
    Printed("db_comb", "bias.grad", shape=(608,)),
    Printed("dX", "input.grad", shape=(32, 1024)),
    Printed("weights matching nn.Linear", "weight", close=True),
    Printed("bias matching nn.Linear", "bias", close=True),
    Printed(
        "grad W matching nn.Linear", "weight.grad", close=True, max_diff=4.0978193283081055e-08
    ),
    Printed("grad b matching nn.Linear", "bias.grad", close=True),
)

# 004: 6 -> 4 -> 2 on 32 samples, seed 12345. The outputs have four decimals and come from a GPU.
MLP_SEED, MLP_ATOL = 12345, 1e-4
MLP_OUTPUTS = (
    (0.1546, -0.5383), (0.1222, -0.3119), (0.6736, -0.2439), (0.8124, -0.3054),
    (0.4496, -0.4473), (0.4101, -0.5774), (0.4743, -0.6111), (0.5034, -0.3675),
    (0.3844, -0.3518), (0.5095, -0.5411), (0.6302, -0.4292), (0.0960, -0.5650),
    (0.5374, -0.3396), (0.4914, -0.3475), (0.9440, -0.1130), (0.7744, -0.2111),
    (0.4808, -0.3415), (0.3199, -0.5394), (0.5131, -0.4608), (-0.0191, -0.6592),
    (0.3838, -0.4386), (0.5702, -0.2098), (0.2020, -0.4805), (0.1737, -0.2273),
    (0.6647, -0.2574), (0.6794, -0.2492), (0.6364, -0.3637), (1.0508, -0.2086),
    (0.5117, -0.4432), (0.4517, -0.2172), (0.5502, -0.5689), (0.6571, -0.0120),
)  # fmt: skip


def _cmp(
    section: str,
    label: str,
    tensor: str,
    exact: bool,
    max_diff: float,
    *,
    rank: int | None = None,
) -> Printed:
    """One row of the notebook's `cmp`; all of them say `approximate: True`."""
    return Printed(
        label,
        tensor,
        exact=exact,
        close=True,
        max_diff=max_diff,
        rank=rank,
        is_of_two=section == "two devices" and rank is None,
        seed=MLP_SEED,
        section=section,
    )


MLP_CMP = (
    _cmp("one device", "forward pass", "output", True, 0.0),
    _cmp("two devices", "TP - forward pass", "output", False, 5.960464477539063e-08),
    _cmp("one device", "dW2", "output_layer.weight.grad", False, 2.9802322387695312e-08),
    _cmp("one device", "db2", "output_layer.bias.grad", True, 0.0),
    _cmp("one device", "dW1", "hidden_layer.weight.grad", False, 2.9802322387695312e-08),
    _cmp("one device", "db1", "hidden_layer.bias.grad", False, 1.862645149230957e-09),
    _cmp("two devices", "dW2_0", "output_layer.weight.grad", False, 2.9802322387695312e-08, rank=0),
    _cmp("two devices", "db2_0", "output_layer.bias.grad", False, 5.960464477539063e-08, rank=0),
    _cmp("two devices", "dW2_1", "output_layer.weight.grad", False, 1.4901161193847656e-08, rank=1),
    _cmp("two devices", "db2_1", "output_layer.bias.grad", False, 1.4901161193847656e-08, rank=1),
    _cmp("two devices", "dW1_0", "hidden_layer.weight.grad", False, 7.450580596923828e-09, rank=0),
    _cmp("two devices", "db1_0", "hidden_layer.bias.grad", False, 1.862645149230957e-09, rank=0),
    _cmp("two devices", "dW1_1", "hidden_layer.weight.grad", False, 2.9802322387695312e-08, rank=1),
    _cmp("two devices", "db1_1", "hidden_layer.bias.grad", True, 0.0, rank=1),
    _cmp("update", "manual_nW1", "hidden_layer.weight", False, 2.9802322387695312e-08),
    _cmp("update", "manual_nb1", "hidden_layer.bias", True, 0.0),
    _cmp("update", "manual_nW2", "output_layer.weight", True, 0.0),
    _cmp("update", "manual_nb2", "output_layer.bias", True, 0.0),
)
MLP_SHAPES = (
    Printed("W1.shape", "hidden_layer.weight (initial)", shape=(4, 6)),
    Printed("b1.shape", "hidden_layer.bias (initial)", shape=(4,)),
    Printed("W2.shape", "output_layer.weight (initial)", shape=(2, 4)),
    Printed("b2.shape", "output_layer.bias (initial)", shape=(2,)),
    Printed("W1_0.shape", "hidden_layer.weight (initial)", shape=(2, 6), rank=0),
    Printed("b1_0.shape", "hidden_layer.bias (initial)", shape=(2,), rank=0),
    Printed("W2_0.shape", "output_layer.weight (initial)", shape=(1, 4), rank=0),
    Printed("b2_0.shape", "output_layer.bias (initial)", shape=(1,), rank=0),
    Printed("W1_1.shape", "hidden_layer.weight (initial)", shape=(2, 6), rank=1),
    Printed("b1_1.shape", "hidden_layer.bias (initial)", shape=(2,), rank=1),
    Printed("W2_1.shape", "output_layer.weight (initial)", shape=(1, 4), rank=1),
    Printed("b2_1.shape", "output_layer.bias (initial)", shape=(1,), rank=1),
)
MLP_PRINTED = (
    *MLP_SHAPES,
    Printed("out", "output", values=MLP_OUTPUTS, seed=MLP_SEED),
    *MLP_CMP,
)
