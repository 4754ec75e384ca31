"""Checkpoints that are damaged, interrupted, in the way, or of something else."""

import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
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
from shardproof.checkpoint.manifest import find_damage
from shardproof.errors import MismatchError, UsageError
from test_checkpoint import cut, hashes, train, trained

Damage = Callable[[Path], Any]
WITH_TESTS = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def saved(to: Path, steps: int = 1) -> Path:
    trained(Axis.solo(), to, range(steps))
    return to


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("checkpoint") / "whole")


def edit_state(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(path: Path) -> None:
        state = json.loads((path / "shardproof.json").read_text())
        change(state)
        (path / "shardproof.json").write_text(json.dumps(state))

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
    "truncated": (cut_short, r"model.safetensors cannot be read as safetensors: .* fewer than"),
    "overlong": (lengthen, r"model.safetensors cannot be read as safetensors: .* more than the"),
    "an index that leads out": (index_outside, r"names \.\./other\.safetensors"),
    "no weights": (without("model.safetensors"), "has no weights"),
    "no state of the optimizer": (
        without("optimizer.safetensors"),
        r"do not have the tensors .* 0\.bias/exp_avg",
    ),
    "no plain data": (without("shardproof.json"), "has no state of an optimizer"),
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
    with pytest.raises(UsageError, match=r"has no tensor for 5.weight, 5.bias.*partial=True"):
        sp.load(whole, longer(), weights_only=True)
    with pytest.raises(UsageError, match=r"has 4.bias, .*for which there is no parameter"):
        sp.load(whole, shorter(), weights_only=True)
    loaded = sp.load(whole, longer(), weights_only=True, partial=True)
    assert loaded.missing == ("5.weight", "5.bias")
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
    assert os.listdir(tmp_path) == ["here"]
    assert hashes(path) == first


def test_leftovers_are_cleaned_by_the_next_save(tmp_path: Path) -> None:
    path = tmp_path / "here"
    work = directories.work_of(path)
    work.mkdir()
    (work / "model.safetensors").write_text("half")
    (work / ".lock").write_text("")
    saved(path)
    assert os.listdir(tmp_path) == ["here"]
    assert find_damage(path) == []


def test_two_runs_do_not_save_into_one_directory(tmp_path: Path) -> None:
    path = tmp_path / "here"
    other = directories.SavedDirectory(path)
    with pytest.raises(UsageError, match=r"another process saves into .*here"):
        saved(path)
    other.abandon()
    saved(path)


def test_ranks_that_save_different_things(pool: Pool, tmp_path: Path) -> None:
    def save(axis: Axis) -> None:
        model, optimizer = cut(axis)
        with pytest.raises(MismatchError, match="were given different checkpoints: for state"):
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
from test_checkpoint import cut, trained
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


SAVING = """
import sys
from pathlib import Path
import shardproof as sp
from test_checkpoint import cut, train

def save(axis):
    model, optimizer = cut(axis)
    step = sp.load(sys.argv[1], model, optimizer).step
    if axis.rank == 0:
        print("began", flush=True)
    while True:
        train(model, optimizer, range(step, step + 1))
        step += 1
        sp.save(sys.argv[1], model, optimizer, step=step)

sp.launch(save, degree=2)
"""


def test_a_save_that_is_killed_leaves_a_whole_checkpoint(tmp_path: Path, pool: Pool) -> None:
    """Killed at any moment; the checkpoint is then that of some step of the unbroken run."""
    path = tmp_path / "here"
    pool(1, "threads").run(lambda axis: trained(axis, path, range(1)))
    unbroken: dict[int, dict[str, str]] = {}
    for kill in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", SAVING, str(path)],
            stdout=subprocess.PIPE,
            env=WITH_TESTS,
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"began\n"
                time.sleep(0.05 + 0.037 * kill)
            finally:
                process.send_signal(signal.SIGKILL)
        directories.recover(path)
        assert find_damage(path) == []
        step = json.loads((path / "shardproof.json").read_text())["step"]
        unbroken[step] = hashes(path)
    assert max(unbroken) > 1
    last = max(unbroken)
    alone = tmp_path / "alone"
    pool(1, "threads").run(lambda axis: trained(axis, alone, range(last)))
    wanted, mine = hashes(alone), unbroken[last]
    assert mine["model.safetensors"] == wanted["model.safetensors"]
    assert mine["optimizer.safetensors"] == wanted["optimizer.safetensors"]


def test_a_header_that_lies(whole: Path, tmp_path: Path) -> None:
    """Lengths and offsets beyond the file, and holes, are named before anything is read."""
    path = tmp_path / "copy"
    shutil.copytree(whole, path)
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
