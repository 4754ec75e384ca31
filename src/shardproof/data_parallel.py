"""`DataParallel`: gradients of a batch whose bits depend neither on ranks nor on accumulation.

The samples of a step are cut into *batch leaves*, whose number the scheme fixes. A pass (forward
and backward) computes one leaf, or a node of leaves that sums over the batch leaf by leaf. The
gradients of leaves are added by the canonical tree. A rank owns a run of leaves, and only nodes
travel. So the number of ranks and of passes decides who adds, and never the order of additions.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from shardproof import comm
from shardproof.axis import Axis, checked_axis
from shardproof.batch_gradients import LOSS, BatchStep, Bucket, Gradients, LossOf, PassError
from shardproof.checked_objects import checked_model
from shardproof.checked_values import checked_whole
from shardproof.errors import MismatchError, NumericsError, ShardproofError, UsageError
from shardproof.layers.base import ShardedModule
from shardproof.layers.registry import record_of
from shardproof.leaves import Cut, check_batch_degree, share
from shardproof.plans.apply import contract_for, sample_weights
from shardproof.scheme import Scheme, checked_scheme
from shardproof.tree import nodes_of_run
from shardproof.wording import dtype_name, short_repr

Passes = Literal["leaf", "node"]
BATCH_LEAVES = 8  # where batch leaves are wanted and no number is given
Problem = tuple[type[ShardproofError], str]
BUCKET_BYTES = 25 << 20  # of gradients that are sent together


@dataclass(frozen=True)
class _PartOfStep:
    """What a rank tells the others of its part of a step."""

    num_samples: int
    count: int
    has_gradient: tuple[bool, ...]
    draws: tuple[int, ...]
    loss_dtype: torch.dtype
    problem: Problem | None


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
        self._accumulate = checked_whole(accumulate, "accumulate")
        self._bucket_bytes = checked_whole(bucket_bytes, "bucket_bytes")
        self._passes = _checked_passes(passes, model)
        self._is_first = True
        self._is_compared = False  # passes of several leaves with those of one
        check_batch_degree(axis.size, self.num_leaves, where=f"axis {axis.name!r}")
        values = {
            "scheme": scheme,
            "contract": contract_for(scheme, model),
            "passes": self._passes,
            "bucket_bytes": self._bucket_bytes,
            **{
                f"parameter {name!r}": f"{tuple(each.shape)} {each.dtype} {each.requires_grad}"
                for name, each in model.named_parameters()
            },
        }
        axis.agree(values, what="arguments of DataParallel")

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
            UsageError: the loss is no sum with a gradient, a count is no whole number or all are
                0, a gradient is sparse, the forward changed a buffer, or it drew from torch's
                global generator.
            MismatchError: the ranks were given different numbers of samples, or hold different
                weights before the first step.
            NumericsError: with passes="node", the model sums over the batch in a way that does not
                go leaf by leaf.

        Comm:
            forward, backward as the model in each pass; then one all_reduce of each bucket of
            gradients, and of the loss, over `axis`; and small objects of all ranks, uncounted.
        """
        num_samples = checked_whole(num_samples, "num_samples")
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        before = [parameter.grad for _, parameter in named]
        step = BatchStep(self.model, named, Cut(num_samples, self.num_leaves, self.axis.size))
        if self._is_first:
            self._compare_weights()
        try:
            problem: Problem | None = None
            try:
                self._compute(step, loss_of)
            except PassError as error:  # the same on all ranks that share the model
                problem = UsageError, str(error)
            except NumericsError as error:
                problem = NumericsError, str(error)
            loss, gradients = self._total(step, num_samples, problem)
        except BaseException:
            step.advance_draws([0] * len(step.draws()))  # undo the draws of the failed step
            raise
        finally:
            for (_, parameter), grad in zip(named, before, strict=True):
                parameter.grad = grad
        for (_, parameter), grad in zip(named, gradients, strict=True):
            if grad is not None:
                grad = grad.view(parameter.shape).to(parameter.dtype)
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        self._is_first = False
        return loss

    def _compare_weights(self) -> None:
        self.axis.agree(
            sample_weights(self.model, with_parts=True),
            what="weights",
            way_out="Give every rank of the axis the same weights: load one state, or draw them "
            "from one seed.",
        )

    def _compute(self, step: BatchStep, loss_of: LossOf) -> None:
        """Compute the passes of this rank.

        Raises:
            NumericsError: passes of several leaves have other bits than those of one.
        """
        run, num_leaves = step.cut.run(self.axis.rank), step.cut.num_leaves
        is_compared = self._passes == "leaf" or self._is_compared
        by_leaf = {}
        if not is_compared:
            by_leaf = step.compute_all(loss_of, passes_of(run, num_leaves, "leaf"))
        passes = passes_of(run, num_leaves, self._passes, self._accumulate)
        nodes = step.compute_all(loss_of, passes)
        difference = "" if is_compared else step.difference(by_leaf, nodes)
        if difference:
            raise NumericsError(difference)
        self._is_compared |= any(len(each) > 1 for each in passes)

    @torch.no_grad()
    def _total(
        self, step: BatchStep, num_samples: int, problem: Problem | None
    ) -> tuple[Tensor, Gradients]:
        """Loss and gradients of the whole batch, flat, after the division."""
        mine = _PartOfStep(
            num_samples, step.count, step.has_gradient(), step.draws(), step.loss_dtype(), problem
        )
        told: list[_PartOfStep] = self.axis.gather_small(mine, what="the part of a batch")
        if len({each.num_samples for each in told}) > 1:
            sides = ", ".join(f"rank {rank}: {each.num_samples}" for rank, each in enumerate(told))
            raise MismatchError(
                f"the ranks of axis {self.axis.name!r} were given different num_samples. {sides}. "
                "Give the number of samples of the whole batch on every rank."
            )
        for kind, message in [each.problem for each in told if each.problem is not None]:
            raise kind(message)
        step.advance_draws([max(each) for each in zip(*(each.draws for each in told), strict=True)])
        count = sum(each.count for each in told)
        if count == 0:
            raise UsageError(
                "the counts of all samples are 0, and the mean of no losses is not a number. Leave "
                "out a batch in which nothing counts."
            )
        has_gradient = [any(each) for each in zip(*(t.has_gradient for t in told), strict=True)]
        most_bytes = self._bucket_bytes if self.axis.size > 1 else 0  # alone, nothing is packed
        is_double = any(each.loss_dtype == torch.float64 for each in told)
        loss_dtype = torch.float64 if is_double else torch.float32
        loss = torch.empty(0)
        gradients: Gradients = [None] * len(has_gradient)
        for bucket in step.buckets(has_gradient, most_bytes, loss_dtype):
            flat = self._sum_of(step, bucket).div_(count)
            for place, part in zip(bucket.places, flat.split(bucket.sizes), strict=True):
                if place == LOSS:
                    loss = part.view(())
                else:
                    gradients[place] = part
        return loss, gradients

    def _sum_of(self, step: BatchStep, bucket: Bucket) -> Tensor:
        """The sum over the ranks of a bucket, flat, in `node_dtype`."""
        nodes = {node: bucket.flat(each) for node, each in step.nodes.items()}
        return comm.all_reduce_nodes(
            nodes,
            self.axis,
            cut=step.cut,
            shape=(sum(bucket.sizes),),
            like=torch.empty(0, dtype=bucket.dtype, device=bucket.device),
            direction="backward",
            who=bucket.name,
        )


def passes_of(run: range, num_leaves: int, passes: Passes, accumulate: int = 1) -> list[range]:
    """The leaves of each pass of a rank.

    Args:
        run: leaves of the rank.
        num_leaves: of the batch.
        passes: a pass for each leaf, or for each node of the tree in each group of leaves.
        accumulate: number of groups, as in `DataParallel`.
    """
    if passes == "leaf":
        return [range(leaf, leaf + 1) for leaf in run]
    groups = share(len(run), min(accumulate, len(run)) or 1)
    parts = (run[group.start : group.stop] for group in groups)
    return [range(*node) for part in parts for node in nodes_of_run(num_leaves, part)]


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
