"""Files next to a saved adapter: README.md, the config of the base model, the tokenizer."""

import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import peft
import torch
from huggingface_hub import ModelCardData
from jinja2 import Template
from peft import PeftModel
from transformers import PreTrainedModel

from tangora.adapters.peft_models import unwrapped

MODEL_CONFIG = "base_config"
"""Folder of the model's config: beside the adapter's own files transformers would take it for that of a whole model."""

# what tokenizers and image processors write, beside the files that they name themselves
_TOKENIZER_FILES = re.compile(
    r"tokenizer.*|(special_tokens_map|added_tokens|vocab|preprocessor_config|processor_config)\.json"
    r"|chat_template\.jinja|additional_chat_templates|vocab\.txt|merges\.txt"
)

# an absolute path anywhere in a text, but not the slashes of a URL or of a fraction
_PATH = re.compile(
    r"(?<![\w.:/~-])(?:/[^\s/,;:'\"|()]+){2,}/?|\b[A-Za-z]:\\[^\s,;'\"|()]+|~(?:/[^\s/,;:'\"|()]+)+"
)


# code that turns a text into a model's inputs, as in training, by the fact "format"
_INPUTS = {
    "text": 'inputs = tokenizer(["a text"], truncation=True, max_length={length}, padding=True, return_tensors="pt")',
    "pair of texts": 'inputs = tokenizer(["a text"], ["the other text"], truncation=True, max_length={length}, '
    'padding=True, return_tensors="pt")',
    "prompt + newline + completion + eos": 'inputs = tokenizer("a prompt" + "\\n", return_tensors="pt")',
    "plain text": 'inputs = tokenizer("a beginning", return_tensors="pt")',
    "chat template": 'messages = [{{"role": "user", "content": "a prompt"}}]\n'
    "inputs = tokenizer.apply_chat_template(\n"
    '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)',
}
_USAGE = Template(
    """\
```python
{% if classified and inputs %}
import torch
{% endif %}
from peft import PeftModel
from transformers import {% if classified %}AutoConfig, {% endif %}{{ loader }}{% if inputs %}, AutoTokenizer{% endif %}


adapter = "path or name of this adapter"
{% if classified %}
# with the names of the classes
config = AutoConfig.from_pretrained(adapter, subfolder="{{ folder }}")
base = {{ loader }}.from_pretrained(
    "{{ source }}", config=config, ignore_mismatched_sizes=True
)
{% else %}
base = {{ loader }}.from_pretrained("{{ source }}")
{% endif %}
model = PeftModel.from_pretrained(base, adapter).eval()
{% if inputs %}
tokenizer = AutoTokenizer.from_pretrained(adapter)

{{ inputs }}
{% if classified %}
with torch.no_grad():
    numbers = model(**inputs).logits.argmax(-1).tolist()
print([config.id2label[number] for number in numbers])
{% else %}
tokens = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
{% endif %}
{% endif %}
```""",
    trim_blocks=True,
)

# CLIP classifies by the texts of classes, so that the adapter fits the whole model as it is published
_USAGE_OF_CLIP = Template(
    """\
```python
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, PreTrainedConfig


adapter = "path or name of this adapter"
base = CLIPModel.from_pretrained("{{ source }}")
model = PeftModel.from_pretrained(base, adapter).get_base_model().eval()
tokenizer = AutoTokenizer.from_pretrained("{{ source }}")
processor = AutoImageProcessor.from_pretrained(adapter)

# with the names of the classes, as words, and the templates of their prompts
config, _ = PreTrainedConfig.get_config_dict(adapter, subfolder="{{ folder }}")
names, prompts = config["class_words"], config["prompts"]
texts = tokenizer([prompt.format(name) for name in names for prompt in prompts], padding=True, return_tensors="pt")
images = processor(Image.open("an image"), return_tensors="pt")
with torch.no_grad():
    outputs = model(**texts, **images)
embeddings = outputs.text_embeds.view(len(names), len(prompts), -1).mean(1)
embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
print([names[number] for number in (outputs.image_embeds @ embeddings.T).argmax(-1).tolist()])
```""",
    trim_blocks=True,
)


def model_card(
    front: Mapping[str, Any],
    config: Mapping[str, Any],
    rank: str,
    facts: Mapping[str, Any],
    classes: Mapping[int, str] | None = None,
    *,
    images: bool = False,
    prompted: bool = False,
    architecture: str = "",
) -> str:
    """Write the card."""
    path = str(config.get("base_model_name_or_path") or "")
    base = _without_paths(path)
    is_name = base == path  # not a folder of this machine
    # PEFT's tags name the base, whatever it is; that of a base without a name ends in a colon
    tags = {tag for tag in front.get("tags") or [] if not tag.endswith(":") and (is_name or path not in tag)}
    data = dict(front) | {"library_name": "peft", "tags": sorted({*tags, "lora", "tangora"})}
    if base and is_name:
        data["base_model"] = base
    else:
        data.pop("base_model", None)  # PEFT writes an empty one, or a folder of this machine
    told = str(facts.get("base model") or path)
    title = _without_paths(told)
    if title != told:
        title = f"{architecture} ({title})" if architecture else title
    shown = dict(facts) | ({"classes": {str(n): name for n, name in classes.items()}} if classes else {})
    sections = [
        f"# LoRA adapter for {title or 'a model without a name'}",
        f"{rank} The base weights were not changed: only PEFT is needed to load it.",
        f"## Use\n\n{_usage(config, path, facts, bool(classes), images, prompted)}",
        f"## Training\n\n{_table(shown)}" if shown else "",
        f"## Adapter\n\n{_table(_of_adapter(config))}",
        f"## Versions\n\n{_table(_versions())}",
    ]
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _without_paths(text: str) -> str:
    """Shorten absolute paths to their last part, so that a card does not describe the machine that wrote it.

    Examples:
        >>> _without_paths("/home/me/data/train.jsonl, see https://example.org/a/b")
        'train.jsonl, see https://example.org/a/b'
    """
    return _PATH.sub(lambda match: _last(match[0]), text)


def _last(path: str) -> str:
    return (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).name


def _usage(
    config: Mapping[str, Any],
    path: str,
    facts: Mapping[str, Any],
    classified: bool,
    images: bool,
    prompted: bool,
) -> str:
    # PEFT has no task type of its own for images
    classifier = "ImageClassification" if images else "SequenceClassification"
    kind = {"CAUSAL_LM": "CausalLM", "SEQ_CLS": classifier, "SEQ_2_SEQ_LM": "Seq2SeqLM"}
    loader = (
        f"AutoModelFor{kind[task]}" if (task := str(config.get("task_type") or "")) in kind else "AutoModel"
    )
    source = path if path and path == _without_paths(path) else "path or name of the base model"
    if prompted:
        return _USAGE_OF_CLIP.render(source=source, folder=MODEL_CONFIG)
    inputs = None if images else _INPUTS.get(str(facts.get("format")))
    return _USAGE.render(
        classified=classified,
        inputs=inputs and inputs.format(length=facts.get("max length", 128)),
        loader=loader,
        source=source,
        folder=MODEL_CONFIG,
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
    return " ".join(_without_paths(text).replace("|", "\\|").split())


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
