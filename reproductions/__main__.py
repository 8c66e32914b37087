"""``python -m reproductions``: list the experiments, or repeat one and write what it found."""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reproductions import EXPERIMENTS
from tangora._checks import InputError, check_choice
from tangora.cli.output import console, interruptible, progress_bars
from tangora.experiments.values import Settings, validated

PROGRAM = "python -m reproductions"
RECORD, PAGE = "reproduction.json", "reproduction.html"
_EXAMPLES = f"""\
examples:
  {PROGRAM}
  {PROGRAM} toy --output out
  {PROGRAM} linear-shift --quick --seed 3 --set rank=8 --set inputs=rademacher --output out
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Repeat an experiment of a paper; writes reproduction.html and checks what the paper states. "
        "Ends with exit code 1 if a check fails at full size.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of the experiment; default: list them")
    parser.add_argument("--quick", action="store_true", help="reduced size: seconds instead of minutes")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed")
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; may be repeated",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="output folder; default: results/NAME"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input ends with one line and exit code 2, a failed check with 1."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse_args(given)
        if options.name is None:
            console.print(_listing())
            return 0
        check_choice("experiment", options.name, EXPERIMENTS)
        settings = settings_of(
            options.name, _assignments(options.changes), quick=options.quick, seed=options.seed
        )
        record = _reproduce(options, settings, shlex.join([*PROGRAM.split(), *given]))
    except InputError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 2
    return 0 if options.quick or record.result.passed else 1


def settings_of(
    name: str, values: Mapping[str, Any], *, quick: bool = False, seed: int | None = None
) -> Settings:
    """Make the settings of an experiment.

    Args:
        name: Name of the experiment.
        values: Settings by key; they win over all others.
        quick: Whether the small size is the default.
        seed: Shorthand for ``seed``, or for ``seeds`` with one number where the experiment has that.

    Raises:
        InputError: Naming the first bad key, its value and what is allowed.
    """
    module = module_of(name)
    given = dict(module.QUICK) if quick else {}
    if seed is not None:
        fields = module.Settings.model_fields
        if "seed" not in fields and "seeds" not in fields:
            raise InputError(f"{name} takes no seed; allowed: {', '.join(fields)}")
        values = {**values, **({"seed": seed} if "seed" in fields else {"seeds": (seed,)})}
    return validated(module.Settings, given | dict(values))


def module_of(name: str) -> Any:
    """Import an experiment."""
    return import_module(f"reproductions.{name.replace('-', '_')}")


def _assignments(changes: Sequence[str]) -> dict[str, Any]:
    values = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"set must be KEY=VALUE; got {change!r}")
        try:
            values[key.strip().replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"set must be KEY=VALUE with a value as in YAML; got {change!r}") from None
    return values


def _reproduce(options: argparse.Namespace, settings: Settings, command: str) -> Any:
    """Run an experiment; write record, page and pictures; print findings and checks."""
    from reproductions.page import render_page, summary, terminal_table
    from reproductions.result import Record, save_record
    from tangora.experiments.folders import claimed
    from tangora.experiments.provenance import provenance
    from tangora.report.drawing.pictures import save_pictures
    from tangora.report.record_files import write_atomic

    name, experiment, module = options.name, EXPERIMENTS[options.name], module_of(options.name)
    folder = options.output or Path("results") / name
    with interruptible(), progress_bars() as bars, claimed(folder, settings):
        bar = bars.add_task(name, total=None, note="")
        start = time.perf_counter()
        result = module.run(settings, lambda done, total: bars.update(bar, completed=done, total=total))
        record = Record(
            name=name,
            title=experiment.title,
            source=experiment.source,
            stand_ins=module.STAND_INS,
            quick=options.quick,
            command=command,
            settings=settings.model_dump(mode="json"),
            result=result,
            seconds=time.perf_counter() - start,
            **provenance(),
        )
        page = write_atomic(folder / PAGE, render_page(record))
        numbers = save_record(record, folder / RECORD)
        pictures = save_pictures(result.figures, folder)
    for sentence in result.findings:
        console.print(escape(sentence))
    console.print(terminal_table(record))
    console.print(escape(summary(record)))
    for what, path in (("report ", page), ("numbers", numbers), *(("picture", path) for path in pictures)):
        console.print(f"{what}  {escape(str(path))}")
    return record


def _listing() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, each in EXPERIMENTS.items():
        table.add_row(name, f"{escape(each.title)}\n[dim]{escape(f'{each.source}; {each.duration}')}[/dim]")
    return table


if __name__ == "__main__":
    sys.exit(main())
