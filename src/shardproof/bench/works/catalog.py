"""All works, by name."""

from difflib import get_close_matches

from shardproof.bench.work import Work
from shardproof.bench.works.all_reduce import ALL_REDUCE
from shardproof.bench.works.feed_forward import DECODE_1024, DECODE_4096, FFN_1024, FFN_2048
from shardproof.bench.works.linear import LAYER_OVERHEAD, LINEAR_COLUMN, LINEAR_ROW
from shardproof.bench.works.llama import LLAMA_GENERATE, LLAMA_STEP
from shardproof.bench.works.scaling import SCALING
from shardproof.errors import UsageError
from shardproof.wording import VALUE, shown

WORKS: tuple[Work, ...] = (
    FFN_1024,
    FFN_2048,
    DECODE_1024,
    DECODE_4096,
    LINEAR_ROW,
    LINEAR_COLUMN,
    ALL_REDUCE,
    LAYER_OVERHEAD,
    SCALING,
    LLAMA_STEP,
    LLAMA_GENERATE,
)


def work_names() -> tuple[str, ...]:
    """Every name, in the order of reports."""
    return tuple(work.name for work in WORKS)


def find_work(name: str) -> Work:
    """The work of a name.

    Raises:
        UsageError: there is none; names the near ones, and all.
    """
    for work in WORKS:
        if work.name == name:
            return work
    near = get_close_matches(name[:VALUE], work_names(), n=3, cutoff=0.4)
    hint = f"Near names: {', '.join(near)}. " if near else ""
    raise UsageError(f"there is no work {shown(name)}. {hint}All: {', '.join(work_names())}.")
