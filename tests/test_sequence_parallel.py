"""Activations that are cut along their tokens: the same bits, less memory, and what is refused."""

import copy
import hashlib
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_zoo
import shardproof as sp
from shardproof.cut.tensor import CutTensor
from shardproof.errors import UsageError
from shardproof.layers.dropout import replay_dropout

pytest.importorskip("transformers")
PLAN = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
SIZE, INNER = 10, 14


class Block(nn.Module):
    """A residual block with a norm, dropout and a feed-forward, as in GPT-2."""

    def __init__(self, *, rms: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(SIZE) if rms else nn.LayerNorm(SIZE)
        self.up, self.down = nn.Linear(SIZE, INNER), nn.Linear(INNER, SIZE)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, SIZE) to the same."""
        y: Tensor = self.drop(self.down(self.act(self.up(self.norm(x)))))
        return x + y


class Net(nn.Module):
    """Blocks, a learned scale and a last norm."""

    def __init__(self, *, depth: int = 2, rms: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(rms=rms) for _ in range(depth))
        self.scale = nn.Parameter(torch.randn(SIZE))
        self.norm = nn.LayerNorm(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, SIZE) to the same."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x * self.scale)


def net(**options: Any) -> Net:
    """The same model every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Net(**options)


def sha(x: Tensor) -> str:
    return hashlib.sha256(x.detach().contiguous().numpy().tobytes()).hexdigest()


def step(
    axis: sp.Axis,
    model: nn.Module,
    *,
    shape: tuple[int, ...] = (3, 7),
    is_cut: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, str]:
    """Hashes of loss, input gradient and gradients, of whole tensors."""
    model = copy.deepcopy(model).to(dtype)
    model = sp.parallelize(model, PLAN, axis, sequence_parallel=is_cut).train()
    x = torch.randn(*shape, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    y = model(x)
    y = y.whole() if isinstance(y, CutTensor) else y
    loss = (y * torch.linspace(0, 1, y.numel(), dtype=dtype).view(y.shape)).sum()
    loss.backward()
    assert x.grad is not None
    hashes = {"loss": sha(loss), "x": sha(x.grad)}
    for name, parameter, layout, at in sp.optim.layouts_of(model):
        grad = parameter.grad
        if grad is None:
            continue
        if layout.dim is not None and at is not None:
            grad = torch.cat(at.gather_small(grad, what=name), layout.dim)
        hashes[name] = sha(grad)
    return hashes


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (2, 2), (1, 64), (5, 3), (0, 7), (3, 0)])
def test_the_bits_are_those_of_whole_activations(
    shape: tuple[int, ...], dtype: torch.dtype, rms: bool, pool: Any
) -> None:
    """Lengths that no degree divides, fewer tokens than ranks, and no rows or no tokens."""
    work = partial(step, model=net(rms=rms), shape=shape, dtype=dtype)
    (alone,) = pool(1, "threads").run(work)
    for degree in (2, 3, 8):
        results = pool(degree, "threads").run(work)
        assert all(each == alone for each in results), degree


@pytest.mark.parametrize("engine", ["processes", "gloo"])
def test_on_processes(engine: str, pool: Any) -> None:
    work = partial(step, model=net())
    (alone,) = pool(1, "threads").run(work)
    assert pool(3, engine).run(work) == [alone] * 3


def test_matrices_are_left_whole(pool: Any) -> None:
    """An activation of two dims has no tokens."""
    work = partial(step, model=net(), shape=(6,))
    (alone,) = pool(1, "threads").run(work)
    assert pool(2, "threads").run(work) == [alone] * 2


@pytest.mark.parametrize("kind", sorted(hf_zoo.ZOO))
def test_models_of_transformers(kind: str, pool: Any) -> None:
    setting = hf_zoo.Setting(kind, sequence_parallel=True, pads=kind == "llama")
    (alone,) = pool(1, "threads").run(hf_zoo.partial(replace(setting, sequence_parallel=False)))
    for degree in (2, 3):
        results = pool(degree, "threads").run(hf_zoo.partial(setting))
        assert "reduce_scatter" in results[0]["ledger"]["forward"]
        for name, value in hf_zoo.hashes(alone).items():
            assert {each[name] for each in results if each[name] is not None} == {value}, name


def saved(axis: sp.Axis, is_cut: bool) -> int:
    """Bytes of activations as wide as the residual stream that backward keeps."""
    model = hf_zoo.cut_model(axis, hf_zoo.Setting("llama", sequence_parallel=is_cut)).train()
    parameters = {each.untyped_storage()._cdata for each in model.parameters()}
    sizes: dict[int, tuple[int, Tensor]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in parameters and x.shape[-1:] == (hf_zoo.SIZES["hidden_size"],):
            sizes[storage._cdata] = storage.nbytes(), x
        return x

    tokens = torch.zeros(4, 24, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert loss.requires_grad
    return sum(size for size, _ in sizes.values())


def test_activations_between_blocks_take_their_share_of_memory() -> None:
    """At degree 4 a quarter."""
    whole, cut = (sp.launch(partial(saved, is_cut=is_cut), degree=4)[0] for is_cut in (False, True))
    assert 0.2 * whole < cut < 0.3 * whole


def test_evaluation_and_single_tokens_are_as_without(pool: Any) -> None:
    def outputs(axis: sp.Axis, model: nn.Module) -> list[bool]:
        model = sp.parallelize(copy.deepcopy(model), PLAN, axis, sequence_parallel=True)
        x = torch.ones(2, 5, SIZE)
        with torch.no_grad():
            return [isinstance(model.blocks[0](x), CutTensor)]  # type: ignore[index]

    assert pool(2, "threads").run(partial(outputs, model=net())) == [[False], [False]]


def test_activation_checkpointing_and_copies(pool: Any) -> None:
    """A part that is computed again gathers again, and a deep copy of a cut model is cut too."""

    def losses(axis: sp.Axis, model: nn.Module) -> list[str]:
        found = []
        for recomputes in (False, True):
            mine = sp.parallelize(copy.deepcopy(model), PLAN, axis, sequence_parallel=True)
            mine = copy.deepcopy(mine).train()
            x = torch.ones(2, 5, SIZE).requires_grad_()
            for block in mine.blocks:  # type: ignore[union-attr]
                run = partial(
                    checkpoint, block, use_reentrant=False, context_fn=replay_dropout(block)
                )
                y = run(x) if recomputes else block(x)
                x = y
            x.sum().backward()
            grads = [each.grad for each in mine.parameters() if each.grad is not None]
            found.append("".join(map(sha, grads)))
        return found

    for first, second in pool(2, "threads").run(partial(losses, model=net())):
        assert first == second


CODE = {
    "sigmoid": lambda y: torch.sigmoid(y),
    "softplus": lambda y: nn.functional.softplus(y),
    "gelu": lambda y: nn.functional.gelu(y),
    "tanh": lambda y: y.tanh(),
    "pow": lambda y: y.abs() ** 1.3,
    "mean over tokens": lambda y: y.mean(1),
    "softmax over tokens of four dims": lambda y: (y * torch.ones(2, 1, 1, 1)).softmax(2),
    "sum of four dims": lambda y: (y * torch.ones(2, 1, 1, 1)).sum(2),
    "isin": lambda y: y * torch.isin((y * 3).round(), (y * 3).round().flip(1) + 2),
    "views": lambda y: torch.cat([y[:, 1:] - y[:, :-1], y.flip(1)[:, :1]], 1).transpose(1, 2),
    "in place": lambda y: y.clone().mul_(2).add_(1).clamp_(-1, 1),
}


class Coded(nn.Module):
    """A feed-forward, and code of a model behind it; the input may lie in another order."""

    def __init__(self, code: Any, *, is_turned: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.scale, self.norm = nn.Parameter(torch.randn(SIZE)), nn.LayerNorm(SIZE)
        self.code, self.is_turned = code, is_turned

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, SIZE) to what the code makes of it."""
        if self.is_turned:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        block = self.blocks[0]
        y = x + block.down(torch.relu(block.up(x)))
        return self.code(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("name", CODE)
def test_code_of_a_model_has_the_bits_that_it_has_without(
    name: str, is_turned: bool, pool: Any
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Coded(CODE[name], is_turned=is_turned)
    for parameter in (model.scale, *model.norm.parameters(), *model.blocks[0].norm.parameters()):  # type: ignore[union-attr, operator]
        parameter.requires_grad_(False)
    work = partial(step, model=model, shape=(3, 37))
    without = pool(2, "threads").run(partial(work, is_cut=False))
    for degree in (2, 3):
        assert set(map(str, pool(degree, "threads").run(work))) == {str(without[0])}


def test_gradients_of_an_activation(pool: Any) -> None:
    """`torch.autograd.grad` of what is cut gives a gradient that is cut alike."""

    def saliency(axis: sp.Axis, model: nn.Module, is_cut: bool) -> str:
        model = sp.parallelize(copy.deepcopy(model), PLAN, axis, sequence_parallel=is_cut)
        h = model.blocks[0](torch.ones(2, 5, SIZE))  # type: ignore[index, operator]
        y = model.norm(model.blocks[1](h))  # type: ignore[index, operator]
        loss = (y.whole() if isinstance(y, CutTensor) else y).square().sum()
        (grad,) = torch.autograd.grad(loss, [h])
        assert isinstance(grad, CutTensor) is is_cut
        return sha(grad.whole() if isinstance(grad, CutTensor) else grad)

    model = net().eval()
    without = pool(2, "threads").run(partial(saliency, model=model, is_cut=False))
    assert pool(2, "threads").run(partial(saliency, model=model, is_cut=True)) == without


def test_backward_hooks_of_modules_are_refused(pool: Any) -> None:
    def work(axis: sp.Axis, model: nn.Module) -> None:
        model = sp.parallelize(copy.deepcopy(model), PLAN, axis, sequence_parallel=True)
        model.blocks[1].register_full_backward_hook(lambda *_: None)  # type: ignore[index, operator]
        model(torch.ones(2, 5, SIZE))

    with pytest.raises(UsageError, match=r"module 'blocks.1' has a backward hook"):
        sp.launch(partial(work, model=net()), degree=2)


class Flat(nn.Module):
    """Code between cut layers that views tokens, draws, and hands on what it computed itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, INNER), nn.Linear(INNER, SIZE)
        self.gate, self.shared = nn.Linear(SIZE, 3), nn.Linear(SIZE, INNER)
        self.norm = nn.LayerNorm(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, SIZE) to the same."""
        x = x + nn.functional.dropout(self.down(torch.relu(self.up(x))), 0.3, self.training)
        weights = self.gate(x).softmax(-1)
        h = nn.functional.layer_norm(x, (SIZE,)) * (1 + torch.rand_like(x))
        y = self.down(torch.relu(self.shared(h)) * weights.sum(-1, keepdim=True))
        flat = self.down(torch.relu(self.up(y.reshape(-1, SIZE)))).view(x.shape)
        return self.norm(x + y.view(x.shape) + flat)


class Summed(nn.Module):
    """Blocks whose embedding is cut, and tokens that are shifted and added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(23, SIZE), nn.Embedding(40, SIZE)
        self.blocks = nn.ModuleList(Block(rms=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, SIZE), of which signs choose rows, to the same."""
        ids = (x.detach()[..., 0].abs() * 7).long() % 23
        h = self.table(ids) + self.place(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h + x)
            h += h.roll(1, 1).sigmoid()
        return h * h.mean(-1, keepdim=True)


class Written(nn.Module):
    """An input of two columns that is written between them; only the second one is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, INNER), nn.Linear(INNER, SIZE)
        self.second, self.norm = nn.Linear(SIZE, INNER), nn.LayerNorm(SIZE)
        self.up.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, SIZE) to the same."""
        h = self.down(torch.relu(self.up(x)))
        h = h + x
        first = self.up(h)
        h = h.mul_(3)
        y: Tensor = self.down(torch.relu(first * self.second(h)))
        return y + h


OWN_MODELS = {"net": Net, "flat": Flat, "embeddings": Summed, "written": Written}


def watched_step(
    axis: sp.Axis, model: nn.Module, *, is_cut: bool, dtype: torch.dtype, shape: tuple[int, int]
) -> dict[str, str]:
    """Hashes of this rank's gradients, of a model that is cut by watching a forward."""
    model = copy.deepcopy(model).to(dtype)
    x = torch.randn(*shape, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    example = torch.ones(2, 5, SIZE, dtype=dtype)
    model = sp.parallelize(model, None, axis, inputs=example, sequence_parallel=is_cut).train()
    x.requires_grad_()
    y = model(x)
    assert type(y) is Tensor
    loss = y.square().sum()
    loss.backward()
    with torch.no_grad():  # activations are whole then
        evaluated = model.eval()(x)
    found = {"output": sha(y), "loss": sha(loss), "input": sha(x.grad), "whole": sha(evaluated)}  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        found[name] = "" if parameter.grad is None else sha(parameter.grad)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (2, 2), (5, 33), (0, 7), (3, 0)])
@pytest.mark.parametrize("name", OWN_MODELS)
def test_a_model_that_was_cut_by_watching(
    name: str, shape: tuple[int, int], dtype: torch.dtype, pool: Any
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = OWN_MODELS[name]()
    work = partial(watched_step, model=model, shape=shape, dtype=dtype)
    (alone,) = pool(1, "threads").run(partial(work, is_cut=True))
    for degree in (2, 3):
        without, results = (
            pool(degree, "threads").run(partial(work, is_cut=is_cut)) for is_cut in (False, True)
        )
        assert results == without
        assert results[0]["output"] == alone["output"]


VIEWS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(x.shape),
    "sliced": lambda x: torch.cat([x, x], -1)[..., 1 : 1 + x.shape[-1]],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["net", "flat", "written"])
def test_views_as_input_and_as_incoming_gradient(name: str, view: str, pool: Any) -> None:
    """The bits of the same step without, and the values of plain torch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = OWN_MODELS[name]().double().eval()
    generator = torch.Generator().manual_seed(1)
    base, grad = (
        VIEWS[view](torch.randn(3, 7, SIZE, generator=generator, dtype=torch.float64))
        for _ in range(2)
    )

    def gradients(model: nn.Module) -> list[Tensor]:
        x = base.detach().requires_grad_()
        torch.manual_seed(0)  # for what plain torch draws
        y = model(x)
        y.backward(grad)
        assert x.grad is not None
        whole = [p.grad for p in model.parameters() if p.grad is not None and p.dim() == 1]
        return [y.detach(), x.grad, *(each for each in whole if each.shape == (SIZE,))]

    def on_rank(axis: sp.Axis, is_cut: bool) -> list[Tensor]:
        mine = copy.deepcopy(model)
        inputs = torch.ones(2, 5, SIZE, dtype=torch.float64)
        mine = sp.parallelize(mine, None, axis, inputs=inputs, sequence_parallel=is_cut)
        return gradients(mine)

    for degree in (2, 3):
        without, found = (
            pool(degree, "threads").run(partial(on_rank, is_cut=is_cut)) for is_cut in (False, True)
        )
        for one, other in zip(without, found, strict=True):
            assert [sha(each) for each in one] == [sha(each) for each in other]
    if name == "flat":
        return  # it draws, by another key than plain torch
    for one, plain in zip(found[0], gradients(model), strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-9, atol=1e-11)


def test_a_plan_says_that_activations_are_cut(pool: Any) -> None:
    """`parallelize` needs no second word, and the ledger counts what both plans predicted."""
    example = torch.ones(2, 5, SIZE).requires_grad_()
    plan = sp.plan(net(), degree=3, inputs=example, sequence_parallel=True)
    assert plan.as_dict()["sequence_parallel"]

    def sent(axis: sp.Axis, model: nn.Module) -> Any:
        model = sp.parallelize(copy.deepcopy(model), plan, axis)
        model(torch.ones(2, 5, SIZE).requires_grad_()).sum().backward()
        return axis.transport.ledger.as_dict()

    found = pool(3, "threads").run(partial(sent, model=net()))
    assert found == [plan.comm(rank=rank) for rank in range(3)]
    assert found[0]["forward"]["reduce_scatter"]["calls"] == 2


@pytest.mark.parametrize("kind", sorted(hf_zoo.ZOO))
@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_the_bytes_of_models_of_transformers_are_predicted(
    kind: str, numerics: Any, pool: Any
) -> None:
    scheme = sp.Scheme(numerics=numerics)
    setting = hf_zoo.Setting(kind, sequence_parallel=True, numerics=numerics)

    def sent(axis: sp.Axis, batch: int, length: int) -> Any:
        model = hf_zoo.cut_model(axis, setting).train()
        axis.transport.ledger.reset()
        tokens = torch.zeros(batch, length, dtype=torch.long)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        return axis.transport.ledger.as_dict()

    for degree, batch, length in ((2, 4, 10), (3, 2, 7), (8, 1, 3)):
        model = hf_zoo.meta_model(kind, torch.float32)
        plan: Any = sp.plan(model, degree=degree, scheme=scheme, sequence_parallel=True)
        found = pool(degree, "threads").run(partial(sent, batch=batch, length=length))
        for rank in range(degree):
            assert found[rank] == plan.comm(batch=batch, length=length, rank=rank)


def test_a_plan_of_ones_own_knows_no_bytes() -> None:
    plan: Any = sp.plan(net(), PLAN, degree=2, sequence_parallel=True)
    with pytest.raises(UsageError, match="the code between the layers of your own plan decides"):
        plan.comm(batch=2, length=3)
    data = plan.as_dict()
    assert "the code between the layers" in data["comm_problem"]
    assert [module["collectives"] for module in data["modules"]] == [None] * len(plan.modules)
    without: Any = sp.plan(net(), PLAN, degree=2)
    assert without.as_dict()["comm_problem"] == ""
    assert any(module["collectives"] for module in without.as_dict()["modules"])
    assert "sequence parallel: activations" in str(plan)
    assert "sequence parallel: activations" not in str(without)
    assert plan.modules == without.modules  # no rule for the model's own tp_plan is applied
    with pytest.raises(UsageError, match="sequence_parallel"):
        sp.parallelize(net(), PLAN, sp.Axis.solo(), sequence_parallel="yes")  # type: ignore[arg-type]
