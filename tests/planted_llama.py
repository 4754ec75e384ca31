"""A small Llama of transformers, cut by its own plan and trained, in which faults are planted.

`test_planted_models.py` proves it as it is, and changes one thing at a time.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_zoo import keeping, meta_model, whole_model
from planted import sgd
from shardproof import optim
from shardproof.axis import Axis
from shardproof.leaves import Layout, replicated
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.proof import prove_cases
from shardproof.prover.report import Report
from shardproof.prover.training import record_gradients, record_parameters

VOCABULARY, LAST = 67, 66
STD = 0.3  # large enough for attention to depend on the positions by more than any tolerance
LAYER = "model.layers.0"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Change = Callable[[nn.Module, Axis], object]


def no_change(model: nn.Module, axis: Axis) -> None:
    """Nothing."""


def no_addition(model: nn.Module) -> None:
    """Nothing."""


@dataclass(frozen=True)
class Steps:
    """A function of a trial: steps of a Llama of 8 heads that share 2, on tokens of its own.

    Attributes:
        count: how many steps; agreement with plain torch is judged on the first.
        config: changes of the configuration.
        extend: called with a model before it is cut, and with plain torch's.
        change: called with a rank's model once it has its numbers.
        synchronize: called with a rank's model after backward.
        drops: plain torch draws other masks: nothing but the first weights is judged.
    """

    count: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    extend: Callable[[nn.Module], None] = no_addition
    change: Change = no_change
    synchronize: Change = no_change
    drops: bool = False
    measures_creation = False  # nothing here is audited

    def __call__(self, trial: CaseRun) -> None:
        model = trial.cast(self._build(trial)).train()
        trial.adopt(model)
        record_parameters(trial, model, suffix=" (initial)")
        if trial.is_reference and self.drops:
            return
        optimizer = sgd(model.parameters())
        for step in range(1 if trial.is_reference else self.count):
            prefix = f"step {step + 1}: " if step else ""
            self._step(trial, model, prefix=prefix, judged=not step and not self.drops)
            optimizer.step()
            record_parameters(trial, model, prefix=prefix, judged=not step and not self.drops)
            optimizer.zero_grad()

    def _build(self, trial: CaseRun) -> nn.Module:
        if trial.axis is not None:
            model = self.cut(trial.axis)
            self.change(model, trial.axis)
            return model
        return copy.deepcopy(_plain_model(tuple(sorted(self.config.items())), self.extend))

    def cut(self, axis: Axis) -> nn.Module:
        """This rank's model, with the numbers that every degree gives it."""
        return _cut_model(self.config, self.extend, axis)

    def _step(self, trial: CaseRun, model: Any, *, prefix: str, judged: bool) -> None:
        ids, labels = tokens()
        with keeping(torch.float64 if trial.is_precise else torch.float32):
            out = model(input_ids=ids, labels=labels, use_cache=False)
        logits = getattr(out.logits, "part", out.logits)  # plain torch has no parts
        trial.record(f"{prefix}logits", logits, logits_layout(trial, model), judged=judged)
        trial.record(f"{prefix}loss", out.loss, judged=judged)
        out.loss.backward()
        if trial.axis is not None:
            self.synchronize(model, trial.axis)
        record_gradients(trial, model, prefix=prefix, judged=judged)
        clip = nn.utils.clip_grad_norm_ if trial.is_reference else _clip
        norm = clip(model.parameters() if trial.is_reference else model, 0.5)
        trial.record(f"{prefix}grad_norm", norm, judged=judged)


def _cut_model(
    config: dict[str, Any], extend: Callable[[nn.Module], None], axis: Axis
) -> nn.Module:
    model = meta_model("llama", num_hidden_layers=1, **config)
    extend(model)
    return initialize(parallelize(model, None, axis), std=STD)


@functools.cache  # dozens of proofs compare with the same few models
def _plain_model(
    config: tuple[tuple[str, Any], ...], extend: Callable[[nn.Module], None]
) -> nn.Module:
    """Plain torch's model, with the numbers of one that is cut for a single rank.

    No fault that is planted here changes what `initialize` draws.
    """
    with torch.random.fork_rng(devices=[]):  # construction draws from the global generator
        plain = whole_model("llama", num_hidden_layers=1, **dict(config))
    extend(plain)
    alone = dict(_cut_model(dict(config), extend, Axis.solo()).named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(alone[name])
    return plain


def _clip(model: nn.Module, max_norm: float) -> Tensor:
    return optim.clip_grad_norm_(model, max_norm)


def tokens() -> tuple[Tensor, Tensor]:
    """Ids and labels (2, 9): the last token of the vocabulary is there, and the rows end apart."""
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
    ids[0, 2] = LAST
    labels = ids.clone()
    labels[1, 5:] = -100
    return ids, labels


def logits_layout(trial: CaseRun, model: Any) -> Layout:
    """(2, 9, 67), cut as the head's weight is."""
    shape = (2, 9, VOCABULARY)
    if trial.axis is None:
        return replicated(shape)
    return Layout(shape, trial.axis.rank, 2, model.lm_head.layouts["weight"].cut)


def prove(*, degrees: tuple[int, ...] = (1, 2), **parts: Any) -> Report:
    """Prove `Steps`, of which these are the parts."""
    return prove_cases([Case("llama", "a clipped step", Steps(**parts))], degrees=degrees)


def differing(report: Report, end: str = "", *, degree: int | None = None) -> set[str]:
    """Tensors whose names end so, and whose bits are not degree 1's at one degree or at any."""
    return {
        tensor.name
        for tensor in report.cases[0].tensors
        if tensor.name.endswith(end)
        and any(
            sha256 != tensor.sha256["1"]
            for at, sha256 in tensor.sha256.items()
            if degree in (None, int(at))
        )
    }
