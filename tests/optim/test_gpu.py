"""On a GPU everything is as on a CPU, and a step waits for the device twice."""

import warnings

import pytest
import torch

import tangora
from tests.models import transformer, with_lora
from tests.optim.problems import OPTIMIZERS, Training, problem
from tests.optim.test_guessing import STEADY, model_of_two_shapes, step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_those_on_a_cpu(name):
    model, x, y = problem()
    here = Training(name, of=(model, x, y))
    there = Training(name, of=(here.copy().model.cuda(), x.cuda(), y.cuda()))
    here.step(8)
    there.step(8)
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", STEADY)
def test_a_step_waits_twice(name):
    model = model_of_two_shapes().cuda()
    optimizer = STEADY[name](model)
    for _ in range(6):
        step(model, optimizer)
    optimizer.zero_grad()
    model(torch.randn(64, 24, dtype=torch.float64, device="cuda")).square().mean().backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(each.message) for each in caught) <= 2


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("name", STEADY)
def test_compiled_steps_equal_the_others(name, mode):
    models = [model_of_two_shapes().cuda() for _ in range(2)]
    plain, compiled = (STEADY[name](model) for model in models)
    torch._dynamo.reset()
    compiled.compile(mode=mode)
    for _ in range(10):
        step(models[0], plain)
        step(models[1], compiled)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["orthogonal", "pissa", "lora-ga", "lora-one"])
def test_starts_equal_those_on_a_cpu(method):
    updates = []
    for device in ("cpu", "cuda"):
        model = with_lora(transformer("llama", seed=0).double()).to(device)
        tokens = torch.arange(16, device=device).view(2, 8)
        batches = [{"input_ids": tokens, "labels": tokens}] if method.startswith("lora") else None
        tangora.initialize(model, method, batches, progress=False)
        updates.append([pair.delta_weight().cpu() for pair in tangora.find_pairs(model)])
    for here, there in zip(*updates, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-8)


def test_an_adapter_saved_from_a_gpu_is_read_on_a_cpu(tmp_path):
    model = with_lora(transformer("llama", seed=0)).cuda()
    optimizer = tangora.TangentMuon(model)
    tokens = torch.arange(16, device="cuda").view(2, 8)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    tangora.save_adapter(model, tmp_path / "adapter")
    read = tangora.load_adapter(transformer("llama", seed=0), tmp_path / "adapter")
    wanted = model(input_ids=tokens).logits.cpu()
    torch.testing.assert_close(read(input_ids=tokens.cpu()).logits, wanted, rtol=1e-4, atol=1e-4)
