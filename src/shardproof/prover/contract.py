"""The one contract of a report: what every rank of every degree says that it ran under."""

from collections.abc import Mapping, Sequence

import torch

from shardproof.errors import MismatchError
from shardproof.numerics import mode
from shardproof.prover.runs import RankResult
from shardproof.ranks import open_ranks
from shardproof.scheme import Scheme


def agreed_contract(
    results: Mapping[str, Mapping[int, Sequence[RankResult]]],
) -> tuple[Scheme, str]:
    """Scheme and contract of all ranks of all degrees of all cases.

    Args:
        results: case -> degree -> every rank's result; not empty.

    Raises:
        MismatchError: two of them differ, so that their bits may differ for that alone.
    """
    told = [
        (f"rank {result.rank} of {degree} in case {case!r}", result)
        for case, by_degree in results.items()
        for degree, ranks in by_degree.items()
        for result in ranks
    ]
    first_place, first = told[0]
    for place, result in told:
        if (result.scheme, result.contract) != (first.scheme, first.contract):
            what, one, other = "contract", first.contract, result.contract
            if one == other:
                what, one, other = "scheme", str(first.scheme), str(result.scheme)
            raise MismatchError(
                f"{first_place} ran under the {what} {one!r}, {place} under {other!r}, and bits "
                f"are compared under one alone. Give all ranks the same number of threads, and "
                f"models of another dtype, device or scheme a report of their own."
            )
    return first.scheme, first.contract


def threads_of_ranks(threads: int | None, degrees: Sequence[int]) -> int:
    """Intra-op threads of each rank, one number for all degrees: it may belong to the contract.

    Args:
        threads: what was asked for; None shares this process's threads among the most ranks.
        degrees: that are to be run.
    """
    return max(1, torch.get_num_threads() // max(degrees)) if threads is None else threads


def coming_contract(scheme: Scheme, threads: int) -> str:
    """The contract under which ranks with so many threads will run fp32 layers on the CPU."""
    with open_ranks(1, threads=threads) as ranks:
        return ranks.run(lambda axis: mode.contract(scheme))[0]
