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
from typer.core import TyperCommand
from typer.exceptions import TyperException

from tangora._checks import InputError
from tangora.cli.errors import one_line
from tangora.cli.flags import assignments, check_paths, names_for, takes, with_file
from tangora.cli.listing import experiments, listing
from tangora.cli.output import console, progress_bars
from tangora.experiments.comparison.plan import CompareSettings, PlanSettings, chosen_tasks, read_plan
from tangora.experiments.comparison.resources import Resources
from tangora.experiments.curvature.settings import RECORD as CURVATURE_RECORD
from tangora.experiments.curvature.settings import CurvatureSettings
from tangora.experiments.diagnose.settings import DiagnoseSettings
from tangora.experiments.presets import PRESETS, preset
from tangora.experiments.reproduce.registry import EXPERIMENTS, experiment, settings_of
from tangora.experiments.settings import RunSettings, adapter_settings, read_yaml, validated

# what needs torch is imported in the commands, once their arguments are known to be good: help and errors come at once

app = typer.Typer(
    name="tangora",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["--help", "-h"],
        # --learning_rate is --learning-rate
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)

_RESOURCES = "Output and resources"
_INTERRUPTED = 130  # what typer makes of Ctrl-C


class _Command(TyperCommand):
    """A command whose help stands among the other flags, not in front of them."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the flag of the help."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel, option.metavar = _RESOURCES, ""
        return option


def _tell_version(wanted: bool) -> bool:
    if wanted:
        console.print(f"tangora {version('tangora')}", highlight=False)
        raise typer.Exit
    return wanted


@app.callback()
def tangora(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_tell_version,
            is_eager=True,
            metavar="",
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Train and compare LoRA methods, and measure how closely they follow full fine-tuning."""


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="<file>",
        rich_help_panel=_RESOURCES,
        help="YAML file with any of these settings. Flags win; --no-NAME switches a setting off.",
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="<folder>",
        rich_help_panel=_RESOURCES,
        help="Output folder; the same command resumes an interrupted run.",
    ),
]


@app.command("train", cls=_Command)
@takes(RunSettings)
def train_command(output: Output, config: ConfigFile = None, **values: Any) -> None:
    r"""Train one model with one method; writes the adapter, metrics.jsonl and record.json.

    [dim]Examples:[/dim]
      tangora train --output out
      tangora train --model smollm2-135m --data reasoning-gym:chain_sum \
        --recipe tangent --exact-match --output out
      tangora train --model ./my-model --data data.jsonl --epochs 3 \
        --recipe lora-pro --learning-rate 1e-4 --output out
    """
    settings = validated(RunSettings, with_file(RunSettings, values, config), str(config or ""))
    check_paths(settings)
    from tangora.cli.results import print_run, watcher_of
    from tangora.experiments.train import train

    with progress_bars() as bars:
        bar = bars.add_task(settings.recipe, total=settings.steps, note="")
        record = train(settings, output, watcher=watcher_of(bars, bar))
    print_run(record, output)


@app.command("compare", cls=_Command)
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
        typer.Option(
            "--preset",
            metavar="<text>",
            rich_help_panel="Method",
            autocompletion=names_for("preset"),
            help=f"Comparison that comes with tangora; other flags change it. One of {', '.join(PRESETS)}.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="<list>",
            rich_help_panel="Model and data",
            help="Tasks of the plan to run, separated by commas. Default: all.",
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1, metavar="<int>", rich_help_panel=_RESOURCES, help="Parallel runs; they share the cores."
        ),
    ] = 1,
    max_hours: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="<float>",
            rich_help_panel=_RESOURCES,
            help="Time limit in hours: do not start a run that is expected to exceed it.",
        ),
    ] = None,
    max_memory: Annotated[
        float | None,
        typer.Option(
            metavar="<float>",
            rich_help_panel=_RESOURCES,
            help="Memory limit of each run in gigabytes, on a CPU under Linux.",
        ),
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", metavar="", rich_help_panel=_RESOURCES, help="Repeat failed runs.")
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
    with progress_bars() as bars:
        options: dict[str, Any] = {
            "command": told,
            "watcher": ComparisonBars(bars),
            "resources": resources,
        }
        if isinstance(settings, PlanSettings):
            study = compare_tasks(settings, output, **options)
        else:
            study = compare(settings, output, **options)
    if isinstance(study, StudyOutcome):
        print_study(study)
    else:
        print_outcome(study)


@app.command("export", cls=_Command)
def export_command(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Output folder of tangora train, or a run of tangora compare."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="<folder>", rich_help_panel=_RESOURCES, help="Folder to write."
        ),
    ],
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            "--r",
            min=1,
            metavar="<int>",
            rich_help_panel="Adapter",
            help="Truncate every layer's update to this rank (r). Default: exact.",
        ),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            metavar="",
            rich_help_panel="Adapter",
            help="Write one rank and one alpha for all layers, for readers without patterns (GGUF, some servers).",
        ),
    ] = False,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            metavar="",
            rich_help_panel="Adapter",
            help="Write the whole model with its tokenizer instead of an adapter.",
        ),
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

    exported = export(run, output, rank=rank, merge=merge, uniform=uniform)
    console.print(f"{'model  ' if exported.merged else 'adapter'}  {escape(str(exported.path))}")
    if merge and settings.load_in_4bit:
        console.print("trained on a 4-bit base, merged into the base in full precision")
    if rank is not None:
        console.print(
            f"cut to rank {rank}: this changes the updates by {exported.relative_error:.2%} of their norm"
        )


@app.command("diagnose", cls=_Command)
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

    with progress_bars() as bars:
        bar = bars.add_task("diagnose", total=None, note="")
        files = diagnose_task(
            settings,
            output,
            command=shlex.join(["tangora", *sys.argv[1:]]),
            phase=lambda name: bars.update(bar, note=name),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    print_diagnosis(files)


@app.command("curvature", cls=_Command)
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
    from tangora.experiments.curvature.measure import measure_curvature

    with progress_bars() as bars:
        bar = bars.add_task("products", total=None, note="")
        files = measure_curvature(
            settings,
            output,
            command=shlex.join(["tangora", *sys.argv[1:]]),
            phase=lambda name: bars.update(bar, note=name),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    print_curvature(files)


@app.command("reproduce", cls=_Command)
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
        typer.Option(
            "--output",
            "-o",
            metavar="<folder>",
            rich_help_panel=_RESOURCES,
            help="Output folder. Default: reproduced/NAME.",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            metavar="",
            rich_help_panel="Accuracy and cost",
            help="Reduced size: seconds instead of minutes.",
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(metavar="<int>", rich_help_panel="Accuracy and cost", help="Random seed."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            rich_help_panel="Accuracy and cost",
            help="Change a setting; may be repeated.",
        ),
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

    with progress_bars() as bars:
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


@app.command("report", cls=_Command)
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


@app.command("list", cls=_Command)
def list_command() -> None:
    """List the recipes, and the models, data, comparisons and experiments that come with tangora.

    [dim]Example:[/dim]
      tangora list
    """
    console.print(listing(), highlight=False)


def main() -> None:
    """Run the command line; bad input ends with one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT asks for the old name whenever it wraps a model
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    try:
        code = app(standalone_mode=False)
    except (InputError, TyperException) as error:
        if not (sentence := str(error) if isinstance(error, InputError) else one_line(error)):
            raise SystemExit(2) from None  # without arguments: the help has been printed
        Console(stderr=True).print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True)
        raise SystemExit(2) from None
    if code == _INTERRUPTED:
        Console(stderr=True).print("interrupted; the same command continues where it stopped")
    if code:
        raise SystemExit(code)
