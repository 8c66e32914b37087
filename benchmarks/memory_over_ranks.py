"""Memory of training, by method and rank: optimizer states against their formulas, and the peak of all tensors.

Tensors are counted as they are made and freed, so the numbers do not depend on the machine. All are above the loaded
base model.

    python benchmarks/memory_over_ranks.py --output benchmarks/memory_over_ranks.json
    python benchmarks/memory_over_ranks.py --quick          # does it run? (tiny model, numbers mean nothing)
"""

import gc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from formulas import FLOAT, STATES, state
from optimizer_step import state_bytes
from record import Target, environment, print_table, print_targets, save_record, target_records
from start_memory import MB, Settings, base_model, batches_for
from tangora.adapters import find_pairs
from tangora.experiments.run.estimate import LiveTensors
from tangora.recipes import recipe

STEPS = 2

MEASURED = ("lora", "p-lora", "tangent", "lora-pro-factor", "lora-pro")
FULL = "full"


def measure(name: str, settings: Settings) -> dict[str, float]:
    """Take a few training steps.

    Args:
        name: A recipe.
        settings: For model, rank and batch.

    Returns:
        Megabytes: optimizer state, what the formula says of it, what is trained, peak of all tensors.
    """
    model: Any = base_model(settings)
    batches = batches_for(model, replace(settings, num_batches=STEPS))
    with LiveTensors([*model.parameters(), *model.buffers()]) as tensors:
        adapted = recipe(name).prepare(
            model, r=settings.rank, lora_alpha=2 * settings.rank, task_type="CAUSAL_LM", total_steps=STEPS
        )
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = recipe(name).create_optimizer(adapted.train(), 1e-4)
        for batch in batches:
            adapted(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        peak = tensors.peak
    count = sum(p.numel() for p in trained)
    wanted = 2 * count if name == FULL else state(name, [pair.shape for pair in find_pairs(adapted)])
    return {
        "state": state_bytes(optimizer) / MB,
        "formula": FLOAT * wanted / MB,
        "trained": FLOAT * count / MB,
        "peak": peak / MB,
    }


def main(
    output: Path | None = None,
    model: str = "smollm2-135m",
    ranks: Annotated[str, typer.Option(help="Separated by commas.")] = "1,8,64,128",
    batch: Annotated[int, typer.Option(help="Sequences per batch.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny model: does it run?")] = False,
) -> None:
    """Measure all methods at all ranks and record them.

    Args:
        output: JSON file to write.
        model: Name of the model.
        ranks: Ranks of the adapters.
        batch: Sequences per batch.
        tokens: Tokens per sequence.
        quick: A tiny model.
    """
    torch.manual_seed(0)
    settings = Settings(model, 1, (batch, tokens), STEPS, quick)
    facts = environment()
    wanted = [int(rank) for rank in ranks.split(",")]
    cases = [(FULL, None), *((name, rank) for rank in wanted for name in MEASURED)]
    found = []
    for name, rank in cases:
        gc.collect()
        sizes = measure(name, replace(settings, rank=rank or 1))
        found.append({"recipe": name, "rank": rank, **sizes})
    rows = [
        (
            one["recipe"],
            str(one["rank"] or ""),
            *(f"{one[key]:.2f}" for key in ("state", "formula", "trained", "peak")),
        )
        for one in found
    ]
    print_table("megabytes", ("recipe", "rank", "state", "formula", "trained", "peak above the model"), rows)
    targets = [
        Target(
            "largest |state / formula - 1|",
            max(abs(one["state"] / one["formula"] - 1) for one in found),
            0.01,
        )
    ]
    print_targets(targets)
    if output is not None:
        record = {
            "benchmark": "memory_over_ranks",
            "environment": facts,
            "settings": asdict(settings) | {"ranks": wanted},
            "formulas": {name: STATES[name].text for name in MEASURED},
            "cases": found,
            "targets": target_records(targets),
        }
        typer.echo(f"wrote {save_record(output, record).name}")


if __name__ == "__main__":
    typer.run(main)
