"""What one watched forward finds in models of all kinds: units, blocks and what stays whole."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import watched_models as models
from shardproof.units import Block
from shardproof.watching import Choice, Family, choose, families, watch
from shardproof.watching.rules import RULES

HEADS = (Block(12, 0, 4),)  # three heads of four features


def look(model: nn.Module, *args: object, **kwargs: object) -> Choice:
    """What is cut without rows that are cut alone, for the models are small."""
    watched = watch(model, args, kwargs)
    return choose(families(watched), watched, enough=0.0)


def hidden() -> Tensor:
    return torch.rand(2, 5, 12)


def of(choice: Choice, name: str) -> Family:
    """The family that cuts a parameter."""
    found = [family for family in choice.families for key in family.dims if key[0] == name]
    assert len(found) == 1, f"{name} is cut {len(found)} times: {choice.whole.get(name)}"
    return found[0]


def blocks(choice: Choice, name: str) -> tuple[int, tuple[Block, ...]]:
    """The dim along which a parameter is cut, and its blocks."""
    family = of(choice, name)
    return next((dim, blocks) for (key, dim), blocks in family.dims.items() if key == name)


def test_nanogpt_is_cut_by_heads_features_and_vocabulary() -> None:
    ids = torch.randint(0, 11, (2, 5))
    choice = look(models.NanoGPT(), ids, labels=ids)
    assert of(choice, "attn.c_attn.weight").units.count == 3
    assert blocks(choice, "attn.c_attn.weight") == (0, HEADS * 3)
    assert blocks(choice, "attn.c_attn.bias") == (0, HEADS * 3)
    assert blocks(choice, "attn.c_proj.weight") == (1, HEADS)
    assert of(choice, "attn.c_attn.weight").kind == "pair"
    assert blocks(choice, "c_fc.weight") == (0, (Block(20, 0, 1),))
    assert blocks(choice, "c_out.weight") == (1, (Block(20, 0, 1),))
    assert of(choice, "wte.weight").kind == "vocabulary"
    assert "lm_head.weight" not in choice.whole  # tied: one parameter, its first name
    assert "'ln_1'" in choice.whole["ln_1.weight"]
    assert choice.share == 1.0


def test_the_forward_of_a_pair_has_one_reduce() -> None:
    ids = torch.randint(0, 11, (2, 5))
    choice = look(models.NanoGPT(), ids)
    for name in ("attn.c_attn.weight", "c_fc.weight"):
        assert [event.what for event in of(choice, name).events] == ["reduce"]
    event = of(choice, "c_fc.weight").events[0]
    assert (event.module, event.parameter, event.dim) == ("c_out", "c_out.weight", 1)


def test_interleaved_queries_keys_and_values_go_with_their_head() -> None:
    choice = look(models.Interleaved(), hidden())
    assert blocks(choice, "qkv.weight") == (0, (Block(36, 0, 12),))
    assert blocks(choice, "dense.weight") == (1, HEADS)


def test_key_value_heads_are_shared_units() -> None:
    choice = look(models.Grouped(), hidden())
    family = of(choice, "q.weight")
    assert (family.units.count, family.units.needers) == (6, ((0, 1, 2), (3, 4, 5)))
    assert blocks(choice, "q.weight") == (0, (Block(24, 0, 4),))
    assert blocks(choice, "k.weight") == (0, (Block(8, 6, 4),))
    assert blocks(choice, "v.weight") == (0, (Block(8, 6, 4),))
    assert blocks(choice, "o.weight") == (1, (Block(24, 0, 4),))
    assert family.units.breaks is None


def test_a_gate_of_every_feature_goes_with_its_head() -> None:
    choice = look(models.GatedHeads(), hidden())
    family = of(choice, "gate.weight")
    assert (family.units.count, family.units.needers) == (6, ((0, 1, 2), (3, 4, 5)))
    assert blocks(choice, "gate.weight") == (0, (Block(24, 0, 4),))
    assert blocks(choice, "k.weight") == (0, (Block(8, 6, 4),))


def test_a_view_with_groups_allows_only_their_boundaries() -> None:
    choice = look(models.Grouped(is_fused=True), hidden())
    family = of(choice, "qkv.weight")
    assert (family.units.count, family.units.needers) == (6, ((0, 1, 2), (3, 4, 5)))
    assert family.units.breaks == (0, 3)
    assert blocks(choice, "qkv.weight") == (
        0,
        (Block(12, 0, 4), Block(8, 6, 8), Block(12, 3, 4), Block(8, 7, 8)),
    )


def test_a_view_with_blocks_of_heads_allows_only_their_boundaries() -> None:
    choice = look(models.Parallel(), torch.rand(2, 5, 16))
    family = of(choice, "qkv.weight")
    assert family.units.count == 4
    assert family.units.breaks == (0, 2)
    low, high = Block(8, 0, 4), Block(8, 2, 4)  # the last of the first block goes on in the second
    assert blocks(choice, "qkv.weight") == (0, (low, low, Block(16, 0, 4), high, high))


def test_a_gate_goes_with_its_feature() -> None:
    choice = look(models.Gated(), hidden())
    assert blocks(choice, "up.weight") == (0, (Block(10, 0, 1), Block(10, 0, 1)))
    choice = look(models.Gated(is_interleaved=True), hidden())
    assert blocks(choice, "up.weight") == (0, (Block(20, 0, 2),))


def test_a_scan_is_cut_by_channels() -> None:
    choice = look(models.Scan(), hidden())
    channels = (Block(18, 0, 1),)
    assert blocks(choice, "in_proj.weight") == (0, channels * 2)
    assert blocks(choice, "conv.weight") == (0, channels)
    assert blocks(choice, "x_proj.weight") == (1, channels)
    assert blocks(choice, "dt_proj.weight") == (0, channels)
    assert blocks(choice, "a_log") == (0, channels)
    assert blocks(choice, "skip") == (0, channels)
    assert blocks(choice, "out_proj.weight") == (1, channels)


def test_experts_are_cut_by_columns_and_the_router_stays_whole() -> None:
    choice = look(models.Experts(), hidden())
    for number in range(3):
        assert blocks(choice, f"up.{number}.weight") == (0, (Block(30, 0, 1),))
        assert blocks(choice, f"down.{number}.weight") == (1, (Block(30, 0, 1),))
    assert "'_softmax'" in choice.whole["gate.weight"]


def test_a_vision_transformer() -> None:
    choice = look(models.Patches(), torch.rand(2, 3, 8, 8))
    assert blocks(choice, "attn.in_proj_weight") == (0, HEADS * 3)
    assert blocks(choice, "attn.out_proj.weight") == (1, HEADS)
    assert blocks(choice, "fc1.weight") == (0, (Block(24, 0, 1),))
    assert "native_layer_norm" in choice.whole["cls"]


def test_an_encoder_layer_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    choice = look(layer, hidden())
    assert blocks(choice, "self_attn.in_proj_weight") == (0, HEADS * 3)
    assert blocks(choice, "linear1.weight") == (0, (Block(20, 0, 1),))
    assert set(choice.whole) == {
        *("self_attn.out_proj.bias", "linear2.bias"),
        *(f"norm{number}.{what}" for number in (1, 2) for what in ("weight", "bias")),
    }


def test_adapters_follow_their_base() -> None:
    choice = look(models.AdaptedFeedForward(), hidden())
    family = of(choice, "up.base.weight")
    assert {key for key in family.dims if key[0].endswith("weight")} == {
        *(("up.base.weight", 0), ("up.b.weight", 0)),
        *(("down.base.weight", 1), ("down.a.weight", 1)),
    }


def test_latents_stay_whole_and_heads_are_cut() -> None:
    choice = look(models.Latent(), hidden())
    assert blocks(choice, "q_b.weight") == (0, (Block(18, 0, 6),))
    assert blocks(choice, "kv_b.weight") == (0, (Block(24, 0, 8),))
    assert blocks(choice, "o.weight") == (1, HEADS)
    assert "'kv_norm' adds up over it" in choice.whole["kv_norm.weight"]
    assert "q_a.weight" in choice.whole
    assert "kv_a.weight" in choice.whole


def test_one_key_value_head_is_held_by_all() -> None:
    choice = look(models.Alibi(), hidden())
    family = of(choice, "qkv.weight")
    assert (family.units.count, family.units.needers) == (3, ((0, 1, 2),))
    assert blocks(choice, "qkv.weight") == (0, (*HEADS, Block(8, 3, 8)))


def test_a_norm_across_heads_is_a_small_sum() -> None:
    choice = look(models.NormedHeads(), hidden())
    family = of(choice, "q.weight")
    assert (family.kind, family.units.count) == ("pair with sums", 3)
    assert {event.what: event.op for event in family.events} == {"sum": "mean", "reduce": "mm"}
    assert blocks(choice, "scale") == (0, HEADS)


class Kinds(nn.Module):
    """Heads and features in one fused weight, an unused parameter, one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.out = nn.Linear(12, 32, bias=False), nn.Linear(32, 12, bias=False)
        self.twice = nn.Parameter(torch.rand(12, 12))
        self.unused, self.empty = nn.Linear(3, 3), nn.Parameter(torch.zeros(0, 4))
        self.single = nn.Parameter(torch.ones(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        heads, features = self.fused(x).split([12, 20], dim=-1)
        heads = heads.reshape(2, -1, 3, 4).softmax(-1).reshape(2, -1, 12)
        y = self.out(torch.cat([heads, features.relu()], dim=-1))
        y = (y @ self.twice).relu() @ self.twice.t()
        return y * self.single + self.empty.sum()


def test_kinds_of_units_in_one_weight_are_spread_alike() -> None:
    choice = look(Kinds(), hidden())
    family = of(choice, "fused.weight")
    assert family.units.count == 20
    labels = [(block.first, block.unit) for block in family.dims["fused.weight", 0]]
    assert labels == [(0, 4), (6, 4), (13, 4), (0, 1)]


def test_what_stays_whole_says_why() -> None:
    choice = look(Kinds(), hidden())
    assert choice.whole["unused.weight"] == "It is never used in the watched forward."
    assert choice.whole["single"] == "It has one element along each dim."
    assert all(reason.endswith(".") and len(reason) > 10 for reason in choice.whole.values())


def test_no_parameter_is_cut_along_two_dims() -> None:
    for model in (Kinds(), models.Scan(), models.Latent()):
        choice = look(model, hidden())
        names = [name for family in choice.families for name, _ in family.dims]
        assert len(names) == len(set(names))


def test_every_dim_is_in_one_family() -> None:
    for model in (Kinds(), models.Scan(), models.Latent(), models.Experts()):
        watched = watch(model, (hidden(),))
        found = [key for each in families(watched) for key in (*each.dims, *each.whole)]
        assert sorted(found) == sorted(watched.labels)


def test_a_module_that_is_called_twice_is_one_family() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = models.Gated()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x + self.block(x))

    choice = look(Twice(), hidden())
    assert blocks(choice, "block.down.weight") == (1, (Block(10, 0, 1),))


def test_inputs_and_outputs_may_be_nested() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = models.Gated()

        def forward(self, pair: tuple[Tensor, dict[str, Tensor]], *, scale: float) -> object:
            return {"out": (self.block(pair[0]) * scale, [pair[1]["more"]])}

    choice = look(Nested(), (hidden(), {"more": torch.ones(2)}), scale=2.0)
    assert of(choice, "block.up.weight").units.count == 10


def test_a_model_on_the_meta_device_is_found_alike() -> None:
    real = look(models.Grouped(), hidden())
    with torch.device("meta"):
        model = models.Grouped()
    meta = look(model, torch.rand(2, 5, 12, device="meta"))
    assert [(family.units, family.dims) for family in meta.families] == [
        (family.units, family.dims) for family in real.families
    ]


def test_a_forward_that_looks_at_data_is_watched_on_the_cpu() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.block = nn.Linear(12, 2), models.Gated()

        def forward(self, x: Tensor) -> Tensor:
            counts = torch.bincount(self.gate(x).argmax(-1).flatten(), minlength=2)
            parts = x.flatten(0, 1).split(counts.tolist())
            return torch.cat([self.block(part) for part in parts])

    watched = watch(Looks(), (hidden(),))
    assert watched.device == "cpu"
    assert watched.why_cpu
    assert of(choose(families(watched), watched), "block.up.weight").units.count == 10


# A rule that is left out: what each model's test relies on.
PLANTED: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("bmm", models.Alibi, "qkv.weight"),
    ("mm", models.Gated, "down.weight"),
    ("addmm", models.AdaptedFeedForward, "up.base.weight"),
    ("convolution", models.Scan, "conv.weight"),
    ("kind:pointwise", models.Gated, "up.weight"),
    ("kind:lines", models.Alibi, "out.weight"),
    ("kind:sum", models.NormedHeads, "q.weight"),
]


@pytest.mark.parametrize(("name", "build", "parameter"), PLANTED)
def test_a_rule_that_is_left_out_is_missed(
    name: str,
    build: Callable[[], nn.Module],
    parameter: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = look(build(), hidden())
    assert of(whole, parameter).kind.startswith("pair")
    monkeypatch.delitem(RULES, name)
    watched = watch(build(), (hidden(),))
    cut = choose(families(watched), watched, enough=0.0)
    assert watched.record.unknown
    assert cut.families != whole.families


def test_rows_are_cut_alone_where_too_little_is_cut() -> None:
    watched = watch(models.Latent(), (hidden(),))
    choice = choose(families(watched), watched)
    assert choice.share >= 0.9
    alone = of(choice, "kv_a.weight")
    assert (alone.kind, dict(alone.dims)) == ("row", {("kv_a.weight", 1): (Block(12, 0, 1),)})


class Odd(nn.Module):
    """A weight goes into an operation without a rule; another is written before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.block = nn.Bilinear(12, 12, 20), models.Gated()
        self.out = nn.Linear(20, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.block.down.weight.div_(2)
        return self.out(self.bilinear(x, x).relu()), self.block.up(x) + self.block(x).sum()


def test_a_weight_is_never_gathered() -> None:
    watched = watch(Odd(), (hidden(),))
    assert watched.record.unknown == {"_trilinear": 1}
    choice = choose(families(watched), watched, enough=0.0)
    assert choice.whole["bilinear.weight"].endswith(
        "'_trilinear (no rule)' in 'bilinear' needs it whole."
    )


def test_what_the_model_returns_cut_is_told() -> None:
    family = of(look(Odd(), hidden()), "block.up.weight")
    assert {event.what for event in family.events} == {"output", "reduce"}
    reduce = next(event for event in family.events if event.what == "reduce")
    assert (reduce.parameter, reduce.dim) == ("block.down.weight", 1)


def test_tied_weights_stay_tied_where_the_forward_looks_at_data() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            if float(x.sum()) > 1e9:  # asks for a number that no meta tensor has
                x = x + 1
            y: Tensor = self.head(x)
            return y

    with torch.device("meta"):
        model = Tied()
    watched = watch(model, (torch.zeros(2, 3, dtype=torch.int64),))
    assert watched.shapes.keys() == {"words.weight"}
    assert watched.tied == {"head.weight": "words.weight"}
