"""What batch leaves, sequence parallelism and data parallelism cost, each beside a step without.

    python -m benchmarks.layout_times

Two ranks, one thread each. First the gradients are compared, then steps are timed in turn; the
slowest rank counts, and each figure is a ratio of medians. `DistributedDataParallel` is torch's
own, over gloo, with the model in plain torch.
"""

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import shardproof as sp
from benchmarks.llama import FULL, build
from shardproof.hf.head import summed_loss

ROWS, TOKENS, SAMPLES = 4, 128, 512
PLAN = {"0": "colwise", "2": "rowwise"}
Step = Callable[[], None]


def gradients_of(model: nn.Module) -> list[Tensor]:
    """All gradients, in order."""
    return [each.grad.clone() for each in model.parameters() if each.grad is not None]


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have equal gradients."""
    pairs = zip(gradients_of(one), gradients_of(other), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def near(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same gradients but for rounding."""
    pairs = zip(gradients_of(one), gradients_of(other), strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)


def medians(steps: Sequence[Step], rounds: int, meet: Step) -> list[float]:
    """Seconds of each step, taken in turn."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds + 1):
        for step, mine in zip(steps, seconds, strict=True):
            meet()
            start = time.perf_counter()
            step()
            mine.append(time.perf_counter() - start)
    return [statistics.median(each[1:]) for each in seconds]


def llama(generator: torch.Generator) -> nn.Module:
    """The Llama of the other benchmarks."""
    model: nn.Module = build(FULL, generator)
    return model


def feed_forward(generator: torch.Generator) -> nn.Module:
    """2048 to 8192 and back."""
    model = nn.Sequential(nn.Linear(2048, 8192), nn.GELU(), nn.Linear(8192, 2048))
    with torch.no_grad():
        for each in model.parameters():
            each.normal_(0, 0.02, generator=generator)
    return model


def _cut(make: Any, plan: Any, axis: sp.Axis, **options: Any) -> nn.Module:
    return sp.parallelize(make(torch.Generator().manual_seed(0)), plan, axis, **options)


def _sum_of(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    return summed_loss(model, tokens), tokens[:, 1:].numel()


def batch_leaves(axis: sp.Axis, work: str, rounds: int) -> dict[str, float]:
    """Gradients of a batch with leaves, in both kinds of passes, against those without."""
    inputs = torch.Generator().manual_seed(1)
    if work == "llama-step":
        make, plan, count = llama, None, ROWS
        tokens = torch.randint(FULL.vocabulary, (ROWS, TOKENS), generator=inputs)

        def loss_of(model: nn.Module, samples: slice) -> Any:
            return _sum_of(model, tokens[samples])

    else:
        make, plan, count = feed_forward, PLAN, SAMPLES
        x = torch.randn(SAMPLES, 2048, generator=inputs)

        def loss_of(model: nn.Module, samples: slice) -> Any:
            return model(x[samples]).square().mean(1)

    scheme = sp.Scheme(batch_leaves=8)
    without = _cut(make, plan, axis)
    models = {each: _cut(make, plan, axis, scheme=scheme) for each in ("node", "leaf")}
    solo = sp.Axis.solo("dp")
    parallel = {
        each: sp.DataParallel(model, solo, passes=each)  # type: ignore[arg-type]
        for each, model in models.items()
    }

    def plain() -> None:
        without.zero_grad()
        result = loss_of(without, slice(0, count))
        loss = result[0] if isinstance(result, tuple) else result.sum()
        loss.backward()

    def passes(which: str) -> None:
        models[which].zero_grad()
        parallel[which].backward(functools.partial(loss_of, models[which]), count)

    steps: list[Step] = [plain, *(functools.partial(passes, each) for each in models)]
    for step in steps:
        step()
    if not same(models["node"], models["leaf"]):
        raise SystemExit(f"{work}: the two kinds of passes have other gradients")
    first, *others = medians(steps, rounds, lambda: _meet(axis))
    return {
        f"{work}, passes={which}": each / first for which, each in zip(models, others, strict=True)
    }


def sequence_parallel(axis: sp.Axis, rounds: int) -> dict[str, float]:
    """A step with activations that are cut along their tokens, against one without."""
    tokens = torch.randint(
        FULL.vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1)
    )
    models = [_cut(llama, None, axis, sequence_parallel=each) for each in (False, True)]

    def run(model: Any) -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    steps = [functools.partial(run, each) for each in models]
    for step in steps:
        step()
    if not same(*models):
        raise SystemExit("sequence parallelism changes the gradients")
    without, cut = medians(steps, rounds, lambda: _meet(axis))
    return {"llama-step, sequence parallel": cut / without}


def beside_ddp(axis: sp.Axis, rounds: int) -> dict[str, float]:
    """Data parallelism, against DistributedDataParallel over gloo."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(FULL.vocabulary, (2 * ROWS, TOKENS), generator=generator)
    whole = llama(torch.Generator().manual_seed(0))
    theirs = DistributedDataParallel(copy.deepcopy(whole))
    ours = sp.parallelize(whole, None, sp.Axis.solo(), scheme=sp.Scheme(batch_leaves=8))
    parallel = sp.DataParallel(ours, axis, passes="node")
    mine = tokens[axis.rank * ROWS : (axis.rank + 1) * ROWS]

    def ddp() -> None:
        theirs.zero_grad()
        theirs(input_ids=mine, labels=mine, use_cache=False).loss.backward()

    def nodes() -> None:
        ours.zero_grad()
        parallel.backward(lambda samples: _sum_of(ours, tokens[samples]), len(tokens))

    for step in (ddp, nodes):
        step()
    if not near(theirs, ours):
        raise SystemExit("DistributedDataParallel and DataParallel have other gradients")
    first, second = medians([ddp, nodes], rounds, dist.barrier)
    return {f"llama-step, dp 2 over {axis.transport.name}, to DDP over gloo": second / first}


def _meet(axis: sp.Axis) -> None:
    axis.gather_small(None, what="the begin of a step")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="steps of each kind")
    rounds = parser.parse_args().rounds
    works: list[tuple[Any, str]] = [
        (functools.partial(batch_leaves, work="llama-step", rounds=rounds), "auto"),
        (functools.partial(batch_leaves, work="ffn-2048", rounds=rounds), "auto"),
        (functools.partial(sequence_parallel, rounds=rounds), "auto"),
        (functools.partial(beside_ddp, rounds=rounds), "auto"),
        (functools.partial(beside_ddp, rounds=rounds), "gloo"),
    ]
    for work, transport in works:
        results = sp.launch(work, degree=2, engine="processes", transport=transport)
        for name in results[0]:
            print(f"{name}: {max(each[name] for each in results):.3f}", flush=True)


if __name__ == "__main__":
    main()
