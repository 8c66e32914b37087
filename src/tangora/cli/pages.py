"""Commands that repeat, rewrite or list what is there."""

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tangora._checks import InputError
from tangora.cli.app import RESOURCES, Command, app
from tangora.cli.flags import assignments, option
from tangora.cli.listing import experiments, listing
from tangora.cli.output import console, interruptible, progress_bars
from tangora.experiments.curvature.settings import RECORD as CURVATURE_RECORD
from tangora.experiments.reproduce.registry import EXPERIMENTS, experiment, settings_of


@app.command("reproduce", cls=Command)
def reproduce_command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Name of the experiment. Default: list them.",
            autocompletion=lambda incomplete: [each for each in EXPERIMENTS if each.startswith(incomplete)],
        ),
    ] = None,
    output: Annotated[
        Path | None,
        option(RESOURCES, "<folder>", "Output folder. Default: reproduced/NAME.", "--output", "-o"),
    ] = None,
    quick: Annotated[
        bool, option("Accuracy and cost", "", "Reduced size: seconds instead of minutes.", "--quick")
    ] = False,
    seed: Annotated[int | None, option("Accuracy and cost", "<int>", "Random seed.")] = None,
    changes: Annotated[
        list[str] | None,
        option("Accuracy and cost", "KEY=VALUE", "Change a setting; may be repeated.", "--set"),
    ] = None,
) -> None:
    """Repeat an experiment of the papers; writes reproduction.html and checks what the paper states.

    Ends with exit code 1 if a check fails at full size.

    [dim]Examples:[/dim]
      tangora reproduce
      tangora reproduce toy --output out
      tangora reproduce linear-shift --quick --seed 3 --set rank=8 --output out
    """
    if name is None:
        console.print(experiments())
        return
    wanted = experiment(name)
    settings = settings_of(wanted, assignments(changes or []), quick=quick, seed=seed)
    from tangora.cli.results import print_reproduction
    from tangora.experiments.reproduce.run import reproduce

    with interruptible(), progress_bars() as bars:
        bar = bars.add_task(name, total=None, note="")
        files = reproduce(
            wanted,
            settings,
            output or Path("reproduced") / name,
            quick=quick,
            command=shlex.join(["tangora", *sys.argv[1:]]),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    print_reproduction(files)
    if not (quick or files.record.result.passed):
        raise typer.Exit(1)


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
    from tangora.report.records import COMPARISON_FILE

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
    from tangora.experiments.curvature.measure import CurvatureFiles, rewrite
    from tangora.report import load_comparison, load_study, rich_table, summarize, write_study
    from tangora.report.comparison.flatness import has_flatness, rich_flatness
    from tangora.report.curvature import load_curvature
    from tangora.report.records import COMPARISON_FILE

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
    """List the recipes, and the models, data, comparisons and experiments that come with tangora.

    [dim]Example:[/dim]
      tangora list
    """
    console.print(listing(), highlight=False)
