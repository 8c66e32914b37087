"""A diagnosis by kind of layer, and as tables: short ones for a terminal, full ones for the page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from tangora.diagnostics import GRADIENT_STARTS, Diagnosis, LayerDiagnosis, LayerGradient
from tangora.diagnostics.records import SHARES, Totals, totals
from tangora.report import formats
from tangora.report.layer_places import places
from tangora.report.report_table import Table
from tangora.report.terminal_table import TerminalTable

ALL = "all layers"
_MAX_WORST = 5
_OTHERS = "on other examples"
_SAYS_NOTHING_AT_START = ("cond BᵀB", "imbalance", "effective rank")


class StartName(NamedTuple):
    """Names of an initialization on pages: in full, inside a sentence, and in two lines of a narrow column."""

    full: str
    in_sentence: str
    short: str


_START_NAMES = {
    "lora": StartName("plain LoRA", "plain LoRA", "plain\nLoRA"),
    "orthogonal": StartName("orthogonal", "a random orthogonal initialization", "ortho-\ngonal"),
    "pissa": StartName("PiSSA", "PiSSA", "PiSSA"),
    "lora-ga": StartName("LoRA-GA", "LoRA-GA", "LoRA-GA"),
    "lora-one": StartName("LoRA-One", "LoRA-One", "LoRA-One"),
}


def start_name(start: str) -> StartName:
    """Look up how pages write an initialization; by its own name where there is no other."""
    return _START_NAMES.get(start, StartName(start, start, start))


@dataclass(frozen=True)
class KindRow:
    """Layers of one kind."""

    kind: str
    num_layers: int
    energy_share: float
    """Their part in the energy of all layers' base gradients."""
    totals: Totals
    """Over these layers."""
    ranks_needed: Mapping[int, int | None]
    """Smallest common rank that could capture 50, 80, 90 % of their energy; None beyond `known_rank`."""
    known_rank: int
    """Largest rank of which it is known what it could capture."""


def kind_rows(diagnosis: Diagnosis) -> list[KindRow]:
    """Sum a diagnosis up by kind of layer."""
    total = sum(layer.gradient.energy for layer in diagnosis.layers)
    rows = [_row(kind, layers, total) for kind, layers in group_by_kind(diagnosis).items()]
    return [*rows, _row(ALL, diagnosis.layers, total)]


def group_by_kind(diagnosis: Diagnosis) -> dict[str, list[LayerDiagnosis]]:
    """Gather the layers of each kind."""
    where = places(layer.name for layer in diagnosis.layers)
    groups: dict[str, list[LayerDiagnosis]] = {}
    for layer in diagnosis.layers:
        groups.setdefault(where[layer.name].kind, []).append(layer)
    return groups


def _row(kind: str, layers: Sequence[LayerDiagnosis], energy: float) -> KindRow:
    gradients = [layer.gradient for layer in layers]
    return KindRow(
        kind=kind,
        num_layers=len(layers),
        energy_share=sum(gradient.energy for gradient in gradients) / energy if energy > 0 else 0.0,
        totals=totals(layers, cosine=None),
        ranks_needed={share: _common_rank(gradients, share / 100) for share in SHARES},
        known_rank=known_rank(gradients),
    )


def gradient_starts(layers: Sequence[LayerDiagnosis]) -> list[str]:
    """List the initializations that were made from the gradient, and looked at on other examples too."""
    other = layers[0].held_out
    return [start for start in GRADIENT_STARTS if other is not None and start in other.starts]


def known_rank(gradients: Sequence[LayerGradient]) -> int:
    """Return the largest rank of which it is known what it could capture in every layer."""
    limits = [gradient.largest_rank for gradient in gradients]
    return min(
        (limit for limit, gradient in zip(limits, gradients, strict=True) if not gradient.complete),
        default=max(limits),
    )


def reachable_shares(gradients: Sequence[LayerGradient]) -> list[float]:
    """Return what adapters of one rank could capture at most, for the ranks 1, 2, …."""
    total = sum(gradient.energy for gradient in gradients)
    if not total > 0:
        return []
    return [
        sum(gradient.reachable(rank) for gradient in gradients) / total
        for rank in range(1, known_rank(gradients) + 1)
    ]


def _common_rank(gradients: Sequence[LayerGradient], share: float) -> int | None:
    shares = enumerate(reachable_shares(gradients), 1)
    return next((rank for rank, reachable in shares if reachable >= share * (1 - 1e-6)), None)


def _needed(rank: int | None, known: int) -> str:
    """Write a rank that may lie beyond what is known."""
    return f"> {known}" if rank is None else str(rank)


class _Columns(NamedTuple):
    """Columns of the table of kinds that a terminal, which has less room, shows as one."""

    short: str
    """Header in a terminal; empty for columns that it leaves out."""
    headers: Sequence[str]
    texts: Callable[[KindRow], Sequence[str]]
    separator: str = "|"


def _kind_columns(diagnosis: Diagnosis) -> list[_Columns]:
    share, whole = formats.small_share, diagnosis.totals
    columns = [
        _Columns("layers", ["layers"], lambda row: [row.kind]),
        _Columns("", ["number"], lambda row: [str(row.num_layers)]),
        _Columns("ener-\ngy", ["energy"], lambda row: [share(row.energy_share)]),
    ]
    # where the adapter is plain LoRA, one column would repeat the other
    if whole.adapter is not None and whole.adapter != whole.starts.get("lora"):
        columns.append(_Columns("adap-\nter", ["adapter"], lambda row: [share(row.totals.adapter)]))
    made = gradient_starts(diagnosis.layers)
    for start in diagnosis.starts:
        short, headers = start_name(start).short, [start_name(start).full]
        if start in made:
            short, headers = f"{short}\nown|new", [*headers, _OTHERS]
        columns.append(_Columns(short, headers, partial(_captured, start=start, made=start in made)))
    return [
        *columns,
        _Columns("best", ["best"], lambda row: [share(row.totals.reachable)]),
        _Columns(
            "rank for\n" + "/".join(map(str, SHARES)),
            [f"rank for {share} %" for share in SHARES],
            lambda row: [_needed(rank, row.known_rank) for rank in row.ranks_needed.values()],
            "/",
        ),
    ]


def _captured(row: KindRow, start: str, *, made: bool) -> list[str]:
    # on the examples that were read, and on others where the initialization was made from those
    own, others = row.totals.starts, row.totals.held_out
    return [
        formats.small_share(own[start]),
        *([formats.small_share(others[start])] if made and others else []),
    ]


def kind_table(diagnosis: Diagnosis) -> Table:
    """Make the table of kinds of layers."""
    columns = _kind_columns(diagnosis)
    headers = [header for each in columns for header in each.headers]
    rows = [[text for each in columns for text in each.texts(row)] for row in kind_rows(diagnosis)]
    caption = "Share of the gradient’s energy that an adapter captures."
    return Table.texts("kinds", caption, headers, rows, sortable=False)


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
        columns[f"{start_name(start).full} initialization"] = lambda layer, start=start: formats.small_share(
            layer.starts[start]
        )
        if start in gradient_starts(diagnosis.layers):
            columns[f"{start_name(start).full} {_OTHERS}"] = lambda layer, start=start: formats.small_share(
                layer.held_out and layer.held_out.starts[start]
            )
    columns["best"] = lambda layer: formats.small_share(layer.reachable)
    for share in SHARES:
        columns[f"rank for {share} %"] = lambda layer, share=share: _needed(
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


def diagnosis_tables(diagnosis: Diagnosis) -> list[TerminalTable]:
    """Make the tables for a terminal."""
    worst = Table.of(
        "worst",
        "",
        diagnosis.worst_layers(_MAX_WORST),
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
    return [
        _short_kinds(diagnosis),
        worst.rich("Layers with the most missed energy, as shares of the whole gradient's energy"),
    ]


def _short_kinds(diagnosis: Diagnosis) -> TerminalTable:
    # narrow enough for 80 columns: percentages without their sign, related numbers in one cell
    columns = [each for each in _kind_columns(diagnosis) if each.short]
    rows = [
        [each.separator.join(text.removesuffix(" %") for text in each.texts(row)) for each in columns]
        for row in kind_rows(diagnosis)
    ]
    ranks = formats.ranks(layer.rank for layer in diagnosis.layers)
    title = f"Percentage of the gradient's energy that adapters of {ranks} capture"
    return TerminalTable(title, [each.short for each in columns], rows)
