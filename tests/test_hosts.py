"""Several hosts: the bits of one, and an end for all if a link is cut or a host is gone.

The errors then name the host that is lost.
"""

import hashlib
import json
import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import hosts
from hosts import Hosts, outcome
from shardproof.cli.main import main
from shardproof.transport.asking import PATIENCE

transformers = pytest.importorskip("transformers")

SCRIPT = Path(__file__).with_name("train_on_hosts.py")
SOURCES = str(Path(__file__).parents[1] / "src")
ENVIRONMENT = {"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1"}
TIMEOUT = 5.0  # seconds that a rank waits in one collective
MARGIN = 25.0  # for torchrun to end the other ranks, on a machine however busy
START = 100.0
OPTIONS = (
    "--steps", "2", "--batch", "5", "--length", "19", "--seed", "3", "--batch-leaves", "8",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _needs_namespaces() -> None:
    problem = hosts.problem()
    if problem is not None:
        pytest.skip(problem)


def command(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(each) for each in arguments])


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


def test_hosts_have_the_bits_of_one_process(tmp_path: Path) -> None:
    """The last host comes later than a rank waits in a collective: ranks may meet for long."""
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=24, intermediate_size=50, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
        attention_dropout=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_bytes(Path(json.__file__).read_bytes())
    train = ["train", "--model", str(tmp_path / "config.json"), "--text", str(text), *OPTIONS]
    lines = [
        [*train, "--data-parallel", "3", "--save", str(tmp_path / "groups")],
        [*train, "--sequence-parallel", "--save", str(tmp_path / "one axis")],
    ]
    what = [SCRIPT, "commands", tmp_path, TIMEOUT, 3, 2, json.dumps(lines)]
    with Hosts(3) as made:
        processes = []
        for host in range(3):
            if host == 2:
                time.sleep(TIMEOUT + 1)
            processes.append(made.torchrun(host, 2, [str(each) for each in what], ENVIRONMENT))
        alone = command(*train, "--save", tmp_path / "alone")
        assert alone.exit_code == 0, alone.output
        codes, outputs = outcome(processes, START)
    assert codes == [0, 0, 0], outputs
    for rank in range(6):
        names = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert names == {"all": "hosts", "dp": "gloo", "tp": "shm"}
    wanted = hashes(tmp_path / "alone" / "step-00000002")
    assert "model.safetensors" in wanted
    assert hashes(tmp_path / "groups" / "step-00000002") == wanted
    assert hashes(tmp_path / "one axis" / "step-00000002") == wanted


def test_what_crosses_a_link_is_what_the_plan_says(tmp_path: Path) -> None:
    """Counted by the transport, predicted by arithmetic, and measured by the kernel."""
    count, per_host = 3, 2
    what = [str(each) for each in (SCRIPT, "links", tmp_path, START, count, per_host)]
    with Hosts(count) as made:
        processes = [made.torchrun(host, per_host, what, ENVIRONMENT) for host in range(count)]
        codes, outputs = outcome(processes, START)
    assert codes == [0] * count, outputs
    ranks = range(count * per_host)
    said = [json.loads((tmp_path / f"links{rank}.json").read_text()) for rank in ranks]
    assert all(each["counted"] == each["predicted"] for each in said), said
    for host in range(count):
        ours = said[host * per_host : (host + 1) * per_host]
        predicted = sum(sum(each["predicted"].values()) for each in ours)
        by_hosts, by_ranks = (max(each[by] for each in ours) for by in ("by hosts", "by ranks"))
        # TCP adds headers and acknowledgements, and the ranks meet before and after.
        assert predicted <= by_hosts <= 1.1 * predicted + 100_000, said
        assert by_hosts < 0.75 * by_ranks, said


def train_until(
    folder: Path, made: Hosts, count: int, *, is_one_axis: bool = False
) -> list[hosts.HostProcess]:
    """Start a training, and wait for its second checkpoint.

    Args:
        folder: for the checkpoints.
        made: the hosts.
        count: how many, with two ranks on each.
        is_one_axis: whether all ranks share the model, or the two of each host.
    """
    dp, tp = (1, 2 * count) if is_one_axis else (count, 2)
    what = [str(each) for each in (SCRIPT, "steps", folder, TIMEOUT, dp, tp)]
    processes = [made.torchrun(host, 2, what, ENVIRONMENT) for host in range(count)]
    deadline = time.monotonic() + START
    while not (folder / "step-00000010").exists():
        assert time.monotonic() < deadline, [each.output() for each in processes]
        assert all(each.wait(0) is None for each in processes), [p.output() for p in processes]
        time.sleep(0.05)
    return processes


def check_checkpoint(folder: Path) -> None:
    """The last checkpoint that has its name is whole."""
    last = max(folder.glob("step-????????"))
    result = command("checkpoint", "verify", last)
    assert result.exit_code == 0, result.output


def check_words(output: str, host: int, others: list[int]) -> None:
    """A rank says where it is, and which ranks on which hosts it shares the axis with."""
    said = [line for line in output.splitlines() if "PeerError: gloo failed on rank" in line]
    assert said, output
    for line in said:
        assert re.search(rf"\(global rank ({2 * host}|{2 * host + 1}) on host{host}, with ", line)
        assert all(re.search(rf"global rank \d on host{other}", line) for other in others), line


def silent_in(line: str) -> set[tuple[str, str, str]]:
    """Of the ranks that do not answer: global ranks, host and address."""
    head, found, _ = line.partition(f" not answer within {PATIENCE:g} s")
    pattern = r"lobal ranks? (\d(?: and \d)*) on (host\d) \(([\d.]+)\)"
    return set(re.findall(pattern, head)) if found else set()


def ranks_of(made: Hosts, host: int) -> tuple[str, str, str]:
    return f"{2 * host} and {2 * host + 1}", f"host{host}", made.address(host)


def told_by(output: str) -> list[str]:
    """The errors of the ranks of a host that could ask who answers.

    A rank that sees the process of its neighbour end says that, and asks nobody.
    """
    errors = [line for line in output.splitlines() if "PeerError: " in line]
    return [line for line in errors if " is gone, its process " not in line]


@pytest.mark.parametrize("is_one_axis", [False, True], ids=["an axis in each host", "one axis"])
def test_all_ranks_end_when_a_link_is_cut(is_one_axis: bool, tmp_path: Path) -> None:
    with Hosts(3) as made:
        processes = train_until(tmp_path, made, 3, is_one_axis=is_one_axis)
        made.cut(2)
        codes, outputs = outcome(processes, TIMEOUT + MARGIN)
    assert codes == [1, 1, 1], outputs
    for host, output in enumerate(outputs):
        lost = [2] if host < 2 else [0, 1]
        lines = told_by(output)
        assert lines, output
        for line in lines:
            assert silent_in(line) == {ranks_of(made, each) for each in lost}, line
            cut_off = "No other host answers: the link of this host, host2, may be down."
            assert (cut_off in line) == (host == 2), line
    for host, output in enumerate(outputs):
        check_words(output, host, [other for other in range(3) if other != host])
        assert re.search("timed out|timeout", output), output
    check_checkpoint(tmp_path)


@pytest.mark.parametrize("how", ["freeze", "kill"])
def test_all_other_ranks_end_when_a_host_is_gone(how: str, tmp_path: Path) -> None:
    """A host that is stopped keeps its connections, and one that is killed does not."""
    with Hosts(2) as made:
        processes = train_until(tmp_path, made, 2)
        getattr(processes[1], how)()
        began = time.monotonic()
        codes, outputs = outcome(processes[:1], TIMEOUT + MARGIN)
        waited = time.monotonic() - began
    assert codes == [1], outputs
    check_words(outputs[0], 0, [1])
    lines = told_by(outputs[0])
    assert lines, outputs
    for line in lines:
        if how == "kill":
            assert not silent_in(line), line
            assert "he processes of global ranks 2 and 3 on host1 (10.213.0.2) have ended" in line
        else:
            assert silent_in(line) == {ranks_of(made, 1)}, line
    if how == "freeze":
        assert waited > TIMEOUT / 2
    check_checkpoint(tmp_path)
