"""Commands that train and measure: each parses, calls, prints."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tangora._checks import InputError
from tangora._folders import RunFolder
from tangora.cli.app import RESOURCES, Command, ConfigFile, Output, app
from tangora.cli.flags import check_paths, from_flags, given_for, names_for, option, takes
from tangora.cli.output import (
    ComparisonBars,
    bar_of,
    console,
    interruptible,
    notes_printed,
    progress_bars,
)
from tangora.experiments.comparison.plan import (
    CompareSettings,
    PlanSettings,
    chosen_tasks,
    read_plan,
)
from tangora.experiments.comparison.resources import Resources
from tangora.experiments.measurement_settings import CurvatureSettings, DiagnoseSettings
from tangora.experiments.settings import RunSettings
from tangora.experiments.settings_files import PRESETS, adapter_settings, preset, read_yaml

# what needs torch is imported in the commands, once their arguments are known to be good: help and errors come at once


@app.command("train", cls=Command)
@takes(RunSettings)
def train_command(output: Output, config: ConfigFile = None, **values: Any) -> None:
    r"""Train one model with one method; writes the adapter, metrics.jsonl and record.json.

    [dim]Examples:[/dim]
      tangora train --output out
      tangora train --model smollm2-135m --data reasoning-gym:chain_sum \
        --recipe tangent-muon --exact-match --output out
      tangora train --model ./my-model --data data.jsonl --epochs 3 \
        --recipe lora-pro --learning-rate 1e-4 --output out
    """
    settings = from_flags(RunSettings, values, config)
    from tangora.cli.results import print_run
    from tangora.experiments.process import failed_elsewhere
    from tangora.experiments.train import last_step, train

    def next_time() -> str:
        step = last_step(output)
        again = "starts from the beginning; --save-every keeps checkpoints"
        return f"continues from step {step}" if step else again

    there = os.path.isfile(RunFolder(output).record)  # False for what is no name of a file, too
    with interruptible(next_time, failed_elsewhere), notes_printed(), progress_bars() as bars:
        record = train(settings, output, progress=bar_of(bars, settings.recipe, visible=not there))
    if there:
        console.print(f"already {record.status}: nothing to do; choose another --output to run it again")
    print_run(record, output)


@app.command("compare", cls=Command)
@takes(CompareSettings, Resources)
def compare_command(
    output: Output,
    plan: Annotated[
        Path | None,
        typer.Argument(metavar="PLAN", help="YAML file with any of these settings, for one task or several."),
    ] = None,
    config: ConfigFile = None,
    preset_name: Annotated[
        str | None,
        option(
            "Method",
            "<text>",
            f"Predefined comparison; other flags change it. One of {', '.join(PRESETS)}.",
            "--preset",
            autocompletion=names_for("preset"),
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        option("Model and data", "<list>", "Tasks of the plan to run, separated by commas. Default: all."),
    ] = None,
    tiny: Annotated[
        bool,
        option(
            "Model and data",
            "",
            "Run the stand-in of the preset or plan (its block `tiny`): models and data that end in minutes.",
            "--tiny",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        option(
            RESOURCES,
            "",
            "Print what would run and how much memory it would need; run, download and write nothing.",
            "--dry-run",
        ),
    ] = False,
    **values: Any,
) -> None:
    r"""Compare methods, each with its own learning-rate sweep and several seeds; writes report.html.

    Every run has its own process and record: after any interruption, the same command continues.

    [dim]Examples:[/dim]
      tangora compare --preset quickstart --output results/quickstart
      tangora compare --recipes full,lora,tangent --data reviews.csv \
        --seeds 0,1,2 --output results/reviews
      tangora compare plan.yaml --jobs 2 --max-hours 8 --output results/plan
      tangora compare plan.yaml --cluster slurm \
        --cluster-options time=120,partition=gpu,cpus=8 --output /shared/plan
    """
    if plan is not None and config is not None:
        raise InputError(f"pass one plan, not both {plan} and {config}")
    source = plan or config
    base = preset(preset_name) if preset_name else {}
    given = CompareSettings.overridden(base, read_yaml(source) if source is not None else {})
    planned = read_plan(given, given_for(CompareSettings, values), str(source or ""), tiny=tiny)
    settings = chosen_tasks(planned, tasks)
    resources = from_flags(Resources, values)
    check_paths(*(settings.tasks.values() if isinstance(settings, PlanSettings) else [settings]))
    if dry_run:
        from tangora.cli.forecasts import print_forecasts
        from tangora.experiments.forecast import forecast

        print_forecasts(forecast(settings))
        return
    from tangora.cli.results import print_outcome, print_tasks
    from tangora.experiments.compare import compare, compare_tasks

    with interruptible(lambda: shown.next_time), notes_printed(), progress_bars() as bars:
        shown = ComparisonBars(bars)
        options: dict[str, Any] = {
            "command": _as_given(),
            "progress": shown,
            "resources": resources,
        }
        if isinstance(settings, PlanSettings):
            study = compare_tasks(settings, output, **options)
            outcomes = study.outcomes
        else:
            study = None
            outcomes = {"": compare(settings, output, **options)}
    if not shown.has_run:
        console.print("already finished: nothing to do")
    if study is None:
        print_outcome(*outcomes.values())
    else:
        print_tasks({name: outcome.comparison for name, outcome in outcomes.items()}, study.report)
    if any(each.failed or not each.proven for each in outcomes.values()):
        raise typer.Exit(1)


def _as_given() -> str:
    # the command line, for whoever wants to repeat it
    return shlex.join(["tangora", *sys.argv[1:]])


@app.command("export", cls=Command)
def export_command(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Output folder of tangora train, or a run of tangora compare."),
    ],
    output: Annotated[
        Path,
        option(RESOURCES, "<folder>", "Folder to write.", "--output", "-o"),
    ],
    rank: Annotated[
        int | None,
        option(
            "Adapter",
            "<int>",
            "Truncate every layer's update to this rank (r). Default: exact.",
            "--rank",
            "--r",
            min=1,
        ),
    ] = None,
    uniform: Annotated[
        bool,
        option(
            "Adapter",
            "",
            "Write one rank and one alpha for all layers, for programs that do not support rank "
            "patterns (GGUF, some servers).",
            "--uniform",
        ),
    ] = False,
    merge: Annotated[
        bool,
        option("Adapter", "", "Write the whole model with its tokenizer instead of an adapter.", "--merge"),
    ] = False,
) -> None:
    """Write the adapter of a run at another rank, or merged into its base model.

    [dim]Examples:[/dim]
      tangora export out --rank 8 --output small
      tangora export out --merge --output model
    """
    if uniform and merge:
        raise InputError("--uniform is for adapters, but --merge writes a whole model; pass only one of them")
    settings = adapter_settings(run)
    from tangora.experiments.export_run import export

    with interruptible():
        exported = export(run, output, rank=rank, merge=merge, uniform=uniform)
    console.print(f"{'model  ' if exported.merged else 'adapter'}  {escape(str(exported.path))}")
    if merge and settings.load_in_4bit:
        console.print("trained on a 4-bit base, merged into the base in full precision")
    if rank is not None:
        console.print(
            f"truncated to rank {rank}: this changes the updates by {exported.relative_error:.2%} of "
            "their norm"
        )


@app.command("diagnose", cls=Command)
@takes(DiagnoseSettings)
def diagnose_command(output: Output, config: ConfigFile = None, **values: Any) -> None:
    r"""Measure how much gradient energy LoRA captures; writes diagnosis.html and rank_plan.json.

    [dim]Examples:[/dim]
      tangora diagnose --output out
      tangora diagnose --model smollm2-135m --data reasoning-gym:chain_sum \
        --budget-rank 8 --output out
      tangora diagnose --model ./my-model --data data.jsonl \
        --adapter out/adapter --output after
    """
    settings = from_flags(DiagnoseSettings, values, config)
    from tangora.cli.results import print_diagnosis
    from tangora.experiments.diagnose_task import diagnose_task

    with interruptible(), progress_bars() as bars:
        files = diagnose_task(settings, output, command=_as_given(), progress=bar_of(bars, "diagnose"))
    print_diagnosis(files)


@app.command("curvature", cls=Command)
@takes(CurvatureSettings)
def curvature_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Output folder of tangora train, a run of tangora compare, or a model.",
        ),
    ],
    output: Output,
    config: ConfigFile = None,
    **values: Any,
) -> None:
    r"""Measure the Hessian of the loss: largest eigenvalues, spectral density, trace; writes curvature.html.

    Of a run, data settings that are not given are its own.

    [dim]Examples:[/dim]
      tangora curvature out --output out/curvature
      tangora curvature smollm2-135m --data reasoning-gym:chain_sum \
        --adapter out/adapter --output after
      tangora curvature out --per-layer --per-batch --landscape --output all
    """
    settings = from_flags(CurvatureSettings, values, config, source=source)
    from tangora.cli.results import print_curvature
    from tangora.experiments.curvature.measurement import measure_curvature

    with interruptible(), progress_bars() as bars:
        files = measure_curvature(settings, output, command=_as_given(), progress=bar_of(bars, "products"))
    print_curvature(files)
