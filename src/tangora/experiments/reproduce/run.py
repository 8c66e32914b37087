"""`tangora reproduce`: run an experiment of a paper by name and write what it found."""

import time
from dataclasses import dataclass
from pathlib import Path

from tangora.experiments.folders import claimed
from tangora.experiments.launcher import check_one_process
from tangora.experiments.provenance import provenance
from tangora.experiments.reproduce.experiment import Experiment, Progress
from tangora.experiments.values import Settings
from tangora.report.reproduction import (
    ReproductionRecord,
    save_pictures,
    save_reproduction,
    write_reproduction,
)

RECORD, PAGE = "reproduction.json", "reproduction.html"


@dataclass(frozen=True)
class ReproductionFiles:
    """What an experiment leaves in its output folder."""

    record: ReproductionRecord
    record_path: Path
    page: Path
    pictures: tuple[Path, ...]


def reproduce(
    wanted: Experiment,
    settings: Settings,
    output: str | Path,
    *,
    quick: bool = False,
    command: str = "",
    progress: Progress = lambda _done, _total: None,
) -> ReproductionFiles:
    """Run an experiment and write what it found.

    The output folder holds ``settings.json``, ``reproduction.json`` (everything), ``reproduction.html`` and one PNG for
    each figure. Called again it writes them anew.

    Args:
        wanted: The experiment, for example ``EXPERIMENTS["toy"]``.
        settings: Of its class.
        output: Output folder.
        quick: Whether the small size was asked for, for the record.
        command: The command line, for the record.
        progress: Hears of parts done, and their total.

    Returns:
        The record, and where the files are.

    Raises:
        InputError: If something in the settings cannot be used, the folder belongs to another configuration, or a
            launcher has started several processes.
    """
    check_one_process("reproduce")
    folder = Path(output)
    with claimed(folder, settings):
        start = time.perf_counter()
        result = wanted.parts.run(settings, progress)
        record = ReproductionRecord(
            name=wanted.name,
            title=wanted.title,
            source=wanted.source,
            stand_ins=wanted.parts.stand_ins,
            quick=quick,
            command=command,
            settings=settings.model_dump(mode="json"),
            result=result,
            seconds=time.perf_counter() - start,
            **provenance(),
        )
        return ReproductionFiles(
            record,
            save_reproduction(record, folder / RECORD),
            write_reproduction(record, folder / PAGE),
            tuple(save_pictures(result.figures, folder)),
        )
