"""Handwritten digits: a real training on real input, the same at every degree for all its epochs.

An MLP 64 -> 250 -> 10 on scikit-learn's digits (1,797 images of 8 x 8), the hidden layer column
parallel, the last one row parallel. The width is no multiple of 16, so that shards end where
vector code does not. The weights are hashed after every epoch; agreement with plain torch is
judged after the first step, for later on chaos amplifies rounding. The memory audit covers
creation and the first epoch; its bound is the activation of a batch, larger than any weight here,
so that the linear cases are the ones that show that no full weight appears.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from shardproof.cases.cut_or_plain import column_linear, row_linear
from shardproof.cases.draws import fill_like_linear, generator
from shardproof.functional import cross_entropy
from shardproof.prover.case import Case, Trial
from shardproof.prover.training import record_gradients, record_parameters, record_state
from shardproof.prover.update import INITIAL, Update, make_optimizer

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
    """Read the images, shuffle them by the seed, and split them 80 to 20."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - an optional extra

    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=generator(seed, "digits.split"))
    x = torch.from_numpy(pixels).float().div_(16)[order]
    y = torch.from_numpy(classes).long()[order]
    held_out = round(len(y) * TEST_SHARE)
    return Digits(x[held_out:], y[held_out:], x[:held_out], y[:held_out])


def build(trial: Trial) -> nn.Module:
    """The classifier, with the numbers that its seed gives at any degree."""
    hidden = column_linear(trial, PIXELS, HIDDEN, name="hidden")
    output = row_linear(trial, HIDDEN, CLASSES, name="output")
    for name, layer in (("hidden", hidden), ("output", output)):
        fill_like_linear(layer, generator(trial.seed, f"digits.{name}"))
    return Classifier(hidden, output)


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Gradient descent with momentum."""
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)


def run(trial: Trial) -> None:
    """Train; in plain torch the first step alone."""
    digits = load(trial.seed)
    with trial.measured():
        model = trial.adopt(trial.cast(build(trial)))
        optimizer = make_optimizer(sgd, model)
    record_parameters(trial, model, suffix=INITIAL)
    for epoch in range(1, EPOCHS + 1):
        for step, (x, y) in enumerate(batches(digits, trial.seed, epoch)):
            is_first = epoch == 1 and not step
            train_step(trial, model, optimizer, x, y, record=is_first, measure=epoch == 1)
            if is_first and trial.is_reference:
                return
        record_parameters(trial, model, prefix=f"epoch {epoch}: ", judged=False)
    record_state(trial, model, optimizer, prefix=f"epoch {EPOCHS}: ", judged=False)
    examine(trial, model, digits)


def batches(digits: Digits, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images in an order keyed by seed and epoch; the last batch is shorter."""
    rows = len(digits.train_y)
    order = torch.randperm(rows, generator=generator(seed, f"digits.epoch {epoch}"))
    for chosen in order.split(BATCH):
        yield digits.train_x[chosen], digits.train_y[chosen]


def train_step(
    trial: Trial,
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
        trial: the run.
        model: the classifier.
        optimizer: of its parameters.
        x: (rows, 64), Replicate.
        y: (rows,), Replicate.
        record: whether everything is recorded and judged.
        measure: whether the memory audit sees it.
    """
    if measure:
        x, y = trial.data(x), trial.data(y)
    with trial.measured() if measure else nullcontext():
        output = model(x)
        loss = F.cross_entropy(output, y) if trial.axis is None else cross_entropy(output, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
    trial.follow(loss)
    if record:
        trial.record("output", output)
        trial.record("loss", loss)
        record_gradients(trial, model)
    update = Update(trial, model, sgd) if record else None
    with trial.measured() if measure else nullcontext():
        optimizer.step()
    if update is not None:
        update.record()
        record_state(trial, model, optimizer)


@torch.no_grad()
def examine(trial: Trial, model: nn.Module, digits: Digits) -> None:
    """Claim that the trained classifier reads digits it has not seen."""
    right = int((model(digits.test_x).argmax(1) == digits.test_y).sum().item())
    rows = len(digits.test_y)
    trial.check(
        f"test accuracy of at least {WANTED_ACCURACY:.0%}",
        right >= WANTED_ACCURACY * rows,
        f"test accuracy {right / rows:.2%} ({right} of {rows} images) after {EPOCHS} epochs",
    )


DIGITS = Case(
    "digits",
    f"handwritten digits: MLP 64 -> 250 -> 10, momentum SGD, {EPOCHS} epochs",
    run,
    extra="demo",
    module="sklearn",
    has_curve=True,
)
