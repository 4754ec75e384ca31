"""A plan as a user gave it, made into a `Plan` or into one clear error."""

from collections.abc import Mapping
from typing import Any

from shardproof.errors import PlanError, UsageError
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Plan
from shardproof.scheme import DEFAULT_SCHEME, Scheme, checked_scheme
from shardproof.wording import shown


def is_carried(given: Any) -> bool:
    """Whether the model carries a plan, as its `tp_plan`.

    Args:
        given: as for `read_plan`.
    """
    return given is None or (isinstance(given, ModelPlan) and given.is_carried)


def read_plan(given: Any, scheme: Any) -> tuple[Plan | None, Scheme]:
    """The plan, None for that which the model carries, and the scheme to cut with.

    Args:
        given: pattern -> style, a `Plan`, a `ModelPlan`, or None.
        scheme: for a plan that has none.

    Raises:
        PlanError: it is no plan, or a pattern in it is no text.
        UsageError: the plan has a scheme, and another one is given.
    """
    scheme = checked_scheme(scheme)
    plan = given.plan if isinstance(given, ModelPlan) else given
    if plan is None:
        return None, scheme
    if isinstance(plan, Plan):
        if scheme not in (DEFAULT_SCHEME, plan.scheme):
            raise UsageError(f"the plan has {plan.scheme}, and {scheme} is given. Give one.")
        return plan, plan.scheme
    if not isinstance(plan, Mapping):
        raise PlanError(
            f"the plan is {shown(plan)}, which is no plan: a plan is a dict of patterns and "
            'styles. Write for instance {"layers.*.up": "colwise", "layers.*.down": "rowwise"}, '
            "or None for the plan that a model of transformers carries."
        )
    return Plan(plan, scheme), scheme
