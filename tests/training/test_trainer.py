"""Three ways into a Trainer, several gradients per step, and what it must refuse."""

import copy

import pytest
import torch
import transformers

import tangora
from tangora import InputError, TangentAdam
from tests.models import tiny_bert
from tests.processes import in_processes
from tests.training.trainers import RATE, assert_equal, parts, weights


def test_all_ways_train_alike(tmp_path):
    results = []
    for way in ("recipe", "name", "optimizers", "factory"):
        options = parts(tmp_path / way)
        if way == "recipe":
            trainer = tangora.Trainer(**options, recipe=tangora.recipe("tangent"))
        elif way == "name":
            trainer = tangora.Trainer(**options, recipe="tangent")
        elif way == "optimizers":
            optimizer = TangentAdam(options["model"], lr=RATE)
            trainer = transformers.Trainer(**options, optimizers=(optimizer, None))
        else:
            factory = tangora.optimizer_factory(TangentAdam, lr=RATE)
            trainer = transformers.Trainer(**options, optimizer_cls_and_kwargs=factory)
        trainer.train()
        results.append(weights(options["model"]))
    for other in results[1:]:
        assert_equal(results[0], other)


def test_recipe_takes_the_arguments_of_the_trainer(tmp_path):
    trainer = tangora.Trainer(**parts(tmp_path, weight_decay=0.1, adam_beta2=0.95), recipe="lora-pro")
    trainer.create_optimizer()
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (RATE, 0.1, (0.9, 0.95))


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

    trainer = Both(**parts(tmp_path), extra=3, recipe="tangent")
    trainer.train()
    assert trainer.extra == 3
    assert isinstance(trainer.optimizer.optimizer, TangentAdam)


def test_adalora_moves_its_ranks(tmp_path):
    options = {"r": 2, "lora_alpha": 4, "task_type": "SEQ_CLS", "total_steps": 12}
    model = tangora.recipe("adalora").prepare(tiny_bert(), **options)
    tangora.Trainer(**{**parts(tmp_path, max_steps=12), "model": model}, recipe="adalora").train()
    ranks = [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]
    assert sum(ranks) < 3 * len(ranks)  # it started with rank 3 everywhere


class Recorder(tangora.Trainer):
    """Keeps what each micro-batch was, the random state it was first evaluated with, and logged losses."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.__dict__.setdefault("seen", []).append((dict(inputs), torch.get_rng_state()))
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs, *args, **kwargs):
        self.__dict__.setdefault("losses", []).extend([logs["loss"]] if "loss" in logs else [])
        super().log(logs, *args, **kwargs)


@pytest.mark.parametrize(
    ("name", "accumulate"), [("odelora-heun", 1), ("odelora-heun", 2), ("odelora-rk4", 1)]
)
def test_several_gradients_per_step_equal_a_loop_with_a_closure(tmp_path, name, accumulate):
    """With dropout: all stages of a step see one function of the weights."""
    changes = {"max_grad_norm": 0.05, "lr_scheduler_type": "constant", "logging_steps": 1}
    options = parts(tmp_path, gradient_accumulation_steps=accumulate, **changes)
    twin = copy.deepcopy(options["model"]).train()
    trainer = Recorder(**options, recipe=name)
    trainer.model_accepts_loss_kwargs = False  # else losses of micro-batches are added, not averaged
    trainer.train()
    optimizer = tangora.recipe(name).create_optimizer(twin, RATE)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    expected = []
    for first in range(0, len(trainer.seen), accumulate):

        def closure(batches=trainer.seen[first : first + accumulate]):
            optimizer.zero_grad()
            total = 0.0
            for batch, state in batches:
                torch.set_rng_state(state)
                loss = twin(**batch).loss / accumulate
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, 0.05)
            return total

        expected.append(optimizer.step(closure))
    assert len(expected) == 4
    assert trainer.losses == pytest.approx(expected, rel=1e-4)
    assert optimizer.evaluations == trainer.optimizer.optimizer.evaluations
    assert trainer.replay_seconds > 0
    found, wanted = weights(options["model"]), weights(twin)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_the_closure_of_the_trainer_is_a_function(tmp_path):
    """Evaluated again at the same weights, the gradient is the same to the last bit, dropout and all."""
    options = parts(tmp_path, gradient_accumulation_steps=2)
    trainer = tangora.Trainer(**options, recipe="odelora-heun")
    found = []

    class Compare(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            first = [p.grad.clone() for p in options["model"].parameters() if p.grad is not None]
            before = torch.get_rng_state()
            trainer.optimizer.optimizer.replay()
            again = [p.grad for p in options["model"].parameters() if p.grad is not None]
            found.append(all(torch.equal(a, b) for a, b in zip(first, again, strict=True)))
            found.append(torch.equal(before, torch.get_rng_state()))

    trainer.add_callback(Compare())
    trainer.train()
    assert found == [True] * 8


def test_replay_works_in_front_of_another_trainer_and_with_its_loss(tmp_path):
    calls = []

    class Other(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            calls.append(inputs.pop("labels"))  # as losses of other trainers do
            return model(**inputs).logits.square().mean()

    class Both(tangora.Trainer, Other):
        pass

    Both(**parts(tmp_path), recipe="odelora-heun").train()
    assert len(calls) == 8
    assert all(torch.equal(calls[k], calls[k + 1]) for k in range(0, 8, 2))


def train_two_stages(folder, accumulate=1, size=4):
    options = parts(
        folder,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.05,
        lr_scheduler_type="constant",
        per_device_train_batch_size=size,
    )
    for module in options["model"].double().eval().modules():  # masks are drawn per process
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = tangora.Trainer(**options, recipe="odelora-heun")
    trainer.model_accepts_loss_kwargs = False  # else losses of micro-batches are added, not averaged
    trainer.train()
    return weights(options["model"])


def two_stages(rank, folder):
    return {k: train_two_stages(f"{folder}/{rank}-{k}", accumulate=k, size=4 // (2 * k)) for k in (1, 2)}


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    expected = train_two_stages(tmp_path / "one")
    for found in in_processes(two_stages, tmp_path, 2, str(tmp_path)):
        for each in found.values():
            for name, value in expected.items():
                torch.testing.assert_close(each[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.messages
def test_modes_that_allow_one_gradient_only_are_refused(tmp_path):
    trainer = tangora.Trainer(**parts(tmp_path), recipe="odelora-heun")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(InputError, match="fp16 must be False"):
        trainer.train()
    factory = tangora.optimizer_factory(tangora.ODELoRA, lr=0.1)
    plain = transformers.Trainer(**parts(tmp_path), optimizer_cls_and_kwargs=factory)
    with pytest.raises(InputError, match=r"step needs a closure.*tangora\.Trainer"):
        plain.train()


@pytest.mark.messages
def test_what_is_refused(tmp_path):
    options = parts(tmp_path)
    with pytest.raises(InputError, match="recipe must be a name such as"):
        tangora.Trainer(**options, recipe=3)
    with pytest.raises(InputError, match="did you mean tangent"):
        tangora.Trainer(**options, recipe="tangant")
    optimizer = TangentAdam(options["model"], lr=RATE)
    with pytest.raises(InputError, match="recipe and optimizers both select an optimizer"):
        tangora.Trainer(**options, recipe="lora", optimizers=(optimizer, None))
    with pytest.raises(InputError, match="needs lr"):
        tangora.optimizer_factory(TangentAdam)
