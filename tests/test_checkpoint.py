"""Checkpoints: the same bytes at every degree, a resume at another one, and plain readers."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from places import Pool
from shardproof.axis import Axis
from shardproof.checkpoint.entries import Entry
from shardproof.checkpoint.manifest import find_damage
from shardproof.checkpoint.writing import FileLayout, divide_into_files
from shardproof.errors import MismatchError, UsageError
from shardproof.leaves import replicated
from shardproof.safetensors_file import read_header

STYLES = {"0": sp.ColumnParallel(), "3": sp.RowParallel()}
FILES = [
    "model.safetensors",
    "optimizer.safetensors",
    "shardproof.json",
    "shardproof.manifest.json",
]


class Net(nn.Sequential):
    """A column-parallel and a row-parallel layer of sizes that divide nothing, dropout, a norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(10, 37), nn.ReLU(), nn.Dropout(0.2), nn.Linear(37, 10), nn.BatchNorm1d(10)
        )


def whole_model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


WHOLE = whole_model()
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.99)),
    "muon": lambda model: sp.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.01),
}


def cut(axis: Axis, optimizer: str = "adamw") -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sp.parallelize(copy.deepcopy(WHOLE), STYLES, axis)
    return model, OPTIMIZERS[optimizer](model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 10, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def trained(
    axis: Axis, to: Path, steps: range, start: Path | None = None, optimizer: str = "adamw"
) -> None:
    """Train from a checkpoint or from the beginning, and save."""
    model, opt = cut(axis, optimizer)
    if start is not None:
        loaded = sp.load(start, model, opt)
        assert (loaded.step, loaded.is_same_contract) == (steps.start, True)
        assert loaded.extra == {"rate": 0.5, "pair": (1, None)}
    train(model, opt, steps)
    sp.save(to, model, opt, step=steps.stop, extra={"rate": 0.5, "pair": (1, None)})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_file_is_the_same_at_every_degree(optimizer: str, pool: Pool, tmp_path: Path) -> None:
    places = [(degree, "threads") for degree in (1, 2, 3, 8)] + [(2, "processes"), (3, "gloo")]
    for degree, engine in places:
        to = tmp_path / f"{engine}-{degree}"
        pool(degree, engine).run(lambda axis, to=to: trained(axis, to, range(2), None, optimizer))
    every = {path.name: hashes(path) for path in tmp_path.iterdir() if path.name[0] != "."}
    assert len(every) == len(places)
    assert list(every["threads-1"]) == FILES
    assert {name: each for name, each in every.items() if each != every["threads-1"]} == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(every)  # no leftovers


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_the_unbroken_run(optimizer: str, pool: Pool, tmp_path: Path) -> None:
    """Moments, step counts and dropout go on, over degrees 2, 3, 1 and 8."""
    unbroken = tmp_path / "unbroken"
    pool(2, "threads").run(lambda axis: trained(axis, unbroken, range(8), None, optimizer))
    before: Path | None = None
    for number, degree in enumerate((2, 3, 1, 8)):
        to, steps = tmp_path / f"part-{number}", range(2 * number, 2 * number + 2)
        pool(degree, "threads").run(
            lambda axis, to=to, steps=steps, before=before: trained(
                axis, to, steps, before, optimizer
            )
        )
        before = to
    assert before is not None
    assert hashes(before) == hashes(unbroken)


def test_a_plain_model_loads_what_ranks_saved(pool: Pool, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    to = tmp_path / "saved"
    states = pool(3, "threads").run(lambda axis: saved_parts(axis, to))
    plain = safetensors.load_file(to / "model.safetensors")
    model = copy.deepcopy(WHOLE)
    model.load_state_dict(plain, strict=True)
    opt = OPTIMIZERS["adamw"](model)
    with pytest.warns(UserWarning, match="was saved under the contract"):
        assert sp.load(to, model, opt).step == 2
    assert set(plain) == set(WHOLE.state_dict())
    assert torch.equal(plain["0.weight"], torch.cat([state["0.weight"] for state in states]))
    moments = safetensors.load_file(to / "optimizer.safetensors")
    assert moments["3.weight/exp_avg"].shape == (10, 37)
    assert torch.equal(opt.state[model[3].weight]["exp_avg"], moments["3.weight/exp_avg"])


def saved_parts(axis: Axis, to: Path) -> dict[str, Tensor]:
    model, opt = cut(axis)
    train(model, opt, range(2))
    sp.save(to, model, opt, step=2)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class Views(nn.Module):
    """Parameters and buffers that are views of every kind, and one that is called as a key is."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        super().__init__()
        self.transposed = nn.Parameter(make(6, 4).t())
        self.sliced = nn.Parameter(make(9, 4)[1:8:2])
        self.narrow = nn.Parameter(make(4, 3).to(torch.bfloat16).t())
        self.empty, self.scalar = nn.Parameter(make(0, 5)), nn.Parameter(make(()))
        self.step = nn.Parameter(make(3))
        self.register_buffer("column", make(5, 2)[:, 1])
        self.register_buffer("flags", make(3) > 0)


def test_views_of_every_kind_are_saved_and_loaded(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = Views(torch.randn), Views(torch.zeros)
    sp.save(tmp_path / "views", model, step=3)
    sp.save(tmp_path / "copied", model, step=3, background=True)
    sp.wait_for_save(model)
    assert hashes(tmp_path / "copied") == hashes(tmp_path / "views")
    assert sp.load(tmp_path / "views", other).step == 3
    plain = safetensors.load_file(tmp_path / "views/model.safetensors")
    for loaded in (other.state_dict(), plain):
        assert loaded.keys() == model.state_dict().keys()
        assert [n for n, x in model.state_dict().items() if not torch.equal(x, loaded[n])] == []
    other.column = torch.ones(1).expand(5)
    before = other.sliced.detach().clone().zero_()
    nn.init.zeros_(other.sliced)
    with pytest.raises(UsageError, match="'column' is expanded"):
        sp.load(tmp_path / "views", other)
    assert torch.equal(other.sliced, before)
    sp.save(tmp_path / "views", other)
    plain = safetensors.load_file(tmp_path / "views/model.safetensors")
    assert torch.equal(plain["column"], torch.ones(5))


def step_differs(axis: Axis, to: Path) -> None:
    model = Views(torch.zeros)
    model.layer = sp.ColumnParallelLinear(4, 8, axis=axis)
    with pytest.raises(MismatchError, match="for step, rank 0 has 0, rank 1 has 1"):
        sp.save(to, model, step=axis.rank)


def test_a_parameter_called_step_hides_no_step(pool: Pool, tmp_path: Path) -> None:
    pool(2, "threads").run(lambda axis: step_differs(axis, tmp_path / "here"))


def test_torch_reads_it_too(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    hf = pytest.importorskip("torch.distributed.checkpoint.hf_storage")
    sp.launch(lambda axis: trained(axis, tmp_path / "saved", range(1)), degree=2)
    model = copy.deepcopy(WHOLE)
    state = model.state_dict()
    reader = hf.HuggingFaceStorageReader(str(tmp_path / "saved"))
    with pytest.warns(UserWarning, match="load in a single process"):
        torch.distributed.checkpoint.load(state, storage_reader=reader)
    stored = copy.deepcopy(WHOLE)
    sp.load(tmp_path / "saved", stored, weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in stored.state_dict().items())
    assert not torch.equal(state["0.weight"], WHOLE[0].weight)


@pytest.mark.parametrize(
    ("rows", "columns"), [(2100, 1031), (1, 700), (3, 60_000), (700, 1)], ids=str
)
def test_columns_that_are_cut_are_written_as_rows(
    rows: int, columns: int, pool: Pool, tmp_path: Path
) -> None:
    """Several exchanges; one row; rows that are long; one column."""
    torch.manual_seed(1)
    whole = nn.Sequential(nn.Linear(columns, rows, bias=False))
    values = whole[0].weight.detach().clone()

    def save_and_load(axis: Axis) -> bool:
        model = sp.parallelize(copy.deepcopy(whole), {"0": sp.RowParallel()}, axis)
        sp.save(tmp_path / str(axis.size), model)
        before = model[0].weight.detach().clone()
        nn.init.zeros_(model[0].weight)
        sp.load(tmp_path / str(axis.size), model)
        return torch.equal(model[0].weight, before)

    for degree in (1, 3):
        assert all(pool(degree, "threads").run(save_and_load))
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")
    nn.init.zeros_(whole[0].weight)
    sp.load(tmp_path / "3", whole)
    assert torch.equal(whole[0].weight, values)


def test_large_models_have_several_files_and_an_index(tmp_path: Path) -> None:
    entries = [
        Entry(name, torch.zeros(size), replicated((size,)))
        for name, size in (("a", 10), ("b", 20), ("c", 5), ("d", 40))
    ]
    layouts: tuple[FileLayout, ...] = divide_into_files(entries, "model", largest=100)
    assert [layout.name for layout in layouts] == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    assert [[each.name for each in layout.tensors] for layout in layouts] == [
        ["a"],
        ["b", "c"],
        ["d"],
    ]


def test_a_run_with_several_files_is_resumed_too(pool: Pool, tmp_path: Path) -> None:
    def run(axis: Axis, steps: range, to: str, start: str = "") -> None:
        model, optimizer = cut(axis)
        if start:
            sp.load(tmp_path / start, model, optimizer)
        train(model, optimizer, steps)
        sp.save(tmp_path / to, model, optimizer, step=steps.stop, largest_file=1000)

    pool(1, "threads").run(lambda axis: run(axis, range(2), "unbroken"))
    pool(2, "threads").run(lambda axis: run(axis, range(1), "half"))
    pool(3, "threads").run(lambda axis: run(axis, range(1, 2), "resumed", "half"))
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "unbroken")
    index = json.loads((tmp_path / "resumed/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(WHOLE.state_dict())
    assert len(set(index["weight_map"].values())) > 2


def test_a_damaged_byte_has_the_name_of_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    trained(Axis.solo(), path, range(1))
    assert find_damage(path) == []
    stored = read_header(path / "model.safetensors")["3.weight"]
    data = bytearray((path / "model.safetensors").read_bytes())
    data[stored.start + 5] ^= 1
    (path / "model.safetensors").write_bytes(data)
    damages = find_damage(path)
    assert [(each.file, each.tensor) for each in damages] == [("model.safetensors", "3.weight")]


def test_the_plain_data_are_readable(tmp_path: Path) -> None:
    trained(Axis.solo(), tmp_path / "saved", range(2))
    state: dict[str, Any] = json.loads((tmp_path / "saved/shardproof.json").read_text())
    assert (state["format"], state["version"], state["step"]) == ("shardproof", 1, 2)
    assert state["draws"] == {"2": 2}
    assert state["optimizer"]["groups"][0]["options"]["betas"] == {"tuple": [0.8, 0.99]}
    assert state["scheme"] == {"leaves": 8, "numerics": "invariant", "seed": 0}
