"""Generated programs of benchmarks: written to files, and run by the sandbox where lm-eval would run them itself."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

from tangora._checks import InputError
from tangora.training.sandbox import Verdict, run_program


@dataclass(frozen=True)
class GeneratedProgram:
    """A program that a model has written, and what is run after it."""

    example: int
    program: str
    test: str
    passed: bool | None = None
    """None where it has not been run."""
    reason: str | None = None


class _SandboxedCodeEval:
    """Stands in for ``code_eval`` of Hugging Face's evaluate, from the hub, which runs programs unprotected."""

    def __init__(self) -> None:
        self.running = False
        self.verdicts: dict[str, Verdict] = {}

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], dict[Any, Any]]:
        """Estimate the probability that one of k programs passes its test.

        Source:
            Chen et al. (2021), arXiv:2107.03374, equation (1).
        """
        if not self.running:  # a task tries it while it is loaded
            return {f"pass@{number}": 0.0 for number in k}, {}
        judged = [
            [self._passes(_joined(program, test)) for program in programs]
            for programs, test in zip(predictions, references, strict=True)
        ]
        return {f"pass@{number}": fmean(_pass_at(number, each) for each in judged) for number in k}, {}

    def _passes(self, source: str) -> bool:
        if source not in self.verdicts:
            self.verdicts[source] = run_program(source)
        return self.verdicts[source].passed


_CODE_EVAL = _SandboxedCodeEval()
"""One for all: tasks keep it where they are imported, once in a process."""


@contextlib.contextmanager
def code_eval_replaced() -> Iterator[None]:
    """Give tasks that are loaded the sandbox in place of ``code_eval``."""
    evaluate: Any = import_module("evaluate")
    load = evaluate.load
    evaluate.load = lambda path, *args, **options: (
        _CODE_EVAL if path == "code_eval" else load(path, *args, **options)
    )
    try:
        yield
    finally:
        evaluate.load = load


@contextlib.contextmanager
def programs_run() -> Iterator[None]:
    """Let the sandbox run the programs of tasks that are evaluated."""
    _CODE_EVAL.running, _CODE_EVAL.verdicts = True, {}
    try:
        yield
    finally:
        _CODE_EVAL.running = False


def writes_code(task: Any) -> bool:
    """Tell whether a task's answers are programs."""
    return bool(getattr(task, "UNSAFE_CODE", False)) or _leaves_it_to_code_eval(task)


def check_code(name: str, task: Any, *, execute_code: bool) -> None:
    """Raise where a task would run programs by itself, or they are to be run and cannot be isolated."""
    if callable(task.get_config("process_results")):  # which lm-eval calls whatever the metrics are
        raise InputError(f"benchmark {name} cannot be used: it would run programs by itself and unprotected")
    if not execute_code:
        return
    run_program("")  # says what is missing where programs cannot be isolated
    if not _leaves_it_to_code_eval(task):
        raise InputError(
            f"execute_code cannot be used with benchmark {name}, which would run programs itself and "
            "unprotected; omit one of them"
        )


def _leaves_it_to_code_eval(task: Any) -> bool:
    functions = [each["metric"] for each in task.get_config("metric_list") or ()]
    held = [value for each in functions for value in getattr(each, "__globals__", {}).values()]
    return any(value is _CODE_EVAL for value in held)


def programs_of(logged: Sequence[Mapping[str, Any]]) -> list[GeneratedProgram]:
    """Gather the programs among the answers that lm-eval has logged, with the verdicts of those that were run."""
    found = []
    for example in logged:
        for program in _programs(example["filtered_resps"]):
            test = str(example["target"])
            verdict = _CODE_EVAL.verdicts.get(_joined(program, test))
            told = (None, None) if verdict is None else (verdict.passed, verdict.reason)
            found.append(GeneratedProgram(int(example["doc_id"]), program, test, *told))
    return found


def write_programs(programs: Sequence[GeneratedProgram], path: Path) -> None:
    """Write programs as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(vars(each)) + "\n" for each in programs), encoding="utf-8")


def _joined(program: str, test: str) -> str:
    return f"{program}\n{test}"  # as code_eval does


def _pass_at(number: int, passed: Sequence[bool]) -> float:
    return 1.0 - math.comb(passed.count(False), number) / math.comb(len(passed), number)


def _programs(answers: Any) -> list[str]:
    # a text, a list of them, or a list of lists, as filters leave them
    return [answers] if isinstance(answers, str) else [text for each in answers for text in _programs(each)]
