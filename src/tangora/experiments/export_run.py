"""`tangora export`: a trained run as the adapter or the model that someone else needs."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tangora._checks import check_path
from tangora._folders import RunFolder
from tangora.adapters import load_adapter, save_adapter, save_merged
from tangora.experiments.folders import check_origin, kept_origin, new_folder
from tangora.experiments.process import check_one_process
from tangora.experiments.provenance import origin_of
from tangora.experiments.run.preparing import load_run_base
from tangora.experiments.run.saving import model_card_facts
from tangora.experiments.settings_files import adapter_settings
from tangora.report import load_record


@dataclass(frozen=True)
class Exported:
    """An exported folder: whether it holds a whole model, and the share of the update lost, in Frobenius norm."""

    path: Path
    merged: bool
    relative_error: float = 0.0


def export(
    run: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    merge: bool = False,
    uniform: bool = False,
) -> Exported:
    """Write the adapter of a finished run once more: at another rank, or merged into its base.

    The training data is not needed: names of classes and the tokenizer stand beside the run's adapter.

    Args:
        run: Output folder of ``tangora train``, or one of the ``runs`` of ``tangora compare``.
        rank: Cut every layer's update to this rank; default exact.
        merge: Write the whole model, with tokenizer, instead of an adapter.
        uniform: Write one rank and one alpha for all layers, as `save_adapter` does.

    Returns:
        The folder and what was lost.

    Raises:
        InputError: If the folder is not a finished run with an adapter, ``output`` exists and is not empty or cannot be
            written, or a launcher has started several processes.
    """
    check_one_process("export")
    folder, target = check_path("run", run), check_path("output", output)
    with new_folder(target):
        return _exported(folder, target, rank, merge, uniform)


def _exported(folder: Path, output: Path, rank: int | None, merge: bool, uniform: bool) -> Exported:
    settings = adapter_settings(folder)
    if merge:  # into the weights as they were before they were quantized
        settings = settings.model_copy(update={"load_in_4bit": False})
    check_origin(folder, kept_origin(folder), origin_of(settings), "bring the original back")
    run = RunFolder(folder)
    loaded = load_run_base(settings, run.adapter)
    model = load_adapter(loaded.model, run.adapter)
    if not merge:
        facts = model_card_facts(settings, *_data_facts(run))
        saved = save_adapter(
            model, output, rank=rank, uniform=uniform, card=facts, tokenizer=loaded.tokenizer
        )
        return Exported(output, False, saved.relative_error)
    error = 0.0
    if rank is not None:
        with tempfile.TemporaryDirectory() as scratch:
            cut = Path(scratch) / "adapter"
            error = save_adapter(model, cut, rank=rank).relative_error
            model = load_adapter(load_run_base(settings, run.adapter).model, cut)
    path = save_merged(model, output)
    loaded.tokenizer.save_pretrained(path)
    return Exported(path, True, error)


def _data_facts(run: RunFolder) -> tuple[str, str]:
    # fingerprint and format of the data, as the record of the run has them
    path = run.record if run.record.is_file() else run.trial_record
    settings = load_record(path).settings if path.is_file() else {}
    return str(settings.get("data_fingerprint", "unknown")), str(settings.get("data_format", "unknown"))
