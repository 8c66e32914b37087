"""Rivals of TangentMuon against dense versions from their papers' formulas, and what their papers promise."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

from tangora import InputError, find_pairs, recipe
from tangora.optim import LoRAMuon, LoRARITE, MuonAndAdamW, PoLoRA
from tangora.recipes.baselines import full_muon
from tests.cases import gauge_transform
from tests.optim.problems import Quadratic, backward, problem
from tests.optim.zoo import ZOO
from tests.reference.optimizers import DenseLoRAMuon, DenseLoRARITE, DensePoLoRA
from tests.tolerances import assert_close
from tests.training.tiny import tiny_bert, tiny_llama

SHAPES = [(9, 6, 2), (5, 8, 2), (7, 7, 1)]


def follow(optimizer_class, reference_class, toy, lr, steps=10):
    optimizer = optimizer_class(toy.model, lr=lr)
    reference = reference_class(toy.A.detach(), toy.B.detach(), toy.s, lr)
    for _ in range(steps):
        toy.set_gradients()
        optimizer.step()
        reference.step(toy.gradient(reference.s * reference.B @ reference.A))
        assert_close(toy.A.detach(), reference.A, 1e-7)
        assert_close(toy.B.detach(), reference.B, 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zero_B", [False, True])
@pytest.mark.parametrize("classes", [(LoRAMuon, DenseLoRAMuon), (PoLoRA, DensePoLoRA)], ids=["muon", "po"])
def test_equals_its_dense_version(shape, zero_B, classes):
    follow(*classes, Quadratic(*shape, seed=1, zero_B=zero_B), lr=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora_rite_equals_its_dense_version(shape):
    follow(LoRARITE, DenseLoRARITE, Quadratic(*shape, seed=1), lr=1e-3)


@pytest.mark.parametrize("optimizer_class", [LoRAMuon, LoRARITE])
def test_w_sequence_does_not_depend_on_the_factors(optimizer_class):
    sequences = []
    for condition in (1.0, 10.0):
        toy = Quadratic(9, 6, 2, seed=3)
        toy.A.data, toy.B.data = gauge_transform(toy.A.data, toy.B.data, condition, seed=5)
        optimizer = optimizer_class(toy.model, lr=1e-3)
        for _ in range(5):
            toy.set_gradients()
            optimizer.step()
        sequences.append(toy.W)
    # a step of both factors has a part of second order, which only steps of W would lack
    assert_close(sequences[1], sequences[0], 1e-5)


@pytest.mark.parametrize("optimizer_class", [LoRAMuon, PoLoRA])
@pytest.mark.parametrize("alpha", [1.0, 64.0])
def test_the_rate_bounds_the_spectral_norm_of_a_step(optimizer_class, alpha):
    toy = Quadratic(9, 6, 2, seed=0, alpha=alpha)
    optimizer = optimizer_class(toy.model, lr=1e-4)
    for _ in range(5):
        toy.set_gradients()
        before = toy.W
        optimizer.step()
        assert torch.linalg.matrix_norm(toy.W - before, 2) < 1.001e-4


def test_lora_muon_decays_the_product_once():
    toy = Quadratic(9, 6, 2, seed=0)
    optimizer = LoRAMuon(toy.model, lr=1e-3, weight_decay=10.0)
    before = toy.W
    toy.A.grad, toy.B.grad = torch.zeros_like(toy.A), torch.zeros_like(toy.B)
    optimizer.step()
    assert_close(toy.W, 0.99 * before, 1e-12)


def test_full_muon_steps_what_all_linear_adapts():
    for make, task_type in ((tiny_bert, "SEQ_CLS"), (tiny_llama, "CAUSAL_LM")):
        base = make()
        config = LoraConfig(target_modules="all-linear", task_type=task_type)
        names = _maybe_include_all_linear_layers(copy.copy(config), base).target_modules
        expected = {
            id(module.weight)
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and any(name == n or name.endswith(f".{n}") for n in names)
        }
        optimizer = recipe("full-muon").create_optimizer(base, 1e-2)
        stepped = [
            {
                id(p)
                for group in optimizer.param_groups
                if ("ns_steps" in group) == is_muon
                for p in group["params"]
            }
            for is_muon in (True, False)
        ]
        assert stepped[0] == expected
        assert stepped[0] | stepped[1] == {id(p) for p in base.parameters()}
        assert not stepped[0] & stepped[1]


def test_full_muon_steps_a_shared_weight_once_and_transposed_ones_as_others():
    torch.manual_seed(0)
    one, two, plain = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(16, 64, bias=False)
    turned = Conv1D(64, 16)
    two.weight = one.weight
    turned.weight.data = plain.weight.data.T.clone()
    model = nn.ModuleDict({"one": one, "two": two, "plain": plain, "turned": turned})
    optimizer = full_muon(model, lr=0.02)
    given = [p for group in optimizer.param_groups if "ns_steps" in group for p in group["params"]]
    assert sorted(map(id, given)) == sorted(map(id, (one.weight, plain.weight, turned.weight)))
    plain.weight.grad = torch.randn(64, 16)
    turned.weight.grad = plain.weight.grad.T.clone()
    optimizer.step()
    assert_close(turned.weight.detach().T, plain.weight.detach(), 1e-2)


@pytest.mark.parametrize(
    "make", [each for each in ZOO if each.__name__ in {"llama_bf16", "llama_dora", "vit", "gpt2"}]
)
def test_factor_muon_steps_every_factor(make):
    torch.manual_seed(0)
    specimen = make()
    optimizer = recipe("factor-muon").create_optimizer(specimen.model, 1e-2)
    before = [p.detach().clone() for p in specimen.model.parameters() if p.requires_grad]
    specimen.loss().backward()
    optimizer.step()
    specimen.loss().backward()
    optimizer.step()
    after = [p for p in specimen.model.parameters() if p.requires_grad]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_muon_and_adamw_are_torchs_own():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    optimizer = recipe("factor-muon").create_optimizer(model, 1e-2, weight_decay=0.1, head_lr=3e-3)
    factors = [factor for pair in find_pairs(twin) for factor in (pair.A, pair.B)]
    head = [p for n, p in twin.named_parameters() if p.requires_grad and "lora_" not in n]
    weights, biases = [p for p in head if p.dim() > 1], [p for p in head if p.dim() == 1]
    parts = [
        torch.optim.Muon(factors, lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(
            [{"params": weights}, {"params": biases, "weight_decay": 0.0}], 3e-3, weight_decay=0.1
        ),
    ]
    for _ in range(3):
        backward(model, x, y)
        backward(twin, x, y)
        optimizer.step()
        for part in parts:
            part.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_muon_and_adamw_follow_schedules_and_resume_bit_for_bit():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    optimizers = [recipe("factor-muon").create_optimizer(each, 1e-2) for each in (model, twin)]
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.1, 6) for each in optimizers]
    for _ in range(2):
        backward(model, x, y)
        optimizers[0].step()
        schedules[0].step()
    twin.load_state_dict(model.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    schedules[1].load_state_dict(schedules[0].state_dict())
    for each, optimizer, schedule in zip((model, twin), optimizers, schedules, strict=True):
        for _ in range(3):
            backward(each, x, y)
            optimizer.step()
            schedule.step()
    assert optimizers[1].param_groups[0]["lr"] < 1e-2
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_muon_and_adamw_can_be_copied(copied):
    model, x, y = problem()
    optimizer = recipe("factor-muon").create_optimizer(model, 1e-2)
    backward(model, x, y)
    optimizer.step()
    twin, other = copied((model, optimizer))
    for each, stepped in ((model, optimizer), (twin, other)):
        backward(each, x, y)
        stepped.step()
    assert len(other.state) == len(optimizer.state)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_older_torch_and_convolutions_are_refused(monkeypatch):
    kernel = nn.Parameter(torch.zeros(2, 3, 1, 1))
    with pytest.raises(InputError):
        MuonAndAdamW([kernel], [], 1e-2)
    with pytest.raises(InputError):
        MuonAndAdamW([], [nn.Parameter(torch.zeros(2))], 1e-2)
    convolutions = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(target_modules=["0"]))
    with pytest.raises(InputError):
        recipe("factor-muon").create_optimizer(convolutions, 1e-2)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InputError):
        MuonAndAdamW([nn.Parameter(torch.zeros(2, 3))], [], 1e-2)
