"""A plan for one model at one degree: everything that is known before anything runs. Plain data."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from shardproof.errors import PlanError, UsageError
from shardproof.plans.attention_check import Manner
from shardproof.plans.collective import Collective, Counts, Step, count
from shardproof.plans.match import near_names
from shardproof.plans.module_plan import ModulePlan, Row, held_bytes, rows, style_dict
from shardproof.plans.plan_text import columns, parameters_line, size
from shardproof.plans.style import Attention, ColumnParallel, Plan, RowParallel, Style
from shardproof.quantities import checked_flag, checked_whole
from shardproof.scheme import Scheme
from shardproof.wording import few, shown


@dataclass(frozen=True)
class ModelPlan:
    """How a model is cut for some number of ranks.

    Attributes:
        model: its class.
        degree: how many ranks share it.
        plan: pattern -> style, and the scheme: what `parallelize` takes, at any degree.
        styles: module name -> style, for every module that a pattern names.
        modules: all that have parameters or send anything, in the model's order.
        head: the output head whose logits the model's own loss takes as they are cut; None where
            logits are whole.
        notes: what a reader should know.
        manners: name of an attention whose child attends -> what that was found to compute.
        is_carried: the model carries it, as its `tp_plan`: its code is known to compute with a
            rank's parts. Otherwise that code is given cut tensors.
    """

    model: str
    degree: int
    plan: Plan
    styles: Mapping[str, Style]
    modules: tuple[ModulePlan, ...]
    head: str | None = None
    notes: tuple[str, ...] = ()
    manners: Mapping[str, Manner] = field(default_factory=dict)
    is_carried: bool = False

    @property
    def scheme(self) -> Scheme:
        """Leaves, numerics, seed."""
        return self.plan.scheme

    @property
    def rows(self) -> list[Row]:
        """The modules, those that differ in numbers in their names only as one."""
        return rows(self.modules)

    @property
    def held_bytes(self) -> tuple[int, ...]:
        """Bytes of parameters that each rank holds."""
        return held_bytes(self.modules, self.degree)

    @property
    def total_bytes(self) -> int:
        """Bytes of the parameters of the whole model."""
        return _bytes(self.modules, only_cut=False)

    @property
    def whole_bytes(self) -> int:
        """Bytes of the parameters that every rank holds whole."""
        return self.total_bytes - _bytes(self.modules, only_cut=True)

    @property
    def share(self) -> float:
        """What part of the parameters is cut, in bytes."""
        return 1 - self.whole_bytes / self.total_bytes if self.total_bytes else 0.0

    def comm(
        self,
        *,
        batch: int,
        length: int,
        labels: bool = True,
        logits: int | None = None,
        rank: int = 0,
        module: str | None = None,
    ) -> Counts:
        """What the ledger of a rank will count in one step, forward and backward.

        Of a step in which every weight is trained, every input that is not data gets a gradient,
        and every module runs once. In generation there is no backward: look at "forward" alone.

        Args:
            batch: rows.
            length: tokens of a row; in generation 1 after the prompt.
            labels: the model is given labels and computes its loss, for which the logits are not
                gathered; whoever uses them adds one all_gather.
            logits: tokens of a row whose logits are computed; None: all (generation: 1).
            rank: whose sent bytes.
            module: of this module alone: a name as in `modules`.

        Returns:
            Direction -> collective -> calls, message_bytes, sent_bytes, as
            `axis.transport.ledger.as_dict()` has them.

        Raises:
            UsageError: a number is not positive, or no such rank.
            PlanError: no such module.
        """
        batch, length = checked_whole(batch, "batch"), checked_whole(length, "length")
        logits = length if logits is None else checked_whole(logits, "logits")
        rank = checked_whole(rank, "rank", least=0)
        labels = checked_flag(labels, "labels")
        if logits > length:
            raise UsageError(f"logits={logits} of length={length} tokens: there are not so many.")
        if rank >= self.degree:
            raise UsageError(
                f"rank {rank} is not one of {self.degree}. Use 0 to {self.degree - 1}."
            )
        step = Step(batch * length, batch * logits, labels)
        return count(self._collectives(module), step, rank=rank, degree=self.degree)

    def _collectives(self, module: str | None) -> list[Collective]:
        chosen = [each for each in self.modules if module is None or each.name == module]
        if not chosen:
            names = [each.name for each in self.modules]
            near = near_names(module, names) if isinstance(module, str) else few(names[:3])
            raise PlanError(f"the plan has no module {shown(module)}; near names: {near}.")
        return [collective for each in chosen for collective in each.collectives]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "model": self.model,
            "degree": self.degree,
            "scheme": asdict(self.scheme),
            "head": self.head,
            "share_cut": self.share,
            "total_bytes": self.total_bytes,
            "whole_bytes": self.whole_bytes,
            "held_bytes": list(self.held_bytes),
            "plan": {name: style_dict(style) for name, style in self.plan.styles.items()},
            "notes": list(self.notes),
            "modules": [module.as_dict() for module in self.modules],
        }

    def to_json(self) -> str:
        """`as_dict` as text."""
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        """One line for every kind of layer, then the totals and the notes."""
        lines = [("module", "how", "leaves", "largest on a rank")]
        for row in self.rows:
            leaves = "-" if row.first.leaves is None else str(row.first.leaves)
            held = max(held_bytes([row.first], self.degree))
            lines.append((row.names, describe(row.first), leaves, size(held) if held else "-"))
        head = f"{self.model} at degree {self.degree}"
        return "\n".join([head, *columns(lines), *self.totals()])

    def totals(self) -> list[str]:
        """What it comes to, and the notes, as lines."""
        return [
            parameters_line(self.total_bytes, self.share, self.held_bytes, self.whole_bytes),
            *(f"note: {note}" for note in self.notes),
        ]


def describe(module: ModulePlan) -> str:
    """How a module is cut, in words."""
    style, words = module.style, [str(module.role)]
    if isinstance(style, Attention):
        if module.role == "attention":
            words.append(f"{style.queries} heads, {style.keys} key-value")
        elif module.role in ("query_norm", "key_norm"):
            words = [f"norm, {'across heads' if style.norms == 'across' else 'each head'}"]
        else:
            words = ["row by heads" if module.role == "output" else "column by heads"]
    if any(each.when == "labels" for each in module.collectives):
        words.append("logits stay cut")
    elif isinstance(style, ColumnParallel):
        words += ["input gathered"] * style.gather_input + ["output gathered"] * style.gather_output
    if isinstance(style, RowParallel) and not style.input_is_parallel:
        words.append("whole input")
    return ", ".join(words) if not module.reason else f"whole: {module.reason}"


def _bytes(modules: Iterable[ModulePlan], *, only_cut: bool) -> int:
    """Of whole parameters, each counted once."""
    return sum(
        parameter.nbytes
        for module in modules
        for parameter in module.parameters
        if not parameter.tied_to and (parameter.is_cut or not only_cut)
    )
