"""What a layout of ranks costs: predicted, counted where it runs, and as two papers print it."""

import copy
import functools
import json
import re
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import shardproof as sp
from families import FAMILIES, config, small
from shardproof.batch_gradients import Passes
from shardproof.cli.main import main
from shardproof.comm.plans import tree_plan
from shardproof.data_parallel import BUCKET_BYTES, DataParallel
from shardproof.data_parallel_step import DataParallelStep
from shardproof.errors import DegreeError, UsageError
from shardproof.gradient_buckets import Bucket
from shardproof.leaves import Cut
from shardproof.plans import layout_cost as costs
from shardproof.plans.layout_cost import BatchLayout, LayoutCost, RankCost, layout_cost
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.paper_formulas import GptSize, Recompute, gpt_size
from shardproof.plans.planning import plan
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.prover.case import MemoryAudit
from shardproof.scheme import Scheme

pytest.importorskip("transformers", reason="the extra hf is not installed")

SCHEME = Scheme(batch_leaves=8)
ROWS, LENGTH = 11, 7  # neither leaves nor degrees divide them
PAGE = Path(__file__).parents[1] / "docs" / "layout-cost.md"


# ---- what runs here


@dataclass(frozen=True)
class Training:
    """Two steps of a small model in a layout."""

    dp: int
    family: str = "Llama"
    dtype: torch.dtype = torch.float32
    passes: Passes = "leaf"
    accumulate: int = 1
    rows: int = ROWS
    bucket_bytes: int = BUCKET_BYTES
    cuts_tokens: bool = False

    def __call__(self, axis: sp.Axis) -> RankCost:
        """What this rank sent in the second step, and what it holds."""
        axes = axis.split(dp=self.dp, tp=axis.size // self.dp)
        model: Any = small(self.family, device="meta").to(self.dtype)
        sp.parallelize(model, None, axes["tp"], scheme=SCHEME, sequence_parallel=self.cuts_tokens)
        audit = MemoryAudit()
        with audit.running():
            sp.initialize(model)
        parallel = DataParallel(
            model.train(),
            axes["dp"],
            passes=self.passes,
            accumulate=self.accumulate,
            bucket_bytes=self.bucket_bytes,
        )
        nodes: list[int] = []
        parallel.step = functools.partial(_watched, parallel, nodes)  # type: ignore[method-assign]
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.arange(self.rows * LENGTH).reshape(self.rows, LENGTH) % 101

        def loss_of(samples: slice) -> tuple[torch.Tensor, int]:
            some = ids[samples]
            loss = model(input_ids=some, labels=some, num_items_in_batch=1).loss
            return loss, some[:, 1:].numel()

        for _ in range(2):
            nodes.clear()
            optimizer.zero_grad()
            for each in axes.values():
                each.transport.ledger.reset()
            parallel.backward(loss_of, self.rows)
            tp, dp = (counts_of(axes[name]) for name in ("tp", "dp"))
            optimizer.step()
        states = [x for state in optimizer.state.values() for x in state.values()]
        return RankCost(
            tp_rank=axes["tp"].rank,
            dp_rank=axes["dp"].rank,
            tp=tp,
            dp=dp,
            parameter_bytes=sum(each.nbytes for each in model.parameters()),
            largest_bytes=audit.largest_bytes,
            gradient_bytes=sum(each.grad.nbytes for each in model.parameters()),
            optimizer_bytes=sum(each.nbytes for each in states),
            node_bytes=sum(nodes),
            flops=None,
        )

    def predicted(self, tp: int) -> LayoutCost:
        """The same by arithmetic."""
        return layout_cost(
            self.plan(tp),
            BatchLayout(self.dp, self.accumulate, self.passes, self.bucket_bytes),
            batch=self.rows,
            length=LENGTH,
        )

    def plan(self, tp: int) -> ModelPlan:
        model = small(self.family, device="meta").to(self.dtype)
        made = plan(model, degree=tp, scheme=SCHEME, sequence_parallel=self.cuts_tokens)
        assert isinstance(made, ModelPlan)
        return made


def _watched(parallel: DataParallel, nodes: list[int], num_samples: int) -> DataParallelStep:
    """A step that adds the bytes of the nodes of each bucket to `nodes`."""
    step = DataParallel.step(parallel, num_samples)
    prepare = step._prepare

    def watched() -> None:
        prepare()
        start = step._exchange.start

        def counted(bucket: Bucket) -> None:
            held = step._step.sums[bucket.places[0]]
            nodes.append(len(held) * sum(bucket.sizes) * bucket.dtype.itemsize)
            start(bucket)

        step._exchange.start = counted  # type: ignore[method-assign]

    step._prepare = watched  # type: ignore[method-assign]
    return step


def counts_of(axis: sp.Axis) -> dict[str, Any]:
    """What the ledger of an axis has of forward and backward."""
    every = axis.transport.ledger.as_dict()
    return {way: kinds for way, kinds in every.items() if way in ("forward", "backward")}


def known(cost: LayoutCost) -> list[RankCost]:
    """The costs of the ranks, without the flops, which no ledger counts."""
    return [RankCost(**{**vars(rank), "flops": None}) for rank in cost.ranks]


LAYOUTS = [(tp, Training(dp)) for tp in (1, 2, 3) for dp in (1, 2, 3)]
OTHERS = [
    (2, Training(3, passes="node")),
    (3, Training(2, passes="node", accumulate=2)),
    (1, Training(3, passes="node", accumulate=4, rows=64)),
    (2, Training(2, family="Gemma2")),  # its head is tied
    (2, Training(2, dtype=torch.bfloat16)),  # gradients are added in float32
    (2, Training(3, rows=2)),  # a rank of the batch has no leaf
    (2, Training(3, bucket_bytes=1)),
    (3, Training(2, bucket_bytes=5_000)),
    (2, Training(2, cuts_tokens=True)),
    (3, Training(2, passes="node", cuts_tokens=True)),
]


@pytest.mark.parametrize(("tp", "training"), [*LAYOUTS, *OTHERS], ids=str)
def test_every_rank_sends_and_holds_what_is_predicted(
    tp: int, training: Training, pool: Any
) -> None:
    counted = pool(tp * training.dp, "threads").run(training)
    predicted = training.predicted(tp)
    assert counted == known(predicted)
    assert predicted.most("parameter_bytes") == max(training.plan(tp).held_bytes)
    assert (predicted.most("dp_bytes") or 0) == max(rank.dp_bytes for rank in counted)
    assert predicted.total("tp_bytes") == sum(rank.tp_bytes for rank in counted)


@pytest.mark.parametrize("fault", ["share", "_rows"])
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were runs of leaves or rows of passes other ones, the prediction would not be equal."""
    right = Training(3).predicted(2)
    original: Any = getattr(costs, fault)

    def other(*arguments: Any) -> Any:
        result = original(*arguments)
        return result[::-1] if fault == "share" else {each + 1: n for each, n in result.items()}

    monkeypatch.setattr(costs, fault, other)
    assert known(Training(3).predicted(2)) != known(right)


class Block(nn.Module):
    """A feed-forward block, of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, 6) to the same."""
        return self.down(torch.relu(self.up(x)))


def _step_of_block(
    axis: sp.Axis, block: Block, dp: int
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What the ledgers count in one step, and the bytes of the parameters."""
    axes = axis.split(dp=dp, tp=axis.size // dp)
    x = torch.ones(16, 6)
    model = sp.parallelize(copy.deepcopy(block), None, axes["tp"], inputs=x[:2], scheme=SCHEME)
    parallel = DataParallel(model, axes["dp"])
    for each in axes.values():
        each.transport.ledger.reset()
    parallel.backward(lambda samples: model(x[samples]).square().sum(), len(x))
    held = sum(each.nbytes for each in model.parameters())
    return counts_of(axes["tp"]), counts_of(axes["dp"]), held


@pytest.mark.parametrize(("tp", "dp"), [(1, 2), (2, 2), (3, 3)])
def test_a_watched_plan_knows_it_for_its_own_example(tp: int, dp: int, pool: Any) -> None:
    block = Block()
    made = plan(block, degree=tp, inputs=torch.randn(2, 6), scheme=SCHEME)
    assert isinstance(made, WatchedPlan)
    cost = layout_cost(made, BatchLayout(dp))
    counted = pool(tp * dp, "threads").run(functools.partial(_step_of_block, block=block, dp=dp))
    assert counted == [(rank.tp, rank.dp, rank.parameter_bytes) for rank in cost.ranks]
    assert cost.most("flops") is None
    assert cost.total("flops") is None


# ---- what no machine here could run


@pytest.mark.parametrize("dp", [2, 5, 40, 128])
def test_the_exchange_is_that_of_the_collectives(dp: int) -> None:
    made = plan(small("Llama", device="meta"), degree=2, scheme=Scheme(batch_leaves=128))
    assert isinstance(made, ModelPlan)
    cost = layout_cost(made, BatchLayout(dp, bucket_bytes=3_000), batch=300, length=4)
    for rank in cost.ranks:
        parameters = list(costs._parameters(made, rank.tp_rank))
        sent = [
            tree_plan(
                "backward", "", (sum(each.sizes),), each.dtype, Cut(300, 128, dp), rank.dp_rank
            ).sent_bytes
            for each in costs._buckets(parameters, 3_000)
        ]
        assert len(sent) > 5
        figures = rank.dp["backward"]["all_reduce"]
        assert (figures["calls"], figures["sent_bytes"]) == (len(sent), sum(sent))


@pytest.mark.parametrize(("tp", "dp"), [(8, 1250), (1, 10_000)])
def test_ten_thousand_ranks_take_less_than_a_second(tp: int, dp: int) -> None:
    made = plan(small("Llama", device="meta"), degree=tp, scheme=Scheme(batch_leaves=dp))
    seconds = []
    for _ in range(3):  # a busy machine is slow, not wrong
        start = time.perf_counter()
        layout = BatchLayout(dp, ranks_per_host=8)
        cost = layout_cost(made, layout, batch=dp * 3 // 2, length=4096)
        seconds.append(time.perf_counter() - start)
    assert len(cost.ranks) == 10_000
    assert len(cost.host_bytes or ()) == 1250
    assert min(seconds) < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(family: str) -> None:
    model = small(family, attn_implementation="eager")
    ids = torch.arange(5 * 16).reshape(5, 16) % 101
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    for tp, dp in ((1, 1), (2, 1), (2, 3)):
        made = plan(small(family, device="meta"), degree=tp, scheme=SCHEME)
        cost = layout_cost(made, BatchLayout(dp), batch=5, length=16)
        assert cost.total("flops") == counter.get_total_flops()


def test_ranks_that_share_heads_compute_them_all() -> None:
    """Two key-value heads on three ranks: one is computed twice."""
    one, three = (
        layout_cost(
            plan(small("Llama", device="meta"), degree=tp, scheme=SCHEME),
            BatchLayout(),
            batch=8,
            length=4,
        ).total("flops")
        for tp in (1, 3)
    )
    assert one is not None
    assert three is not None
    assert three > one


def test_errors_name_the_rule() -> None:
    model = small("Llama", device="meta")
    made = plan(model, degree=2, scheme=SCHEME)
    size, one = {"batch": 8, "length": 4}, BatchLayout()
    with pytest.raises(DegreeError, match="dp=9 has 9 ranks, and a batch has 8 leaves"):
        layout_cost(made, BatchLayout(9), **size)
    with pytest.raises(UsageError, match="the plan's scheme has no batch leaves"):
        layout_cost(plan(model, degree=2), one, **size)
    with pytest.raises(UsageError, match=r"tp=2 times dp=5001 are 10002 ranks\. Use at most"):
        layout_cost(
            plan(model, degree=2, scheme=Scheme(batch_leaves=6000)), BatchLayout(5001), **size
        )
    with pytest.raises(UsageError, match="passes='all' is unknown"):
        layout_cost(made, BatchLayout(passes="all"), **size)  # type: ignore[arg-type]
    for options in ({"length": 4}, {"batch": 8}):
        with pytest.raises(UsageError, match="batch" if "length" in options else "length"):
            layout_cost(made, one, **options)
    with pytest.raises(UsageError, match="ranks_per_host=3 is no multiple of tp=2"):
        layout_cost(made, BatchLayout(4, ranks_per_host=3), **size)
    with pytest.raises(UsageError, match="are 6 ranks, which do not fill hosts of 4"):
        layout_cost(made, BatchLayout(3, ranks_per_host=4), **size)
    for name in ("dp", "accumulate", "bucket_bytes", "ranks_per_host"):
        with pytest.raises(UsageError, match=name):
            layout_cost(made, BatchLayout(**{name: 0}), **size)
    watched = plan(Block(), degree=2, inputs=torch.randn(2, 6), scheme=SCHEME)
    with pytest.raises(UsageError, match="a watched plan knows what a step with its own example"):
        layout_cost(watched, one, **size)
    with pytest.raises(UsageError, match="passes='leaf'"):
        layout_cost(watched, BatchLayout(passes="node"))


# ---- what the papers print

# Korthikanti et al. 2022, arXiv 2205.05198, table 3 and, of the present work, table 5.
VOCABULARY, LENGTH_OF_PAPERS = 51_200, 2_048
PEAK = 312e12  # flops a second of an A100 in 16 bits


@dataclass(frozen=True)
class Published:
    """A row: the model, the step, seconds, and model and hardware flops utilization in percent."""

    heads: int
    hidden: int
    layers: int
    gpus: int
    batch: int
    seconds: float
    model: str
    hardware: str

    @property
    def size(self) -> GptSize:
        return GptSize(self.hidden, self.heads, self.layers, VOCABULARY)


KORTHIKANTI = {
    "22B": Published(64, 6144, 48, 8, 4, 1.10, "41.5", "43.7"),
    "175B": Published(96, 12288, 96, 64, 64, 13.75, "51.4", "52.8"),
    "530B": Published(128, 20480, 105, 280, 280, 37.83, "56.0", "57.0"),
    "1T": Published(160, 25600, 128, 512, 512, 71.49, "56.3", "57.0"),
}
# Its table 2: whether sequences are cut, what is computed again, and the formula as it is printed.
TABLE_2: list[tuple[bool, Recompute, str]] = [
    (False, "none", "s*b*h*(10 + 24/t + 5*a*s/(h*t))"),
    (True, "none", "s*b*h*(34/t + 5*a*s/(h*t))"),
    (False, "selective", "s*b*h*(10 + 24/t)"),
    (True, "selective", "s*b*h*(34/t)"),
    (False, "full", "s*b*h*2"),
]
# Narayanan et al. 2021, arXiv 2104.04473, table 1: billions of parameters, hidden, heads, layers.
NARAYANAN = [
    ("1.7", 2304, 24, 24),
    ("3.6", 3072, 32, 30),
    ("7.5", 4096, 32, 36),
    ("18.4", 6144, 48, 40),
    ("39.1", 8192, 64, 48),
    ("76.1", 10240, 80, 60),
    ("145.6", 12288, 96, 80),
    ("310.1", 16384, 128, 96),
    ("529.6", 20480, 128, 105),
    ("1008.0", 25600, 160, 128),
    ("174.6", 12288, 96, 96),  # of table 2: GPT-3
]


def off(figure: float, printed: str) -> float:
    """How far a figure is from all numbers that are printed so, relative to them."""
    half_a_digit = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    return max(0.0, abs(figure - float(printed)) - half_a_digit) / float(printed)


def test_a_figure_is_off_beyond_its_rounding() -> None:
    assert off(1.652, "1.7") == 0
    assert off(56.27, "56.3") == 0
    assert off(60, "56.3") > 0.02


@pytest.mark.parametrize("name", KORTHIKANTI)
@pytest.mark.parametrize(("is_cut", "recompute", "formula"), TABLE_2)
def test_activations_are_those_of_table_2(
    name: str, is_cut: bool, recompute: Recompute, formula: str
) -> None:
    row = KORTHIKANTI[name]
    names = {"s": LENGTH_OF_PAPERS, "b": 1, "h": row.hidden, "a": row.heads, "t": 8}
    printed = eval(formula, {each: Fraction(number) for each, number in names.items()})
    ours = row.size.activation_bytes(
        1, LENGTH_OF_PAPERS, tp=8, sequence_parallel=is_cut, recompute=recompute
    )
    assert abs(ours - printed) <= 1


def test_activations_without_parallelism() -> None:
    """34 and 80, and 34 and 64: what section 5 says of GPT-3 and MT-NLG."""
    for name, attention in (("175B", 80), ("530B", 64)):
        size = KORTHIKANTI[name].size
        element = LENGTH_OF_PAPERS * size.hidden
        assert size.activation_bytes(1, LENGTH_OF_PAPERS) == (34 + attention) * element
        for is_cut in (False, True):
            one = size.activation_bytes(1, LENGTH_OF_PAPERS, sequence_parallel=is_cut)
            assert one == (34 + attention) * element


@pytest.mark.parametrize(("name", "saved", "more"), [("175B", "70", "2.7"), ("530B", "65", "1.6")])
def test_selective_recomputation_saves_and_costs_what_section_5_says(
    name: str, saved: str, more: str
) -> None:
    size, step = KORTHIKANTI[name].size, (1, LENGTH_OF_PAPERS)
    some = size.activation_bytes(*step, tp=8, sequence_parallel=True, recompute="selective")
    every = size.activation_bytes(*step, tp=8, sequence_parallel=True)
    assert off(100 * (1 - some / every), saved) < 0.02
    assert off(100 * (size.flops_with("selective", *step) / size.flops(*step) - 1), more) < 0.02


def test_inputs_of_layers_take_what_appendix_b_says() -> None:
    """sbhp of the 530B model with 35 stages: 2.73 GB, of 2^30 bytes."""
    size = KORTHIKANTI["530B"].size
    taken = 35 * size.activation_bytes(1, LENGTH_OF_PAPERS, recompute="full")
    assert off(taken / 2**30, "2.73") < 0.02


def utilizations(row: Published) -> tuple[float, float]:
    """Model and hardware flops utilization in percent, from our flops and the printed seconds."""
    possible = row.seconds * row.gpus * PEAK
    flops = row.size.flops(row.batch, LENGTH_OF_PAPERS)
    hardware = row.size.flops_with("selective", row.batch, LENGTH_OF_PAPERS)
    return 100 * flops / possible, 100 * hardware / possible


@pytest.mark.parametrize("name", KORTHIKANTI)
def test_utilizations_are_those_of_table_5(name: str) -> None:
    row = KORTHIKANTI[name]
    model, hardware = utilizations(row)
    assert off(model, row.model) < 0.02
    assert off(hardware, row.hardware) < 0.02


@pytest.mark.parametrize(("printed", "hidden", "heads", "layers"), NARAYANAN)
def test_parameters_are_those_of_narayanan(
    printed: str, hidden: int, heads: int, layers: int
) -> None:
    size = GptSize(hidden, heads, layers, VOCABULARY)
    assert off(size.parameters(LENGTH_OF_PAPERS) / 1e9, printed) < 0.02


@pytest.mark.parametrize(
    ("name", "tokens", "gpus", "speed", "days"),
    [("175B", 300e9, 1024, 140e12, "34"), ("1T", 450e9, 3072, 163e12, "84")],
)
def test_trainings_take_the_days_that_narayanan_estimates(
    name: str, tokens: float, gpus: int, speed: float, days: str
) -> None:
    """Section 5.1, with the flops of equation 3, in which each layer is computed again."""
    flops = KORTHIKANTI[name].size.flops_with("full", 1, LENGTH_OF_PAPERS) / LENGTH_OF_PAPERS
    assert off(flops * tokens / (gpus * speed) / 86_400, days) < 0.02


@pytest.mark.parametrize("name", KORTHIKANTI)
def test_flops_are_those_of_the_equations(name: str) -> None:
    """Equations 7 and 8 of Korthikanti et al., and 3 of Narayanan et al."""
    size, s, batch = KORTHIKANTI[name].size, LENGTH_OF_PAPERS, 1536
    h, layers, v = size.hidden, size.layers, VOCABULARY
    unit = batch * s * layers * h**2
    assert size.flops(batch, s) == pytest.approx(
        72 * unit * (1 + s / (6 * h) + v / (12 * h * layers)), rel=1e-12
    )
    assert size.flops_with("selective", batch, s) == pytest.approx(
        72 * unit * (1 + s / (3 * h) + v / (12 * h * layers)), rel=1e-12
    )
    assert size.flops_with("full", batch, s) == pytest.approx(
        96 * unit * (1 + s / (6 * h) + v / (16 * layers * h)), rel=1e-12
    )
    assert size.flops_with("none", batch, s) == size.flops(batch, s)


def test_parameters_of_a_gpt2_of_transformers() -> None:
    """Beside torch: equation 2 leaves out the last norm alone."""
    transformers = pytest.importorskip("transformers")
    made = transformers.GPT2Config(
        n_embd=48, n_layer=3, n_head=6, vocab_size=101, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    size = gpt_size(made)
    assert size == GptSize(48, 6, 3, 101)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(made)
    assert size.parameters(64) == sum(each.numel() for each in model.parameters()) - 2 * 48


# ---- the command and the page


def run(*arguments: str, columns: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["plan", *arguments])


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The config of the page's model, in the present directory."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    sizes = dict(re.findall(r"^    (\w+)=(\d+),$", PAGE.read_text(), re.MULTILINE))
    made = config("Llama", **{name: int(value) for name, value in sizes.items()})
    made.architectures = ["LlamaForCausalLM"]
    made.save_pretrained(tmp_path / "MODEL_DIR")
    monkeypatch.chdir(tmp_path)
    return "MODEL_DIR"


@pytest.mark.usefixtures("directory")
def test_the_page_shows_what_the_command_prints() -> None:
    shown = re.findall(r"^\$ shardproof plan (.*)\n((?:.*\n)*?)```", PAGE.read_text(), re.MULTILINE)
    assert len(shown) == 1
    for command, text in shown:
        assert run(*command.split()).stdout == text


def test_the_page_has_the_tables_of_the_papers() -> None:
    page = PAGE.read_text()
    for name, row in KORTHIKANTI.items():
        model, hardware = utilizations(row)
        ours = [
            row.size.activation_bytes(
                1, LENGTH_OF_PAPERS, tp=8, sequence_parallel=is_cut, recompute=recompute
            )
            for is_cut, recompute, _ in TABLE_2
        ]
        sizes = " | ".join(f"{each / 2**20:.0f}" for each in ours)
        assert f"| {name} | {sizes} |" in page
        line = f"| {name} | {model:.1f} | {row.model} | {hardware:.1f} | {row.hardware} |"
        assert line in page
    for printed, hidden, heads, layers in NARAYANAN:
        billions = GptSize(hidden, heads, layers, VOCABULARY).parameters(LENGTH_OF_PAPERS) / 1e9
        assert f"| {hidden} | {layers} | {billions:.3f} | {printed} |" in page


def test_the_file_has_the_figures(directory: str, tmp_path: Path) -> None:
    target = tmp_path / "cost.json"
    layout = "tp=3,dp=4,accumulate=2,passes=node,batch_leaves=6"
    result = run(directory, "--layout", layout, "--batch", "13", "--length", "9", "--json",
                 str(target))  # fmt: skip
    assert result.exit_code == 0, result.output
    read = json.loads(target.read_text())
    scheme = Scheme(batch_leaves=6)
    with torch.device("meta"):
        transformers = pytest.importorskip("transformers")
        made = transformers.AutoConfig.from_pretrained(directory)
        model = transformers.LlamaForCausalLM(made)
    cost = layout_cost(
        plan(model, degree=3, scheme=scheme),
        BatchLayout(4, 2, "node"),
        batch=13,
        length=9,
        size=gpt_size(made),
    )
    assert read == json.loads(json.dumps({"directory": directory, **cost.as_dict()}))
    assert read["num_ranks"] == 12
    assert read["layout"] == {
        "tp": 3,
        "dp": 4,
        "accumulate": 2,
        "passes": "node",
        "bucket_bytes": BUCKET_BYTES,
        "ranks_per_host": None,
    }


def test_a_model_that_is_watched(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=6, vocab_size=101, n_positions=64, bos_token_id=1,
        eos_token_id=2, architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    made.save_pretrained(tmp_path)
    result = run(str(tmp_path), "--layout", "tp=3,dp=2", "--batch", "16", "--length", "5")
    assert result.exit_code == 0, result.output
    assert "8 batch leaves, each of them the example that was watched" in " ".join(
        result.stdout.split()
    )
    assert re.search(r"flops of matrix products +unknown +unknown", result.stdout)
    odd = run(str(tmp_path), "--layout", "tp=3,dp=2", "--batch", "9")
    assert odd.exit_code == 2
    assert "--batch 9 does not give each of 8 batch leaves as many rows" in odd.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--layout", "tp=9"), "degree 9 exceeds leaves=8"),
        (("--layout", "dp=9"), "dp=9 has 9 ranks, and a batch has 8 leaves: a rank beyond"),
        (("--layout", "tp=8,dp=2000,batch_leaves=2000"), "are 16000 ranks. Use at most 10000."),
        (("--layout", "pp=2"), "'pp=2' names nothing of a layout; known are tp, dp,"),
        (("--layout", ""), "'' names nothing of a layout"),
        (("--layout", "tp=1,tp=2"), "'tp=2' is there twice"),
        (("--layout", "tp=2,dp=2,ranks_per_host=3"), "ranks_per_host=3 is no multiple of tp=2"),
        (("--layout", "tp=two"), "'tp=two' has no positive whole number"),
        (("--layout", "tp=0"), "'tp=0' has no positive whole number"),
        (("--layout", "passes=all"), "'passes=all' is not leaf or node"),
        (("--layout", "tp=2", "--degree", "2"), "--degree does not go with --layout"),
        (("--layout", "tp=2", "--html", "page.html"), "--html does not go with --layout"),
    ],
)
def test_layouts_that_make_no_sense(directory: str, options: tuple[str, ...], text: str) -> None:
    result = run(directory, *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert text in result.stderr


def test_the_command_knows_layouts_of_ten_thousand_ranks(directory: str) -> None:
    result = run(directory, "--layout", "tp=8,dp=1250,batch_leaves=1250")
    assert result.exit_code == 0, result.output
    assert "tp 8 x dp 1250 = 10000 ranks" in result.stdout.splitlines()[0]


def test_totals_sum_over_ranks() -> None:
    cost = Training(3).predicted(2)
    assert len(cost.ranks) == 6
    for name in costs.FIGURES:
        figures = [getattr(rank, name) for rank in cost.ranks]
        assert (cost.most(name), cost.total(name)) == (max(figures), sum(figures))
    assert cost.activations is None
    size = functools.partial(layout_cost, Training(3).plan(2), BatchLayout(3), batch=11, length=7)
    paper = size(size=gpt_size(config("Llama"))).activations
    assert paper is not None
    assert paper.rows == 2
    assert paper.sequence_parallel < paper.tensor_parallel < paper.one_rank
