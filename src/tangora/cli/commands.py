"""One function per command: parses, calls, prints."""

import os
import shlex
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tangora._checks import InputError
from tangora.cli.flags import about, assignments, check_paths, takes, with_file, with_lists
from tangora.cli.output import console, experiment_table, interruptible, progress_bars
from tangora.experiments.comparison.plan import CompareSettings, PlanSettings, chosen_tasks, read_plan
from tangora.experiments.comparison.resources import Resources
from tangora.experiments.curvature.settings import RECORD as CURVATURE_RECORD
from tangora.experiments.curvature.settings import CurvatureSettings
from tangora.experiments.diagnose.settings import DiagnoseSettings
from tangora.experiments.presets import PRESETS, preset
from tangora.experiments.reproduce.registry import experiment, settings_of
from tangora.experiments.settings import (
    RunSettings,
    TaskSettings,
    adapter_settings,
    read_yaml,
    validated,
)
from tangora.recipes import recipes as all_recipes

# what needs torch is imported in the commands, once their arguments are known to be good: help and errors come at once

app = typer.Typer(
    name="tangora",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _tell_version(wanted: bool) -> bool:
    if wanted:
        console.print(f"tangora {version('tangora')}", highlight=False)
        raise typer.Exit
    return wanted


@app.callback()
def tangora(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Say the version, and end."),
    ] = False,
) -> None:
    """LoRA fine-tuning that follows full fine-tuning."""


ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with any of these settings; flags win.")
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Output folder; the same command continues what is there.")
]


@app.command("train")
@takes(RunSettings)
def train_command(output: Output, config: ConfigFile = None, **values: Any) -> None:
    """Train one model with one method; writes the adapter, metrics.jsonl and record.json.

    [dim]Examples:[/dim]
      tangora train --output out
      tangora train --model smollm2-135m --data reasoning-gym:chain_sum --recipe tangent --exact-match --output out
      tangora train --model ./my-model --data data.jsonl --recipe lora-pro --learning-rate 1e-4 --output out
    """
    settings = validated(RunSettings, with_file(values, config), str(config or ""))
    check_paths(settings)
    from tangora.cli.results import print_run, watcher_of
    from tangora.experiments.train import RECORD, last_step, train

    def next_time() -> str:
        step = last_step(output)
        return f"goes on from step {step}" if step else "begins again; --save-every keeps checkpoints"

    there = os.path.isfile(output / RECORD)
    with interruptible(next_time), progress_bars() as bars:
        bar = bars.add_task(settings.recipe, total=settings.steps, note="", visible=not there)
        record = train(settings, output, watcher=watcher_of(bars, bar))
    if there:
        console.print(f"already {record.status}: nothing was run; choose another --output to run it again")
    print_run(record, output)


@app.command("compare")
@takes(TaskSettings)
def compare_command(
    output: Output,
    plan: Annotated[
        Path | None, typer.Argument(help="YAML file with any of these settings, for one task or several.")
    ] = None,
    config: ConfigFile = None,
    preset_name: Annotated[
        str | None, typer.Option("--preset", help=f"{', '.join(PRESETS)}; other flags change it.")
    ] = None,
    recipes: Annotated[str | None, typer.Option(help="Names of the methods, separated by commas.")] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(help="One grid for all, separated by commas; a YAML file can give one for each method."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Separated by commas; the first ones sweep.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same as --seeds with one number.")] = None,
    judge_by: Annotated[str | None, typer.Option(help=about(CompareSettings, "judge_by"))] = None,
    sweep_seeds: Annotated[int | None, typer.Option(help=about(CompareSettings, "sweep_seeds"))] = None,
    extend: Annotated[int | None, typer.Option(help=about(CompareSettings, "extend"))] = None,
    refine: Annotated[int | None, typer.Option(help=about(CompareSettings, "refine"))] = None,
    halving: Annotated[int | None, typer.Option(help=about(CompareSettings, "halving"))] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the report.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Of a plan with several tasks only these, separated by commas.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side; they share the cores.")] = 1,
    max_hours: Annotated[
        float | None, typer.Option(min=0, help="Begin no run that is not expected to end by then.")
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option(help="Gigabytes that each run may allocate, on a CPU under Linux.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Make failed runs again.")] = False,
    **values: Any,
) -> None:
    """Compare methods, each with its own learning-rate sweep and several seeds; writes report.html.

    Every run has its own process and record: killed at any moment, the same command goes on where it stopped.

    [dim]Examples:[/dim]
      tangora compare --preset quickstart --output results/quickstart
      tangora compare --recipes full,lora,tangent --data reviews.csv --seeds 0,1,2 --output results/reviews
      tangora compare plan.yaml --jobs 2 --max-hours 8 --output results/plan
    """
    lists = {
        "recipes": recipes,
        "learning_rates": learning_rates,
        "seeds": seeds,
        "seed": seed,
        "extend": extend,
        "refine": refine,
        "judge_by": judge_by,
        "sweep_seeds": sweep_seeds,
        "halving": halving,
        "title": title,
    }
    values |= {key: value for key, value in lists.items() if value is not None}
    if plan is not None and config is not None:
        raise InputError(f"give one plan, not both {plan} and {config}")
    source = plan or config
    base = preset(preset_name) if preset_name else {}
    given = base | (read_yaml(source) if source is not None else {})
    settings = chosen_tasks(read_plan(given, with_lists(values, given), str(source or "")), tasks)
    resources = Resources(jobs, max_hours, max_memory, retry)
    check_paths(*(settings.tasks.values() if isinstance(settings, PlanSettings) else [settings]))
    from tangora.cli.results import ComparisonBars, print_outcome, print_study
    from tangora.experiments.compare import StudyOutcome, compare, compare_tasks

    told = shlex.join(["tangora", *sys.argv[1:]])
    with interruptible(lambda: watcher.next_time), progress_bars() as bars:
        watcher = ComparisonBars(bars)
        options: dict[str, Any] = {
            "command": told,
            "watcher": watcher,
            "resources": resources,
        }
        if isinstance(settings, PlanSettings):
            study = compare_tasks(settings, output, **options)
        else:
            study = compare(settings, output, **options)
    if not watcher.begun:
        console.print("already finished: nothing was run")
    if isinstance(study, StudyOutcome):
        print_study(study)
    else:
        print_outcome(study)
    outcomes = study.outcomes.values() if isinstance(study, StudyOutcome) else [study]
    if any(each.failed or not each.proven for each in outcomes):
        raise typer.Exit(1)


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="Output folder of tangora train, or a run of tangora compare.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Cut every update to this rank; default: exact.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model with its tokenizer.")] = False,
) -> None:
    """Write the adapter of a run at another rank, or merged into its base model.

    [dim]Examples:[/dim]
      tangora export out --rank 8 --output small
      tangora export out --merge --output model
    """
    adapter_settings(run)
    from tangora.experiments.export import export

    with interruptible():
        exported = export(run, output, rank=rank, merge=merge)
    console.print(f"{'model  ' if exported.merged else 'adapter'}  {escape(str(exported.path))}")
    if rank is not None:
        console.print(
            f"cut to rank {rank}: this changes the updates by {exported.relative_error:.2%} of their norm"
        )


@app.command("diagnose")
@takes(DiagnoseSettings)
def diagnose_command(output: Output, config: ConfigFile = None, **values: Any) -> None:
    """Measure how much of the full gradient LoRA sees; writes diagnosis.html and rank_plan.json.

    [dim]Examples:[/dim]
      tangora diagnose --output out
      tangora diagnose --model smollm2-135m --data reasoning-gym:chain_sum --budget-rank 8 --output out
      tangora diagnose --model ./my-model --data data.jsonl --adapter out/adapter --output after
    """
    settings = validated(DiagnoseSettings, with_file(values, config), str(config or ""))
    check_paths(settings)
    from tangora.cli.results import print_diagnosis
    from tangora.experiments.diagnose.measure import diagnose_task

    with interruptible(), progress_bars() as bars:
        bar = bars.add_task("diagnose", total=None, note="")
        files = diagnose_task(
            settings,
            output,
            command=shlex.join(["tangora", *sys.argv[1:]]),
            phase=lambda name: bars.update(bar, note=name),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    print_diagnosis(files)


@app.command("curvature")
@takes(CurvatureSettings)
def curvature_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Folder of tangora train or of a run of tangora compare; or a model: packaged name, folder, hub name.",
        ),
    ],
    output: Output,
    config: ConfigFile = None,
    **values: Any,
) -> None:
    """Measure the Hessian of the loss: largest eigenvalues, spectral density, trace; writes curvature.html.

    [dim]Examples:[/dim]
      tangora curvature out --output out/curvature
      tangora curvature smollm2-135m --data reasoning-gym:chain_sum --adapter out/adapter --output after
      tangora curvature out --per-layer --per-batch --landscape --gauss-newton --output all
    """
    given = with_file(values, config) | {"source": source}
    settings = validated(CurvatureSettings, given, str(config or ""))
    check_paths(settings)
    from tangora.cli.results import print_curvature
    from tangora.experiments.curvature.measure import measure_curvature

    with interruptible(), progress_bars() as bars:
        bar = bars.add_task("products", total=None, note="")
        files = measure_curvature(
            settings,
            output,
            command=shlex.join(["tangora", *sys.argv[1:]]),
            phase=lambda name: bars.update(bar, note=name),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    print_curvature(files)


@app.command("reproduce")
def reproduce_command(
    name: Annotated[
        str | None, typer.Argument(help="Name of the experiment; without it they are listed.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Output folder [dim]\\[default: reproduced/NAME][/dim]."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds instead of minutes.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated."),
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
        console.print(experiment_table())
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


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="Output folder of tangora compare or tangora curvature.")],
) -> None:
    """Write tables, pictures and pages of a comparison, on one task or several, or of a measured curvature, again.

    [dim]Example:[/dim]
      tangora report results/quickstart
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder; give the output folder of tangora compare or tangora curvature"
        )
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


@app.command("list")
def list_command() -> None:
    """List the methods, and the experiments that can be repeated.

    [dim]Example:[/dim]
      tangora list
    """
    table = Table(box=None)
    for heading in ("recipe", "what it is", "source", "default learning rates"):
        table.add_column(heading, overflow="fold")
    for entry in all_recipes():
        table.add_row(
            entry.name, entry.summary, entry.paper, ", ".join(f"{lr:g}" for lr in entry.learning_rates)
        )
    console.print(table)
    console.print(experiment_table())


def main() -> None:
    """Run the command line; bad input ends with one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT asks for the old name whenever it wraps a model
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    try:
        app()
    except InputError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command continues where it stopped")
        raise SystemExit(130) from None
