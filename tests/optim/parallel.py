"""One small model with adapters in one process or several, cut in every way, and what training makes of it."""

import functools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from tangora import InputError, find_pairs
from tests.models import randomize, transformer, with_lora
from tests.optim.problems import OPTIMIZERS
from tests.tolerances import assert_close

STEPS = 4


def base():
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 2}
    return transformer("llama", seed=0, tie_word_embeddings=False, use_cache=False, **sizes).double()


def adapted(model=None, *, r=3, head=True, targets=("q_proj", "v_proj", "down_proj")):
    torch.manual_seed(1)
    model = with_lora(
        base() if model is None else model,
        r=r,
        target_modules=list(targets),
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


def whole(tensor):
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def weights(model):
    """What the adapters add, and what is trained beside them; whole on every process."""
    pairs = {pair.name: pair.scaling * whole(pair.B) @ whole(pair.A) for pair in find_pairs(model)}
    return pairs | {n: whole(p) for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}


@functools.cache
def expected(name, **how):
    model = adapted(**how)
    run(model, OPTIMIZERS[name](model), batches())
    return weights(model)


def refused(call):
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def checkpoint(model, optimizer, folder):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def go_on(model, name, folder, data, optimizers=OPTIMIZERS):
    optimizer = optimizers[name](model)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    run(model, optimizer, data)
    return weights(getattr(model, "module", model))


def shard(model, mesh=None):
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def assert_equal(one, other, tolerance=1e-9):
    assert one.keys() == other.keys()
    for name in one:
        assert_close(one[name], other[name], tolerance)
