"""A directory of a model may hold anything: what is no config, index or weights is one error.

Weights are cast between floating-point dtypes alone; files lie in the directory, or are links.
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from foreign import LONGEST, in_time, odd_files, outcomes
from shardproof import hf
from shardproof.cli.main import main
from shardproof.errors import UsageError
from shardproof.hf.config import MOST_LAYERS, read_config
from shardproof.prover.cases.transformers_models import checkpoint_case

transformers = pytest.importorskip("transformers")
CONFIG, FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"
SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as transformers saves it."""
    directory = tmp_path_factory.mktemp("model")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def fresh(saved: Path, tmp_path: Path) -> Callable[[], Path]:
    """Copies of that directory, of which one is left at a time."""

    def make() -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        return Path(shutil.copytree(saved, copy))

    return make


_MODEL: list[nn.Module] = []


def model() -> nn.Module:
    if not _MODEL:
        _MODEL.append(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))
    return _MODEL[0]


def load(directory: object) -> nn.Module:
    return hf.load(model(), directory)  # type: ignore[arg-type]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file  # noqa: PLC0415

    return dict(load_file(str(directory / FILE)))


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file(tensors, str(path))


def plan(directory: Path) -> str:
    """What `shardproof plan` says, which is to be an error."""
    with in_time():
        result = CliRunner().invoke(main, ["plan", str(directory), "--degree", "2"])
    assert result.exit_code == 2, result.output[-300:]
    assert len(result.stderr) < LONGEST
    return result.stderr


# Paths


def test_a_path_that_is_no_directory_of_a_model_is_refused(tmp_path: Path) -> None:
    paths = {label: path for label, (path, _) in odd_files(tmp_path).items()}
    says = "no directory|has no config.json|the directory is"
    assert outcomes({label: (lambda p=p: load(p), says) for label, p in paths.items()}) == {}


@pytest.mark.parametrize("name", [CONFIG, FILE, INDEX])
def test_a_file_that_is_none_is_refused(
    name: str, fresh: Callable[[], Path], tmp_path: Path
) -> None:
    for label, (target, says) in odd_files(tmp_path).items():
        if label in ("a long name", "a long path", "a zero byte", "an empty name", "a half letter"):
            continue  # no link can lead there
        directory = fresh()
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)
        if label != "memory" or name == FILE:
            says = f"{name}.*({says}|cannot be read)"
            assert outcomes({label: (lambda d=directory: load(d), says)}) == {}


# Weights


REFUSED = ["int8", "int32", "int64", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", REFUSED)
def test_weights_that_are_no_floating_point_numbers_are_refused(
    dtype: str, fresh: Callable[[], Path]
) -> None:
    directory = fresh()
    tensors = weights(directory)
    tensors[NORM] = tensors[NORM].to(getattr(torch, dtype))
    write(directory / FILE, tensors)
    before = model().get_parameter("model.embed_tokens.weight").clone()
    says = f"{NORM!r} has dtype .*, and float32 in the model. Only F64, F32, F16, BF16 are cast"
    table = {"load": (lambda: load(directory), says)}
    table["prove"] = (lambda: checkpoint_case(directory), says)
    assert outcomes(table) == {}
    assert torch.equal(model().get_parameter("model.embed_tokens.weight"), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_floating_point_dtypes_are_cast_as_torch_casts(
    dtype: torch.dtype, fresh: Callable[[], Path]
) -> None:
    directory = fresh()
    tensors = weights(directory)
    tensors[NORM] = (tensors[NORM] + torch.arange(16) / 7).to(dtype)
    write(directory / FILE, tensors)
    assert torch.equal(load(directory).get_parameter(NORM), tensors[NORM].float())


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_a_file_that_is_no_safetensors_is_refused(fresh: Callable[[], Path]) -> None:
    directory = fresh()
    content = (directory / FILE).read_bytes()
    header, body = header_of(content)

    def changed(**changes: Any) -> bytes:
        return with_header(header | {NORM: header[NORM] | changes}, body)

    contents = {
        "empty": b"",
        "seven bytes": b"1234567",
        "cut in its numbers": content[:-10],
        "cut in its header": content[:50],
        "longer than its header says": content + b"x" * 100,
        "a header without end": struct.pack("<Q", 2**63) + b"{}",
        "a header of 200 MB": struct.pack("<Q", 2 * 10**8) + b" " * 100,
        "lists nested deep": with_header(b"[" * 100_000, body),
        "objects nested deep": with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, body),
        "no JSON": with_header(b"xxxx", body),
        "a list": with_header([1], body),
        "no text": with_header(b"\xff\xfe", body),
        "numbers that overlap": changed(data_offsets=[0, 64]),
        "numbers out of range": changed(data_offsets=[10**12, 10**12 + 64]),
        "numbers before the start": changed(data_offsets=[-64, 0]),
        "an unknown dtype": changed(dtype="Q7"),
        "a shape that overflows": changed(shape=[2**62, 2**62]),
        "a shape below zero": changed(shape=[-16]),
        "a shape of nothing": changed(shape=[0]),
    }
    wrong = {}
    for label, data in contents.items():
        (directory / FILE).write_bytes(data)
        says = f"{FILE} cannot be read as safetensors: .* Fetch the whole checkpoint"
        wrong |= outcomes({label: (lambda: load(directory), says)})
    assert wrong == {}


def test_tensors_that_are_not_those_of_the_model_are_refused(fresh: Callable[[], Path]) -> None:
    whole = weights(fresh())
    less = {name: tensor for name, tensor in whole.items() if name != NORM}
    sets: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "one is missing": (less, f"has no tensor for 1 parameters .*{NORM}"),
        "one too many": ({**whole, "x.y": torch.ones(2)}, "has 1 tensors that .*: x.y"),
        "another shape": ({**whole, NORM: torch.ones(17)}, r"shape \(17,\) in .*, and \(16,\) in"),
        "none": ({}, "has no tensor for"),
        "very many": (
            {**whole, **{f"k{place}": torch.ones(1) for place in range(5000)}},
            "has 5000 tensors that .*and 4,995 more",
        ),
    }
    wrong = {}
    for label, (tensors, says) in sets.items():
        directory = fresh()
        write(directory / FILE, tensors)
        wrong |= outcomes({label: (lambda d=directory: load(d), says)})
    assert wrong == {}


def test_a_tensor_in_two_files_is_refused(fresh: Callable[[], Path]) -> None:
    directory = fresh()
    write(directory / "other.safetensors", {NORM: torch.full((16,), 7.0)})
    says = f"has the tensor '{NORM}' in model.safetensors and in other.safetensors"
    assert outcomes({"load": (lambda: load(directory), says)}) == {}


def test_pickles_alone_are_refused(fresh: Callable[[], Path]) -> None:
    directory = fresh()
    (directory / FILE).rename(directory / "pytorch_model.bin")
    assert outcomes({"load": (lambda: load(directory), "only pickled weights")}) == {}


# The index


Setup = Callable[[Path], None]


def link_to_a_cache(directory: Path) -> None:
    blobs = directory.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    shutil.copy(directory / "one.safetensors", blobs / "a1b2")
    (directory / "link.safetensors").symlink_to("../blobs/a1b2")


def below(directory: Path) -> None:
    (directory / "sub").mkdir()
    shutil.copy(directory / "one.safetensors", directory / "sub" / "two.safetensors")


def make_index(directory: Path, content: Any, setup: Setup | None = None) -> Path:
    """One file under another name, and an index of that content; or what a name becomes in it."""
    names = dict.fromkeys(weights(directory), "one.safetensors")
    (directory / FILE).rename(directory / "one.safetensors")
    if setup is not None:
        setup(directory)
    text = content(names) if callable(content) else content
    (directory / INDEX).write_text(text if isinstance(text, str) else json.dumps(text))
    return directory


def norm_in(file: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda names: {"metadata": {}, "weight_map": {**names, NORM: file}}


OUTSIDE = "a file of a checkpoint lies in its directory"
ALONE = "and shardproof reads safetensors alone"
INDICES: dict[str, tuple[Any, str, Setup | None]] = {
    "a file beside the directory": (norm_in("../copy/one.safetensors"), OUTSIDE, None),
    "a file above": (norm_in("../../x.safetensors"), OUTSIDE, None),
    "a file by its whole path": (norm_in("/etc/x.safetensors"), OUTSIDE, None),
    "up in the middle": (norm_in("sub/../../x.safetensors"), OUTSIDE, below),
    "up in the way of Windows": (norm_in("..\\x.safetensors"), OUTSIDE, None),
    "a drive": (norm_in("C:/x.safetensors"), OUTSIDE, None),
    "a zero byte": (norm_in("a\0.safetensors"), OUTSIDE, None),
    "a long name": (norm_in("x" * 5000 + ".safetensors"), "lacks xxx", None),
    "a pipe": (
        norm_in("pipe.safetensors"),
        "is a named pipe",
        lambda directory: os.mkfifo(directory / "pipe.safetensors"),
    ),
    "a directory": (
        norm_in("dir.safetensors"),
        "is a directory",
        lambda directory: (directory / "dir.safetensors").mkdir(),
    ),
    "a file without the tensor": (
        norm_in("less.safetensors"),
        "less.safetensors cannot be read as safetensors",
        lambda directory: write(directory / "less.safetensors", {"z": torch.ones(1)}),
    ),
    "two sets of weights": (
        norm_in("one.safetensors"),
        "has model.safetensors and an .* two sets of weights",
        lambda directory: write(directory / FILE, {NORM: torch.ones(16)}),
    ),
    "a number for a file": (norm_in(5), f"names 5, {ALONE}", None),
    "null for a file": (norm_in(None), f"names None, {ALONE}", None),
    "a list for a file": (norm_in(["a"]), rf"names \['a'\], {ALONE}", None),
    "no name for a file": (norm_in(""), f"names '', {ALONE}", None),
    "no files": ({"weight_map": {}}, '"weight_map" is {}', None),
    "no map": ({"metadata": {}}, '"weight_map" is None', None),
    "a list for a map": ({"weight_map": [1]}, r'"weight_map" is \[1\]', None),
    "text for a map": ({"weight_map": "x"}, "\"weight_map\" is 'x'", None),
    "a list": ([1], "is no index of safetensors", None),
    "lists nested deep": ("[" * 100_000, "nested too deeply", None),
    "maps nested deep": ('{"weight_map":' * 100_000, "nested too deeply", None),
    "a number too long": ('{"weight_map": ' + "9" * 5000 + "}", "5,000 digits", None),
    "a name that is there twice": (
        lambda names: json.dumps({"weight_map": names})[:-2] + f', "{NORM}": "x"}}}}',
        f"the key '{NORM}' is there twice",
        None,
    ),
    "twenty thousand files": (
        {"weight_map": {f"k{place}": f"f{place}.safetensors" for place in range(20_000)}},
        "and 19,995 more, which its",
        None,
    ),
}


@pytest.mark.parametrize("label", INDICES)
def test_an_index_that_is_none_is_refused(label: str, fresh: Callable[[], Path]) -> None:
    content, says, setup = INDICES[label]
    directory = make_index(fresh(), content, setup)
    assert outcomes({label: (lambda: load(directory), says)}) == {}


@pytest.mark.parametrize(
    ("file", "setup"),
    [
        ("one.safetensors", None),
        ("link.safetensors", link_to_a_cache),
        ("sub/two.safetensors", below),
    ],
)
def test_links_as_in_the_cache_of_hugging_face_are_followed(
    file: str, setup: Setup | None, fresh: Callable[[], Path]
) -> None:
    wanted = weights(fresh())[NORM]
    directory = make_index(fresh(), norm_in(file), setup)
    with torch.no_grad():
        model().get_parameter(NORM).zero_()
    assert torch.equal(load(directory).get_parameter(NORM), wanted)


# The config


NUMBERS: list[Any] = [0, -1, True, 1.5, 16.0, float("nan"), 10**30, "16", "x", "", [], [1], {}]
RULES: dict[str, list[Any]] = {
    **{name: [*NUMBERS, None] for name in SIZES if name != "num_key_value_heads"},
    "num_key_value_heads": NUMBERS,
    "head_dim": NUMBERS,
    "num_hidden_layers": [*NUMBERS, MOST_LAYERS + 1],
    "dtype": ["float99", "int8", "torch", "Tensor", 5, [], {}, True, float("nan")],
    "torch_dtype": ["float99", "int8", "", 5],
    "rms_norm_eps": [0, -1e-6, float("nan"), float("inf"), "1e-6", True, [], {}],
    "attention_dropout": [-0.1, 1.0, 7, float("nan"), "0.1", True, [], {}],
    "model_type": [5, [], {}, True],
    "quantization_config": [{"bits": 4}, "x", 1],
}


@pytest.mark.parametrize("name", RULES)
def test_a_config_with_a_value_that_no_model_has_is_refused(name: str, tmp_path: Path) -> None:
    config = {"model_type": "llama", **SIZES}

    def read(value: Any) -> object:
        (tmp_path / CONFIG).write_text(json.dumps(config | {name: value}))
        return read_config(tmp_path)

    says = f"{CONFIG} cannot be a model's: {name}"
    table = {repr(v): (lambda v=v: read(v), says) for v in RULES[name]}
    assert outcomes(table) == {}


TEXTS: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "is not JSON"),
    "a list": ("[]", "holds a list, not an object"),
    "null": ("null", "holds a NoneType"),
    "lists nested deep": ("[" * 100_000, "nested too deeply"),
    "objects nested deep": ('{"a":' * 100_000, "nested too deeply"),
    "a number too long": ('{"vocab_size": ' + "9" * 5000 + "}", "5,000 digits"),
    "no text": (b"\xff\xfe", "is not text"),
    "a mark of order": (b"\xef\xbb\xbf{}", "BOM"),
    "zeros": (b"\0" * 10, "is not JSON"),
    "a size that is there twice": ('{"hidden_size": 16, "hidden_size": 32}', "is there twice"),
    "blanks without end": (" " * (17 << 20), "no such file has more than"),
    "no kind of model": (json.dumps(SIZES), "model_type"),
    "an unknown kind": (json.dumps(SIZES | {"model_type": "nonsense"}), "nonsense"),
    "a size inside": (
        json.dumps({"model_type": "llama", "text_config": {"hidden_size": -1}}),
        "text_config: hidden_size=-1",
    ),
    "sizes that do not fit": (
        json.dumps(SIZES | {"model_type": "llama", "num_attention_heads": 3}),
        "multiple of the number of attention heads",
    ),
    "several": (
        json.dumps(SIZES | {"model_type": "llama", "hidden_size": -1, "dtype": "int8"}),
        "hidden_size=-1 is not a positive whole number; dtype='int8' is not a dtype",
    ),
}


@pytest.mark.parametrize("label", TEXTS)
def test_a_config_that_is_none_is_refused_by_the_command(label: str, tmp_path: Path) -> None:
    content, says = TEXTS[label]
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / CONFIG).write_bytes(data)
    assert re.search(says, plan(tmp_path))


def test_infinity_may_stand_in_a_config(tmp_path: Path) -> None:
    """transformers writes it itself, into time_step_limit of Mamba."""
    (tmp_path / CONFIG).write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    assert read_config(tmp_path)["time_step_limit"][1] == float("inf")


def test_a_directory_that_vanishes_is_an_error(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(UsageError, match="has no weights"):
        load(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(UsageError, match=r"has no config\.json"):
        load(tmp_path)
