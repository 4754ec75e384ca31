"""Linear layers for the cases: cut where there is an axis, plain `nn.Linear` in plain torch.

Made without numbers in them: `draws` fills them, the same at every degree.
"""

from torch import nn

from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.prover.case import Trial


def column_linear(
    trial: Trial,
    in_features: int,
    out_features: int,
    *,
    name: str,
    bias: bool = True,
    gather_input: bool = False,
    gather_output: bool = False,
) -> nn.Module:
    """A linear layer cut along out_features, uninitialised.

    Args:
        trial: the run it is for.
        in_features: global size.
        out_features: global size.
        name: for messages.
        bias: whether there is one.
        gather_input: the input comes as Shard(-1) and is gathered first.
        gather_output: the output is gathered to Replicate.
    """
    if trial.axis is None:
        return nn.Linear(in_features, out_features, bias=bias, device="meta").to_empty(device="cpu")
    layer = ColumnParallelLinear(
        in_features,
        out_features,
        axis=trial.axis,
        bias=bias,
        gather_input=gather_input,
        gather_output=gather_output,
        name=name,
        scheme=trial.scheme,
        device="meta",
    )
    return layer.to_empty(device="cpu")


def row_linear(
    trial: Trial,
    in_features: int,
    out_features: int,
    *,
    name: str,
    bias: bool = True,
    input_is_parallel: bool = True,
) -> nn.Module:
    """A linear layer cut along in_features, uninitialised.

    Args:
        trial: the run it is for.
        in_features: global size.
        out_features: global size.
        name: for messages.
        bias: whether there is one.
        input_is_parallel: False if the input comes whole and is to be cut.
    """
    if trial.axis is None:
        return nn.Linear(in_features, out_features, bias=bias, device="meta").to_empty(device="cpu")
    layer = RowParallelLinear(
        in_features,
        out_features,
        axis=trial.axis,
        bias=bias,
        input_is_parallel=input_is_parallel,
        name=name,
        scheme=trial.scheme,
        device="meta",
    )
    return layer.to_empty(device="cpu")
