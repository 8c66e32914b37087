"""Costs of the optimizers on a GPU at the size of Llama-8B: steps, waits, memory, share of a step, initializations.

Each part stands for itself: one that fails is recorded with its error, and the others go on. About five minutes on one
card of 80 GB; with ``--quick`` it runs anywhere, and the numbers mean nothing:

    python benchmarks/gpu.py --output benchmarks/gpu.json
    python benchmarks/gpu.py --quick --device cpu
"""

import gc
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from optimizer_step import FOREACH, FUSED, ON_ADAPTERS, adapted, randomize, refresh_pairs, state_bytes
from record import (
    Case,
    environment,
    interleaved,
    print_table,
    ratios,
    save_record,
    spread,
    synchronize,
    timed,
)
from tangora import find_pairs
from tangora.init import initialize
from tangora.optim import layerwise

OURS = ("TangentMuon(auto)", "TangentAdam(auto)", "LoRAPro(factor)", "PreconditionedAdamW")
LOOKING = "TangentMuon(auto), looking at every branch"
COMPILED = {
    "TangentMuon(auto), compiled": {},
    "TangentMuon(auto), compiled to graphs": {"mode": "reduce-overhead"},
}
STARTS = ("orthogonal", "lora-ga", "lora-one")


@dataclass(frozen=True)
class Size:
    """A Llama.

    Attributes:
        hidden: Width.
        inner: Width of the feed-forward layers.
        kv: Width of keys and values.
        blocks: Number of blocks.
        vocabulary: Number of tokens.
    """

    hidden: int
    inner: int
    kv: int
    blocks: int
    vocabulary: int

    def layers(self) -> list[tuple[int, int]]:
        """Return (out, in) of all linear layers but the head."""
        h, f, k = self.hidden, self.inner, self.kv
        return [(h, h), (k, h), (k, h), (h, h), (f, h), (f, h), (h, f)] * self.blocks

    def model(self, device: str) -> LlamaForCausalLM:
        """Make it in bfloat16 with random weights."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.kv // 64,
            vocab_size=self.vocabulary,
        )
        torch.manual_seed(0)
        with torch.device(device):
            return LlamaForCausalLM(config).to(torch.bfloat16)  # pyright: ignore


LLAMA_8B = Size(4096, 14336, 1024, 32, 128256)
LLAMA_1B = Size(2048, 8192, 512, 16, 128256)
TINY = Size(128, 256, 64, 2, 256)


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Attributes:
        device: ``cuda``, or ``cpu`` to try.
        ranks: Ranks of the adapters.
        rounds: Rounds of interleaved timing.
        steps: The model whose layers are stepped.
        starts: The models that get a start.
        tokens: Of a training step.
        quick: Tiny models.
    """

    device: str
    ranks: tuple[int, ...] = (8, 16, 64, 128)
    rounds: int = 10
    steps: Size = LLAMA_8B
    starts: tuple[Size, ...] = (LLAMA_1B, LLAMA_8B)
    tokens: int = 1024
    quick: bool = False


def steps(settings: Settings, rank: int) -> dict[str, Any]:
    """Time the steps of all optimizers against torch's AdamW, on adapters alone."""
    cases, optimizers = [], {}
    for name in (FOREACH, FUSED, *OURS, LOOKING, *COMPILED):
        model = adapted(settings.steps.layers(), rank, settings.device)
        optimizer = ON_ADAPTERS.get(name, ON_ADAPTERS[OURS[0]])(model)
        if name in COMPILED:
            optimizer.compile(**COMPILED[name])
        optimizers[name] = optimizer, find_pairs(model)
        run = partial(_looking, optimizer.step) if name == LOOKING else optimizer.step
        # momenta have the rank of some gradients, and the first steps look anyway
        cases.append(Case(name, run, partial(refresh_pairs, optimizers[name][1]), warmup=8))
    times = interleaved(cases, settings.rounds, settings.device)
    return {
        name: {
            "seconds": spread(times[name]),
            "per_foreach": ratios(times, name, FOREACH)["median"],
            "per_fused": ratios(times, name, FUSED)["median"],
            "state_bytes": state_bytes(optimizer),
            "peak_bytes": _peak(settings.device, optimizer.step),
            "waits": _waits(settings.device, partial(refresh_pairs, pairs), optimizer.step),
        }
        for name, (optimizer, pairs) in optimizers.items()
    }


def _looking(step: Callable[[], Any]) -> None:
    with mock.patch.object(layerwise, "_waiting_costs", return_value=False):
        step()


def _peak(device: str, run: Callable[[], Any]) -> int | None:
    """Return the bytes that something needs beside what is there already."""
    if not device.startswith("cuda"):
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _waits(device: str, prepare: Callable[[], Any], run: Callable[[], Any]) -> int | None:
    """Count the operations that wait for the device."""
    if not device.startswith("cuda"):
        return None
    prepare()
    synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in caught)


def _adapted(settings: Settings, size: Size, rank: int, *, nf4: bool = False) -> PeftModel:
    base = size.model(settings.device)
    if nf4:
        _quantize(base, settings.device)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    model.train()
    return model  # pyright: ignore


def _quantize(model: nn.Module, device: str) -> None:
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            parent = model.get_submodule(name.rpartition(".")[0])
            small = bitsandbytes.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            small.load_state_dict(layer.state_dict())
            setattr(parent, name.rpartition(".")[2], small.to(device))
    model.is_loaded_in_4bit = True  # pyright: ignore


def _batch(settings: Settings, size: Size) -> dict[str, torch.Tensor]:
    tokens = torch.randint(size.vocabulary, (1, settings.tokens), device=settings.device)
    return {"input_ids": tokens, "labels": tokens}


def training_step(settings: Settings, rank: int = 16) -> dict[str, Any]:
    """Measure the share that the optimizers take of a real training step."""
    model = _adapted(settings, settings.steps, rank)
    randomize(model)
    batch = _batch(settings, settings.steps)

    def forward_backward() -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    found = {}
    for name in (FUSED, *OURS[:3]):
        optimizer = ON_ADAPTERS[name](model)
        passes, taken = [], []
        for _ in range(5 + settings.rounds):
            passes.append(timed(forward_backward, settings.device))
            taken.append(timed(optimizer.step, settings.device))
        shares = [step / (step + rest) for step, rest in zip(taken[5:], passes[5:], strict=True)]
        found[name] = {
            "step": spread(taken[5:]),
            "forward_backward": spread(passes[5:]),
            "share": spread(shares),
        }
    return {"rank": rank, "tokens": settings.tokens, "optimizers": found}


def starts(settings: Settings, size: Size, *, nf4: bool) -> dict[str, Any]:
    """Time the starts on a random model, and what they need beside it."""
    model = _adapted(settings, size, 16, nf4=nf4)
    batches = [_batch(settings, size) for _ in range(2)]
    found = {}
    for method in STARTS:
        synchronize(settings.device)
        begin = time.perf_counter()
        read = batches if method.startswith("lora") else None
        peak = _peak(settings.device, partial(initialize, model, method, read, progress=False))
        if peak is None:
            initialize(model, method, read, progress=False)
        synchronize(settings.device)
        found[method] = {"seconds": time.perf_counter() - begin, "peak_bytes": peak}
        model.delete_adapter("default")
        model.add_adapter("default", LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        model.set_adapter("default")
    return found


def gpu_tests() -> dict[str, Any]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root, check=False)
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    return {"exit": done.returncode, **{kind: int(count) for count, kind in counts}}


@contextmanager
def part(results: dict[str, Any], name: str) -> Iterator[None]:
    """Record the seconds of a part, and the error that ends it."""
    begin = time.perf_counter()
    try:
        yield
    except Exception as error:  # the other parts go on
        traceback.print_exc()
        results.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:500]
    results.setdefault("seconds", {})[name] = time.perf_counter() - begin
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(settings: Settings) -> dict[str, Any]:
    """Measure everything."""
    results: dict[str, Any] = {"environment": environment(settings.device), "settings": asdict(settings)}
    torch.manual_seed(0)
    for rank in settings.ranks:
        with part(results, f"steps, r = {rank}"):
            found = steps(settings, rank)
            results.setdefault("steps", {})[str(rank)] = found
            show(rank, found)
    with part(results, "training step"):
        results["training_step"] = training_step(settings)
        print(results["training_step"])
    for size in settings.starts:
        for nf4 in (False, True):
            name = f"starts, {size.blocks} blocks of {size.hidden}, {'NF4' if nf4 else 'bfloat16'}"
            with part(results, name):
                results.setdefault("starts", {})[name] = starts(settings, size, nf4=nf4)
                print(name, results["starts"][name])
    with part(results, "tests"):
        results["tests"] = gpu_tests()
    return results


def show(rank: int, found: dict[str, Any]) -> None:
    """Print the steps of one rank."""
    rows = [
        (
            name,
            f"{1e3 * each['seconds']['median']:.2f}",
            f"{each['per_foreach']:.2f}",
            f"{each['per_fused']:.2f}",
            f"{each['state_bytes'] / 2**20:.0f}",
            "" if each["peak_bytes"] is None else f"{each['peak_bytes'] / 2**20:.0f}",
            "" if each["waits"] is None else str(each["waits"]),
        )
        for name, each in found.items()
    ]
    print_table(f"r = {rank}", ("", "ms", "/ foreach", "/ fused", "state MiB", "peak MiB", "waits"), rows)


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models: does it run?")] = False,
) -> None:
    """Measure the optimizers and the starts on a GPU."""
    settings = Settings(device)
    if quick:
        settings = Settings(device, (2, 4), 2, TINY, (TINY,), 32, quick=True)
    record = run(settings)
    if output is not None:
        typer.echo(f"wrote {save_record(output, record).name}")


if __name__ == "__main__":
    typer.run(main)
