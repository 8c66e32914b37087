"""What a run writes and watches while it trains, as callbacks of the Hugging Face Trainer."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tangora._checks import InputError, check_whole
from tangora.diagnostics import Trajectory, TrajectoryPoint

_SEAL = "complete"
_SUMS = "trajectory.json"
_SECONDS = "seconds.json"

# A loss this many times the first one is not coming back, and would only cost the time of the remaining steps.
_EXPLOSION = 20.0


class DivergedError(ArithmeticError):
    """The loss left the finite numbers or exploded."""


class StepTimer(TrainerCallback):
    """Splits the time of training into forward + backward and optimizer steps.

    Attributes:
        forward_backward: Seconds so far, clipping included.
        optimizer: Seconds so far.
    """

    def __init__(self) -> None:
        self.forward_backward = 0.0
        self.optimizer = 0.0
        self._mark = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Start the clock."""
        self._mark = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Count forward and backward."""
        self.forward_backward += self._lap()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Count the optimizer step."""
        self.optimizer += self._lap()

    def _lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        return elapsed


class Durations(TrainerCallback):
    """Adds up what a run has spent over its interruptions: every checkpoint keeps the sums of its moment.

    Put this callback before `SealedCheckpoints`.
    """

    def __init__(self, spent: Callable[[], dict[str, float]]):
        self._spent = spent
        self._before: dict[str, float] = {}

    def total(self) -> dict[str, float]:
        """Return seconds by name, those before the checkpoint that training went on from included."""
        return {name: seconds + self._before.get(name, 0.0) for name, seconds in self._spent().items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Take over the sums of the checkpoint that training goes on from."""
        if state.global_step:
            self._before = _kept(args, state, _SECONDS)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Keep the sums with the checkpoint."""
        _keep(args, state, _SECONDS, self.total())


class History(TrainerCallback):
    """Appends one JSON line per step to a file, and stops a run that has diverged."""

    def __init__(self, path: Path, on_step: Callable[[int, float], None] | None = None):
        self._path = path
        self._on_step = on_step
        self._first: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Keep only the lines up to the step that training starts from."""
        lines = read_history(self._path)
        kept = [line for line in lines if line["step"] <= state.global_step]
        self._first = kept[0]["loss"] if kept else None
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ):
        """Write the line of a step."""
        if not logs or "loss" not in logs:
            return
        keys = ("loss", "learning_rate", "grad_norm")
        line = {"step": state.global_step} | {key: float(logs[key]) for key in keys if key in logs}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        loss = line["loss"]
        self._first = loss if self._first is None else self._first
        if not math.isfinite(loss) or loss > _EXPLOSION * max(self._first, 1.0):
            raise DivergedError(
                f"loss {loss:.4g} at step {state.global_step}, {self._first:.4g} at the start"
            )
        if self._on_step is not None:
            self._on_step(state.global_step, loss)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read the lines that `History` wrote."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}); restore it, or begin anew in another folder"
        ) from error


class Evaluations(TrainerCallback):
    """Evaluates every few steps and appends a JSON line for each; training stays what it is.

    Attributes:
        seconds: Spent so far.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        measure: Callable[[], dict[str, float]],
        log: Callable[[dict[str, float]], None] = lambda _: None,
    ):
        check_whole("every", every, low=1)
        self._path = path
        self._every = every
        self._measure = measure
        self._log = log
        self.seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Keep only the lines up to the step that training starts from."""
        kept = [line for line in read_history(self._path) if line["step"] <= state.global_step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Evaluate if the turn has come; the end of training has an evaluation of its own."""
        if state.global_step % self._every or state.global_step >= state.max_steps:
            return
        began = time.perf_counter()
        metrics = self._measure()
        self.seconds += time.perf_counter() - began
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "metrics": metrics}) + "\n")
        logs_step = control.should_log  # the Trainer takes any log for that of the step
        self._log({f"eval_{name}": value for name, value in metrics.items()})
        control.should_log = logs_step


class TrajectoryRecorder(TrainerCallback):
    """Follows every step and appends a `TrajectoryPoint` as a JSON line every few of them; training stays what it is.

    Points are measured at the start, every ``every`` steps and at the end. A checkpoint keeps what a resumed run needs;
    put this callback before `SealedCheckpoints`.
    """

    def __init__(
        self,
        path: Path,
        trajectory: Trajectory,
        every: int,
        on_point: Callable[[int], object] | None = None,
    ):
        check_whole("every", every, low=1)
        self._path = path
        self._trajectory = trajectory
        self._every = every
        self._on_point = on_point

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Measure the start, or go on from a checkpoint."""
        step = state.global_step
        lines = [line for line in read_history(self._path) if line["step"] <= step] if step else []
        self._path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        if step:
            self._trajectory.begin(_kept(args, state, _SUMS))
        else:
            self._trajectory.begin()
            self._append(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Follow the step, and measure where it led if its turn has come."""
        self._trajectory.advance()
        step = state.global_step
        if step % self._every and step != state.max_steps:
            return
        if not math.isfinite(self._trajectory.path_length):  # the next loss will end the run
            return
        try:
            self._append(step)
        except InputError as problem:  # the same examples were fine at the start
            raise DivergedError(f"step {step}: {problem}") from problem
        if self._on_point is not None:
            self._on_point(step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Keep the sums with the checkpoint."""
        _keep(args, state, _SUMS, self._trajectory.state())

    def _append(self, step: int) -> None:
        point = self._trajectory.measure(step)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(point)) + "\n")


def measured_steps(steps: int, every: int) -> list[int]:
    """List the steps at which `TrajectoryRecorder` measures."""
    return [*range(0, steps, every), steps]


def read_trajectory(path: str | Path) -> list[TrajectoryPoint]:
    """Read the points that `TrajectoryRecorder` wrote."""
    return TypeAdapter(list[TrajectoryPoint]).validate_python(read_history(Path(path)))


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _keep(args: TrainingArguments, state: TrainerState, name: str, content: Any) -> None:
    # beside what the Trainer has just written
    (_checkpoint(args, state.global_step) / name).write_text(json.dumps(content), encoding="utf-8")


def _kept(args: TrainingArguments, state: TrainerState, name: str) -> Any:
    # of the checkpoint that training goes on from
    return json.loads((_checkpoint(args, state.global_step) / name).read_text(encoding="utf-8"))


class SealedCheckpoints(TrainerCallback):
    """Marks every checkpoint that was written to its end, so that a killed run never resumes from half of one."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Seal the checkpoint that has just been written."""
        (_checkpoint(args, state.global_step) / _SEAL).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """Find the newest whole checkpoint, and remove those that were cut off."""
    found = {int(path.name.split("-")[1]): path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    for step, path in list(found.items()):
        if not (path / _SEAL).exists():
            shutil.rmtree(path)
            del found[step]
    return found[max(found)] if found else None
