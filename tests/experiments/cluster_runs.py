"""What tests of comparisons on clusters share: a plan, the processes of a run, and how often a run was made."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tangora import CompareSettings

SCRIPT = """
import json, sys
from tangora import CompareSettings, Resources, compare
compare(CompareSettings(**json.loads(sys.argv[1])), sys.argv[2], resources=Resources(**json.loads(sys.argv[3])))
"""


def plan(classifier, **values):
    """Return a comparison of two recipes whose runs take a second or two."""
    given = {
        "recipes": ["lora", "tangent"],
        "learning_rates": {"lora": [1e-3, 3e-3], "tangent": [1e-3]},
        "seeds": [0],
        "steps": 150,
        "batch_size": 4,
    }
    return CompareSettings(**classifier | given | values, kind="classification")


def times_made(folder):
    """Count how often each run was finished, as its log says."""
    log = (Path(folder) / "log.txt").read_text()
    return Counter(re.findall(r"execute: (\S+): finished in", log))


def command(settings, folder, resources):
    """Return the command of a comparison in a process of its own."""
    return [
        sys.executable,
        "-c",
        SCRIPT,
        settings.model_dump_json(),
        str(folder),
        resources.model_dump_json(),
    ]


def killed_after_a_record(words, folder):
    """Start a command and kill it as soon as a run has ended; return the records that there are then."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (kept := contents(folder)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    return kept


def contents(folder):
    """Return the records of a folder, byte by byte."""
    return {path.name: path.read_bytes() for path in (Path(folder) / "records").glob("*.json")}


class Killer:
    """Kills a process of the first run that tells of its progress."""

    def __init__(self, find):
        self.find, self.victim = find, None

    def __call__(self, what, done, total):
        name, _, note = what.partition(": ")
        if self.victim is None and note.startswith("loss"):
            with contextlib.suppress(ProcessLookupError):  # it has just ended: the next one, then
                os.kill(self.find(name), signal.SIGKILL)
                self.victim = name


def process_called(text):
    """Return the number of the process whose title holds a text."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                title = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in title and int(entry.name) != os.getpid():
                return int(entry.name)
    raise ProcessLookupError(text)
