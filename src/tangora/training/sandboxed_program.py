"""Run one program of `sandbox`: the text after ``python -c`` of process 1 in the sandbox, imported by nothing.

It builds the file system, unless bubblewrap has, and forks. The child gives up its rights, limits itself and runs the
program; process 1 waits, says what came of it, and ends, whereupon the kernel kills all that the program has started.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
import traceback
import types

_LIBC = ctypes.CDLL(None, use_errno=True)
_MOUNT_SETATTR = 442  # system call, of the same number on every processor; glibc wraps it since 2.36
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_READ_ONLY, _NO_SETUID, _NO_DEVICES = 1, 2, 4  # of mount and mount_setattr
_BIND = (
    0x1000 | 0x4000
)  # MS_BIND | MS_REC: the kernel lets no user namespace bind a folder without what is mounted in it
_DETACH = 2
_SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 4, 38  # of prctl
_CAPABILITIES_VERSION = 0x20080522
# a trace function can jump over tests by f_lineno; a frame's referents may be all that is on its stack
_FORBIDDEN = {"sys.settrace", "gc.get_referents"}


def _call(name: str, *arguments: object) -> None:
    """Call a function of the C library."""
    if getattr(_LIBC, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _mount(
    source: str, target: str, kind: str | None = None, flags: int = 0, options: str | None = None
) -> None:
    """Mount a file system, or a path of another one."""
    texts = [text if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def _build_root(paths: list[str], devices: list[str], room: str) -> None:
    """Leave of all files ``paths``, read-only, and devices; ``/tmp`` is empty, writable, and in memory."""
    _mount("tmpfs", "/tmp", "tmpfs")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    _call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", options="mode=0755")
    os.makedirs("/new/tmp")
    for path in filter(lambda path: os.path.lexists("/old" + path), paths + devices):
        os.makedirs(os.path.dirname("/new" + path), exist_ok=True)
        if os.path.islink("/old" + path):
            os.symlink(os.readlink("/old" + path), "/new" + path)
            continue
        if os.path.isdir("/old" + path):
            os.makedirs("/new" + path, exist_ok=True)
        else:
            os.close(os.open("/new" + path, os.O_CREAT))
        _mount("/old" + path, "/new" + path, flags=_BIND)
    # attributes to set, to clear, propagation, namespace
    everything = (ctypes.c_uint64 * 4)(_READ_ONLY | _NO_SETUID)
    size = ctypes.c_size_t(ctypes.sizeof(everything))
    _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, b"/new", _AT_RECURSIVE, ctypes.byref(everything), size)
    _mount("tmpfs", "/new/tmp", "tmpfs", _NO_SETUID | _NO_DEVICES, room)
    _call("umount2", b"/old", _DETACH)
    # outside the root of its mount namespace, no process may create a user namespace, in which it would have all rights
    os.chroot("/new")


def _give_up_rights(uid: int | None) -> None:
    """Become a user without files or processes, if this is root's to choose, and keep no capability."""
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)())
    _call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _limit(limits: dict[str, int]) -> None:
    """Set limits of this process, by their names in `resource`, which it cannot raise again."""
    for name, value in limits.items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, name), (least, least))


def _refuse(event: str, _: tuple) -> None:
    """Audit hook, which Python never takes off."""
    if event in _FORBIDDEN:
        raise PermissionError(f"{event} is not allowed here")


def _run(source: str, token: int, message: int) -> None:
    """Run the program; the message is the token at its own end, otherwise the exception."""
    program = types.ModuleType(
        "program"
    )  # as in HumanEval's harness no part under __name__ == "__main__" runs
    sys.modules["program"] = program
    sys.addaudithook(_refuse)
    try:
        code = compile(source, "program.py", "exec", dont_inherit=True)
        # the token has no name: it waits on the stack of this frame, behind os.write, which is looked up before the
        # program can replace it; where the program leaves in any other way than by its end, nothing writes it
        os.write(message, os.read(token, 16) + (exec(code, program.__dict__) or b""))
    except MemoryError:
        os.write(message, b"out of memory")
        os._exit(1)
    except BaseException as error:
        os.write(message, traceback.format_exception_only(error)[-1].strip()[:200].encode(errors="replace"))
        os._exit(1)


def _reason(status: int, message: bytes, token: bytes) -> str:
    """Say in which way the program failed, or nothing."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if message == token:
        return "" if code == 0 else f"exit status {code} after its end"
    # one line, without what would control a terminal
    text = "".join(each if each.isprintable() else " " for each in message.decode(errors="replace")).strip()
    if text == "out of memory":
        return text
    return f"exit status {code}: {text}" if text else f"exit status {code} before its end"


def main() -> None:
    """Do what standard input asks for, and answer on standard output: a line before the program, and a verdict."""
    if os.getpid() != 1:  # before anything is mounted or run
        raise OSError("the process is in no namespace of its own")
    os.umask(0o022)  # the program is another user than the one that makes its folders
    os.setsid()  # what started this process is no longer in its group, which the program can signal
    answer = os.dup(1)
    asked = json.load(sys.stdin)
    if asked["paths"]:
        _build_root(asked["paths"], asked["devices"], asked["room"])
    os.chdir("/tmp")
    os.environ.clear()
    os.environ.update(HOME="/tmp", TMPDIR="/tmp")
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    _call("prctl", _SET_DUMPABLE, 0, 0, 0, 0)  # the program can read no memory of this process
    message_read, message_write = os.pipe()
    token_read, token_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(null, 2)
        for descriptor in (null, answer, message_read, token_write):
            os.close(descriptor)
        _limit(asked["limits"])
        _give_up_rights(asked["uid"])
        _run(asked["source"], token_read, message_write)
        return  # on to the end of the interpreter: threads are waited for, functions of atexit called
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of other signals the kernel spares process 1
    token = os.urandom(16)  # drawn after the fork: the program's memory has no copy
    os.write(token_write, token)
    os.write(answer, b"started\n")
    ended, _, _ = select.select([os.pidfd_open(child)], [], [], asked["seconds"])
    reason = "timed out"
    if ended:
        os.close(message_write)
        os.set_blocking(message_read, False)  # a process that has survived the program may hold the other end
        _, status = os.waitpid(child, 0)
        try:
            message = os.read(message_read, 200)
        except BlockingIOError:
            message = b""
        reason = _reason(status, message, token)
    os.write(answer, json.dumps(reason).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
