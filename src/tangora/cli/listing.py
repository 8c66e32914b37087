"""`tangora list`: methods in groups, and the models, data and comparisons that come with tangora."""

from collections.abc import Iterable

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tangora._names import DATA, MODELS
from tangora.experiments.presets import PRESETS, preset
from tangora.recipes import Recipe, recipe, recipes

_WIDEST = 18


def group_of(entry: Recipe) -> str:
    """Return the heading under which a method is listed.

    Args:
        entry: The method.

    Returns:
        What it changes of LoRA.
    """
    if entry.adapter is None:
        return "Full fine-tuning"
    own_optimizer = entry.make_optimizer is not recipe("lora").make_optimizer
    if entry.start is None:
        return "Optimizers for LoRA" if own_optimizer else "LoRA and variants of PEFT, with AdamW"
    return "Initializations with an optimizer" if own_optimizer else "Initializations of LoRA, with AdamW"


def listing() -> Group:
    """Return everything that can be named on a command line."""
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for entry in recipes():
        rates = " ".join(_short(rate) for rate in entry.learning_rates)
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
    return f"{rate:g}" if rate >= 0.1 else f"{rate:.0e}".replace("e-0", "e-")
