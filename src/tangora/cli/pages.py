"""Commands that rewrite pages, or list what can be named on a command line."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tangora._checks import InputError, near_path
from tangora._folders import ComparisonFolder
from tangora._names import DATA, MODELS
from tangora.cli.app import Command, app
from tangora.cli.output import console, interruptible
from tangora.experiments.measurement_settings import CURVATURE_RECORD
from tangora.experiments.settings_files import PRESETS, preset
from tangora.recipes import Recipe, recipe, recipes

_WIDEST = 18
_ANYTHING = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command("reproduce", cls=Command, hidden=True, add_help_option=False, context_settings=_ANYTHING)
def reproduce_command() -> None:
    """Say where the experiments of the papers have moved."""
    raise InputError(
        "tangora reproduce is no longer part of the package: in a checkout of tangora's repository, run "
        "python -m reproductions NAME, or make reproduce NAME=..."
    )


@app.command("report", cls=Command)
def report_command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Output folder of tangora compare or tangora curvature."),
    ],
) -> None:
    """Rewrite the tables, pictures and pages of a comparison or of a curvature measurement.

    [dim]Example:[/dim]
      tangora report results/quickstart
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder{near_path(folder)}; pass the output folder of tangora compare or "
            "tangora curvature"
        )
    from tangora.experiments.folders import locked

    output = ComparisonFolder(folder)
    measured, compared = (folder / CURVATURE_RECORD).is_file(), output.comparison.is_file()
    if not (measured or compared or output.tasks):
        raise InputError(
            f"{folder} contains no finished comparison and no measured curvature; pass the output "
            "folder of tangora compare or tangora curvature"
        )
    with interruptible(), contextlib.ExitStack() as held:
        for each in (output, *output.tasks):
            held.enter_context(locked(each.path))
        if measured:
            _rewrite_curvature(folder)
        elif compared:
            _rewrite_comparison(output)
        else:
            _rewrite_study(output)


def _rewrite_curvature(folder: Path) -> None:
    from tangora.cli.results import print_curvature
    from tangora.experiments.curvature.measurement import CurvatureFiles, rewrite
    from tangora.report.curvature import load_curvature

    record = load_curvature(folder / CURVATURE_RECORD)
    print_curvature(CurvatureFiles(record, folder / CURVATURE_RECORD, *rewrite(folder, record)))


def _rewrite_comparison(folder: ComparisonFolder) -> None:
    from tangora.cli.results import print_tables
    from tangora.experiments.compare import write_report
    from tangora.report import load_comparison

    comparison = load_comparison(folder.path)
    page = write_report(comparison, folder)
    print_tables(comparison)
    console.print(f"report   {escape(str(page))}")


def _rewrite_study(folder: ComparisonFolder) -> None:
    from tangora.cli.results import print_tasks
    from tangora.experiments.compare import write_report
    from tangora.report import load_study, write_study

    comparisons, title, command = load_study(folder.path)
    for name, comparison in comparisons.items():
        if comparison.records:
            write_report(comparison, ComparisonFolder(folder.path / name))
    print_tasks(comparisons, write_study(comparisons, folder.report, title, command))


@app.command("list", cls=Command)
def list_command() -> None:
    """List the recipes, and the models, data and comparisons that come with tangora.

    [dim]Example:[/dim]
      tangora list
    """
    console.print(_listing(), highlight=False)


def group_of(entry: Recipe) -> str:
    """Return the heading under which a recipe is listed: what it changes of LoRA."""
    if entry.adapter is None:
        return "Full fine-tuning"
    own_optimizer = entry.make_optimizer is not recipe("lora").make_optimizer
    if entry.search is not None:
        return "Ranks by AdaLoRA, then an optimizer for LoRA"
    if entry.start is None:
        return "Optimizers for LoRA" if own_optimizer else "LoRA and PEFT's variants, with AdamW"
    return "Initializations with an optimizer" if own_optimizer else "Initializations of LoRA, with AdamW"


def _listing() -> Group:
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for entry in recipes():
        rates = " ".join(map(_short, entry.learning_rates))
        if entry.causal_learning_rates:
            rates += f", for causal models {' '.join(map(_short, entry.causal_learning_rates))}"
        groups.setdefault(group_of(entry), []).append(
            (entry.name, entry.summary, f"{entry.paper}; learning rates {rates}")
        )
    return Group(
        Text(f"{len(recipes())} recipes (--recipe, --recipes)", style="bold"),
        *(_section(heading, rows) for heading, rows in groups.items()),
        _section("Models without a hub (--model)", [(*item, "") for item in MODELS.items()]),
        _section("Data without a hub (--data)", [(*item, "") for item in DATA.items()]),
        _section("Comparisons (--preset)", [(name, preset(name)["title"], "") for name in PRESETS]),
    )


def _section(heading: str, rows: Iterable[tuple[str, str, str]]) -> Group:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="cyan", min_width=_WIDEST, no_wrap=True)
    table.add_column(overflow="fold")
    for name, what, more in rows:
        table.add_row(escape(name), escape(what) + (f"\n[dim]{escape(more)}[/dim]" if more else ""))
    return Group(Text(f"\n{heading}", style="bold"), table)


def _short(rate: float) -> str:
    return f"{rate:g}" if rate >= 0.1 else f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")
