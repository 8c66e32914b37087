"""Supervised fine-tuning with TRL by a recipe of tangora: `python examples/trl_sft.py` (no hub needed)."""

import argparse
from pathlib import Path

import datasets
import trl
from peft import LoraConfig

import tangora

DATA = Path(__file__).parent / "data"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--recipe", default="lora-ga+tangent-muon")
parser.add_argument("--learning-rate", type=float, default=0.01)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="trl-sft")
options = parser.parse_args()

loaded = tangora.load_model(options.model, kind="causal")
data = datasets.load_dataset("json", data_files=f"{DATA}/instructions.jsonl", split="train")
data = data.map(
    lambda row: {"prompt": row["instruction"], "completion": " " + row["output"]},
    remove_columns=data.column_names,
)
trainer = trl.SFTTrainer(
    loaded.model,
    args=trl.SFTConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
    ),
    train_dataset=data,
    processing_class=loaded.tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
tangora.apply_recipe(trainer, options.recipe, learning_rate=options.learning_rate)
trainer.train()
tangora.save_adapter(trainer.model, f"{options.output}/adapter")
