"""Cost of a product with the Hessian, in LoRA gradients and in memory.

All products and the gradient take turns in one process, on the same model and batch, and are compared round by round.
The gradient is what LoRA training computes: a forward pass with the model's own attention and ``backward()``. Memory is
the peak of tensors alive above the model during the second of two calls (so that a kept graph counts). On a quiet
machine:

    python benchmarks/hvp.py --model minilm-l6 --model smollm2-135m --output benchmarks/hvp.json
    python benchmarks/hvp.py --quick          # does it run? (tiny model, numbers mean nothing)
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
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
from tangora.curvature import Hessian
from tangora.experiments.run.estimate import LiveTensors
from tangora.training.models import load_model

GRADIENT = "LoRA gradient"
STREAMED, CACHED = "streamed", "cached graph"
MB = 2**20
STD = 0.02  # of both factors: away from B = 0, where half of the Hessian vanishes

# model: kind, sequences and tokens per sequence
MODELS = {"minilm-l6": ("classification", (16, 64)), "smollm2-135m": ("causal", (4, 128))}
LIMITS = {STREAMED: 2.5, CACHED: 1.4}
"""Cost of a product over the factors, in gradients."""


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Attributes:
        models: Names of the models; of no meaning in a quick run.
        rank: Rank of the adapters, on all linear layers but the head.
        rounds: Rounds of timing.
        weights: Whether to measure full weight matrices, too.
        device: Where.
        quick: A tiny model.
    """

    models: tuple[str, ...]
    rank: int = 8
    rounds: int = 10
    weights: bool = True
    device: str = "cpu"
    quick: bool = False


def adapted(name: str, settings: Settings) -> tuple[nn.Module, dict[str, Tensor]]:
    """Make the model that is measured, and a batch.

    Args:
        name: Of the model.
        settings: Settings.

    Returns:
        PEFT model with random factors, in float32, and its inputs with labels.
    """
    torch.manual_seed(0)
    if settings.quick:
        kind, shape = "causal", (2, 16)
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 512}
        base: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    else:
        kind, shape = MODELS[name]
        base = load_model(name, kind=kind, num_labels=5 if kind == "classification" else None).model  # pyright: ignore
    names = {path.rpartition(".")[2] for path, layer in base.named_modules() if isinstance(layer, nn.Linear)}
    config = LoraConfig(
        r=settings.rank, lora_alpha=16, target_modules=sorted(names - {"lm_head", "classifier"})
    )
    model = get_peft_model(base, config).to(settings.device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(STD * torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(base.config.vocab_size, shape, generator=generator)
    labels = tokens if kind == "causal" else torch.randint(5, shape[:1], generator=generator)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    return model, {key: value.to(settings.device) for key, value in batch.items()}


def operators(model: nn.Module, batch: Mapping[str, Tensor], settings: Settings) -> dict[str, Hessian]:
    """Make every operator that is measured.

    Args:
        model: PEFT model.
        batch: The one batch.
        settings: Settings.

    Returns:
        By name.
    """
    made = {}
    for over in ("factors", "tangent", *(("weights",) if settings.weights else ())):
        for how, cache_graph in ((STREAMED, False), (CACHED, True)):
            made[f"{over}, {how}"] = Hessian(model, [batch], over=over, cache_graph=cache_graph)
    made["factors, finite difference"] = Hessian(model, [batch], differentiation="finite_difference")
    return made


def gradient_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    """Make the baseline.

    Args:
        model: PEFT model.
        batch: Its inputs.

    Returns:
        What computes one gradient, and drops it.
    """

    def gradient() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    return gradient


def product_of(operator: Hessian) -> Callable[[], None]:
    """Make one product.

    Args:
        operator: The Hessian.

    Returns:
        What computes it.
    """
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(0)).to(operator.device)

    def product() -> None:
        operator.matvec(vector)

    return product


def peak_mb(run: Callable[[], None], model: nn.Module) -> float:
    """Measure the peak of live tensors.

    Args:
        run: What is measured, called twice.
        model: Whose tensors do not count.

    Returns:
        Megabytes.
    """
    gc.collect()
    with LiveTensors([*model.parameters(), *model.buffers()]) as tensors:
        run()
        gc.collect()
        tensors.peak = tensors.live
        run()
    return tensors.peak / MB


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Measure one model.

    Args:
        name: Of the model.
        settings: Settings.

    Returns:
        Seconds, ratios, memory and sizes.
    """
    model, batch = adapted(name, settings)
    made = operators(model, batch, settings)
    gradient = gradient_of(model, batch)
    memory = {GRADIENT: peak_mb(gradient, model)}
    for key, operator in made.items():
        memory[key] = peak_mb(product_of(operator), model)
        operator.release()
    # one kept graph at a time: several would fill the memory of a small machine
    times: dict[str, list[float]] = {}
    shares: dict[str, dict[str, float]] = {}
    streamed = [key for key in made if CACHED not in key]
    for group in (streamed, *([key] for key in made if CACHED in key)):
        cases = [
            Case(GRADIENT, gradient, warmup=1),
            *(Case(key, product_of(made[key]), warmup=2) for key in group),
        ]
        found = interleaved(cases, settings.rounds, settings.device)
        shares |= {key: ratios(found, key, GRADIENT) for key in group}
        times |= {GRADIENT: [*times.get(GRADIENT, []), *found.pop(GRADIENT)]} | found
        for key in group:
            made[key].release()
    show(name, times, shares, memory)
    return {
        "batch": list(batch["input_ids"].shape),
        "dimensions": {key.partition(",")[0]: operator.size for key, operator in made.items()},
        "seconds": {key: spread(values) for key, values in times.items()},
        "in_gradients": shares,
        "peak_mb": memory,
        "finite_difference_discrepancy": made["factors, finite difference"].discrepancy,
    }


def show(
    name: str,
    times: Mapping[str, list[float]],
    shares: Mapping[str, Mapping[str, float]],
    memory: Mapping[str, float],
) -> None:
    """Print a table.

    Args:
        name: Of the model.
        times: Seconds.
        shares: In gradients.
        memory: Megabytes.
    """
    rows = []
    for key, values in times.items():
        ratio = f"{shares[key]['median']:.2f}" if key in shares else "1"
        rows.append((key, f"{spread(values)['median']:.3f}", ratio, f"{memory[key]:.0f}"))
    print_table(name, ("product", "seconds", "in gradients", "peak MB"), rows)


def targets(results: Mapping[str, Any]) -> list[Target]:
    """Judge the products over the factors.

    Args:
        results: Of `measure`, by model.

    Returns:
        The targets.
    """
    return [
        Target(f"{name}: factors, {how}", result["in_gradients"][f"factors, {how}"]["median"], limit)
        for name, result in results.items()
        for how, limit in LIMITS.items()
    ]


def run(settings: Settings) -> dict[str, Any]:
    """Measure everything.

    Args:
        settings: Settings.

    Returns:
        The record: environment, settings, results and targets.
    """
    facts = environment(settings.device)
    results = {name: measure(name, settings) for name in settings.models}
    judged = targets(results)
    print_targets(judged, judged=not settings.quick)
    return {
        "benchmark": "hvp",
        "environment": facts,
        "settings": {**asdict(settings), "factors_std": STD, "dtype": "float32"},
        "results": results,
        "targets": target_records(judged),
    }


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="minilm-l6 or smollm2-135m; may be repeated. Without it: both.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of interleaved timing.")] = 10,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    weights: Annotated[bool, typer.Option(help="Also full weight matrices.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny model, 2 rounds: does it run?")] = False,
) -> None:
    """Time products with the Hessian against LoRA gradients."""
    settings = Settings(tuple(model or MODELS), rank, rounds, weights, device)
    if quick:
        settings = replace(settings, models=("tiny",), rounds=2, quick=True)
    record = run(settings)
    if output is not None:
        typer.echo(f"wrote {save_record(output, record).name}")


if __name__ == "__main__":
    typer.run(main)
