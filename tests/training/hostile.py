"""Programs that must fail in the sandbox: each gets past its last line only if what it tries has worked.

``$outside`` is a folder of the test with a file ``secret``, ``$mark`` a word that finds files, processes, sockets and
variables of the test, ``$port`` a port that listens, ``$parent`` the process that runs the sandbox.
"""

ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(100)",
    "reads stdin": """
import sys
while True: sys.stdin.readline()
""",
    "prints": """
import sys
while True: print("x" * 10**6); print("y" * 10**6, file=sys.stderr, flush=True)
""",
    "ignores signals": """
import signal
for each in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(each, signal.SIG_IGN)
while True: pass
""",
    "ignores exceptions": """
while True:
    try:
        while True: bytearray(10**9)
    except BaseException: pass
""",
    "thread outlives the program": """
import threading, time
threading.Thread(target=time.sleep, args=(100,)).start()
""",
    "waits at exit": """
import atexit, time
atexit.register(time.sleep, 100)
""",
    "fork bomb": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "shell bomb": """
import subprocess, sys
while True:
    try: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", "$mark"])
    except OSError: pass
""",
    "kills everything": """
import os, signal, time
for pid in (1, os.getppid(), $parent, -1):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGSTOP):
        try: os.kill(pid, number)
        except OSError: pass
time.sleep(100)
""",
    "stops itself": """
import os, signal
os.kill(os.getpid(), signal.SIGSTOP)
""",
}

# these end before their tests, or evade them
FORGED = {
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "exits at exit": """
import atexit, os
atexit.register(os._exit, 0)
assert False
""",
    "exits from a thread": """
import os, threading, time
threading.Thread(target=os._exit, args=(0,)).start()
time.sleep(100)
""",
    "exits from the excepthook": """
import os, sys
sys.excepthook = lambda *_: os._exit(0)
assert False
""",
    "forks and exits": """
import os
if os.fork(): os._exit(0)
assert False
""",
    "becomes another program": """
import os, sys
os.execv(sys.executable, [sys.executable, "-c", "", "$mark"])
""",
    "writes to all descriptors": """
import os
for descriptor in range(64):
    for text in (b"", b"started\\n", b'""', b"passed", bytes(16)):
        try: os.write(descriptor, text)
        except OSError: pass
os._exit(0)
""",
    "reads the token from the stack": """
import os, sys
found, frame = [], sys._getframe()
while frame:
    found += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]
    frame = frame.f_back
for token in (each for each in found if type(each) is bytes and len(each) == 16):
    for descriptor in range(3, 64):
        try: os.write(descriptor, token)
        except OSError: pass
os._exit(0)
""",
    "reads the token from the collector": """
import gc, os, sys
found = gc.get_referents(sys._getframe(1))
for token in (each for each in found if type(each) is bytes and len(each) == 16):
    for descriptor in range(3, 64):
        try: os.write(descriptor, token)
        except OSError: pass
os._exit(0)
""",
    "replaces the runner's functions": """
import builtins, os, sys
builtins.exec = builtins.compile = builtins.AssertionError = os.write = os.read = lambda *_, **__: 0
sys._getframe(1).f_globals.update(_refuse=print, traceback=None)
assert False
""",
    "jumps over the tests": """
import sys
def jump(frame, event, argument):
    if event == "line" and frame.f_lineno == 8: frame.f_lineno = 9
    return jump
sys._getframe().f_trace = jump
sys.settrace(jump)
assert not sys
done = True
""",
}

LARGE = {
    "allocates": "kept = bytearray(10**10)",
    "allocates in pieces": """
kept = []
try:
    while len(kept) < 1000: kept.append(bytearray(2**24))
except MemoryError: pass
assert len(kept) == 1000
""",
    "maps": "import mmap; kept = mmap.mmap(-1, 10**10)",
    "raises its limits": """
import resource
for name in ("RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_CPU"):
    resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
""",
    "one file": """
with open("large", "wb") as file:
    for _ in range(100): file.write(bytes(2**20))
""",
    "files in sum": """
for number in range(10):
    with open(str(number), "wb") as file: file.write(bytes(10 * 2**20))
""",
    "many files": """
for number in range(10_000): open(str(number), "w").close()
""",
    "many descriptors": "kept = [open('/dev/null') for _ in range(100)]",
    "threads": """
import threading, time
for _ in range(100): threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
""",
    "processes": """
import os, time
for _ in range(100):
    if not os.fork(): time.sleep(100)
""",
    "recursion": """
import sys
sys.setrecursionlimit(10**9)
def deeper(): deeper()
deeper()
""",
    "recursion in C": """
import sys
sys.setrecursionlimit(10**9)
class Deeper:
    def __getattr__(self, name): return getattr(self, name)
Deeper().x
""",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
}

OUTSIDE = {
    "reads a file": "open('$outside/secret').read()",
    "reads by a symbolic link": """
import os
os.symlink("$outside/secret", "secret")
open("secret").read()
""",
    "hard link": """
import os
os.link("$outside/secret", "secret")
""",
    "links the interpreter": """
import os
os.link(os.__file__, "library")
""",
    "lists homes": """
import os
assert os.listdir(os.path.expanduser("~$user")) + os.listdir("/home")
""",
    "lists the file system": """
import os
assert {"root", "home", "proc", "sys", "etc", "var"} <= set(os.listdir("/"))
""",
    "writes to a folder": "open('$outside/new', 'w').write('x')",
    "writes to /tmp": """
open("/tmp/$mark", "w").write("x")
open("/tmp/$mark/..$outside/secret").read()
""",
    "writes to the root folder": "open('/$mark', 'w').write('x')",
    "writes to the interpreter": """
import sys
open(sys.executable, "r+b").close()
""",
    "writes to the library": """
import os
open(os.path.join(os.path.dirname(os.__file__), "$mark.py"), "w").close()
""",
    "changes modes": """
import os, sys
os.chmod(sys.executable, 0o777)
""",
    "changes a device's mode": """
import os
os.chmod("/dev/null", 0o600)
""",
    "reads the disk": """
import os, stat
os.mknod("disk", stat.S_IFBLK | 0o600, os.stat(os.__file__).st_dev)
open("disk", "rb").read(1)
""",
    "mounts": """
import ctypes
library = ctypes.CDLL(None)
assert 0 in (library.mount(b"tmpfs", b"/dev", b"tmpfs", 0, None), library.umount2(b"/tmp", 2), library.chroot(b"/tmp"))
""",
    "becomes root of a new namespace": """
import ctypes
assert ctypes.CDLL(None).unshare(0x10000000) == 0
""",
    "reads the environment": """
import ctypes, os
library = ctypes.CDLL(None)
library.getenv.restype = ctypes.c_char_p
assert "$mark" in str(os.environ) or library.getenv(b"SECRET")
""",
    "reads the parent's environment": "open('/proc/$parent/environ').read()",
    "reads process 1": "open('/proc/1/environ').read() + open('/proc/1/cmdline').read()",
    "traces process 1": """
import ctypes
assert ctypes.CDLL(None).ptrace(16, 1, None, None) == 0
""",
    "reads the memory of process 1": """
import ctypes, os
library = ctypes.CDLL(None)
place = ctypes.create_string_buffer(8)
local, remote = ((ctypes.c_size_t * 2)(ctypes.addressof(place), 8) for _ in range(2))
assert library.process_vm_readv(1, local, 1, remote, 1, 0) > 0
""",
    "has others' descriptors": """
import os
def is_open(descriptor):
    try: return bool(os.fstat(descriptor))
    except OSError: return False
assert sum(map(is_open, range(64))) > 5  # three of every process, and two pipes' ends
""",
    "connects": """
import socket
socket.create_connection(("127.0.0.1", $port), timeout=5)
""",
    "connects to an abstract socket": """
import socket
socket.socket(socket.AF_UNIX).connect("\\0$mark")
""",
    "connects to the internet": """
import socket
socket.create_connection(("1.1.1.1", 53), timeout=5)
""",
    "signals a process": """
import os
os.kill($parent, 0)
""",
    "leaves a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(100)
    os._exit(0)
time.sleep(0.2)
os._exit(0)
""",
    "kills its group": """
import os, signal
os.kill(0, signal.SIGKILL)
""",
}
