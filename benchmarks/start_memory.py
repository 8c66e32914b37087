"""Memory of an initialization from gradients, next to that of the training that follows and of PEFT's LoRA-GA.

Each case has a process of its own, twice: once for the peak of its resident memory and its time, once with a counter of
the tensors that are alive. All peaks are above the loaded base model. On a quiet machine:

    python benchmarks/start_memory.py --output benchmarks/start_memory.json
    python benchmarks/start_memory.py --quick          # does it run? (tiny model, numbers mean nothing)
"""

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from record import Target, environment, print_table, print_targets, save_record, target_records
from tangora.experiments.run.estimate import LiveTensors
from tangora.init import initialize
from tangora.training.models import load_model

TRAINING, START, PEFT = "two LoRA training steps", 'initialize("lora-ga")', "PEFT's LoRA-GA"
LIMIT = 1.10
MB = 2**20

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Attributes:
        model: Name of the model; of no meaning in a quick run.
        rank: Rank of the adapters, on all linear layers but the head.
        batch: Sequences and tokens per sequence.
        num_batches: Batches that the starts read.
        quick: A tiny model.
    """

    model: str = "smollm2-135m"
    rank: int = 8
    batch: tuple[int, int] = (4, 256)
    num_batches: int = 4
    quick: bool = False


def base_model(settings: Settings) -> nn.Module:
    """Load the model that is measured, in float32.

    Args:
        settings: Which.

    Returns:
        The base model.
    """
    if not settings.quick:
        return load_model(settings.model, kind="causal").model
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab_size": 512}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def batches_for(model: Any, settings: Settings) -> list[Batch]:
    """Draw random tokens, which take the memory of any others.

    Args:
        model: Model, for the size of its vocabulary.
        settings: Sizes.

    Returns:
        Model inputs with labels.
    """
    generator = torch.Generator().manual_seed(0)
    draws = [
        torch.randint(model.config.vocab_size, settings.batch, generator=generator)
        for _ in range(settings.num_batches)
    ]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in draws]


def config_for(model: nn.Module, settings: Settings, **options: Any) -> LoraConfig:
    """Return the adapter's config.

    Args:
        model: Base model.
        settings: For the rank.
        **options: Passed on.

    Returns:
        LoRA on all linear layers but the head, by name: PEFT's LoRA-GA does not know ``all-linear``.
    """
    names = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    targets = sorted(names - {"lm_head"})
    return LoraConfig(r=settings.rank, lora_alpha=16, target_modules=targets, **options)


def train(model: Any, batches: list[Batch], settings: Settings) -> None:
    """Take two ordinary training steps.

    Args:
        model: Base model.
        batches: One for each step.
        settings: For the adapter.
    """
    adapted = get_peft_model(model, config_for(model, settings)).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    for batch in batches[:2]:
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        optimizer.step()


def start(model: Any, batches: list[Batch], settings: Settings) -> None:
    """Give an adapter the start, as a user would.

    Args:
        model: Base model.
        batches: What the gradient is averaged over.
        settings: For the adapter.
    """
    adapted = get_peft_model(model, config_for(model, settings))
    assert isinstance(adapted, PeftModel)
    initialize(adapted, "lora-ga", batches, progress=False)


def start_by_peft(model: Any, batches: list[Batch], settings: Settings) -> None:
    """Do the same with PEFT's own functions.

    Args:
        model: Base model.
        batches: What the gradient is averaged over.
        settings: For the adapter.
    """

    def read() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    config = config_for(model, settings, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(model, config, read)
    get_peft_model(model, config)


CASES: dict[str, Callable[[Any, list[Batch], Settings], None]] = {
    TRAINING: train,
    START: start,
    PEFT: start_by_peft,
}


def resident(field: str) -> float:
    """Return a size of this process.

    Args:
        field: ``VmRSS``, or ``VmHWM`` for its peak.

    Returns:
        Megabytes.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure(case: str, settings: Settings, *, traced: bool) -> dict[str, float]:
    """Run one case in this process.

    Args:
        case: Its name.
        settings: Settings.
        traced: Whether to count tensors, which takes time, instead of reading the process's peak.

    Returns:
        Peaks above the loaded model in megabytes, and seconds.
    """
    model = base_model(settings)
    batches = batches_for(model, settings)
    with torch.no_grad():  # what libraries allocate once is not the case's
        model(**{key: value[:1, :8] for key, value in batches[0].items()})
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if traced:
        batches = batches[:2]  # each pass repeats the peak of its first batch
        with LiveTensors([*model.parameters(), *model.buffers()]) as tensors:
            CASES[case](model, batches, settings)
        return {"tensors_mb": tensors.peak / MB}
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = resident("VmRSS")
    began = time.perf_counter()
    CASES[case](model, batches, settings)
    return {
        "seconds": time.perf_counter() - began,
        "model_mb": before,
        "resident_mb": resident("VmHWM") - before,
    }


def in_own_process(case: str, settings: Settings, *, traced: bool) -> dict[str, float]:
    """Run one case in a process of its own.

    Args:
        case: Its name.
        settings: Settings.
        traced: See `measure`.

    Returns:
        What `measure` found.
    """
    task = json.dumps({"case": case, "traced": traced, "settings": asdict(settings)})
    command = [sys.executable, "-W", "ignore", __file__, "--task", task]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    output: Path | None = None,
    model: str = "smollm2-135m",
    rank: int = 8,
    batch: Annotated[int, typer.Option(help="Sequences per batch.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    num_batches: int = 4,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny model: does it run?")] = False,
    task: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure all cases and record them.

    Args:
        output: JSON file to write.
        model: Name of the model.
        rank: Rank of the adapters.
        batch: Sequences per batch.
        tokens: Tokens per sequence.
        num_batches: Batches that the starts read.
        quick: A tiny model.
        task: What a process of its own is to do.
    """
    if task is not None:
        asked = json.loads(task)
        settings = Settings(**asked["settings"])
        print(json.dumps(measure(asked["case"], settings, traced=asked["traced"])))
        return
    settings = Settings(model, rank, (batch, tokens), num_batches, quick)
    facts = environment()
    found = {
        case: in_own_process(case, settings, traced=False) | in_own_process(case, settings, traced=True)
        for case in CASES
    }
    rows = [
        (case, f"{one['tensors_mb']:.0f}", f"{one['resident_mb']:.0f}", f"{one['seconds']:.1f}")
        for case, one in found.items()
    ]
    print_table("peak above the loaded model", ("case", "tensors, MB", "resident, MB", "seconds"), rows)
    targets = [
        Target(f"{what} of initialize / training", found[START][key] / found[TRAINING][key], LIMIT)
        for what, key in (("tensors", "tensors_mb"), ("resident memory", "resident_mb"))
    ]
    print_targets(targets, judged=not quick)
    if output is not None:
        record = {
            "benchmark": "start_memory",
            "environment": facts,
            "settings": asdict(settings),
            "cases": found,
            "targets": target_records(targets),
        }
        typer.echo(f"wrote {save_record(output, record).name}")


if __name__ == "__main__":
    typer.run(main)
