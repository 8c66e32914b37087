"""Rivals of TangentMuon against dense versions from their papers' formulas, and what their papers promise."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

from tangora import InputError, find_pairs, recipe
from tangora.optim import LoRAMuon, LoRARITE, MuonAndAdamW, PoLoRA
from tangora.recipes.baselines import full_muon
from tests.models import tiny_bert, tiny_llama, with_lora
from tests.optim.problems import (
    Quadratic,
    adamw_of_the_rest,
    assert_follows,
    backward,
    problem,
    same,
    trainable,
)
from tests.optim.zoo import ZOO
from tests.reference.optimizers import DenseLoRAMuon, DenseLoRARITE, DensePoLoRA
from tests.tolerances import assert_close

SHAPES = [(9, 6, 2), (5, 8, 2), (7, 7, 1)]


def follow(optimizer_class, reference_class, toy, lr, steps=10):
    reference = reference_class(toy.A.detach(), toy.B.detach(), toy.s, lr)
    assert_follows(toy, optimizer_class(toy.model, lr=lr), reference, steps, 1e-7)


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
        toy = Quadratic(9, 6, 2, seed=3).change_gauge(condition, seed=5)
        sequences.append(toy.train(optimizer_class(toy.model, lr=1e-3), 5))
    # a step of both factors has a part of second order, which only steps of W would lack
    assert_close(sequences[1], sequences[0], 1e-5)


@pytest.mark.parametrize("optimizer_class", [LoRAMuon, PoLoRA])
@pytest.mark.parametrize("alpha", [1.0, 64.0])
def test_the_rate_bounds_the_spectral_norm_of_a_step(optimizer_class, alpha):
    toy = Quadratic(9, 6, 2, seed=0, alpha=alpha)
    optimizer = optimizer_class(toy.model, lr=1e-4)
    for _ in range(5):
        before = toy.W
        assert torch.linalg.matrix_norm(toy.train(optimizer, 1) - before, 2) < 1.001e-4


def test_lora_muon_decays_the_product_once():
    toy = Quadratic(9, 6, 2, seed=0)
    optimizer = LoRAMuon(toy.model, lr=1e-3, weight_decay=10.0)
    before = toy.W
    assert_close(toy.train(optimizer, 1, scale=0.0), 0.99 * before, 1e-12)


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
        by_muon, others = set(), set()
        for group in optimizer.param_groups:
            (by_muon if "ns_steps" in group else others).update(map(id, group["params"]))
        assert by_muon == expected
        assert by_muon | others == {id(p) for p in base.parameters()}
        assert not by_muon & others


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
    before = trainable(specimen.model)
    for _ in range(2):
        specimen.loss().backward()
        optimizer.step()
    assert not any(map(torch.equal, before, trainable(specimen.model)))


def test_muon_and_adamw_are_torchs_own():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    optimizer = recipe("factor-muon").create_optimizer(model, 1e-2, weight_decay=0.1, head_lr=3e-3)
    factors = [factor for pair in find_pairs(twin) for factor in (pair.A, pair.B)]
    muon = torch.optim.Muon(factors, lr=1e-2, weight_decay=0.1)
    parts = [muon, adamw_of_the_rest(twin, 3e-3, 0.1)]
    for _ in range(3):
        backward(model, x, y)
        backward(twin, x, y)
        optimizer.step()
        for part in parts:
            part.step()
    assert same(trainable(model), trainable(twin))


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
    assert same(trainable(model), trainable(twin))


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
    assert same(trainable(model), trainable(twin))


def test_an_older_torch_and_convolutions_are_refused(monkeypatch):
    kernel = nn.Parameter(torch.zeros(2, 3, 1, 1))
    with pytest.raises(InputError):
        MuonAndAdamW([kernel], [], 1e-2)
    with pytest.raises(InputError):
        MuonAndAdamW([], [nn.Parameter(torch.zeros(2))], 1e-2)
    convolutions = with_lora(nn.Sequential(nn.Conv2d(3, 4, 3)), target_modules=["0"])
    with pytest.raises(InputError):
        recipe("factor-muon").create_optimizer(convolutions, 1e-2)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InputError):
        MuonAndAdamW([nn.Parameter(torch.zeros(2, 3))], [], 1e-2)
