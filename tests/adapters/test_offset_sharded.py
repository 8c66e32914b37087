"""The state of a sharded layer with an offset is the plain pair of twice the rank, and loads back."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.adapters.models import train
from tests.adapters.test_offset import plain as plain_model
from tests.adapters.test_offset import run, start
from tests.processes import in_processes

RANKS = 2
NAMES = (
    "linear",
    "gpt2",
    "embedding",
    "dora",
    "rank-pattern",
)  # ranks that two processes do not share evenly
FULL = StateDictOptions(full_state_dict=True)


def whole(state):
    return {
        key: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for key, value in state.items()
        if "lora_" in key
    }


def check(name, mesh, folder):
    plain = train(start(plain_model(name)))
    expected, output = whole(plain.state_dict()), run(plain, name)
    sharded = fully_shard(copy.deepcopy(plain), mesh=mesh)
    state = sharded.state_dict()
    kinds = {type(value) for key, value in state.items() if ".lora_A." in key}
    assert kinds == {DTensor}
    full = get_model_state_dict(sharded, options=FULL)
    for key, value in expected.items():
        assert torch.equal(whole(state)[key], value)
        if dist.get_rank() == 0:  # the only one that gets the full state
            assert torch.equal(full[key], value)
    dcp.save({"model": state}, checkpoint_id=folder)
    for read in (lambda _: state, lambda other: from_checkpoint(other, folder)):
        other = fully_shard(train(start(plain_model(name), seed=8), seed=9), mesh=mesh)
        set_model_state_dict(other, read(other))
        found = whole(other.state_dict())
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert torch.allclose(run(other, name), output, rtol=1e-10)


def from_checkpoint(model, folder):
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    return state["model"]


def work(rank, folder):
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in NAMES:
        check(name, mesh, f"{folder}/{name}")


@pytest.mark.slow
def test_a_sharded_state_is_whole_and_loads_back(tmp_path):
    in_processes(work, tmp_path, RANKS, str(tmp_path))
