"""What the tests of a Trainer share: arguments, a small classifier with its data, and two processes."""

import os
import socket
import warnings

import torch
import torch.multiprocessing as mp
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


def in_two_processes(work, folder):
    """Run ``work(rank, folder)`` under torch.distributed; return its result of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, args=(work, str(folder), port), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _process(rank, work, folder, port):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **address)
    torch.save(work(rank, folder), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
