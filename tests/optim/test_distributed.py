"""Beyond one process: what is right equals one process, and what cannot be is refused with one sentence."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from tangora import TangentAdam
from tests.optim.parallel import (
    STEPS,
    adapted,
    assert_equal,
    base,
    batches,
    checkpoint,
    expected,
    go_on,
    refused,
    run,
    shard,
    weights,
)
from tests.optim.problems import OPTIMIZERS
from tests.processes import in_processes

RANKS = 2
NAMES = ("tangent", "lora-pro-weight", "lora-pro-factor", "p-lora", "odelora-euler")


def data_parallel(rank, name, built_before):
    model = adapted()
    optimizer = OPTIMIZERS[name](model) if built_before else None
    wrapped = DistributedDataParallel(model)
    run(wrapped, optimizer or OPTIMIZERS[name](wrapped), batches(rank, RANKS))
    return weights(model)


def sharded_base(rank, name, folder):
    """The base sharded by transformers at loading, the adapters whole on every rank."""
    from transformers.distributed.configuration_utils import DistributedConfig

    config = DistributedConfig(fsdp_size=RANKS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=config)
    model = adapted(model, head=False)

    def average(parameter):  # as transformers.Trainer does; gloo has no average of its own
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(RANKS)

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)
    run(model, OPTIMIZERS[name](model), batches(rank, RANKS))
    return weights(model)


def checkpointed(rank, name, folder):
    """Save after half of the steps, load into a fresh model and optimizer, and go on."""
    data, half = batches(rank, RANKS), STEPS // 2
    model = adapted()
    wrapped = DistributedDataParallel(model)
    optimizer = OPTIMIZERS[name](wrapped)
    run(wrapped, optimizer, data[:half])
    checkpoint(wrapped, optimizer, folder)
    return go_on(DistributedDataParallel(adapted()), name, folder, data[half:])


def work(rank, folder):
    found = {}
    for name in NAMES:
        for before in (False, True):
            found["ddp", name, before] = data_parallel(rank, name, before)
        found["checkpoint", name] = checkpointed(rank, name, f"{folder}/{name}")
        found["sharded base", name] = sharded_base(rank, name, f"{folder}/base")
        model = adapted()
        optimizer = OPTIMIZERS[name](model)
        found["before", name] = refused(
            lambda model=model, optimizer=optimizer: run(shard(model), optimizer, batches(rank, RANKS))
        )
    trainable = [p for p in adapted().parameters() if p.requires_grad]
    found["zero"] = refused(lambda: ZeroRedundancyOptimizer(trainable, TangentAdam, lr=1e-3))
    return found


@pytest.mark.slow
def test_two_processes_equal_one_or_say_why_not(tmp_path):
    base().save_pretrained(tmp_path / "base")
    ranks = in_processes(work, tmp_path, RANKS, str(tmp_path))
    for name in NAMES:
        alone, without_head = expected(name), expected(name, head=False)
        for found in ranks:
            for before in (False, True):
                assert_equal(found["ddp", name, before], alone)
            assert_equal(found["checkpoint", name], alone)
            assert_equal(found["sharded base", name], without_head)
            assert "fully_shard" in found["before", name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a checkpoint read without a process group
            one_process = go_on(adapted(), name, f"{tmp_path}/{name}", batches()[STEPS // 2 :])
        assert_equal(one_process, alone)
    for found in ranks:
        assert "pairs" in found["zero"]
