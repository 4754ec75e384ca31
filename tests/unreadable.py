# ruff: noqa: E501 - a table reads best with one case a line
"""Tensors that are no plain memory, given to every function that hands an address to C.

Run by `test_unreadable.py` in a process of its own, in which every case has a fork of its own: what
ends the process is one case that fails, and no others.
"""

import functools
import json
import os
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import shardproof as sp
from shardproof import c_modules, comm
from shardproof.comm.split import Split
from shardproof.heads import Heads
from shardproof.layers import shared
from shardproof.layers.norm import LayerNorm
from shardproof.leaves import Cut
from shardproof.numerics import batched_products, products, summed_products, sums
from shardproof.ops.attention import attention
from shardproof.ops.cut_norms import sharded_rms_norm
from shardproof.ops.head_split import HeadSplit
from shardproof.ops.losses import cross_entropy, mse_loss
from shardproof.ops.norms import layer_norm, rms_norm
from shardproof.ops.rms_norm import RmsFormula
from shardproof.ops.vocabulary import vocab_cross_entropy

AXIS = sp.Axis.solo()
SCHEME = sp.Scheme()
ROWS, SIZE = 4, 6
HEADS = Heads(ROWS, ROWS, 3, 8, 1)


class OwnArithmetic(Tensor):
    """Memory that means something else: every operation halves what it reads."""

    @staticmethod
    def make(x: Tensor) -> Tensor:
        return Tensor._make_subclass(OwnArithmetic, x.clone())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [x.as_subclass(Tensor) if isinstance(x, cls) else x for x in args]
        return func(*plain, **(kwargs or {}))


class Tagged(Tensor):
    """A subclass without arithmetic of its own."""


class TaggedParameter(nn.Parameter):
    """A parameter that somebody has given a name."""


def mesh() -> Any:
    if not dist.is_initialized():
        place = os.path.join(tempfile.mkdtemp(), "store")
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    return _mesh()


@functools.cache
def _mesh() -> Any:
    return init_device_mesh("cpu", (1,))


def freed(x: Tensor) -> Tensor:
    y = x.clone()
    y.untyped_storage().resize_(0)
    return y


def freed_view(x: Tensor) -> Tensor:
    """As FSDP has its parameters: a part of one flat buffer, whose address is not null."""
    flat = x.new_zeros(x.numel() + 16)
    view = flat[16:].view(x.shape)
    flat.untyped_storage().resize_(0)
    return view


# What the message must say, and how it is made.
KINDS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "dtensor": (
        "a DTensor.*full_tensor.*to_local",
        lambda x: distribute_tensor(x, mesh(), [Replicate()]),
    ),
    "fake": ("", lambda x: FakeTensorMode().from_tensor(x)),
    "sparse": ("layout sparse_coo.*to_dense", lambda x: x.to_sparse()),
    "compressed": ("layout sparse_csr.*to_dense", lambda x: x.to_sparse_csr()),
    "mkldnn": ("layout mkldnn.*to_dense", lambda x: x.to_mkldnn()),
    "nested": ("nested tensor.*to_padded_tensor", lambda x: torch.nested.nested_tensor([x, x[:2]])),
    "jagged": (
        "nested tensor.*to_padded_tensor",
        lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
    ),
    "quantized": (
        "quantized|qint8",
        lambda x: torch.quantize_per_tensor(x, 1, 0, torch.qint8),
    ),
    "wrapper": ("a TwoTensor.*plain tensor", lambda x: TwoTensor(x, x.clone())),
    "masked": ("a MaskedTensor.*plain tensor", lambda x: masked_tensor(x, x > 0)),
    "own arithmetic": ("an? OwnArithmetic.*plain tensor", OwnArithmetic.make),
    "zeros": ("no memory.*clone", lambda x: torch._efficientzerotensor(x.shape)),
    "freed": ("freed memory.*unshard", freed),
    "freed view": ("freed memory.*unshard", freed_view),
}


def column() -> Any:
    return sp.ColumnParallelLinear(SIZE, 5, axis=AXIS, name="up")


def row() -> Any:
    return sp.RowParallelLinear(SIZE, 5, axis=AXIS, name="down")


def linked(x: Tensor) -> Tensor:
    layers = [column(), column()]
    shared.link(layers, who="pair")
    is_plain = type(x) is Tensor and not x.is_quantized
    return layers[0](x.requires_grad_() if is_plain else x)


def cut_norm(x: Tensor) -> Tensor:
    cut = Cut(SIZE, 8, 1)
    return sharded_rms_norm(x, None, Split(AXIS, cut, SCHEME, "norm"), RmsFormula(1e-6))


def joined_product(x: Tensor) -> Any:
    return summed_products.kernel_nodes(
        [(x, torch.randn(SIZE, 3))], [(slice(0, SIZE),)], range(1), 1
    )


def lent(x: Tensor) -> None:
    """A collective, on two ranks: both raise."""
    message = ""
    try:
        sp.launch(
            lambda axis: comm.all_reduce_nodes(
                {(axis.rank, axis.rank + 1): x}, axis, cut=Cut(2, 2, 2), shape=(ROWS, SIZE),
                like=torch.zeros(1), direction="forward", who="lent",
            ),
            degree=2, engine="threads", timeout=20,
        )  # fmt: skip
    except sp.errors.ShardproofError as error:
        message = str(error)
    raise sp.errors.UsageError(message)


_B = torch.randn(SIZE, 3)
_CLASSES = torch.zeros(ROWS, dtype=torch.int64)
# Who is named, and what is done with a tensor of (ROWS, SIZE).
USES: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "column": ("up", lambda x: column()(x)),
    "column, frozen": ("up", lambda x: column().requires_grad_(False)(x)),
    "row": ("down", lambda x: row()(x)),
    "linked": ("up|pair", linked),
    "product": ("a matrix product", lambda x: products.product(x, _B)),
    "head product": (
        "a matrix product of heads",
        lambda x: batched_products._run_kernel(
            x[None, None], _B[None, None], (0,), torch.empty(1, 1, 4, 3)
        ),
    ),
    "joined": ("a sum of matrix products", joined_product),
    "sum": ("a sum over rows", sums.sum_rows),
    "squares": ("a sum over rows", sums.sum_squares_rows),
    "collective": ("lent", lent),
    "layer_norm": ("layer_norm", lambda x: layer_norm(x, None, None)),
    "rms_norm": ("rms_norm", lambda x: rms_norm(x, None, eps=1e-6)),
    "cut norm": ("norm", cut_norm),
    "mse": ("mse_loss", lambda x: mse_loss(x, torch.zeros(ROWS, SIZE))),
    "cross entropy": ("cross_entropy", lambda x: cross_entropy(x, _CLASSES)),
    "vocabulary": (
        "vocab_cross_entropy",
        lambda x: vocab_cross_entropy(x, _CLASSES, axis=AXIS, cut=Cut(SIZE, 8, 1)),
    ),
}
# Torch itself reads freed memory before we do, there as in a plain model; of zeros it makes memory.
TORCH_READS = ("layer_norm", "rms_norm", "cut norm", "mse", "cross entropy", "vocabulary")
WITHOUT_MEMORY = ("zeros", "freed", "freed view")
# What has no entry of its own, and is asked by layers: of these no address can be read.
INSIDE = ("product", "head product", "joined", "sum", "squares")
NO_ADDRESS = ("dtensor", "fake", "wrapper", *WITHOUT_MEMORY)
FAKE_ALONE = ("sum", "squares", "layer_norm", "rms_norm", "cut norm")
NO_VIEW = {("head product", "freed"), ("head product", "freed view")}  # torch makes none of them


def x_of(*shape: int) -> Tensor:
    return torch.randn(shape or (ROWS, SIZE), generator=torch.Generator().manual_seed(0))


def same(found: Tensor, wanted: Tensor) -> None:
    found, wanted = (x.detach().as_subclass(Tensor) for x in (found, wanted))
    if not torch.equal(found, wanted):
        raise AssertionError(f"{found} is not {wanted}")


def replaced(layer: nn.Module, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """A parameter of another kind, as FSDP and quantizers put it there."""
    layer._parameters[name] = make(layer._parameters[name].detach())  # type: ignore
    return layer(x_of())


def returned(make: Callable[[Tensor], Tensor]) -> None:
    """As the incoming gradient."""
    y = column()(x_of().requires_grad_())
    torch.autograd.backward([y], [make(torch.ones(y.shape))])


def freed_before_backward() -> None:
    layer = column()
    flat = torch.randn(16 + 5 * SIZE)
    layer._parameters["weight"] = flat[16:].view(5, SIZE).requires_grad_()  # type: ignore
    y = layer(x_of().requires_grad_())
    flat.untyped_storage().resize_(0)
    y.sum().backward()


def embedded(ids: Any, weight: Any) -> Tensor:
    layer = sp.VocabParallelEmbedding(SIZE, 3, axis=AXIS, name="embedding")
    layer._parameters["weight"] = weight(layer.weight.detach())
    return layer(ids(torch.arange(4)))


def attended(make: Callable[[Tensor], Tensor], at: int) -> Tensor:
    given = [x_of(1, ROWS, 2, 3) for _ in range(3)] + [x_of(1, 1, 2, 2)]
    given[at] = make(given[at])
    site = HeadSplit(AXIS, HEADS, SCHEME, "attention")
    return attention(*given[:3], site, mask=given[3])


def dual(layer: nn.Module) -> None:
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x_of(), torch.ones(ROWS, SIZE)))


def clipped_after_fully_shard() -> None:
    """A plain model: the norm of the whole gradients, and gradients that are clipped by it."""
    plain, shared_model = nn.Linear(SIZE, 5), nn.Linear(SIZE, 5)
    shared_model.load_state_dict(plain.state_dict())
    fully_shard(shared_model, mesh=mesh())
    norms = []
    for model in (plain, shared_model):
        model(x_of()).square().sum().backward()
        norms.append(sp.clip_grad_norm_(model, 1.0))
    same(norms[1], norms[0])
    same(shared_model.weight.grad.full_tensor(), plain.weight.grad)
    wanted = nn.Linear(SIZE, 5)
    wanted.load_state_dict(plain.state_dict())
    wanted(x_of()).square().sum().backward()
    torch.testing.assert_close(norms[1], nn.utils.clip_grad_norm_(wanted.parameters(), 1.0))
    torch.testing.assert_close(plain.weight.grad, wanted.weight.grad)


def cut_and_fully_sharded() -> None:
    alone, both = column(), column()
    both.load_state_dict(alone.state_dict())
    fully_shard(both, mesh=mesh())
    for model in (alone, both):
        model(x_of()).square().sum().backward()
    same(sp.grad_norm(both), sp.grad_norm(alone))


def clipped(model: nn.Module, x: Tensor) -> None:
    y = model(x)
    (y.abs() if y.is_complex() else y).sum().backward()
    norm = sp.grad_norm(model)
    wanted = nn.utils.get_total_norm([p.grad for p in model.parameters()])  # type: ignore
    torch.testing.assert_close(norm, wanted)


def trained_like(make: Callable[[Any], Any]) -> None:
    """A layer in other hands computes what it computes alone."""
    layer = column()
    wanted = layer(x_of())
    same(make(layer), wanted)


def subclassed() -> None:
    layer = column()
    wanted = layer(x_of())
    layer.weight = TaggedParameter(layer.weight.detach())
    layer.bias = nn.Parameter(layer.bias.detach())
    layer.extra = nn.Buffer(torch.ones(1))
    same(layer(x_of().as_subclass(Tagged)), wanted)
    layer(x_of().as_subclass(Tagged)).sum().backward()
    same(LayerNorm(SIZE)(x_of().as_subclass(Tagged)), LayerNorm(SIZE)(x_of()))


def in_inference_mode() -> None:
    layer = column()
    wanted = layer(x_of())
    with torch.inference_mode():
        same(layer(x_of()), wanted)
        same(layer_norm(x_of(), None, None), layer_norm(x_of().clone(), None, None))


def without_memory_in_c() -> None:
    """C looks too, whoever calls it."""
    kernels: Any = c_modules.kernels()
    for call in (
        lambda: kernels.fold(0, False, 0, 2, 2, 0, 2, 1),
        lambda: kernels.product(0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, products.one_leaf(1)),
        lambda: kernels.joined(
            0, 1, 0, 1, 1, struct.pack("=7q", 1, 0, 1, 1, 0, 1, 1), products.one_leaf(1)
        ),
    ):
        try:
            call()
        except BufferError:
            continue
        raise AssertionError("read from nowhere")


REFUSED = "^UsageError: "
RIGHT = "^right$"
MIXED = "^AssertionError: .*convert all Tensors to FakeTensors first"
_TRANSFORM = "up: .*inside a transform of torch.func"
_RECORDED = "up is called under .*records torch's operations"
_DUAL = "up: x is a dual number.*torch.autograd.grad"


def kind(name: str) -> Callable[[Tensor], Tensor]:
    return KINDS[name][1]


def transformed(
    transform: Any, act: Callable[[Any, Tensor], Tensor], is_frozen: bool = True
) -> Any:
    layer = column().requires_grad_(not is_frozen)
    return transform(lambda x: act(layer, x))(x_of())


def frozen() -> Any:
    return column().requires_grad_(False)


def cast_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: (10 * x).to(dtype)


def fake_outcome(use: str) -> str:
    """A fake goes through where all operands are; among others torch refuses it."""
    return RIGHT if use in FAKE_ALONE else MIXED


# What must be said, and what is done.
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    **{
        f"{use} of {name}": (
            fake_outcome(use) if name == "fake" else f"{REFUSED}.*({who}).*{text}",
            lambda f=act, m=make: f(m(x_of())),
        )
        for use, (who, act) in USES.items()
        for name, (text, make) in KINDS.items()
        if not (use in TORCH_READS and name in WITHOUT_MEMORY)
        and not (use in INSIDE and name not in NO_ADDRESS)
        and (use, name) not in NO_VIEW
        and (use, name) != ("collective", "fake")  # two threads would use one FakeTensorMode
    },
    **{
        f"{part} that is {name}": (
            f"{REFUSED}up: {part} is .*{KINDS[name][0]}", lambda p=part, n=name: replaced(column(), p, kind(n)),
        )
        for part in ("weight", "bias")
        for name in ("dtensor", "wrapper", "own arithmetic", "freed", "freed view")
    },
    **{
        f"gradient that is {name}": (f"{REFUSED}backward of up: grad is .*{KINDS[name][0]}", lambda n=name: returned(kind(n)))
        for name in ("dtensor", "wrapper", "own arithmetic", "sparse")
    },
    "weight that is fake": (MIXED, lambda: replaced(column(), "weight", kind("fake"))),
    "gradient that is fake": (MIXED, lambda: returned(kind("fake"))),
    **{
        f"norm weight that is {name}": (f"{REFUSED}layer_norm: weight is {KINDS[name][0]}", lambda n=name: replaced(LayerNorm(SIZE), "weight", kind(n)))
        for name in ("dtensor", "wrapper", "own arithmetic")
    },
    **{
        f"attention, {at} that is dtensor": (f"{REFUSED}attention: {at} is a DTensor", lambda p=place: attended(kind("dtensor"), p))
        for place, at in enumerate(("q", "k", "v", "mask"))
    },
    "embedding of dtensor ids": (f"{REFUSED}embedding: ids is a DTensor", lambda: embedded(kind("dtensor"), nn.Parameter)),
    "embedding of a dtensor": (f"{REFUSED}embedding: weight is a DTensor", lambda: embedded(lambda x: x, kind("dtensor"))),
    "weight freed before backward": (f"{REFUSED}.*freed memory", freed_before_backward),
    "vmap": (REFUSED + _TRANSFORM, lambda: transformed(torch.func.vmap, lambda m, r: m(r[None]), is_frozen=False)),
    "vmap, frozen": (REFUSED + _TRANSFORM, lambda: transformed(torch.func.vmap, lambda m, r: m(r[None]))),
    "func.grad": (REFUSED + _TRANSFORM, lambda: transformed(torch.func.grad, lambda m, r: m(r).sum())),
    "func.jvp": (f"{REFUSED}up: ", lambda: torch.func.jvp(frozen(), (x_of(),), (x_of(),))),
    "functionalize": (REFUSED + _TRANSFORM, lambda: torch.func.functionalize(frozen())(x_of())),
    "vmap of a norm": (f"{REFUSED}layer_norm: .*torch.func", lambda: torch.func.vmap(lambda r: layer_norm(r[None], None, None))(x_of())),
    "make_fx": (RIGHT, lambda: recorded(lambda m: make_fx(m)(x_of()))),
    "make_fx of a norm": (RIGHT, lambda: recorded(lambda m: make_fx(m)(x_of()), LayerNorm(SIZE))),
    "make_fx of fakes": (MIXED, lambda: make_fx(frozen(), tracing_mode="fake")(x_of())),
    "export": (RIGHT, lambda: recorded(lambda m: torch.export.export(m, (x_of(),)).module())),
    "jit.trace": (REFUSED + _RECORDED, lambda: torch.jit.trace(frozen(), (x_of(),))),
    "dual number": (REFUSED + _DUAL, lambda: dual(column())),
    "dual number, frozen": (REFUSED + _DUAL, lambda: dual(frozen())),
    "dual number in a norm": (f"{REFUSED}layer_norm: x is a dual", lambda: dual(LayerNorm(SIZE).requires_grad_(False))),
    "a mode of fakes": (RIGHT, lambda: in_fake_mode()),
    "clip after fully_shard": (RIGHT, clipped_after_fully_shard),
    "norm of what is cut and fully sharded": (RIGHT, cut_and_fully_sharded),
    "norm of a sparse gradient": (f"{REFUSED}grad_norm: weight.grad is a tensor of layout sparse_coo", lambda: clipped(nn.Embedding(5, 3, sparse=True), torch.tensor([1, 2]))),
    "norm of a complex gradient": (RIGHT, lambda: clipped(nn.Linear(SIZE, 3, dtype=torch.complex64), torch.complex(x_of(), x_of()))),
    "torch.compile": (RIGHT, lambda: trained_like(lambda m: torch.compile(m, backend="eager")(x_of()))),
    "functional_call": (RIGHT, lambda: trained_like(lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (x_of(),)))),
    "subclasses without arithmetic": (RIGHT, subclassed),
    "inference mode": (RIGHT, in_inference_mode),
    "null addresses": (RIGHT, without_memory_in_c),
    "meta": (RIGHT, lambda: [sums.sum_rows(x_of().to("meta")), layer_norm(x_of().to("meta"), None, None)]),
    **{
        f"{use} of {dtype}": (f"^(UsageError|ShapeError): .*({USES[use][0]}).*{dtype}".replace("torch.", r"torch\."), lambda u=use, d=dtype: USES[u][1](cast_to(d)(x_of())))
        for use in ("column", "row", *TORCH_READS)
        for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    **{
        f"a layer of {dtype}": (f"{REFUSED}up: x is {dtype}", lambda d=dtype: column_of(d))
        for dtype in (torch.int32, torch.complex64)
    },
}  # fmt: skip


def in_fake_mode() -> None:
    """Layer and input are real, and what is computed is not."""
    layer, x = frozen(), x_of()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = layer(x)
    if not isinstance(y, FakeTensor) or y.shape != (ROWS, 5):
        raise AssertionError(f"{y}")


def recorded(record: Callable[[nn.Module], Any], layer: nn.Module | None = None) -> None:
    """What was recorded computes what the layer does."""
    layer = frozen() if layer is None else layer
    with torch.no_grad():
        same(record(layer)(x_of()), layer(x_of()))


def column_of(dtype: torch.dtype) -> Tensor:
    layer = column()
    for name, parameter in list(layer.named_parameters()):
        layer._parameters[name] = nn.Parameter(
            (9 * parameter.detach()).to(dtype), requires_grad=False
        )
    return layer(cast_to(dtype)(x_of()))


def outcomes_of(names: Sequence[str]) -> dict[str, str]:
    """What some cases do, one after the other in one fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        signal.alarm(100)
        for name in names:
            try:
                CASES[name][1]()
                text = "right"
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writer, json.dumps([name, text[:3000]]).encode() + b"\n")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found: dict[str, str] = dict(map(json.loads, pipe))
    _, status = os.waitpid(child, 0)
    return {**dict.fromkeys(names, f"the process ended with status {status}"), **found}


def main() -> None:
    """Outcomes of all cases, as one line of JSON: a fork for those that have one first word."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    groups: dict[str, list[str]] = {}
    for name in CASES:
        groups.setdefault(name.split()[0], []).append(name)
    found: dict[str, str] = {}
    for names in groups.values():
        found |= outcomes_of(names)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
