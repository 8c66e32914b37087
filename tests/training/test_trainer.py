"""Three ways into a Trainer, and what it must refuse."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import tangora
from tangora import InputError, TangentAdam
from tangora.training.data import collator, encode
from tests.training.tiny import labelled_examples, tiny_bert, tiny_tokenizer


def parts(tmp_path, **changes):
    tokenizer = tiny_tokenizer()
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    data = encode(labelled_examples(32), tokenizer, kind="classification", max_length=16)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **changes,
    )
    return {
        "model": model,
        "args": arguments,
        "train_dataset": data,
        "data_collator": collator(tokenizer, "classification"),
    }


def weights(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_the_three_ways_train_alike(tmp_path):
    results = []
    for way in ("recipe", "optimizers", "factory"):
        options = parts(tmp_path / way)
        if way == "recipe":
            trainer = tangora.Trainer(**options, recipe=tangora.recipe("tangent"))
        elif way == "optimizers":
            optimizer = TangentAdam(options["model"], lr=1e-3)
            trainer = transformers.Trainer(**options, optimizers=(optimizer, None))
        else:
            factory = tangora.optimizer_factory(TangentAdam, lr=1e-3)
            trainer = transformers.Trainer(**options, optimizer_cls_and_kwargs=factory)
        trainer.train()
        results.append(weights(options["model"]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_recipe_takes_the_arguments_of_the_trainer(tmp_path):
    trainer = tangora.Trainer(
        **parts(tmp_path, weight_decay=0.1, adam_beta2=0.95), recipe=tangora.recipe("lora-pro")
    )
    trainer.create_optimizer()
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-3, 0.1, (0.9, 0.95))


def test_without_a_recipe_it_is_the_plain_trainer(tmp_path):
    trainer = tangora.Trainer(**parts(tmp_path))
    trainer.create_optimizer()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)


def test_it_can_stand_in_front_of_another_trainer(tmp_path):
    class Other(transformers.Trainer):
        def __init__(self, *args, extra, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = extra

    class Both(tangora.Trainer, Other):
        pass

    trainer = Both(**parts(tmp_path), extra=3, recipe=tangora.recipe("tangent"))
    trainer.train()
    assert trainer.extra == 3
    assert isinstance(trainer.optimizer.optimizer, TangentAdam)


def test_adalora_moves_its_ranks(tmp_path):
    base = tiny_bert()
    model = tangora.recipe("adalora").prepare(base, r=2, lora_alpha=4, task_type="SEQ_CLS", total_steps=12)
    options = {**parts(tmp_path), "model": model}
    options["args"] = copy.copy(options["args"])
    options["args"].max_steps = 12
    trainer = tangora.Trainer(**options, recipe=tangora.recipe("adalora"))
    trainer.train()
    ranks = [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]
    assert sum(ranks) < 3 * len(ranks)  # it started with rank 3 everywhere


@pytest.mark.messages
def test_what_is_refused(tmp_path):
    options = parts(tmp_path)
    with pytest.raises(InputError, match="recipe must be a recipe such as"):
        tangora.Trainer(**options, recipe="tangent")
    optimizer = TangentAdam(options["model"], lr=1e-3)
    with pytest.raises(InputError, match="recipe and optimizers both name an optimizer"):
        tangora.Trainer(**options, recipe=tangora.recipe("lora"), optimizers=(optimizer, None))
    with pytest.raises(InputError, match="needs lr"):
        tangora.optimizer_factory(TangentAdam)
