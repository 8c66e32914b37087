"""The command line: parses, calls, prints."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
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
from tangora.experiments.run import Watcher
from tangora.experiments.settings import RunSettings, read_yaml, validated
from tangora.experiments.train import train
from tangora.recipes import recipes as all_recipes
from tangora.report import Record, load_comparison, rich_table, summarize, verdict

app = typer.Typer(
    name="tangora",
    help="LoRA fine-tuning that follows full fine-tuning.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()

ConfigFile = Annotated[Optional[Path], typer.Option("--config", help="YAML file with any of these settings.")]  # noqa: UP045
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Output folder; the same command continues what is there.")
]


def _flag(kind: Any, name: str, description: str) -> Any:
    return Annotated[Optional[kind], typer.Option(name, help=description, show_default=False)]  # noqa: UP045


def _about(key: str) -> str:
    field = RunSettings.model_fields[key]
    default = "" if field.default is None else f" [dim]\\[default: {field.default}][/dim]"
    return f"{field.description}{default}"


Model = _flag(str, "--model", _about("model"))
Data = _flag(str, "--data", _about("data"))
Kind = _flag(str, "--kind", _about("kind"))
TextColumn_ = _flag(str, "--text-column", _about("text_column"))
LabelColumn = _flag(str, "--label-column", _about("label_column"))
PromptColumn = _flag(str, "--prompt-column", _about("prompt_column"))
CompletionColumn = _flag(str, "--completion-column", _about("completion_column"))
NumTrain = _flag(int, "--num-train", _about("num_train"))
NumValidation = _flag(int, "--num-validation", _about("num_validation"))
NumTest = _flag(int, "--num-test", _about("num_test"))
Steps = _flag(int, "--steps", _about("steps"))
BatchSize = _flag(int, "--batch-size", _about("batch_size"))
Accumulate = _flag(int, "--accumulate", _about("accumulate"))
MaxLength = _flag(int, "--max-length", _about("max_length"))
Rank = _flag(int, "--rank", _about("rank"))
Alpha = _flag(float, "--alpha", _about("alpha"))
Targets = _flag(str, "--target-modules", _about("target_modules"))
WeightDecay = _flag(float, "--weight-decay", _about("weight_decay"))
Schedule = _flag(str, "--schedule", _about("schedule"))
Warmup = _flag(float, "--warmup", _about("warmup"))
Clip = _flag(float, "--clip", _about("clip"))
ExactMatch = _flag(bool, "--exact-match", _about("exact_match"))


@app.command("train")
def train_command(
    output: Output,
    config: ConfigFile = None,
    recipe: _flag(str, "--recipe", _about("recipe")) = None,
    learning_rate: _flag(float, "--learning-rate", _about("learning_rate")) = None,
    seed: _flag(int, "--seed", _about("seed")) = None,
    save_every: _flag(int, "--save-every", _about("save_every")) = None,
    model: Model = None,
    data: Data = None,
    kind: Kind = None,
    text_column: TextColumn_ = None,
    label_column: LabelColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    num_train: NumTrain = None,
    num_validation: NumValidation = None,
    num_test: NumTest = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    max_length: MaxLength = None,
    rank: Rank = None,
    alpha: Alpha = None,
    target_modules: Targets = None,
    weight_decay: WeightDecay = None,
    schedule: Schedule = None,
    warmup: Warmup = None,
    clip: Clip = None,
    exact_match: ExactMatch = None,
) -> None:
    """Train one model with one method; writes the adapter, metrics.jsonl and record.json.

    [dim]Examples:[/dim]
      tangora train --output out
      tangora train --model smollm2-135m --data reasoning-gym:chain_sum --recipe tangent --exact-match --output out
      tangora train --model ./my-model --data data.jsonl --recipe lora-pro --learning-rate 1e-4 --output out
    """
    settings = validated(RunSettings, _given(locals()), str(config or ""))
    with _bars() as bars:
        record = train(
            settings, output, watcher=_watch(bars, bars.add_task(settings.recipe, total=settings.steps))
        )
    _print_run(record, output)


@app.command("compare")
def compare_command(
    output: Output,
    preset_name: _flag(
        str, "--preset", "quickstart (minutes) or smoke (seconds); other flags change it."
    ) = None,
    config: ConfigFile = None,
    recipes: _flag(str, "--recipes", "Names of the methods, separated by commas.") = None,
    learning_rates: _flag(
        str,
        "--learning-rates",
        "One grid for all methods, separated by commas; a YAML file can give one for each.",
    ) = None,
    seeds: _flag(str, "--seeds", "Seeds, separated by commas; the first one sweeps.") = None,
    seed: _flag(int, "--seed", "The same as --seeds with one number.") = None,
    title: _flag(str, "--title", "Heading of the report.") = None,
    model: Model = None,
    data: Data = None,
    kind: Kind = None,
    text_column: TextColumn_ = None,
    label_column: LabelColumn = None,
    prompt_column: PromptColumn = None,
    completion_column: CompletionColumn = None,
    num_train: NumTrain = None,
    num_validation: NumValidation = None,
    num_test: NumTest = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    max_length: MaxLength = None,
    rank: Rank = None,
    alpha: Alpha = None,
    target_modules: Targets = None,
    weight_decay: WeightDecay = None,
    schedule: Schedule = None,
    warmup: Warmup = None,
    clip: Clip = None,
    exact_match: ExactMatch = None,
) -> None:
    """Compare methods, each with its own learning-rate sweep and several seeds; writes report.html.

    [dim]Examples:[/dim]
      tangora compare --preset quickstart --output results/quickstart
      tangora compare --recipes full,lora,tangent --data reviews.csv --seeds 0,1,2 --output results/reviews
      tangora compare --config plan.yaml --output results/plan
    """
    values = _given({key: value for key, value in locals().items() if key != "preset_name"})
    base = preset(preset_name).model_dump() if preset_name else {}
    settings = validated(CompareSettings, base | _lists(values, base), str(config or ""))
    with _bars() as bars:
        outcome = compare(
            settings, output, command=shlex.join(["tangora", *sys.argv[1:]]), watcher=_Bars(bars)
        )
    _print_outcome(outcome)


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
    """List the methods.

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


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    # flags win over the YAML file
    config = arguments["config"]
    values = read_yaml(config) if config is not None else {}
    flags = {
        key: value
        for key, value in arguments.items()
        if key not in ("config", "output") and value is not None
    }
    return values | flags


def _lists(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    if "seed" in values:
        values["seeds"] = [values.pop("seed")]
    if isinstance(values.get("recipes"), str):
        values["recipes"] = [name.strip() for name in values["recipes"].split(",")]
    if isinstance(values.get("seeds"), str):
        values["seeds"] = [_number("seeds", text, int) for text in values["seeds"].split(",")]
    if isinstance(values.get("learning_rates"), str):
        grid = [_number("learning_rates", text, float) for text in values["learning_rates"].split(",")]
        values["learning_rates"] = dict.fromkeys(values.get("recipes", base.get("recipes", [])), grid)
    return values


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{name} must be numbers separated by commas; got {text!r}") from None


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        original = bars.add_task

        def add_task(description: str, **options: Any) -> TaskID:
            return original(description, **({"note": ""} | options))

        bars.add_task = add_task  # every bar has a note
        yield bars


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
        self._runs = bars.add_task("runs")
        self._steps = bars.add_task("")

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
