"""Engines that would silently train something else are refused: DeepSpeed and FSDP1, as Accelerate describes them."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

import tangora
from tangora import InputError, LoRAPro, TangentAdam
from tangora.training.devices import check_kept
from tests.training.test_trainer import parts
from tests.training.tiny import tiny_bert

pytestmark = pytest.mark.messages


@pytest.fixture
def engine(monkeypatch):
    """Pretend that the Trainer's Accelerator was set up with a plugin."""

    def pretend(*, stage=None, optimizer=False, fsdp=None):
        if stage is not None:
            config = {"optimizer": {"type": "AdamW"}} if optimizer else {}
            plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
            monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin)
        if fsdp is not None:
            monkeypatch.setattr(
                AcceleratorState, "fsdp_plugin", SimpleNamespace(fsdp_version=fsdp), raising=False
            )

    return pretend


@pytest.mark.parametrize("name", ["tangent", "lora-pro", "p-lora"])
@pytest.mark.parametrize(
    ("plugin", "message"),
    [({"stage": 1}, "ZeRO-1"), ({"stage": 2}, "ZeRO-2"), ({"stage": 3}, "ZeRO-3"), ({"fsdp": 1}, "FSDP1")],
)
def test_pairs_cannot_be_flattened(tmp_path, engine, name, plugin, message):
    trainer = tangora.Trainer(**parts(tmp_path), recipe=name)
    factory = tangora.optimizer_factory(tangora.recipe(name).create_optimizer, lr=1e-3)
    plain = transformers.Trainer(**parts(tmp_path), optimizer_cls_and_kwargs=factory)
    engine(**plugin)
    for each in (trainer, plain):
        with pytest.raises(InputError, match=f"{message}.*fsdp_size"):
            each.create_optimizer()


@pytest.mark.parametrize("plugin", [{"stage": 0}, {"fsdp": 2}, {}])
def test_engines_that_keep_parameters_whole_are_fine(tmp_path, engine, plugin):
    trainer = tangora.Trainer(**parts(tmp_path), recipe="tangent")
    engine(**plugin)
    assert isinstance(trainer.create_optimizer(), TangentAdam)


@pytest.mark.parametrize("name", ["lora", "full", "lora+"])
def test_optimizers_of_single_parameters_stand_them(tmp_path, engine, name):
    options = parts(tmp_path) | ({"model": tiny_bert()} if name == "full" else {})
    trainer = tangora.Trainer(**options, recipe=name)
    engine(stage=2)
    assert isinstance(trainer.create_optimizer(), torch.optim.AdamW)


@pytest.mark.parametrize("make", [TangentAdam, LoRAPro])
def test_deepspeed_drops_optimizers_that_are_given(tmp_path, engine, make, monkeypatch):
    options, asked = parts(tmp_path), []
    monkeypatch.setattr("tangora.training.trainer.check_kept", lambda *, given: asked.append(given))
    tangora.Trainer(**options, optimizers=(make(options["model"], lr=1e-3), None))
    tangora.Trainer(**options, recipe="tangent")
    tangora.Trainer(**options)
    assert asked == [True, False]
    check_kept(given=True)  # no engine
    engine(stage=0)
    check_kept(given=False)
    with pytest.raises(InputError, match="optimizers="):
        check_kept(given=True)


def test_deepspeeds_own_optimizer_would_replace_the_recipes(engine):
    engine(stage=0, optimizer=True)
    with pytest.raises(InputError, match="'optimizer'"):
        check_kept(given=False)
