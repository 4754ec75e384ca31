"""What must hold on a GPU: one function for each claim, which takes the device.

tests/test_gpu.py runs them with pytest and `gpu/run.py` without. All but those in `CUDA_ONLY` run
on the CPU too, so that a machine without a GPU can show that the checks themselves work. Ranks are
threads that share the device. A check raises if its claim does not hold; the first line of its
docstring is the claim.
"""

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from shardproof import comm
from shardproof.errors import MismatchError, ShapeError, UsageError
from shardproof.prover.cases.gpt import Decoder, Sizes
from shardproof.transport.base import Call

DEGREES = (1, 2, 3, 8)
DEGREES_ON_CPU = (1, 3)  # enough to see that a check works
SRC = Path(sp.__file__).parents[1]

TORCHRUN_SCRIPT = """
import sys
import torch
import torch.distributed as dist
import shardproof as sp
from shardproof.transport.base import Call
from shardproof.transport.distributed import DistributedTransport

axis = sp.Axis.from_env()
transport = DistributedTransport(dist.group.WORLD, check=True)  # an axis of one rank needs none
x = torch.arange(5.0, device=sys.argv[1])
call = Call("all_reduce", "forward", "gpu", (5,), x.dtype)
assert torch.equal(transport.all_reduce(x, call=call), x)
out = torch.empty_like(x)
transport.all_gather(x, out, [5], call=call)
assert torch.equal(out, x)
assert transport.gather_objects("seven", call=call) == ["seven"]
sys.stdout.write(f"{axis.transport.name} {transport.name}")
dist.destroy_process_group()
"""


def same_at_every_degree(work: Callable[[sp.Axis], Sequence[Tensor]], device: torch.device) -> None:
    """Raise unless `work` gives the same bits on every rank of every degree, on the device."""
    alone: Sequence[Tensor] = ()
    for degree in DEGREES if device.type == "cuda" else DEGREES_ON_CPU:
        for rank, found in enumerate(sp.launch(work, degree=degree, timeout=120)):
            assert found, "nothing to compare"
            alone = alone or found
            for place, (one, other) in enumerate(zip(alone, found, strict=True)):
                where = f"tensor {place} on rank {rank} of {degree}"
                assert other.device.type == device.type, f"{where} is on {other.device}"
                assert torch.equal(one, other), f"{where} has other bits than at degree 1"


def draw(*shape: int, key: int = 0) -> Tensor:
    """Numbers on the CPU, whatever the device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(key), device="cpu")


def whole(layer: nn.Module, x: Tensor | None, name: str, axis: sp.Axis) -> Tensor:
    """The parts of all ranks of something that is cut as a parameter of `layer` is."""
    layout = layer.layouts[name]
    return comm.all_gather(x, axis, dim=layout.dim, cut=layout.cut, direction="prover")


def block_step(
    axis: sp.Axis, device: torch.device, x: Tensor, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Output and all gradients of a feed-forward block of odd widths, 37 -> 251 -> 9."""
    column = sp.ColumnParallelLinear(37, 251, axis=axis, name="up", device=device, dtype=dtype)
    row = sp.RowParallelLinear(251, 9, axis=axis, name="down", device=device, dtype=dtype)
    x = x.detach().requires_grad_()
    y = row(sp.functional.silu(column(x)))
    sp.functional.mse_loss(y, torch.zeros_like(y)).backward()
    cut = [whole(layer, layer.weight.grad, "weight", axis) for layer in (column, row)]
    return [y.detach(), x.grad, row.bias.grad, *cut]


def block_of_odd_widths(device: torch.device) -> None:
    """Output and gradients of a column and a row layer in fp32 have the same bits."""
    x = draw(12, 37).to(device)
    same_at_every_degree(lambda axis: block_step(axis, device, x), device)


def block_in_16_bits(device: torch.device) -> None:
    """The same block has the same bits in bf16, and in fp16."""
    for dtype in (torch.bfloat16, torch.float16):
        x = draw(12, 37).to(device, dtype)
        same_at_every_degree(lambda axis, x=x: block_step(axis, device, x, x.dtype), device)


def block_of_strided_inputs(device: torch.device) -> None:
    """A transposed, a sliced and an expanded input give the bits of contiguous ones."""
    strided = {
        "transposed": draw(37, 12).to(device).t(),
        "sliced": draw(24, 41).to(device)[::2, 3:40],
        "expanded": draw(1, 37).to(device).expand(12, 37),
    }
    for name, x in strided.items():
        plain = sp.launch(lambda axis, x=x: block_step(axis, device, x.contiguous()), degree=1)[0]
        for found in sp.launch(lambda axis, x=x: block_step(axis, device, x), degree=3):
            assert all(map(torch.equal, plain, found)), f"the {name} input gives other bits"


def drawn_weights(device: torch.device) -> None:
    """Weights that a layer draws on the device are those that it draws on the CPU."""

    def weight(axis: sp.Axis, where: torch.device) -> Tensor:
        layer = sp.RowParallelLinear(40, 7, axis=axis, name="down", device=where)
        assert layer.weight.device.type == where.type
        return layer.weight.detach().cpu()

    here = sp.launch(lambda axis: weight(axis, device), degree=3)
    on_cpu = sp.launch(lambda axis: weight(axis, torch.device("cpu")), degree=3)
    assert all(map(torch.equal, here, on_cpu))


def sum_over_ranks(device: torch.device) -> None:
    """An all-reduce over three ranks that share the device adds what each of them gave."""

    def work(axis: sp.Axis) -> float:
        x = torch.full((20_011,), axis.rank + 1.0, device=device)
        call = Call("all_reduce", "forward", "gpu", tuple(x.shape), x.dtype)
        return axis.transport.all_reduce(x, call=call).sum().item()

    assert sp.launch(work, degree=3) == [6.0 * 20_011] * 3


def many_sums_in_a_row(device: torch.device) -> None:
    """Tensors that are written to right after each of 200 sums do not spoil the sums of others."""

    def work(axis: sp.Axis) -> list[float]:
        found = []
        x = torch.empty(50_021, device=device)
        for step in range(200):
            x.fill_(axis.rank + step)
            call = Call("all_reduce", "forward", "gpu", tuple(x.shape), x.dtype)
            y = axis.transport.all_reduce(x, call=call)
            x.fill_(-1e9)
            found.append(y.amax() - y.amin() + y[0])
        return torch.stack(found).tolist()

    wanted = [3.0 + 3 * step for step in range(200)]
    assert sp.launch(work, degree=3) == [wanted] * 3


def decoder_that_was_watched(device: torch.device) -> None:
    """Two clipped AdamW steps of a decoder that was cut by watching: same losses and norms."""
    sizes = Sizes(vocabulary=257, positions=32, heads=5, head_dim=12, inner=237, blocks=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = Decoder(sizes)
    tokens = torch.randint(257, (3, 17), generator=torch.Generator().manual_seed(1)).to(device)

    def work(axis: sp.Axis) -> list[Tensor]:
        model = copy.deepcopy(plain).to(device).train()
        model = sp.parallelize(model, None, axis, inputs=tokens[:, :-1])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for _ in range(2):
            optimizer.zero_grad()
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            found += [loss.detach(), sp.clip_grad_norm_(model, 1.0)]
            optimizer.step()
        return found

    same_at_every_degree(work, device)


def encoder_layer_that_was_watched(device: torch.device) -> None:
    """A TransformerEncoderLayer of torch, cut by watching, has the same bits with dropout on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.TransformerEncoderLayer(48, 6, 96, batch_first=True)
    x = draw(2, 8, 48).to(device)

    def work(axis: sp.Axis) -> list[Tensor]:
        model = sp.parallelize(copy.deepcopy(plain).to(device), None, axis, inputs=x)
        given = x.clone().requires_grad_()
        y = model(given)
        y.square().mean().backward()
        return [y.detach(), given.grad, sp.grad_norm(model)]

    same_at_every_degree(work, device)


def own_optimizers(device: torch.device) -> None:
    """Two steps of our Adafactor and of our Muon give the same weights."""

    def work(axis: sp.Axis, make: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
        row = sp.RowParallelLinear(
            43, 29, axis=axis, bias=False, input_is_parallel=False, name="row", device=device
        )
        x, optimizer = draw(11, 43).to(device), make(row.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            sp.functional.mse_loss(row(x), x[:, :29].contiguous()).backward()
            optimizer.step()
        return [whole(row, row.weight.detach(), "weight", axis)]

    for make in (sp.optim.Adafactor, sp.optim.Muon):
        same_at_every_degree(lambda axis, make=make: work(axis, make), device)


def autocast_and_scaler(device: torch.device) -> None:
    """A step under autocast to fp16 with a GradScaler gives the same weights."""
    x = draw(12, 37).to(device)

    def work(axis: sp.Axis) -> list[Tensor]:
        column = sp.ColumnParallelLinear(37, 251, axis=axis, name="up", device=device)
        row = sp.RowParallelLinear(251, 9, axis=axis, name="down", device=device)
        model = nn.Sequential(column, row)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        with torch.autocast(device.type, dtype=torch.float16):
            y = row(torch.relu(column(x)))
            loss = sp.functional.mse_loss(y.float(), torch.zeros_like(y, dtype=torch.float32))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        weights = [whole(layer, layer.weight.detach(), "weight", axis) for layer in (column, row)]
        return [loss.detach(), *weights]

    same_at_every_degree(work, device)


def inputs_that_differ(device: torch.device) -> None:
    """`sp.checked()` finds ranks whose inputs on the device differ in one element."""

    def work(axis: sp.Axis) -> None:
        column = sp.ColumnParallelLinear(37, 251, axis=axis, name="up", device=device)
        x = draw(12, 37)
        x[7, 5] += axis.rank
        with sp.checked():
            column(x.to(device))

    message = raised(MismatchError, lambda: sp.launch(work, degree=2))
    assert "[7, 5]" in message, message


def raised(kind: type[Exception], call: Callable[[], object]) -> str:
    """The message of the error that `call` must raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def input_on_another_device(device: torch.device) -> None:
    """A layer on the GPU names both devices when it is given an input on the CPU."""

    def work(axis: sp.Axis) -> None:
        layer = sp.ColumnParallelLinear(37, 251, axis=axis, name="up", device=device)
        layer(draw(12, 37))

    message = raised(ShapeError, lambda: sp.launch(work, degree=2))
    assert "on cpu" in message, message
    assert "on cuda" in message, message


def non_default_stream(device: torch.device) -> None:
    """A collective of threads inside a CUDA stream other than the default one is refused."""

    def work(axis: sp.Axis) -> None:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            block_step(axis, device, draw(12, 37).to(device))

    message = raised(UsageError, lambda: sp.launch(work, degree=2))
    assert "default stream" in message, message


def torchrun_with_nccl(device: torch.device) -> None:
    """Under torchrun a rank with a GPU of its own takes nccl, which carries what it is given."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(TORCHRUN_SCRIPT)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*torchrun, "--nproc-per-node", "1", str(script), device.type],
            env=os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "solo nccl", done.stdout


CUDA_ONLY = (input_on_another_device, non_default_stream, torchrun_with_nccl)
CHECKS = (
    sum_over_ranks,
    many_sums_in_a_row,
    drawn_weights,
    block_of_odd_widths,
    block_in_16_bits,
    block_of_strided_inputs,
    encoder_layer_that_was_watched,
    decoder_that_was_watched,
    own_optimizers,
    autocast_and_scaler,
    inputs_that_differ,
    *CUDA_ONLY,
)
