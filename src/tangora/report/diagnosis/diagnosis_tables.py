"""A diagnosis as tables: short ones for a terminal, full ones for the page."""

from collections.abc import Callable

from rich.table import Table as RichTable

from tangora.diagnostics import Diagnosis, LayerDiagnosis
from tangora.diagnostics.records import SHARES
from tangora.report import formats
from tangora.report.diagnosis.diagnosis_findings import (
    KindRow,
    gradient_starts,
    kind_rows,
    needed,
    ranks_text,
    start_name,
)
from tangora.report.report_table import Table, terminal_table

_MAX_WORST = 5
_OTHERS = "on other examples"
_SAYS_NOTHING_AT_START = ("cond BᵀB", "imbalance", "effective rank")


def kind_table(diagnosis: Diagnosis) -> Table:
    """Make the table of kinds of layers."""
    with_adapter, made = _has_own_adapter(diagnosis), gradient_starts(diagnosis.layers)
    headers = ["layers", "number", "energy", *(["adapter"] if with_adapter else [])]
    for start in diagnosis.starts:
        headers += [start_name(start).full, *([_OTHERS] if start in made else [])]
    headers += ["best", *(f"rank for {share} %" for share in SHARES)]
    rows = [
        [
            row.kind,
            str(row.num_layers),
            *map(formats.small_share, _shares(row, with_adapter=with_adapter)),
            *(formats.small_share(captured) for start in row.starts for captured in _both(row, start)),
            formats.small_share(row.reachable),
            *(needed(rank, row.known_rank) for rank in row.ranks_needed.values()),
        ]
        for row in kind_rows(diagnosis)
    ]
    caption = "Share of the gradient’s energy that an adapter captures."
    return Table.texts("kinds", caption, headers, rows, sortable=False)


def _has_own_adapter(diagnosis: Diagnosis) -> bool:
    # else one column would repeat the other
    totals = diagnosis.totals
    return totals.adapter is not None and totals.adapter != totals.starts.get("lora")


def _shares(row: KindRow, *, with_adapter: bool) -> list[float | None]:
    return [row.energy_share, *([row.adapter] if with_adapter else [])]


def _both(row: KindRow, start: str) -> list[float]:
    return [row.starts[start], *([row.held_out[start]] if start in row.held_out else [])]


def layer_table(diagnosis: Diagnosis) -> Table:
    """Make the table of all layers."""
    columns: dict[str, Callable[[LayerDiagnosis], str]] = {
        "layer": lambda layer: layer.name,
        "m × n": lambda layer: f"{layer.m} × {layer.n}",
        "‖G‖": _norm,
    }
    if diagnosis.totals.adapter is not None:
        columns |= _adapter_columns(plain=diagnosis.plain_start)
    for start in diagnosis.starts:
        columns[f"{start_name(start).full} start"] = lambda layer, start=start: formats.small_share(
            layer.starts[start]
        )
        if start in gradient_starts(diagnosis.layers):
            columns[f"{start_name(start).full} {_OTHERS}"] = lambda layer, start=start: formats.small_share(
                layer.held_out and layer.held_out.starts[start]
            )
    columns["best"] = lambda layer: formats.small_share(layer.reachable)
    for share in SHARES:
        columns[f"rank for {share} %"] = lambda layer, share=share: needed(
            layer.ranks_needed[str(share)], layer.gradient.largest_rank
        )
    columns["planned rank"] = lambda layer: str(diagnosis.plan.ranks[layer.name])
    caption = "Captured energy of the adapter and of each initialization, in the order of the model."
    return Table.of("layers", caption, diagnosis.layers, columns, sortable=False)


def _adapter_columns(*, plain: bool) -> dict[str, Callable[[LayerDiagnosis], str]]:
    def of(write: Callable[..., str], name: str) -> Callable[[LayerDiagnosis], str]:
        return lambda layer: write(getattr(layer.adapter, name))

    columns = {
        "rank": of(str, "rank"),
        "adapter": of(formats.small_share, "captured_energy"),
        "ε": of(formats.significant, "alignment_error"),
        "cosine": of(formats.significant, "cosine"),
        "cond AAᵀ": of(formats.significant, "condition_A"),
        "cond BᵀB": of(formats.significant, "condition_B"),
        "imbalance": of(formats.small_share, "relative_imbalance"),
        "effective rank": of(formats.significant, "effective_rank"),
    }
    return {key: write for key, write in columns.items() if not (plain and key in _SAYS_NOTHING_AT_START)}


def _norm(layer: LayerDiagnosis) -> str:
    # with its standard error where it is an estimate
    gradient = layer.gradient
    text = formats.significant(gradient.norm)
    if not gradient.energy_error or not gradient.norm:
        return text
    return f"{text} ± {gradient.energy_error / (2 * gradient.norm):.1g}"


def diagnosis_tables(diagnosis: Diagnosis) -> list[RichTable]:
    """Make the tables for a terminal."""
    ranks = ranks_text(layer.rank for layer in diagnosis.layers)
    worst = Table.of(
        "worst",
        "",
        diagnosis.starving(_MAX_WORST),
        {
            "layer": lambda layer: layer.name,
            "missed": lambda layer: formats.small_share(diagnosis.missed_share(layer)),
            "captured": lambda layer: formats.small_share(
                layer.adapter.captured_energy if layer.adapter else next(iter(layer.starts.values()), 0.0)
            ),
            "best": lambda layer: formats.small_share(layer.reachable),
            "planned rank": lambda layer: str(diagnosis.plan.ranks[layer.name]),
        },
    )
    title = f"Percentage of the gradient's energy that adapters of {ranks} capture"
    return [
        terminal_table(title, *_short_kinds(diagnosis)),
        worst.rich("Layers with the largest missed parts, as shares of the whole gradient's energy"),
    ]


def _short_kinds(diagnosis: Diagnosis) -> tuple[list[str], list[list[str]]]:
    # narrow enough for 80 columns: percentages without their sign, related numbers in one cell
    with_adapter, made = _has_own_adapter(diagnosis), gradient_starts(diagnosis.layers)
    headers = ["layers", "ener-\ngy", *(["adap-\nter"] if with_adapter else [])]
    headers += [
        start_name(start).short + ("\nown|new" if start in made else "") for start in diagnosis.starts
    ]
    headers += ["best", "rank for\n" + "/".join(map(str, SHARES))]
    return headers, [
        [
            row.kind,
            *map(_bare, _shares(row, with_adapter=with_adapter)),
            *("|".join(map(_bare, _both(row, start))) for start in row.starts),
            _bare(row.reachable),
            "/".join(needed(rank, row.known_rank) for rank in row.ranks_needed.values()),
        ]
        for row in kind_rows(diagnosis)
    ]


def _bare(share: float | None) -> str:
    return formats.small_share(share).removesuffix(" %")
