"""A study as one file: all runs with what decides and what it cost, without the histories of their steps.

python benchmarks/compact.py results/ablations --output benchmarks/ablations.json

Parts of a task that were run one after the other, with other recipes, are joined.

Of such files it writes the page over all tasks, with the picture in the README:

python benchmarks/compact.py benchmarks/standard/digits-vit.json benchmarks/standard/bbc-minilm.json --report page
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from statistics import fmean

from tangora.report import Comparison, Record, load_comparison, summarize, write_study
from tangora.report.record_files import write_atomic

TRAINING = "training"
"""Key of the metrics to which the loss of the last tenth of the training steps is added."""


def read_study(path: Path) -> dict[str, Comparison]:
    """Read a study.

    Args:
        path: The output folder of ``tangora compare``, or a file that this script wrote.

    Returns:
        Its comparisons by task, the runs without histories.
    """
    if path.is_file():
        tasks = json.loads(path.read_text(encoding="utf-8"))
        return {name: Comparison.model_validate(task) for name, task in tasks.items()}
    folders = sorted(found.parent for found in path.glob("**/comparison.json"))
    return {folder.name: _compact(load_comparison(folder)) for folder in folders}


_DECISIVE = (
    *(
        "model",
        "data",
        "kind",
        "num_train",
        "num_validation",
        "num_test",
        "max_length",
        "rank",
        "alpha",
        "steps",
    ),
    *("batch_size", "head_learning_rate", "weight_decay", "schedule", "warmup", "clip", "judge_by"),
)


def _differing(one: Comparison, other: Comparison) -> list[str]:
    """Return the settings that two parts of a task must share and do not, and ``recipe`` if both have a run."""
    twice = {run.id for run in one.records} & {run.id for run in other.records}
    return [key for key in _DECISIVE if one.settings.get(key) != other.settings.get(key)] + ["recipe"] * bool(
        twice
    )


def _joined(one: Comparison, other: Comparison) -> Comparison:
    return one.model_copy(update={"records": [*one.records, *other.records]})


def _compact(comparison: Comparison) -> Comparison:
    return comparison.model_copy(update={"records": [_without_steps(run) for run in comparison.records]})


def _without_steps(run: Record) -> Record:
    last = [step.loss for step in run.history[-max(1, len(run.history) // 10) :]]
    metrics = run.metrics | ({TRAINING: {"loss": fmean(last)}} if last else {})
    # where an accuracy decides, the answers say it all
    scores = None if run.correct is not None else run.scores
    settings = {key: value for key, value in run.settings.items() if value is not None}
    return run.model_copy(update={"history": [], "metrics": metrics, "scores": scores, "settings": settings})


def main() -> None:
    """Print each task's table; write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", type=Path, nargs="+", help="output folders of tangora compare, or files made of them"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--report", type=Path, help="folder for report.html, study.csv and picture.png")
    parser.add_argument("--title", default="Study", help="heading of that page")
    arguments = parser.parse_args()
    study: dict[str, Comparison] = {}
    for path in arguments.results:
        found = read_study(path)
        for name, comparison in found.items():
            known = study.get(name)
            if known and (other := _differing(known, comparison)):
                parser.error(f"{path}: {name} was run with another {', '.join(other)} before")
            study[name] = _joined(known, comparison) if known else comparison
    for name, comparison in study.items():
        print(f"\n{name} ({len(comparison.records)} runs)\n")
        print(
            "| recipe | test | 95 % interval | minus `lora` | its interval | p, corrected | learning rate | runs |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for row in summarize(comparison):
            edge = f", the {row.edge} end" if row.edge else ""
            cells = (
                f"`{row.recipe}`",
                _number(row.test),
                _interval(row.interval),
                _number(row.difference, sign="+"),
                _interval(row.difference_interval, sign="+"),
                _number(row.p_corrected),
                f"{row.learning_rate:g}{edge}",
                str(row.num_runs),
            )
            print(f"| {' | '.join(cells)} |")
    if arguments.output:
        dumped = {name: comparison.model_dump(mode="json") for name, comparison in study.items()}
        write_atomic(arguments.output, json.dumps(dumped, separators=(",", ":")) + "\n")
    if arguments.report:
        told = shlex.join(["python", *sys.argv])
        write_study(study, arguments.report / "report.html", arguments.title, told)


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}".replace("-", "−")


def _interval(interval: tuple[float, float] | None, sign: str = "") -> str:
    return "" if interval is None else " to ".join(_number(end, sign) for end in interval)


if __name__ == "__main__":
    main()
