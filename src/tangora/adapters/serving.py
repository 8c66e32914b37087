"""What stands beside an adapter so that its folder serves it: the base model's config and the tokenizer."""

import json
import re
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from tangora.adapters.wrapped import unwrapped

MODEL_CONFIG = "base_config"
"""Folder of the model's config: beside the adapter's own files transformers would take it for that of a whole model."""

# what tokenizers and image processors write, beside the files that they name themselves
_TOKENIZER_FILES = re.compile(
    r"tokenizer.*|(special_tokens_map|added_tokens|vocab|preprocessor_config|processor_config)\.json"
    r"|chat_template\.jinja|additional_chat_templates|vocab\.txt|merges\.txt"
)


def is_served_by(name: str, *, classifier: bool, tokenizer: Any) -> bool:
    """Tell whether a name is one of those that are written beside a classifier's adapter, or with a tokenizer."""
    if name == MODEL_CONFIG:
        return classifier
    own = getattr(tokenizer, "vocab_files_names", {}).values()
    return tokenizer is not None and (name in own or _TOKENIZER_FILES.fullmatch(name) is not None)


def classes_of(model: PeftModel) -> dict[int, str] | None:
    """Return the names of a classifier's classes by number; ``None`` for other models."""
    # every transformers config has id2label, but only classifiers mean it
    base = unwrapped(model.get_base_model())
    config = getattr(base, "config", None)
    if not isinstance(base, PreTrainedModel) or not re.search("ForSequence|ForImage", type(base).__name__):
        return None
    return dict(getattr(config, "id2label", None) or {}) or None


def write_config(model: PeftModel, folder: Path) -> None:
    """Write the config of an adapter's base model, with the names of its classes."""
    config: Any = unwrapped(model.get_base_model()).config
    values = json.loads(config.to_json_string())
    values.pop("_name_or_path", None)  # a folder of this machine, perhaps
    (folder / MODEL_CONFIG).mkdir()
    path = folder / MODEL_CONFIG / "config.json"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer or image processor, with the sides that it pads and truncates on."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if path.is_file():  # transformers keeps only the sides that were given when the tokenizer was made
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {key: getattr(tokenizer, key) for key in ("padding_side", "truncation_side")}
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
