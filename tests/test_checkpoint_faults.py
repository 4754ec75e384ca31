"""Checkpoints that are damaged, interrupted, in the way, or of something else."""

import copy
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardproof as sp
import warm
from places import Pool
from shardproof.axis import Axis
from shardproof.checkpoint import directory as directories
from shardproof.checkpoint.manifest import find_damage, root_of
from shardproof.errors import MismatchError, UsageError
from shardproof.prover.case import CaseRun
from shardproof.prover.cases.transformers_models import ModelSource, make_llama
from test_checkpoint import STYLES, WHOLE, cut, hashes, train, trained

Damage = Callable[[Path], Any]
WITH_TESTS = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def saved(to: Path, steps: int = 1) -> Path:
    trained(Axis.solo(), to, range(steps))
    return to


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("checkpoint") / "whole")


def edit_state(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change shardproof.json; the manifest is made to agree, as a writer of the format would."""

    def damage(path: Path) -> None:
        state = json.loads((path / "shardproof.json").read_text())
        change(state)
        text = json.dumps(state).encode()
        (path / "shardproof.json").write_bytes(text)
        digest = hashlib.sha256(text).hexdigest()
        entry = {"bytes": len(text), "tensors": {"": [digest]}}
        edit_manifest(lambda content: content["files"].update({"shardproof.json": entry}))(path)

    return damage


def edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the manifest, and its root hash with it unless the change is about that."""

    def damage(path: Path) -> None:
        file = path / "shardproof.manifest.json"
        content = json.loads(file.read_text())
        root = content["root"]
        change(content)
        if content["root"] == root:
            content["root"] = root_of(content)
        file.write_text(json.dumps(content))

    return damage


def cut_short(path: Path) -> None:
    os.truncate(path / "model.safetensors", 700)


def lengthen(path: Path) -> None:
    with open(path / "model.safetensors", "ab") as file:
        file.write(b"more")


def index_outside(path: Path) -> None:
    index = {"weight_map": {"0.weight": "../other.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def without(name: str) -> Damage:
    return lambda path: (path / name).unlink()


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a newer version": (
        edit_state(lambda s: s.update(version=2)),
        r"version 2, .* Install a newer",
    ),
    "another format": (edit_state(lambda s: s.update(format="x")), "not the state of a checkpoint"),
    "no step": (edit_state(lambda s: s.pop("step")), "not the state of a checkpoint"),
    "a step that is text": (edit_state(lambda s: s.update(step="3")), "not the state of a check"),
    "draws of other modules": (edit_state(lambda s: s.update(draws={"9": 1})), r"modules: 2, 9\."),
    "draws below zero": (edit_state(lambda s: s.update(draws={"2": -1})), "not counts"),
    "an optimizer of another class": (
        edit_state(lambda s: s["optimizer"].update({"class": "SGD"})),
        r"the state of 'SGD', and the optimizer is AdamW",
    ),
    "no groups": (edit_state(lambda s: s["optimizer"].pop("groups")), "the optimizer of .* is"),
    "a group more": (
        edit_state(lambda s: s["optimizer"]["groups"].append(s["optimizer"]["groups"][0])),
        "has 2 groups of parameters, and this one 1",
    ),
    "a parameter of another name": (
        edit_state(lambda s: s["optimizer"]["groups"][0]["parameters"].append("5.bias")),
        r"other parameters than this one: 5\.bias",
    ),
    "truncated": (cut_short, r"model.safetensors has 700 bytes, and [\d,]+ in the manifest"),
    "overlong": (lengthen, r"model.safetensors has [\d,]+ bytes, and [\d,]+ in the man"),
    "an index that leads out": (index_outside, r"names \.\./other\.safetensors"),
    "no weights": (
        without("model.safetensors"),
        r"model.safetensors, which the manifest lists, cannot be read",
    ),
    "no state of the optimizer": (
        without("optimizer.safetensors"),
        r"optimizer.safetensors, which the manifest lists, cannot be read",
    ),
    "no plain data": (without("shardproof.json"), r"has no shardproof\.json"),
    "no manifest": (without("shardproof.manifest.json"), "manifest.json cannot be read"),
    "a manifest that leads out": (
        edit_manifest(lambda m: m["files"].update({"../x": m["files"]["shardproof.json"]})),
        r"names '\.\./x', which is outside",
    ),
    "a manifest of another form": (
        edit_manifest(lambda m: m["files"].update({"x": 3})),
        "has 3 for 'x'",
    ),
    "a manifest that does not agree with itself": (
        edit_manifest(lambda m: m.update(version=1, root="0")),
        "its root hash is not that of its lines",
    ),
    "an edited file": (
        lambda path: (path / "shardproof.json").write_text(
            (path / "shardproof.json").read_text().replace('"step": 1', '"step": 2')
        ),
        "is not the file that the manifest lists",
    ),
    "an option of another form": (
        edit_state(lambda s: s["optimizer"]["groups"][0]["options"].update(lr={"float": "x"})),
        "is no value of a checkpoint",
    ),
    "extra of another form": (
        edit_state(lambda s: s.update(extra={"dict": [1]})),
        "has a shardproof.json of another form",
    ),
    "no values": (
        edit_state(lambda s: s["optimizer"].pop("values")),
        "has a shardproof.json of another form",
    ),
    "an optimizer that is a list": (
        edit_state(lambda s: s.update(optimizer=[1])),
        "the optimizer of .* is",
    ),
    "not there": (shutil.rmtree, "is no directory"),
}


@pytest.mark.parametrize("label", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_changed(
    label: str, whole: Path, tmp_path: Path
) -> None:
    damage, says = DAMAGES[label]
    path = tmp_path / "copy"
    shutil.copytree(whole, path)
    damage(path)
    model, optimizer = cut(Axis.solo())
    train(model, optimizer, range(3))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    moments = {key: value["exp_avg"].clone() for key, value in optimizer.state.items()}
    with pytest.raises(UsageError, match=says) as raised:
        sp.load(path, model, optimizer)
    assert str(path) in str(raised.value) or "optimizer" in str(raised.value)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(torch.equal(optimizer.state[key]["exp_avg"], each) for key, each in moments.items())


def wider() -> nn.Module:
    model, _ = cut(Axis.solo())
    model[4] = nn.BatchNorm1d(12)
    return model


def longer() -> nn.Module:
    model, _ = cut(Axis.solo())
    model.append(nn.Linear(10, 2))
    return model


def shorter() -> nn.Module:
    model, _ = cut(Axis.solo())
    del model[4]
    return model


def test_a_model_that_is_not_the_one_saved(whole: Path) -> None:
    with pytest.raises(UsageError, match=r"'4.weight' has shape \(10,\) in .*, and \(12,\) in"):
        sp.load(whole, wider(), weights_only=True)
    with pytest.raises(UsageError, match=r"has no tensor for 5.bias, 5.weight.*partial=True"):
        sp.load(whole, longer(), weights_only=True)
    with pytest.raises(UsageError, match=r"has 4.bias, .*for which there is no parameter"):
        sp.load(whole, shorter(), weights_only=True)
    loaded = sp.load(whole, longer(), weights_only=True, partial=True)
    assert loaded.missing == ("5.bias", "5.weight")
    loaded = sp.load(whole, shorter(), weights_only=True, partial=True)
    assert set(loaded.unexpected) >= {"4.weight", "4.bias", "4.running_mean"}


def test_what_is_left_out_must_be_asked_for(whole: Path, tmp_path: Path) -> None:
    model, optimizer = cut(Axis.solo())
    with pytest.raises(UsageError, match=r"no optimizer is given.*weights_only=True"):
        sp.load(whole, model)
    with pytest.raises(UsageError, match="Leave one out"):
        sp.load(whole, model, optimizer, weights_only=True)
    assert sp.load(whole, model, weights_only=True).step == 1
    sp.save(tmp_path / "weights", model)
    with pytest.raises(UsageError, match="has no state of an optimizer"):
        sp.load(tmp_path / "weights", model, optimizer)


def test_another_contract_is_said_aloud(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(whole, path)
    edit_state(lambda state: state.update(contract="tree-0 leaves=4"))(path)
    model, optimizer = cut(Axis.solo())
    with pytest.warns(UserWarning, match=r"saved under the contract 'tree-0 leaves=4'"):
        assert not sp.load(path, model, optimizer).is_same_contract


# -- the directory ---------------------------------------------------------------------------------


def test_what_is_in_the_way_is_left_alone(tmp_path: Path, pool: Pool) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/letter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "folder")

    def save(axis: Axis) -> list[str]:
        model, _ = cut(axis)
        said = []
        for name in ("folder", "file", "link"):
            with pytest.raises(UsageError, match="exists and is no") as raised:
                sp.save(tmp_path / name, model)
            said.append(str(raised.value))
        return said

    first, second = pool(2, "threads").run(save)
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert (tmp_path / "folder/letter.txt").read_text() == "mine"


def test_a_checkpoint_is_replaced_and_an_empty_directory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "here"
    path.mkdir()
    first = hashes(saved(path))
    assert hashes(saved(path, 2)) != first
    assert os.listdir(tmp_path) == ["here"]


def test_an_interrupted_replacement_is_finished(tmp_path: Path) -> None:
    """Between the two renames, and before the old one is removed."""
    path = saved(tmp_path / "here")
    first = hashes(path)
    previous = directories.previous_of(path)
    os.rename(path, previous)
    model, optimizer = cut(Axis.solo())
    assert sp.load(path, model, optimizer).step == 1
    shutil.copytree(path, previous)
    assert sp.load(path, model, optimizer).step == 1
    assert hashes(path) == first
    assert hashes(saved(path, 2)) != first
    assert os.listdir(tmp_path) == ["here"]


def test_leftovers_are_cleaned_by_the_next_save(tmp_path: Path) -> None:
    path = tmp_path / "here"
    work = directories.work_of(path)
    work.mkdir()
    (work / "model.safetensors").write_text("half")
    (work / ".lock").write_text("")
    saved(path)
    assert os.listdir(tmp_path) == ["here"]
    assert find_damage(path) == []


def test_what_is_not_ours_is_never_removed(tmp_path: Path) -> None:
    """Files beside a checkpoint in its directory, and directories with the names of leftovers."""
    path = saved(tmp_path / "here")
    saved(path / "step-1")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"files that its .* does not list: notes.txt, step-1/"):
        saved(path, 2)
    shutil.rmtree(path / "step-1")
    (path / "notes.txt").unlink()
    first = hashes(path)
    for name in (".here.saving", ".here.previous", ".here.removing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter.txt").write_text("mine")
        with pytest.raises(UsageError, match=r"Move it|is no checkpoint"):
            saved(path, 2)
        assert (tmp_path / name / "letter.txt").read_text() == "mine"
        shutil.rmtree(tmp_path / name)
        (tmp_path / name).symlink_to(tmp_path)
        with pytest.raises(UsageError, match=r"Move it|is no directory"):
            saved(path, 2)
        (tmp_path / name).unlink()
    assert hashes(path) == first


def test_a_load_waits_for_the_end_of_a_replacement(tmp_path: Path) -> None:
    """Another process is between the two renames, and holds the lock."""
    path = saved(tmp_path / "here")
    other = directories.SavedDirectory(path)
    os.rename(path, directories.previous_of(path))
    thread = threading.Timer(0.3, lambda: os.rename(directories.previous_of(path), path))
    thread.start()
    model, optimizer = cut(Axis.solo())
    assert sp.load(path, model, optimizer).step == 1
    thread.join()
    other.abandon()
    assert os.listdir(tmp_path) == ["here"]


class OfOneTensor(torch.optim.SGD):
    """An optimizer with state that no parameter has."""

    def step(self, closure: Any = None) -> None:
        self.state["all"] = torch.zeros(3)


def test_state_that_would_be_lost_is_refused(pool: Pool, tmp_path: Path) -> None:
    def flat(axis: Axis) -> None:
        model, optimizer = cut(axis)
        for parameter in model.parameters():
            optimizer.state[parameter]["flat"] = torch.zeros(parameter.numel() + 1)
        with pytest.raises(UsageError, match="nothing says how the state is cut"):
            sp.save(tmp_path / "here", model, optimizer)
        whole = OfOneTensor(model.parameters(), lr=0.1)
        whole.state["all"] = torch.zeros(3)
        with pytest.raises(UsageError, match="'all', which belongs to no parameter"):
            sp.save(tmp_path / "here", model, whole)

    pool(2, "threads").run(flat)
    assert os.listdir(tmp_path) == []


def test_parameters_that_differ_between_ranks_are_not_blended(pool: Pool, tmp_path: Path) -> None:
    def save(axis: Axis) -> None:
        model, _ = cut(axis)
        with torch.no_grad():
            model[3].bias += axis.rank
        with pytest.raises(MismatchError, match=r"different checkpoints: for tensor 3\.bias"):
            sp.save(tmp_path / "here", model)

    pool(2, "threads").run(save)
    assert os.listdir(tmp_path) == []


def test_shared_heads_that_differ_between_ranks_are_refused(tmp_path: Path, pool: Pool) -> None:
    """Three ranks hold the two key-value heads; rank 1 has its own copy of one of them."""
    pytest.importorskip("transformers")

    def save(axis: Axis) -> str:
        run = CaseRun(axis=axis, scheme=sp.Scheme(), seed=1, recorder=None)  # type: ignore[arg-type]
        model = ModelSource(make_llama).build(run, dropout=0.0)
        sp.save(tmp_path / "equal", model)
        if axis.rank == 1:
            with torch.no_grad():
                model.get_parameter("model.layers.0.self_attn.k_proj.weight").add_(1.0)
        with pytest.raises(MismatchError) as raised:
            sp.save(tmp_path / "differing", model)
        return str(raised.value)

    said = pool(3, "threads").run(save)
    assert len(set(said)) == 1
    assert re.search(r"both hold .* of 'model.layers.0.self_attn.k_proj.weight'", said[0])
    assert os.listdir(tmp_path) == ["equal"]


def test_an_error_of_rank_0_alone_reaches_all(pool: Pool, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "templates").mkdir()
            (folder / "templates/one.jinja").write_text("x")
            raise LookupError("no vocabulary")

    def save(axis: Axis) -> str:
        with pytest.raises((LookupError, UsageError)) as raised:
            sp.save(tmp_path / "here", cut(axis)[0], tokenizer=Tokenizer())
        return f"{type(raised.value).__name__}: {raised.value}"

    first, second = pool(2, "threads").run(save)
    assert first == "LookupError: no vocabulary"
    assert second.endswith("failed: LookupError: no vocabulary.")
    assert os.listdir(tmp_path) == []


def test_another_seed_is_said_aloud_and_other_leaves_too(whole: Path) -> None:
    def other(**scheme: int) -> nn.Module:
        copied = copy.deepcopy(WHOLE)
        return sp.parallelize(copied, STYLES, Axis.solo(), scheme=sp.Scheme(**scheme))

    model = other(seed=1)
    with pytest.warns(UserWarning, match=r"scheme .*'seed': 0.*'seed': 1"):
        assert not sp.load(whole, model, torch.optim.AdamW(model.parameters())).is_same_contract
    # The seed is of dropout, which begins anew with weights alone.
    assert sp.load(whole, other(seed=1), weights_only=True).is_same_contract
    with pytest.warns(UserWarning, match=r"leaves=8.*leaves=4"):
        assert not sp.load(whole, other(leaves=4), weights_only=True).is_same_contract


def test_two_runs_do_not_save_into_one_directory(tmp_path: Path) -> None:
    path = tmp_path / "here"
    other = directories.SavedDirectory(path)
    with pytest.raises(UsageError, match=r"another save into .*here goes on"):
        saved(path)
    other.abandon()
    saved(path)


def test_ranks_that_save_different_things(pool: Pool, tmp_path: Path) -> None:
    def save(axis: Axis) -> None:
        model, optimizer = cut(axis)
        with pytest.raises(
            MismatchError,
            match="for step, rank 0 has 0, rank 1 has 1",
        ):
            sp.save(tmp_path / "here", model, optimizer, step=axis.rank)

    pool(3, "threads").run(save)
    assert os.listdir(tmp_path) == []


def test_what_is_no_plain_data_is_refused(tmp_path: Path) -> None:
    model, optimizer = cut(Axis.solo())
    with pytest.raises(UsageError, match=r"extra is .* which is not plain data"):
        sp.save(tmp_path / "here", model, optimizer, extra={"scheduler": object()})
    model.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(UsageError, match=r"cannot save odd \(torch.complex128\)"):
        sp.save(tmp_path / "here", model, optimizer)
    assert os.listdir(tmp_path) == []


FULL = """
import resource, signal, sys
from pathlib import Path
import pytest
import shardproof as sp
from shardproof.errors import UsageError
from test_checkpoint import STYLES, WHOLE, cut, trained
path = Path(sys.argv[1])
trained(sp.Axis.solo(), path, range(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def save(axis):
    model, optimizer = cut(axis)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    with pytest.raises(UsageError) as raised:
        sp.save(path, model, optimizer)
    return str(raised.value)

print(*sp.launch(save, degree=2), sep="\\n")
"""


def test_a_full_disk_is_an_error_on_all_ranks_and_the_old_one_stays(tmp_path: Path) -> None:
    """The largest file that the process may write stands for the room on the disk."""
    path = tmp_path / "here"
    done = warm.run([sys.executable, "-c", FULL, str(path)], env=WITH_TESTS)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert re.search(r"saving .*here failed: File too large\.", first)
    assert os.listdir(tmp_path) == ["here"]
    assert find_damage(path) == []


def save_without_room(axis: Axis, path: Path) -> str:
    """Save; rank 1 may write no bytes beyond the first 2,000 of a file."""
    model, optimizer = cut(axis)
    if axis.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    with pytest.raises(UsageError) as raised:
        sp.save(path, model, optimizer)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return str(raised.value)


def test_a_rank_that_cannot_write_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    path = saved(tmp_path / "here")
    first = hashes(path)
    said = sp.launch(lambda axis: save_without_room(axis, path), degree=2, engine="processes")
    assert said[0] == said[1]
    assert re.search(r"writing .*model.safetensors failed at .*: File too large\.", said[0])
    assert os.listdir(tmp_path) == ["here"]
    assert hashes(path) == first


SAVING = """
import sys
import shardproof as sp
from test_checkpoint import cut, train

axis = sp.Axis.from_env()
model, optimizer = cut(axis)
step = sp.load(sys.argv[1], model, optimizer).step
while True:
    train(model, optimizer, range(step, step + 1))
    step += 1
    if axis.rank == 0:
        print(step, flush=True)
    sp.save(sys.argv[1], model, optimizer, step=step)
"""
RANKS = 3
SAVE_SECONDS = 0.04  # about as long as a save takes


def killed_in_a_save(path: Path, *, rank: int, saves: int, delay: float) -> None:
    """Ranks that train and save; one of them is killed some time after the last save began."""
    command = [sys.executable, "-c", SAVING, str(path)]
    ranks = warm.start_ranks(command, ranks=RANKS, env=WITH_TESTS)
    try:
        for _ in range(saves):
            line = ranks[0].stdout.readline()
            assert line.strip().isdigit(), line + ranks[0].communicate(30.0)[1]
        time.sleep(delay)
        os.kill(ranks[rank].pid, signal.SIGKILL)
    finally:
        for each in ranks:
            each.close()


def test_a_save_that_is_killed_leaves_a_whole_checkpoint(
    tmp_path: Path, pool: Pool, request: pytest.FixtureRequest
) -> None:
    """Each rank in turn; the checkpoint is then that of some step of the unbroken run."""
    path, alone = tmp_path / "here", tmp_path / "alone"

    def go_on(axis: Axis, to: Path, first: int, last: int) -> None:
        model, optimizer = cut(axis)
        if first:
            sp.load(to, model, optimizer)
        train(model, optimizer, range(first, last))
        sp.save(to, model, optimizer, step=last)

    for each in (path, alone):
        pool(1, "threads").run(lambda axis, each=each: go_on(axis, each, 0, 1))
    chance, hits, last = random.Random(0), 0, 1
    num_kills = request.config.getoption("--kills")
    for kill in range(num_kills):
        delay = chance.random() * SAVE_SECONDS
        killed_in_a_save(path, rank=kill % RANKS, saves=1 + kill % 2, delay=delay)
        hits += (tmp_path / ".here.saving").exists()
        directories.wait_for_name(path)
        assert find_damage(path) == []
        step = json.loads((path / "shardproof.json").read_text())["step"]
        pool(1, "threads").run(lambda axis, first=last, step=step: go_on(axis, alone, first, step))
        last = step
        (path / ".lock").unlink(missing_ok=True)  # it was killed after the rename
        assert hashes(path) == hashes(alone), f"after kill {kill}, at step {step}"
    assert last > 1
    assert hits >= num_kills // 4, f"{hits} of {num_kills} kills hit a save"
    sys.stdout.write(f"{hits} of {num_kills} kills hit a save; {last} steps\n")


def test_a_header_that_lies(whole: Path, tmp_path: Path) -> None:
    """Lengths and offsets beyond the file, and holes, are named before anything is read."""
    path = tmp_path / "copy"
    path.mkdir()
    shutil.copy(whole / "model.safetensors", path)
    data = (path / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")
    for change in (
        {"data_offsets": [0, 10**15]},
        {"data_offsets": [8, 8 + header[name]["data_offsets"][1]]},
        {"dtype": "F99"},
        {"shape": [-1]},
        {"shape": "long"},
    ):
        text = json.dumps(header | {name: header[name] | change}).encode()
        lying = struct.pack("<Q", len(text)) + text + data[8 + size :]
        (path / "model.safetensors").write_bytes(lying)
        with pytest.raises(UsageError, match="cannot be read as safetensors"):
            sp.load(path, cut(Axis.solo())[0], weights_only=True)
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + data)
    with pytest.raises(UsageError, match="cannot be read as safetensors"):
        sp.load(path, cut(Axis.solo())[0], weights_only=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 24  # KiB


def test_verify_names_the_damaged_tensor_and_exits_with_1(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(whole, path)
    command = [sys.executable, "-m", "shardproof", "checkpoint", "verify"]
    report = tmp_path / "report.json"
    done = warm.run([*command, str(path)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("whole: 3 files, ")
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-1] ^= 64
    (path / "optimizer.safetensors").write_bytes(data)
    done = warm.run([*command, str(path), "--json", str(report)])
    assert done.returncode == 1
    assert re.match(r"damaged: tensor '.*' in optimizer.safetensors: bytes", done.stdout)
    assert json.loads(report.read_text())["damaged"][0]["file"] == "optimizer.safetensors"
    done = warm.run([*command, str(tmp_path / "no")])
    assert (done.returncode, "is no directory" in done.stderr) == (2, True)
