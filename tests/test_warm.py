"""A warm command does what a fresh interpreter does, as tests of commands rely on it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import warm
from shardproof.ranks import launch

# One line, so that the line number of its errors is 1 in both.
PROGRAMS = {
    "arguments": "import sys; print(sys.argv, sys.path[:1], __name__)",
    "directory": "import os; print(os.getcwd(), os.environ['FOR_THE_TEST'])",
    "exit code": "import sys; sys.exit(3)",
    "exit text": "import sys; sys.exit('this is why')",
    "exit beyond a byte": "import sys; sys.exit(259)",
    "error": "import sys; sys.stdout.write('before'); 1 / 0",
    "interrupt": "raise KeyboardInterrupt",
    "at the end": "import atexit, threading, time; atexit.register(print, 'last');"
    "threading.Thread(target=lambda: time.sleep(0.05) or print('a thread')).start()",
    "input": "print(input() + input())",
    "signals": "import signal; print([n for n in range(1, 30) if signal.getsignal(n) not in"
    " (signal.SIG_DFL, signal.SIG_IGN)], signal.getsignal(signal.SIGPIPE),"
    " signal.pthread_sigmask(signal.SIG_BLOCK, []))",
    "session": "import os; print(os.getsid(0) == os.getpgid(0) == os.getpid())",
    "warning": "import warnings; warnings.warn('an error here')",
    "main": "import sys; x = 3; print(sys.modules['__main__'].x)",
    "streams": "import sys; print([(s.encoding, s.errors, s.line_buffering, s.fileno())"
    " for s in (sys.stdin, sys.stdout, sys.stderr)])",
    "threads": "import torch; print(torch.get_num_threads())",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "temporary files": "import tempfile; print(tempfile.gettempdir())",
}
KINDS = ("code", "script", "module")


def in_a_fresh_interpreter(
    command: list[str], cwd: Path, env: dict[str, str], text: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        cwd=cwd,
        env=env,
        input=text,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )


def command_of(kind: str, program: str, folder: Path) -> list[str]:
    (folder / "program.py").write_text(program)
    end = {"code": ["-c", program], "script": ["program.py"], "module": ["-m", "program"]}[kind]
    return [sys.executable, "-W", "error", *end, "one", "--two"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_warm_command_does_what_a_fresh_one_does(name: str, tmp_path: Path) -> None:
    """Once for each kind of program; a fresh interpreter runs it in a process of its own."""
    env = {**os.environ, "FOR_THE_TEST": name, "OMP_NUM_THREADS": "2", "TMPDIR": str(tmp_path)}
    kind = KINDS[list(PROGRAMS).index(name) % len(KINDS)]
    command = command_of(kind, PROGRAMS[name], tmp_path)
    wanted = in_a_fresh_interpreter(command, tmp_path, env, "a\nb\n")
    found = warm.run(command, cwd=tmp_path, env=env, input="a\nb\n")
    assert (found.returncode, found.stdout) == (wanted.returncode, wanted.stdout), found.stderr
    assert found.stderr.splitlines()[-1:] == wanted.stderr.splitlines()[-1:]


def test_an_error_shows_the_lines_of_the_program_alone(tmp_path: Path) -> None:
    done = warm.run(command_of("code", PROGRAMS["error"], tmp_path))
    assert "warm_server" not in done.stderr
    assert done.stderr.startswith('Traceback (most recent call last):\n  File "<string>", line 1')


def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    program = """import os, time, pathlib
if not os.fork(): pathlib.Path("child").write_text(str(os.getpid()))
print("so far", flush=True); time.sleep(100)"""
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        warm.run(command_of("code", program, tmp_path), cwd=tmp_path, timeout=2.0)
    assert str(caught.value.stdout).startswith("so far\n")
    deadline = time.monotonic() + 30
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    while child.exists() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline


def test_a_process_can_be_watched_and_signalled(tmp_path: Path) -> None:
    program = """import sys, time
sys.stderr.write('and here'); sys.stderr.flush(); print('here', flush=True); time.sleep(100)"""
    process = warm.Process(command_of("code", program, tmp_path))
    assert process.stdout.readline() == "here\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(60) == ("", "and here")
    assert process.wait() == process.poll() == process.returncode == -signal.SIGTERM


RANK = """import os, sys, time
print(*[os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")])
import torch; print(torch.get_num_threads(), flush=True)
if len(sys.argv) > 1 and os.environ["RANK"] == sys.argv[1]: 1 / 0
time.sleep(100 if len(sys.argv) > 1 else 0)
"""


def test_a_command_runs_once_for_each_rank_and_one_failure_ends_all() -> None:
    done = warm.run_as_ranks([sys.executable, "-c", RANK], ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 0 2 127.0.0.1\n1\n1 1 2 127.0.0.1\n1\n"
    begun = time.monotonic()
    done = warm.run_as_ranks([sys.executable, "-c", RANK, "1"], ranks=2)
    assert time.monotonic() - begun < 60
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run_as_ranks([sys.executable, "-c", RANK, "none"], ranks=2, timeout=0.5)


def parents_of_ranks() -> list[int]:
    return launch(lambda axis: os.getppid(), degree=1, engine="processes")


def test_ranks_are_forks_of_the_server() -> None:
    assert parents_of_ranks() != [os.getpid()]


@pytest.mark.fresh_ranks
def test_a_marked_test_has_ranks_that_the_package_started() -> None:
    assert parents_of_ranks() == [os.getpid()]


@pytest.mark.parametrize("words", [["-I", "-c", "1"], ["-X", "dev", "x.py"], [], ["x"]])
def test_what_cannot_be_forked_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="start it with subprocess"):
        warm.run([sys.executable, *words])


def test_the_python_path_of_one_command_is_not_that_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One server serves both; what the first adds to its path is the standard library too.

    The server is one of its own, for it is about the first command, and imports nothing.
    """
    server = warm.SERVER.read_text()
    light = re.sub(r"^IMPORTED = \(.*?^\)$", "IMPORTED = ()", server, flags=re.M | re.S)
    assert light != server
    monkeypatch.setattr(warm, "SERVER", tmp_path / "light_server.py")
    warm.SERVER.write_text(light)
    everything = os.pathsep.join(each for each in sys.path if each)
    program = """import os, sys
print(sum('stdlib-of-nobody' in each for each in sys.path), end=' ')
print(os.path.dirname(os.__file__) in sys.path)"""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # followed by torch, which is not there
    variables = {**os.environ, "SHARDPROOF_TEST_SERVER": "one of its own"}
    for path in (everything, str(tmp_path / "stdlib-of-nobody"), ""):
        done = warm.run([sys.executable, "-c", program], env={**variables, "PYTHONPATH": path})
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{int('nobody' in path)} True\n"
