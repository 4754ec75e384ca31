"""What people do to a model before or after it is cut: right, or one sentence with the way out."""

import copy
import functools
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from hf_zoo import Setting, cut_model, hash_tensor, inputs, whole_model
from places import Pool
from shardproof import optim
from shardproof.axis import Axis
from shardproof.errors import AxisError, LayoutError, PlanError, ShapeError, UsageError
from shardproof.plans.apply import parallelize
from shardproof.plans.planning import plan

transformers = pytest.importorskip("transformers")

LLAMA = Setting("llama", {"num_hidden_layers": 1})
IDS = inputs(LLAMA)["input_ids"]
MLP = {"up": "colwise", "down": "rowwise"}


class Mlp(nn.Module):
    def __init__(self, up: nn.Module | None = None, down: nn.Module | None = None) -> None:
        super().__init__()
        self.up = up or nn.Linear(12, 37)
        self.act = nn.GELU()
        self.down = down or nn.Linear(37, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


def refused(model: nn.Module, given: Any = MLP) -> str:
    with pytest.raises(PlanError) as caught:
        parallelize(model, given, Axis.solo())
    with pytest.raises(PlanError):
        plan(model, given, degree=2)
    return str(caught.value)


def outcome(axis: Axis, model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Outputs of a cut model, and hashes of its gradients (on rank 0)."""
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {
        name: hash_tensor(p.grad, layout, axis, who=name)
        for name, p, layout, _ in optim.layouts_of(model)
        if p.grad is not None
    }


# -- methods of transformers -----------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "push_to_hub": (lambda m: m.push_to_hub("no/where"), r"push_to_hub of a cut Llama"),
    "resize": (
        lambda m: m.resize_token_embeddings(80),
        r"resize_token_embeddings of a cut LlamaForCausalLM: .* Call it before parallelize\.",
    ),
    "resize to the same": (lambda m: m.resize_token_embeddings(67), r"Call it before parallelize"),
    "add_adapter": (lambda m: m.add_adapter(object()), r"add_adapter .* Merge the adapter"),
    "load_adapter": (lambda m: m.load_adapter("nowhere"), r"load_adapter .* Merge the adapter"),
    "attentions": (lambda m: m(IDS, output_attentions=True), r"attention weights of a cut model"),
    "attentions of generation": (
        lambda m: m.generate(
            IDS[:, :3],
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
            output_attentions=True,
            return_dict_in_generate=True,
        ),
        r"attention weights of a cut model",
    ),
    "another implementation": (
        lambda m: (m.set_attn_implementation("eager"), m(IDS)),
        r"computed by another function than shardproof's",
    ),
}


def said_by(act: Callable[[], Any]) -> str:
    """The error that it raises, with its class; empty if there is none."""
    try:
        act()
    except (RuntimeError, ShapeError, UsageError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_refused(what: str, model: Any) -> None:
    act, said = REFUSED[what]
    found = said_by(lambda: act(model))
    assert re.search(f"^UsageError: (.|\n)*{said}", found), (what, found)


def test_methods_that_know_whole_weights_only_are_refused(pool: Pool) -> None:
    def run(axis: Axis) -> None:
        model = cut_model(axis, LLAMA)
        for what in REFUSED:  # the last one changes the configuration
            for each in (copy.deepcopy(model), model):
                check_refused(what, each)

    pool(2, "threads").run(run)


class Holder(nn.Module):
    """A module of the user's own around a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def inner_ones(axis: Axis, whole: nn.Module) -> list[Any]:
    """Models of transformers inside of what was cut."""
    held = Holder(copy.deepcopy(whole))
    layer = "model.model.layers.*.mlp"
    styles = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    parallelize(held, {f"{layer}.{name}": style for name, style in styles.items()}, axis)
    return [cut_model(axis, LLAMA).model, held.model, held.model.model]


@pytest.mark.parametrize("what", ["push_to_hub", "resize"])
def test_models_inside_refuse_too(
    what: str, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would write one rank's shards, without an error."""
    monkeypatch.chdir(tmp_path)
    act, said = REFUSED[what]
    whole = whole_model("llama", **LLAMA.changes)

    def run(axis: Axis) -> None:
        for each in inner_ones(axis, whole):
            with pytest.raises(UsageError, match=said.replace("ForCausalLM", ".*")):
                act(each)

    pool(2, "threads").run(run)


def test_a_model_inside_of_which_nothing_is_cut_refuses_nothing(tmp_path: Path) -> None:
    held = Holder(whole_model("llama", **LLAMA.changes))
    held.head = Mlp()
    held.config, held.init_weights = None, nn.Identity()  # names that are its own
    parallelize(held, {f"head.{name}": style for name, style in MLP.items()}, Axis.solo())
    held.model.save_pretrained(tmp_path)
    held.init_weights(None)
    assert (tmp_path / "config.json").exists()


def loss_of(axis: Axis, change: Callable[[Any], Any]) -> Tensor:
    return loss_after(change, cut_model(axis, LLAMA))


def loss_after(change: Callable[[Any], Any], model: Any) -> Tensor:
    changed = change(model)
    model = changed if isinstance(changed, nn.Module) else model
    loss: Tensor = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.detach()


# What a person does that leaves a cut model right: the loss is that of before, or of plain torch.
ALLOWED: dict[str, Callable[[Any], Any]] = {
    "tie_weights": lambda m: m.tie_weights(),
    "enable_input_require_grads": lambda m: m.enable_input_require_grads(),
    "gradient_checkpointing": lambda m: (m.train(), m.activation_checkpointing_enable(), None)[2],
    "eval": lambda m: m.eval(),
    "deepcopy": copy.deepcopy,
    "a state of its own": lambda m: m.load_state_dict(m.state_dict()) and None,
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("kind", ["llama", "llama-tied-4-2"])
def test_what_leaves_a_cut_model_right(kind: str, pool: Pool) -> None:
    def run(axis: Axis) -> list[Tensor]:
        cut = cut_model(axis, Setting(kind, LLAMA.changes))
        changes = (lambda m: None, *ALLOWED.values())
        return [loss_after(change, copy.deepcopy(cut)) for change in changes]

    ((one, *others),) = pool(1, "threads").run(run)
    for name, loss in zip(ALLOWED, others, strict=True):
        assert torch.equal(loss, one), name
    for found in pool(3, "threads").run(run):
        assert all(torch.equal(loss, one) for loss in found)


def test_other_dtypes_have_the_same_bits_at_every_degree(pool: Pool) -> None:
    casts = (nn.Module.half, nn.Module.bfloat16, nn.Module.double)

    def run(axis: Axis) -> list[Tensor]:
        cut = cut_model(axis, LLAMA)
        return [loss_after(cast, copy.deepcopy(cut)) for cast in casts]

    (one,) = pool(1, "threads").run(run)
    plain = cut_model(Axis.solo(), LLAMA)
    whole = whole_model("llama", **LLAMA.changes)
    whole.load_state_dict({n: p.detach() for n, p in plain.named_parameters()}, strict=False)
    for loss, cast in zip(one, casts, strict=True):
        truth = cast(copy.deepcopy(whole))(IDS, labels=IDS).loss
        torch.testing.assert_close(loss.float(), truth.float(), rtol=1e-3, atol=1e-4)
    for found in pool(3, "threads").run(run):
        assert all(map(torch.equal, found, one))


def test_parameters_are_counted_as_those_of_the_whole(pool: Pool) -> None:
    for kind in ("llama-tied-4-2", "qwen3"):
        whole: Any = whole_model(kind, **LLAMA.changes)
        whole.lm_head.requires_grad_(False)
        wanted = [
            whole.num_parameters(),
            whole.num_parameters(only_trainable=True),
            whole.num_parameters(exclude_embeddings=True),
        ]

        def run(axis: Axis, whole: Any = whole) -> list[int]:
            model: Any = parallelize(copy.deepcopy(whole), None, axis)
            return [
                model.num_parameters(),
                model.num_parameters(only_trainable=True),
                model.num_parameters(exclude_embeddings=True),
            ]

        assert pool(3, "threads").run(run) == [wanted] * 3


def test_a_resized_model_can_be_cut_afterwards(pool: Pool) -> None:
    """What the message advises."""
    whole: Any = whole_model("llama", **LLAMA.changes)
    whole.resize_token_embeddings(80)
    ids = torch.tensor([[70, 79, 3]])
    truth = whole(ids, labels=ids).loss.detach()

    def run(axis: Axis) -> Tensor:
        loss: Tensor = parallelize(copy.deepcopy(whole), None, axis)(ids, labels=ids).loss.detach()
        return loss

    for loss in pool(3, "threads").run(run):
        torch.testing.assert_close(loss, truth)


def test_states_and_pickles_of_others_are_refused(pool: Pool) -> None:
    state = whole_model("llama", **LLAMA.changes).state_dict()

    def run(axis: Axis) -> None:
        model = cut_model(axis, LLAMA)
        for strict in (True, False):
            with pytest.raises(LayoutError, match=r"the state has no layout"):
                model.load_state_dict(state, strict=strict)
        with pytest.raises(AxisError, match=r"cannot be pickled"):
            pickle.dumps(model)

    pool(2, "threads").run(run)


def test_a_model_made_from_the_config_of_a_cut_one_says_so() -> None:
    cut: Any = cut_model(Axis.solo(), LLAMA)
    config = copy.deepcopy(cut.config)
    with pytest.raises(UsageError, match=r"config is that of a cut model.*= 'sdpa'"):
        type(cut)(config)(IDS)
    config._attn_implementation = "sdpa"  # what the message advises
    type(cut)(config)(IDS)


def test_a_whole_embedding_put_in_afterwards_is_right(pool: Pool) -> None:
    table = nn.Embedding(67, 32)

    def run(axis: Axis) -> Tensor:
        return loss_of(axis, lambda m: m.set_input_embeddings(copy.deepcopy(table)))

    (one,) = pool(1, "threads").run(run)
    assert all(torch.equal(loss, one) for loss in pool(3, "threads").run(run))


SWAPPED: dict[str, Callable[[Any, Any], Any]] = {
    "up": lambda layer, whole: setattr(layer.mlp, "up_proj", whole.mlp.up_proj),
    "gate and up": lambda layer, whole: [
        setattr(layer.mlp, name, whole.mlp.get_submodule(name)) for name in ("up_proj", "gate_proj")
    ],
    "down": lambda layer, whole: setattr(layer.mlp, "down_proj", whole.mlp.down_proj),
    "query": lambda layer, whole: setattr(layer.self_attn, "q_proj", whole.self_attn.q_proj),
    "key": lambda layer, whole: setattr(layer.self_attn, "k_proj", whole.self_attn.k_proj),
    "output": lambda layer, whole: setattr(layer.self_attn, "o_proj", whole.self_attn.o_proj),
}


def test_a_whole_linear_where_a_cut_one_was_does_not_fit(pool: Pool) -> None:
    whole: Any = whole_model("llama", **LLAMA.changes).model.layers[0]  # type: ignore[union-attr,index]

    def run(axis: Axis) -> dict[str, str]:
        cut = cut_model(axis, LLAMA)
        found = {}
        for what, swap in SWAPPED.items():
            model: Any = copy.deepcopy(cut)
            swap(model.model.layers[0], copy.deepcopy(whole))
            found[what] = said_by(functools.partial(model, IDS))
        return found

    for found in pool(2, "threads").run(run):
        assert set(found) == set(SWAPPED)
        for what, text in found.items():
            assert re.search(r"^(ShapeError|RuntimeError): (.|\n)*(shape|size)", text), (what, text)


@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_a_whole_block_where_a_cut_one_was_is_right(part: str, pool: Pool) -> None:
    whole: Any = whole_model("llama", **LLAMA.changes).model.layers[0]  # type: ignore[union-attr,index]

    def run(axis: Axis) -> Tensor | str:
        def change(model: Any) -> None:
            setattr(model.model.layers[0], part, copy.deepcopy(whole.get_submodule(part)))

        return loss_of(axis, change)

    (one,) = pool(1, "threads").run(run)
    assert all(torch.equal(loss, one) for loss in pool(3, "threads").run(run))


# -- caches ----------------------------------------------------------------------------------------


def test_a_cache_serves_its_own_rank_alone(pool: Pool) -> None:
    whole = whole_model("llama", **LLAMA.changes).requires_grad_(False)
    of_whole = whole(IDS, use_cache=True).past_key_values

    def fill(axis: Axis) -> Any:
        model = cut_model(axis, LLAMA).requires_grad_(False)
        cache = model(IDS[:, :4], use_cache=True).past_key_values
        assert cache.held_by == f"rank {axis.rank} of {axis.size}"
        again = copy.deepcopy(cache)
        first = model(IDS[:, 4:5], past_key_values=cache).logits
        assert torch.equal(model(IDS[:, 4:5], past_key_values=again, use_cache=True)[0], first)
        with pytest.raises(UsageError, match=r"were filled by an uncut model"):
            model(IDS[:, 4:5], past_key_values=copy.deepcopy(of_whole))
        return again

    caches = pool(2, "threads").run(fill)

    def use(axis: Axis) -> None:
        model = cut_model(axis, LLAMA)
        with pytest.raises(UsageError, match=r"were filled by rank 0 of 2 of a cut one"):
            model(IDS[:, 4:5], past_key_values=copy.deepcopy(caches[0]))
        other = caches[1 - axis.rank] if axis.size == 2 else caches[0]
        with pytest.raises(UsageError, match=r"were filled by rank [01] of 2"):
            model(IDS[:, 4:5], None, None, copy.deepcopy(other))

    pool(3, "threads").run(use)


# -- adapters and other linears --------------------------------------------------------------------


class Lora(nn.Module):
    """As `peft.tuners.lora.Linear` is built."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = self.lora_B["default"](self.lora_A["default"](x))
        y: Tensor = self.base_layer(x) + 2.0 * low
        return y


def test_what_the_message_about_adapters_advises_is_right(pool: Pool) -> None:
    torch.manual_seed(0)
    whole = Mlp(Lora(nn.Linear(12, 37)), Lora(nn.Linear(37, 12)))
    message = refused(whole)
    entries = {}
    for each in message.split("name {")[1:]:
        for entry in each.split("}")[0].split(", "):
            name, _, word = entry.partition(": ")
            entries[name.strip('"')] = {"ColumnParallel()": "colwise", "RowParallel()": "rowwise"}[
                word
            ]
    assert entries == {
        "up.base_layer": "colwise",
        "up.lora_B.default": "colwise",
        "down.base_layer": "rowwise",
        "down.lora_A.default": "rowwise",
    }
    x = torch.randn(5, 12)
    truth = whole(x)
    truth.square().sum().backward()

    def run(axis: Axis) -> Any:
        return outcome(axis, parallelize(copy.deepcopy(whole), entries, axis), x)

    ((y, one),) = pool(1, "threads").run(run)
    torch.testing.assert_close(y, truth.detach(), rtol=1e-4, atol=1e-5)
    for degree in (3, 8):
        ours, hashes = pool(degree, "threads").run(run)[0]
        assert torch.equal(ours, y)
        assert hashes == one


def test_adapters_in_a_model_are_cut_with_their_base(pool: Pool) -> None:
    torch.manual_seed(0)
    # The base, and the side of the adapter that has its cut dim.
    sides = {"q_proj": "lora_B", "o_proj": "lora_A", "gate_proj": "lora_B", "down_proj": "lora_A"}
    model: Any = whole_model("llama", **LLAMA.changes)
    for layer in model.model.layers:
        for child in sides:
            parent = layer.mlp if child in ("gate_proj", "down_proj") else layer.self_attn
            setattr(parent, child, Lora(getattr(parent, child)))
    truth = model(input_ids=IDS).logits

    def run(axis: Axis) -> tuple[Tensor, list[str]]:
        cut = parallelize(copy.deepcopy(model), None, axis)
        logits: Any = cut(input_ids=IDS).logits
        y = logits.whole() if hasattr(logits, "whole") else logits
        held = [n for n, p, layout, _ in optim.layouts_of(cut) if not layout.is_replicated]
        return y.detach(), held

    ((y, held),) = pool(1, "threads").run(run)
    torch.testing.assert_close(y, truth.detach(), rtol=1e-4, atol=1e-5)
    for child, side in sides.items():
        assert any(f"{child}.base_layer" in name for name in held)
        assert any(f"{child}.{side}" in name for name in held)
    assert torch.equal(pool(3, "threads").run(run)[0][0], y)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_forward(module: nn.Module) -> nn.Module:
    """Its forward is replaced on the instance, as accelerate does."""
    before = module.forward
    module.forward = lambda x: 2 * before(x)  # type: ignore[method-assign]
    return module


def old_norm(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(module)


def with_acts(act: nn.Module) -> Mlp:
    model = Mlp()
    model.act = act
    return model


STRANGERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (
        lambda: Mlp(Doubled(12, 37)),
        r"is a Doubled, .* It may have a forward of its own",
    ),
    "a forward of its own": (
        lambda: Mlp(with_forward(nn.Linear(12, 37))),
        r"module 'up' has a forward of its own, which the Linear that is replaced would lose",
    ),
    "an activation with one": (
        lambda: with_acts(with_forward(nn.SiLU())),
        r"module 'act' has a forward of its own, which the SiLU",
    ),
    "a lazy linear": (lambda: Mlp(nn.LazyLinear(37)), r"parameter 'up.weight' has no shape yet"),
    "a lazy one elsewhere": (
        lambda: with_acts(nn.Sequential(nn.GELU(), nn.LazyLinear(37))),
        r"parameter 'act.1.weight' has no shape yet",
    ),
    "one of attention": (
        lambda: Mlp(nn.modules.linear.NonDynamicallyQuantizableLinear(12, 37)),
        r"is a NonDynamicallyQuantizableLinear",
    ),
    "bilinear": (lambda: Mlp(nn.Bilinear(12, 12, 37)), r"is a Bilinear, .* Leave it replicated"),
    "Conv1D of transformers": (
        lambda: Mlp(transformers.pytorch_utils.Conv1D(37, 12)),
        r"is a Conv1D, .* Leave it replicated",
    ),
    "a convolution": (lambda: Mlp(nn.Conv1d(12, 37, 1)), r"is a Conv1d"),
    "a quantized one": (
        lambda: Mlp(torch.ao.nn.quantized.dynamic.Linear(12, 37)),
        r"module 'up' is a Linear, which .* takes nn.Linear",
    ),
    "a parametrized one": (
        lambda: Mlp(parametrizations.weight_norm(nn.Linear(12, 37))),
        r"is a ParametrizedLinear",
    ),
    "weight_norm by hooks": (
        lambda: Mlp(old_norm(nn.Linear(12, 37))),
        r"module 'up' has hooks.*torch.nn.utils.remove_weight_norm",
    ),
    "a mask": (
        lambda: Mlp(prune.l1_unstructured(nn.Linear(12, 37), "weight", 0.5)),
        r"module 'up' has hooks.*prune.remove",
    ),
}


@pytest.mark.parametrize("what", STRANGERS)
@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantized.*:DeprecationWarning")
def test_what_is_no_plain_linear_is_refused(what: str) -> None:
    make, said = STRANGERS[what]
    with pytest.raises(PlanError, match=said):
        parallelize(make(), MLP, Axis.solo())


def undone(what: str) -> nn.Module:
    """What the messages advise, done to the model of the same name in STRANGERS."""
    model: Any = STRANGERS[what][0]()
    if what == "a forward of its own":
        del model.up.forward
    elif what == "a lazy linear":
        model(torch.ones(2, 12))
    elif what == "weight_norm by hooks":
        nn.utils.remove_weight_norm(model.up)
    elif what == "a mask":
        prune.remove(model.up, "weight")
    elif what == "a parametrized one":
        parametrize.remove_parametrizations(model.up, "weight")
    return model


@pytest.mark.parametrize(
    "what",
    [
        "a forward of its own",
        "a lazy linear",
        "weight_norm by hooks",
        "a mask",
        "a parametrized one",
    ],
)
@pytest.mark.filterwarnings("ignore:.*remove_weight_norm.*:FutureWarning")
def test_what_the_messages_advise_can_be_cut(what: str, pool: Pool) -> None:
    model = undone(what)
    x = torch.randn(3, 12)
    truth = model(x).detach()

    def run(axis: Axis) -> Tensor:
        y: Tensor = parallelize(copy.deepcopy(model), MLP, axis)(x).detach()
        return y

    ((one),) = pool(1, "threads").run(run)
    torch.testing.assert_close(one, truth, rtol=1e-4, atol=1e-5)
    assert torch.equal(pool(3, "threads").run(run)[2], one)


AFTERWARDS: dict[str, Callable[[Any], Any]] = {
    "weight_norm": lambda m: parametrizations.weight_norm(m.down),
    "weight_norm of a column": lambda m: parametrizations.weight_norm(m.up, dim=1),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.up),
    "orthogonal": lambda m: parametrizations.orthogonal(m.down),
    "weight_norm by hooks": lambda m: nn.utils.weight_norm(m.down),
    "spectral_norm by hooks": lambda m: nn.utils.spectral_norm(m.up),
    "pruned": lambda m: prune.l1_unstructured(m.down, "weight", 0.5),
}


@pytest.mark.parametrize("what", AFTERWARDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_norms_of_a_weight_that_is_cut_are_refused(what: str) -> None:
    model = parallelize(Mlp(), MLP, Axis.solo())
    with pytest.raises(UsageError, match=r"of which this rank holds a part"):
        AFTERWARDS[what](model)


def test_an_elementwise_parametrization_is_right(pool: Pool) -> None:
    class Bent(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0.5

    whole, x = Mlp(), torch.randn(4, 12)

    def run(axis: Axis) -> Tensor:
        model = parallelize(copy.deepcopy(whole), MLP, axis)
        parametrize.register_parametrization(model.down, "weight", Bent())
        y: Tensor = model(x).detach()
        return y

    (one,) = pool(1, "threads").run(run)
    assert torch.equal(pool(3, "threads").run(run)[0], one)
    plain = copy.deepcopy(whole)
    parametrize.register_parametrization(plain.down, "weight", Bent())
    torch.testing.assert_close(one, plain(x).detach(), rtol=1e-4, atol=1e-5)


# -- a second time ---------------------------------------------------------------------------------


def test_a_model_that_is_cut_says_so_on_all_ranks(pool: Pool) -> None:
    def run(axis: Axis) -> None:
        model = cut_model(axis, LLAMA)
        for given in (None, {"model.layers.*.mlp.up_proj": "colwise"}):
            with pytest.raises(PlanError, match=r"is cut already \(.*Name all that is to be cut"):
                parallelize(model, given, axis)

    for degree in (1, 3):
        pool(degree, "threads").run(run)


def test_other_parts_can_be_cut_later(pool: Pool) -> None:
    whole, x = nn.Sequential(Mlp(), Mlp()), torch.randn(4, 12)
    first, second = ({f"{n}.{name}": style for name, style in MLP.items()} for n in (0, 1))

    def run(axis: Axis) -> list[Any]:
        at_once = parallelize(copy.deepcopy(whole), first | second, axis)
        later = parallelize(parallelize(copy.deepcopy(whole), first, axis), second, axis)
        return [outcome(axis, model, x) for model in (at_once, later)]

    for degree in (1, 3):
        (y, hashes), (other, others) = pool(degree, "threads").run(run)[0]
        assert torch.equal(y, other)
        assert hashes == others


def test_a_copy_is_cut_and_trains_by_itself(pool: Pool) -> None:
    def run(axis: Axis) -> None:
        model = cut_model(axis, LLAMA)
        twin: Any = copy.deepcopy(model)
        loss = twin(IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is None for p in model.parameters())
        assert twin.lm_head.weight.grad is not None
        assert torch.equal(twin(IDS, labels=IDS).logits.clone(), model(IDS).logits)

    pool(3, "threads").run(run)
