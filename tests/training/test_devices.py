"""Several visible GPUs without a launcher: one is used, and the batch stays as large as was asked for."""

import warnings

import pytest
import torch
import transformers
from torch import nn

import tangora
from tests.training.test_trainer import parts, weights

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
    for ours, theirs in zip(*trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


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
