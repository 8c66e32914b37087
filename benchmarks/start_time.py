"""Time of an initialization from gradients next to PEFT's LoRA-GA, and the gradient energy that it captures.

All starts take turns in one process, each on a fresh copy of the base model, on batches of real text. Captured is the
share of the energy of the mean gradient that lies in the tangent space of the started factors, from dense gradients of
some of the layers. On a quiet machine:

    python benchmarks/start_time.py --output benchmarks/start_time.json
    python benchmarks/start_time.py --quick          # does it run? (tiny model, numbers mean nothing)
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from record import (
    Case,
    Target,
    environment,
    interleaved,
    print_table,
    print_targets,
    ratios,
    save_record,
    spread,
    target_records,
)
from start_memory import config_for
from tangora import find_pairs
from tangora.geometry.tangent import dense_captured_energy, frame
from tangora.init import initialize
from tangora.probes import GradientProbe, Request, probed_layers
from tangora.training.data import collator, encode, load_task
from tangora.training.models import load_model

ADAPTIVE, FOUR, ONE, PEFT = "initialize", "initialize, four passes", "initialize, one pass", "PEFT's LoRA-GA"
OPTIONS: dict[str, dict[str, Any]] = {ADAPTIVE: {}, FOUR: {"power_iterations": 1}, ONE: {"one_pass": True}}
TIME_LIMIT = 1.2
AS_GOOD = 0.95

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Attributes:
        model: Name of the model.
        data: Text that the gradient is taken on.
        rank: Rank of the adapters, on all linear layers but the head.
        batch: Sequences and largest number of tokens per sequence.
        num_batches: Batches that the starts read.
        blocks: Every so many blocks a gradient is formed to see what a start captures.
        rounds: Rounds of interleaved timing.
        quick: A tiny model and random tokens.
    """

    model: str = "smollm2-135m"
    data: str = "bbc-news"
    rank: int = 8
    batch: tuple[int, int] = (4, 256)
    num_batches: int = 4
    blocks: int = 10
    rounds: int = 3
    quick: bool = False


def loaded(settings: Settings) -> tuple[nn.Module, list[Batch]]:
    """Load the base model and the batches.

    Args:
        settings: Which.

    Returns:
        A causal language model, and its inputs with labels.
    """
    size, length = settings.batch
    if settings.quick:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 512}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        ids = [torch.randint(512, (size, 32)) for _ in range(settings.num_batches)]
        return model, [{"input_ids": each, "labels": each} for each in ids]
    found = load_model(settings.model, kind="causal")
    count = size * settings.num_batches
    task = load_task(settings.data, kind="causal", num_train=count)
    data = encode(task.train[:count], found.tokenizer, kind="causal", max_length=length)
    collate = collator(found.tokenizer, "causal")
    batches = [
        dict(collate([data[index] for index in range(start, start + size)]))
        for start in range(0, count, size)
    ]
    return found.model, batches


def started(case: str, model: Any, batches: list[Batch], settings: Settings) -> tuple[PeftModel, int]:
    """Give a new adapter its start.

    Args:
        case: Which start.
        model: Base model; PEFT's start changes its weights.
        batches: What the gradient is averaged over.
        settings: For the adapter.

    Returns:
        The model, and the number of passes over the batches.
    """
    if case != PEFT:
        adapted = get_peft_model(model, config_for(model, settings))
        assert isinstance(adapted, PeftModel)
        return adapted, initialize(adapted, "lora-ga", batches, progress=False, **OPTIONS[case]).passes

    def read() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    config = config_for(model, settings, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(model, config, read)
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted, 1


def dense_gradients(model: nn.Module, batches: list[Batch], blocks: int) -> dict[str, Tensor]:
    """Form the mean gradient of the linear layers of some blocks.

    Args:
        model: Base model.
        batches: What the gradient is averaged over.
        blocks: The first block, and every so many.

    Returns:
        By the name of the layer.
    """
    chosen = [
        layer
        for layer in probed_layers(model)
        if any(part.isdigit() and int(part) % blocks == 0 for part in layer.name.split("."))
    ]
    with GradientProbe(model, chosen) as probe:
        readings = probe.read(batches, {layer.name: Request(dense=True) for layer in chosen})
    return {name: reading.dense for name, reading in readings.items()}


def captured(model: PeftModel, gradients: dict[str, Tensor]) -> float:
    """Average over layers the share of the gradient that a started adapter can follow.

    Args:
        model: The started model.
        gradients: Dense gradients at the base model.

    Returns:
        Mean of kappa.
    """
    shares = [
        float(dense_captured_energy(frame(*pair.factors()), gradients[name]))
        for pair in find_pairs(model)
        if (name := pair.name.removeprefix("base_model.model.")) in gradients
    ]
    return sum(shares) / len(shares)


def measure(settings: Settings) -> dict[str, dict[str, Any]]:
    """Measure all starts.

    Args:
        settings: Settings of the measurement.

    Returns:
        Seconds, passes and captured energy of each.
    """
    base, batches = loaded(settings)
    gradients = dense_gradients(base, batches, settings.blocks)
    fresh: list[nn.Module] = []
    results: dict[str, tuple[PeftModel, int]] = {}

    def prepare() -> None:
        results.clear()
        fresh[:] = [copy.deepcopy(base)]

    def run(case: str) -> None:
        results[case] = started(case, fresh[0], batches, settings)

    found: dict[str, dict[str, Any]] = {}
    for case in (*OPTIONS, PEFT):
        prepare()
        run(case)
        model, passes = results[case]
        found[case] = {"captured": captured(model, gradients), "passes": passes}
    timed: list[str] = [ADAPTIVE, FOUR, PEFT]
    runs: dict[str, Callable[[], None]] = {case: functools.partial(run, case) for case in timed}
    times = interleaved([Case(case, runs[case], prepare, warmup=0) for case in timed], settings.rounds)
    for case in timed:
        found[case] |= {"seconds": spread(times[case]), "times_peft": ratios(times, case, PEFT)}
    return found


def main(
    output: Path | None = None,
    model: str = "smollm2-135m",
    data: str = "bbc-news",
    rank: int = 8,
    rounds: int = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny model: does it run?")] = False,
) -> None:
    """Measure all starts and record them.

    Args:
        output: JSON file to write.
        model: Name of the model.
        data: Text that the gradient is taken on.
        rank: Rank of the adapters.
        rounds: Rounds of timing.
        quick: A tiny model.
    """
    settings = Settings(
        model, data, rank, rounds=1 if quick else rounds, blocks=1 if quick else 10, quick=quick
    )
    facts = environment()
    found = measure(settings)
    rows = [
        (
            case,
            str(one["passes"]),
            f"{one['captured']:.3f}",
            f"{one['seconds']['median']:.1f}" if "seconds" in one else "",
            f"{one['times_peft']['median']:.2f}" if "seconds" in one else "",
        )
        for case, one in found.items()
    ]
    print_table("starts", ("start", "passes", "captured", "seconds", "times PEFT's"), rows)
    targets = [
        Target("time of initialize / PEFT's", found[ADAPTIVE]["times_peft"]["median"], TIME_LIMIT),
        Target(
            "captured by initialize / by four passes",
            found[ADAPTIVE]["captured"] / found[FOUR]["captured"],
            AS_GOOD,
            at_least=True,
        ),
    ]
    print_targets(targets, judged=not quick)
    if output is not None:
        record = {
            "benchmark": "start_time",
            "environment": facts,
            "settings": asdict(settings),
            "starts": found,
            "targets": target_records(targets),
        }
        typer.echo(f"wrote {save_record(output, record).name}")


if __name__ == "__main__":
    typer.run(main)
