"""Several visible GPUs without a launcher, of which one is used; and engines that would train something else."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import nn

import tangora
from tangora import InputError, LoRAPro, TangentAdam
from tangora.training.devices import check_kept
from tests.models import tiny_bert
from tests.training.trainers import RATE, assert_equal, parts, weights

NUM_GPUS = 4
RECIPES = (None, "lora", "lora+", "tangent", "odelora-heun")


def on_many_gpus(tmp_path, **changes):
    options = parts(tmp_path, **changes)
    options["args"]._n_gpu = NUM_GPUS  # what transformers counts, and all that it looks at
    return options


def num_examples(loader):
    return len(next(iter(loader))["labels"])


def test_transformers_would_spread_the_batch(tmp_path):
    trainer = transformers.Trainer(**on_many_gpus(tmp_path))
    assert isinstance(trainer._wrap_model(trainer.model), nn.DataParallel)
    assert num_examples(trainer.get_train_dataloader()) == 4 * NUM_GPUS


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_on_one_gpu(tmp_path, recipe):
    trained = []
    for number, make in enumerate((parts, on_many_gpus)):
        options = make(tmp_path / str(number))
        torch.manual_seed(0)
        if make is parts:
            trainer = tangora.Trainer(**options, recipe=recipe)
        else:
            with pytest.warns(UserWarning, match=f"{NUM_GPUS} GPUs are visible; only cpu") as told:
                trainer = tangora.Trainer(**options, recipe=recipe)
            assert len([each for each in told if "GPUs" in str(each.message)]) == 1
        assert trainer.args.train_batch_size == num_examples(trainer.get_train_dataloader()) == 4
        assert num_examples(trainer.get_eval_dataloader(options["train_dataset"])) == 8
        assert trainer._wrap_model(trainer.model) is trainer.model
        trainer.train()
        assert trainer.state.train_batch_size == 4
        trained.append(weights(trainer.model))
    assert_equal(*trained)


def test_positional_arguments_and_other_trainers(tmp_path):
    class Other(transformers.Trainer):
        pass

    class Mixed(tangora.Trainer, Other):
        pass

    options = on_many_gpus(tmp_path)
    model, arguments = options.pop("model"), options.pop("args")
    with pytest.warns(UserWarning, match="GPUs are visible; only cpu"):
        trainer = Mixed(model, arguments, **options)
    assert num_examples(trainer.get_train_dataloader()) == 4


@pytest.mark.parametrize("number", [0, 1])
def test_nothing_is_said_where_there_is_one_gpu_or_none(tmp_path, number):
    options = parts(tmp_path)
    options["args"]._n_gpu = number
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = tangora.Trainer(**options)
    assert trainer.args.n_gpu == number


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


@pytest.mark.messages
@pytest.mark.parametrize("name", ["tangent", "lora-pro", "p-lora"])
@pytest.mark.parametrize(
    ("plugin", "message"),
    [({"stage": 1}, "ZeRO-1"), ({"stage": 2}, "ZeRO-2"), ({"stage": 3}, "ZeRO-3"), ({"fsdp": 1}, "FSDP1")],
)
def test_pairs_cannot_be_flattened(tmp_path, engine, name, plugin, message):
    trainer = tangora.Trainer(**parts(tmp_path), recipe=name)
    factory = tangora.optimizer_factory(tangora.recipe(name).create_optimizer, lr=RATE)
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


@pytest.mark.messages
@pytest.mark.parametrize("make", [TangentAdam, LoRAPro])
def test_deepspeed_drops_optimizers_that_are_given(tmp_path, engine, make, monkeypatch):
    options, asked = parts(tmp_path), []
    monkeypatch.setattr("tangora.training.trainer.check_kept", lambda *, given: asked.append(given))
    tangora.Trainer(**options, optimizers=(make(options["model"], lr=RATE), None))
    tangora.Trainer(**options, recipe="tangent")
    tangora.Trainer(**options)
    assert asked == [True, False]
    check_kept(given=True)  # no engine
    engine(stage=0)
    check_kept(given=False)
    with pytest.raises(InputError, match="optimizers="):
        check_kept(given=True)


@pytest.mark.messages
def test_deepspeeds_own_optimizer_would_replace_the_recipes(engine):
    engine(stage=0, optimizer=True)
    with pytest.raises(InputError, match="'optimizer'"):
        check_kept(given=False)
