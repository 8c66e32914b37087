"""Load an adapter with transformers and PEFT alone, and write what the base and the adapter say.

Called by ``round_trip.py`` in a process of its own; tangora is not imported.

    python benchmarks/plain_peft.py BASE ADAPTER IDS OUTPUT --dtype float32
"""

import sys
from pathlib import Path
from typing import Any

import torch
import typer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel


def base_model(source: str, kind: str) -> PreTrainedModel:
    """Load a base model as its user would.

    Args:
        source: Folder.
        kind: ``float32``, ``bfloat16`` or ``nf4``.

    Returns:
        The model in evaluation mode.
    """
    options: dict[str, Any] = {"dtype": torch.bfloat16 if kind == "bfloat16" else torch.float32}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return AutoModelForCausalLM.from_pretrained(source, local_files_only=True, **options).eval()


def main(base: str, adapter: Path, ids: Path, output: Path, dtype: str = "float32") -> None:
    """Write the logits of the base, and of the base with the adapter.

    Args:
        base: Folder of the base model.
        adapter: Folder of the adapter.
        ids: Safetensors file with ``ids``.
        output: Safetensors file to write.
        dtype: ``float32``, ``bfloat16`` or ``nf4``.
    """
    tokens = load_file(ids)["ids"]
    with torch.no_grad():
        model = base_model(base, dtype)
        plain = model(input_ids=tokens).logits.float().clone()
        adapted = PeftModel.from_pretrained(model, adapter).eval()
        save_file({"base": plain, "adapted": adapted(input_ids=tokens).logits.float()}, output)
    assert not any(name.partition(".")[0] == "tangora" for name in sys.modules)


if __name__ == "__main__":
    typer.run(main)
