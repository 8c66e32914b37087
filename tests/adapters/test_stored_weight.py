"""Weights of layers however they are stored: also 4-bit ones that bitsandbytes repacks for inference on some CPUs."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tangora import find_pairs
from tangora.adapters import module_weight
from tangora.adapters.stored_weight import keep_layout
from tests.models import Holder
from tests.tolerances import assert_close

bnb = pytest.importorskip("bitsandbytes")

ROUNDING = {False: 2**-8, True: 2**-7}
"""Of scales in bfloat16, and of nested ones, which are then quantized again."""


def four_bit(nested, quant_type="nf4", out_features=64):
    """A layer as it is on a CPU with AVX512-BF16; it must not be called in evaluation mode elsewhere."""
    torch.manual_seed(0)
    options = {"quant_type": quant_type, "compute_dtype": torch.float32, "compress_statistics": nested}
    layer = bnb.nn.Linear4bit(192, out_features, bias=False, **options)
    layer.load_state_dict({"weight": torch.randn(out_features, 192) / 8}, strict=False)
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = True
    return layer


def repack(layer):
    """Do what the layer's first call in evaluation mode does there."""
    layer.weight.data, _ = bnb.nn.modules._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )


def dequantized(layer):
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_repacked_weight_is_read_to_the_rounding_of_its_scales(nested, quant_type):
    layer = four_bit(nested, quant_type)
    exact = dequantized(layer)
    repack(layer)
    assert (dequantized(layer).view_as(exact) - exact).norm() > exact.norm()  # what it is without us
    with pytest.warns(UserWarning, match="repacked 1 4-bit weights"):
        weight = module_weight(layer)
    assert_close(weight, exact, ROUNDING[nested])
    assert_close(dequantized(layer), exact, ROUNDING[nested])


@pytest.mark.parametrize("nested", [True, False])
def test_layers_under_pairs_are_never_repacked(nested):
    layer = four_bit(nested)
    holder = Holder(layer)
    holder.is_loaded_in_4bit = True
    model = get_peft_model(holder, LoraConfig(r=2, target_modules=["it"]))
    bits, weight = layer.weight.data.clone(), dequantized(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_pairs(model)
    x = torch.randn(3, 192)
    with torch.no_grad():
        assert_close(model.eval()(x), x @ weight.T, 1e-5)
    assert torch.equal(layer.weight.data, bits)


def test_other_layers_stay_as_they_are():
    layer = torch.nn.Linear(3, 2)
    assert torch.equal(module_weight(layer), layer.weight)
    unquantized = bnb.nn.Linear4bit(4, 2)  # has no scales yet
    unquantized.support_avx512bf16_for_cpu = True
    keep_layout([layer, unquantized])
    assert not hasattr(layer, "support_avx512bf16_for_cpu")


def test_an_eight_bit_layer_can_be_called_after_its_weight_was_read():
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(16, 12, has_fp16_weights=False)
    layer.load_state_dict(torch.nn.Linear(16, 12).state_dict())
    layer, x = layer.to("cpu"), torch.randn(3, 16)
    with torch.no_grad():
        before = layer(x).clone()
        weight = module_weight(layer)
        assert torch.equal(layer(x), before)
        assert_close(x @ weight.T + layer.bias, before, 1e-5)
