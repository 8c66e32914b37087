"""Preference training (DPO) with TRL by a recipe of tangora: `python examples/trl_dpo.py` (no hub needed)."""

import argparse
from pathlib import Path

import datasets
import trl
from peft import LoraConfig, get_peft_model

import tangora

DATA = Path(__file__).parent / "data"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--recipe", default="orthogonal+tangent")
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="trl-dpo")
options = parser.parse_args()

loaded = tangora.load_model(options.model, kind="causal")
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


# or apply_recipe, as in trl_sft.py; the class also takes a base model and peft_config=
class DPO(tangora.Trainer, trl.DPOTrainer):
    """TRL's trainer, by a recipe."""


trainer = DPO(
    get_peft_model(loaded.model, config),
    args=trl.DPOConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
    ),
    train_dataset=datasets.load_dataset("json", data_files=f"{DATA}/preferences.jsonl", split="train"),
    processing_class=loaded.tokenizer,
    recipe=options.recipe,
    learning_rate=options.learning_rate,
)
trainer.train()
tangora.save_adapter(trainer.model, f"{options.output}/adapter")
