"""The zoo builds every model small, runs it, and survives those that crash or hang."""

import os

import pytest
import torch
import transformers

from misbehaving import misbehave
from zoo import own, run
from zoo.build import build
from zoo.children import Child
from zoo.lists import LISTS, lists_of, names
from zoo.shrink import small
from zoo.steps import step_of
from zoo.unbuildable import UNBUILDABLE

# Of every list, and of every kind of input: words, pictures, sounds, two towers, none of these.
A_DOZEN = [
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "DeepseekV3ForCausalLM",
    "JambaForCausalLM",
    "Phi4MultimodalForCausalLM",
    "T5ForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "VoxtralRealtimeForConditionalGeneration",
    "LukeForMaskedLM",
    "ReformerForMaskedLM",
    "SwinForImageClassification",
    "MobileViTForImageClassification",
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# transformers warns of what small configurations leave out; that is no fault of the models here.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_list_has_its_classes_once():
    counted = {which: len(set(names(which))) for which in LISTS}
    assert counted == {"causal": 181, "seq2seq": 37, "masked": 51, "image": 46, "own": 13}
    assert all(len(names(which)) == counted[which] for which in LISTS)


@pytest.mark.parametrize("name", [*A_DOZEN, *own.NAMES])
def test_a_model_trains_a_step_in_plain_torch(name):
    example = build(name)
    before = {key: each.detach().clone() for key, each in example.model.named_parameters()}
    found = step_of("plain")(example)
    assert "reason" not in found
    assert found["gradient_norm"] > 0
    assert found["parameters"] < 500_000
    after = dict(example.model.named_parameters())
    unchanged = {key for key in before if torch.equal(before[key], after[key])}
    moved = {key for key, each in after.items() if each.grad is not None and each.grad.any()}
    # The bias of keys has no effect on softmax: its gradient is rounding, less than a bit of it.
    rounding = {key for key in unchanged & moved if after[key].grad.abs().max() < 1e-15}
    assert unchanged - rounding == set(before) - moved
    assert set(found["without_gradient"]) <= unchanged


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ViTForImageClassification", "nanoGPT"])
def test_the_same_arguments_give_the_same_bits_and_another_seed_others(name):
    one, two, other = build(name), build(name), build(name, seed=1)
    pairs = list(zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(one.inputs[key], two.inputs[key]) for key in one.inputs)
    others = list(zip(one.model.parameters(), other.model.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in others)


def test_building_leaves_the_random_numbers_of_torch_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    build("LlamaForCausalLM")
    build("nanoGPT")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "BertForMaskedLM", "grouped-heads"])
def test_a_model_runs_on_the_meta_device(name):
    example = build(name, device="meta")
    loss = example.loss(example.model(**example.inputs))
    assert loss.is_meta
    assert loss.shape == ()


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "nanoGPT", "TransformerEncoder"]
)
def test_without_dropout_two_forwards_are_the_same(name):
    def losses(**options: bool) -> list[float]:
        example = build(name, **options)
        return [example.loss(example.model(**example.inputs)).item() for _ in range(2)]

    one, two = losses(dropout=False)
    assert one == two
    one, two = losses()
    assert one != two


def test_sizes_divide_nothing_nicely_and_every_kind_of_layer_is_there():
    config = build("LlamaForCausalLM", device="meta").model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (6, 2)
    assert (config.intermediate_size, config.vocab_size) == (100, 251)
    kinds = build("Qwen3NextForCausalLM", device="meta").model.config.layer_types
    assert set(kinds) == {"linear_attention", "full_attention"}
    kinds = build("NemotronHForCausalLM", device="meta").model.config.layers_block_type
    assert set(kinds) == {"linear_attention", "moe", "full_attention", "mlp"}


def test_a_change_goes_over_the_small_sizes():
    example = build("LlamaForCausalLM", device="meta", changes={"num_hidden_layers": 3})
    assert len(example.model.model.layers) == 3


@pytest.mark.parametrize(
    ("config", "key", "default", "off"),
    [
        (transformers.GPT2Config, "attn_pdrop", 0.1, 0.0),
        (transformers.CvtConfig, "drop_path_rate", (0.0, 0.0, 0.1), (0.0, 0.0, 0.0)),
        (transformers.SwitchTransformersConfig, "router_jitter_noise", 0.01, 0.0),
    ],
)
def test_small_keeps_the_dropout_of_the_default_or_sets_it_to_zero(config, key, default, off):
    assert getattr(small(config, dropout=True), key) == default
    assert getattr(small(config, dropout=False), key) == off


def test_what_cannot_be_built_is_in_a_list_and_says_why():
    for name, why in UNBUILDABLE.items():
        assert lists_of(name)
        assert why.endswith(".")
        with pytest.raises((ImportError, ValueError)):
            build(name)


@pytest.fixture
def child():
    found = Child(misbehave, limit=2.0)
    yield found
    found.end()


def test_models_share_a_process(child):
    one, two = child.ask("one", "plain"), child.ask("two", "plain")
    assert one["process"] == two["process"] != os.getpid()
    assert two["name"] == "two"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hangs", "it ran over its limit of 2 s"),
        ("crashes", "its process ended with signal SIGSEGV"),
        ("exits", "its process ended with exit status 7; it last said: the last words"),
    ],
)
def test_a_hang_or_a_crash_costs_one_model(child, name, reason):
    first = child.ask("one", "plain")
    failed = child.ask(name, "plain")
    assert failed["reason"].startswith(reason)
    assert failed["seconds"] < 20
    after = child.ask("two", "plain")
    assert "reason" not in after
    assert after["process"] != first["process"]
    with pytest.raises(ProcessLookupError):
        os.kill(first["process"], 0)


def test_an_error_costs_one_model_and_no_process(child):
    first = child.ask("one", "plain")
    failed = child.ask("raises", "plain")
    assert failed["reason"].startswith("RuntimeError: two lines (misbehaving.py:")
    assert child.ask("two", "plain")["process"] == first["process"]


def test_the_command_writes_a_row_for_each_model(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    status = run.main(
        ["--only", "nanoGPT", "--only", "TimmWrapperForImageClassification", "--json", str(out)]
    )
    assert status == 0  # the failure is a known one
    rows = out.read_text().splitlines()
    assert len(rows) == 2
    told = capsys.readouterr().out
    assert "It takes its vision tower from timm" in told
    assert "nanoGPT" in told


def test_an_unknown_model_is_an_error_of_the_arguments(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "Nobody"])
    assert "no list has Nobody" in capsys.readouterr().err
