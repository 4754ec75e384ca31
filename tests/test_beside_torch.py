"""Tensor parallelism beside torch's own data parallelism, on a 2 x 2 mesh: right, or refused."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import shardproof as sp
from invariance import normal
from shardproof.errors import MismatchError, UsageError
from shardproof.ranks import launch

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
]
ROWS, WIDTH = 8, 6
PLAN = {"blocks.*.up": sp.ColumnParallel(), "blocks.*.down": sp.RowParallel()}
close = functools.partial(assert_close, rtol=0, atol=1e-12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(10), nn.Linear(10, 43), nn.Linear(43, 10)
        self.scale = nn.Parameter(torch.ones(1))  # less than a mesh has ranks

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """fp64, of odd widths, in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(10, 5)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=seed).double() / 3

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) * 5 % 13
    return ids, normal(ROWS, WIDTH, 5, seed=91).double()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def step(network: nn.Module, optimizer: Any, rows: slice, clip: Any) -> tuple[Tensor, Tensor]:
    """One clipped step on some rows: the output, and the norm."""
    ids, target = batch()
    optimizer.zero_grad()
    y = network(ids[rows])
    nn.functional.mse_loss(y, target[rows]).backward()
    norm = clip()
    optimizer.step()
    return y.detach(), norm


def wrapped(model: nn.Module, how: str, mesh: Any) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model, process_group=mesh.get_group())
    if how == "blocks":
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(axis: sp.Axis, how: str, inputs: Any, mesh: Any, folder: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, and a third step of both this model and one that loaded it."""
    place = mesh["dp"].get_local_rank()
    rows = slice(place * ROWS // 2, (place + 1) * ROWS // 2)
    found: dict[str, Any] = {"place": place}

    def made() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        plan = PLAN if inputs is None else None
        model = sp.parallelize(Model(), plan, axis, inputs=inputs)
        network = wrapped(model, how, mesh["dp"])
        return model, network, adamw(model)

    model, network, optimizer = made()
    clip = functools.partial(sp.clip_grad_norm_, model, 0.5)
    found["steps"] = [step(network, optimizer, rows, clip) for _ in range(2)]
    if how != "ddp" or place == 0:
        sp.save(folder / "two", model, optimizer, step=2)
    dist.barrier()
    again, its_network, its_optimizer = made()
    found["loaded"] = sp.load(folder / "two", again, its_optimizer).step
    its_clip = functools.partial(sp.clip_grad_norm_, again, 0.5)
    third = step(network, optimizer, rows, clip), step(its_network, its_optimizer, rows, its_clip)
    found["goes on"] = all(torch.equal(a, b) for a, b in zip(*third, strict=True))
    found["steps"].append(third[0])
    with torch.no_grad():
        network(batch()[0][rows])  # leaves parameters whole until the next backward
    if how != "ddp" or place == 0:
        sp.save(folder / "three", model, optimizer, step=3)
    return found


def refused(axis: sp.Axis, mesh: Any, folder: Path) -> dict[str, str]:
    """What is said where something cannot be right."""
    said = {}

    def note(name: str, error: type[Exception], call: Any) -> None:
        with pytest.raises(error) as raised:
            call()
        said[name] = str(raised.value)

    def cut() -> Any:
        return sp.parallelize(Model(), PLAN, axis)

    ddp, tp = mesh["dp"], mesh["tp"]
    note(
        "ddp over tp",
        UsageError,
        lambda: DistributedDataParallel(cut(), process_group=tp.get_group()),
    )
    note("fully_shard over tp", UsageError, lambda: fully_shard(cut(), mesh=tp))
    note("fully_shard over all", UsageError, lambda: fully_shard(cut()))
    for name, dim in (("fsdp over tp", tp), ("fsdp over dp", ddp)):
        group, cpu = dim.get_group(), torch.device("cpu")
        note(
            name, UsageError, lambda g=group, c=cpu: FullyShardedDataParallel(cut(), g, device_id=c)
        )
    model = cut()
    fully_shard(model.blocks[0].down, mesh=ddp)
    note("a row layer alone", UsageError, lambda: model(batch()[0]))
    model = fully_shard(cut(), mesh=ddp)
    model(batch()[0]).square().sum().backward()
    note("clip of torch", UsageError, lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    note("background", UsageError, lambda: sp.save(folder / "no", model, background=True))
    note("ours", UsageError, lambda: sp.optim.Muon([model.blocks[0].up.weight]).step())
    place = ddp.get_local_rank()
    extra = axis.rank if place else 0  # of one data-parallel group, the ranks differ
    note("ranks that differ", MismatchError, lambda: sp.save(folder / "no", model, extra=extra))
    path = folder / "file" / "no"
    if dist.get_rank() == 0:
        path.parent.write_text("")
    dist.barrier()
    note("cannot write", UsageError, lambda: sp.save(path, model))
    return said


def column_alone(axis: sp.Axis, mesh: Any) -> Tensor:
    """`fully_shard` of a layer whose output is cut, alone; its gradient, gathered over the mesh."""
    model: Any = sp.parallelize(Model(), PLAN, axis)
    fully_shard(model.blocks[0].up, mesh=mesh["dp"])
    ids, target = batch()
    nn.functional.mse_loss(model(ids), target).backward()
    return model.blocks[0].up._parameters["weight"].grad.full_tensor()


# What wraps the model, and whether it is cut by watching a forward.
WAYS = {
    "ddp": ("ddp", False),
    "fully_shard": ("whole", False),
    "fully_shard of blocks": ("blocks", False),
    "ddp, watched": ("ddp", True),
    "fully_shard, watched": ("whole", True),
}


def on_a_mesh(_: sp.Axis, folder: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    axis = sp.Axis.from_mesh(mesh["tp"])
    found: dict[str, Any] = {}
    for name, (how, is_watched) in WAYS.items():
        inputs = batch()[0] if is_watched else None
        (folder / name).mkdir(exist_ok=True)
        found[name] = trained(axis, how, inputs, mesh, folder / name)
    found["column"] = axis.rank, column_alone(axis, mesh)
    found["refused"] = refused(axis, mesh, folder)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("beside")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """Of four ranks, for every way."""
    work = functools.partial(on_a_mesh, folder=folder)
    return list(launch(work, degree=4, engine="processes", transport="gloo", threads=1, timeout=60))


@functools.cache
def alone() -> tuple[list[tuple[Tensor, Tensor]], dict[int, dict[str, Tensor]]]:
    """Plain torch: output and norm of each step, and weights and moments after some."""
    model = Model()
    optimizer = adamw(model)
    clip = functools.partial(nn.utils.clip_grad_norm_, list(model.parameters()), 0.5)
    steps, tensors = [], {}
    for number in range(1, 4):
        steps.append(step(model, optimizer, slice(0, ROWS), clip))
        tensors[number] = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[number][f"{name}/{key}"] = optimizer.state[parameter][key].clone()
    return steps, tensors


@pytest.mark.parametrize("way", WAYS)
def test_a_training_has_the_values_of_plain_torch(way: str, results: Any, folder: Path) -> None:
    steps, tensors = alone()
    for each in (result[way] for result in results):
        rows = slice(each["place"] * ROWS // 2, (each["place"] + 1) * ROWS // 2)
        for (y, norm), (wanted, wanted_norm) in zip(each["steps"], steps, strict=True):
            close(y, wanted[rows])
            close(norm, wanted_norm)
            assert norm > 0.5  # or nothing was clipped
        assert each["loaded"] == 2
        assert each["goes on"]
    for name, number in (("two", 2), ("three", 3)):
        saved = load_file(folder / way / name / "model.safetensors")
        saved |= load_file(folder / way / name / "optimizer.safetensors")
        saved = {key: x for key, x in saved.items() if not key.endswith("/step")}
        assert saved.keys() == tensors[number].keys()
        for key, x in saved.items():
            close(x, tensors[number][key], msg=lambda m, k=key: f"{k}: {m}")
    # Negative control: another step has other weights, far outside the tolerance.
    for key, x in tensors[3].items():
        assert (x - tensors[2][key]).abs().max() > 1e-10, key


def test_a_checkpoint_of_fully_sharded_ranks_loads_into_a_plain_model(
    results: Any, folder: Path
) -> None:
    model = Model()
    with pytest.warns(UserWarning, match="saved under the contract"):
        assert sp.load(folder / "fully_shard" / "three", model, adamw(model)).step == 3
    close(model.head.weight.detach(), alone()[1][3]["head.weight"])


def test_a_layer_whose_output_is_cut_may_be_fully_sharded_alone(results: Any) -> None:
    model = Model()
    ids, target = batch()
    nn.functional.mse_loss(model(ids), target).backward()
    whole = model.blocks[0].up.weight.grad  # type: ignore[union-attr]
    parts = dict(result["column"] for result in results)
    close(torch.cat([parts[0], parts[1]]), whole)


OVER_THE_AXIS = r"{} would take the parts of '.*' on ranks \[0, 1\] of axis 'tp' for copies"
SAID = {
    "ddp over tp": OVER_THE_AXIS.format("DistributedDataParallel"),
    "fully_shard over tp": OVER_THE_AXIS.format("fully_shard"),
    "fully_shard over all": OVER_THE_AXIS.format("fully_shard"),
    "fsdp over tp": OVER_THE_AXIS.format("FullyShardedDataParallel"),
    "fsdp over dp": r"takes '.*', a part of a cut parameter, .* Use fully_shard\(model, mesh=mesh",
    "a row layer alone": "fully_shard was called on .*, which gets a cut tensor .* such as a block",
    "clip of torch": r"this rank's shard of '.*' alone.*shardproof.clip_grad_norm_\(model",
    "background": "background=True with parameters that fully_shard has divided",
    "ours": "that is a DTensor, of which it would see a part. Use it before fully_shard",
    "ranks that differ": "different checkpoints: for extra",
    "cannot write": "saving .* failed",
}


@pytest.mark.parametrize("what", SAID)
def test_what_cannot_be_right_is_refused_on_all_ranks(what: str, results: Any) -> None:
    for result in results:
        assert result["refused"].keys() == SAID.keys()
        with pytest.raises(UsageError, match=SAID[what]):
            raise UsageError(result["refused"][what])
