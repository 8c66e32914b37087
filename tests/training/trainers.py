"""What the tests of a Trainer share: arguments, and a small classifier with its data."""

import torch
import transformers
from peft import LoraConfig, get_peft_model

from tangora.training.data import collator, encode
from tests.models import tiny_bert, tiny_tokenizer
from tests.training.tiny import labelled_examples

RATE = 1e-3
COLLATE = collator(tiny_tokenizer(), "classification")


def encoded(count):
    return encode(labelled_examples(count), tiny_tokenizer(), kind="classification", max_length=16)


def with_lora(base=None, **config):
    options = {"r": 2, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    return get_peft_model(base or tiny_bert(), LoraConfig(**options | config))


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    return transformers.TrainingArguments(**settings | changes)


def parts(folder, **changes):
    """Return options of a Trainer that trains an adapter."""
    data = {"train_dataset": encoded(32), "data_collator": COLLATE}
    return {"model": with_lora(), "args": arguments(folder, **changes), **data}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
