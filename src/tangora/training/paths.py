"""Which names of models and data can only be files or folders: a missing one is found before anything is loaded."""

from pathlib import Path

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def is_model_path(name: str) -> bool:
    """Tell whether a model's name can be no hub name and no packaged one.

    Args:
        name: As the user gave it.

    Returns:
        Whether only a file or folder can be meant.
    """
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1


def is_data_path(name: str) -> bool:
    """Tell whether a data set's name can be no hub name and no packaged one.

    Args:
        name: As the user gave it.

    Returns:
        Whether only a file or folder can be meant.
    """
    return name.startswith((".", "/", "~")) or Path(name).suffix.lower() in DATA_SUFFIXES
