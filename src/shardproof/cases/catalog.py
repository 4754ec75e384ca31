"""All cases that `shardproof prove` runs by itself, by name."""

from difflib import get_close_matches

from shardproof.cases.attention import ATTENTION
from shardproof.cases.digits import DIGITS
from shardproof.cases.ffn import FFN
from shardproof.cases.gpt import GPT_CASE
from shardproof.cases.linear import LINEAR_COLUMN, LINEAR_ROW
from shardproof.cases.matmul import MATMUL_COLUMN, MATMUL_ROW
from shardproof.cases.mlp import MLP_GATHERED
from shardproof.cases.models import LLAMA, QWEN
from shardproof.errors import UsageError
from shardproof.prover.case import Case
from shardproof.wording import VALUE, shown


def all_cases() -> tuple[Case, ...]:
    """Every case, smallest first, installed or not."""
    return (
        MATMUL_ROW,
        MATMUL_COLUMN,
        FFN,
        LINEAR_COLUMN,
        LINEAR_ROW,
        MLP_GATHERED,
        ATTENTION,
        DIGITS,
        GPT_CASE,
        LLAMA,
        QWEN,
    )


def find_case(name: str) -> Case:
    """The case of a name.

    Raises:
        UsageError: there is none; names the near ones, and all.
    """
    cases = {case.name: case for case in all_cases()}
    if name in cases:
        return cases[name]
    near = get_close_matches(name[:VALUE], cases, n=3, cutoff=0.4)
    hint = f"Near names: {', '.join(near)}. " if near else ""
    raise UsageError(f"there is no case {shown(name)}. {hint}All cases: {', '.join(cases)}.")
