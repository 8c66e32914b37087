"""Several comparisons, one per task, on one page."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

from tangora._checks import InputError
from tangora._folders import ComparisonFolder
from tangora.report import formats
from tangora.report.comparison.comparison_page import missing_sentence
from tangora.report.comparison.costs import COSTS, Cost
from tangora.report.comparison.differences import differences_section, save_differences
from tangora.report.comparison.published import published_section
from tangora.report.comparison.results_table import flat_row
from tangora.report.comparison.through_training import save_through_training, through_training_section
from tangora.report.drawing.panels import recipe_styles
from tangora.report.layout import Repeat, Section, render
from tangora.report.record_files import FrozenModel, read_record, save_json, write_atomic
from tangora.report.report_table import Cell, Table, cell, csv_text, number
from tangora.report.run_records import Comparison, load_comparison
from tangora.report.setup_facts import setup_facts
from tangora.report.statistics.intervals import ALPHA
from tangora.report.statistics.judgement import BASELINE, judge
from tangora.report.statistics.tasks import MIN_TASKS, DuelOutcome, TaskMatrix, matrix

_STUDY_FILE = "study.json"
_SIGNS = {"win": "▲", "tie": "=", "loss": "▼"}
_VERBS: dict[DuelOutcome, str] = {"win": "wins", "loss": "loses"}


def write_study(comparisons: Mapping[str, Comparison], path: Path, title: str, command: str) -> Path:
    """Write the page over several tasks.

    Beside it ``study.csv`` has its numbers, ``picture.png`` every recipe's difference from LoRA,
    ``through-training.png`` what was measured on the way, if anything was, and ``study.json`` what the tasks share.
    """
    found, folder = _matrix(comparisons), Path(path).parent
    write_atomic(folder / "study.csv", _csv(found))
    save_json(_StudyFile(title=title, command=command, tasks=tuple(comparisons)), folder / _STUDY_FILE)
    if found.against_lora:
        save_differences(found, folder)
    save_through_training(found.tasks, ComparisonFolder(folder).measured_picture)
    return write_atomic(path, _page(comparisons, found, title, command))


def load_study(folder: str | Path) -> tuple[dict[str, Comparison], str, str]:
    """Read the comparisons of a study from its folder."""
    folder = Path(folder)
    path = folder / _STUDY_FILE
    found = [task.path.name for task in ComparisonFolder(folder).tasks]
    if not found:
        raise InputError(f"{folder} contains no comparison.json, and neither does any of its subfolders")
    shared = (
        read_record(_StudyFile, path, "study") if path.is_file() else _StudyFile(title=folder.resolve().name)
    )
    planned = [name for name in shared.tasks if name in found]
    names = [*planned, *(name for name in found if name not in planned)]
    comparisons = {name: load_comparison(folder / name) for name in names}
    return comparisons, shared.title, shared.command


def study_verdict(comparisons: Mapping[str, Comparison]) -> list[str]:
    """Say what several tasks say together."""
    return tasks_verdict(_matrix(comparisons))


class _StudyFile(FrozenModel):
    title: str
    command: str = ""
    tasks: tuple[str, ...] = ()


def _matrix(comparisons: Mapping[str, Comparison]) -> TaskMatrix:
    return matrix({name: judge(comparison) for name, comparison in comparisons.items() if comparison.records})


def _csv(found: TaskMatrix) -> str:
    lines = []
    for name, task in found.tasks.items():
        for row in task.rows:
            duel = found.duel_against_lora(name, row.recipe)
            told = {"outcome": duel and duel.outcome, "p_corrected_over_tasks": duel and duel.p_corrected}
            lines.append({"task": name} | flat_row(row) | told)
    return csv_text(lines)


def _page(comparisons: Mapping[str, Comparison], found: TaskMatrix, title: str, command: str) -> str:
    styles = recipe_styles(_recipes(found))
    sections = [
        _results(found),
        differences_section(found, styles),
        _pairs(found),
        _costs(found),
        *_through_training(found),
    ]
    links = [_link(name, comparison) for name, comparison in comparisons.items()]
    tasks = Section("tasks", "Tasks", links=links, downloads={"study.csv": _csv(found)})
    num_runs = sum(len(comparison.records) for comparison in comparisons.values())
    return render(
        title,
        [
            "tangora comparisons",
            formats.plural(len(comparisons), "task"),
            formats.plural(len(styles), "recipe"),
            formats.plural(num_runs, "run"),
        ],
        max((comparison.created for comparison in comparisons.values()), default=""),
        tasks_verdict(found),
        [*(sections if found.tasks else []), published_section([*comparisons.values()]), tasks],
        Repeat(command, {}) if command else None,
        heading="Verdict",
        styles=styles,
    )


def _link(name: str, comparison: Comparison) -> dict[str, str | None]:
    count = formats.plural(len(comparison.records), "run")
    better = "higher" if comparison.higher_is_better else "lower"
    state = missing_sentence(comparison) or (f"{count}." if comparison.records else "No records yet.")
    return {
        "name": name,
        "address": f"{quote(name)}/report.html" if comparison.records else None,
        "title": comparison.title,
        "state": f"test {comparison.metric}, {better} is better · {state}",
        "beneath": ", ".join(f"{key} {value}" for key, value in setup_facts(comparison)),
    }


def _results(found: TaskMatrix) -> Section:
    ranks = found.mean_ranks
    columns: dict[str, Callable[[str], Cell | str]] = {"recipe": str}
    if ranks:
        columns["mean rank"] = lambda recipe: number(ranks.get(recipe), "{:.2f}".format)
    for task in found.tasks:
        columns[task] = lambda recipe, task=task: _result_cell(found, task, recipe)
    caption = f"Test metric of each recipe on each task, and its difference from {BASELINE}."
    table = Table.of("results", caption, _recipes(found), columns)
    notes = [
        (
            f"Below a number: its 95 % interval, and the difference from {BASELINE} with ▲ win, = tie "
            "or ▼ loss. A "
            "win or a loss has a p-value below 0.05 after Holm's correction over all recipes and "
            "tasks; with one seed there is no test."
        ),
        "Mean rank: 1 is best; over the tasks, among the recipes that have a result on every one.",
    ]
    return Section("results", "Recipes on tasks", table=table, notes=notes if ranks else notes[:1])


def _recipes(found: TaskMatrix) -> list[str]:
    # those without a test result come last
    names = {recipe for task in found.tasks.values() for recipe in task.recorded}
    return [*found.recipes, *sorted(names - set(found.recipes))]


def _result_cell(found: TaskMatrix, task: str, recipe: str) -> Cell:
    row = next((row for row in found.tasks[task].rows if row.recipe == recipe), None)
    duel = found.duel_against_lora(task, recipe)
    if row is None or row.test is None:
        return Cell([formats.MISSING if row is None else "no result"])
    lines = [formats.interval(row.interval)]
    if duel is not None:
        told = "cannot tell" if duel.outcome is None else f"{_SIGNS[duel.outcome]} {duel.outcome}"
        lines.append(f"{formats.difference(duel.difference)} {told}")
    kind = (duel and duel.outcome) or ""
    return cell(formats.metric(row.test), *lines, value=row.test, kind=kind)


def _pairs(found: TaskMatrix) -> Section | None:
    if len(found.recipes) < 2:
        return None
    columns = {
        theirs: lambda ours, theirs=theirs: _pair_cell(found, ours, theirs) for theirs in found.recipes
    }
    table = Table.of(
        "pairs",
        "Tasks on which the recipe of the row wins – ties – loses against the recipe of the column.",
        found.recipes,
        {"recipe": str, **columns},
    )
    notes = [
        "Corrected for all pairs of recipes on all tasks (Holm); with few seeds hardly any difference remains."
    ]
    return Section("pairs", "Every pair", table=table, notes=notes)


def _pair_cell(found: TaskMatrix, ours: str, theirs: str) -> Cell:
    if ours == theirs:
        return cell("")
    count = found.count(ours, theirs)
    if not any(count.values()):
        return cell(formats.MISSING)
    text = f"{count['win']} – {count['tie']} – {count['loss']}"
    return cell(text, value=count["win"] - count["loss"])


def _costs(found: TaskMatrix) -> Section | None:
    columns = {
        cost.title: lambda recipe, cost=cost: number(_ratio(found, recipe, cost), _ratio_text)
        for cost in COSTS
    }
    caption = f"What a run costs, {BASELINE} = 1."
    table = Table.of("costs", caption, _recipes(found), {"recipe": str, **columns}).filled()
    if len(table.headers) == 1:
        return None
    notes = [f"Geometric mean over the tasks on which both the recipe and {BASELINE} have a result."]
    return Section("costs", "Costs", table=table, notes=notes)


def _through_training(found: TaskMatrix) -> list[Section]:
    sections = {
        task: through_training_section(judged, f"through-training-{number}")
        for number, (task, judged) in enumerate(found.tasks.items(), start=1)
    }
    return [
        replace(section, title=f"{task}: {section.title[0].lower()}{section.title[1:]}")
        for task, section in sections.items()
        if section is not None
    ]


def _ratio(found: TaskMatrix, recipe: str, cost: Cost) -> float | None:
    logs = []
    for task in found.tasks.values():
        values = {row.recipe: cost.of(row) for row in task.rows}
        ours, lora = values.get(recipe), values.get(BASELINE)
        if ours and lora:
            logs.append(math.log(ours / lora))
    return math.exp(fmean(logs)) if logs else None


def _ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}"


def tasks_verdict(found: TaskMatrix) -> list[str]:
    """Say what several tasks say together."""
    if not found.tasks:
        return ["No task has a record yet."]
    return formats.sentences(_against_lora(found), _pairs_verdict(found), _ranks(found))


def _against_lora(found: TaskMatrix) -> str:
    tested = [duel for duel in found.against_lora if duel.p_value is not None]
    if not tested:
        return f"No recipe can be compared with {BASELINE}: this needs at least two seeds of both."
    counts = {name: found.count_against_lora(name) for name in found.recipes if name != BASELINE}
    parts = []
    for name, count in counts.items():
        said = [
            f"{verb} on {formats.plural(count[kind], 'task')}" for kind, verb in _VERBS.items() if count[kind]
        ]
        if said:
            parts.append(f"{name} {' and '.join(said)}")
    ties = sum(count["tie"] for count in counts.values())
    result = "; ".join(parts) if parts else "no recipe wins or loses"
    correction = f"corrected for {formats.plural(len(tested), 'comparison')} (Holm)"
    return f"Against {BASELINE}, {correction}: {result}; {formats.plural(ties, 'tie')}."


def _pairs_verdict(found: TaskMatrix) -> str | None:
    tested = [duel for duel in found.pairs if duel.p_value is not None]
    if not tested:
        return None
    apart = sum(duel.outcome != "tie" for duel in tested)
    number = formats.plural(len(tested), "pair")
    differ = "differs" if apart == 1 else "differ"
    return (
        f"Of {number} of recipes on a task, {apart} {differ} significantly after correction for all of them."
    )


def _ranks(found: TaskMatrix) -> str | None:
    if not found.mean_ranks:
        return None
    listed = formats.listing(f"{name} {rank:.1f}" for name, rank in found.mean_ranks.items())
    return f"Mean ranks over {formats.plural(len(found.tasks), 'task')}: {listed}; {_chance(found)}."


def _chance(found: TaskMatrix) -> str:
    p = found.rank_p_value
    if p is None:
        few = formats.sentences(
            f"fewer than {MIN_TASKS} tasks" if len(found.tasks) < MIN_TASKS else None,
            "fewer than 3 recipes" if len(found.mean_ranks) < 3 else None,
        )
        return f"{formats.listing(few)} are too few to separate such ranks from chance"
    how = "more than chance explains" if p < ALPHA else "no more than chance explains"
    return f"they differ by {how} (Friedman, {formats.p_value(p)})"
