"""Evaluates a causal model in memory on tasks of EleutherAI's lm-eval; the model is left as it was.

What a task asks, how answers are scored and what their standard errors are is lm-eval's. Code that a model has written
is run by the sandbox alone, and only if that is wanted.
"""

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard

import datasets
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from tangora._checks import InputError, near_hint, near_path, reason
from tangora.probes.stillness import preserved_randomness, seeded
from tangora.training.code_eval import (
    GeneratedProgram,
    check_code,
    code_eval_replaced,
    programs_of,
    programs_run,
    writes_code,
)
from tangora.training.data.sources import read_data
from tangora.training.metrics import observed

_TASKS = Path(__file__).parent / "benchmark_tasks"  # on data that needs no hub

_SEED = 1234  # lm-eval's own, of few-shot examples and of answers that are drawn


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of a model on one task of lm-eval, or on one group of tasks."""

    metric: str | None
    """The first metric, as lm-eval names it; None where programs were generated and not run."""
    metrics: dict[str, float]
    stderr: dict[str, float]
    """Standard errors of the metrics, where lm-eval gives one."""
    higher_is_better: bool
    num_examples: int
    scores: list[float] | None
    """Per example, whose mean is the first metric; None where it is no mean."""
    num_fewshot: int | None
    version: str


@dataclass(frozen=True)
class Benchmarks:
    """Loaded tasks and groups of tasks."""

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]

    @property
    def code(self) -> list[str]:
        """Tasks whose answers are programs."""
        return [name for name, task in self.tasks.items() if writes_code(task)]

    def reported(self) -> list[str]:
        """List what has a result of its own: tasks, and in place of its parts a group that averages them."""
        inside = {name for group in self.groups.values() for name in group.child_names}
        tops = [*(name for name in self.groups if name not in inside), *self.tasks]
        found = [name for top in tops if top not in inside for name in self._averaged(top)]
        return list(dict.fromkeys(found))

    def parts(self, name: str) -> list[str]:
        """List the tasks of a group; a task is its own only part."""
        return (
            [task.task_name for task in self.groups[name].get_all_tasks()] if name in self.groups else [name]
        )

    def _averaged(self, name: str) -> list[str]:
        if name not in self.groups or self.groups[name].has_aggregation:
            return [name]
        return [found for child in self.groups[name].child_names for found in self._averaged(child)]


def load_benchmarks(
    names: Sequence[str], folder: str | None = None, *, execute_code: bool = False
) -> Benchmarks:
    """Load tasks of lm-eval by their names, with their data.

    Args:
        names: Tasks, groups of tasks, or tags.
        folder: Folder with further tasks as YAML files, which win over lm-eval's of the same name.
        execute_code: Whether programs are to be run, which takes tasks that leave this to ``code_eval``.

    Raises:
        InputError: If there is no such task, its data cannot be loaded, or it would run programs unprotected.
    """
    if folder is not None and not Path(folder).is_dir():
        raise InputError(
            f"benchmark_path must be a folder with YAML files of tasks; {folder!r} is none{near_path(folder)}"
        )
    manager = _manager(folder, lm_evals=False)
    if not set(names) <= set(manager.all_tasks):
        manager = _manager(folder, lm_evals=True)
    tasks, groups = {}, {}
    for name in names:
        if name not in manager.all_tasks:
            where = f"lm-eval or of {folder}" if folder is not None else "lm-eval"
            raise InputError(
                f"benchmarks must be tasks of {where}; got {name!r}{near_hint(name, manager.all_tasks)}"
            )
        with _quiet(), code_eval_replaced(), preserved_randomness():
            try:
                found = manager.load([name])
            except Exception as error:  # the hub, its files and the task's own code fail in any way
                raise InputError(f"benchmark {name} cannot be loaded: {reason(error)}") from error
        tasks |= found["tasks"]
        groups |= found["groups"]
    loaded = Benchmarks(tasks, groups)
    for name in loaded.code:
        check_code(name, tasks[name], execute_code=execute_code)
    return loaded


def evaluate_benchmarks(
    benchmarks: Benchmarks,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    execute_code: bool = False,
) -> tuple[dict[str, BenchmarkResult], dict[str, list[GeneratedProgram]]]:
    """Evaluate a causal model as lm-eval does: zero-shot, unless a task says otherwise, and greedily.

    Args:
        limit: Number of examples of each task; default: all.
        execute_code: Whether to run the programs that a model writes, in the sandbox.

    Returns:
        The results, and of each task whose answers are programs these.
    """
    HFLM = import_module("lm_eval.models.huggingface").HFLM
    for name, task in benchmarks.tasks.items():  # as `lm_eval.simple_evaluate` prepares them
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
        if name in benchmarks.code and not execute_code:
            task.override_metric(metric_name="bypass")
    with contextlib.ExitStack() as around:
        for each in (seeded(_SEED), observed(model), _with_weights_as_tied(model), _without_bars()):
            around.enter_context(each)
        if execute_code:
            around.enter_context(programs_run())
        found = import_module("lm_eval").evaluate(
            lm=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
            task_dict={"tasks": dict(benchmarks.tasks), "groups": dict(benchmarks.groups)},
            limit=limit,
            confirm_run_unsafe_code=True,  # by the sandbox, which stands in for what would run it
        )
    results = {name: _result(found, name, benchmarks.parts(name)) for name in benchmarks.reported()}
    return results, {name: programs_of(found["samples"][name]) for name in benchmarks.code}


def packaged_test(data: str, **_metadata: Any) -> Any:
    """Give lm-eval the test examples of a packaged data set; tasks name this function."""
    rows = [dict(row.values) for row in read_data(data).splits["test"]]
    # the newline between a prompt and its completion belongs to what is given
    ended = [row | {"prompt": f"{row['prompt']}\n"} if "prompt" in row else row for row in rows]
    return {"test": datasets.Dataset.from_list(ended)}


# --- what lm-eval gives


def _result(found: Mapping[str, Any], name: str, parts: Sequence[str]) -> BenchmarkResult:
    # metric,filter and metric_stderr,filter; bypass is that of programs that are not judged
    values = {tuple(key.rsplit(",", 1)): value for key, value in found["results"][name].items() if "," in key}
    numbers = {key: float(value) for key, value in values.items() if _is_number(value) and key[0] != "bypass"}
    metrics = {key: value for key, value in numbers.items() if not key[0].endswith("_stderr")}
    first = next(iter(metrics), None)
    logged = [example for part in parts for example in found["samples"][part]]
    better = found["higher_is_better"].get(name, {})
    return BenchmarkResult(
        metric=",".join(first) if first else None,
        metrics={",".join(key): value for key, value in metrics.items()},
        stderr={
            f"{metric},{filtered}": error
            for metric, filtered in metrics
            if (error := numbers.get((f"{metric}_stderr", filtered))) is not None
        },
        # a metric may have the name of its function there
        higher_is_better=bool(better.get(first and first[0], all(better.values()))),
        num_examples=sum(found["n-samples"][part]["effective"] for part in parts),
        scores=_scores(logged, *first) if first else None,
        num_fewshot=found["n-shot"].get(name),
        version=str(found["versions"].get(name)),
    )


def _scores(logged: Sequence[Mapping[str, Any]], metric: str, filtered: str) -> list[float] | None:
    values: list[Any] = [example.get(metric) for example in logged if example["filter"] == filtered]
    return [float(value) for value in values] if values and all(map(_is_number, values)) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return hasattr(value, "__float__") and math.isfinite(float(value))


# --- what surrounds it


@functools.cache
def _manager(folder: str | None, *, lm_evals: bool) -> Any:
    # lm-eval's own tasks are 14 000 files, which takes some seconds
    folders = [_TASKS] if folder is None else [_TASKS, Path(folder)]
    return import_module("lm_eval.tasks").TaskManager(include_path=folders, include_defaults=lm_evals)


@contextlib.contextmanager
def _with_weights_as_tied(model: Any) -> Iterator[None]:
    # lm-eval ties the weights of a model anew, which raises where an adapter lies on one of them
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # of defaults that a task relies on, and of files that are read
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _without_bars():
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    # lm-eval's cannot be switched off, and would break those of the command
    begin = tqdm.__init__
    tqdm.__init__ = lambda self, *args, **options: begin(self, *args, **options | {"disable": True})
    try:
        yield
    finally:
        tqdm.__init__ = begin
