"""Every optimizer trains every kind of model that people adapt."""

import math

import pytest
import torch

from tangora import find_pairs
from tests.cases import combinations
from tests.optim.problems import OPTIMIZERS
from tests.optim.zoo import ZOO

# From B = 0 the second step of the paper's LoRA-Pro changes A by many times its norm, whatever lr (it warns of that):
# the loss may jump once, and falls from there.
FALLS_FROM = {"lora-pro-weight": 2}
pytestmark = pytest.mark.filterwarnings("ignore:step .* changes A of")


# one optimizer on every specimen, and every optimizer on one
@pytest.mark.parametrize(
    ("make", "name"),
    combinations(
        ZOO,
        OPTIMIZERS,
        quick=lambda make, name: name == "tangent" or make.__name__ == "convolutions",
    ),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_trains(make, name):
    if (make.__name__, name) == ("clip_vision", "lora-rite"):
        pytest.skip(
            "two gradients of rank one leave B of rank two, and LoRA-RITE divides by its other two directions"
        )
    torch.manual_seed(0)
    model, loss_of = make()
    model.eval()  # no dropout: the loss of one batch is compared
    pairs = find_pairs(model)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = OPTIMIZERS[name](model, lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    losses.append(loss_of().item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[FALLS_FROM.get(name, 0)]
    assert pairs
    factors = {id(factor) for pair in pairs for factor in pair.parameters}
    for key, parameter in model.named_parameters():
        assert parameter.dtype == before[key].dtype, key
        if id(parameter) in factors:
            assert not torch.equal(parameter, before[key]), key
            assert parameter.isfinite().all(), key
        elif not parameter.requires_grad:
            assert torch.equal(parameter, before[key]), key


def test_the_specimens_are_what_they_are_called():
    torch.manual_seed(0)
    specimens = {make.__name__: make().model for make in ZOO}
    pairs = {name: find_pairs(model) for name, model in specimens.items()}
    assert {name for name, found in pairs.items() if any(pair.transposed for pair in found)} == {
        "llama_embedding",
        "gpt2",
    }
    base = {name: found[0].layer.get_base_layer().weight.dtype for name, found in pairs.items()}
    assert base["llama_bf16"] == torch.bfloat16
    assert base["llama_nf4"] == torch.uint8
    assert all(pair.A.dtype == pair.B.dtype == torch.float32 for found in pairs.values() for pair in found)
    assert pairs["convolutions"][0].A.dim() == 4
    assert any("magnitude" in name for name, _ in specimens["llama_dora"].named_parameters())
