"""The frozen weight under a pair, and the magnitudes that belong to it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tangora import find_pairs
from tangora.adapters import base_weight, module_weight, refresh_magnitude
from tests.adapters.models import Holder
from tests.tolerances import assert_close


def test_an_eight_bit_layer_can_be_called_after_its_weight_was_read():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(16, 12, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(16, 12).state_dict())
    layer, x = layer.to("cpu"), torch.randn(3, 16)
    with torch.no_grad():
        before = layer(x).clone()
        weight = module_weight(layer)
        assert torch.equal(layer(x), before)
        assert_close(x @ weight.T + layer.bias, before, 1e-5)


def test_magnitudes_become_the_norms_of_the_weight_and_stay_the_same_parameters():
    torch.manual_seed(0)
    model = get_peft_model(Holder(nn.Linear(7, 5)), LoraConfig(r=2, target_modules=["it"], use_dora=True))
    (pair,) = find_pairs(model)
    magnitude = pair.layer.lora_magnitude_vector["default"].weight
    magnitude.requires_grad_(False)
    with torch.no_grad():
        pair.B.normal_()
    refresh_magnitude(pair)
    assert pair.layer.lora_magnitude_vector["default"].weight is magnitude
    assert not magnitude.requires_grad
    assert_close(magnitude, (base_weight(pair) + pair.delta_weight()).norm(dim=1), 1e-6)
