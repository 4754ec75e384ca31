"""All systems, by name."""

from difflib import get_close_matches

from shardproof.bench.system import ANY_DEGREE, LINEARS, SUM, TRANSFORMER, Style, System
from shardproof.bench.systems import (
    deepspeed,
    dtensor,
    fairscale,
    hf,
    megatron,
    memcpy,
    ours,
    plain,
)
from shardproof.errors import UsageError
from shardproof.scheme import NUMERICS, Numerics
from shardproof.wording import VALUE, shown

MODELS = LINEARS | {TRANSFORMER}
OWN = MODELS | {SUM, ANY_DEGREE}
PEERS = "peers"  # the extra
LAYERS_ALONE = "brings layers, and nothing that cuts a model of transformers"


def _ours(numerics: Numerics, wire: str) -> System:
    is_threads = wire == "threads"
    return System(
        f"{numerics}-{wire}",
        f"shardproof, {numerics} numerics, ranks are "
        + ("threads of one process" if is_threads else f"processes over {wire}"),
        ours.native if numerics == "native" else ours.invariant,
        engine="threads" if is_threads else "processes",
        transport="auto" if is_threads else wire,
        numerics=numerics,
        offers=OWN,
    )


SYSTEMS: tuple[System, ...] = (
    System(
        "torch-2t",
        "plain torch, 2 threads",
        plain.join,
        engine="alone",
        threads=2,
        offers=MODELS,
    ),
    System("torch-1t", "plain torch, 1 thread", plain.join, engine="alone", offers=MODELS),
    *(_ours(numerics, wire) for wire in ("shm", "threads", "gloo") for numerics in NUMERICS),
    System(
        "dtensor",
        "torch parallelize_module, gloo",
        dtensor.join,
        transport="gloo",
        offers=MODELS,
    ),
    System(
        "deepspeed",
        "DeepSpeed AutoTP, gloo; in inference its shared memory",
        deepspeed.join,
        transport="gloo",
        offers=MODELS | {SUM},
        package="deepspeed",
        extra=PEERS,
    ),
    System(
        "fairscale",
        "fairscale model_parallel, gloo",
        fairscale.join,
        transport="gloo",
        lacks={TRANSFORMER: LAYERS_ALONE},
        package="fairscale",
        extra=PEERS,
    ),
    System(
        "hf",
        "Hugging Face transformers tp_plan, gloo",
        hf.join,
        transport="gloo",
        offers=MODELS,
        package="transformers",
        extra=PEERS,
    ),
    System(
        "megatron",
        "Megatron-Core tensor_parallel, gloo",
        megatron.join,
        transport="gloo",
        offers=frozenset({Style.COLUMN.value, Style.ROW.value}),
        lacks={
            Style.COLUMN_GATHERED.value: megatron.CUDA_ONLY,
            Style.ROW_SCATTERED.value: megatron.CUDA_ONLY,
            TRANSFORMER: LAYERS_ALONE,
        },
        package="megatron",
        extra=PEERS,
    ),
    System(
        "memcpy",
        "a copy of the bytes by all ranks at once",
        memcpy.join,
        transport="gloo",
        offers=frozenset({SUM}),
        is_yardstick=True,
    ),
)


def system_names() -> tuple[str, ...]:
    """Every name, in the order of reports."""
    return tuple(system.name for system in SYSTEMS)


def find_system(name: str) -> System:
    """The system of a name.

    Raises:
        UsageError: there is none; names the near ones, and all.
    """
    for system in SYSTEMS:
        if system.name == name:
            return system
    near = get_close_matches(name[:VALUE], system_names(), n=3, cutoff=0.4)
    hint = f"Near names: {', '.join(near)}. " if near else ""
    raise UsageError(f"there is no system {shown(name)}. {hint}All: {', '.join(system_names())}.")
