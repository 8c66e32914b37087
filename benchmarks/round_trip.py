"""Is what is saved what was trained? SmolLM2-135M, ten steps from LoRA-GA, read back by plain PEFT in a new process.

For every base (float32, bfloat16, NF4) and every configuration: the largest difference between the trained model's
logits and those of PEFT's model on a freshly loaded base, next to the rounding of the trained model's own (float32
against float64, where the base allows it); whether the base's tensors are the same bit for bit as before the start; and
whether `disable_adapter` gives the base's logits.

    python benchmarks/round_trip.py --output benchmarks/round_trip.json      # continues what is there
    python benchmarks/round_trip.py --bases nf4 --configs lora,dora
"""

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plain_peft import base_model
from record import ROOT, Target, environment, print_targets, save_record, target_records
from tangora import initialize, save_adapter
from tangora.training.data import encode, load_task
from tangora.training.models import load_model

MODEL, RANK, STEPS, BATCH, LEARNING_RATE = "smollm2-135m", 8, 10, (2, 64), 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {
        "rank_pattern": {"q_proj": 4, "layers.0.mlp.down_proj": 16},
        "alpha_pattern": {"v_proj": 32},
    },
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}
# for bfloat16: what its rounding does to the base's own logits on these tokens, measured against float64
LIMITS = {"float32": 1e-4, "bfloat16": 1.45, "nf4": 1e-4}


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Hash all tensors of a base model, packed ones included.

    Args:
        model: Base model, before or after an adapter was put on it.

    Returns:
        Hashes by the names of the plain model's tensors.
    """
    names = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_" in name or "modules_to_save" in name:
            continue
        plain = (
            name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        )
        names[plain] = hashlib.sha256(
            tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
    return names


def train(model: PeftModel, batches: list[dict[str, Tensor]]) -> list[float]:
    """Start from LoRA-GA and take ten steps.

    Args:
        model: PEFT model.
        batches: Model inputs with labels.

    Returns:
        The losses.
    """
    initialize(model, "lora-ga", batches[:2], seed=0, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model.train()(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def texts(tokenizer: Any) -> tuple[list[Tensor], Tensor]:
    """Cut news articles into batches.

    Args:
        tokenizer: Of the model.

    Returns:
        Four batches to train on, and one to compare logits on.
    """
    task = load_task("bbc-news", kind="causal", num_train=4 * BATCH[0], num_validation=0, num_test=BATCH[0])
    batches = []
    for examples in (task.train, task.test):
        encoded = encode(examples, tokenizer, kind="causal", max_length=BATCH[1])
        batches.append(torch.tensor([row["input_ids"] for row in encoded]).view(-1, *BATCH))
    return list(batches[0]), batches[1][0]


def round_trip(
    source: str, base: str, options: dict[str, Any], data: tuple[list[Tensor], Tensor], folder: Path
) -> dict[str, Any]:
    """Train, save, and read back in a new process.

    Args:
        source: Folder of the base model.
        base: ``float32``, ``bfloat16`` or ``nf4``.
        options: Of the LoRA configuration.
        data: Tokens of the training batches, and those on which logits are compared.
        folder: Scratch folder.

    Returns:
        The differences.
    """
    torch.manual_seed(0)
    model = base_model(source, base)
    before = fingerprint(model)
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    tokens, ids = data
    losses = train(adapted, [{"input_ids": batch, "labels": batch} for batch in tokens])
    with torch.no_grad():
        trained = adapted.eval()(input_ids=ids).logits.float()
        with adapted.disable_adapter():
            disabled = adapted(input_ids=ids).logits.float()
    after = fingerprint(adapted)
    saved = save_adapter(adapted, folder / "adapter")
    save_file({"ids": ids}, folder / "ids.safetensors")
    script = Path(__file__).with_name("plain_peft.py")
    arguments = [source, folder / "adapter", folder / "ids.safetensors", folder / "logits.safetensors"]
    subprocess.run([sys.executable, script, *arguments, "--dtype", base], check=True, cwd=ROOT)
    read = load_file(folder / "logits.safetensors")
    rounding = None
    if base != "nf4":
        with torch.no_grad():
            rounding = (adapted.double()(input_ids=ids).logits - trained).abs().max().item()
    return {
        "logits": (read["adapted"] - trained).abs().max().item(),
        "rounding_of_trained": rounding,
        "disabled": (disabled - read["base"]).abs().max().item(),
        "base_unchanged": before == after,
        "rank": saved.rank,
        "size_of_logits": trained.abs().max().item(),
        "effect_of_training": (trained - disabled).abs().max().item(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def main(
    bases: str = ",".join(LIMITS),
    configs: str = ",".join(CONFIGS),
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Run the round trips and record the differences.

    Args:
        bases: Separated by commas.
        configs: Separated by commas.
        output: JSON file to write; cases that it holds are kept.
    """
    facts = environment()
    loaded = load_model(MODEL, kind="causal")
    source, data = str(loaded.model.name_or_path), texts(loaded.tokenizer)
    del loaded
    settings = {"model": MODEL, "rank": RANK, "steps": STEPS, "batch": BATCH, "lr": LEARNING_RATE}
    cases = json.loads(output.read_text(encoding="utf-8"))["cases"] if output and output.exists() else {}
    for base, name in itertools.product(bases.split(","), configs.split(",")):
        if f"{base} {name}" in cases:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            result = round_trip(source, base, CONFIGS[name], data, Path(scratch))
        cases[f"{base} {name}"] = result | {"commit": facts["commit"]}
        print(base, name, result, flush=True)
        if output is not None:
            record = {"benchmark": "round_trip", "environment": facts, "settings": settings, "cases": cases}
            save_record(output, record | {"targets": target_records(targets(cases))})
    print_targets(targets(cases))


def targets(cases: dict[str, dict[str, Any]]) -> list[Target]:
    """Judge the round trips.

    Args:
        cases: What `round_trip` returned, by base and configuration.

    Returns:
        Three targets for each.
    """
    return [
        target
        for name, case in cases.items()
        for target in (
            Target(f"{name}: logits", case["logits"], LIMITS[name.split()[0]]),
            Target(f"{name}: base when disabled", case["disabled"], 0.0),
            Target(f"{name}: base bit-identical", float(case["base_unchanged"]), 1.0, at_least=True),
        )
    ]


if __name__ == "__main__":
    typer.run(main)
