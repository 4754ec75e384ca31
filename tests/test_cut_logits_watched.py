"""Logits of a model cut by what one forward showed: any use gives the numbers of the whole."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from places import Pool
from shardproof import index_runs
from shardproof.axis import Axis
from shardproof.cut.tensor import CutTensor
from shardproof.errors import AxisError, RankError

pytest.importorskip("transformers")

from watched_generation import PROMPT, copied, cut_model, planned


def saved(x: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


def drawn(x: Any) -> Any:
    generator = torch.Generator().manual_seed(1)  # ranks that are threads share torch's own
    return torch.multinomial(x[:, -1].softmax(-1), 2, generator=generator)


# What somebody does with logits (2, 4, 67); the result is compared with that of plain logits.
USES: dict[str, Callable[[Any], Any]] = {
    "whole": lambda x: x.whole() if isinstance(x, CutTensor) else x,
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "tolist": lambda x: x.tolist(),
    "save": saved,
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", torch.float64),
    "clone": lambda x: x.clone(),
    "deepcopy": copy.deepcopy,
    "argmax": lambda x: x.argmax(-1),
    "max": lambda x: x.max(-1).values,
    "topk": lambda x: x.topk(5).values,
    "sort": lambda x: x.sort(-1).indices,
    "last": lambda x: x[:, -1, :],
    "one row": lambda x: x[0, 1],
    "one number": lambda x: x[0, 1, 5].item(),
    "some columns": lambda x: x[..., 3:50],
    "by number": lambda x: x[0, torch.tensor([1, 2]), torch.tensor([40, 3])],
    "gather": lambda x: x.gather(-1, PROMPT[..., None]),
    "log-probabilities": lambda x: x.log_softmax(-1).gather(-1, PROMPT[..., None]),
    "softmax": lambda x: x.softmax(-1),
    "cross entropy": lambda x: F.cross_entropy(x.flatten(0, 1), PROMPT.flatten()),
    "cross entropy, shifted": lambda x: F.cross_entropy(
        x[:, :-1].reshape(-1, 67), PROMPT[:, 1:].reshape(-1)
    ),
    "allclose": lambda x: torch.allclose(x, x + 0),
    "equal": lambda x: torch.equal(x, x.clone()),
    "is nan": lambda x: bool(x.isnan().any()),
    "perplexity": lambda x: float(x.logsumexp(-1).mean()),
    "multinomial": drawn,
    "for row in": lambda x: torch.stack([row.sum() for row in x]),
}


def as_whole(x: Any) -> Any:
    return x.whole() if isinstance(x, CutTensor) else x


@torch.no_grad()
def used(axis: Axis) -> dict[str, Any]:
    """What every use gives."""
    logits = cut_model(axis, "llama")(PROMPT).logits
    assert isinstance(logits, CutTensor)
    return {name: as_whole(use(logits)) for name, use in USES.items()}


def test_every_use_gives_the_numbers_of_the_whole(pool: Pool) -> None:
    with torch.no_grad():
        plain = copied("llama")(PROMPT).logits
    (alone,) = pool(1, "threads").run(used)
    for degree in (2, 3):
        for found in pool(degree, "threads").run(used):
            for name, use in USES.items():
                ours, want = (torch.as_tensor(each) for each in (found[name], use(plain)))
                assert ours.shape == want.shape, name
                assert torch.allclose(ours.double(), want.double(), atol=5e-6), name
                assert torch.equal(ours, torch.as_tensor(alone[name])), name


def test_print_sends_nothing_and_says_what_it_is(pool: Pool) -> None:
    @torch.no_grad()
    def work(axis: Axis) -> None:
        logits = cut_model(axis, "llama")(PROMPT).logits
        if axis.rank == 0:
            assert f"{logits}" == repr(logits) == str(logits)
            assert repr(logits).startswith("CutTensor((2, 4, 67) of which rank 0 of 2 holds (2, 4,")
            assert (logits.shape, logits.dtype) == ((2, 4, 67), torch.float32)
            assert logits.part.shape[:2] == (2, 4)

    pool(2, "threads").run(work)


def test_one_rank_that_uses_them_alone_is_told(pool: Pool) -> None:
    @torch.no_grad()
    def work(axis: Axis) -> None:
        logits = cut_model(axis, "llama")(PROMPT).logits
        if axis.rank == 0:
            logits.whole()

    with pytest.raises(RankError, match="rank 1 of 2 returned and will not come: rank 0 waits in"):
        pool(2, "threads").run(work)


def test_returned_by_threads_they_say_what_to_return(pool: Pool) -> None:
    @torch.no_grad()
    def work(axis: Axis) -> Any:
        return cut_model(axis, "llama")(PROMPT).logits

    for logits in pool(2, "threads").run(work):
        with pytest.raises(AxisError, match=r"and return plain tensors"):
            logits.whole()
        with pytest.raises(AxisError, match=r"\(of a cut tensor its `whole\(\)`\)"):
            logits.sum()


def test_returned_by_processes_they_are_whole(pool: Pool) -> None:
    with torch.no_grad():
        plain = copied("llama")(PROMPT).logits
    for logits in pool(2, "processes").run(_logits):
        assert type(logits) is Tensor
        assert torch.allclose(logits, plain, atol=5e-6)


@torch.no_grad()
def _logits(axis: Axis) -> Any:
    return cut_model(axis, "llama")(PROMPT).logits


def test_a_loss_outside_of_the_model_trains_as_plain_torch(pool: Pool) -> None:
    def gradients(model: Any) -> dict[str, Tensor]:
        logits = model(PROMPT).logits
        F.cross_entropy(logits[:, :-1].reshape(-1, 67), PROMPT[:, 1:].reshape(-1)).backward()
        return {name: each.grad for name, each in model.named_parameters()}

    plain = gradients(copied("llama"))

    def work(axis: Axis) -> None:
        layouts = planned("llama", axis.size).layouts(axis.rank)
        for name, grad in gradients(cut_model(axis, "llama")).items():
            want = plain[name]
            if name in layouts:
                want = index_runs.take(want, layouts[name].dim, layouts[name].held_runs)
            assert torch.allclose(grad, want, atol=1e-5), name

    pool(3, "threads").run(work)
