"""`DataParallel`: gradients of a batch whose bits depend neither on ranks nor on accumulation.

The samples of a step are cut into *batch leaves*, whose number the scheme fixes. A pass (forward
and backward) computes one leaf, or a node of leaves that sums over the batch leaf by leaf. The
gradients of leaves are added by the canonical tree. A rank owns a run of leaves, and only nodes
travel. So the number of ranks and of passes decides who adds, and never the order of additions.
"""

from collections.abc import Callable
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from shardproof.axis import Axis, checked_axis
from shardproof.batch_gradients import Passes
from shardproof.checked_objects import checked_model
from shardproof.checked_values import checked_whole
from shardproof.data_parallel_step import DataParallelStep, StepHistory, StepOptions
from shardproof.errors import UsageError
from shardproof.gradient_exchange import can_send_early
from shardproof.layers.base import ShardedModule
from shardproof.layers.registry import record_of
from shardproof.leaves import check_batch_degree
from shardproof.plans.apply import contract_for
from shardproof.scheme import Scheme, checked_scheme
from shardproof.wording import dtype_name, short_repr

LossOf = Callable[[slice], Any]
BATCH_LEAVES = 8  # where batch leaves are wanted and no number is given
BUCKET_BYTES = 25 << 20  # of gradients that are sent together


class DataParallel:
    """Computes the gradients of a batch that is shared out over ranks and passes.

    Args:
        model: a cut model or a plain one; every rank of `axis` holds the same part of it.
        axis: the ranks that share a batch.
        scheme: for a model that has no cut layer; otherwise the scheme of its layers counts.
        accumulate: number of groups in which a rank computes its samples, one after the other.
            With passes="leaf" it has no effect.
        passes: "leaf" computes each leaf by itself, whatever the model does. "node" computes the
            leaves of a tree node in one pass, which is faster: layers of shardproof then sum over
            the batch leaf by leaf. The first step is computed in both ways and compared. If you
            compute the loss yourself, return the loss of each sample.
        bucket_bytes: bytes of gradients that are sent together.

    Attributes:
        model: the model.
        axis: the ranks.
        num_leaves: number of batch leaves, for a batch with at least as many samples.

    Raises:
        UsageError: an argument is invalid, or the scheme of the model has no batch leaves.
        DegreeError: the axis has more ranks than there are batch leaves.
        MismatchError: the ranks were given different arguments.

    Comm:
        setup none in the ledger: small objects of all ranks go to all, uncounted.

    Example:
        scheme = shardproof.Scheme(batch_leaves=8)
        model = shardproof.parallelize(model, plan, axes["tp"], scheme=scheme)
        data_parallel = shardproof.DataParallel(model, axes["dp"])

        def loss_of(samples):
            rows = tokens[samples]
            loss = model(input_ids=rows, labels=rows, num_items_in_batch=1).loss
            return loss, rows[:, 1:].numel()

        loss = data_parallel.backward(loss_of, len(tokens))
    """

    def __init__(
        self,
        model: nn.Module,
        axis: Axis,
        *,
        scheme: Scheme | None = None,
        accumulate: int = 1,
        passes: Passes = "leaf",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.model = checked_model(
            model, what="the model of DataParallel", way_out="Give the module that is trained."
        )
        self.axis = checked_axis(axis)
        scheme = _scheme_of(model, scheme)
        self.num_leaves = scheme.batch_leaves or BATCH_LEAVES
        accumulate = checked_whole(accumulate, "accumulate")
        bucket_bytes = checked_whole(bucket_bytes, "bucket_bytes")
        passes = _checked_passes(passes, model)
        check_batch_degree(axis.size, self.num_leaves, where=f"axis {axis.name!r}")
        can_overlap = can_send_early(model, axis)
        values = {
            "scheme": scheme,
            "contract": contract_for(scheme, model),
            "passes": passes,
            "bucket_bytes": bucket_bytes,
            "overlap": can_overlap,
            **{
                f"parameter {name!r}": f"{tuple(each.shape)} {each.dtype} {each.requires_grad}"
                for name, each in model.named_parameters()
            },
        }
        axis.agree(values, what="arguments of DataParallel")
        self._options = StepOptions(
            model, axis, self.num_leaves, passes, accumulate, bucket_bytes, can_overlap
        )
        self._history = StepHistory()

    def backward(self, loss_of: LossOf, num_samples: int) -> Tensor:
        """Compute the gradients of the mean loss of a batch; all ranks call this.

        `loss_of` is called once for each pass of this rank. Each pass must depend on its samples
        alone. Gradients are added to those that the parameters have.

        Args:
            loss_of: `loss_of(samples)` computes the samples of a slice of the batch. It returns
                the sum of their losses, (), or the loss of each, (samples,); or a pair of this
                and the number that the sum is divided by: an int, such as the number of tokens
                that count. Without that number it is the number of samples.
            num_samples: number of samples of the batch, on all ranks together.

        Returns:
            (), Replicate, fp32 or fp64: the sum of all losses, divided once by the sum of the
            counts. The gradients are divided by it too.

        Raises:
            UsageError, MismatchError, NumericsError: as `step`.

        Comm:
            forward, backward as the model in each pass, and as `step`.
        """
        with self.step(num_samples) as step:
            for samples in step:
                result = loss_of(samples)
                is_pair = isinstance(result, tuple) and len(result) == 2
                step.backward(*(result if is_pair else (result,)))
        return step.loss

    def step(self, num_samples: int) -> DataParallelStep:
        """One step as a block with a loop of your own; all ranks enter it.

        The loop gives a slice of the batch for each pass of this rank. Compute the loss of these
        samples and call `step.backward(loss)`, or `step.backward(loss, count)`, once for each.
        When the block ends, the parameters have the gradients of the mean loss of the whole batch,
        added to those that they had before, and `step.loss` is that mean. With passes="node", the
        first step gives all samples twice: leaf by leaf, and node by node.

        After an error in the block, gradients and dropouts are as before it.

        Args:
            num_samples: number of samples of the batch, on all ranks together.

        Raises:
            UsageError: a pass had no backward or two, a loss is no sum with a gradient, a count is
                no whole number or all are 0, a gradient is sparse, a pass changed a buffer or drew
                from torch's global generator, the step was used before, or another one has begun.
            MismatchError: the ranks were given different numbers of samples, or hold different
                weights before the first step.
            NumericsError: with passes="node", the model sums over the batch in a way that does not
                go leaf by leaf.

        Comm:
            backward one all_reduce of each bucket of gradients, and of the loss, over `axis`; over
            gloo and nccl they begin while the last pass of a rank runs; and small objects of all
            ranks, uncounted.

        Example:
            with data_parallel.step(len(tokens)) as step:
                for samples in step:
                    loss = model(input_ids=tokens[samples]).logits.square().sum()
                    step.backward(loss)
            print(step.loss)
        """
        num_samples = checked_whole(num_samples, "num_samples")
        return DataParallelStep(self._options, self._history, num_samples)


def _checked_passes(passes: Any, model: nn.Module) -> Passes:
    """The argument `passes`."""
    if passes not in get_args(Passes):
        raise UsageError(
            f"passes={short_repr(passes)} is unknown. Use one of: {', '.join(get_args(Passes))}."
        )
    for name, parameter in model.named_parameters():
        if passes == "node" and parameter.dtype not in (torch.float32, torch.float64):
            raise UsageError(
                f"passes='node' sums over a batch in float32 and float64, and parameter {name!r} "
                f"is {dtype_name(parameter.dtype)}. Use passes='leaf'."
            )
    return cast(Passes, passes)


def _scheme_of(model: nn.Module, scheme: Scheme | None) -> Scheme:
    """The scheme of the model's layers, or of the caller for a model without any."""
    schemes = [
        record_of(module).scheme for module in model.modules() if isinstance(module, ShardedModule)
    ]
    if not schemes:
        return Scheme(batch_leaves=BATCH_LEAVES) if scheme is None else checked_scheme(scheme)
    if scheme is not None and scheme != schemes[0]:
        raise UsageError(
            f"DataParallel was given {scheme}, and the model was cut by {schemes[0]}. Leave "
            "scheme= out: that of the model counts."
        )
    if schemes[0].batch_leaves is None:
        raise UsageError(
            "the model was cut by a scheme without batch leaves, which DataParallel adds "
            f"gradients by. Use parallelize(..., scheme=Scheme(batch_leaves={BATCH_LEAVES}))."
        )
    first: Scheme = schemes[0]
    return first
