"""AdaLoRA's adapter as plain LoRA of the ranks that it found."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from tangora import InputError, TangentMuon, find_pairs, from_adalora, save_adapter
from tests.models import transformer

IDS = torch.arange(16).view(2, 8)


def adalora(base, **config):
    torch.manual_seed(0)
    options = {
        "init_r": 4,
        "target_r": 2,
        "total_step": 6,
        "tinit": 1,
        "tfinal": 1,
        "deltaT": 1,
        "lora_alpha": 8,
    }
    model = get_peft_model(base, AdaLoraConfig(**options | config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    return model.eval()


def llama(**config):
    return adalora(transformer("llama", seed=0), target_modules=["q_proj", "v_proj", "down_proj"], **config)


def test_it_computes_the_same_at_the_ranks_found(tmp_path):
    model = llama(modules_to_save=["lm_head"])
    wanted = model(input_ids=IDS).logits.detach()
    counts = {
        name: max(1, int((layer.lora_E["default"] != 0).sum()))
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_E") and "default" in layer.lora_E
    }
    assert len(set(counts.values())) > 1
    plain = from_adalora(model).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert {pair.name: pair.shape[2] for pair in find_pairs(plain)} == counts
    save_adapter(plain, tmp_path / "adapter")
    read = PeftModel.from_pretrained(transformer("llama", seed=0), tmp_path / "adapter").eval()
    torch.testing.assert_close(read(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)


def test_any_optimizer_trains_on():
    plain = from_adalora(llama())
    optimizer = TangentMuon(plain, lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = plain(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_layer_without_directions_keeps_one_that_adds_nothing():
    model = llama()
    name, layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "lora_E") and len(m.lora_E))
    layer.lora_E["default"].data.zero_()
    wanted = model(input_ids=IDS).logits.detach()
    plain = from_adalora(model).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    (pair,) = (pair for pair in find_pairs(plain) if pair.name == name)
    assert pair.shape[2] == 1
    assert not pair.B.any()


@pytest.mark.messages
def test_what_is_not_adalora_is_refused():
    base = nn.Sequential(nn.Linear(4, 4))
    for wrong in (base, get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["0"])), None):
        with pytest.raises(InputError, match="AdaLoRA"):
            from_adalora(wrong)
