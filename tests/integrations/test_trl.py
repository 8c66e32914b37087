"""TRL's trainers train by our recipes and optimizers, in every way of giving them one."""

import math

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model

import tangora
from tangora import InputError
from tangora.adapters import has_offset
from tangora.init import started_by
from tests.integrations.hosts import has_trl
from tests.models import WORDS, tiny_llama, tiny_tokenizer
from tests.training.trainers import assert_equal, weights

if not has_trl():
    pytest.skip("no trl>=1.16", allow_module_level=True)
import trl

# of packages that a user of tangora can do nothing about, and LoRA-Pro's of a model as small as this
pytestmark = pytest.mark.filterwarnings("ignore")

RATE = 1e-2
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


def sentence(number, length=4):
    return " ".join(WORDS[(number * 5 + step * (number % 3 + 1)) % 7] for step in range(length))


PROMPTS = datasets.Dataset.from_dict({"prompt": [sentence(number, 3) for number in range(16)]})
TEXTS = datasets.Dataset.from_dict({"text": [sentence(number, 6) for number in range(16)]})
PREFERENCES = PROMPTS.add_column("chosen", [" " + sentence(number + 7) for number in range(16)]).add_column(
    "rejected", [" " + sentence(number + 3) for number in range(16)]
)
COMPARED = PREFERENCES.remove_columns("prompt")


def reward(completions, **_):
    return [float(len(set(completion.split()))) for completion in completions]


GENERATION = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "temperature": 1.0}
KINDS = {
    "sft": ("SFTTrainer", "SFTConfig", TEXTS, {"max_length": 8}, {}),
    "dpo": ("DPOTrainer", "DPOConfig", PREFERENCES, {"max_length": 16}, {}),
    "reward": ("RewardTrainer", "RewardConfig", COMPARED, {"max_length": 16}, {}),
    "grpo": ("GRPOTrainer", "GRPOConfig", PROMPTS, GENERATION, {"reward_funcs": reward}),
}


def model_for(kind):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    base = tiny_llama(attention_dropout=0.0)
    if kind == "reward":
        base.config.num_labels = 1
        base = LlamaForSequenceClassification(base.config)
    return get_peft_model(base, LoraConfig(**LORA, task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM"))


def made(kind, folder, model=None, *, front=False, changes=None, **options):
    """Make TRL's trainer of a kind, with `tangora.Trainer` in front of it or not."""
    trainer, config, data, settings, more = KINDS[kind]
    arguments = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": RATE,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "bf16": False, "seed": 3,
        "lr_scheduler_type": "constant", "gradient_checkpointing": False, "logging_steps": 1,
    }  # fmt: skip
    its = getattr(trl, trainer)
    its = type(its.__name__, (tangora.Trainer, its), {}) if front else its
    return its(
        model=model or model_for(kind),
        args=getattr(trl, config)(**arguments | settings | (changes or {})),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        **more,
        **options,
    )


def by_optimizers(kind, folder):
    model = model_for(kind)
    return made(kind, folder, model, optimizers=(tangora.create_tangent_adam(model, lr=RATE), None))


def by_factory(kind, folder):
    factory = tangora.optimizer_factory(tangora.TangentAdam, lr=RATE)
    if kind in ("sft", "reward"):
        return made(kind, folder, optimizer_cls_and_kwargs=factory)
    trainer = made(kind, folder)  # the others take none
    trainer.optimizer_cls_and_kwargs = factory
    return trainer


def by_class(kind, folder):
    return made(kind, folder, front=True, recipe="tangent")


def by_recipe(kind, folder):
    return tangora.apply_recipe(made(kind, folder), "tangent")


@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_train_the_same_and_only_the_adapter(tmp_path, kind):
    trained = []
    for way in (by_optimizers, by_factory, by_class, by_recipe):
        trainer = way(kind, tmp_path)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert isinstance(optimizer, tangora.TangentAdam)
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n in weights(trainer.model) if ".default" in n}
        trained.append({name: p for name, p in weights(trainer.model).items() if ".default" in name})
    assert trained[0]
    for other in trained[1:]:
        assert_equal(trained[0], other)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model, adapter=None):
    tokens = torch.arange(4, 12).reshape(2, 4)
    with torch.no_grad():
        if adapter is None:
            with model.disable_adapter():
                return model(input_ids=tokens).logits
        active = model.active_adapters[0]
        model.set_adapter(adapter)
        found = model(input_ids=tokens).logits
        model.set_adapter(active)
        return found


@pytest.mark.parametrize(
    ("kind", "start"), [("dpo", "lora-ga"), ("dpo", "orthogonal"), ("dpo", "pissa"), ("grpo", "lora-ga")]
)
def test_after_an_initialization_the_reference_is_the_base(tmp_path, kind, start):
    model = model_for(kind).eval()
    tokens = tiny_tokenizer()(TEXTS["text"][:8], return_tensors="pt")
    batch = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    tangora.initialize(
        model, start, [batch | {"labels": tokens["input_ids"]}] if start == "lora-ga" else None, seed=0
    )
    base = logits(model)
    trainer = tangora.apply_recipe(made(kind, tmp_path, model), "tangent")
    torch.testing.assert_close(logits(trainer.model, "ref"), base)
    trainer.train()
    torch.testing.assert_close(logits(trainer.model.eval(), "ref"), base)
    torch.testing.assert_close(logits(trainer.model), base)
    assert (logits(trainer.model, "default") - base).abs().max() > 1e-3
    if kind == "dpo":
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
        tangora.save_adapter(trainer.model, tmp_path / "adapter")
        served = tangora.load_adapter(model_for(kind).unload(), tmp_path / "adapter").eval()
        torch.testing.assert_close(
            logits(served, "default"), logits(trainer.model, "default"), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("peft_config", [False, True], ids=["its model", "peft_config"])
def test_a_recipe_initializes_with_the_loss_of_dpo(tmp_path, peft_config):
    if peft_config:  # without a reference adapter: the reference is the model with its adapter off
        base = model_for("dpo").unload()
        config = LoraConfig(**LORA, task_type="CAUSAL_LM")
        trainer = tangora.apply_recipe(made("dpo", tmp_path, base, peft_config=config), "lora-ga+tangent")
    else:
        trainer = made("dpo", tmp_path, front=True, recipe="lora-ga+tangent")
    base = logits(trainer.model.eval())
    trainer.train()
    assert started_by(trainer.model) == "lora-ga"
    assert has_offset(trainer.model, "default")
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    torch.testing.assert_close(logits(trainer.model.eval()), base)
    if not peft_config:
        torch.testing.assert_close(logits(trainer.model, "ref"), base)


def test_gradients_of_what_grpo_generates_later_are_refused(tmp_path):
    with pytest.raises(InputError, match="GRPOTrainer generates its inputs"):
        tangora.apply_recipe(made("grpo", tmp_path), "lora-ga").train()
    with pytest.raises(InputError, match=r"GRPOTrainer generates its inputs.*: use a method"):
        tangora.apply_recipe(made("grpo", tmp_path), "odelora-heun").train()
    trainer = tangora.apply_recipe(made("grpo", tmp_path), "orthogonal+tangent-muon")
    trainer.train()
    assert started_by(trainer.model) == "orthogonal"


def test_several_gradients_per_step_are_those_of_the_loss_of_dpo(tmp_path):
    trainer = tangora.apply_recipe(made("dpo", tmp_path), "odelora-heun", learning_rate=0.3)
    trainer.train()
    assert trainer.replay_seconds > 0
    assert losses(trainer)[1] < losses(trainer)[0]


def test_trainers_that_cannot_take_a_recipe_stay_as_they_were(tmp_path):
    trainer = made("sft", tmp_path)
    kind, held = type(trainer), dict(vars(trainer))
    for recipe, options, match in [
        ("tangnt", {}, "did you mean tangent"),
        (None, {}, "got None"),
        ("dora", {}, "needs an adapter with use_dora=True"),
        ("tangent", {"learning_rate": -1.0}, "learning_rate must be"),
    ]:
        with pytest.raises(InputError, match=match):
            tangora.apply_recipe(trainer, recipe, **options)
        assert type(trainer) is kind
        assert vars(trainer).keys() == held.keys()
        assert all(vars(trainer)[key] is held[key] for key in held)
    tangora.apply_recipe(trainer, "tangent")
    assert isinstance(trainer, kind)
    with pytest.raises(InputError, match=r"already a tangora\.Trainer"):
        tangora.apply_recipe(trainer, "tangent")
    with pytest.raises(InputError, match="already has an optimizer"):
        tangora.apply_recipe(by_optimizers("sft", tmp_path), "tangent")
    with pytest.raises(InputError, match="both select an optimizer"):
        tangora.apply_recipe(by_factory("sft", tmp_path), "tangent")
    with pytest.raises(InputError, match="LlamaForCausalLM has none: pass peft_config="):
        tangora.apply_recipe(made("sft", tmp_path, tiny_llama()), "tangent")
    with pytest.raises(InputError, match=r"must be a transformers\.Trainer"):
        tangora.apply_recipe(tiny_llama(), "tangent")


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = tangora.apply_recipe(made("dpo", tmp_path, changes=changes), "orthogonal+tangent")
    whole.train()
    resumed = tangora.apply_recipe(made("dpo", tmp_path, changes=changes), "orthogonal+tangent")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(whole.model), weights(resumed.model))
