"""Every run of a comparison, as a table to search, and as CSV."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from tangora.report import formats
from tangora.report.comparison.costs import TIME_PARTS
from tangora.report.comparison.results_table import flat_row
from tangora.report.layout import Section, flat
from tangora.report.report_table import Cell, Table, cell, csv_text, number
from tangora.report.run_records import Record
from tangora.report.statistics.judgement import Judgement
from tangora.report.statistics.selection import num_steps

_ERROR_CHARACTERS = 120


def runs_section(judged: Judgement) -> Section:
    """Show every run, in a table that can be filtered."""
    runs, metric = _ordered(judged), judged.comparison.metric
    shared = _shared_settings(judged.comparison.records)
    result = {run.id for behind in judged.runs.values() for run in behind}
    table = Table.of(
        "runs",
        "Every run, including failed ones. “In result” marks the runs behind the test numbers above.",
        runs,
        {
            "recipe": lambda run: run.recipe,
            "learning rate": lambda run: number(run.learning_rate, formats.learning_rate),
            "seed": lambda run: number(run.seed, str),
            "stage": lambda run: run.stage,
            "status": _status_cell,
            "in result": lambda run: cell("yes", value=0) if run.id in result else cell("", value=1),
            f"validation {metric}": lambda run: _metric_cell(run, "validation", metric),
            f"test {metric}": lambda run: _metric_cell(run, "test", metric),
            "time": lambda run: number(run.time.total, formats.seconds),
            "details": lambda run: cell(_error_head(run), more=_details(run, shared)),
        },
        words=("stage", "status", "details"),
        filters=("recipe", "status", "stage"),
    )
    downloads = {
        "summary.csv": csv_text([flat_row(row) for row in judged.rows]),
        "runs.csv": csv_text([_flat_run(run, in_result=run.id in result) for run in runs]),
    }
    return Section("runs", "Runs", table=table, downloads=downloads)


def _status_cell(run: Record) -> Cell:
    return cell(run.status.replace("_", " "), value=run.status, kind=run.status)


def _metric_cell(run: Record, split: str, metric: str) -> Cell:
    return number(run.metrics.get(split, {}).get(metric), formats.metric)


def _ordered(judged: Judgement) -> list[Record]:
    order = attrgetter("learning_rate", "seed", "stage")
    return [run for row in judged.rows for run in sorted(judged.recorded[row.recipe], key=order)]


def _error_head(run: Record) -> str:
    lines = (run.error or "").strip().splitlines()
    head = lines[-1] if lines else ""
    return head if len(head) <= _ERROR_CHARACTERS else head[:_ERROR_CHARACTERS] + "…"


def _details(run: Record, shared: Mapping[str, str]) -> str:
    # What no other column says, one line each.
    parts = [f"{title} {formats.seconds(getattr(run.time, name))}" for name, (title, _) in TIME_PARTS.items()]
    lines = [run.id, f"{formats.plural(num_steps(run), 'step')}: {', '.join(parts)}"]
    for split, values in run.metrics.items():
        if values:
            lines.append(
                f"{split}: " + ", ".join(f"{name} {formats.metric(v)}" for name, v in values.items())
            )
    for name, found in run.benchmarks.items():
        values = [f"{metric} {formats.metric(value)}" for metric, value in found.metrics.items()]
        lines.append(f"{name}: {', '.join(values) or 'generated, not run'}")
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


def trouble_section(judged: Judgement) -> Section | None:
    """List the runs that did not finish."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for run in _ordered(judged):
        if run.status != "finished":
            groups[run.recipe, run.status, _error_head(run)].append(run)
    if not groups:
        return None
    table = Table.of(
        "trouble",
        "Runs that did not finish, with the reason.",
        groups.values(),
        {
            "recipe": lambda runs: runs[0].recipe,
            "status": lambda runs: _status_cell(runs[0]),
            "runs": lambda runs: number(len(runs), str),
            "learning rates": lambda runs: ", ".join(
                map(formats.learning_rate, sorted({run.learning_rate for run in runs}))
            ),
            "seeds": lambda runs: ", ".join(map(str, sorted({run.seed for run in runs}))),
            "reason": lambda runs: _error_head(runs[0]),
        },
        words=("status", "learning rates", "seeds", "reason"),
    )
    return Section("trouble", "Failed runs", table=table)


def _flat_run(run: Record, *, in_result: bool) -> dict[str, Any]:
    named = ("id", "recipe", "learning_rate", "seed", "stage", "status")
    cells = {name: getattr(run, name) for name in named}
    cells |= {"in_result": in_result, "steps": num_steps(run)}
    for split, values in run.metrics.items():
        cells |= {f"{split}_{name}": value for name, value in values.items()}
    cells |= {f"seconds_{part}": value for part, value in run.time} | dict(run.memory)
    cells["trainable_parameters"] = run.trainable_parameters
    for name, found in run.benchmarks.items():
        cells |= {f"{name}_{metric}": value for metric, value in found.metrics.items()}
    if run.forgetting:
        cells |= {"forgetting_before": run.forgetting.before, "forgetting_after": run.forgetting.after}
    return cells | {"error": run.error or ""}
