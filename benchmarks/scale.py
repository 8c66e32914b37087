"""Memory and messages of the methods at the size of published models, from their shapes: no machine, no weights.

States and messages come from the formulas in ``formulas.py``; what a step and what forward and backward passes hold
beside them is counted on fake tensors of the real shapes (``fake_steps.py``); a test holds both against small real
runs. The tables are those of ``docs/guides/scale.md``. About a minute:

    python benchmarks/scale.py --output benchmarks/scale.json
    python benchmarks/scale.py --model ./my-model --ranks 16,64 --processes 4      # of another model: its config.json
    python benchmarks/scale.py --quick                                             # does it run?
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

import formulas
from fake_steps import fake_memory, meta_model, passes_peak, step_peak
from formulas import FLOAT, HALF, STATES, Messages
from record import environment, save_record
from tangora import find_pairs
from tangora.experiments.run.estimate import materialize, nf4_bytes
from tangora.optim import gathering
from tangora.recipes import recipe

GIB = 2**30
TOKENS = (1, 2048)
CARDS = 8
FEW, MORE = 2, 4  # blocks
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "Llama-3-8B": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "Llama-3-70B": {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672}
    | {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
}
"""Sizes in the models' published config.json."""
TINY: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# steps that take no decision from numbers: ODELoRA's do, and torch's Muon is not this project's
COUNTED = tuple(name for name in STATES if name not in ("lora", "factor-muon", "odelora-euler"))
ONE_BY_ONE = "tangent-muon, foreach=False"
SHARDED = tuple(name for name in STATES if name not in ("lora", "factor-muon"))
SHOWN_MODELS = ("Llama-3-8B", "Llama-3-70B")
CARD = 24 * GIB


def computed(config: PretrainedConfig, ranks: Sequence[int], processes: int) -> dict[str, Any]:
    """Compute everything of one model that its formulas say: in bytes, but for counts."""
    model = meta_model(config, ranks[0])
    pairs = find_pairs(model)
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    adapted = {pair.name: pair.shape[0] * pair.shape[1] for pair in pairs}
    others = sum(p.numel() for p in base) - sum(adapted.values())
    blocks, embedding = config.num_hidden_layers, model.get_input_embeddings().weight.numel()
    return {
        "weights": sum(p.numel() for p in base),
        "adapted_layers": len(pairs),
        "bfloat16": HALF * sum(p.numel() for p in base),
        "nf4": sum(map(nf4_bytes, adapted.values())) + HALF * others,
        "largest_layer": HALF * max(adapted.values()),
        "block": HALF * sum(adapted.values()) // blocks,
        "outside_blocks": HALF * others,
        "base_received": HALF
        * formulas.sharded_base(sum(p.numel() for p in base), embedding).received(processes),
        "ranks": {
            str(rank): _of_rank([(*pair.shape[:2], rank) for pair in pairs], processes) for rank in ranks
        },
    }


def _of_rank(shapes: Sequence[formulas.Shape], processes: int) -> dict[str, Any]:
    def received(messages: Messages) -> float:
        return FLOAT * messages.received(processes)

    factors = [((r, n), True, True) for _, n, r in shapes] + [((m, r), True, True) for m, _, r in shapes]
    return {
        "trained": formulas.trained(shapes),
        "adapter": FLOAT * formulas.trained(shapes),
        "states": {name: FLOAT * formulas.state(name, shapes) for name in STATES},
        "read_by_start": FLOAT * formulas.read_by_start(shapes),
        "received": {
            "averaged gradients": received(formulas.averaged(shapes)),
            "sharded adapters in the passes": received(formulas.sharded_pass(factors, processes)),
            "sharded steps": {
                name: received(formulas.sharded_step(name, shapes, processes)) for name in SHARDED
            },
        },
    }


Counts = dict[str, int]


def counted(
    config: PretrainedConfig, count: Callable[[PretrainedConfig], Counts], blocks: int | None = None
) -> Counts:
    """Count with 2 and with 4 blocks and go on in a straight line, since every block adds the same."""
    blocks = config.num_hidden_layers if blocks is None else blocks
    if blocks <= MORE:
        return count(_of_blocks(config, blocks))
    few, more = (count(_of_blocks(config, each)) for each in (FEW, MORE))
    further = blocks - FEW
    return {name: few[name] + further * (more[name] - few[name]) // (MORE - FEW) for name in few}


def _of_blocks(config: PretrainedConfig, blocks: int) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = blocks
    return changed


def counted_steps(config: PretrainedConfig, rank: int) -> Counts:
    """Count what a step holds beside factors, gradients and state, in bytes.

    Layers of one shape are stepped together up to a limit, so that blocks beyond those which fill it add nothing.
    """
    pairs = find_pairs(meta_model(config, rank))
    groups = Counter(pair.shape for pair in pairs)
    largest = max(rank * (m + n) * count for (m, n, _), count in groups.items()) // config.num_hidden_layers
    blocks = min(config.num_hidden_layers, max(1, gathering._STACK_NUMBERS // largest))
    # torch's own on a GPU: `foreach` makes one copy of all factors, `fused` none
    copied = {"lora": FLOAT * formulas.trained([pair.shape for pair in pairs])}
    return copied | counted(config, partial(_counted_steps, rank=rank), blocks)


def _counted_steps(config: PretrainedConfig, rank: int) -> Counts:
    model = meta_model(config, rank)
    with fake_memory():
        materialize(model)
        found = {name: step_peak(model, _optimizer(name)) for name in COUNTED}
        found[ONE_BY_ONE] = step_peak(model, _optimizer("tangent-muon", foreach=False))
    return found


def _optimizer(name: str, **options: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: recipe(name).create_optimizer(model, 1e-4, **options)


def counted_passes(config: PretrainedConfig, rank: int, batch: tuple[int, int] = TOKENS) -> Counts:
    """Count what forward and backward passes hold beside the model, in bytes; gradients included."""
    model: PeftModel = meta_model(config, rank)
    found = {}
    with fake_memory():
        materialize(model)
        for checkpointing in (False, True):
            for autocast in (False, True):
                name = f"{'checkpointing' if checkpointing else 'plain'}{', autocast' if autocast else ''}"
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    found[name] = passes_peak(model, batch, checkpointing=checkpointing)
    return found


def total(model: Mapping[str, Any], rank: int, name: str, *, nf4: bool = False, cards: int = 1) -> float:
    """Add up what training with checkpointing holds on each card at its peak, in bytes."""
    of_rank, counted = model["ranks"][str(rank)], model["counted_passes"]
    adapter, state, step = (
        of_rank["adapter"],
        of_rank["states"][_name(name)],
        model["counted_steps"][str(rank)][name],
    )
    passes = counted["checkpointing"] + adapter - model["ranks"][str(model["passes_rank"])]["adapter"]
    base = model["nf4"] + model["largest_layer"] if nf4 else model["bfloat16"] / cards
    if cards > 1:  # a block and the next one are whole, and what is outside them
        base += 2 * model["block"] + model["outside_blocks"]
    return base + adapter + state + max(passes, adapter + step)


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Write the tables of the guide from a record."""
    models, ranks, cards = record["models"], record["settings"]["ranks"], record["settings"]["processes"]
    of_ranks = [f"r = {rank}" for rank in ranks]
    return {
        "base": _table(
            ["model", "weights", "bfloat16", "NF4, the rest bfloat16", f"bfloat16 over {cards} cards"],
            [
                [
                    name,
                    f"{each['weights'] / 1e9:.2f} billion",
                    *_gib(each["bfloat16"], each["nf4"], each["bfloat16"] / cards),
                ]
                for name, each in models.items()
            ],
        ),
        "adapter": _table(
            ["model", *of_ranks],
            [
                [
                    name,
                    *(f"{a['trained'] / 1e6:.0f} million, {_gib(a['adapter'])[0]}" for a in _by_rank(each)),
                ]
                for name, each in models.items()
            ],
        ),
        "methods": _methods(models, ranks),
        "passes": _table(
            ["model", "default", "`bf16=True`", "checkpointing", "checkpointing, `bf16=True`"],
            [[name, *_gib(*each["counted_passes"].values())] for name, each in models.items()],
        ),
        "messages": _messages(models, ranks),
        "starts": _table(
            ["model", *of_ranks],
            [[name, *_gib(*(a["read_by_start"] for a in _by_rank(each)))] for name, each in models.items()],
        ),
        "one card": _totals("NF4 base, one card", record, nf4=True),
        "many cards": _totals(f"bfloat16 base over {cards} cards", record, cards=cards),
    }


def _by_rank(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*model["ranks"].values()]


def _columns(models: Mapping[str, Any], ranks: Sequence[int]) -> dict[str, tuple[dict, dict, dict]]:
    # the model, what was computed and what was counted at a rank
    shown = {name: models[name] for name in SHOWN_MODELS if name in models} or models
    return {
        f"{name.rpartition('-')[2] if name in PUBLISHED else name}, r = {rank}": (
            each,
            each["ranks"][str(rank)],
            each["counted_steps"][str(rank)],
        )
        for name, each in shown.items()
        for rank in (ranks[0], ranks[-1])
    }


def _methods(models: Mapping[str, Any], ranks: Sequence[int]) -> str:
    columns = _columns(models, ranks)
    return _table(
        ["optimizer of", "state per layer", *columns],
        [
            [
                f"`{name}`",
                STATES[_name(name)].text,
                *(" + ".join(_gib(a["states"][_name(name)], step[name])) for _, a, step in columns.values()),
            ]
            for name in ("lora", *COUNTED, ONE_BY_ONE)
        ],
    )


def _name(counted_name: str) -> str:
    return counted_name.partition(",")[0]


def _messages(models: Mapping[str, Any], ranks: Sequence[int]) -> str:
    columns = _columns(models, ranks)
    received = [a["received"] for _, a, _ in columns.values()]
    return _table(
        ["", *columns],
        [
            [
                "averaging the gradients of whole adapters",
                *_gib(*(a["averaged gradients"] for a in received)),
            ],
            [
                "sharded adapters: the passes",
                *_gib(*(a["sharded adapters in the passes"] for a in received)),
            ],
            *(
                [
                    f"sharded adapters: the step of `{name}`",
                    *_gib(*(a["sharded steps"][name] for a in received)),
                ]
                for name in ("lora-pro-sgd", "tangent-muon", "tangent", "lora-pro-factor", "lora-pro")
            ),
            [
                "sharded base: the passes of each micro-batch",
                *_gib(*(each["base_received"] for each, _, _ in columns.values())),
            ],
        ],
    )


def _totals(title: str, record: Mapping[str, Any], **how: Any) -> str:
    ranks = record["settings"]["ranks"]
    models = record["models"]
    fitting = {name: each for name, each in models.items() if (each["nf4"] < CARD) == ("nf4" in how)}
    return _table(
        [title, *(f"r = {rank}" for rank in ranks)],
        [
            [f"{name}, `{method}`", *_gib(*(total(each, rank, method, **how) for rank in ranks))]
            for name, each in (fitting if len(models) > 1 else models).items()
            for method in ("lora", "lora-pro-factor", "tangent", "tangent-muon", ONE_BY_ONE)
        ],
    )


def _gib(*sizes: float) -> list[str]:
    values = [size / GIB for size in sizes]
    return [f"{v:.0f}" if v >= 100 else f"{v:.1f}" if v >= 10 else f"{v:.2f}" for v in values]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _config_of(model: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"model must be a folder with a config.json, or a name that the hub knows; got {model}"
        ) from error


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or name of another model.")] = None,
    ranks: Annotated[str, typer.Option(help="Separated by commas.")] = "16,64,128",
    processes: Annotated[int, typer.Option(help="Cards that share the work.")] = CARDS,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny model: does it run?")] = False,
) -> None:
    """Compute the tables of docs/guides/scale.md."""
    configs: dict[str, PretrainedConfig] = {name: LlamaConfig(**sizes) for name, sizes in PUBLISHED.items()}
    if quick or model is not None:
        configs = {"tiny": LlamaConfig(**TINY)} if model is None else {Path(model).name: _config_of(model)}
    try:
        wanted = [2, 4] if quick else [int(rank) for rank in ranks.split(",")]
    except ValueError:
        raise typer.BadParameter(f"ranks must be whole numbers separated by commas; got {ranks}") from None
    record: dict[str, Any] = {
        "benchmark": "scale",
        "environment": environment(),
        "settings": {"ranks": wanted, "processes": processes, "batch": TOKENS},
        "models": {},
    }
    for name, config in configs.items():
        typer.echo(f"{name} ...")
        record["models"][name] = computed(config, wanted, processes) | {
            "passes_rank": wanted[0],
            "counted_steps": {str(rank): counted_steps(config, rank) for rank in wanted},
            "counted_passes": counted(config, partial(counted_passes, rank=wanted[0])),
        }
    for name, table in tables(record).items():
        typer.echo(f"\n{name}, GiB\n\n{table}")
    if output is not None:
        typer.echo(f"wrote {save_record(output, record).name}")


if __name__ == "__main__":
    typer.run(main)
