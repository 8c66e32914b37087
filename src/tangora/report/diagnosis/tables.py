"""A diagnosis as tables: short ones for a terminal, a full one for the page."""

from collections.abc import Callable, Mapping

from rich.table import Table

from tangora.diagnostics import Diagnosis, LayerDiagnosis
from tangora.diagnostics.records import SHARES
from tangora.report import formats
from tangora.report.diagnosis.summary import START_NAMES, KindRow, fitted, kind_rows, needed
from tangora.report.terminal import rich_table

_MAX_WORST = 5
_OTHERS = "on other examples"

Cells = list[list[str]]


def kind_table(diagnosis: Diagnosis) -> tuple[list[str], Cells]:
    """Make the table of kinds of layers."""
    with_adapter = diagnosis.totals.adapter is not None and not _adapter_is_lora(diagnosis)
    headers = ["layers", "number", "energy", *(["adapter"] if with_adapter else [])]
    for start in diagnosis.starts:
        headers += [START_NAMES[start], *([_OTHERS] if start in fitted(diagnosis.layers) else [])]
    headers += ["best", *(f"rank for {share} %" for share in SHARES)]
    return headers, [_kind_cells(row, with_adapter=with_adapter) for row in kind_rows(diagnosis)]


def _adapter_is_lora(diagnosis: Diagnosis) -> bool:
    # one column would repeat the other
    return diagnosis.totals.adapter == diagnosis.totals.starts.get("lora")


def _kind_cells(row: KindRow, *, with_adapter: bool) -> list[str]:
    share = formats.small_share
    return [
        row.kind,
        str(row.num_layers),
        share(row.energy_share),
        *([share(row.adapter)] if with_adapter else []),
        *(share(captured) for start in row.starts for captured in _both(start, row.starts, row.held_out)),
        share(row.reachable),
        *(needed(rank, row.known_rank) for rank in row.ranks_needed.values()),
    ]


def _both(start: str, starts: Mapping[str, float], held_out: Mapping[str, float]) -> list[float]:
    return [starts[start], *([held_out[start]] if start in held_out else [])]


def layer_table(diagnosis: Diagnosis) -> tuple[list[str], Cells]:
    """Make the table of all layers."""
    columns: dict[str, Callable[[LayerDiagnosis], str]] = {
        "layer": lambda layer: layer.name,
        "m × n": lambda layer: f"{layer.m} × {layer.n}",
        "‖G‖": norm_text,
    }
    if diagnosis.totals.adapter is not None:
        columns |= _adapter_columns(plain=diagnosis.plain_start)
    for start in diagnosis.starts:
        columns[f"{START_NAMES[start]} start"] = lambda layer, start=start: formats.small_share(
            layer.starts[start]
        )
        if start in fitted(diagnosis.layers):
            columns[f"{START_NAMES[start]} {_OTHERS}"] = lambda layer, start=start: formats.small_share(
                layer.held_out and layer.held_out.starts[start]
            )
    columns["best"] = lambda layer: formats.small_share(layer.reachable)
    for share in SHARES:
        columns[f"rank for {share} %"] = lambda layer, share=share: needed(
            layer.ranks_needed[str(share)], layer.gradient.largest_rank
        )
    columns["planned rank"] = lambda layer: str(diagnosis.plan.ranks[layer.name])
    return list(columns), [[cell(layer) for cell in columns.values()] for layer in diagnosis.layers]


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
    says_nothing_at_start = ("cond BᵀB", "imbalance", "effective rank")
    return {key: cell for key, cell in columns.items() if not (plain and key in says_nothing_at_start)}


def norm_text(layer: LayerDiagnosis) -> str:
    """Write the norm of a layer's base gradient, with its standard error where it is an estimate."""
    gradient = layer.gradient
    text = formats.significant(gradient.norm)
    if not gradient.energy_error or not gradient.norm:
        return text
    return f"{text} ± {gradient.energy_error / (2 * gradient.norm):.1g}"


_SHORT = {
    "lora": "plain\nLoRA",
    "orthogonal": "ortho-\ngonal",
    "pissa": "PiSSA",
    "lora-ga": "LoRA-GA",
    "lora-one": "LoRA-One",
}


def diagnosis_tables(diagnosis: Diagnosis) -> list[Table]:
    """Make the tables for a terminal."""
    ranks = sorted({layer.rank for layer in diagnosis.layers})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    kinds = rich_table(
        f"Percentage of the gradient's energy that adapters of {rank} capture",
        *_short_kind_table(diagnosis),
    )
    worst = [
        [
            layer.name,
            formats.small_share(diagnosis.missed_share(layer)),
            formats.small_share(
                layer.adapter.captured_energy if layer.adapter else next(iter(layer.starts.values()), 0.0)
            ),
            formats.small_share(layer.reachable),
            str(diagnosis.plan.ranks[layer.name]),
        ]
        for layer in diagnosis.starving(_MAX_WORST)
    ]
    title = "Layers with the largest missed parts, as shares of the whole gradient's energy"
    return [kinds, rich_table(title, ["layer", "missed", "captured", "best", "planned rank"], worst)]


def _short_kind_table(diagnosis: Diagnosis) -> tuple[list[str], Cells]:
    # narrow enough for 80 columns: percentages without their sign, related numbers in one cell
    with_adapter = diagnosis.totals.adapter is not None and not _adapter_is_lora(diagnosis)
    made = fitted(diagnosis.layers)
    headers = ["layers", "ener-\ngy", *(["adap-\nter"] if with_adapter else [])]
    headers += [_SHORT[start] + ("\nown|new" if start in made else "") for start in diagnosis.starts]
    headers += ["best", "rank for\n" + "/".join(map(str, SHARES))]

    def cells(row: KindRow) -> list[str]:
        shares = [row.energy_share, *([row.adapter] if with_adapter else [])]
        return [
            row.kind,
            *map(_bare, shares),
            *("|".join(map(_bare, _both(start, row.starts, row.held_out))) for start in row.starts),
            _bare(row.reachable),
            "/".join(needed(rank, row.known_rank) for rank in row.ranks_needed.values()),
        ]

    return headers, [cells(row) for row in kind_rows(diagnosis)]


def _bare(share: float | None) -> str:
    return formats.small_share(share).removesuffix(" %")
