"""Logits of a cut model are whole to whoever looks, with labels too; the loss sends none."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_zoo import SIZES, Setting, cut_model, hash_tensor, inputs, meta_model, whole_model
from places import Pool
from shardproof import hf, optim
from shardproof.axis import Axis
from shardproof.errors import MismatchError, PlanError, RankError, ShardproofError
from shardproof.hf.cut_logits import CutLogits
from shardproof.leaves import Cut
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.plans.planning import plan
from shardproof.ranks import launch

pytest.importorskip("transformers")

IDS = inputs(Setting("llama"))["input_ids"]
LABELS = IDS[:, 1:].flatten()
DEGREES = [1, 3]


def plain(model: nn.Module, kind: str) -> nn.Module:
    """The unmodified model with the weights of a cut one at degree 1."""
    whole = whole_model(kind)
    whole.load_state_dict(
        {name: value.detach() for name, value in model.named_parameters()}, strict=False
    )
    return whole


# -- whoever looks, sees the whole -----------------------------------------------------------------


def saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


def trainer_steps(outputs: Any) -> Any:
    """What `Trainer.prediction_step` and `compute_metrics` do to them."""
    from transformers import trainer_pt_utils as utils  # noqa: PLC0415

    logits = utils.nested_detach(tuple(outputs.to_tuple()[1:2]))
    return utils.nested_numpify(utils.nested_concat(logits, logits))[0]


LOOKS: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda out: out.logits.argmax(-1),
    "accuracy": lambda out: (out.logits[:, :-1].argmax(-1) == IDS[:, 1:]).float().mean(),
    "by number": lambda out: out[1] + 0,
    "to_tuple": lambda out: out.to_tuple()[1].softmax(-1),
    "by name": lambda out: torch.topk(out["logits"], 5).indices,
    "shape": lambda out: torch.tensor(out.logits.shape),
    "size of the last dim": lambda out: torch.tensor([out.logits.size(-1), out.logits.numel()]),
    "float": lambda out: out.logits.float() * 1,
    "another dtype": lambda out: out.logits.to(torch.bfloat16).max(-1).values,
    "half, then detached": lambda out: out.logits.detach().half().sum(-1),
    "numpy": lambda out: torch.from_numpy(out.logits.detach().numpy().copy()),
    "cpu": lambda out: out.logits.cpu() * 1,
    "tolist": lambda out: torch.tensor(out.logits.tolist()),
    "item": lambda out: torch.tensor(out.logits[1, 2, 66].item()),
    "iterated": lambda out: torch.stack([row[0] for row in out.logits]),
    "indexed": lambda out: out.logits[0, 3, 60:],
    "by a list": lambda out: out.logits[:, :, [66, 1]],
    "joined": lambda out: torch.cat([out.logits, out.logits]),
    "data": lambda out: out.logits.data.sum(-1),
    "no element-wise step of ours": lambda out: out.logits.exp(),
    "two of them": lambda out: (out.logits - out.logits.detach()).abs(),
    "softmax": lambda out: F.softmax(out.logits, -1),
    "loss of every token": lambda out: F.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), LABELS, reduction="none"
    ),
    "view": lambda out: out.logits.view(-1, out.logits.shape[-1])[4],
    "where": lambda out: torch.where(out.logits > 0, out.logits, 0.0),
    "transposed": lambda out: out.logits.transpose(1, 2)[0],
    "written": lambda out: out.logits.detach().clone().masked_fill_(IDS[..., None] == 3, 7.0),
    "saved": lambda out: saved(out.logits),
    "pickled": lambda out: pickle.loads(pickle.dumps(out.logits.detach())),
    "copied": lambda out: copy.deepcopy(out.logits.detach()),
    "whole": lambda out: out.logits.whole() if isinstance(out.logits, CutLogits) else out.logits,
    "trainer": lambda out: torch.from_numpy(trainer_steps(out)),
}


def looked(axis: Axis, training: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every look at the logits of a call with labels, and at those of a call without."""
    model = cut_model(axis, Setting("gemma2")).train(training)
    others = model(IDS)
    others = type(others)(loss=torch.zeros(()), **others)
    found, wanted = {}, {}
    for name, look in LOOKS.items():
        found[name] = look(model(IDS, labels=IDS)).detach().clone()
        wanted[name] = look(others).detach().clone()
    return found, wanted


@pytest.mark.parametrize("degree", DEGREES)
def test_logits_with_labels_are_those_without(degree: int, pool: Pool) -> None:
    work = functools.partial(looked, training=degree == 3)
    for found, wanted in pool(degree, "threads").run(work):
        for name in LOOKS:
            assert type(found[name]) is Tensor, name
            assert torch.equal(found[name], wanted[name]), name


def test_processes_see_the_whole_too(pool: Pool) -> None:
    def run(axis: Axis) -> Any:
        model = cut_model(axis, Setting("llama"))
        return model(IDS, labels=IDS).logits, model(IDS).logits

    for with_labels, without in pool(2, "processes").run(run):
        assert type(with_labels) is Tensor  # what leaves a process is plain
        assert torch.equal(with_labels, without)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "llama-tied-4-2"])
def test_accuracy_is_that_of_the_unmodified_model(kind: str, pool: Pool) -> None:
    def run(axis: Axis) -> Any:
        model = cut_model(axis, Setting(kind))
        out = model(IDS, labels=IDS, return_dict=False)
        loss, logits, *_ = out
        return logits.argmax(-1), loss, model if axis.size == 1 else None

    ((ours, loss, model),) = pool(1, "threads").run(run)
    truth = plain(model, kind)(IDS, labels=IDS)
    assert torch.equal(ours, truth.logits.argmax(-1))
    torch.testing.assert_close(loss, truth.loss)
    for ours, loss, _ in pool(3, "threads").run(run):
        assert torch.equal(ours, truth.logits.argmax(-1))
        torch.testing.assert_close(loss, truth.loss)


# -- what is sent ----------------------------------------------------------------------------------


def ledgers(axis: Axis) -> list[dict[str, Any]]:
    model = cut_model(axis, Setting("gemma2")).train()
    ledger = axis.transport.ledger
    found = []
    for use in (
        lambda logits: None,
        lambda logits: f"{logits} {logits!r} {logits.shape} {logits.dtype} {len(logits)}",
        lambda logits: logits.detach().float().requires_grad,
        lambda logits: logits.part.argmax(-1),
        lambda logits: logits.argmax(-1),
        lambda logits: [logits.sum(), logits.max(), str(logits)],
    ):
        ledger.reset()
        out = model(IDS, labels=IDS)
        use(out.logits)
        out.loss.backward()
        found.append(ledger.as_dict())
    return found


def test_nothing_is_sent_for_logits_that_nobody_uses(pool: Pool) -> None:
    made = plan(meta_model("gemma2"), degree=3)
    for rank, found in enumerate(pool(3, "threads").run(ledgers)):
        silent = made.comm(batch=2, length=9, rank=rank)
        for counted in found[:4]:
            assert counted == silent
        for counted in found[4:]:  # once, however often
            more = counted["forward"]["all_gather"]["message_bytes"]
            assert more == silent["forward"]["all_gather"]["message_bytes"] + 2 * 9 * 67 * 4
            assert counted["backward"] == silent["backward"]


def test_printing_says_what_they_are(pool: Pool) -> None:
    def run(axis: Axis) -> tuple[str, str]:
        logits = cut_model(axis, Setting("llama"))(IDS, labels=IDS).logits
        first = f"{logits}" if axis.rank == 1 else ""  # by one rank alone
        logits.sum()
        return first, str(logits)

    before, after = pool(3, "threads").run(run)[1]
    assert before == (
        "CutLogits(shape=(2, 9, 67), dtype=torch.float32, of which rank 1 of 3 holds (2, 9, 24); "
        "gathered on first use, on all ranks together)"
    )
    assert after.startswith("CutLogits(tensor([[[")


def alone(axis: Axis) -> None:
    model = cut_model(axis, Setting("llama"))
    out = model(IDS, labels=IDS)
    if axis.rank == 0:
        out.logits.argmax(-1)
    out.loss.backward()


def test_one_rank_that_uses_them_alone_is_noticed() -> None:
    with pytest.raises(
        MismatchError, match=r"'lm_head' are gathered when they are first used, with labels too"
    ):
        launch(alone, degree=2, engine="threads", timeout=20)


def test_the_last_use_of_one_rank_is_noticed() -> None:
    def run(axis: Axis) -> None:
        logits = cut_model(axis, Setting("llama"))(IDS, labels=IDS).logits
        if axis.rank == 0:
            logits.argmax(-1)

    with pytest.raises(RankError, match=r"use them on every rank of the axis alike"):
        launch(run, degree=2, engine="threads", timeout=20)


def test_logits_that_outlive_their_ranks_say_so() -> None:
    def run(axis: Axis) -> Tensor:
        return cut_model(axis, Setting("llama"))(IDS, labels=IDS).logits

    logits, _ = launch(run, degree=2, engine="threads")
    with pytest.raises(ShardproofError, match=r"before `launch` returns"):
        logits.argmax(-1)


# -- gradients -------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "of one's own": lambda out: F.cross_entropy(out.logits[:, :-1].flatten(0, 1), LABELS),
    "both": lambda out: out.loss + out.logits.float().logsumexp(-1).square().mean(),
    "distillation": lambda out: F.kl_div(
        out.logits.log_softmax(-1), torch.full_like(out.logits, 1 / 67), reduction="batchmean"
    ),
    "of two uses": lambda out: out.logits.square().mean() + out.logits[..., 60:].sum(),
    "scaled": lambda out: (out.logits / 3).tanh().mul(2).square().sum() * 0.1 + out.loss,
}


def gradients(axis: Axis, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    model = cut_model(axis, Setting(kind, dtype=dtype)).train()
    found: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, loss in LOSSES.items():
        model.zero_grad()
        loss(model(IDS, labels=IDS)).backward()
        of_all = [(n, p.grad, layout) for n, p, layout, _ in optim.layouts_of(model)]
        found[name] = {n: hash_tensor(grad, layout, axis, who=n) for n, grad, layout in of_all}
        tensors[name] = {n: grad.clone() for n, grad, _ in of_all}
    return found, (tensors, model) if axis.size == 1 else None


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_gradients_of_losses_of_ones_own_are_torchs(kind: str, pool: Pool) -> None:
    work = functools.partial(gradients, kind=kind)
    ((one, (tensors, model)),) = pool(1, "threads").run(work)
    whole = plain(model, kind).train()
    for name, loss in LOSSES.items():
        whole.zero_grad()
        loss(whole(IDS, labels=IDS)).backward()
        for parameter, value in whole.named_parameters():
            ours = tensors[name][parameter]
            assert value.grad is not None
            atol = 2e-6 * float(value.grad.abs().max())
            torch.testing.assert_close(ours, value.grad, rtol=1e-4, atol=atol)
    found, _ = pool(3, "threads").run(work)[0]
    assert found == one


def test_gradients_of_the_logits_themselves(pool: Pool) -> None:
    def run(axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
        model = cut_model(axis, Setting("llama"))
        out = model(IDS, labels=IDS)
        (asked,) = torch.autograd.grad(out.loss, out.logits, retain_graph=True)
        out.logits.retain_grad()
        seen = []
        out.logits.register_hook(lambda grad: seen.append(grad.clone()))
        out.loss.backward()
        return asked.clone(), out.logits.grad.clone(), seen[0]

    logits = pool(1, "threads").run(lambda axis: cut_model(axis, Setting("llama"))(IDS).logits)[0]
    truth = logits.detach().requires_grad_()
    F.cross_entropy(truth[:, :-1].flatten(0, 1), LABELS).backward()
    for grads in pool(3, "threads").run(run):
        for grad in grads:
            torch.testing.assert_close(grad, truth.grad, rtol=1e-4, atol=1e-7)


WRITES: dict[str, Callable[[Any], Tensor]] = {
    "scaled": lambda logits: logits.mul_(2.0),
    "masked": lambda logits: logits.masked_fill_(IDS[..., None] == 3, -1.0),
    "set": lambda logits: logits.__setitem__((slice(None), slice(None), [1, 66]), -2.0),
    "a view": lambda logits: logits[0].mul_(3.0),
    "a row set": lambda logits: logits.__setitem__((0, 1), 5.0),
    "added to": lambda logits: logits.add_(logits.detach().clone()),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_into_logits_is_written(write: str, pool: Pool) -> None:
    def run(axis: Axis) -> tuple[Tensor, Tensor | None, Tensor]:
        cut = Cut(67, 8, axis.size)
        owned = cut.owned(axis.rank)
        x = torch.linspace(-3, 3, 2 * 9 * 67).view(2, 9, 67)
        part = x[..., owned.start : owned.stop].clone().requires_grad_()
        logits = CutLogits.of(part * 1, axis=axis, cut=cut, who="head")
        WRITES[write](logits)
        logits.square().sum().backward()
        whole = x.clone().requires_grad_()
        truth = whole * 1
        WRITES[write](truth)
        truth.square().sum().backward()
        assert part.grad is not None
        assert whole.grad is not None
        assert torch.equal(logits.whole(), truth)
        assert torch.equal(logits.part, truth[..., owned.start : owned.stop])
        return part.grad, whole.grad[..., owned.start : owned.stop], logits

    for ours, truth, _ in pool(3, "threads").run(run):
        assert torch.equal(ours, truth)


def test_steps_on_a_part_have_the_bits_of_the_whole(pool: Pool) -> None:
    """What models do to logits before the loss, at widths that no vector divides."""
    steps: list[Callable[[Tensor], Tensor]] = [
        lambda x: x / 30.0,
        lambda x: x * 0.37,
        torch.tanh,
        lambda x: torch.tanh(x / 3.0) * 3.0,
        torch.neg,
        lambda x: x + x,
        lambda x: x.to(torch.bfloat16) * 0.3,
        lambda x: x * torch.tensor(0.7),
    ]

    def run(axis: Axis) -> None:
        for size in (67, 131, 1031):
            cut = Cut(size, 8, axis.size)
            owned = cut.owned(axis.rank)
            x = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
            for step in steps:
                whole = x.clone().requires_grad_()
                logits = CutLogits.of(
                    whole[:, owned.start : owned.stop], axis=axis, cut=cut, who="head"
                )
                made = step(logits)
                assert isinstance(made, CutLogits)
                assert made._shard.part is not None  # nothing has been gathered
                assert torch.equal(made.whole(), step(x))
                made.float().square().sum().backward()
                other = x.clone().requires_grad_()
                step(other).float().square().sum().backward()
                assert whole.grad is not None
                assert other.grad is not None
                mine = slice(owned.start, owned.stop)
                assert torch.equal(whole.grad[:, mine], other.grad[:, mine])

    for degree in DEGREES:
        pool(degree, "threads").run(run)


# -- forwards of models ----------------------------------------------------------------------------


def masking_model(**options: Any) -> Any:
    """A Llama that hides tokens between its head and its loss, as Chameleon does."""
    import transformers  # noqa: PLC0415

    class MaskedForCausalLM(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            hidden = self.model(input_ids, **kwargs).last_hidden_state
            logits = self.lm_head(hidden)
            logits[:, :, [1, 40, 66]] = -10.0
            logits = logits[:, 1:, :].contiguous()
            loss = None
            if labels is not None:
                loss = self.loss_function(logits, labels[:, 1:], vocab_size=67)
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    return MaskedForCausalLM(transformers.LlamaConfig(**SIZES), **options)


def masked(axis: Axis) -> Any:
    with torch.device("meta"):
        model = masking_model()
    model = initialize(parallelize(model, None, axis))
    out = model(IDS, labels=IDS)
    out.loss.backward()
    grads = {
        name: hash_tensor(p.grad, layout, axis, who=name)
        for name, p, layout, _ in optim.layouts_of(model)
    }
    return out.loss.detach(), out.logits.detach().clone(), grads, model if axis.size == 1 else None


def test_a_forward_that_writes_into_its_logits_is_right(pool: Pool) -> None:
    ((loss, logits, grads, model),) = pool(1, "threads").run(masked)
    whole = masking_model()
    whole.load_state_dict({n: p.detach() for n, p in model.named_parameters()}, strict=False)
    truth = whole(IDS, labels=IDS)
    truth.loss.backward()
    torch.testing.assert_close(loss, truth.loss)
    torch.testing.assert_close(logits, truth.logits)
    for name, parameter in whole.named_parameters():
        ours = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)
    for degree in (3, 8):
        other_loss, other_logits, other_grads, _ = pool(degree, "threads").run(masked)[0]
        assert torch.equal(other_loss, loss)
        assert torch.equal(other_logits, logits)
        assert other_grads == grads


def test_forward_called_by_its_name_has_a_loss(pool: Pool) -> None:
    """Hooks do not run then: logits come whole, and the loss is that of whole logits."""

    def run(axis: Axis) -> Tensor:
        model = cut_model(axis, Setting("llama"))
        found: Tensor = model.forward(IDS, labels=IDS).loss
        assert torch.equal(found, model(IDS, labels=IDS).loss)
        return found.detach()

    assert (
        len({float(loss) for degree in DEGREES for loss in pool(degree, "threads").run(run)}) == 1
    )


def test_a_head_put_in_afterwards_has_a_loss(pool: Pool) -> None:
    head = nn.Linear(32, 67, bias=False)

    def run(axis: Axis) -> tuple[Tensor, Tensor]:
        model = cut_model(axis, Setting("llama"))
        model.set_output_embeddings(copy.deepcopy(head))
        out = model(IDS, labels=IDS)
        out.loss.backward()
        grad = model.lm_head.weight.grad
        own = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), LABELS)
        return (own - out.loss).detach(), grad

    ((_, one),) = pool(1, "threads").run(run)
    for difference, grad in pool(3, "threads").run(run):
        assert abs(difference) < 1e-5
        assert torch.equal(grad, one)


# -- other outputs ---------------------------------------------------------------------------------


def test_hidden_states_are_whole(pool: Pool) -> None:
    def run(axis: Axis) -> Any:
        model = cut_model(axis, Setting("llama"))
        out = model(IDS, labels=IDS, output_hidden_states=True)
        return [x.detach() for x in out.hidden_states], model if axis.size == 1 else None

    ((one, model),) = pool(1, "threads").run(run)
    truth = plain(model, "llama")(IDS, output_hidden_states=True).hidden_states
    for ours, theirs in zip(one, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for states, _ in pool(3, "threads").run(run):
        assert all(map(torch.equal, states, one))


CLASSIFIERS = ("LlamaForSequenceClassification", "LlamaForTokenClassification")


def classifier(name: str) -> nn.Module:
    import transformers  # noqa: PLC0415

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = transformers.LlamaConfig(**(SIZES | {"pad_token_id": 0}), num_labels=11)
        model: nn.Module = getattr(transformers, name)(config)
    return model.eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_other_heads_give_whole_logits(name: str, pool: Pool) -> None:
    whole = classifier(name)
    labels = torch.tensor([3, 10]) if "Sequence" in name else IDS % 11
    truth = whole(IDS, labels=labels)

    def run(axis: Axis) -> tuple[Tensor, Tensor]:
        out = parallelize(copy.deepcopy(whole), None, axis)(IDS, labels=labels)
        return out.loss.detach(), out.logits.detach()

    for degree in (1, 3):
        for loss, logits in pool(degree, "threads").run(run):
            torch.testing.assert_close(logits, truth.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(loss, truth.loss)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_head_whose_logits_nobody_would_gather_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=r"module 'score' .* ColumnParallel\(gather_output=True\)"):
        plan(classifier(name), {"score": "colwise"}, degree=2)
    plan(classifier(name), {"score": "colwise_gather_output"}, degree=2)


def test_cut_logits_are_public() -> None:
    assert hf.CutLogits is CutLogits
