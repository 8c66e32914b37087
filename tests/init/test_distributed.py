"""Two processes that read half the batches each get the start that one process gets from all of them."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tangora import InputError, find_pairs
from tangora.init import initialize
from tangora.probes import GradientProbe, Request, gradient_norms, mean_loss, probed_layers
from tests.probes.models import adapted, batches_of
from tests.processes import in_processes
from tests.tolerances import assert_close

RANKS = 2
BATCHES = 5  # of different sizes, so that the ranks' shares are not equal
CASES = ((False, "lora-ga"), (True, "lora-ga"), (False, "lora-one"), (True, "one-step"))


def made():
    return adapted("bert", target_modules=["query", "dense", "word_embeddings"])


def started(model, method, batches, held_out):
    options = {"held_out": held_out} if method == "one-step" else {}
    done = initialize(model, method, batches, power_iterations=2, progress=False, **options)
    inner = getattr(model, "module", model)
    return {pair.name: pair.factors() for pair in find_pairs(inner)} | {"step": done.step}


def work(rank):
    """What each process does: its own share of the batches, wrapped and not."""
    batches, held_out = batches_of("bert", BATCHES), batches_of("bert", 4)[::-1]
    found = {}
    for wrapped, method in CASES:
        model = made()
        model = DistributedDataParallel(model, broadcast_buffers=False) if wrapped else model
        found[wrapped, method] = started(model, method, batches[rank::RANKS], held_out[rank::RANKS])
    model = made()
    found["loss"] = mean_loss(model, batches[rank::RANKS])
    found["norms"] = gradient_norms(model, batches[rank::RANKS], progress=False)
    if rank == 0:  # a rank without a batch takes part, too
        found["empty"] = read_one(model, batches)
    else:
        found["empty"] = read_one(model, [])
    for name, read in (("probe", read_one), ("loss", mean_loss)):
        with pytest.raises(InputError) as caught:
            read(model, batches if rank == 0 else [{"input_ids": batches[0]["input_ids"]}])
        found["failure", name] = str(caught.value)
    return found


def read_one(model, batches):
    layer = probed_layers(model)[0]
    with GradientProbe(model, [layer]) as probe:
        return probe.read(batches, {layer.name: Request(dense=True)})[layer.name].dense, probe.loss


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    found = in_processes(work, tmp_path, RANKS)
    batches, held_out = batches_of("bert", BATCHES), batches_of("bert", 4)[::-1]
    for case in CASES:
        expected = started(made(), case[1], batches, held_out)
        step = expected.pop("step")
        for one in found:
            assert one[case].pop("step") == step
            assert one[case].keys() == expected.keys()
            for name, (A, B) in expected.items():
                assert_close(one[case][name][0], A, 1e-6)
                assert_close(one[case][name][1], B, 1e-6)
        for name in expected:  # to the last bit, since data-parallel training never compares them
            for one, other in zip(*(rank[case][name] for rank in found), strict=True):
                assert torch.equal(one, other)
    loss, norms = mean_loss(made(), batches), gradient_norms(made(), batches, progress=False)
    dense, dense_loss = read_one(made(), batches)
    for one in found:
        assert one["loss"] == pytest.approx(loss, rel=1e-10)
        assert one["norms"] == pytest.approx(norms, rel=1e-10)
        assert_close(one["empty"][0], dense)
        assert one["empty"][1] == pytest.approx(dense_loss, rel=1e-10)
    for name in ("probe", "loss"):  # nobody waits for a rank that failed
        assert [one["failure", name][:12] for one in found] == ["another rank", "the model re"]
    own_share = started(made(), "lora-one", batches[::RANKS], held_out)
    name = next(iter(norms))
    whole = found[0][False, "lora-one"][name]
    assert (own_share[name][1] @ own_share[name][0] - whole[1] @ whole[0]).norm() > 1e-3 * whole[1].norm()
