"""Run generated Python programs apart from everything else, for benchmarks that score code by running it.

Every program runs in an interpreter of its own, in namespaces of its own that bubblewrap or ``unshare`` creates:

- no network, not even the machine's own ports; no process but its own is visible or can be signalled;
- of all files only the interpreter and the system's libraries, read-only; no home folder, no data, no ``/proc``;
  an empty ``/tmp`` of 64 MiB in memory, which is also home and working folder, and is gone afterwards;
- no variable of this process's environment, nothing on standard input, no output (a program may print without end);
- limits on memory, processor time, sizes and numbers of files, and on processes, as which threads count. When the
  time is over, or the program ends, the kernel kills every process that is left; when memory is short, these first.

A program passes when it gets past its own last line and exits with status 0. ``sys.exit`` or ``os._exit`` before the
tests fail: the process that waits for the program, and whose memory the program cannot read, draws a random token,
which the interpreter gives back only behind the last line.

What this does not protect from: errors in the kernel (run programs that are made to attack in a virtual machine); more
memory than the limit in all, which holds for each of at most 32 processes; and tests that are fooled. Program and tests
share an interpreter, as in HumanEval's own harness: a program can replace built-in functions that its tests call, or
return objects that equal everything, and one written against this very file could search its memory for the token.

Programs have the standard library alone, and a fixed hash seed: sets of strings have the same order in every run.
"""

import functools
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tangora._checks import InputError, check_number, check_whole

_LIBRARIES = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
_DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom"]
_MIB = 2**20
_FILES_MIB = 64
_FILES = 4096  # bubblewrap has no such limit
_PROCESSES = 32  # threads count; the standard pool of threads has at most 32
_SPARE_SECONDS = 60  # for the start of the sandbox on a busy machine
_PROBE = "import decimal, json, math, random, re"  # the standard library can be read from inside


@dataclass(frozen=True)
class Verdict:
    """Outcome of a program: whether it passed, and the reason if not, e.g. ``exit status 1: AssertionError``."""

    passed: bool
    reason: str


def run_program(source: str, *, seconds: float | int = 10, memory_mib: int = 1024) -> Verdict:
    """Run a program with its tests in a sandbox; refuse where there can be none."""
    check_number("seconds", seconds, low=0, open_low=True)
    check_whole("memory_mib", memory_mib, low=64)
    return _run(_launcher(), source, seconds, memory_mib)


def run_programs(
    sources: Iterable[str], *, jobs: int = 1, seconds: float | int = 10, memory_mib: int = 1024
) -> list[Verdict]:
    """Run programs, ``jobs`` at a time."""
    check_whole("jobs", jobs, low=1)
    run = functools.partial(run_program, seconds=seconds, memory_mib=memory_mib)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, sources))


@dataclass(frozen=True)
class _Launcher:
    """A command that starts a process in namespaces of its own."""

    command: list[str]
    paths: list[str]  # what the process has to mount itself
    root: bool = False  # the process is root of the machine, and the program must not be


@functools.cache
def _launcher() -> _Launcher:
    """Find the command that isolates a process on this machine, by running a program."""
    failure = "this is not Linux"
    for launcher in _launchers() if sys.platform == "linux" else []:
        try:
            verdict = _run(launcher, _PROBE, _SPARE_SECONDS, 1024)
        except OSError as error:
            failure = str(error)
        else:
            if verdict.passed:
                return launcher
            failure = verdict.reason
    raise InputError(
        "generated programs run only in isolation, which is not possible here: install bubblewrap (0.8 or "
        f"newer) or util-linux, on a machine or in a container that may create namespaces ({failure})"
    )


def _launchers() -> list[_Launcher]:
    """List the ways of isolation in order of preference."""
    # root of a user namespace would stay root to the kernel, which does not count root's processes
    namespaces = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    if os.geteuid() == 0:
        return [_Launcher(namespaces, _paths(), root=True)]
    return [_Launcher(_bubblewrap(), []), _Launcher([*namespaces, "--user", "--map-root-user"], _paths())]


def _bubblewrap() -> list[str]:
    """Return bubblewrap's command, which mounts what `sandboxed_program` would."""
    command = [
        "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--die-with-parent",
        "--as-pid-1",
    ]
    command += ["--uid", "65534", "--gid", "65534"]
    for path in _paths():
        command += ["--ro-bind-try", path, path]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    return [*command, "--size", str(_FILES_MIB * _MIB), "--tmpfs", "/tmp", "--remount-ro", "/", "--"]


def _paths() -> list[str]:
    """List the files that an interpreter needs."""
    return [*_LIBRARIES, os.path.realpath(sys.base_prefix)]


def _run(launcher: _Launcher, source: str, seconds: float | int, memory_mib: int) -> Verdict:
    """Run a program by one way of isolation; raise `OSError` if it could not be started."""
    request = {
        "source": source,
        "seconds": seconds,
        "paths": launcher.paths,
        "devices": _DEVICES,
        "room": f"size={_FILES_MIB}m,nr_inodes={_FILES},mode=0777",
        # of its own for each program, since the kernel counts the processes of a user
        "uid": 20_000 + secrets.randbelow(40_000) if launcher.root else None,
        "limits": {
            "RLIMIT_AS": memory_mib * _MIB,
            "RLIMIT_CPU": math.ceil(seconds) + 1,
            "RLIMIT_FSIZE": _FILES_MIB * _MIB,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_NPROC": _PROCESSES,
            "RLIMIT_CORE": 0,
        },
    }
    # the kernel's out-of-memory killer takes processes with this score first
    command = ["choom", "--adjust", "1000", "--", *launcher.command, *_interpreter()]
    for program in ("choom", launcher.command[0]):
        if shutil.which(program) is None:
            raise FileNotFoundError(f"{program} is not installed")
    try:
        done = subprocess.run(
            command,
            check=False,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds + _SPARE_SECONDS,
            cwd="/",
            env={"PATH": os.environ.get("PATH", os.defpath), "PYTHONHASHSEED": "0"},  # sets keep their order
            start_new_session=True,  # no terminal
        )
    except subprocess.TimeoutExpired:
        return Verdict(passed=False, reason="timed out")
    started, _, verdict = done.stdout.partition("\n")
    if not started:
        raise OSError(f"{launcher.command[0]}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    if not verdict:
        return Verdict(passed=False, reason="killed with its sandbox")
    reason = json.loads(verdict)
    return Verdict(passed=reason == "", reason=reason)


def _interpreter() -> list[str]:
    """Return the command of a plain interpreter that runs `sandboxed_program`, without packages or a search path."""
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    text = Path(__file__).with_name("sandboxed_program.py").read_text(encoding="utf-8")
    return [executable, "-s", "-S", "-P", "-B", "-c", text]
