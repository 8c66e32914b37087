"""The trained model's answers to prompts, in a file, and what a command of the user's makes of them."""

import json
import math
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tangora._checks import InputError, reason
from tangora._folders import RunFolder
from tangora.experiments.run.preparing import Run
from tangora.report import Record
from tangora.report.record_files import write_atomic
from tangora.training.answers import answer_conversations
from tangora.training.data.prompts import read_prompts
from tangora.training.ranks import from_first

_MAX_NEW_TOKENS = 1024  # MT-Bench's own


def answer_prompts(run: Run, model: nn.Module) -> float:
    """Let a model answer the prompts of its run, turn after turn, and write a line for each; return the seconds."""
    began = time.perf_counter()
    settings = run.settings
    assert settings.prompts is not None
    prompts = read_prompts(settings.prompts)
    answers = answer_conversations(
        model,
        run.loaded.tokenizer,
        [prompt.turns for prompt in prompts],
        max_new_tokens=settings.max_new_tokens or _MAX_NEW_TOKENS,
        stop=settings.stop or (),
        batch_size=run.evaluation_batch_size,
        chat_template=bool(settings.chat_template),
    )
    origin = {"recipe": settings.recipe, "seed": settings.seed}
    lines = [
        {"id": prompt.id, "turns": prompt.turns, "answers": answered, **origin}
        for prompt, answered in zip(prompts, answers, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    from_first(lambda: write_atomic(run.folder.answers, text))
    return time.perf_counter() - began


def judged(record: Record, judge: Sequence[str] | None, folder: RunFolder) -> Record:
    """Return a record with the mean score that a command gives the answers of its run, unless it holds it."""
    known = "answers" in record.metrics and record.settings.get("judge") == judge
    if judge is None or known or record.status != "finished" or not folder.answers.is_file():
        return record
    try:
        score = mean_score(judge, folder.answers)
    except InputError as problem:
        raise InputError(
            f"{problem}; {record.id} is trained, and its answers are kept: mend the judge, and give the same command "
            "again"
        ) from problem
    return record.model_copy(
        update={
            "metrics": record.metrics | {"answers": {"judged": score}},
            "settings": record.settings | {"judge": list(judge)},
        }
    )


def mean_score(judge: Sequence[str], answers: Path) -> float:
    """Run a command with the path of a file of answers, and average the scores that it prints."""
    command = shlex.join(judge)
    try:
        done = subprocess.run([*judge, str(answers)], capture_output=True, text=True, check=False)
    except (OSError, ValueError) as error:
        raise InputError(f"judge {command!r} cannot be run: {reason(error)}") from error
    if done.returncode != 0:
        said = done.stderr.strip().rpartition("\n")[2][:200] or "it printed no error"
        raise InputError(f"judge {command!r} ended with exit code {done.returncode}: {said}")
    scores = [_score(line) for line in done.stdout.splitlines() if line.strip()]
    if not scores or None in scores:
        printed = " ".join(done.stdout.split())[:100] or "nothing"
        raise InputError(
            f'judge {command!r} must print a number, or a number or {{"score": number}} on each line; it printed '
            f"{printed}"
        )
    return sum(filter(None, scores)) / len(scores)


def _score(line: str) -> float | None:
    try:
        value: Any = json.loads(line)
    except ValueError:
        return None
    value = value.get("score") if isinstance(value, dict) else value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
