"""`tangora export`: a trained run as the adapter or the model that someone else needs."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tangora._checks import check_path
from tangora.adapters import load_adapter, save_adapter, save_merged
from tangora.experiments.launcher import check_one_process
from tangora.experiments.run.loading import load_base, load_run_task
from tangora.experiments.run.proof import model_card_facts
from tangora.experiments.settings import adapter_settings


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The folder.
        merged: Whether it holds a whole model; an adapter otherwise.
        relative_error: Share of the update lost by cutting its rank, in Frobenius norm; 0 for an exact export.
    """

    path: Path
    merged: bool
    relative_error: float = 0.0


def export(run: str | Path, output: str | Path, *, rank: int | None = None, merge: bool = False) -> Exported:
    """Write the adapter of a finished run once more: at another rank, or merged into its base.

    Args:
        run: Output folder of ``tangora train``, or one of the ``runs`` of ``tangora compare``.
        output: Folder to write.
        rank: Cut every layer's update to this rank; default exact.
        merge: Write the whole model, with tokenizer, instead of an adapter.

    Returns:
        The folder and what was lost.

    Raises:
        InputError: If the folder is no finished run with an adapter, ``output`` is in use by something else, or a
            launcher has started several processes.
    """
    check_one_process("export")
    folder, output = check_path("run", run), check_path("output", output)
    settings = adapter_settings(folder)
    task = load_run_task(settings)
    loaded = load_base(settings, task)
    model = load_adapter(loaded.model, folder / "adapter")
    facts = model_card_facts(task, settings)
    if not merge:
        saved = save_adapter(model, output, rank=rank, card=facts)
        return Exported(Path(output), False, saved.relative_error)
    error = 0.0
    if rank is not None:
        with tempfile.TemporaryDirectory() as scratch:
            error = save_adapter(model, Path(scratch) / "adapter", rank=rank).relative_error
            model = load_adapter(load_base(settings, task).model, Path(scratch) / "adapter")
    path = save_merged(model, output)
    loaded.tokenizer.save_pretrained(path)
    return Exported(path, True, error)
