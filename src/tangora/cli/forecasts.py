"""Output of `tangora compare --dry-run`."""

from collections.abc import Mapping

from rich.markup import escape

from tangora.cli.output import console
from tangora.experiments.comparison.paper import Paper
from tangora.experiments.comparison.plan import CompareSettings
from tangora.experiments.forecast import Forecast
from tangora.experiments.run.estimate import Memory
from tangora.experiments.run.measurements import PRODUCTS_AT_THE_END, PRODUCTS_DURING
from tangora.report import formats
from tangora.report.terminal_table import TerminalTable

_MEMORY = {
    "weights": "frozen\nweights",
    "trained": "trained",
    "gradients": "gradi-\nents",
    "state": "optim.\nstate",
    "activations": "activa-\ntions",
    "total": "total",
}
_HOW_TO_READ = (
    "Activations: the maximum of a forward pass, all examples at full length. Total: at the peak of a "
    "backward pass. Python's and torch's own memory (some hundred MB) is not included."
)


def print_forecasts(forecasts: Mapping[str, Forecast]) -> None:
    """Print what each comparison would run."""
    for name, found in forecasts.items():
        _print(name, found)
    runs = sum(found.runs for found in forecasts.values())
    console.print(f"{formats.plural(runs, 'run')} in all; nothing was run or written")


def _print(name: str, found: Forecast) -> None:
    settings = found.settings
    title = f"{name}: {settings.heading}" if name and name != settings.heading else settings.heading
    console.print(f"[bold]{escape(title)}[/bold]")
    for key, value in _facts(found).items():
        console.print(f"{key:<9} {escape(value)}", soft_wrap=True)
    grids = [
        [each.recipe, ", ".join(map(formats.learning_rate, each.learning_rates))] for each in found.recipes
    ]
    console.print(TerminalTable("", ["recipe", "learning rates"], grids, wrapped=(0, 1)))
    sizes = [[each.recipe, *_sizes(each.memory)] for each in found.recipes if each.memory is not None]
    if sizes:
        console.print(
            TerminalTable("Memory of one run, estimated", ["recipe", *_MEMORY.values()], sizes, tight=True)
        )
        console.print(_HOW_TO_READ)
    if found.paper is not None:
        _print_paper(found.paper)


def _facts(found: Forecast) -> dict[str, str]:
    """Say what all runs share."""
    settings = found.settings
    tested = f", tested on {settings.test_data}" if settings.test_data else ""
    micro = settings.batch_size
    whole = (
        f"{micro} × {settings.accumulate} = {micro * settings.accumulate}"
        if settings.accumulate > 1
        else f"{micro}"
    )
    return {
        "model": f"{settings.model} ({'4 bits' if settings.load_in_4bit else settings.dtype})",
        "data": f"{settings.data}{tested}",
        "examples": _examples(found),
        "batch": f"{whole} examples of at most {settings.max_length} tokens",
        "steps": _steps(found),
        "runs": _runs(found),
        "seeds": ", ".join(map(str, settings.seeds)),
        "adapter": f"rank {settings.rank}, alpha {settings.alpha:g}, on {_targets(settings.target_modules)}",
        **({"measured": told} if (told := _measured(settings)) else {}),
        **({"lm-eval": ", ".join(settings.benchmarks)} if settings.benchmarks else {}),
        **({} if found.missing is None else {"memory": f"unknown ({found.missing})"}),
    }


def _measured(settings: CompareSettings) -> str:
    """List what the runs measure besides, which takes time outside of training."""
    parts = []
    if every := settings.measure_every:
        parts.append(f"trajectory every {every} steps")
    for when, products in (
        (f"every {settings.curvature_every} steps" if settings.curvature_every else "", PRODUCTS_DURING),
        ("at the end" if settings.curvature else "", PRODUCTS_AT_THE_END),
    ):
        if when:
            parts.append(f"curvature {when} (about {products} Hessian-vector products for each space)")
    return f"{formats.listing(parts)}; this adds to the time of every run" if parts else ""


def _targets(targets: str | list[str]) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def _examples(found: Forecast) -> str:
    settings = found.settings
    given = found.examples or (settings.num_train, settings.num_validation, settings.num_test)
    names = ("training", "validation", "test")
    known = [f"{number} {name}" for number, name in zip(given, names, strict=True) if number is not None]
    if not known:
        return "all available (not read: the data are on the hub)"
    return f"{formats.listing(known)}{'' if found.examples else ' (not read: the data are on the hub)'}"


def _steps(found: Forecast) -> str:
    settings = found.settings
    if found.steps is None:
        return f"{settings.epochs:g} epochs of each run"
    return f"{found.steps} of each run, {found.steps * found.runs} in all"


def _runs(found: Forecast) -> str:
    if found.settings.halving is not None:
        return f"{found.runs} or more, depending on halving"
    further = f", and at most {found.further_runs} more if grids are extended or refined"
    return f"{found.runs}{further if found.further_runs else ''}"


def _sizes(memory: Memory) -> list[str]:
    return [formats.size(getattr(memory, key)) for key in _MEMORY]


def _print_paper(paper: Paper) -> None:
    numbers = [*paper.results.values()]
    recipes = dict.fromkeys(name for column in numbers for name in column)
    rows = [
        [name, *(f"{column[name]:g}" if name in column else formats.MISSING for column in numbers)]
        for name in recipes
    ]
    console.print(TerminalTable("Published", ["recipe", *paper.results], rows))
    for note in (paper.source, *paper.notes):
        console.print(escape(note))
