"""Fine-tuning with Unsloth by a recipe of tangora: `python examples/unsloth_sft.py`, with or without a GPU."""

import argparse
from pathlib import Path

import unsloth  # before transformers and PEFT, which it changes

# isort: split
import datasets

import tangora

DATA = Path(__file__).parent / "data"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--recipe", default="tangent-muon")  # its layers are fused on a GPU: no initialization
parser.add_argument("--learning-rate", type=float, default=0.01)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", default="unsloth-sft")
options = parser.parse_args()

model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
    options.model, max_seq_length=256, load_in_4bit=False
)
model = unsloth.FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
data = datasets.load_dataset("json", data_files=f"{DATA}/instructions.jsonl", split="train")
data = data.map(
    lambda row: {"text": f"{row['instruction']} {row['output']}"}, remove_columns=data.column_names
)
trainer = unsloth.UnslothTrainer(
    model=model,
    args=unsloth.UnslothTrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    ),
    train_dataset=data,
    processing_class=tokenizer,
)
tangora.apply_recipe(trainer, options.recipe, learning_rate=options.learning_rate)
trainer.train()
tangora.save_adapter(trainer.model, f"{options.output}/adapter")
