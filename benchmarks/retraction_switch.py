"""Does `retraction="auto"` save the runs that `orthographic` alone loses?

SmolLM2-135M on chain_sum from a start like LoRA-One's: B A is one rank-8 step of gradient descent, balanced, with the
gradient's decaying singular values. TangentAdam at a fixed learning rate with each retraction; recorded are the losses,
the number of layers that `auto` handed to the SVD at each step, and the largest rise of the smoothed loss.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import record
from tangora import LoraPair, TangentAdam, find_pairs
from tangora.geometry import retraction as retractions
from tangora.training.data import Task, collator, encode, load_task
from tangora.training.models import LoadedModel, load_model

RANK, ALPHA, GAMMA = 8, 16.0, 128.0
BATCH, MAX_LENGTH, GRADIENT_EXAMPLES = 16, 64, 8


def batches(task: Task, loaded: LoadedModel, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield training batches in a fixed order.

    Args:
        task: The data.
        loaded: Model and tokenizer.
        size: Examples per batch.

    Yields:
        Keyword arguments of the model.
    """
    data = encode(task.train, loaded.tokenizer, kind="causal", max_length=MAX_LENGTH)
    collate = collator(loaded.tokenizer, "causal")
    for start in range(0, len(data) - size + 1, size):
        yield collate([data[index] for index in range(start, start + size)])


def dense_gradients(model: PeftModel, pairs: list[LoraPair], batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the full gradients of the adapted weights, which fit into memory for a model of this size.

    Args:
        model: PEFT model with B = 0, so that it computes what its base computes.
        pairs: Its pairs.
        batch: Examples to average over.

    Returns:
        One m x n gradient per pair.
    """
    weights = [pair.layer.get_base_layer().weight for pair in pairs]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(model(**batch).loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return list(gradients)


def start_like_lora_one(pairs: list[LoraPair], gradients: list[Tensor]) -> None:
    """Set B = U sqrt(S / (S_0 gamma)) and A = sqrt(S / (S_0 gamma)) V' of -G, LoRA-One's final form.

    Args:
        pairs: Pairs to be set.
        gradients: Their full gradients.
    """
    for pair, gradient in zip(pairs, gradients, strict=True):
        U, S, V = torch.svd_lowrank(-gradient, q=2 * RANK, niter=4)
        size = (S[:RANK] / (S[0] * GAMMA)).sqrt()
        pair.B.data.copy_(U[:, :RANK] * size)
        pair.A.data.copy_(size[:, None] * V[:, :RANK].T)


def train(kind: str, steps: int, lr: float) -> dict[str, Any]:
    """Train with one retraction.

    Args:
        kind: ``auto``, ``orthographic`` or ``svd``.
        steps: Number of steps.
        lr: Learning rate.

    Returns:
        Losses, layers sent to the SVD per step, and why it ended.
    """
    loaded = load_model("smollm2-135m", kind="causal")
    task = load_task("reasoning-gym:chain_sum", num_train=2000, num_validation=1, num_test=1)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(loaded.model, config)
    assert isinstance(model, PeftModel)
    pairs = find_pairs(model)
    first = next(batches(task, loaded, GRADIENT_EXAMPLES))
    start_like_lora_one(pairs, dense_gradients(model, pairs, first))
    optimizer = TangentAdam(model, lr=lr, retraction=kind)
    losses: list[float] = []
    switched: list[int] = []
    stream = batches(task, loaded, BATCH)
    for _ in range(steps):
        loss = model(**next(stream)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        with count_switches(switched):
            try:
                optimizer.step()
            except FloatingPointError as error:
                return {"losses": losses, "layers_by_svd": switched, "ended": str(error)}
    return {"losses": losses, "layers_by_svd": switched, "ended": "all steps taken"}


class count_switches:  # noqa: N801 - a context manager, named like the standard library's
    """Counts the layers that `auto` hands to the SVD in one step."""

    def __init__(self, counts: list[int]):
        self._counts = counts
        self._original = retractions._mixed
        counts.append(0)

    def __enter__(self) -> None:
        def counted(*arguments: Any) -> Any:
            self._counts[-1] += int(arguments[-1].sum())
            return self._original(*arguments)

        retractions._mixed = counted

    def __exit__(self, *_: object) -> None:
        retractions._mixed = self._original


def largest_rise(losses: list[float]) -> float:
    """Return the largest rise of the mean of five losses above its lowest value so far.

    Args:
        losses: One per step.

    Returns:
        Zero for a loss that never rises.
    """
    means = [
        sum(losses[max(0, i - 4) : i + 1]) / len(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))
    ]
    return max(mean - min(means[: index + 1]) for index, mean in enumerate(means))


def main(
    output: Path | None = None, steps: int = 60, lr: float = 1e-4, kinds: str = "orthographic,auto,svd"
) -> None:
    """Train with each retraction and record the losses.

    Args:
        output: JSON file to write.
        steps: Number of steps.
        lr: Learning rate.
        kinds: Retractions, separated by commas.
    """
    runs = {}
    for kind in kinds.split(","):
        runs[kind] = train(kind, steps, lr)
        losses = runs[kind]["losses"]
        runs[kind]["largest_rise"] = largest_rise(losses)
        tail = sum(losses[-10:]) / len(losses[-10:])
        print(
            f"{kind:>12}: {len(losses)} losses, first {losses[0]:.3f}, highest {max(losses):.3f}, last ten {tail:.3f}, "
        )
        print(
            f"{'':>12}  rise {runs[kind]['largest_rise']:.3f}, layers by SVD {runs[kind]['layers_by_svd'][:12]}"
        )
    if output is not None:
        settings = {"steps": steps, "lr": lr, "rank": RANK, "alpha": ALPHA, "gamma": GAMMA, "batch": BATCH}
        record.save_record(output, record.environment() | {"settings": settings, "runs": runs})


if __name__ == "__main__":
    typer.run(main)
