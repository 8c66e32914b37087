"""``shard_state``: each process keeps and steps a part, and all together are one process, at a share of the traffic."""

from collections import Counter
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.nn.parallel import DistributedDataParallel

from tangora import InputError, ODELoRA, TangentMuon, find_pairs
from tangora.optim import layerwise
from tangora.optim.exchange import Owners, Sharing
from tangora.optim.sharded_stack import ShardedStack
from tests.optim.parallel import (
    STEPS,
    adapted,
    assert_equal,
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
from tests.processes import in_processes, joined

WORLD = 2
NAMES = ("tangent", "tangent-muon", "lora-pro-weight", "lora-pro-factor", "polora", "lora-rite", "p-lora")
WAYS = {"replicated": DistributedDataParallel, "cut": shard}
CASES = [*((name, 3) for name in NAMES), ("tangent-muon", 1), ("tangent", 4)]


class Traffic:
    """Numbers that this process receives by the optimizer's messages."""

    def __init__(self, patch):
        self.received = Counter()
        for name in ("all_gather_into_tensor", "all_to_all_single", "all_reduce"):
            patch.setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name, function):
        def call(out, *args, **options):
            self.received[name] += out.numel()
            return function(out, *args, **options)

        return call


def together(rank, folder):
    found = {}
    for way, wrap in WAYS.items():
        for name, r in CASES:
            model = wrap(adapted(r=r))
            run(model, OPTIMIZERS[name](model, shard_state=True), batches(rank, WORLD))
            found[way, name, r] = weights(getattr(model, "module", model))
        with pytest.MonkeyPatch.context() as patch:  # as on a GPU
            patch.setattr(layerwise, "_waiting_costs", lambda device: True)
            patch.setattr(layerwise, "_FIRST_GUESS", 1)
            model = wrap(adapted())
            run(model, OPTIMIZERS["tangent-muon"](model, shard_state=True), batches(rank, WORLD))
            found[way, "tangent-muon", "guessed"] = weights(getattr(model, "module", model))
        found["numbers", way] = numbers(wrap(adapted()), rank)
        for name in ("tangent-muon", "lora-pro-weight"):
            model = wrap(adapted())
            optimizer = OPTIMIZERS[name](model, shard_state=True)
            run(model, optimizer, batches(rank, WORLD)[: STEPS // 2])
            checkpoint(model, optimizer, f"{folder}/{way}-{name}")
            again = wrap(adapted())
            made = {name: lambda model, name=name: OPTIMIZERS[name](model, shard_state=True)}
            found[way, name, "again"] = go_on(
                again, name, f"{folder}/{way}-{name}", batches(rank, WORLD)[STEPS // 2 :], made
            )
    found["saved"] = saved(rank, folder)
    return found


def saved(rank, folder):
    """Save as one process does, halfway, whole and as a part only; return what is said of the latter."""
    model = DistributedDataParallel(adapted())
    optimizer = OPTIMIZERS["tangent"](model, shard_state=True)
    run(model, optimizer, batches(rank, WORLD)[: STEPS // 2])
    with optimizer.saved_whole():
        full = optimizer.state_dict()
    if rank == 0:
        torch.save({"model": model.module.state_dict(), "optimizer": full}, f"{folder}/full.pt")
        torch.save(optimizer.state_dict(), f"{folder}/part.pt")
    dist.barrier()
    optimizer.load_state_dict(full)
    part = torch.load(f"{folder}/part.pt", weights_only=False)
    return refused(lambda: optimizer.load_state_dict(part)) if rank else optimizer.load_state_dict(part)


def numbers(model, rank):
    """How many numbers of states this process holds, how many there are, and what a step receives."""
    optimizer = TangentMuon(model, shard_state=True)
    model(**batches(rank, WORLD)[0]).loss.backward()
    with pytest.MonkeyPatch.context() as patch:
        traffic = Traffic(patch)
        optimizer.step()
    states = [optimizer.state[f]["momentum_buffer"] for pair in find_pairs(model) for f in (pair.A, pair.B)]
    assert all(isinstance(state, DTensor) for state in states)
    held = sum(state.to_local().numel() for state in states)
    return held, sum(state.numel() for state in states), dict(traffic.received)


def padded():
    """Numbers of all factors, whose rows are cut into parts of equal size."""
    factors = [f for pair in find_pairs(adapted()) for f in (pair.A, pair.B)]
    return sum(WORLD * -(-len(f) // WORLD) * f.shape[1] for f in factors)


@pytest.mark.slow
def test_all_together_are_one_process(tmp_path):
    first, second = in_processes(together, tmp_path, WORLD, str(tmp_path))
    for found in (first, second):
        for way in WAYS:
            for name, r in CASES:
                assert_equal(found[way, name, r], expected(name, r=r), 1e-11)
            for name, what in (
                ("tangent-muon", "guessed"),
                ("tangent-muon", "again"),
                ("lora-pro-weight", "again"),
            ):
                assert_equal(found[way, name, what], expected(name), 1e-11)
    for way in WAYS:
        (held, total, traffic), (others, _, also) = first["numbers", way], second["numbers", way]
        assert held + others == total
        assert 0.4 * total < held < 0.6 * total
        everyone = Counter(traffic) + Counter(also)
        # factors, gradients and momenta go to their owners and factors and momenta back; momenta alone if all have the
        # factors, which their owners then send to all
        assert everyone["all_to_all_single"] == (5 if way == "cut" else 2) * padded()
    assert "part" in second["saved"]
    (tmp_path / "one").mkdir()
    with joined(0, 1, tmp_path / "one"):  # by the first process of another number
        part = torch.load(tmp_path / "part.pt", weights_only=False)
        assert "part" in refused(lambda: OPTIMIZERS["tangent"](adapted()).load_state_dict(part))
    model = adapted()
    optimizer = OPTIMIZERS["tangent"](model)
    files = torch.load(tmp_path / "full.pt", weights_only=False)
    model.load_state_dict(files["model"])
    optimizer.load_state_dict(files["optimizer"])
    run(model, optimizer, batches()[STEPS // 2 :])
    assert_equal(weights(model), expected("tangent"), 1e-11)


def test_a_process_knows_which_layers_it_steps():
    pairs = find_pairs(adapted())[:2]
    mesh = Mock(spec=DeviceMesh)
    mesh.size.return_value, mesh.get_local_rank.return_value = 2, 1
    owners, sharing = Owners([0, 1], mesh, 0), Sharing(shard_state=True)
    assert ShardedStack(pairs, lambda _: {}, owners, sharing).own_pairs == pairs[1:]


def test_an_optimizer_without_states_has_none_to_share():
    with pytest.raises(InputError, match="shard_state"):
        ODELoRA(adapted(), lr=0.1, shard_state=True)
