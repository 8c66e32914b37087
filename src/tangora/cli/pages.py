"""Commands that rewrite or list what is there."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tangora._checks import InputError
from tangora.cli.app import Command, app
from tangora.cli.listing import listing
from tangora.cli.output import console, interruptible
from tangora.experiments.curvature.settings import RECORD as CURVATURE_RECORD

_ANYTHING = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command("reproduce", cls=Command, hidden=True, add_help_option=False, context_settings=_ANYTHING)
def reproduce_command() -> None:
    """Say where the experiments of the papers have moved."""
    raise InputError(
        "tangora reproduce has moved out of the package: in a checkout of tangora's repository, run "
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
            f"{folder} is no folder; give the output folder of tangora compare or tangora curvature"
        )
    from tangora.experiments.folders import locked
    from tangora.report.run_records import COMPARISON_FILE

    tasks = sorted(path.parent for path in folder.glob(f"*/{COMPARISON_FILE}"))
    if not (tasks or any((folder / name).is_file() for name in (CURVATURE_RECORD, COMPARISON_FILE))):
        raise InputError(
            f"{folder} holds no comparison that has ended and no measured curvature; give the output folder of tangora "
            "compare or tangora curvature"
        )
    with interruptible(), contextlib.ExitStack() as held:
        for each in (folder, *tasks):
            held.enter_context(locked(each))
        _rewrite(folder)


def _rewrite(folder: Path) -> None:
    # writes the pages of whatever the folder holds
    from tangora.cli.results import print_curvature, print_tasks
    from tangora.experiments.compare import write_report
    from tangora.experiments.curvature.measurement import CurvatureFiles, rewrite
    from tangora.report import load_comparison, load_study, rich_table, summarize, write_study
    from tangora.report.comparison.end_points import has_flatness, rich_flatness
    from tangora.report.curvature import load_curvature
    from tangora.report.run_records import COMPARISON_FILE

    if (folder / CURVATURE_RECORD).is_file():
        record = load_curvature(folder / CURVATURE_RECORD)
        print_curvature(CurvatureFiles(record, folder / CURVATURE_RECORD, *rewrite(folder, record)))
        return
    if not (folder / COMPARISON_FILE).is_file() and any(folder.glob(f"*/{COMPARISON_FILE}")):
        comparisons, title, command = load_study(folder)
        for name, comparison in comparisons.items():
            if comparison.records:
                write_report(comparison, folder / name)
        print_tasks(comparisons, write_study(comparisons, folder / "report.html", title, command))
        return
    comparison = load_comparison(folder)
    page, rows = write_report(comparison, folder), summarize(comparison)
    console.print(rich_table(rows, comparison))
    if has_flatness(comparison):
        console.print(rich_flatness(comparison, rows))
    console.print(f"report   {escape(str(page))}")


@app.command("list", cls=Command)
def list_command() -> None:
    """List the recipes, and the models, data and comparisons that come with tangora.

    [dim]Example:[/dim]
      tangora list
    """
    console.print(listing(), highlight=False)
