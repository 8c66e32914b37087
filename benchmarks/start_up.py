"""Time what a user waits for before anything happens: imports, help, lists and errors of arguments.

Every measurement is a new process, and all cases take turns. What an import adds to ``import torch, transformers,
peft``, which every script with an adapter pays anyway, is timed inside a process that has just imported these; the
difference of whole processes within a round stands beside it.

    python benchmarks/start_up.py --output benchmarks/start_up.json
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from record import (
    Case,
    Target,
    environment,
    interleaved,
    print_table,
    print_targets,
    save_record,
    spread,
    target_records,
)

BASE = "import torch, transformers, peft"
IMPORTS = ("import tangora", "from tangora import TangentAdam", "from tangora import Trainer")
COMMANDS = {
    "tangora --version": ["--version"],
    "tangora --help": ["--help"],
    "tangora train --help": ["train", "--help"],
    "tangora compare --help": ["compare", "--help"],
    "tangora list": ["list"],
    "tangora train, unknown flag": ["train", "--stepz", "3", "--output", "out"],
    "tangora train, unknown recipe": ["train", "--recipe", "tangnt", "--output", "out"],
    "tangora train, missing data": ["train", "--data", "nowhere.csv", "--output", "out"],
    "tangora compare, unknown preset": ["compare", "--preset", "quick", "--output", "out"],
}
TIMED = "{base}; import time; begin = time.perf_counter(); {added}; print(time.perf_counter() - begin)"


def process(*arguments: str) -> str:
    """Run Python to its end, whatever it ends with, and return what it printed."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, check=False, text=True).stdout


def main() -> None:
    """Time all cases, print them and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("start_up.json"))
    options = parser.parse_args()
    facts = environment()
    inside: dict[str, list[float]] = {name: [] for name in IMPORTS}

    def time_import(name: str) -> None:
        inside[name].append(float(process("-c", TIMED.format(base=BASE, added=name))))

    cases = [Case(BASE, partial(process, "-c", BASE), warmup=0)]
    cases += [Case(name, partial(time_import, name), warmup=0) for name in IMPORTS]
    cases += [
        Case(name, partial(process, "-m", "tangora.cli", *words), warmup=0)
        for name, words in COMMANDS.items()
    ]
    interleaved(cases, 1)  # fills the caches of the disk and of compiled files
    for values in inside.values():
        values.clear()
    times = interleaved(cases, options.rounds)
    seconds = {name: spread(values) for name, values in times.items()}
    added = {name: spread(values) for name, values in inside.items()}
    difference = {
        name: spread([x - y for x, y in zip(times[name], times[BASE], strict=True)]) for name in IMPORTS
    }
    targets = [
        Target("import tangora, added", added["import tangora"]["median"], 0.3),
        Target(
            "from tangora import TangentAdam, added", added["from tangora import TangentAdam"]["median"], 0.3
        ),
        *(Target(name, seconds[name]["median"], 1.0) for name in COMMANDS),
    ]
    tables = {"whole process": seconds, "added to the base": added, "difference to the base": difference}
    for title, values in tables.items():
        rows = [
            (name, *(f"{each[key]:.3f}" for key in ("median", "min", "max"))) for name, each in values.items()
        ]
        print_table(f"seconds, {title}", ("what", "median", "min", "max"), rows)
    print_targets(targets)
    save_record(
        options.output,
        {
            **facts,
            "base": BASE,
            "seconds": seconds,
            "added_to_base": added,
            "difference_to_base": difference,
            "targets": target_records(targets),
        },
    )


if __name__ == "__main__":
    main()
