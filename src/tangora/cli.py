"""The command line: parses, calls, prints."""

import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from tangora._checks import InputError
from tangora.experiments.compare import (
    Cell,
    CompareSettings,
    CompareWatcher,
    Outcome,
    compare,
    preset,
    write_report,
)
from tangora.experiments.diagnose import DiagnoseSettings, DiagnosisFiles, diagnose_task
from tangora.experiments.export import export
from tangora.experiments.reproduce.registry import EXPERIMENTS, experiment
from tangora.experiments.reproduce.run import ReproductionFiles, reproduce, settings_of
from tangora.experiments.run import Watcher
from tangora.experiments.settings import RunSettings, Settings, TaskSettings, read_yaml, validated
from tangora.experiments.train import train
from tangora.recipes import recipes as all_recipes
from tangora.report import (
    Record,
    diagnosis_tables,
    findings,
    load_comparison,
    rich_table,
    summarize,
    verdict,
)
from tangora.report.reproduction import outcome, rich_checks

app = typer.Typer(
    name="tangora",
    help="LoRA fine-tuning that follows full fine-tuning.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file with any of these settings; flags win.")
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Output folder; the same command continues what is there.")
]


def takes(settings: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for each setting, described by it.

    Args:
        settings: Where names, types, descriptions and defaults come from.

    Returns:
        A decorator of a function with ``**values``, which receives the flags that were given.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**arguments: Any) -> None:
            command(**{key: value for key, value in arguments.items() if key in own or value is not None})

        signature = inspect.signature(command, eval_str=True)
        own = {
            key: p for key, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD
        }
        flags = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(key, field))
            for key, field in settings.model_fields.items()
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values()] + flags
        call.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


def _flag(key: str, field: FieldInfo) -> Any:
    kinds = {kind for kind in (int, float, bool) if kind in (field.annotation, *get_args(field.annotation))}
    default = "" if field.default is None else f" [dim]\\[default: {field.default}][/dim]"
    option = typer.Option(
        f"--{key.replace('_', '-')}", help=f"{field.description}{default}", show_default=False
    )
    return Annotated[(kinds.pop() if kinds else str) | None, option]


@app.command("train")
@takes(RunSettings)
def train_command(output: Output, config: ConfigFile = None, **values: Any) -> None:
    """Train one model with one method; writes the adapter, metrics.jsonl and record.json.

    [dim]Examples:[/dim]
      tangora train --output out
      tangora train --model smollm2-135m --data reasoning-gym:chain_sum --recipe tangent --exact-match --output out
      tangora train --model ./my-model --data data.jsonl --recipe lora-pro --learning-rate 1e-4 --output out
    """
    settings = validated(RunSettings, _with_file(values, config), str(config or ""))
    with _bars() as bars:
        bar = bars.add_task(settings.recipe, total=settings.steps, note="")
        record = train(settings, output, watcher=_watch(bars, bar))
    _print_run(record, output)


@app.command("compare")
@takes(TaskSettings)
def compare_command(
    output: Output,
    config: ConfigFile = None,
    preset_name: Annotated[
        str | None,
        typer.Option("--preset", help="quickstart (minutes) or smoke (seconds); other flags change it."),
    ] = None,
    recipes: Annotated[str | None, typer.Option(help="Names of the methods, separated by commas.")] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(help="One grid for all, separated by commas; a YAML file can give one for each method."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Separated by commas; the first one sweeps.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same as --seeds with one number.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the report.")] = None,
    **values: Any,
) -> None:
    """Compare methods, each with its own learning-rate sweep and several seeds; writes report.html.

    [dim]Examples:[/dim]
      tangora compare --preset quickstart --output results/quickstart
      tangora compare --recipes full,lora,tangent --data reviews.csv --seeds 0,1,2 --output results/reviews
      tangora compare --config plan.yaml --output results/plan
    """
    lists = {
        "recipes": recipes,
        "learning_rates": learning_rates,
        "seeds": seeds,
        "seed": seed,
        "title": title,
    }
    values |= {key: value for key, value in lists.items() if value is not None}
    base = preset(preset_name).model_dump() if preset_name else {}
    settings = validated(CompareSettings, base | _lists(_with_file(values, config), base), str(config or ""))
    with _bars() as bars:
        outcome = compare(
            settings, output, command=shlex.join(["tangora", *sys.argv[1:]]), watcher=_Bars(bars)
        )
    _print_outcome(outcome)


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="Output folder of tangora train, or a run of tangora compare.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    rank: Annotated[int | None, typer.Option(help="Cut every update to this rank; default: exact.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model with its tokenizer.")] = False,
) -> None:
    """Write the adapter of a run at another rank, or merged into its base model.

    [dim]Examples:[/dim]
      tangora export out --rank 8 --output small
      tangora export out --merge --output model
    """
    exported = export(run, output, rank=rank, merge=merge)
    console.print(f"{'model  ' if exported.merged else 'adapter'}  {escape(str(exported.path))}")
    if rank is not None:
        console.print(f"cut to rank {rank}: relative error of the updates {exported.relative_error:.2e}")


@app.command("diagnose")
@takes(DiagnoseSettings)
def diagnose_command(output: Output, config: ConfigFile = None, **values: Any) -> None:
    """Measure how much of the full gradient LoRA sees; writes diagnosis.html and rank_plan.json.

    [dim]Examples:[/dim]
      tangora diagnose --output out
      tangora diagnose --model smollm2-135m --data reasoning-gym:chain_sum --budget-rank 8 --output out
      tangora diagnose --model ./my-model --data data.jsonl --adapter out/adapter --output after
    """
    settings = validated(DiagnoseSettings, _with_file(values, config), str(config or ""))
    with _bars() as bars:
        bar = bars.add_task("diagnose", total=None, note="")
        files = diagnose_task(
            settings,
            output,
            command=shlex.join(["tangora", *sys.argv[1:]]),
            phase=lambda name: bars.update(bar, note=name),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    _print_diagnosis(files)


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
        console.print(_experiment_table())
        return
    wanted = experiment(name)
    settings = settings_of(wanted, _assignments(changes or []), quick=quick, seed=seed)
    with _bars() as bars:
        bar = bars.add_task(name, total=None, note="")
        files = reproduce(
            wanted,
            settings,
            output or Path("reproduced") / name,
            quick=quick,
            command=shlex.join(["tangora", *sys.argv[1:]]),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    _print_reproduction(files)
    if not (quick or files.record.result.passed):
        raise typer.Exit(1)


@app.command("report")
def report_command(folder: Annotated[Path, typer.Argument(help="Output folder of a comparison.")]) -> None:
    """Write the table, the picture and report.html of a comparison again from its records.

    [dim]Example:[/dim]
      tangora report results/quickstart
    """
    comparison = load_comparison(folder)
    page = write_report(comparison, folder)
    console.print(rich_table(summarize(comparison), comparison))
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
    console.print(_experiment_table())


def _experiment_table() -> Table:
    table = Table(box=None)
    for heading in ("experiment", "what it is", "source", "full size"):
        table.add_column(heading, overflow="fold")
    for entry in EXPERIMENTS.values():
        table.add_row(entry.name, entry.title, entry.source, entry.duration)
    return table


def _assignments(changes: list[str]) -> dict[str, Any]:
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


def _with_file(flags: dict[str, Any], config: Path | None) -> dict[str, Any]:
    return (read_yaml(config) if config is not None else {}) | flags


def _lists(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    if "seed" in values:
        values["seeds"] = [values.pop("seed")]
    if isinstance(values.get("recipes"), str):
        values["recipes"] = [name.strip() for name in values["recipes"].split(",")]
    if isinstance(seeds := values.get("seeds"), str):
        values["seeds"] = [_number("seeds", text, int) for text in seeds.split(",")]
    if isinstance(rates := values.get("learning_rates"), str):
        grid = [_number("learning_rates", text, float) for text in rates.split(",")]
        values["learning_rates"] = dict.fromkeys(values.get("recipes", base.get("recipes", [])), grid)
    return values


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{name} must be numbers separated by commas; got {text!r}") from None


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _watch(bars: Progress, bar: TaskID) -> Watcher:
    return Watcher(
        phase=lambda name: bars.update(bar, note=name),
        step=lambda step, loss: bars.update(bar, completed=step, note=f"loss {loss:.3f}"),
    )


class _Bars(CompareWatcher):
    """One bar for the comparison, one for the run that is going on."""

    def __init__(self, bars: Progress):
        super().__init__()
        self._bars = bars
        self._runs = bars.add_task("runs", total=None, note="")
        self._steps = bars.add_task("", total=None, note="")

    def plan(self, total: int) -> None:
        self._bars.update(self._runs, total=total)

    def begin(self, cell: Cell) -> Watcher:
        self._bars.reset(self._steps, total=cell.settings.steps, description=cell.id)
        return _watch(self._bars, self._steps)

    def end(self, cell: Cell, record: Record) -> None:
        self._bars.advance(self._runs)
        if record.status != "finished":
            self._bars.console.print(f"{escape(cell.id)} {record.status}: {escape(record.error or '')}")


def _print_run(record: Record, output: Path) -> None:
    table = Table(
        title=f"{record.recipe}, learning rate {record.learning_rate:g}, seed {record.seed}", box=None
    )
    for heading in ("", *record.metrics):
        table.add_column(heading, justify="right" if heading else "left")
    for name in dict.fromkeys(key for split in record.metrics.values() for key in split):
        cells = (split.get(name) for split in record.metrics.values())
        table.add_row(name, *("" if value is None else f"{value:.4f}" for value in cells))
    console.print(table)
    if record.status != "finished":
        raise InputError(f"training {record.status}: {record.error}; try a smaller learning rate")
    saved = next((output / name for name in ("adapter", "model") if (output / name).exists()), output)
    console.print(f"saved    {escape(str(saved))}")
    console.print(f"metrics  {escape(str(output / 'metrics.jsonl'))}")


def _print_outcome(outcome: Outcome) -> None:
    rows = summarize(outcome.comparison)
    console.print(rich_table(rows, outcome.comparison))
    for sentence in verdict(rows):
        console.print(escape(sentence))
    console.print(f"report   {escape(str(outcome.report))}")
    if outcome.adapter is not None:
        console.print(f"adapter  {escape(str(outcome.adapter))} ({outcome.adapter_recipe})")
        console.print(
            "proof    plain PEFT on the untouched base gives the trained model's logits: "
            f"largest difference {outcome.difference:.1e}"
        )


def _print_diagnosis(files: DiagnosisFiles) -> None:
    diagnosis = files.record.diagnosis
    for table in diagnosis_tables(diagnosis):
        console.print(table)
    for sentence in findings(diagnosis):
        console.print(escape(sentence))
    console.print(f"report   {escape(str(files.page))}")
    console.print(f"plan     {escape(str(files.plan))}")
    console.print(f"numbers  {escape(str(files.record_path))}")


def _print_reproduction(files: ReproductionFiles) -> None:
    record = files.record
    for sentence in record.result.findings:
        console.print(escape(sentence))
    console.print(rich_checks(record.result.checks))
    console.print(escape(outcome(record)))
    console.print(f"report   {escape(str(files.page))}")
    console.print(f"numbers  {escape(str(files.record_path))}")
    for picture in files.pictures:
        console.print(f"picture  {escape(str(picture))}")


def main() -> None:
    """Run the command line; bad input ends with one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except InputError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command continues where it stopped")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
