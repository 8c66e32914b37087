"""Unsloth's trainer and kernels: what they do on stand-ins of those for GPUs, and Unsloth's own trainer for CPUs."""

import functools
import types

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import tangora
from tangora import InputError
from tangora.init import started_by
from tests.integrations.hosts import RATE, assert_served, installed, logits, sentence, write_base
from tests.models import tiny_llama, tiny_tokenizer
from tests.training.trainers import assert_equal, parts, weights

pytestmark = pytest.mark.filterwarnings("ignore")


class Regrouping(transformers.Trainer):
    """Makes an optimizer as `UnslothTrainer` does: of groups, if embeddings or B get a learning rate of their own."""

    def create_optimizer(self, model=None):
        if getattr(self.args, "embedding_learning_rate", None) is None:
            return super().create_optimizer(model)
        kind, options = self.optimizer_cls_and_kwargs
        groups = [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": RATE}]
        self.optimizer = kind(groups, **options)
        return self.optimizer


def test_an_optimizer_that_would_get_groups_instead_of_the_model_is_refused(tmp_path):
    options = parts(tmp_path)
    options["optimizer_cls_and_kwargs"] = tangora.optimizer_factory(tangora.TangentAdam, lr=RATE)
    assert isinstance(Regrouping(**options).create_optimizer(), tangora.TangentAdam)
    trainer = Regrouping(**options)
    trainer.args.embedding_learning_rate = 1e-4
    with pytest.raises(InputError, match=r"TangentAdam needs the model.*embedding_learning_rate"):
        trainer.create_optimizer()


@pytest.mark.parametrize("name", ["embedding_learning_rate", "loraplus_lr_ratio", "q_galore_config"])
def test_options_that_a_recipe_would_silently_replace_are_refused(tmp_path, name):
    trainer = Regrouping(**parts(tmp_path))
    setattr(trainer.args, name, 16.0)
    with pytest.raises(InputError, match=f"{name} of TrainingArguments selects another optimizer"):
        tangora.apply_recipe(trainer, "tangent")
    options = parts(tmp_path)
    setattr(options["args"], name, 16.0)
    with pytest.raises(InputError, match=name):
        tangora.Trainer(**options, recipe="tangent")


def apply_lora_qkv(self, x):
    """Compute a projection from the factors, past the forward pass of its layer, as the fused kernels do."""
    layer = self.q_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.base_layer
    return nn.functional.linear(x, base.weight, base.bias) + layer.scaling["default"] * x @ A.T @ B.T


apply_lora_qkv.__module__ = "unsloth.kernels.fast_lora"


def fused(part):
    """Return a model that Unsloth would have made on a GPU, with one part fused."""
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "gate_proj"], task_type="CAUSAL_LM")
    )
    block = model.get_base_model().model.layers[0]
    if part == "attention":  # a function, not a method
        block.self_attn.apply_qkv = apply_lora_qkv
    else:
        block.mlp.forward = types.MethodType(functools.partial(apply_lora_qkv), block.mlp)
    return model


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("start", ["orthogonal", "lora-one"])  # with an offset, and with gradients
def test_layers_that_fused_kernels_compute_past_are_not_initialized(part, start):
    model = fused(part)
    tokens = torch.arange(8).reshape(2, 4)
    batches = [{"input_ids": tokens, "labels": tokens}] if start == "lora-one" else None
    before = weights(model)
    with pytest.raises(InputError, match=r"Unsloth's fused LoRA kernel in .*layers\.0"):
        tangora.initialize(model, start, batches, seed=0)
    assert_equal(before, weights(model))
    assert started_by(model) is None


def test_plain_functions_of_axolotl_are_no_kernels():
    def original_apply_qkv(self, x):
        return self.q_proj(x)

    original_apply_qkv.__module__ = "axolotl.monkeypatch.lora_kernels"
    model = fused("attention")
    attention = model.get_base_model().model.layers[0].self_attn
    attention.apply_qkv = types.MethodType(original_apply_qkv, attention)
    tangora.initialize(model, "orthogonal", seed=0)
    original_apply_qkv.__name__ = "apply_lora_qkv"
    attention.apply_qkv = types.MethodType(original_apply_qkv, attention)
    with pytest.raises(InputError, match="Axolotl's fused LoRA kernel"):
        tangora.initialize(model, "orthogonal", seed=0)


@pytest.mark.parametrize("way", ["factory", "recipe", "class"])
def test_unsloth_itself_trains_on_a_cpu(monkeypatch, tmp_path, way):
    monkeypatch.setenv("UNSLOTH_IS_PRESENT", "1")
    unsloth = installed("unsloth")
    import datasets

    base = write_base(tmp_path)
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        base, max_seq_length=16, load_in_4bit=False, dtype=torch.float32
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=2, lora_alpha=4, use_gradient_checkpointing=False
    )
    data = datasets.Dataset.from_dict({"text": [sentence(number, 6) for number in range(16)]})
    args = unsloth.UnslothTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, learning_rate=RATE,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False, max_length=16,
    )  # fmt: skip
    given = {"model": model, "args": args, "train_dataset": data, "processing_class": tiny_tokenizer()}
    kind = unsloth.UnslothTrainer
    if way == "factory":
        factory = tangora.optimizer_factory(tangora.TangentAdam, lr=RATE)
        trainer = kind(**given, optimizer_cls_and_kwargs=factory)
    elif way == "recipe":
        trainer = tangora.apply_recipe(kind(**given), "lora-ga+tangent")
    else:
        trainer = type("Its", (tangora.Trainer, kind), {})(**given, recipe="lora-ga+tangent")
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, tangora.TangentAdam)
    tangora.save_adapter(trainer.model, tmp_path / "adapter")
    assert_served(trainer.model, base, tmp_path / "adapter")
    args.embedding_learning_rate = 1e-4
    if way == "factory":
        with pytest.raises(InputError, match="embedding_learning_rate"):
            kind(**given, optimizer_cls_and_kwargs=factory).create_optimizer()
    assert logits(trainer.model).isfinite().all()
