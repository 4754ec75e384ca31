"""Turn the argument `plan` of a user into a `Plan`, or into one clear error."""

from collections.abc import Mapping
from typing import Any

from shardproof.errors import PlanError, UsageError
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Plan
from shardproof.scheme import DEFAULT_SCHEME, Scheme, checked_scheme
from shardproof.wording import short_repr


def is_carried(plan_argument: Any) -> bool:
    """Whether the plan is the model's own `tp_plan`.

    Args:
        plan_argument: the user's argument, as for `read_plan`.
    """
    return plan_argument is None or (
        isinstance(plan_argument, ModelPlan) and plan_argument.is_carried
    )


def read_plan(plan_argument: Any, scheme: Any) -> tuple[Plan | None, Scheme]:
    """Return the plan and the scheme; the plan is None if the model's own is to be used.

    Args:
        plan_argument: the user's argument: pattern -> style, a `Plan`, a `ModelPlan`, or None.
        scheme: the scheme to use if the plan has none.

    Raises:
        PlanError: `plan_argument` is not a plan, or one of its patterns is not a string.
        UsageError: the plan has a scheme, and `scheme` is another one.
    """
    scheme = checked_scheme(scheme)
    plan = plan_argument.plan if isinstance(plan_argument, ModelPlan) else plan_argument
    if plan is None:
        return None, scheme
    if isinstance(plan, Plan):
        if scheme not in (DEFAULT_SCHEME, plan.scheme):
            raise UsageError(f"the plan has {plan.scheme}, and {scheme} is given. Give one.")
        return plan, plan.scheme
    if not isinstance(plan, Mapping):
        raise PlanError(
            f"the plan is {short_repr(plan)}, which is not a plan: a plan is a dict of patterns "
            "and "
            'styles. Write for instance {"layers.*.up": "colwise", "layers.*.down": "rowwise"}, '
            "or None for the plan that a model of transformers carries."
        )
    return Plan(plan, scheme), scheme
