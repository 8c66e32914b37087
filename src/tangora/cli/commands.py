"""Commands that train and measure: each parses, calls, prints."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tangora._checks import InputError
from tangora.cli.app import RESOURCES, Command, ConfigFile, Output, app
from tangora.cli.flags import check_paths, names_for, option, takes, with_file
from tangora.cli.output import console, interruptible, progress_bars
from tangora.experiments.comparison.plan import CompareSettings, PlanSettings, chosen_tasks, read_plan
from tangora.experiments.comparison.resources import Resources
from tangora.experiments.curvature.settings import CurvatureSettings
from tangora.experiments.diagnose.settings import DiagnoseSettings
from tangora.experiments.presets import PRESETS, preset
from tangora.experiments.settings import RunSettings
from tangora.experiments.stored import adapter_settings
from tangora.experiments.values import read_yaml, validated

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
    settings = validated(RunSettings, with_file(RunSettings, values, config), str(config or ""))
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


@app.command("compare", cls=Command)
@takes(CompareSettings)
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
            f"Comparison that comes with tangora; other flags change it. One of {', '.join(PRESETS)}.",
            "--preset",
            autocompletion=names_for("preset"),
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        option("Model and data", "<list>", "Tasks of the plan to run, separated by commas. Default: all."),
    ] = None,
    jobs: Annotated[int, option(RESOURCES, "<int>", "Parallel runs; they share the cores.", min=1)] = 1,
    max_hours: Annotated[
        float | None,
        option(
            RESOURCES,
            "<float>",
            "Time limit in hours: do not start a run that is expected to exceed it.",
            min=0,
        ),
    ] = None,
    max_memory: Annotated[
        float | None,
        option(RESOURCES, "<float>", "Memory limit of each run in gigabytes, on a CPU under Linux."),
    ] = None,
    retry: Annotated[bool, option(RESOURCES, "", "Repeat failed runs.", "--retry")] = False,
    **values: Any,
) -> None:
    r"""Compare methods, each with its own learning-rate sweep and several seeds; writes report.html.

    Every run has its own process and record: after any interruption, the same command continues.

    [dim]Examples:[/dim]
      tangora compare --preset quickstart --output results/quickstart
      tangora compare --recipes full,lora,tangent --data reviews.csv \
        --seeds 0,1,2 --output results/reviews
      tangora compare plan.yaml --jobs 2 --max-hours 8 --output results/plan
    """
    if plan is not None and config is not None:
        raise InputError(f"give one plan, not both {plan} and {config}")
    source = plan or config
    base = preset(preset_name) if preset_name else {}
    given = CompareSettings.overridden(base, read_yaml(source) if source is not None else {})
    settings = chosen_tasks(read_plan(given, values, str(source or "")), tasks)
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
            "Write one rank and one alpha for all layers, for readers without patterns (GGUF, some servers).",
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
        raise InputError("--uniform is for adapters, and --merge writes a whole model; give one of them")
    settings = adapter_settings(run)
    from tangora.experiments.export import export

    with interruptible():
        exported = export(run, output, rank=rank, merge=merge, uniform=uniform)
    console.print(f"{'model  ' if exported.merged else 'adapter'}  {escape(str(exported.path))}")
    if merge and settings.load_in_4bit:
        console.print("trained on a 4-bit base, merged into the base in full precision")
    if rank is not None:
        console.print(
            f"cut to rank {rank}: this changes the updates by {exported.relative_error:.2%} of their norm"
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
    settings = validated(DiagnoseSettings, with_file(DiagnoseSettings, values, config), str(config or ""))
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

    [dim]Examples:[/dim]
      tangora curvature out --output out/curvature
      tangora curvature smollm2-135m --data reasoning-gym:chain_sum \
        --adapter out/adapter --output after
      tangora curvature out --per-layer --per-batch --landscape --output all
    """
    given = with_file(CurvatureSettings, values, config) | {"source": source}
    settings = validated(CurvatureSettings, given, str(config or ""))
    check_paths(settings)
    from tangora.cli.results import print_curvature
    from tangora.experiments.curvature.measurement import measure_curvature

    with interruptible(), progress_bars() as bars:
        bar = bars.add_task("products", total=None, note="")
        files = measure_curvature(
            settings,
            output,
            command=shlex.join(["tangora", *sys.argv[1:]]),
            progress=lambda what, done, total: bars.update(
                bar, note=what, completed=done, total=total or None
            ),
        )
    print_curvature(files)
