"""Real models, cut by their own plan: the same bits at every degree, and those of transformers."""

from typing import Any

import pytest
import torch

from hf_zoo import (
    ZOO,
    Setting,
    error,
    hashes,
    meta_model,
    partial,
    plain_step,
)
from places import Pool
from shardproof.plans.planning import plan
from shardproof.scheme import Scheme

pytest.importorskip("transformers")

# Two layers where they differ, and once where they do not; one of all others.
LAYERS = dict.fromkeys(ZOO, 1) | {"gemma2": 2, "qwen3": 2}


def setting_of(kind: str, changes: dict[str, Any] | None = None, **options: Any) -> Setting:
    return Setting(kind, {"num_hidden_layers": LAYERS[kind]} | (changes or {}), **options)


MORE = [
    setting_of("llama", {"attn_implementation": "eager"}, pads=True),
    setting_of("llama", {"attn_implementation": "sdpa"}, pads=True, steps=2),
    setting_of("llama", {"attention_dropout": 0.3}, steps=2),
    setting_of("qwen3", {"attention_dropout": 0.3, "attn_implementation": "eager"}),
    setting_of("llama-tied-4-2", dtype=torch.float64),
]
KINDS = {kind: setting_of(kind) for kind in ZOO}
NATIVE = ["llama", "qwen3", "olmo2", "llama-one-key-head"]
# All run at the degree that divides nothing. At degree 8, ranks have no heads, or share one.
OTHER_DEGREES = [(2, "llama"), (8, "llama-tied-4-2"), (8, "llama-one-key-head")]
COUNTED = [*((3, kind) for kind in ZOO), *OTHER_DEGREES]
CASES = [(degree, KINDS[kind]) for degree, kind in COUNTED] + [(3, setting) for setting in MORE]


def name_of(setting: Setting) -> str:
    words = [setting.kind, *map(str, setting.changes.values())]
    return "-".join(words) + ("-pads" if setting.pads else "") + f"-{setting.steps}"


@pytest.fixture(scope="module")
def ran(pool: Pool) -> Any:
    """What each rank found in a setting at a degree, once for all tests."""
    known: dict[str, list[dict[str, Any]]] = {}

    def run(setting: Setting, degree: int) -> list[dict[str, Any]]:
        key = f"{name_of(setting)} {setting.dtype} {setting.numerics} {degree}"
        if key not in known:
            known[key] = list(pool(degree, "threads").run(partial(setting)))
        return known[key]

    return run


@pytest.fixture(scope="module")
def alone(ran: Any) -> Any:
    """One rank's run of a setting."""
    return lambda setting: ran(setting, 1)[0]


@pytest.mark.parametrize(
    ("degree", "setting"), CASES, ids=[f"{degree}-{name_of(setting)}" for degree, setting in CASES]
)
def test_the_degree_changes_no_bit(degree: int, setting: Setting, alone: Any, ran: Any) -> None:
    assert hashes(ran(setting, degree)[0]) == hashes(alone(setting))


def test_processes_give_the_same_bits(alone: Any, pool: Pool) -> None:
    setting = KINDS["qwen3"]
    found = pool(3, "processes").run(partial(setting))[0]
    assert hashes(found) == hashes(alone(setting))


@pytest.mark.parametrize("setting", [*KINDS.values(), *MORE[:2]], ids=name_of)
def test_numbers_are_those_of_transformers(setting: Setting, alone: Any) -> None:
    """fp32 is no further from the truth than plain torch's own fp32, times 1.5."""
    found = alone(setting)
    truth = plain_step(setting, found["weights"], torch.float64)
    plain = plain_step(setting, found["weights"], torch.float32)
    assert error(found["tensors"], truth) <= 1.5 * error(plain, truth)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "olmo2"])
def test_numbers_in_fp64_are_those_of_transformers(kind: str, alone: Any) -> None:
    setting = setting_of(kind, dtype=torch.float64)
    found = alone(setting)
    truth = plain_step(setting, found["weights"], torch.float64)
    for name, tensor in truth.items():
        largest = (found["tensors"][name] - tensor).abs().max() / tensor.abs().max()
        assert largest < 1e-10, name


@pytest.mark.parametrize("kind", NATIVE)
def test_native_numerics_agree(kind: str, alone: Any, ran: Any) -> None:
    truth = alone(KINDS[kind])["tensors"]
    found = ran(setting_of(kind, numerics="native"), 3)[0]
    assert found.keys() == alone(KINDS[kind]).keys() - {"weights", "tensors"}
    one = alone(setting_of(kind, numerics="native"))["tensors"]
    for name, tensor in truth.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("numerics", "degree", "kind"),
    [("invariant", *each) for each in COUNTED] + [("native", 3, kind) for kind in NATIVE],
)
def test_the_plan_knows_what_a_step_sends(degree: int, numerics: str, kind: str, ran: Any) -> None:
    setting = setting_of(kind, numerics=numerics)
    made = plan(
        meta_model(kind, **setting.changes),
        degree=degree,
        scheme=Scheme(numerics=numerics),  # type: ignore[arg-type]
    )
    for rank, found in enumerate(ran(setting, degree)):
        counted = {k: v for k, v in found["ledger"].items() if k in ("forward", "backward")}
        assert counted == made.comm(batch=2, length=9, rank=rank)


def test_projections_of_one_input_share_one_sum() -> None:
    """Of a Llama of 4 layers: an embedding, two sums forward and two backward each, a head."""
    model = meta_model(
        "llama",
        hidden_size=512,
        num_hidden_layers=4,
        num_key_value_heads=4,
        intermediate_size=1408,
        vocab_size=8192,
    )
    counts = plan(model, degree=2).comm(batch=4, length=128)
    reduced = [counts[direction]["all_reduce"] for direction in ("forward", "backward")]
    assert [each["calls"] for each in reduced] == [1 + 4 * 2, 4 * 2 + 1]
    message = 4 * 128 * 512 * 4
    assert sum(each["message_bytes"] for each in reduced) == 18 * message
    # What the loss needs of each leaf, in the place of 16 MiB of logits.
    assert counts["forward"]["all_gather"]["message_bytes"] == 3 * 8 * 4 * 128 * 4
