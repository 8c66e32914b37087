"""A model and data small enough to train in a test, on the disk as a user would have them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.models import WORDS, tiny_bert, tiny_llama, tiny_tokenizer


def write_classifier(folder: Path) -> dict:
    """Write a tiny BERT and labelled texts; return the settings that name them."""
    tiny_bert(num_hidden_layers=1, hidden_dropout_prob=0.1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    words = WORDS[:7]
    texts = [f"{a} {b} {c}" for a in words for b in words for c in words]
    rows = [{"text": text, "label": words.index(text.split()[0]) % 3} for text in texts]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(folder / "model"),
        "data": str(folder / "data.jsonl"),
        "num_train": 200,
        "num_validation": 50,
        "num_test": 50,
        "max_length": 16,
        "rank": 2,
        "alpha": 4.0,
    }


def write_generator(folder: Path) -> dict:
    """Write a tiny Llama and sums; return the settings that name them."""
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{a} + {b} =", "completion": str(a + b)} for a in range(12) for b in range(12)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(folder / "model"),
        "data": str(folder / "sums.jsonl"),
        "num_train": 80,
        "num_validation": 20,
        "num_test": 20,
        "max_length": 16,
        "rank": 2,
    }


def after_step(number: int, act: Callable[[], object]) -> Callable[[str, int, int], None]:
    """Return a ``progress`` that acts once so many optimizer steps of a run are done."""

    def progress(what: str, done: int, total: int) -> None:
        if "loss" in what and done == number:
            act()

    return progress


def ctrl_c() -> None:
    raise KeyboardInterrupt


def have_same_weights(one: Path, other: Path, file: str = "adapter/adapter_model.safetensors") -> bool:
    """Tell whether the weights in the folders of two runs are the same, bit by bit."""
    ours, theirs = (load_file(folder / file) for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
