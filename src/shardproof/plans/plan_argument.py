"""Turn the argument `plan` of a user into a `Plan`, or into one clear error."""

from collections.abc import Mapping
from typing import Any

from shardproof.errors import PlanError, UsageError
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Plan
from shardproof.scheme import DEFAULT_SCHEME, Scheme, checked_scheme
from shardproof.wording import shown


def is_carried(given: Any) -> bool:
    """Whether the plan is the model's own `tp_plan`.

    Args:
        given: the user's argument, as for `read_plan`.
    """
    return given is None or (isinstance(given, ModelPlan) and given.is_carried)


def read_plan(given: Any, scheme: Any) -> tuple[Plan | None, Scheme]:
    """Return the plan and the scheme; the plan is None if the model's own is to be used.

    Args:
        given: the user's argument: pattern -> style, a `Plan`, a `ModelPlan`, or None.
        scheme: the scheme to use if the plan has none.

    Raises:
        PlanError: `given` is not a plan, or one of its patterns is not a string.
        UsageError: the plan has a scheme, and `scheme` is another one.
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
            f"the plan is {shown(plan)}, which is not a plan: a plan is a dict of patterns and "
            'styles. Write for instance {"layers.*.up": "colwise", "layers.*.down": "rowwise"}, '
            "or None for the plan that a model of transformers carries."
        )
    return Plan(plan, scheme), scheme
