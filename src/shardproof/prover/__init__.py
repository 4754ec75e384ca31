"""Proves that a model gives the same bits at every degree, in agreement with plain torch."""

from shardproof.prover.case import Case, CaseRun, Check
from shardproof.prover.compare_reports import Comparison, compare_with
from shardproof.prover.proof import DEFAULT_SEED, DEGREES, prove_cases, prove_under_torchrun
from shardproof.prover.prove_model import prove
from shardproof.prover.report import Report

__all__ = [
    "DEFAULT_SEED",
    "DEGREES",
    "Case",
    "CaseRun",
    "Check",
    "Comparison",
    "Report",
    "compare_with",
    "prove",
    "prove_cases",
    "prove_under_torchrun",
]
