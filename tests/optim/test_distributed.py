"""Beyond one process: what is right equals one process, and what cannot be is refused with one sentence."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from tangora import InputError, TangentAdam, find_pairs
from tests.models import randomize, transformer, with_lora
from tests.optim.problems import OPTIMIZERS
from tests.tolerances import assert_close

RANKS = 2
STEPS = 4
NAMES = ("tangent", "lora-pro-weight", "lora-pro-factor", "p-lora", "odelora-euler")


def base():
    return transformer("llama", seed=0, tie_word_embeddings=False, use_cache=False).double()


def adapted(model=None, *, head=True):
    torch.manual_seed(1)
    model = with_lora(
        base() if model is None else model,
        r=3,
        target_modules=["q_proj", "v_proj", "down_proj"],
        modules_to_save=["lm_head"] if head else None,
    )
    return randomize(model, scale=0.2, seed=2)


def batches(rank=0, world=1):
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randint(0, 32, (4, 8), generator=generator) for _ in range(STEPS)]
    return [{"input_ids": ids[rank::world], "labels": ids[rank::world]} for ids in whole]


def run(model, optimizer, data):
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def weights(model):
    pairs = {pair.name: pair.delta_weight() for pair in find_pairs(model)}
    return pairs | {
        n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "lora" not in n
    }


def expected(name, *, head=True):
    model = adapted(head=head)
    run(model, OPTIMIZERS[name](model), batches())
    return weights(model)


def refused(call):
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


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
    of_model, of_optimizer = get_state_dict(wrapped, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    return go_on(DistributedDataParallel(adapted()), name, folder, data[half:])


def go_on(model, name, folder, data):
    optimizer = OPTIMIZERS[name](model)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    run(model, optimizer, data)
    return weights(getattr(model, "module", model))


def shard(model):
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def through_accelerate(rank, name):
    """FSDP2 as Accelerate prepares it: it puts shards in the place of the optimizer's parameters."""
    import accelerate
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    original = AcceleratorState.__init__

    def pretend(self, *args, fsdp_plugin=None, **options):  # Accelerate ignores FSDP on CPUs
        original(self, *args, fsdp_plugin=None, **options)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = pretend
    try:
        os.environ["FSDP_VERSION"] = "2"
        accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
        model = adapted()
        model, optimizer = accelerator.prepare(model, OPTIMIZERS[name](model))
        return refused(lambda: run(model, optimizer, batches(rank, RANKS)))
    finally:
        AcceleratorState.__init__ = original
        AcceleratorState._reset_state(reset_partial_state=True)


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=(Path(folder) / "port").read_text())
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found = {}
    try:
        for name in NAMES:
            for before in (False, True):
                found["ddp", name, before] = data_parallel(rank, name, before)
            found["checkpoint", name] = checkpointed(rank, name, f"{folder}/{name}")
            found["sharded base", name] = sharded_base(rank, name, f"{folder}/base")
            found["after", name] = refused(lambda name=name: OPTIMIZERS[name](shard(adapted())))
            model = adapted()
            optimizer = OPTIMIZERS[name](model)
            found["before", name] = refused(
                lambda model=model, optimizer=optimizer: run(shard(model), optimizer, batches(rank, RANKS))
            )
        trainable = [p for p in adapted().parameters() if p.requires_grad]
        found["zero"] = refused(lambda: ZeroRedundancyOptimizer(trainable, TangentAdam, lr=1e-3))
        found["accelerate"] = through_accelerate(rank, "tangent")
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert_close(one[name], other[name], 1e-9)


@pytest.mark.slow
def test_two_processes_equal_one_or_say_why_not(tmp_path):
    base().save_pretrained(tmp_path / "base")
    (tmp_path / "port").write_text(free_port())
    mp.spawn(work, args=(str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    for name in NAMES:
        alone, without_head = expected(name), expected(name, head=False)
        for found in ranks:
            for before in (False, True):
                assert_equal(found["ddp", name, before], alone)
            assert_equal(found["checkpoint", name], alone)
            assert_equal(found["sharded base", name], without_head)
            assert "sharded" in found["after", name]
            assert "fsdp_size" in found["after", name]
            assert "fully_shard" in found["before", name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a checkpoint read without a process group
            one_process = go_on(adapted(), name, f"{tmp_path}/{name}", batches()[STEPS // 2 :])
        assert_equal(one_process, alone)
    for found in ranks:
        assert "pairs" in found["zero"]
        assert "sharded" in found["accelerate"]
