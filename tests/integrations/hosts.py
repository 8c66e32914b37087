"""Tiny models and data in the files that other packages read; and stand-ins for those packages."""

import importlib.metadata
import json
import sys
from types import ModuleType

import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.models import WORDS, tiny_llama, tiny_tokenizer

RATE = 1e-2


def sentence(number, length):
    return " ".join(WORDS[(number * 5 + step) % 7] for step in range(length))


def write_base(folder):
    """Write a model and its tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    for each in (tiny_llama(attention_dropout=0.0), tokenizer):
        each.save_pretrained(folder / "base")
    return str(folder / "base")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 12).reshape(2, 4)).logits


def assert_served(trained, base, adapter):
    """Assert that plain PEFT, on the base as it was, computes what was trained, and that something was."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    served = logits(PeftModel.from_pretrained(plain, adapter))
    torch.testing.assert_close(served, logits(trained), rtol=1e-4, atol=1e-4)
    assert (served - before).abs().max() > 1e-2


def stand_in(monkeypatch, **modules):
    """Let modules (with two underscores for a dot) be found with what they hold, and no others of their package."""
    packages = {name.split("__", maxsplit=1)[0] for name in modules}
    for name in [name for name in sys.modules if name.split(".", maxsplit=1)[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    for name, held in modules.items():
        parts = name.split("__")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                made = ModuleType(path)
                made.__path__ = []
                monkeypatch.setitem(sys.modules, path, made)
                if end > 1:
                    setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], made)
        vars(sys.modules[".".join(parts)]).update(held)


def installed(package):
    """Skip a test unless the package itself can be imported."""
    return pytest.importorskip(package, exc_type=ImportError)


def has_trl():
    """Say whether TRL is installed; Axolotl and LLaMA-Factory bring older versions, for themselves alone."""
    try:
        return Version(importlib.metadata.version("trl")) >= Version("1.16")
    except importlib.metadata.PackageNotFoundError:
        return False
