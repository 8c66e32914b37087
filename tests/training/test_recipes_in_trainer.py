"""`tangora.Trainer(recipe=...)` does all of a recipe, as the manual path does, or says what is missing."""

import copy
import dataclasses
import random
import warnings

import datasets
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model

import tangora
from tangora import InputError, find_pairs, recipe, recipes
from tangora.adapters import has_offset
from tangora.experiments.settings import RunSettings
from tangora.init import started_by
from tangora.training.data import encode
from tangora.training.starting import NUM_EXAMPLES, NUM_HELD_OUT
from tests.models import tiny_bert, tiny_llama, tiny_tokenizer
from tests.processes import in_processes
from tests.training import trainers
from tests.training.tiny import labelled_examples
from tests.training.trainers import COLLATE, RATE, assert_equal, weights

# LoRA-Pro says so of a model as small as this
pytestmark = pytest.mark.filterwarnings("ignore:step 2 changes A of")
NAMES = [entry.name for entry in recipes() if entry.search is None]  # test_two_phases has the others
STARTED = [entry.name for entry in recipes() if entry.start and entry.trains]
SEED = 7
DATA = trainers.encoded(48)
HELD_OUT = encode(labelled_examples(12)[::-1], tiny_tokenizer(), kind="classification", max_length=16)


def arguments(folder, **changes):
    options = {"max_steps": 2, "per_device_eval_batch_size": 4, "lr_scheduler_type": "constant", "seed": SEED}
    return trainers.arguments(folder, **options | changes)


def made(folder, model=None, kind=tangora.Trainer, changes=None, **options):
    model = model if model is not None or "model_init" in options else tiny_bert()
    data = {"train_dataset": DATA, "eval_dataset": HELD_OUT, "data_collator": COLLATE}
    return kind(model=model, args=arguments(folder, **changes or {}), **data | options)


def adapted(name="lora", **changes):
    options = {"r": 8, "lora_alpha": 16, "task_type": "SEQ_CLS", "total_steps": 2, "seed": SEED}
    return recipe(name).prepare(tiny_bert(), **options | changes)


def with_lora(**config):
    torch.manual_seed(SEED)
    return trainers.with_lora(**config)


def start_batches(size=4, examples=NUM_EXAMPLES):
    chosen = random.Random(SEED).sample(range(len(DATA)), examples)
    return [COLLATE([DATA[i] for i in chosen[first : first + size]]) for first in range(0, examples, size)]


def held_out_batches():
    return [COLLATE([HELD_OUT[i] for i in range(first, first + 4)]) for first in range(0, 12, 4)]


def offsets(model):
    """Return the frozen initial products of adapters, by pair and factor."""
    found = {pair.name: pair.offset() for pair in find_pairs(model)}
    return {(name, k): factor for name, factors in found.items() for k, factor in enumerate(factors or ())}


def manual(folder, name):
    """What a user writes without the Trainer's help."""
    entry = recipe(name)
    model = adapted(name)
    batches = start_batches() if entry.reads_gradients else None
    entry.initialize(model, batches, held_out=held_out_batches(), seed=SEED)
    if entry.trains:
        optimizer = entry.create_optimizer(model, RATE, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
        made(folder, model, optimizers=(optimizer, None)).train()
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each recipe's model, trained from the base by its name."""
    found = {}
    for name in NAMES:
        trainer = made(tmp_path_factory.mktemp("runs"), recipe=name)
        with warnings.catch_warnings():  # marks do not reach fixtures
            warnings.filterwarnings("ignore", "step 2 changes A of")
            trainer.train()
        found[name] = trainer.model.eval()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_as_its_parts_by_hand_do(tmp_path, trained, name):
    assert_equal(weights(trained[name]), weights(manual(tmp_path, name)))


@pytest.mark.slow
def test_no_recipe_is_another_in_disguise(trained):
    batch = COLLATE([HELD_OUT[i] for i in range(8)])
    batch.pop("labels")
    with torch.no_grad():
        logits = {name: model(**batch).logits for name, model in trained.items()}
    for index, name in enumerate(NAMES):
        for other in NAMES[:index]:
            if {name, other} not in ({"lora-one", "lora-one-plain"}, {"odelora-heun", "odelora-rk4"}):
                assert not torch.allclose(logits[name], logits[other], rtol=0, atol=1e-6), (name, other)


def test_as_many_examples_are_read_as_on_the_command_line():
    assert RunSettings().start_examples == NUM_EXAMPLES
    assert len(tangora.load_task("bbc-news").validation) == NUM_HELD_OUT


class Recorder(tangora.Trainer):
    """Keeps its batches, and the random state of each."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.__dict__.setdefault("seen", []).append((inputs["input_ids"], torch.get_rng_state()))
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.fixture(scope="module")
def unstarted(tmp_path_factory):
    """Batches and random states of a training without an initialization."""
    trainer = made(tmp_path_factory.mktemp("unstarted"), adapted("lora"), Recorder, recipe="lora")
    trainer.train()
    return trainer.seen


@pytest.mark.parametrize("name", STARTED)
def test_data_and_random_state_of_training_do_not_depend_on_the_initialization(tmp_path, unstarted, name):
    trainer = made(tmp_path, adapted(name), Recorder, recipe=name)
    trainer.train()
    for (tokens, state), (others, other) in zip(trainer.seen, unstarted, strict=True):
        assert torch.equal(tokens, others)
        assert torch.equal(state, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora-ga", "orthogonal+tangent", "lora-one", "pissa", "tangent"])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, monkeypatch, name):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = made(tmp_path, adapted(name), changes=changes, recipe=name)
    whole.train()
    resumed = made(tmp_path, adapted(name), changes=changes, recipe=name)

    def fails(*_, **__):
        raise AssertionError("initialized a second time")

    monkeypatch.setattr(tangora.Recipe, "initialize", fails)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(whole.model), weights(resumed.model))
    assert_equal(offsets(whole.model), offsets(resumed.model))


def test_an_initialization_is_made_once(tmp_path):
    model = adapted("lora-ga")
    tangora.initialize(model, "lora-ga", start_batches(examples=8), seed=3, scale="unit")
    before = weights(model)
    trainer = made(tmp_path, model, recipe="lora-ga")
    trainer.create_optimizer()
    assert_equal(before, weights(model))
    assert has_offset(model, "default")


@pytest.mark.messages
def test_another_initialization_or_training_is_never_erased(tmp_path):
    model = adapted()
    tangora.initialize(model, "orthogonal", seed=3)
    with pytest.raises(InputError, match=r"'lora-ga' begins with .* but adapter 'default' has 'orthogonal'"):
        made(tmp_path, model, recipe="lora-ga")
    trained = adapted()
    with torch.no_grad():
        for pair in find_pairs(trained):
            pair.B.add_(1e-3)
    with pytest.raises(InputError, match="which would overwrite adapter 'default': it has been trained"):
        made(tmp_path, trained, recipe="lora-ga")
    before = weights(trained)
    made(tmp_path, trained, recipe=dataclasses.replace(recipe("lora-ga"), start=None)).create_optimizer()
    assert_equal(before, weights(trained))


def test_another_initialization_or_optimizer_is_said(tmp_path, caplog):
    model = adapted()
    tangora.initialize(model, "orthogonal", seed=3)
    made(tmp_path, model, recipe="tangent")
    assert "uses initialization 'orthogonal'" in caplog.text
    assert "optim of TrainingArguments" not in caplog.text
    made(tmp_path, recipe="tangent", changes={"optim": "adafactor"})
    assert "optim of TrainingArguments is ignored" in caplog.text


class Squares(tangora.Trainer):
    """A loss of its own, which takes labels out of the inputs as TRL's do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        wanted = torch.nn.functional.one_hot(labels, 3)
        loss = (model(**inputs).logits - wanted).square().mean()
        return (loss, {}) if return_outputs else loss


def squares(outputs, labels, num_items_in_batch=None):
    return (outputs.logits - torch.nn.functional.one_hot(labels, 3)).square().mean()


def smoothed(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.2)


def mean_square(model, batch):
    return squares(
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]), batch["labels"]
    )


LOSSES = {
    "override": (Squares, {}, {}, mean_square),
    "function": (tangora.Trainer, {}, {"compute_loss_func": squares}, mean_square),
    "label smoothing": (tangora.Trainer, {"label_smoothing_factor": 0.2}, {}, smoothed),
}


@pytest.mark.parametrize("case", LOSSES)
def test_gradients_are_those_of_the_loss_that_is_trained(tmp_path, case):
    kind, changes, options, loss_fn = LOSSES[case]
    # with five in a batch, two examples would make a batch that weighs as much as the others
    changes = {**changes, "per_device_train_batch_size": 5}
    trainer = made(tmp_path, adapted("lora-ga"), kind, changes, recipe="lora-ga", **options)
    trainer.create_optimizer()
    model, plain = adapted("lora-ga"), adapted("lora-ga")
    batches = start_batches(size=5, examples=32)[:6]
    tangora.initialize(model, "lora-ga", batches, loss_fn=loss_fn, seed=SEED)
    tangora.initialize(plain, "lora-ga", batches, seed=SEED)
    found, wanted, other = weights(trainer.model), weights(model), weights(plain)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(found[name], other[name], atol=1e-3) for name in found)


@pytest.mark.messages
def test_inputs_that_a_trainer_makes_while_it_trains_are_refused(tmp_path):
    class Generating(tangora.Trainer):
        def _prepare_inputs(self, inputs):
            raise AssertionError("generated before training")

    trainer = made(tmp_path, kind=Generating, recipe="lora-ga")
    with pytest.raises(InputError, match="Generating generates its inputs"):
        trainer.train()
    made(tmp_path, kind=Generating, recipe="orthogonal").create_optimizer()  # reads no gradients


def test_what_a_trainer_counts_while_it_evaluates_losses_is_put_back(tmp_path):
    class Counting(tangora.Trainer):
        def compute_loss(self, *args, **kwargs):
            self._metrics["train"].append(1)
            return super().compute_loss(*args, **kwargs)

    trainer = made(tmp_path, kind=Counting, recipe="lora-ga")
    trainer._metrics = {"train": []}
    trainer.create_optimizer()
    assert trainer._metrics == {"train": []}
    assert not trainer.accelerator._dataloaders


def test_datasets_with_other_columns_and_streams_are_read(tmp_path):
    rows = [{**DATA[index], "note": "unused"} for index in range(len(DATA))]
    table = datasets.Dataset.from_list(rows)
    changes = {"remove_unused_columns": True}
    expected = weights(made(tmp_path, recipe="lora-ga", changes=changes).model)
    for data in (table, table.to_iterable_dataset()):
        trainer = made(tmp_path, recipe="lora-ga", changes=changes, train_dataset=data)
        trainer.train()
        assert started_by(trainer.model) == "lora-ga"
        assert weights(trainer.model).keys() == expected.keys()


def test_own_data_loaders_are_respected(tmp_path):
    class Own(tangora.Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader([DATA[i] for i in range(8)], batch_size=4, collate_fn=COLLATE)

    trainer = made(tmp_path, adapted("lora-ga"), Own, recipe="lora-ga")
    trainer.create_optimizer()
    chosen = random.Random(SEED).sample(range(8), 8)
    batches = [COLLATE([DATA[index] for index in chosen[first : first + 4]]) for first in (0, 4)]
    model = adapted("lora-ga")
    tangora.initialize(model, "lora-ga", batches, seed=SEED)
    assert_equal(weights(trainer.model), weights(model))


RATES = {
    "given to the Trainer": ({"learning_rate": 2e-3}, {}, 2e-3),
    "the arguments' default, given to the Trainer": ({"learning_rate": 5e-5}, {}, 5e-5),
    "in the arguments": ({}, {"learning_rate": 4e-3}, 4e-3),
    "nowhere": ({}, {"learning_rate": 5e-5}, recipe("lora").default_learning_rate()),
}


@pytest.mark.parametrize("case", RATES)
def test_the_learning_rate(tmp_path, caplog, case):
    options, changes, expected = RATES[case]
    trainer = made(tmp_path, with_lora(), changes=changes, recipe="lora", **options)
    caplog.clear()
    trainer.create_optimizer()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {expected}
    assert trainer.args.learning_rate == expected


def test_arguments_can_be_used_for_several_recipes(tmp_path, caplog):
    shared = arguments(tmp_path, learning_rate=5e-5)
    for name in ("lora", "odelora-euler"):
        trainer = tangora.Trainer(with_lora(), shared, train_dataset=DATA, data_collator=COLLATE, recipe=name)
        assert trainer.args.learning_rate == recipe(name).default_learning_rate()
        assert f"recipe '{name}': learning rate {recipe(name).default_learning_rate():g}" in caplog.text
    assert shared.learning_rate == 5e-5


def test_the_default_rate_is_that_of_the_kind_of_model(tmp_path):
    trainer = made(tmp_path, tiny_llama(), changes={"learning_rate": 5e-5}, recipe="tangent-muon")
    assert trainer.args.learning_rate == recipe("tangent-muon").default_learning_rate("causal")


def test_without_training_there_is_none(tmp_path):
    trainer = made(tmp_path, recipe="one-step")
    result = trainer.train()
    assert result.global_step == 0
    assert started_by(trainer.model) == "one-step"
    before = weights(trainer.model)
    trainer.train()
    assert_equal(before, weights(trainer.model))


@pytest.mark.messages
def test_what_one_step_needs(tmp_path):
    with pytest.raises(InputError, match=r"searches its step size .* pass one eval_dataset .* got none"):
        made(tmp_path, recipe="one-step", eval_dataset=None).train()
    with pytest.raises(InputError, match="got dict"):
        made(tmp_path, recipe="one-step", eval_dataset={"one": HELD_OUT}).train()
    with pytest.raises(InputError, match="'one-step' does not train: omit resume_from_checkpoint"):
        made(tmp_path, recipe="one-step").train(resume_from_checkpoint=True)


def test_models_that_a_function_makes_are_prepared_each_time(tmp_path):
    def fresh():
        return tiny_bert()

    trainer = made(tmp_path, model_init=fresh, recipe="lora-ga")
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert started_by(trainer.model) == "lora-ga"
    expected = made(tmp_path, recipe="lora-ga")
    expected.create_optimizer()
    assert offsets(trainer.model)
    assert_equal(offsets(trainer.model), offsets(expected.model))


def test_a_configuration_is_completed_by_the_recipe(tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["query"], task_type="SEQ_CLS")
    trainer = made(tmp_path, recipe="dora", peft_config=config)
    own = trainer.model.peft_config["default"]
    assert (own.r, own.lora_alpha, own.use_dora) == (3, 5, True)
    assert not config.use_dora
    assert {pair.shape[2] for pair in find_pairs(trainer.model)} == {3}


def test_adalora_gets_the_schedule_of_the_training(tmp_path):
    trainer = made(tmp_path, recipe="adalora", changes={"max_steps": -1, "num_train_epochs": 1})
    trainer.train()
    config = trainer.model.peft_config["default"]
    steps = len(DATA) // 4
    assert (config.total_step, config.tinit, config.tfinal) == (steps, steps // 10, steps // 3)
    assert config is trainer.model.base_model.rankallocator.peft_config


def test_the_head_of_a_language_model_stays(tmp_path):
    trainer = made(tmp_path, tiny_llama(), recipe="lora")
    assert trainer.model.peft_config["default"].task_type == "CAUSAL_LM"
    assert all("lora_" in name for name in weights(trainer.model))


def adalora(**options):
    config = AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], **{"total_step": 20} | options)
    return get_peft_model(tiny_bert(), config)


def added():
    model = tiny_bert()
    model.add_adapter(LoraConfig(target_modules=["query"]))
    return model


def quantized():
    model = tiny_bert()
    packed = torch.zeros(4, dtype=torch.uint8)
    model.bert.pooler.dense.weight = torch.nn.Parameter(packed, requires_grad=False)
    return model


MISFITS = {
    "full on an adapter": ("full", with_lora, {}, "'full' trains all weights .* got a model with an adapter"),
    "full on an added adapter": ("full", added, {}, "'full' trains all weights"),
    "full with a configuration": ("full", tiny_bert, {"peft_config": LoraConfig()}, "got peft_config"),
    "full on quantized weights": ("full", quantized, {}, "bert.pooler.dense.weight is quantized"),
    "dora on lora": ("dora", with_lora, {}, "needs an adapter with use_dora=True; adapter 'default' has False"),
    "rslora on lora": ("rslora", with_lora, {}, "use_rslora=True"),
    "lora-one on lora": ("lora-one", with_lora, {}, "use_rslora=True"),
    "adalora on lora": ("adalora", with_lora, {}, "needs AdaLoraConfig; adapter 'default' has LoraConfig"),
    "adalora from lora's configuration": (
        "adalora", tiny_bert, {"peft_config": LoraConfig()}, "peft_config has LoraConfig",
    ),
    "lora on adalora": ("lora", adalora, {}, "needs LoraConfig; adapter 'default' has AdaLoraConfig"),
    "lora on another method": (
        "tangent",
        lambda: get_peft_model(tiny_bert(), IA3Config(task_type="SEQ_CLS")),
        {},
        "has IA3Config",
    ),
    "an adapter without PEFT's model": ("tangent", added, {}, "needs a PeftModel; got BertFor"),
    "peft's own pissa": (
        "lora-ga",
        lambda: with_lora(init_lora_weights="pissa"),
        {},
        "with PEFT's 'pissa', which changes the base weights",
    ),
    "a configuration with pissa": (
        "lora-ga", tiny_bert, {"peft_config": LoraConfig(init_lora_weights="pissa")}, "peft_config with PEFT's",
    ),
    "two configurations": ("lora", with_lora, {"peft_config": LoraConfig()}, "omit peft_config"),
    "an unknown head": ("lora", lambda: tiny_bert().bert, {}, "pass peft_config=peft.LoraConfig"),
    "a name": ("lora", lambda: "bert-base-uncased", {}, "must be a loaded model; got 'bert-base-uncased'"),
    "a learning rate below zero": ("lora", with_lora, {"learning_rate": -1.0}, "learning_rate must be a number"),
    "a learning rate without a recipe": (None, with_lora, {"learning_rate": 1e-3}, "learning_rate needs a recipe"),
    "a head's without a recipe": (None, with_lora, {"head_learning_rate": 1e-3}, "head_learning_rate needs"),
    "a configuration without a recipe": (None, tiny_bert, {"peft_config": LoraConfig()}, "peft_config needs a recipe"),
    "a head's below zero": ("lora", with_lora, {"head_learning_rate": -1.0}, "head_learning_rate must be a number"),
    "a class": (tangora.Recipe, with_lora, {}, "recipe must be a name such as"),
    "not a number": ("lora", with_lora, {"learning_rate": float("nan")}, "learning_rate must be a number"),
}  # fmt: skip


@pytest.mark.messages
@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_refused_before_training(tmp_path, case):
    name, make, options, message = MISFITS[case]
    with pytest.raises(InputError, match=message):
        made(tmp_path, make(), recipe=name, **options)


@pytest.mark.messages
def test_what_shows_when_training_begins(tmp_path):
    with pytest.raises(InputError, match=r"at step 20, .*2 steps"):
        made(tmp_path, adalora(), recipe="adalora").train()
    with pytest.raises(InputError, match="pass train_dataset"):
        made(tmp_path, recipe="lora-ga", train_dataset=None).create_optimizer()


@pytest.mark.parametrize("name", [None, "lora", "tangent"])
def test_a_changed_base_is_said_before_training(tmp_path, name):
    trainer = made(tmp_path, with_lora(init_lora_weights="pissa"), recipe=name)
    with pytest.warns(UserWarning, match=r"call initial = tangora.initial_factors\(model\) before training"):
        trainer.create_optimizer()


def test_what_is_trained_from_a_base_model_is_saved_for_it(tmp_path):
    base = tiny_bert()
    trainer = made(tmp_path / "run", copy.deepcopy(base), recipe="lora-ga+tangent")
    trainer.train()
    tangora.save_adapter(trainer.model, tmp_path / "adapter")
    again = tangora.load_adapter(base, tmp_path / "adapter").eval()
    batch = COLLATE([HELD_OUT[index] for index in range(8)])
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, trainer.model.eval()(**batch).logits)


def initialized(folder):
    # of few directions, which float32 tells apart
    trainer = made(folder, adapted("lora-ga", r=2), recipe="lora-ga")
    trainer.create_optimizer()
    return weights(trainer.model)


def initialized_of(rank, folder):
    return initialized(f"{folder}/{rank}")


@pytest.mark.slow
def test_two_processes_share_the_examples(tmp_path):
    one, other = in_processes(initialized_of, tmp_path, 2, str(tmp_path))
    assert_equal(one, other)
    for name, value in initialized(tmp_path).items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("base", [True, False])
def test_in_front_of_trl(tmp_path, base):
    trl = pytest.importorskip("trl")

    class SFT(tangora.Trainer, trl.SFTTrainer):
        pass

    tokenizer = tiny_tokenizer()
    data = datasets.Dataset.from_dict({"text": ["red cat sun", "blue dog sea sun", "green sea"] * 4})
    config = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, max_length=8, bf16=False,
    )  # fmt: skip
    model = tiny_llama()
    model = model if base else get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    trainer = SFT(model, config, train_dataset=data, processing_class=tokenizer, recipe="lora-ga+tangent")
    trainer.train()
    assert started_by(trainer.model) == "lora-ga"
    assert trainer.args.learning_rate == recipe("lora-ga+tangent").default_learning_rate()
