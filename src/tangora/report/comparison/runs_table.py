"""Every run of a comparison, as a table to search, and as CSV."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tangora.report import formats
from tangora.report.comparison.results_table import flat_row
from tangora.report.layout import Section, flat
from tangora.report.records import Comparison, Record
from tangora.report.statistics.judgement import Row, runs_behind
from tangora.report.statistics.selection import group_by_recipe, num_steps
from tangora.report.table import Cell, Table, cell, csv_text

_ERROR_CHARACTERS = 120


def runs_section(comparison: Comparison, rows: Sequence[Row]) -> Section:
    """Show every run, in a table that can be filtered."""
    downloads = {
        "summary.csv": csv_text([flat_row(row) for row in rows]),
        "runs.csv": _runs_csv(comparison, rows),
    }
    return Section("runs", "Runs", table=_runs_table(comparison, rows), downloads=downloads)


def _runs_table(comparison: Comparison, rows: Sequence[Row]) -> Table:
    metric, result = comparison.metric, _in_result(comparison, rows)
    shared = _shared_settings(comparison.records)
    return Table(
        name="runs",
        caption="Every run, also those that went wrong. “In result” marks the runs behind the test numbers above.",
        headers=[
            "recipe", "learning rate", "seed", "stage", "status", "in result", f"validation {metric}",
            f"test {metric}", "time", "details",
        ],
        rows=[_cells(run, metric, shared, in_result=run.id in result) for run in _ordered(comparison, rows)],
        words=(3, 4, 9),
        filters=("recipe", "status", "stage"),
    )  # fmt: skip


def _ordered(comparison: Comparison, rows: Sequence[Row]) -> list[Record]:
    groups = group_by_recipe(comparison)
    return [
        run
        for row in rows
        for run in sorted(groups[row.recipe], key=lambda run: (run.learning_rate, run.seed, run.stage))
    ]


def _in_result(comparison: Comparison, rows: Sequence[Row]) -> set[str]:
    return {run.id for runs in runs_behind(comparison, rows).values() for run in runs}


def _cells(run: Record, metric: str, shared: Mapping[str, str], *, in_result: bool) -> list[Cell]:
    validation, test = (run.metrics.get(split, {}).get(metric) for split in ("validation", "test"))
    return [
        cell(run.recipe, run.recipe),
        cell(formats.learning_rate(run.learning_rate), run.learning_rate),
        cell(str(run.seed), run.seed),
        cell(run.stage, run.stage),
        Cell([_status(run)], run.status, kind=run.status),
        cell("yes" if in_result else "", 0 if in_result else 1),
        cell(formats.metric(validation), validation),
        cell(formats.metric(test), test),
        cell(formats.seconds(run.time.total), run.time.total),
        Cell([_error_head(run)], _error_head(run), more=_details(run, shared)),
    ]


def _status(run: Record) -> str:
    return run.status.replace("_", " ")


def _error_head(run: Record) -> str:
    lines = (run.error or "").strip().splitlines()
    head = lines[-1] if lines else ""
    return head if len(head) <= _ERROR_CHARACTERS else head[:_ERROR_CHARACTERS] + "…"


def _details(run: Record, shared: Mapping[str, str]) -> str:
    # What no other column says, one line each.
    parts = [f"{name.replace('_', ' ')} {formats.seconds(value)}" for name, value in run.time]
    lines = [run.id, f"{num_steps(run)} steps: {', '.join(parts)}"]
    for split, values in run.metrics.items():
        if values:
            lines.append(
                f"{split}: " + ", ".join(f"{name} {formats.metric(v)}" for name, v in values.items())
            )
    memory = run.memory
    sizes = {
        "peak": memory.peak_bytes,
        "optimizer state": memory.optimizer_state_bytes,
        "trained": memory.adapter_bytes,
    }
    lines.append("memory: " + ", ".join(f"{name} {formats.size(size)}" for name, size in sizes.items()))
    lines.append(f"trainable parameters: {run.trainable_parameters}")
    for name, points in (("trajectory", run.trajectory), ("curvature", run.curvature)):
        if points:
            last = ", ".join(f"{key} {formats.significant(value)}" for key, value in points[-1].items())
            lines.append(f"{name}, last point: {last}")
    lines += [f"{key}: {value}" for key, value in flat(run.settings) if key not in shared]
    error = (run.error or "").strip()
    return "\n".join([*lines, *(["", error] if error != _error_head(run) else [])])


def _shared_settings(records: Sequence[Record]) -> dict[str, str]:
    if len(records) < 2:
        return {}
    first, *others = [dict(flat(record.settings)) for record in records]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def trouble_section(comparison: Comparison, rows: Sequence[Row]) -> Section | None:
    """List the runs that did not finish."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for run in _ordered(comparison, rows):
        if run.status != "finished":
            groups[run.recipe, run.status, _error_head(run)].append(run)
    if not groups:
        return None
    table = Table(
        name="trouble",
        caption="Runs that did not finish, with the reason.",
        headers=["recipe", "status", "runs", "learning rates", "seeds", "reason"],
        rows=[
            [
                cell(recipe, recipe),
                Cell([_status(runs[0])], name, kind=name),
                cell(str(len(runs)), len(runs)),
                cell(_each(runs, lambda run: run.learning_rate, formats.learning_rate)),
                cell(_each(runs, lambda run: run.seed, str)),
                cell(reason, reason),
            ]
            for (recipe, name, reason), runs in groups.items()
        ],
        words=(1, 3, 4, 5),
    )
    return Section("trouble", "Runs that went wrong", table=table)


def _each(runs: Sequence[Record], value: Any, write: Any) -> str:
    return ", ".join(write(found) for found in sorted({value(run) for run in runs}))


def _runs_csv(comparison: Comparison, rows: Sequence[Row]) -> str:
    result = _in_result(comparison, rows)
    return csv_text([_flat_run(run, in_result=run.id in result) for run in _ordered(comparison, rows)])


def _flat_run(run: Record, *, in_result: bool) -> dict[str, Any]:
    named = ("id", "recipe", "learning_rate", "seed", "stage", "status")
    cells = {name: getattr(run, name) for name in named}
    cells |= {"in_result": in_result, "steps": num_steps(run)}
    for split, values in run.metrics.items():
        cells |= {f"{split}_{name}": value for name, value in values.items()}
    cells |= {f"seconds_{part}": value for part, value in run.time} | dict(run.memory)
    cells["trainable_parameters"] = run.trainable_parameters
    if run.forgetting:
        cells |= {
            "forgetting_before": run.forgetting.before,
            "forgetting_after": run.forgetting.after,
        }
    return cells | {"error": run.error or ""}
