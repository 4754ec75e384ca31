"""Handwritten digits: a training on real data, the same at every degree for all its epochs.

An MLP 64 -> 250 -> 10 on scikit-learn's digits (1,797 images of 8 x 8). The hidden layer is column
parallel, the last one row parallel. The width is no multiple of 16, so shards do not end where
vector registers do. The weights are hashed after every epoch. Agreement with plain torch is judged
after the first step, because in later steps chaos amplifies rounding. The memory audit covers
creation and the first epoch. Its bound is the activation of a batch, larger than any weight here,
so this case does not show that no full weight appears; the linear cases do.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from shardproof.functional import cross_entropy
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.cases.drawn_layers import (
    column_linear,
    fill_like_linear,
    generator,
    row_linear,
)
from shardproof.prover.training import (
    INITIAL,
    Update,
    make_optimizer,
    record_gradients,
    record_parameters,
    record_state,
)

PIXELS, HIDDEN, CLASSES = 64, 250, 10
BATCH, EPOCHS = 120, 20
LEARNING_RATE, MOMENTUM = 0.3, 0.9
TEST_SHARE, WANTED_ACCURACY = 0.2, 0.95


@dataclass(frozen=True)
class Digits:
    """Images with pixel values from 0 to 1, and their classes, shuffled and split.

    Attributes:
        train_x, test_x: (rows, 64).
        train_y, test_y: (rows,).
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Classifier(nn.Module):
    """Two linear layers with ReLU in between.

    Args:
        hidden: 64 -> 250; its output stays cut.
        output: 250 -> 10.
    """

    def __init__(self, hidden: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, 64), Replicate, to (rows, 10), Replicate."""
        y: Tensor = self.output(torch.relu(self.hidden(x)))
        return y


def load(seed: int) -> Digits:
    """Read the images, shuffle them, and split them 80 to 20."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - an optional extra

    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=generator(seed, "digits.split"))
    x = torch.from_numpy(pixels).float().div_(16)[order]
    y = torch.from_numpy(classes).long()[order]
    held_out = round(len(y) * TEST_SHARE)
    return Digits(x[held_out:], y[held_out:], x[:held_out], y[:held_out])


def build(run: CaseRun) -> nn.Module:
    """The classifier, with the same numbers at every degree."""
    hidden = column_linear(run, PIXELS, HIDDEN, name="hidden")
    output = row_linear(run, HIDDEN, CLASSES, name="output")
    for name, layer in (("hidden", hidden), ("output", output)):
        fill_like_linear(layer, generator(run.seed, f"digits.{name}"))
    return Classifier(hidden, output)


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Gradient descent with momentum."""
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)


def train(run: CaseRun) -> None:
    """Train; in plain torch only the first step."""
    digits = load(run.seed)
    with run.measured():
        model = run.adopt(run.cast(build(run)))
        optimizer = make_optimizer(sgd, model)
    record_parameters(run, model, suffix=INITIAL)
    for epoch in (number + 1 for number in run.steps(model, optimizer, EPOCHS)):
        for step, (x, y) in enumerate(batches(digits, run.seed, epoch)):
            is_first = epoch == 1 and not step
            train_step(run, model, optimizer, x, y, record=is_first, measure=epoch == 1)
            if is_first and run.is_reference:
                return
        record_parameters(run, model, prefix=f"epoch {epoch}: ", judged=False)
        if epoch == EPOCHS:
            record_state(run, model, optimizer, prefix=f"epoch {epoch}: ", judged=False)
    examine(run, model, digits)


def batches(digits: Digits, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images, shuffled anew for each epoch; the last batch is shorter."""
    rows = len(digits.train_y)
    order = torch.randperm(rows, generator=generator(seed, f"digits.epoch {epoch}"))
    for chosen in order.split(BATCH):
        yield digits.train_x[chosen], digits.train_y[chosen]


def train_step(
    run: CaseRun,
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    record: bool = False,
    measure: bool = False,
) -> None:
    """Forward, loss, backward and update.

    Args:
        run: of the case.
        model: the classifier.
        optimizer: of its parameters.
        x: (rows, 64), Replicate.
        y: (rows,), Replicate.
        record: whether everything is recorded and judged.
        measure: whether the memory audit sees it.
    """
    if measure:
        x, y = run.data(x), run.data(y)
    with run.measured() if measure else nullcontext():
        output = model(x)
        loss = F.cross_entropy(output, y) if run.axis is None else cross_entropy(output, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
    run.follow(loss)
    if record:
        run.record("output", output)
        run.record("loss", loss)
        record_gradients(run, model)
    update = Update(run, model, sgd) if record else None
    with run.measured() if measure else nullcontext():
        optimizer.step()
    if update is not None:
        update.record()
        record_state(run, model, optimizer)


@torch.no_grad()
def examine(run: CaseRun, model: nn.Module, digits: Digits) -> None:
    """Claim that the trained classifier reads digits that it was not trained on."""
    right = int((model(digits.test_x).argmax(1) == digits.test_y).sum().item())
    rows = len(digits.test_y)
    run.check(
        f"test accuracy of at least {WANTED_ACCURACY:.0%}",
        right >= WANTED_ACCURACY * rows,
        f"test accuracy {right / rows:.2%} ({right} of {rows} images) after {EPOCHS} epochs",
    )


DIGITS = Case(
    "digits",
    f"handwritten digits: MLP 64 -> 250 -> 10, momentum SGD, {EPOCHS} epochs",
    train,
    extra="demo",
    module="sklearn",
    has_curve=True,
)
