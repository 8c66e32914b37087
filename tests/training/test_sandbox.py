"""Generated programs run apart: good ones pass, hostile ones fail, reach nothing outside and leave nothing behind."""

import os
import pwd
import socket
import string
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from tangora import InputError
from tangora.training import sandbox
from tangora.training.sandbox import run_program, run_programs
from tests.training.hostile import ENDLESS, FORGED, LARGE, OUTSIDE

try:
    sandbox._launcher()
    REFUSED = ""
except InputError as error:
    REFUSED = str(error)

isolated = pytest.mark.skipif(bool(REFUSED), reason=REFUSED)

# in the shape of HumanEval: the prompt with its completion, the tests, the call
GOOD = '''
from typing import List

def below_zero(operations: List[int]) -> bool:
    """Tell whether a balance falls below zero."""
    balance = 0
    for operation in operations:
        balance += operation
        if balance < 0:
            return True
    return False

def check(candidate):
    assert candidate([1, 2, -4, 5]) == True
    assert candidate([1, 2, 3]) == False

check(below_zero)
'''

WELCOME = {
    "standard library": "import collections, ctypes, dataclasses, datetime, decimal, hashlib, heapq, json, re, zlib",
    "dataclass": """
import dataclasses, pickle
@dataclasses.dataclass
class Point:
    x: int
assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
""",
    "recursion": """
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
assert depth(900) == 900
""",
    "threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool: assert sum(pool.map(abs, range(-100, 0))) == 5050
""",
    "temporary files": """
import os, tempfile
assert os.listdir() == []
with tempfile.NamedTemporaryFile() as file: assert file.write(b"x") == 1
with open("here", "w") as file: file.write("x")
assert os.path.expanduser("~/here") == os.path.abspath("here")
""",
    "no input": "import sys; assert sys.stdin.read() == ''",
    "subprocess": """
import subprocess, sys
assert subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True).stdout == b"42\\n"
""",
    "a part that HumanEval does not run": "if __name__ == '__main__': input()",
    "text": "assert len('ä€😀') == 3; print('ä€😀')",
    "memory": "assert len(bytearray(200 * 2**20)) == 200 * 2**20",
}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Give what a program must not reach, and check afterwards that it has not."""
    mark = f"mark{uuid.uuid4().hex}"
    (tmp_path / "secret").write_text(mark)
    monkeypatch.setenv("SECRET", mark)
    command = sandbox._interpreter()
    monkeypatch.setattr(sandbox, "_interpreter", lambda: [*command, mark])  # forked processes have it, too
    files = [*tmp_path.iterdir(), Path(command[0]), Path(os.__file__), Path("/dev/null")]
    before = [_state(file) for file in files]
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{mark}")
        abstract.listen()
        yield {
            "outside": tmp_path,
            "mark": mark,
            "port": listening.getsockname()[1],
            "parent": os.getpid(),
            "user": pwd.getpwuid(os.getuid()).pw_name,
        }
        for each in (listening, abstract):
            each.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.accept()
    assert _processes(mark) == []
    assert [_state(file) for file in files] == before
    assert list(tmp_path.iterdir()) == [tmp_path / "secret"]
    for folder in (Path("/"), Path("/tmp"), Path(os.__file__).parent, Path.cwd(), Path.home()):
        assert [path for path in folder.iterdir() if mark in path.name] == []


def _state(file):
    found = file.stat()
    return found.st_mode, found.st_size, found.st_nlink, found.st_mtime_ns if file.is_file() else None


def _processes(mark):
    """List the processes whose command holds a word."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:  # ended meanwhile
            continue
    return found


def run(source, outside, **limits):
    return run_program(string.Template(source).substitute(outside), **limits)


@isolated
def test_a_good_program_passes():
    assert run_program(GOOD) == sandbox.Verdict(passed=True, reason="")


@isolated
def test_a_failing_test_fails():
    assert run_program(GOOD.replace("balance < 0", "balance < -100")) == sandbox.Verdict(
        passed=False, reason="exit status 1: AssertionError"
    )


@isolated
@pytest.mark.parametrize("name", WELCOME)
def test_what_a_program_may_do(name):
    verdict = run_program(WELCOME[name])
    assert verdict.reason == ""
    assert verdict.passed


@isolated
@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_program_times_out(name, outside):
    verdict = run(ENDLESS[name], outside, seconds=0.7)
    assert not verdict.passed
    assert verdict.reason == "timed out"


@isolated
@pytest.mark.parametrize("name", FORGED)
def test_no_program_passes_without_its_tests(name, outside):
    verdict = run(FORGED[name], outside)
    assert not verdict.passed
    assert verdict.reason != "timed out"


@isolated
@pytest.mark.parametrize("name", LARGE)
def test_no_program_takes_more_than_its_share(name, outside):
    if name == "many files" and not sandbox._launcher().paths:
        pytest.skip("bubblewrap limits the size of a folder, not the number of files in it")
    verdict = run(LARGE[name], outside, memory_mib=128, seconds=30)
    assert not verdict.passed
    assert verdict.reason != "timed out"


@isolated
@pytest.mark.parametrize("name", OUTSIDE)
def test_no_program_reaches_outside(name, outside):
    verdict = run(OUTSIDE[name], outside)
    assert not verdict.passed
    assert verdict.reason != "timed out"


@isolated
def test_reasons():
    reasons = {
        "x = bytearray(10**10)": "out of memory",
        "x =": "exit status 1: SyntaxError: invalid syntax",
        "missing": "exit status 1: NameError: name 'missing' is not defined",
        "import os; os._exit(0)": "exit status 0 before its end",
        "import atexit, os; atexit.register(os._exit, 3)": "exit status 3 after its end",
        "import ctypes; ctypes.string_at(0)": "killed by SIGSEGV",
    }
    assert [verdict.reason for verdict in run_programs(reasons, jobs=2)] == list(reasons.values())


@isolated
def test_a_process_that_is_left_is_killed_and_changes_no_verdict(outside):
    left = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        time.sleep(100)
    """
    assert run(textwrap.dedent(left), outside).passed


@isolated
def test_a_strict_umask_changes_nothing():
    before = os.umask(0o077)
    try:
        assert run_program(GOOD).passed
        assert run_program(WELCOME["standard library"]).passed
    finally:
        os.umask(before)


@isolated
def test_programs_share_nothing():
    leave, find = "open('left', 'w').close()", "import os; assert os.path.exists('left')"
    assert [verdict.passed for verdict in run_programs([leave, find, GOOD])] == [True, False, True]


@isolated
def test_the_order_of_sets_is_the_same_in_every_run():
    first, second = run_programs(["raise ValueError(hash('tangora'))"] * 2)
    assert first == second


@isolated
def test_a_sandbox_that_dies_takes_its_program_with_it(outside, monkeypatch):
    monkeypatch.setattr(sandbox, "_SPARE_SECONDS", -99)
    verdict = run("import time; time.sleep(100)", outside, seconds=100)
    assert verdict == sandbox.Verdict(passed=False, reason="timed out")
    waited = time.monotonic() + 10
    while _processes(outside["mark"]) and time.monotonic() < waited:  # nobody waits for the kernel here
        time.sleep(0.05)


def test_without_isolation_nothing_runs(monkeypatch, tmp_path):
    program = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    sandbox._launcher.cache_clear()
    for command in ("no-such-program", "false", "env"):  # not installed, fails, isolates nothing
        monkeypatch.setattr(sandbox, "_launchers", lambda command=command: [sandbox._Launcher([command], [])])
        with pytest.raises(InputError):
            run_program(program)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError):
        run_program(program)
    sandbox._launcher.cache_clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.messages
@pytest.mark.parametrize(
    "limits", [{"seconds": 0}, {"seconds": "1"}, {"memory_mib": 1}, {"memory_mib": 99.5}]
)
def test_limits_are_checked(limits):
    with pytest.raises(InputError):
        run_program(GOOD, **limits)


@pytest.mark.messages
def test_jobs_are_checked():
    with pytest.raises(InputError):
        run_programs([GOOD], jobs=0)
