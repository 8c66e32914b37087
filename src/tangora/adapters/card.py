"""The README.md of a saved adapter: what it is, how to load it, and what is known of how it was made."""

import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import peft
import torch
from huggingface_hub import ModelCardData

# an absolute path anywhere in a text, but not the slashes of a URL or of a fraction
_PATH = re.compile(
    r"(?<![\w.:/~-])(?:/[^\s/,;:'\"|()]+){2,}/?|\b[A-Za-z]:\\[^\s,;'\"|()]+|~(?:/[^\s/,;:'\"|()]+)+"
)


def model_card(
    front: Mapping[str, Any],
    config: Mapping[str, Any],
    rank: str,
    facts: Mapping[str, Any],
    num_labels: int | None = None,
    *,
    images: bool = False,
) -> str:
    """Write the card.

    Args:
        front: Front matter that PEFT wrote: base model, tags, pipeline.
        config: The adapter's config.
        rank: What there is to say about its rank, one sentence.
        facts: What the user knows: recipe, seed, data, learning rate, …; nested mappings are fine. Of absolute paths
            only the last part is shown.
        num_labels: Number of classes of a classifier, whose head must have the saved one's shape.
        images: Whether the model reads images.

    Returns:
        Markdown with a YAML front matter.
    """
    path = str(config.get("base_model_name_or_path") or "")
    base = without_paths(path)
    is_name = base == path  # not a folder of this machine
    # PEFT's tags name the base, whatever it is; that of a base without a name ends in a colon
    tags = {tag for tag in front.get("tags") or [] if not tag.endswith(":") and (is_name or path not in tag)}
    data = dict(front) | {"library_name": "peft", "tags": sorted({*tags, "lora", "tangora"})}
    if base and is_name:
        data["base_model"] = base
    else:
        data.pop("base_model", None)  # PEFT writes an empty one, or a folder of this machine
    sections = [
        f"# LoRA adapter for {base or 'a model without a name'}",
        f"{rank} The base weights were not changed: nothing but PEFT is needed to load it.",
        f"## Use\n\n{_usage(config, path, num_labels, images)}",
        f"## Training\n\n{_table(facts)}" if facts else "",
        f"## Adapter\n\n{_table(_of_adapter(config))}",
        f"## Versions\n\n{_table(_versions())}",
    ]
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def without_paths(text: str) -> str:
    """Shorten absolute paths to their last part, so that no card tells of the machine it was written on.

    Args:
        text: Any text.

    Returns:
        The text without folders.

    Example:
        >>> without_paths("/home/me/data/train.jsonl, see https://example.org/a/b")
        'train.jsonl, see https://example.org/a/b'
    """
    return _PATH.sub(lambda match: _last(match[0]), text)


def _last(path: str) -> str:
    return (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).name


def _usage(config: Mapping[str, Any], path: str, num_labels: int | None, images: bool) -> str:
    # PEFT has no task type of its own for images
    classifier = "ImageClassification" if images else "SequenceClassification"
    kind = {"CAUSAL_LM": "CausalLM", "SEQ_CLS": classifier, "SEQ_2_SEQ_LM": "Seq2SeqLM"}
    loader = (
        f"AutoModelFor{kind[task]}" if (task := str(config.get("task_type") or "")) in kind else "AutoModel"
    )
    source = path if path and path == without_paths(path) else "path or name of the base model"
    classes = f", num_labels={num_labels}" if num_labels and loader.endswith(classifier) else ""
    return (
        f"```python\nfrom peft import PeftModel\nfrom transformers import {loader}\n\n"
        f'base = {loader}.from_pretrained("{source}"{classes})\n'
        'model = PeftModel.from_pretrained(base, "path or name of this adapter")\n```'
    )


def _of_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    shown = {
        "kind": config["peft_type"] if "lora_alpha" not in config else None,
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "rank per layer": config.get("rank_pattern"),
        "alpha per layer": config.get("alpha_pattern"),
        "scaling": None
        if "lora_alpha" not in config
        else ("alpha / sqrt(rank)" if config.get("use_rslora") else "alpha / rank"),
        "DoRA": config.get("use_dora"),
        "target modules": config.get("target_modules"),
        "modules saved whole": config.get("modules_to_save"),
    }
    return {key: value for key, value in shown.items() if value}


def _versions() -> dict[str, str]:
    return {
        "tangora": importlib.metadata.version("tangora"),
        "peft": peft.__version__,
        "torch": torch.__version__,
    }


def _table(facts: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {value} |" for key, value in _rows(facts)]
    return "\n".join(["| | |", "|---|---|", *lines])


def _rows(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{key}: ")
        else:
            yield _cell(f"{prefix}{key}"), _cell(_text(value))


def _text(value: Any) -> str:
    if isinstance(value, PurePath):
        return os.fspath(value) if not value.is_absolute() else value.name
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_text(item) for item in value]
        return ", ".join(sorted(items) if isinstance(value, (set, frozenset)) else items)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(without_paths(text).replace("|", "\\|").split())
