"""Sharded factors (FSDP2, hybrid, tensor parallel): every process keeps its parts, and all together are one process."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tangora import LoRAPro, ODELoRA, find_pairs, initialize, save_adapter
from tangora.adapters.saved_factors import WEIGHTS
from tangora.optim import layerwise
from tests.optim.parallel import (
    STEPS,
    adapted,
    assert_equal,
    base,
    batches,
    checkpoint,
    expected,
    go_on,
    run,
    shard,
    weights,
)
from tests.optim.problems import OPTIMIZERS
from tests.processes import in_processes

SOME = ("lora-pro-weight", "lora-pro-factor", "tangent", "tangent-muon", "polora", "odelora-euler", "p-lora")
CASES = (  # ranks that are cut unevenly, so that a process has nothing, and evenly
    *((name, 3) for name in OPTIMIZERS),
    *((name, 1) for name in SOME),
    *((name, 4) for name in SOME[:3]),
)
PREPARED = ("lora-pro-weight", "tangent", "odelora-euler")
COLUMNS = ("q_proj", "gate_proj")  # B is cut, and A is whole


def trained(model, name, rank, world):
    run(model, OPTIMIZERS[name](model), batches(rank, world))
    return weights(model)


def fully_sharded(rank, folder):
    world = dist.get_world_size()
    found = {(name, r): trained(shard(adapted(r=r)), name, rank, world) for name, r in CASES}
    model = shard(adapted())
    run(model, optimizer := OPTIMIZERS["tangent"](model), batches(rank, world))
    found["numbers"] = {
        key: (value.numel(), value.to_local().numel())
        for pair in find_pairs(model)
        for key, value in optimizer.state[pair.B].items()
        if isinstance(value, DTensor)
    }
    for name in SOME:
        model, half = shard(adapted()), STEPS // 2
        optimizer = OPTIMIZERS[name](model)
        run(model, optimizer, batches(rank, world)[:half])
        checkpoint(model, optimizer, f"{folder}/{name}")
        again = shard(adapted())
        found["again", name] = go_on(again, name, f"{folder}/{name}", batches(rank, world)[half:])
        found["from one", name] = go_on(
            shard(adapted()), name, f"{folder}/one-{name}", batches(rank, world)[half:]
        )
    for name in PREPARED:
        found["accelerate", name] = through_accelerate(rank, name)
    for start in ("lora", "orthogonal"):
        model = initialized(start)
        found["start", start] = trained(shard(model), "tangent", rank, world)
        save_adapter(model, f"{folder}/saved-{start}")
    with pytest.MonkeyPatch.context() as patch:  # as on a GPU
        patch.setattr(layerwise, "_waiting_costs", lambda device: True)
        patch.setattr(layerwise, "_FIRST_GUESS", 1)
        for name in SOME:
            found["guessed", name] = trained(shard(adapted()), name, rank, world)
    found["heun"] = stages(shard(adapted()), rank, world)
    found["not finite"] = not_finite(rank, world)
    found["largest message"] = largest_message(rank, world)
    return found


def initialized(start):
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the adapter holds is erased
        initialize(model, start, progress=False)
    return model


def stages(model, rank, world):
    """A scheme that evaluates the gradient more than once."""
    optimizer = ODELoRA(model, lr=0.1, scheme="heun")
    for batch in batches(rank, world):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        optimizer.step(closure)
    return weights(model)


def not_finite(rank, world):
    """Let one process find what is not finite in its part: all refuse the step, and nothing has changed."""
    model = shard(adapted())
    before, optimizer = weights(model), OPTIMIZERS["tangent"](model)
    model(**batches(rank, world)[0]).loss.backward()
    if rank == 0:
        find_pairs(model)[0].B.grad.to_local()[0, 0] = torch.inf
    with pytest.raises(FloatingPointError) as caught:
        optimizer.step()
    assert_equal(weights(model), before, 0)
    return str(caught.value)


def largest_message(rank, world):
    """How many numbers LoRA-Pro's step receives at once, where its moments have the size of the weight."""
    model = shard(adapted(r=1, targets=("down_proj",), head=False))
    optimizer = LoRAPro(model, lr=1e-2)
    model(**batches(rank, world)[0]).loss.backward()
    sizes, gather, reduce = [], dist.all_gather_into_tensor, dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dist,
            "all_gather_into_tensor",
            lambda out, *a, **k: (sizes.append(out.numel()), gather(out, *a, **k)),
        )
        patch.setattr(dist, "all_reduce", lambda t, *a, **k: (sizes.append(t.numel()), reduce(t, *a, **k)))
        optimizer.step()
    pairs = find_pairs(model)
    m, n, r = pairs[0].shape
    rows = world * -(-r // world)  # of A, padded to equal parts
    return max(sizes), len(pairs) * m * n, len(pairs) * 2 * (m * r + rows * n)


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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", pretend)
        patch.setitem(os.environ, "FSDP_VERSION", "2")
        accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
        model = adapted()
        model, optimizer = accelerator.prepare(model, OPTIMIZERS[name](model))
        run(model, optimizer, batches(rank, dist.get_world_size()))
        AcceleratorState._reset_state(reset_partial_state=True)
    return weights(model)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What two processes found, and the folder that they wrote into."""
    folder = tmp_path_factory.mktemp("sharded")
    for name in SOME:
        model = adapted()
        optimizer = OPTIMIZERS[name](model)
        run(model, optimizer, batches()[: STEPS // 2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a checkpoint written without a process group
            checkpoint(model, optimizer, f"{folder}/one-{name}")
    return folder, in_processes(fully_sharded, folder, 2, str(folder))


@pytest.mark.slow
def test_fully_sharded_equals_one_process(sharded):
    for found in sharded[1]:
        for name, r in CASES:
            assert_equal(found[name, r], expected(name, r=r), 1e-11)
        for name in PREPARED:
            assert_equal(found["accelerate", name], expected(name), 1e-11)
        for name in SOME:
            assert_equal(found["guessed", name], expected(name), 1e-11)
        assert_equal(found["heun"], stages(adapted(), 0, 1), 1e-11)
        for start in ("lora", "orthogonal"):
            assert_equal(found["start", start], trained(initialized(start), "tangent", 0, 1), 1e-11)


@pytest.mark.slow
def test_checkpoints_move_between_numbers_of_processes(sharded):
    folder, ranks = sharded
    for name in SOME:
        for found in ranks:
            assert_equal(found["again", name], expected(name), 1e-11)
            assert_equal(found["from one", name], expected(name), 1e-11)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a checkpoint read without a process group
            one_process = go_on(adapted(), name, f"{folder}/{name}", batches()[STEPS // 2 :])
        assert_equal(one_process, expected(name), 1e-11)


@pytest.mark.slow
def test_sharded_adapters_are_saved_as_one_process_would(sharded):
    folder, _ = sharded
    for start in ("lora", "orthogonal"):
        model = initialized(start)
        run(model, OPTIMIZERS["tangent"](model), batches())
        save_adapter(model, folder / "alone")
        saved, wanted = (load_file(folder / name / WEIGHTS) for name in (f"saved-{start}", "alone"))
        assert_equal(saved, wanted, 1e-8)


@pytest.mark.slow
def test_each_process_keeps_its_part_and_receives_no_more_than_factors(sharded):
    _, (first, second) = sharded
    for found in (first, second):
        largest, weight, factors = found["largest message"]
        assert largest <= factors < weight
    for key, (total, here) in first["numbers"].items():
        assert here + second["numbers"][key][1] == total
    assert first["numbers"].keys() == {"exp_avg", "exp_avg_sq_row"}


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_is_named_in_all(sharded):
    _, (first, second) = sharded
    assert find_pairs(adapted())[0].name in first["not finite"]
    assert "another process" in second["not finite"]


def hybrid(rank):
    """Two copies of two parts each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    cases = [*((name, 3) for name in SOME), ("tangent", 1)]
    return {(name, r): trained(shard(adapted(r=r), mesh), name, rank, 4) for name, r in cases}


@pytest.mark.slow
def test_hybrid_sharding_equals_one_process(tmp_path):
    for found in in_processes(hybrid, tmp_path, 4):
        for (name, r), got in found.items():
            assert_equal(got, expected(name, r=r), 1e-11)


def tensor_parallel(rank, folder):
    from transformers.distributed.configuration_utils import DistributedConfig

    found = {}
    for name in OPTIMIZERS:
        config = DistributedConfig(tp_size=2, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(
            f"{folder}/base", dtype=torch.float64, distributed_config=config
        )
        model = adapted(model, head=False, targets=COLUMNS)
        found[name] = trained(model, name, 0, 1)
    kinds = {type(pair.B.data) for pair in find_pairs(model)}
    assert kinds == {DTensor}
    return found


@pytest.mark.slow
def test_tensor_parallel_columns_equal_one_process(tmp_path):
    base().save_pretrained(tmp_path / "base")
    for found in in_processes(tensor_parallel, tmp_path, 2, str(tmp_path)):
        for name, got in found.items():
            assert_equal(got, expected(name, head=False, targets=COLUMNS), 1e-11)
