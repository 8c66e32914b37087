"""Shared by the benchmarks: interleaved timing, facts of the machine, and JSON that is written whole or not at all."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from tangora.report.record_files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "peft", "transformers", "tangora")


@dataclass
class Case:
    """Something to time, again and again.

    Attributes:
        name: Unique among the cases timed together.
        run: What is timed.
        prepare: Called before each run, outside the timing.
        warmup: Runs that are not counted: states are created in the first, and checks of the first steps fall away.
        rounds: Rounds it takes part in, from the first; ``None`` for all.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    warmup: int = 4
    rounds: int | None = None


@dataclass(frozen=True)
class Target:
    """A number that must hold.

    Attributes:
        name: What was measured.
        value: The number.
        limit: What it is compared with.
        at_least: Whether the limit is a lower bound; an upper bound otherwise.
        passed: Whether the number keeps to it.
    """

    name: str
    value: float
    limit: float
    at_least: bool = False
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        kept = self.value >= self.limit if self.at_least else self.value <= self.limit
        object.__setattr__(self, "passed", kept)


def interleaved(cases: Sequence[Case], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Time all cases once per round, in one process, so that what the machine does meets all of them alike.

    The order is rotated from round to round: nobody always follows the same neighbour.

    Args:
        cases: What to time.
        rounds: Number of rounds, at least 1.
        device: On ``cuda`` the clock is read with the device idle: it counts launches and kernels.

    Returns:
        Seconds per case, one number per round that it took part in.
    """
    for case in cases:
        for _ in range(case.warmup):
            case.prepare()
            case.run()
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for index in range(rounds):
        first = index % len(cases)
        for case in [*cases[first:], *cases[:first]]:
            if case.rounds is None or index < case.rounds:
                case.prepare()
                times[case.name].append(timed(case.run, device))
    return times


def timed(run: Callable[[], Any], device: str = "cpu") -> float:
    """Run something once and return the seconds that it took.

    Args:
        run: What is timed.
        device: On ``cuda`` the device is waited for before and after.

    Returns:
        Seconds.
    """
    synchronize(device)  # what `prepare` has launched must not count
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until the device has done all its work.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1`` …
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Summarise repeated measurements.

    Args:
        values: At least one number.

    Returns:
        Median, minimum, maximum and their count.
    """
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": len(values),
    }


def ratios(times: Mapping[str, Sequence[float]], name: str, baseline: str) -> dict[str, float]:
    """Compare two cases round by round: a median of ratios is blind to a machine that slows down for a while.

    Args:
        times: What `interleaved` returned.
        name: Numerator.
        baseline: Denominator.

    Returns:
        `spread` of the ratios over the rounds in which both took part.
    """
    return spread([x / y for x, y in zip(times[name], times[baseline], strict=False)])


def environment(device: str = "cpu") -> dict[str, Any]:
    """Gather what a reader needs to judge the numbers; no host names and no absolute paths.

    Args:
        device: Device measured on.

    Returns:
        Command, commit, versions, machine and date.
    """
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": command(),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **packages},
        "machine": machine(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def command() -> str:
    """Return the command line, as it would be typed in the project's root."""
    words = [sys.argv[0], *sys.argv[1:]]
    return "python " + " ".join(_without_folders(word) for word in words)


def _without_folders(word: str) -> str:
    path = Path(word)
    if path.suffix == ".py":
        path = path.resolve()
    if not path.is_absolute():
        return word
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def commit() -> dict[str, Any]:
    """Return the commit, and whether the tree differs from it in anything but recorded benchmarks."""
    found = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/*.json")
    return {"hash": found or "unknown", "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the processor, the threads that torch uses, how busy the machine is, and the accelerator.

    Args:
        device: Device measured on.

    Returns:
        Names and numbers.
    """
    facts = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
    }
    if device.startswith("cuda"):
        facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def save_record(path: Path, record: Mapping[str, Any]) -> Path:
    """Write a benchmark's record as JSON.

    Args:
        path: Where; an existing file is replaced as a whole.
        record: Numbers, strings, lists and dictionaries. Floating-point numbers are rounded to six digits.

    Returns:
        The path.
    """
    return write_atomic(path, json.dumps(rounded(record), indent=2, allow_nan=False) + "\n")


def rounded(value: Any) -> Any:
    """Round floating-point numbers to six digits, as a record has them.

    Args:
        value: Numbers, strings, lists and dictionaries.

    Returns:
        The same of rounded numbers.
    """
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def target_records(targets: Iterable[Target]) -> list[dict[str, Any]]:
    """Turn targets into what `save_record` takes.

    Args:
        targets: Targets.

    Returns:
        One dictionary each.
    """
    return [asdict(target) for target in targets]


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table.

    Args:
        title: Above it.
        columns: Heads; the first column is text, the others are numbers.
        rows: Cells.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # a log has no width: never cut numbers there
    (console if console.is_terminal else Console(width=160)).print(table)


def print_targets(targets: Sequence[Target], *, judged: bool = True) -> None:
    """Print the targets with their verdicts.

    Args:
        targets: Targets.
        judged: False for a trial run, whose numbers mean nothing.
    """
    rows = []
    for target in targets:
        verdict = ("pass" if target.passed else "FAIL") if judged else "not judged"
        bound = "at least" if target.at_least else "at most"
        rows.append((target.name, f"{target.value:.3g}", f"{bound} {target.limit:g}", verdict))
    print_table("targets", ("target", "measured", "limit", "verdict"), rows)
