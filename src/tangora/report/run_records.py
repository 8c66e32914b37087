"""The files a comparison leaves behind: one JSON file per run, one for what they have in common.

A folder holds ``comparison.json`` and ``records/<id>.json``. Numbers that JSON cannot say (a diverged run's loss)
are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, and read back as floats wherever the field
is a float; inside the free-form `settings` they stay strings.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tangora._checks import InputError
from tangora._folders import ComparisonFolder
from tangora._names import Status
from tangora.curvature.space_curvature import SpaceCurvature
from tangora.report.record_files import FrozenModel, IsoTime, Recorded, checked_content, read_json

_SCHEMA_VERSION = 3
"""Version of new records. Older ones can be read: 1 lacked optional fields, 2 kept only the last measured points."""

_READ = (1, 2, 3)


SPREAD_OVER_LAYERS = (
    "gradient_norm",
    "gradient_stable_rank",
    "gradient_effective_rank",
    "captured_energy",
    "reachable_energy",
)
"""Quantities for which a trajectory point also has ``_mean``, ``_low`` and ``_high`` over layers."""

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Metrics = dict[str, float]
Stage = Literal["trial", "sweep", "final"]


class StepRecord(FrozenModel):
    """One optimizer step of training."""

    step: Count = Field(description="Optimizer steps done so far; the first is 1.")
    loss: float = Field(description="Training loss of the step, mean over its batch.")
    learning_rate: float = Field(description="Learning rate of the step, after the schedule.")
    grad_norm: float | None = Field(default=None, description="Gradient norm before clipping.")


class EvaluationRecord(FrozenModel):
    """One evaluation on validation data during training."""

    step: Count = Field(description="Optimizer steps done before the evaluation.")
    metrics: _Metrics = Field(description='For example {"loss": 0.3, "accuracy": 0.9}.')


class TimeSplit(FrozenModel):
    """Where the wall-clock time of a run went, in seconds."""

    start: Seconds = Field(description="The initialization: probing gradients, initializing adapters.")
    forward_backward: Seconds = Field(description="All forward and backward passes of training.")
    optimizer: Seconds = Field(description="All optimizer steps, without forward and backward.")
    evaluation: Seconds = Field(description="All evaluations.")

    @property
    def total(self) -> float:
        """The sum of the parts, in seconds."""
        return self.start + self.forward_backward + self.optimizer + self.evaluation


class MemoryUse(FrozenModel):
    """Memory of a run, in bytes."""

    peak_bytes: Count | None = Field(
        default=None,
        description="Peak during training only: allocated on a GPU, resident on a CPU in a process of its own; None "
        "where it cannot be measured, or points on the way were, which take memory of their own.",
    )
    optimizer_state_bytes: Count = Field(description="All tensors in the optimizer's state.")
    adapter_bytes: Count = Field(description="All trained parameters.")


class MachineLoad(FrozenModel):
    """Load of the machine: the number of runnable processes, mean over one minute."""

    before: float = Field(ge=0, description="Load before the run.")
    after: float = Field(ge=0, description="Load at its end, including the run's own threads.")
    processors: int = Field(ge=1, description="Logical processors of the machine.")

    @property
    def busy(self) -> bool:
        """Whether more wanted to run than there are processors, so that times are too long."""
        return max(self.before, self.after) > self.processors + 0.5


class Flatness(FrozenModel):
    """Flatness of the training loss at the end of a run, and the generalisation gap.

    Factors belong to the pair (A, B) that was found, not to the model, and are no measure to compare methods by.
    """

    train_loss: float = Field(
        description="Loss of the first training examples, as many as are tested, in evaluation mode."
    )
    test_loss: float = Field(description="Loss of the test examples.")
    num_examples: Count = Field(
        description="The first training examples, the curvature of whose loss is measured."
    )
    spaces: dict[Literal["weights", "tangent", "factors"], SpaceCurvature] = Field(
        description="`weights`: all entries of the adapted layers' weights, for every method; `tangent`: the "
        "directions in which an adapter can move them; `factors`: the entries of A and B."
    )
    weight_layers: str | None = Field(
        default=None,
        description="Pattern of the layers in `weights` and in the ball; None: all adapted.",
    )
    radius: float | None = Field(
        default=None, description="Radius of the ball around the weights, Frobenius norm."
    )
    rise: float | None = Field(
        default=None, description="Largest rise of the loss that was found in the ball."
    )
    missing: str | None = Field(default=None, description="Why the curvature was not measured.")
    products: Count = Field(description="Products with the Hessian.")
    seconds: Seconds = Field(description="Time of the measurement; not part of the run's time.")

    @field_validator("spaces", mode="before")
    @classmethod
    def _present_names(cls, spaces: Any) -> Any:
        # older records have another name for the top eigenvalue
        for found in spaces.values() if isinstance(spaces, dict) else ():
            if isinstance(found, dict) and "largest" in found:
                found["top_eigenvalue"] = found.pop("largest")
        return spaces

    @property
    def gap(self) -> float:
        """The generalisation gap: test loss minus training loss."""
        return self.test_loss - self.train_loss


class Forgetting(FrozenModel):
    """Loss of a causal model on text that has nothing to do with the task."""

    before: float = Field(description="Loss of the original base, mean over tokens, in nats.")
    after: float = Field(description="The same after training.")
    num_texts: Count

    @property
    def rise(self) -> float:
        """By how much the loss rose."""
        return self.after - self.before


class Benchmark(FrozenModel):
    """Result of the trained model on one task of lm-eval, or on a group of tasks."""

    metric: str | None = Field(
        description="The first metric of the task, as lm-eval names it (`metric,filter`); None where programs were "
        "generated and not run."
    )
    metrics: _Metrics = Field(description="All metrics that are numbers.")
    stderr: _Metrics = Field(description="Their standard errors, as lm-eval estimates them.")
    higher_is_better: bool = Field(description="Direction of the first metric.")
    num_examples: Count
    scores: list[float] | None = Field(
        description="Per example, in the same order in every run, the first metric; None where it is no mean of them."
    )
    num_fewshot: int | None = Field(description="Solved examples in each prompt.")
    version: str = Field(description="Version of the task in lm-eval.")

    @property
    def value(self) -> float | None:
        """The first metric."""
        return None if self.metric is None else self.metrics[self.metric]


class Record(Recorded):
    """One run: a recipe, a learning rate and a seed."""

    schema_version: Literal[1, 2, 3] = _SCHEMA_VERSION
    id: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=@-]{0,199}$",
        description="Unique in its comparison, and its file name without `.json`.",
    )
    recipe: str = Field(min_length=1, description="Name of the recipe.")
    learning_rate: float = Field(gt=0, allow_inf_nan=False, description="Peak learning rate.")
    seed: int = Field(description="Seed of initialization, data order and dropout.")
    stage: Stage = Field(
        description=(
            "`sweep` runs choose the learning rate, `final` runs repeat it with other seeds; `trial` runs "
            "are shorter, and select the learning rates for the sweep."
        )
    )
    status: Status = Field(
        description=(
            "`diverged`: the loss was not finite or exploded; `out_of_memory`: a tensor did not fit into "
            "memory; "
            "`failed`: another exception, or its process was killed."
        )
    )
    error: str | None = Field(default=None, description="Reason why a run did not finish.")
    settings: dict[str, Any] = Field(description="All settings needed to run it again.")
    notes: list[str] = Field(
        default_factory=list, description="Notes about the data, such as truncated examples."
    )
    metrics: dict[str, _Metrics] = Field(
        description='Keys "validation" and "test" after training, "before" for the test set before it: in a comparison '
        "one run has it, if the base model has no new head."
    )
    history: list[StepRecord] = Field(description="Training steps, in order.")
    evaluations: list[EvaluationRecord] = Field(description="Evaluations during training, in order.")
    num_examples: dict[str, Count] = Field(
        default_factory=dict, description='Keys "train", "validation" and "test"; empty in older records.'
    )
    time: TimeSplit
    load: MachineLoad | None = Field(
        default=None,
        description="Load of the machine; None where it is unknown, or in older records.",
    )
    memory: MemoryUse
    gradient_evaluations: Count | None = Field(
        default=None,
        description="Gradients of whole batches in training: one per step, more for schemes with several stages.",
    )
    trainable_parameters: Count
    trajectory: list[_Metrics] = Field(
        default_factory=list,
        description="Measured points of the trajectory, in order: `step`, totals over the layers, such as "
        "`captured_energy`, and of some the spread over layers: `…_mean`, and `…_low` and `…_high`, the 10th and 90th "
        "percentile; empty if none was measured.",
    )
    curvature: list[_Metrics] = Field(
        default_factory=list,
        description="Measured points of the Hessian, in order: `step`, largest eigenvalues and traces; empty if none "
        "was measured.",
    )
    measurement_seconds: Seconds = Field(
        default=0.0,
        description="Time of the measured points of trajectory and curvature; not part of the run's time.",
    )
    flatness: Flatness | None = Field(
        default=None, description="Curvature at the end of the run; None if it was not measured."
    )
    correct: list[bool] | None = Field(
        default=None,
        description=("Per test example, in the same order in every run: whether the answer was correct."),
    )
    scores: list[float] | None = Field(
        default=None,
        description="Per test example, in the same order in every run: its share of the test loss (their mean).",
    )
    forgetting: Forgetting | None = Field(
        default=None, description="Change of the loss on unrelated text; None if it was not measured."
    )
    benchmarks: dict[str, Benchmark] = Field(
        default_factory=dict, description="Tasks of lm-eval, by name; empty if none was evaluated."
    )

    @field_validator("trajectory", "curvature", mode="before")
    @classmethod
    def _last_point_only(cls, points: Any) -> Any:
        # what version 2 kept
        return ([points] if points else []) if isinstance(points, dict) else points


class Published(FrozenModel):
    """Results that a paper publishes for the methods of a comparison."""

    source: str = Field(description="Paper, table and setting.")
    results: dict[str, dict[str, float]] = Field(
        description="As printed, by the table's column and by recipe; the first column is what the runs measure."
    )
    notes: list[str] = Field(default_factory=list, description="Further remarks for the reader.")


class Comparison(FrozenModel):
    """Several recipes on one task, each with its own learning-rate sweep."""

    schema_version: Literal[1, 2, 3] = _SCHEMA_VERSION
    title: str
    command: str = Field(description="The command line that repeats it.")
    metric: str = Field(min_length=1, description='Metric for selection and ranking, for example "accuracy".')
    higher_is_better: bool
    settings: dict[str, Any] = Field(description="Settings shared by all runs.")
    records: list[Record] = Field(default_factory=list)
    missing: list[str] = Field(
        default_factory=list, description="Planned runs that were not run within the time limit."
    )
    created: IsoTime = Field(description="When the comparison was started, ISO 8601.")
    paper: Published | None = Field(
        default=None, description="Published results to be shown; no statistic has them."
    )

    @model_validator(mode="after")
    def _check_records_differ(self) -> "Comparison":
        ids = Counter(record.id for record in self.records)
        runs = Counter(
            (r.recipe, r.learning_rate, r.seed, r.stage, r.settings.get("steps")) for r in self.records
        )
        twice = [str(key) for counts in (ids, runs) for key, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"the same run is recorded more than once: {twice[0]}")
        return self

    @model_validator(mode="after")
    def _check_same_origin(self) -> "Comparison":
        # an older version did not keep them
        for key, name in (("data_fingerprint", "data"), ("model_fingerprint", "model")):
            first = {r.settings[key]: r.id for r in reversed(self.records) if r.settings.get(key)}
            if len(first) > 1:
                one, other, *_ = first.values()
                raise ValueError(
                    f"the {name} changed between its runs, {other} and {one} for example: they cannot "
                    "be averaged; run the comparison again in another folder"
                )
        return self


def load_record(path: str | Path) -> Record:
    """Read one run."""
    return checked_content(Record, _read(Path(path)), path, "Record")


def load_comparison(folder: str | Path) -> Comparison:
    """Read ``comparison.json`` and ``records/*.json`` of a folder.

    A record that ``comparison.json`` holds as well is taken from its own file, which is the newer one.
    """
    output = ComparisonFolder(Path(folder))
    path = output.comparison
    shared = checked_content(Comparison, _read(path), path, "Comparison")
    files = sorted(output.records.glob("*.json"))
    by_id = {record.id: record for record in shared.records}
    loaded: dict[str, Path] = {}
    for file in files:
        record = load_record(file)
        if record.id in loaded:
            raise InputError(f"{file} has the id {record.id!r} of {loaded[record.id]}")
        loaded[record.id] = file
        by_id[record.id] = record
    records = [by_id[key] for key in sorted(by_id)]
    # Rebuilt rather than copied, so that the check for repeated runs sees all of them.
    return checked_content(Comparison, dict(shared) | {"records": records}, path, "Comparison")


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    version = content.get("schema_version")
    if version not in _READ:
        raise InputError(
            f"{path} has schema_version {version!r}; this tangora reads {_READ[0]} to {_READ[-1]}"
        )
    return content
