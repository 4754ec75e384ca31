"""The cases that `shardproof prove` runs by itself: notebook systems, digits, language models."""

from difflib import get_close_matches

from shardproof.errors import UsageError
from shardproof.prover.case import Case
from shardproof.prover.cases.digits import DIGITS
from shardproof.prover.cases.gpt import GPT_CASE
from shardproof.prover.cases.matmul_cases import MATMUL_COLUMN, MATMUL_ROW
from shardproof.prover.cases.mlp import MLP_GATHERED
from shardproof.prover.cases.single_linear import LINEAR_COLUMN, LINEAR_ROW
from shardproof.prover.cases.transformer_block import ATTENTION, FFN
from shardproof.prover.cases.transformers_models import LLAMA, QWEN
from shardproof.wording import VALUE, short_repr

__all__ = ["all_cases", "find_case"]


def all_cases() -> tuple[Case, ...]:
    """Every case, the smallest first, whether its extra is installed or not."""
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
        UsageError: no case has this name. The message names similar ones, and all.
    """
    cases = {case.name: case for case in all_cases()}
    if name in cases:
        return cases[name]
    near = get_close_matches(name[:VALUE], cases, n=3, cutoff=0.4)
    hint = f"Near names: {', '.join(near)}. " if near else ""
    raise UsageError(f"there is no case {short_repr(name)}. {hint}All cases: {', '.join(cases)}.")
