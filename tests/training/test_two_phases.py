"""AdaLoRA finds the ranks in the Trainer, and the recipe's optimizer trains on: as by hand, and over interruptions."""

import pytest
import torch

import tangora
from tangora import InputError, TangentMuon, find_pairs, recipe
from tangora.recipes import RankSearch
from tests.models import tiny_bert
from tests.training import trainers
from tests.training.trainers import COLLATE, assert_equal, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:step . changes A of",
    "ignore:Adapter .default.. \\d+ LoRA tensor",  # PEFT, of a layer that has lost its whole rank
)
NAME = "adalora+tangent-muon@search_lr=0.02"
DATA = trainers.encoded(48)
STEPS = 12
SEARCH = 4


class Recorder(tangora.Trainer):
    """Keeps its batches with the random state of each, and the learning rate of every step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.__dict__.setdefault("seen", []).append(dict(inputs))
        self.__dict__.setdefault("states", []).append(torch.get_rng_state())
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs, *args, **kwargs):
        self.__dict__.setdefault("rates", []).extend(
            [logs["learning_rate"]] if "learning_rate" in logs else []
        )
        super().log(logs, *args, **kwargs)


def made(folder, name=NAME, model=None, changes=None, **options):
    common = {"max_steps": STEPS, "logging_steps": 1, "weight_decay": 0.01, "seed": 3}
    arguments = trainers.arguments(folder, **common | (changes or {}))
    data = {"train_dataset": DATA, "data_collator": COLLATE}
    model = None if "model_init" in options else model or tiny_bert()
    return Recorder(model=model, args=arguments, recipe=name, learning_rate=0.01, **data | options)


def fresh():
    return tiny_bert()


def by_hand(batches, base):
    """What a user writes without the Trainer."""
    method = recipe(NAME)
    options = {"weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    model = method.prepare(base, r=8, lora_alpha=16, task_type="SEQ_CLS", total_steps=STEPS, seed=3)
    model.train()
    for phase in (batches[:SEARCH], batches[SEARCH:]):
        optimizer = method.create_optimizer(model, 0.01, **options)
        for step, batch in enumerate(phase):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            if phase is not batches[SEARCH:] and hasattr(model.base_model, "update_and_allocate"):
                model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        if hasattr(model.base_model, "update_and_allocate"):
            model = tangora.from_adalora(model)
    return model, optimizer


def test_the_trainer_does_what_one_would_write_by_hand(tmp_path):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    trainer = made(tmp_path, model=tiny_bert(**still), changes={"lr_scheduler_type": "constant"})
    trainer.train()
    model, optimizer = by_hand(trainer.seen, tiny_bert(**still))
    assert isinstance(optimizer, TangentMuon)
    expected, found = weights(model), weights(trainer.model)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    ranks = [pair.shape[2] for pair in find_pairs(trainer.model)]
    assert len(set(ranks)) > 1
    assert sum(ranks) <= 8 * len(ranks) + ranks.count(1)


def test_steps_data_and_schedules_of_both_phases(tmp_path):
    trainer = made(tmp_path, changes={"warmup_steps": 6})
    output = trainer.train()
    plain = made(tmp_path, "tangent")
    plain.train()
    assert output.global_step == trainer.state.global_step == STEPS
    assert len(trainer.seen) == STEPS
    for ours, theirs in zip(trainer.seen, plain.seen, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
    for ours, theirs in zip(trainer.states, plain.states, strict=True):
        assert torch.equal(ours, theirs)
    # half of each phase is warm-up, as half of all is
    first, second = [0, 0.01, 0.02, 0.01], [0, 0.0025, 0.005, 0.0075, 0.01, 0.0075, 0.005, 0.0025]
    assert trainer.rates == pytest.approx([*first, *second])


@pytest.mark.parametrize("step", [2, SEARCH, 8])
def test_training_goes_on_from_a_checkpoint_of_either_phase(tmp_path, step):
    changes = {"save_strategy": "steps", "save_steps": 2}
    whole = made(tmp_path, changes=changes)
    whole.train()
    resumed = made(tmp_path / "other", changes=changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.state.global_step == STEPS
    assert len(resumed.seen) == STEPS - step
    assert_equal(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("step", [4, 10])  # ranks are moved until step 8
def test_adalora_alone_goes_on_from_a_checkpoint(tmp_path, step):
    changes = {"save_strategy": "steps", "save_steps": 2}
    whole = made(tmp_path, "adalora", changes=changes)
    whole.train()
    resumed = made(tmp_path, "adalora", changes=changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_equal(weights(whole.model), weights(resumed.model))


def test_a_training_that_somebody_stops_in_the_first_phase_ends_there(tmp_path):
    class Stop(trainers.transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    trainer = made(tmp_path, callbacks=[Stop()])
    assert trainer.train().global_step == 2
    assert trainer.model.peft_config["default"].peft_type == "ADALORA"


def test_options_of_the_search_follow_the_name():
    method = recipe("adalora+tangent@search_fraction=0.5@search_lr=1e-3@retraction=svd")
    assert method.search == RankSearch(fraction=0.5, lr=1e-3)
    assert method.name == "adalora+tangent@retraction=svd@search_fraction=0.5@search_lr=0.001"
    assert method.search.num_steps(20) == 10
    for total, steps in ((4, 3), (9, 3), (12, 4), (100, 33)):
        assert recipe(NAME).search.num_steps(total) == steps


@pytest.mark.messages
def test_what_cannot_be_done_is_refused(tmp_path):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
    with pytest.raises(InputError, match="load_best_model_at_end cannot be used with recipe 'adalora"):
        made(tmp_path, changes=best, eval_dataset=DATA)
    with pytest.raises(InputError, match="model_init cannot be used with recipe 'adalora"):
        made(tmp_path, model_init=fresh)
    with pytest.raises(InputError, match="at least 4 optimizer steps; got 3"):
        made(tmp_path, changes={"max_steps": 3}).train()
    trainer = made(tmp_path, changes={"max_steps": 4})
    with pytest.raises(InputError, match="holds no checkpoint: leave resume_from_checkpoint out"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    with pytest.raises(InputError, match="make a new Trainer"):
        trainer.train()
    for option in ("search_fraction=1", "search_fraction=0", "search_lr=0"):
        with pytest.raises(InputError, match=f"{option.split('=')[0]} must be a number in "):
            recipe(f"adalora+tangent@{option}")
    with pytest.raises(InputError, match="must be one of"):
        recipe("tangent@search_lr=1e-3")
