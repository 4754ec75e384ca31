"""`ModelPlan`: how one model is cut at one degree. Plain data, known before anything runs."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from shardproof.checked_values import checked_flag, checked_whole
from shardproof.errors import PlanError, UsageError
from shardproof.plans.attention_check import ChildAttentionOptions
from shardproof.plans.collective import Collective, Counts, StepSize, count
from shardproof.plans.match import near_names
from shardproof.plans.module_plan import ModulePlan, Row, held_bytes, rows, style_dict
from shardproof.plans.plan_text import TOKENS_CUT, columns, parameters_line, size
from shardproof.plans.style import Attention, ColumnParallel, Plan, RowParallel, Style
from shardproof.scheme import Scheme
from shardproof.wording import few, short_repr


@dataclass(frozen=True)
class ModelPlan:
    """How a model is cut among `degree` ranks.

    Attributes:
        model: name of the model's class.
        degree: how many ranks share it.
        plan: pattern -> style, and the scheme: what `parallelize` takes, at any degree.
        styles: module name -> style, for every module that a pattern names.
        modules: every module that has parameters or communicates, in the model's order.
        head: the output head whose cut logits the model's own loss takes without a gather; None
            where logits are gathered.
        notes: what a reader should know.
        attention_options: name of an attention that names a child in `attend` -> the causality and
            dropout that our attention needs to compute what that child computes.
        is_carried: the plan is the model's own `tp_plan`: the model's code is known to compute
            with this rank's parts. Otherwise that code receives cut tensors.
        sequence_parallel: activations between blocks are cut along their tokens.
    """

    model: str
    degree: int
    plan: Plan
    styles: Mapping[str, Style]
    modules: tuple[ModulePlan, ...]
    head: str | None = None
    notes: tuple[str, ...] = ()
    attention_options: Mapping[str, ChildAttentionOptions] = field(default_factory=dict)
    is_carried: bool = False
    sequence_parallel: bool = False

    @property
    def scheme(self) -> Scheme:
        """Leaves, numerics, seed."""
        return self.plan.scheme

    @property
    def rows(self) -> list[Row]:
        """The modules; repeated layers, whose names differ in numbers only, share one row."""
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
        """The fraction of the parameters' bytes that is cut."""
        return 1 - self.whole_bytes / self.total_bytes if self.total_bytes else 0.0

    @property
    def comm_problem(self) -> str:
        """Why it is not known what a step sends; "" if it is."""
        if self.is_carried or not self.sequence_parallel:
            return ""
        return (
            "with sequence parallelism, the code between the layers of your own plan decides what "
            "is gathered, and the plan does not know it. Read the ledger of a step: "
            "axis.transport.ledger.as_dict()."
        )

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

        It assumes a step in which every weight is trained, every input except the data gets a
            gradient, and every module runs once. Generation has no backward: read "forward" alone,
            of a plan without sequence parallelism, which cuts activations in training only.

        Args:
            batch: rows.
            length: tokens in a row; 1 for each generated token after the prompt.
            labels: the model is given labels and computes its loss from cut logits. Reading the
                logits adds one all_gather.
            logits: tokens in a row whose logits are computed; None for all. Generation computes 1.
            rank: the rank whose sent bytes are counted.
            module: name of one module, to count its collectives alone.

        Returns:
            Direction -> collective -> calls, message_bytes, sent_bytes, as
            `axis.transport.ledger.as_dict()` has them.

        Raises:
            UsageError: a number is not positive, there is no such rank, or the plan is one of your
                own with sequence parallelism.
            PlanError: no such module.
        """
        batch, length = checked_whole(batch, "batch"), checked_whole(length, "length")
        logits = length if logits is None else checked_whole(logits, "logits")
        rank = checked_whole(rank, "rank", least=0)
        labels = checked_flag(labels, "labels")
        if logits > length:
            raise UsageError(f"logits={logits} of length={length} tokens: there are not so many.")
        if self.comm_problem:
            raise UsageError(self.comm_problem)
        if rank >= self.degree:
            raise UsageError(
                f"rank {rank} is not one of {self.degree}. Use 0 to {self.degree - 1}."
            )
        step = StepSize(batch * length, batch * logits, labels, batch, self.scheme.leaves)
        return count(self._collectives(module), step, rank=rank, degree=self.degree)

    def _collectives(self, module: str | None) -> list[Collective]:
        chosen = [each for each in self.modules if module is None or each.name == module]
        if not chosen:
            names = [each.name for each in self.modules]
            near = near_names(module, names) if isinstance(module, str) else few(names[:3])
            raise PlanError(f"the plan has no module {short_repr(module)}; near names: {near}.")
        return [collective for each in chosen for collective in each.collectives]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `collectives` of modules are None where they are not known."""
        modules = [module.as_dict() for module in self.modules]
        if self.comm_problem:
            modules = [{**module, "collectives": None} for module in modules]
        return {
            "model": self.model,
            "degree": self.degree,
            "scheme": asdict(self.scheme),
            "head": self.head,
            "sequence_parallel": self.sequence_parallel,
            "share_cut": self.share,
            "total_bytes": self.total_bytes,
            "whole_bytes": self.whole_bytes,
            "held_bytes": list(self.held_bytes),
            "plan": {name: style_dict(style) for name, style in self.plan.styles.items()},
            "notes": list(self.notes),
            "modules": modules,
            "comm_problem": self.comm_problem,
        }

    def __str__(self) -> str:
        """One line for every kind of layer, then the totals and the notes."""
        lines = [("module", "how", "leaves", "largest on a rank")]
        for row in self.rows:
            leaves = "-" if row.first.leaves is None else str(row.first.leaves)
            num_bytes = max(held_bytes([row.first], self.degree))
            lines.append(
                (row.names, describe(row.first), leaves, size(num_bytes) if num_bytes else "-")
            )
        head = f"{self.model} at degree {self.degree}"
        return "\n".join([head, *columns(lines), *self.totals()])

    def totals(self) -> list[str]:
        """The totals and the notes, as lines of text."""
        return [
            parameters_line(self.total_bytes, self.share, self.held_bytes, self.whole_bytes),
            *[TOKENS_CUT] * self.sequence_parallel,
            *(f"note: {note}" for note in self.notes),
        ]


def describe(module: ModulePlan) -> str:
    """Describe in words how a module is cut."""
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
    """Bytes of the whole parameters, each counted once."""
    return sum(
        parameter.nbytes
        for module in modules
        for parameter in module.parameters
        if not parameter.tied_to and (parameter.is_cut or not only_cut)
    )
