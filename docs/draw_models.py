"""Proves that models of transformers have the same bits at every degree, and writes what it found.

    python docs/draw_models.py

Small configurations with random numbers, cut by the `tp_plan` that they carry: one training step
and one greedy generation at every degree on ranks that are threads. What stands between the marks
in docs/models.md is written. Exit code 1 if a degree has other bits. Needs the extra `hf`.
"""

import functools
import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import shardproof as sp  # before the first matrix product: it sets the BLAS mode
from shardproof.numerics import mode
from shardproof.optim import layouts_of
from shardproof.plans.model_plan import ModelPlan
from shardproof.prover.hashing import hash_tensor

PAGE = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- written by draw_models.py -->\n", "<!-- until here -->\n"
DEGREES = (1, 2, 3, 4, 8)
SHOWN = (2, 4)  # degrees in the table; two key-value heads are enough for the first alone
ROWS, LENGTH = 4, 32

# Two key-value heads for up to eight ranks; 173 and 257 divide by nothing.
SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 173,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Family -> what a reader calls it, and what its configuration has beside SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", {"sliding_window": 7}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 12}),
    "Gemma2": ("Gemma 2", {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8}),
    "Olmo2": ("OLMo 2", {}),
    "Granite": ("Granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
}


@dataclass(frozen=True)
class Proof:
    """What the degrees said.

    Attributes:
        same: degrees with the bits of degree 1.
        other: degree -> the first tensor that differs there, or a ledger from the plan.
        counted: the hashes of degree 1.
    """

    same: tuple[int, ...]
    other: dict[int, str]
    counted: int


def skeleton(family: str) -> Any:
    """A model on the meta device."""
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family][1])
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model


def train(axis: sp.Axis, family: str) -> tuple[dict[str, str | None], Any]:
    """Hashes of all that one training step and one generation leave, and the step's ledger."""
    model: Any = sp.initialize(sp.parallelize(skeleton(family), None, axis))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH), generator=draws)
    axis.transport.ledger.reset()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    ledger = axis.transport.ledger.as_dict()
    found: dict[str, str | None] = {"loss": _sha(loss)}
    for name, weight, layout, _ in layouts_of(model):
        found[f"{name}.grad"] = hash_tensor(weight.grad, layout, axis, who=name)
    found["gradient norm"] = _sha(sp.clip_grad_norm_(model, 1.0))
    optimizer.step()
    for name, weight, layout, _ in layouts_of(model):
        found[name] = hash_tensor(weight, layout, axis, who=name)
    made = model.eval().generate(
        tokens[:1, :8],
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found["tokens"] = _sha(made.sequences)
    found["logits of generation"] = _sha(torch.stack(made.logits))
    return found, ledger


def _sha(x: torch.Tensor) -> str:
    return hashlib.sha256(x.detach().contiguous().numpy().tobytes()).hexdigest()


def prove(family: str, degrees: tuple[int, ...] = DEGREES) -> Proof:
    """Train at every degree and compare with degree 1; the ledgers must be what the plan said."""
    work = functools.partial(train, family=family)
    (one, _), same, other = sp.launch(work, degree=1)[0], [1], {}
    for degree in (each for each in degrees if each != 1):
        ranks = sp.launch(work, degree=degree)
        planned = sp.plan(skeleton(family), degree=degree)
        # A cut tensor has its hash on rank 0 alone; what is replicated has one on every rank.
        differing = [
            name
            for name, expected in one.items()
            if {expected, None} != {None, *(found[name] for found, _ in ranks)}
        ]
        differing += [
            f"the ledger of rank {rank}"
            for rank, (_, ledger) in enumerate(ranks)
            if ledger != planned.comm(batch=ROWS, length=LENGTH, rank=rank)
        ]
        if differing:
            other[degree] = differing[0]
        else:
            same.append(degree)
    return Proof(tuple(same), other, len(one))


def planned_cells(family: str) -> list[str]:
    """What the plan alone says: parameters, share, collectives of a layer, bytes of a step."""
    plans = {degree: sp.plan(skeleton(family), degree=degree) for degree in SHOWN}
    first = plans[SHOWN[0]]
    parameters = sum(each.numel() for each in skeleton(family).parameters())
    return [
        f"{parameters:,}",
        f"{100 * first.share:.1f} %",
        *(
            cell
            for made in plans.values()
            for cell in (*_layer(made).values(), f"{_mean_sent(made) / 1024:,.0f} KiB")
        ),
    ]


def _layer(made: ModelPlan) -> Mapping[str, str]:
    """Direction -> collectives of one layer, in words."""
    calls: dict[str, dict[str, int]] = {"forward": {}, "backward": {}}
    for module in made.modules:
        if not module.name.startswith("model.layers.0."):
            continue
        for direction, kinds in made.comm(batch=1, length=1, module=module.name).items():
            for kind, figures in kinds.items():
                calls[direction][kind] = calls[direction].get(kind, 0) + figures["calls"]
    return {
        direction: ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds, reverse=True))
        for direction, kinds in calls.items()
    }


def _mean_sent(made: ModelPlan) -> float:
    """Bytes that a rank sends in one step, on average."""
    counts = [made.comm(batch=ROWS, length=LENGTH, rank=rank) for rank in range(made.degree)]
    figures = [each for count in counts for kinds in count.values() for each in kinds.values()]
    return sum(each["sent_bytes"] for each in figures) / made.degree


def row(family: str, proof: Proof) -> str:
    """One line of the table."""
    said = ", ".join(map(str, proof.same))
    said += "".join(f"; not {degree} ({name})" for degree, name in proof.other.items())
    name = FAMILIES[family][0]
    return f"| {' | '.join([name, *planned_cells(family), f'{said} ({proof.counted})'])} |"


def written(proofs: Mapping[str, Proof]) -> str:
    """What stands between the marks."""
    titles = ["model", "parameters", "cut"]
    for degree in SHOWN:
        titles += [f"degree {degree}: a layer forward", "backward", "a rank sends in a step"]
    titles += ["degrees proved (hashes)"]
    lines = [
        "    python docs/draw_models.py",
        "",
        f"{SIZES['num_attention_heads']} query heads, {SIZES['num_key_value_heads']} key-value "
        f"heads, hidden {SIZES['hidden_size']}, feed-forward {SIZES['intermediate_size']}, "
        f"vocabulary {SIZES['vocab_size']}, {SIZES['num_hidden_layers']} layers; "
        f"{ROWS} x {LENGTH} tokens. transformers {transformers.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}; "
        f"contract `{mode.contract(sp.Scheme())}`.",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
        *(row(family, proof) for family, proof in proofs.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prove, and write the page."""
    proofs = {family: prove(family) for family in FAMILIES}
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    page = f"{head}{BEGIN}\n{written(proofs)}\n{END}{rest.split(END)[1]}"
    PAGE.write_text(page, encoding="utf-8")
    if any(proof.other for proof in proofs.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
