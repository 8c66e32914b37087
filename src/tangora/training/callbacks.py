"""Callbacks of the Hugging Face Trainer: what a run writes and measures while it trains."""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tangora._checks import InputError, check_whole
from tangora._names import Tracker
from tangora.diagnostics import Trajectory, TrajectoryPoint
from tangora.training.ranks import from_first, gathered, is_first

_SEAL = "complete"
_SUMS = "trajectory.json"
_SECONDS = "seconds.json"
_TENSORBOARD = "tensorboard"

# A loss this many times the first one is not coming back, and would only cost the time of the remaining steps.
_EXPLOSION = 20.0


class DivergedError(ArithmeticError):
    """The loss left the finite numbers or exploded."""


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line that was cut off does not count."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}); restore it, or begin anew in another folder"
        ) from error


class JsonLines:
    """A file of one JSON line per measured step, with which a resumed run goes on; the first process writes it."""

    def __init__(self, path: Path):
        self._path = path

    def begin(self, step: int) -> list[dict[str, Any]]:
        """Keep and return the lines up to the step that training starts from; a start at 0 finds none to keep."""
        return from_first(lambda: self._begin(step))

    def _begin(self, step: int) -> list[dict[str, Any]]:
        kept = [line for line in read_history(self._path) if line["step"] <= step] if step else []
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        return kept

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        if not is_first():
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Stopwatch:
    """Adds up the seconds spent inside of it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began


class StepTimer(TrainerCallback):
    """Splits the time of training into forward + backward (clipping included) and optimizer steps, in seconds."""

    def __init__(self) -> None:
        self.forward_backward = 0.0
        self.optimizer = 0.0
        self._mark = 0.0

    def on_step_begin(self, *_: Any, **__: Any):
        """Start the clock."""
        self._mark = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, **__: Any):
        """Count forward and backward."""
        self.forward_backward += self._lap()

    def on_optimizer_step(self, *_: Any, **__: Any):
        """Count the optimizer step."""
        self.optimizer += self._lap()

    def _lap(self) -> float:
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        return elapsed


class Durations(TrainerCallback):
    """Adds up the time of a run over its interruptions: every checkpoint keeps the sums of its moment.

    Put this callback before `SealedCheckpoints`.
    """

    def __init__(self, spent: Callable[[], dict[str, float]]):
        self._spent = spent
        self._before: dict[str, float] = {}
        self._counts = False

    def total(self) -> dict[str, float]:
        """Return seconds by name, those before the checkpoint that training went on from included."""
        return {name: seconds + self._before.get(name, 0.0) for name, seconds in self._spent().items()}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any):
        """Take over the sums of the checkpoint that training goes on from, but for a second phase of this process."""
        if state.global_step and not self._counts:
            self._before = _from_checkpoint(args, state, _SECONDS)
        self._counts = True

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any):
        """Keep the sums with the checkpoint."""
        _to_checkpoint(args, state, _SECONDS, self.total())


class History(TrainerCallback):
    """Appends one JSON line per step to a file, and stops a run that has diverged."""

    def __init__(self, path: Path, on_step: Callable[[int, float], None] | None = None):
        self._lines = JsonLines(path)
        self._on_step = on_step
        self._first: float | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any):
        """Keep the lines up to the step that training starts from."""
        kept = self._lines.begin(state.global_step)
        self._first = kept[0]["loss"] if kept else None

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **_: Any
    ):
        """Write the line of a step."""
        if not logs or "loss" not in logs:
            return
        keys = ("loss", "learning_rate", "grad_norm")
        line = {"step": state.global_step} | {key: float(logs[key]) for key in keys if key in logs}
        self._lines.append(line)
        loss = line["loss"]
        self._first = loss if self._first is None else self._first
        if not math.isfinite(loss) or loss > _EXPLOSION * max(self._first, 1.0):
            raise DivergedError(
                f"loss {loss:.4g} at step {state.global_step}, {self._first:.4g} at the start"
            )
        if self._on_step is not None:
            self._on_step(state.global_step, loss)


class Evaluations(TrainerCallback):
    """Evaluates every few steps and appends a JSON line for each; training stays what it is."""

    def __init__(
        self,
        path: Path,
        every: int,
        measure: Callable[[], dict[str, float]],
        log: Callable[[dict[str, float]], None] = lambda _: None,
    ):
        check_whole("every", every, low=1)
        self._lines = JsonLines(path)
        self._every = every
        self._measure = measure
        self._log = log
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any):
        """Keep the lines up to the step that training starts from."""
        self._lines.begin(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any):
        """Evaluate if the turn has come; the end of training has an evaluation of its own."""
        if state.global_step % self._every or state.global_step >= state.max_steps:
            return
        began = time.perf_counter()
        metrics = self._measure()
        self.seconds += time.perf_counter() - began
        self._lines.append({"step": state.global_step, "metrics": metrics})
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
        self._lines = JsonLines(path)
        self._trajectory = trajectory
        self._every = every
        self._on_point = on_point
        self.watch = Stopwatch()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any):
        """Measure the start, or go on from a checkpoint."""
        self._lines.begin(state.global_step)
        with self.watch:
            if state.global_step:
                self._trajectory.begin(_from_checkpoint(args, state, _SUMS))
            else:
                self._trajectory.begin()
                self._append(0)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any):
        """Follow the step, and measure where it led if its turn has come."""
        with self.watch:
            self._follow(state)

    def _follow(self, state: TrainerState) -> None:
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
        if self._on_point is not None and is_first():
            self._on_point(step)

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any):
        """Keep the sums with the checkpoint."""
        _to_checkpoint(args, state, _SUMS, self._trajectory.state())

    def _append(self, step: int) -> None:
        self._lines.append(asdict(self._trajectory.measure(step)))


def measured_steps(steps: int, every: int) -> list[int]:
    """List the steps at which `TrajectoryRecorder` measures."""
    return [*range(0, steps, every), steps]


def read_trajectory(path: str | Path) -> list[TrajectoryPoint]:
    """Read the points that `TrajectoryRecorder` wrote."""
    return TypeAdapter(list[TrajectoryPoint]).validate_python(read_history(Path(path)))


def check_trackers(names: Sequence[Tracker]) -> None:
    """Check that trackers can be used, before any time has been spent."""
    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            raise InputError(f"report_to {name} needs the package {name}: pip install {name}")


def trackers(names: Sequence[Tracker], folder: Path) -> list[TrainerCallback]:
    """Make the callbacks that send the numbers of the Trainer's log to trackers."""
    made: list[TrainerCallback] = []
    for name in names if is_first() else ():
        if name == _TENSORBOARD:
            from torch.utils.tensorboard import SummaryWriter

            # beside the checkpoints, which are not kept, and which the callback would choose
            made.append(TensorBoardCallback(SummaryWriter(str(folder / _TENSORBOARD))))
        else:
            made += [make() for make in get_reporting_integration_callbacks([name])]
    return made


class SealedCheckpoints(TrainerCallback):
    """Marks every checkpoint that was written to its end, so that a killed run never resumes from half of one."""

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any):
        """Seal the checkpoint that has just been written, once every process has written its part."""
        gathered(None)
        if is_first():
            (checkpoint_folder(args, state) / _SEAL).touch()


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def last_checkpoint(folder: Path) -> Path | None:
    """Find the newest whole checkpoint, and remove those that were cut off."""
    found = {step_of(path): path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    for step, path in list(found.items()):
        if not (path / _SEAL).exists():
            shutil.rmtree(path)
            del found[step]
    return found[max(found)] if found else None


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the checkpoint that training goes on from, or that the Trainer has just written."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _to_checkpoint(args: TrainingArguments, state: TrainerState, name: str, content: Any) -> None:
    if not is_first():
        return
    (checkpoint_folder(args, state) / name).write_text(json.dumps(content), encoding="utf-8")


def _from_checkpoint(args: TrainingArguments, state: TrainerState, name: str) -> Any:
    return json.loads((checkpoint_folder(args, state) / name).read_text(encoding="utf-8"))
