"""Proves that a model gives the same bits at every degree, in agreement with plain torch."""

from shardproof.prover.against import Comparison, compare_with
from shardproof.prover.case import Case, Check, Trial
from shardproof.prover.proof import DEFAULT_SEED, DEGREES, prove, prove_cases
from shardproof.prover.report import Report
from shardproof.prover.torchrun import prove_under_torchrun

__all__ = [
    "DEFAULT_SEED",
    "DEGREES",
    "Case",
    "Check",
    "Comparison",
    "Report",
    "Trial",
    "compare_with",
    "prove",
    "prove_cases",
    "prove_under_torchrun",
]
