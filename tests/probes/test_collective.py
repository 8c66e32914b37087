"""A reading that some rank does not take part in stops with its cause; sharded weights are refused by name."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tangora
from tangora import InputError
from tangora.curvature import Hessian
from tangora.probes import gradient_norms, mean_loss
from tests.probes.models import adapted, batches_of
from tests.processes import in_processes, joined

RANKS = 2


def absent(model, batches):
    hessian = Hessian(model, batches)
    return {
        "initialize": lambda: tangora.initialize(model, "lora-ga", batches, progress=False),
        "diagnose": lambda: tangora.diagnose(model, batches, progress=False),
        "gradient_norms": lambda: gradient_norms(model, batches, progress=False),
        "mean_loss": lambda: mean_loss(model, batches),
        "Hessian": lambda: hessian.matvec(torch.ones(hessian.size, dtype=torch.float64)),
    }


def work(rank):
    """Rank 0 reads alone, then both together."""
    model, batches = adapted("bert"), batches_of("bert", 2)
    if rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tangora.probes.collective._WARN_AFTER", 0.1)
            for name, read in absent(model, batches).items():
                # a store of files waits whole seconds: one reading waits on after its warning, the others end with it
                patch.setenv("TANGORA_RANK_TIMEOUT", "0.3" if name == "initialize" else "0.1")
                with (
                    pytest.warns(UserWarning, match=f"{name} waits for rank 1"),
                    pytest.raises(InputError, match=f"{name} .*rank 1 .*every rank"),
                ):
                    read()
    dist.barrier()
    found = {name: read() for name, read in absent(model, batches[rank::RANKS]).items()}
    return (found["mean_loss"], found["gradient_norms"], found["Hessian"])


@pytest.mark.slow
def test_a_rank_that_does_not_take_part_is_named(tmp_path):
    one, other = in_processes(work, tmp_path, RANKS)
    assert one[0] == other[0]
    assert one[1] == pytest.approx(other[1], rel=1e-12)
    assert torch.equal(one[2], other[2])


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    with joined(0, 1, tmp_path):
        yield init_device_mesh("cpu", (1,))


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_sharded_weights_are_refused_by_name(alone, name):
    model, batches = adapted(name), batches_of(name, 2)
    fully_shard(model, mesh=alone)
    for read in (
        lambda: tangora.initialize(model, "pissa", progress=False),
        lambda: tangora.initialize(model, "lora-ga", batches, progress=False),
        lambda: tangora.diagnose(model, batches, progress=False),
        lambda: Hessian(model, batches),
    ):
        with pytest.raises(InputError, match=r"base_model\.model\..* is sharded"):
            read()
