"""Optimizers made in the manner of PEFT's own."""

import inspect

import peft.optimizers
import pytest

import tangora
from tangora import InputError
from tests.training.trainers import with_lora

MAKERS = {
    tangora.create_lora_pro: tangora.LoRAPro,
    tangora.create_ode_lora: tangora.ODELoRA,
    tangora.create_preconditioned_adamw: tangora.PreconditionedAdamW,
    tangora.create_tangent_adam: tangora.TangentAdam,
    tangora.create_tangent_muon: tangora.TangentMuon,
}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_they_are_called_as_those_of_peft(make):
    ours = inspect.signature(make).parameters
    theirs = inspect.signature(peft.optimizers.create_loraplus_optimizer).parameters
    assert next(iter(ours)) == next(iter(theirs)) == "model"
    assert ours["lr"].kind is theirs["lr"].kind is inspect.Parameter.KEYWORD_ONLY
    assert isinstance(make(with_lora(), lr=1e-3, weight_decay=0.1), MAKERS[make])


def test_lora_plus_cannot_split_the_pairs_of_another_optimizer():
    with pytest.raises(
        InputError, match=r"TangentAdam found no trainable LoRA pair: no parameter group has 'pairs'"
    ):
        peft.optimizers.create_loraplus_optimizer(
            with_lora(), tangora.TangentAdam, lr=1e-3, loraplus_lr_ratio=16.0
        )
