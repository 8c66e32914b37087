"""The names of all files in the folder of a run and of a comparison, in one place."""

from dataclasses import dataclass
from pathlib import Path


class _In:
    """A file or folder in another folder."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, folder: "OutputFolder", kind: type) -> Path:
        return folder.path / self._name


@dataclass(frozen=True)
class OutputFolder:
    """Files of a command's output folder."""

    path: Path

    settings = _In("settings.json")  # and fingerprints of what the results are made from
    log = _In("log.txt")
    checkpoints = _In("checkpoints")  # of the Trainer, until the record is written
    lock = _In(".lock")
    cluster = _In("cluster")  # of a comparison while other machines work at it
    adapter = _In("adapter")  # of a comparison that of the recommended recipe


@dataclass(frozen=True)
class RunFolder(OutputFolder):
    """The files of one run."""

    record = _In("record.json")  # beside which nothing is trained again
    metrics = _In("metrics.jsonl")  # a line for every step
    evaluations = _In("evaluations.jsonl")  # during training
    trajectory = _In("trajectory.jsonl")
    curvature = _In("curvature.jsonl")
    snapshots = _In("snapshots")  # weights of full fine-tuning at the measured points
    model = _In("model")  # where all weights are trained
    answers = _In("answers.jsonl")  # to the prompts of its settings
    benchmarks = _In("benchmarks")  # programs that were generated for them
    logits = _In("logits.pt")  # of the trained model, on a few test examples

    @property
    def trial_record(self) -> Path:
        """Its record where it belongs to a comparison."""
        return ComparisonFolder(self.path.parent.parent).record_of(self.path.name)


@dataclass(frozen=True)
class ComparisonFolder(OutputFolder):
    """The files of a comparison, or of a plan with a comparison in every subfolder."""

    comparison = _In("comparison.json")  # all but the records
    records = _In("records")
    report = _In("report.html")
    picture = _In("picture.png")
    summary = _In("summary.csv")
    benchmarks = _In("benchmarks.csv")
    measured = _In("through-training.csv")  # what was measured on the way of the runs behind the results
    measured_picture = _In("through-training.png")

    @property
    def tasks(self) -> list["ComparisonFolder"]:
        """The comparisons in its subfolders."""
        return [ComparisonFolder(file.parent) for file in sorted(self.path.glob("*/comparison.json"))]

    def record_of(self, name: str) -> Path:
        """Return where the record of a run is."""
        return self.records / f"{name}.json"

    def run(self, name: str) -> RunFolder:
        """Return the folder of a run."""
        return RunFolder(self.path / "runs" / name)

    def lock_of(self, name: str) -> Path:
        """Return what keeps two processes from making the same run."""
        return self.path / "runs" / f"{name}.lock"

    def printed_by(self, name: str) -> Path:
        """Return where the output of a run's process is."""
        return self.path / "runs" / f"{name}.txt"
