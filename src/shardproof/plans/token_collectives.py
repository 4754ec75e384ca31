"""What sequence parallelism makes of the collectives of a plan.

Source: Korthikanti et al. 2022 (arXiv 2205.05198, section 4.2.2) for the sums and gathers; the
exchange of a norm is decision 0054.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

from shardproof.leaves import Cut
from shardproof.numerics.precision import node_dtype
from shardproof.plans.collective import Collective, Direction
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.module_plan import ModulePlan
from shardproof.plans.style import ColumnParallel


def with_tokens_cut(plan: ModelPlan, norms: Collection[str]) -> ModelPlan:
    """The plan with the collectives of activations that are cut along their tokens.

    Args:
        plan: the model's own `tp_plan`, whose code is known to hand activations from layer to
            layer.
        norms: names of the modules that are norms over the features of whole activations.
    """
    modules = tuple(
        replace(each, collectives=tuple(_of_module(each, plan.degree, each.name in norms)))
        for each in plan.modules
    )
    return replace(plan, modules=modules, sequence_parallel=True)


def _of_module(module: ModulePlan, degree: int, is_norm: bool) -> Iterator[Collective]:
    for each in module.collectives:
        if each.kind == "all_reduce" and each.what == "input gradient":
            yield _gathered(each, "forward", "input")
            yield _gathered(each, "backward", "input")
            yield replace(each, kind="reduce_scatter", of_tokens=True)
        elif each.kind == "all_reduce" and each.what == "outputs":
            yield replace(each, kind="reduce_scatter", of_tokens=True)
            yield _gathered(each, "backward", "output gradient")
        elif module.role == "vocabulary":
            yield each
            yield _gathered(each, "backward", "output gradient")
        else:
            if isinstance(module.style, ColumnParallel) and each.what == "input":
                yield _gathered(each, "forward", "tokens of the input")
            yield each
    if is_norm and not module.is_cut and degree > 1:
        yield from _of_norm(module, degree)


def _gathered(sum_: Collective, direction: Direction, what: str) -> Collective:
    """The gather of the tokens of what a sum goes over."""
    return replace(
        sum_, kind="all_gather", direction=direction, what=what, cut=None, parts=(), of_tokens=True
    )


def _of_norm(module: ModulePlan, degree: int) -> Iterator[Collective]:
    """An exchange of tokens for features, and a gather of the sums, for each parameter."""
    for each in module.parameters:
        (size,) = each.shape
        parts, what = Cut(size, degree, degree).sizes(), f"{each.name} gradient"
        wide = node_dtype(each.dtype)
        yield Collective("exchange", "backward", what, wide, size, parts=parts, of_tokens=True)
        yield Collective("all_gather", "backward", what, each.dtype, fixed=size, parts=parts)
