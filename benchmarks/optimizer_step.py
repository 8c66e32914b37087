"""Time of one optimizer step on the adapters of SmolLM2-135M, and the size of its state.

All optimizers take turns in one process, each on its own adapters (only the shapes of the model are needed), and are
compared round by round. With ``--model`` also the share of a real training step of 1024 tokens. On a quiet machine:

    python benchmarks/optimizer_step.py --model smollm2-135m --output benchmarks/optimizer_step.json
    python benchmarks/optimizer_step.py --quick          # does it run? (tiny shapes, numbers mean nothing)
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from published_lora_pro import PublishedLoRAPro
from published_lora_tsd import PublishedLoRATSD
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
    timed,
)
from tangora import LoraPair, LoRAPro, PreconditionedAdamW, TangentAdam, TangentMuon, find_pairs
from tangora.optim import LoRAMuon, LoRARITE, PoLoRA
from tangora.training.models import load_model

# SmolLM2-135M: 30 blocks of these linear layers, (out, in)
NUM_BLOCKS = 30
BLOCK = {
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}
LR = 1e-6  # the factors stay what they were drawn as, so that every round times the same work
STD = 0.02
GRADIENT_STD = 1e-3

FOREACH, FUSED, DEFAULT = "AdamW(foreach=True)", "AdamW(fused=True)", "AdamW(params)"
FOR_LOOP = "AdamW(foreach=False)"
TANGENT, TANGENT_SVD = "TangentAdam(auto)", "TangentAdam(svd)"
FACTOR, WEIGHT, PLAIN = "LoRAPro(factor)", "LoRAPro(weight)", "LoRAPro(None)"
PRECONDITIONED = "PreconditionedAdamW"
MUON, MUON_4 = "TangentMuon(auto)", "TangentMuon(iterations=4)"
LORA_MUON, POLORA, RITE = "LoRAMuon", "PoLoRA", "LoRARITE"
PUBLISHED_TSD = "published, per layer (LoRA-TSD)"
PUBLISHED_FACTOR, PUBLISHED_WEIGHT = "published, per layer (factor)", "published, per layer (weight)"
FULL = " on m x n weights"

Make = Callable[[PeftModel], Any]
"""From an adapted model to something with ``step()`` and ``state``."""


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Attributes:
        ranks: Ranks of the adapters.
        rounds: Rounds of interleaved timing.
        slow_rounds: Rounds that the published algorithm takes part in.
        device: ``cpu`` or ``cuda``.
        weights: Whether to time moments of the weights' size (needs about 6 GB).
        model: Name of the model for a real training step, or ``None``.
        batch: Sequences and tokens per sequence of that step.
        quick: One block of a quarter of the size, rank at most 8.
    """

    ranks: tuple[int, ...]
    rounds: int
    slow_rounds: int
    device: str
    weights: bool
    model: str | None
    batch: tuple[int, int] = (8, 128)
    quick: bool = False

    def shapes(self) -> list[tuple[int, int]]:
        """Return the (out, in) of every adapted layer."""
        if self.quick:
            return [(m // 4, n // 4) for m, n in BLOCK.values()]
        return [shape for _ in range(NUM_BLOCKS) for shape in BLOCK.values()]


def adamw(parameters: Any, **options: Any) -> torch.optim.AdamW:
    """Return torch's AdamW, without decay like all optimizers here: it must not do work that the others do not.

    Args:
        parameters: What it steps.
        **options: ``foreach`` or ``fused``; without them torch chooses for the device.

    Returns:
        The optimizer.
    """
    return torch.optim.AdamW(parameters, LR, weight_decay=0.0, **options)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that an optimizer steps.

    Args:
        model: Model.

    Returns:
        Those that require a gradient.
    """
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


ON_ADAPTERS: dict[str, Make] = {
    FOREACH: lambda model: adamw(trainable(model), foreach=True),
    FUSED: lambda model: adamw(trainable(model), fused=True),
    DEFAULT: lambda model: adamw(trainable(model)),
    PRECONDITIONED: lambda model: PreconditionedAdamW(model, LR),
    PLAIN: lambda model: LoRAPro(model, LR, moments=None),
    FACTOR: lambda model: LoRAPro(model, LR, moments="factor"),
    TANGENT: lambda model: TangentAdam(model, LR),
    TANGENT_SVD: lambda model: TangentAdam(model, LR, retraction="svd"),
    MUON: lambda model: TangentMuon(model, LR),
    MUON_4: lambda model: TangentMuon(model, LR, iterations=4),
    LORA_MUON: lambda model: LoRAMuon(model, LR),
    POLORA: lambda model: PoLoRA(model, LR),
    RITE: lambda model: LoRARITE(model, LR),
    PUBLISHED_FACTOR: lambda model: PublishedLoRAPro(find_pairs(model), LR, "factor"),
    PUBLISHED_TSD: lambda model: PublishedLoRATSD(find_pairs(model), LR),
}
OF_WEIGHT_SIZE: dict[str, Make] = {
    WEIGHT: lambda model: LoRAPro(model, LR, moments="weight"),
    PUBLISHED_WEIGHT: lambda model: PublishedLoRAPro(find_pairs(model), LR, "weight"),
}
# AdamW(params) is the loop over parameters on a CPU and foreach on a GPU: the other two are timed beside it
FULL_ADAMW: dict[str, dict[str, dict[str, bool]]] = {
    "cpu": {DEFAULT + FULL: {}, FOREACH + FULL: {"foreach": True}, FUSED + FULL: {"fused": True}},
    "cuda": {DEFAULT + FULL: {}, FOR_LOOP + FULL: {"foreach": False}, FUSED + FULL: {"fused": True}},
}


def adapted(
    shapes: list[tuple[int, int]], rank: int, device: str, dtype: torch.dtype = torch.float32
) -> PeftModel:
    """Wrap linear layers of the given shapes with PEFT and draw their factors at random.

    Args:
        shapes: (out, in) of each layer.
        rank: Rank.
        device: Device.
        dtype: Of the factors.

    Returns:
        The model; its base weights are zeros that take no memory.
    """
    layers = nn.ModuleList()
    for m, n in shapes:
        layer = nn.Linear(n, m, bias=False, device="meta")
        zero = torch.zeros((), device=device, dtype=dtype)
        layer.weight = nn.Parameter(zero.expand(m, n), requires_grad=False)
        layers.append(layer)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r"\d+")
    model = get_peft_model(layers, config, autocast_adapter_dtype=False)  # pyright: ignore[reportArgumentType]
    randomize(model)
    return model


def randomize(model: PeftModel) -> None:
    """Draw all factors at random: the steady state, where B is no longer zero.

    Args:
        model: Its trainable parameters are changed.
    """
    for parameter in trainable(model):
        parameter.data.normal_(std=STD)


def refresh_pairs(pairs: list[LoraPair]) -> None:
    r"""Draw new gradients of the factors that belong to one gradient $g$ of the weight, as in training.

    Independent ones would not: $g_A A^\top = B^\top g_B$ must hold. $g = P Q$ of rank 32 is drawn through its factors.

    Args:
        pairs: Their parameters get new ``grad`` tensors.
    """
    for pair in pairs:
        A, B = pair.factors()
        m, n, _ = pair.shape
        P = torch.randn(m, 32, device=A.device, dtype=A.dtype) * GRADIENT_STD
        Q = torch.randn(32, n, device=A.device, dtype=A.dtype)
        pair.A.grad = pair.scaling * ((B.mT @ P) @ Q)
        pair.B.grad = pair.scaling * (P @ (Q @ A.mT))


def refresh_weights(weights: list[nn.Parameter]) -> None:
    """Draw new random gradients of full weights.

    Args:
        weights: Their ``grad`` is made or overwritten.
    """
    for weight in weights:
        weight.grad = torch.empty_like(weight) if weight.grad is None else weight.grad
        weight.grad.normal_(std=GRADIENT_STD)


def state_bytes(optimizer: Any) -> int:
    """Count what an optimizer keeps from step to step.

    Args:
        optimizer: Anything with ``state``.

    Returns:
        Bytes of all state tensors.
    """
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in tensors if isinstance(value, Tensor))


def measure(
    optimizers: Mapping[str, tuple[Any, Callable[[], None]]],
    compared: Mapping[str, list[str]],
    settings: Settings,
) -> dict[str, Any]:
    """Time optimizers against each other.

    Args:
        optimizers: By name, the optimizer, and what gives it new gradients before each step.
        compared: For each baseline, the names divided by it.
        settings: Rounds and device.

    Returns:
        ``seconds``, ``ratios`` (name, then baseline) and ``state_bytes``.
    """
    cases = [
        Case(name, optimizer.step, prepare, warmup=2, rounds=settings.slow_rounds)
        if name.startswith("published")
        else Case(name, optimizer.step, prepare)
        for name, (optimizer, prepare) in optimizers.items()
    ]
    times = interleaved(cases, settings.rounds, settings.device)
    return {
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratios": {
            name: {
                baseline: ratios(times, name, baseline) for baseline in compared if name in compared[baseline]
            }
            for name in times
            if any(name in names for names in compared.values())
        },
        "state_bytes": {name: state_bytes(optimizer) for name, (optimizer, _) in optimizers.items()},
    }


def on_adapters(settings: Settings, rank: int) -> dict[str, Any]:
    """Time what keeps no more than the factors' size.

    Args:
        settings: Settings.
        rank: Rank.

    Returns:
        See `measure`.
    """
    optimizers: dict[str, tuple[Any, Callable[[], None]]] = {}
    for name, make in ON_ADAPTERS.items():
        model = adapted(settings.shapes(), rank, settings.device)
        optimizers[name] = (make(model), partial(refresh_pairs, find_pairs(model)))
    adamws = [FOREACH, FUSED, DEFAULT]
    compared = {name: [*ON_ADAPTERS] for name in adamws}
    compared |= {FACTOR: [PUBLISHED_FACTOR], TANGENT: [PUBLISHED_FACTOR, MUON], MUON: [PUBLISHED_TSD]}
    return measure(optimizers, compared, settings)


def of_weight_size(settings: Settings, rank: int) -> dict[str, Any]:
    """Time LoRA-Pro with moments of the weights' size against AdamW on the weights.

    Args:
        settings: Settings.
        rank: Rank.

    Returns:
        See `measure`.
    """
    optimizers: dict[str, tuple[Any, Callable[[], None]]] = {}
    for name, make in OF_WEIGHT_SIZE.items():
        model = adapted(settings.shapes(), rank, settings.device)
        optimizers[name] = (make(model), partial(refresh_pairs, find_pairs(model)))
    weights = [
        nn.Parameter(torch.empty(shape, device=settings.device).normal_(std=STD))
        for shape in settings.shapes()
    ]
    variants = FULL_ADAMW["cuda" if settings.device.startswith("cuda") else "cpu"]
    for name, options in variants.items():
        optimizers[name] = (adamw(weights, **options), partial(refresh_weights, weights))
    compared = {name: [WEIGHT, PUBLISHED_WEIGHT, *variants] for name in variants}
    return measure(optimizers, {**compared, WEIGHT: [PUBLISHED_WEIGHT]}, settings)


def agreement(moments: str) -> float:
    """Check that what is timed as the published algorithm computes what tangora computes.

    Args:
        moments: ``factor`` or ``weight``.

    Returns:
        Relative difference of the weights' total change after three steps in float64; the published damping of 1e-8
        and its effect through Adam's normalisation are what is left.
    """
    changes = []
    for published in (True, False):
        torch.manual_seed(0)
        model = adapted([(48, 36), (24, 40)], 4, "cpu", torch.float64)
        pairs = find_pairs(model)
        optimizer = (
            PublishedLoRAPro(pairs, 1e-4, moments)  # pyright: ignore[reportArgumentType]
            if published
            else LoRAPro(model, 1e-4, moments=moments)  # pyright: ignore[reportArgumentType]
        )
        before = [pair.delta_weight() for pair in pairs]
        for _ in range(3):
            refresh_pairs(pairs)
            optimizer.step()
        after = [pair.delta_weight() for pair in pairs]
        changes.append(torch.cat([(x - y).flatten() for x, y in zip(after, before, strict=True)]))
    return float((changes[0] - changes[1]).norm() / changes[1].norm())


def training_step(settings: Settings) -> dict[str, Any]:
    """Measure which share of a real LoRA training step the optimizer takes.

    Every optimizer step follows a backward pass of its own, so that it finds the caches as training leaves them.

    Args:
        settings: Model, batch, rounds and device.

    Returns:
        ``forward_backward`` and ``optimizer`` seconds, and the ``share`` of their sum, by optimizer.
    """
    assert settings.model is not None
    base = load_model(settings.model, kind="causal").model
    base.to(settings.device)  # pyright: ignore[reportArgumentType]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    torch.manual_seed(0)
    randomize(model)
    model.train()
    tokens = torch.randint(base.config.vocab_size, settings.batch, device=settings.device)

    def forward_backward() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    names = (FOREACH, FACTOR, TANGENT, TANGENT_SVD, MUON)
    optimizers = {name: ON_ADAPTERS[name](model) for name in names}
    for optimizer in optimizers.values():
        for _ in range(2):
            forward_backward()
            optimizer.step()
    backward: dict[str, list[float]] = {name: [] for name in names}
    steps: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(settings.slow_rounds):
        for name, optimizer in optimizers.items():
            backward[name].append(timed(forward_backward, settings.device))
            steps[name].append(timed(optimizer.step, settings.device))
    return {
        "model": settings.model,
        "tokens": tokens.numel(),
        "rank": 8,
        "adapted_layers": len(find_pairs(model)),
        "forward_backward": spread([seconds for values in backward.values() for seconds in values]),
        "optimizer": {name: spread(steps[name]) for name in names},
        "share": {
            name: spread([x / (x + y) for x, y in zip(steps[name], backward[name], strict=True)])
            for name in names
        },
    }


def targets(
    ranks: Mapping[int, dict[str, Any]], training: dict[str, Any] | None, device: str
) -> list[Target]:
    """Hold the numbers against what DESIGN promises.

    Args:
        ranks: Results per rank.
        training: What `training_step` returned, or ``None``.
        device: Device.

    Returns:
        The targets that could be measured in this run.
    """
    found = []
    for rank, results in ranks.items():
        found += _targets_on_adapters(rank, results["adapters"], device)
        if "weights" in results:
            found += _targets_of_weight_size(rank, results["weights"])
    if training is not None:
        found += [
            Target(f"{name}: share of a training step", training["share"][name]["median"], 0.05)
            for name in (TANGENT, FACTOR)
        ]
        found.append(Target(f"{MUON}: share of a training step", training["share"][MUON]["median"], 0.01))
    return found


def _targets_on_adapters(rank: int, results: dict[str, Any], device: str) -> list[Target]:
    def ratio(name: str, baseline: str) -> float:
        return results["ratios"][name][baseline]["median"]

    state = results["state_bytes"]
    found = []
    if device.startswith("cuda"):
        found += [
            Target(f"{name} / {FUSED}, r = {rank}", ratio(name, FUSED), 2.0) for name in (TANGENT, FACTOR)
        ]
    elif rank <= 8:
        limits = {TANGENT: 3.0, FACTOR: 2.5, MUON: 3.0}
        found += [
            Target(f"{name} / {FOREACH}, r = {rank}", ratio(name, FOREACH), limit)
            for name, limit in limits.items()
        ]
    else:
        found += [
            Target(f"{name} / {FOREACH}, r = {rank}", ratio(name, FOREACH), 15.0)
            for name in (TANGENT, FACTOR)
        ]
    if rank <= 8:
        found.append(
            Target(f"{PUBLISHED_FACTOR} / {FACTOR}, r = {rank}", ratio(PUBLISHED_FACTOR, FACTOR), 25.0, True)
        )
    if rank > 8:
        found.append(Target(f"{MUON} / {TANGENT}, r = {rank}", ratio(MUON, TANGENT), 1.0))
    found += [
        Target(f"{name} / AdamW, state, r = {rank}", state[name] / state[FOREACH], limit)
        for name, limit in ((TANGENT, 0.55), (MUON, 0.51))
    ]
    return found


def _targets_of_weight_size(rank: int, results: dict[str, Any]) -> list[Target]:
    table = results["ratios"]
    baseline = DEFAULT + FULL
    found = [Target(f"{WEIGHT} / {baseline}, r = {rank}", table[WEIGHT][baseline]["median"], 1.5)]
    if rank <= 8:
        speed_up = table[PUBLISHED_WEIGHT][WEIGHT]["median"]
        found.append(Target(f"{PUBLISHED_WEIGHT} / {WEIGHT}, r = {rank}", speed_up, 25.0, True))
    return found


def show(ranks: Mapping[int, dict[str, Any]], training: dict[str, Any] | None) -> None:
    """Print all numbers.

    Args:
        ranks: Results per rank.
        training: What `training_step` returned, or ``None``.
    """
    for rank, groups in ranks.items():
        for group, results in groups.items():
            baselines = sorted({baseline for row in results["ratios"].values() for baseline in row})
            rows = [
                (
                    name,
                    *(f"{1e3 * seconds[key]:.2f}" for key in ("median", "min", "max")),
                    f"{results['state_bytes'][name] / 2**20:.1f}",
                    *(_cell(results["ratios"].get(name, {}).get(baseline)) for baseline in baselines),
                )
                for name, seconds in results["seconds"].items()
            ]
            heads = [f"/ {_short(name)}" for name in baselines]
            print_table(f"{group}, r = {rank}", ("", "ms", "min", "max", "MiB", *heads), rows)
    if training is not None:
        rows = [
            (name, f"{1e3 * seconds['median']:.1f}", f"{100 * training['share'][name]['median']:.2f} %")
            for name, seconds in training["optimizer"].items()
        ]
        seconds = training["forward_backward"]["median"]
        title = f"training step of {training['tokens']} tokens, forward + backward {seconds:.3f} s"
        print_table(title, ("", "ms", "share"), rows)


def _short(name: str) -> str:
    inside = name.removesuffix(FULL).partition("(")[2].rstrip(")")
    return {"params": "default", "auto": "tangent"}.get(inside, inside.removesuffix("=True"))


def _cell(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f}"


def run(settings: Settings) -> dict[str, Any]:
    """Measure everything.

    Args:
        settings: Settings.

    Returns:
        The record: environment, settings, results and targets.
    """
    facts = environment(settings.device)
    torch.manual_seed(0)
    ranks: dict[int, dict[str, Any]] = {}
    for rank in settings.ranks:
        ranks[rank] = {"adapters": on_adapters(settings, rank)}
        gc.collect()
        if settings.weights:
            ranks[rank]["weights"] = of_weight_size(settings, rank)
            gc.collect()
    training = training_step(settings) if settings.model else None
    show(ranks, training)
    judged = targets(ranks, training, settings.device)
    print_targets(judged, judged=not settings.quick)
    return {
        "benchmark": "optimizer_step",
        "environment": facts,
        "settings": {
            **asdict(settings),
            "layers": len(settings.shapes()),
            "lr": LR,
            "factors_std": STD,
            "gradients_std": GRADIENT_STD,
            "weight_decay": 0.0,
            "dtype": "float32",
        },
        "published_equals_ours": {moments: agreement(moments) for moments in ("factor", "weight")},
        "ranks": {str(rank): results for rank, results in ranks.items()},
        "training_step": training,
        "targets": target_records(judged),
    }


def main(
    rank: Annotated[
        list[int] | None, typer.Option(help="Rank; may be repeated. Without it: 8 and 64.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of interleaved timing.")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    model: Annotated[str | None, typer.Option(help="Also time a training step of it: smollm2-135m.")] = None,
    weights: Annotated[bool, typer.Option(help="Also moments of the weights' size; needs 6 GB.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes, 2 rounds: does it run?")] = False,
) -> None:
    """Time one step of every optimizer on the adapters of SmolLM2-135M."""
    ranks = tuple(rank or (8, 64))
    settings = Settings(ranks, rounds, min(rounds, 5), device, weights, model)
    if quick:
        small = tuple(sorted({min(r, 8) for r in ranks}))
        settings = replace(settings, ranks=small, rounds=2, slow_rounds=1, batch=(2, 16), quick=True)
    record = run(settings)
    if output is not None:
        typer.echo(f"wrote {save_record(output, record).name}")


if __name__ == "__main__":
    typer.run(main)
