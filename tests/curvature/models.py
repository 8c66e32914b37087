"""Tiny seeded models with LoRA factors away from zero, with their batches: small enough for dense Hessians."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.cases import gauge_transform
from tests.probes.models import batch_of, model_of
from tests.reference.curvature import DenseCurvature
from tests.tolerances import assert_close

SIZES = {
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_inner": 10},
    "bert": {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 10},
    "llama": {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 10},
}
TARGETS = {
    "mlp": ["first", "second"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "value", "dense"],
    "llama": ["q_proj", "v_proj", "gate_proj", "down_proj"],
}
NAMES = list(TARGETS)
FLOAT64 = ["mlp", "gpt2", "bert"]
"""What computes in float64 throughout; Llama's norms are float32 whatever its weights are."""


def outputs_of(model: nn.Module, batch: Any) -> Tensor:
    """The logits, without a loss."""
    if not isinstance(batch, dict):
        return model(batch[0])
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def counted(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The logits that a label counts for (labels x classes), these labels, and the sequence of each."""
    labels = batch["labels"] if isinstance(batch, dict) else batch[1]
    if labels.dim() > 1:
        outputs, labels = outputs[:, :-1], labels[:, 1:]
    sequence = torch.arange(len(labels)).view(-1, *[1] * (labels.dim() - 1)).expand_as(labels)
    kept = labels != -100
    return outputs[kept], labels[kept], sequence[kept]


def label_logits(model: nn.Module, batch: Any) -> Tensor:
    return counted(outputs_of(model, batch), batch)[0]


def label_losses(model: nn.Module, batch: Any) -> Tensor:
    """The cross-entropy of each label that counts."""
    logits, labels, _ = counted(outputs_of(model, batch), batch)
    return -logits.log_softmax(-1)[torch.arange(len(labels)), labels]


def cross_entropy_of(outputs: Tensor, batch: Any) -> Tensor:
    logits, labels, _ = counted(outputs, batch)
    return F.cross_entropy(logits, labels)


@dataclass(frozen=True)
class Problem:
    """A PEFT model, batches of different sizes, and a loss of its own where it needs one."""

    model: PeftModel
    batches: list[Any]
    loss_fn: Callable[[Any, Any], Tensor] | None = None

    def reference(self) -> DenseCurvature:
        """Its dense curvature."""
        return DenseCurvature(self.model, self.batches, self.loss_fn)


class MLP(nn.Module):
    """Two layers with a tanh between; no config, no loss."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def mlp_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def squared_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - F.one_hot(y, 4)).square().mean()


def causal_loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    """Next-token cross-entropy in the logits' own precision; the library's is in float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def problem(
    name: str,
    *,
    r: int = 2,
    batches: int = 2,
    zero: bool = False,
    model_options: dict | None = None,
    **config,
) -> Problem:
    """A model by name, in evaluation mode, in float64 (llama: float32).

    Args:
        name: One of `NAMES`.
        r: Rank.
        batches: How many; the first has 2 samples, each further one more.
        zero: Whether B is zero, as at LoRA's start; otherwise both factors are random.
        model_options: Of the model's config.
        **config: Of the adapter.
    """
    dtype = torch.float32 if name == "llama" else torch.float64
    if name == "mlp":
        torch.manual_seed(0)
        base: Any = MLP().to(dtype)
        data = [_samples(2 + index, seed=index) for index in range(batches)]
    else:
        base = model_of(name, dtype, **SIZES[name] | (model_options or {}))
        data = [batch_of(name, size=2 + index, seed=index, length=5, dtype=dtype) for index in range(batches)]
    if name == "gpt2":
        base.loss_function = causal_loss
    options = {
        "r": r,
        "lora_alpha": 3,
        "target_modules": TARGETS[name],
        "fan_in_fan_out": name == "gpt2",
    }
    model = get_peft_model(base, LoraConfig(**options | config), autocast_adapter_dtype=False).eval()
    randomize(model, zero=zero)
    return Problem(model, data, mlp_loss if name == "mlp" else None)


def small_problem(name: str) -> Problem:
    """One batch, and one adapted layer in transformers: dense matrices of it take little time."""
    if name == "mlp":
        return problem(name, batches=1)
    targets = {"gpt2": ["c_fc"], "bert": ["query"]}
    return problem(name, batches=1, target_modules=targets[name])


@functools.cache
def shared_problem(name: str) -> Problem:
    """The same with its defaults, made once: not to be changed."""
    return problem(name)


@functools.cache
def shared_reference(name: str) -> DenseCurvature:
    """The dense curvature of the shared problem."""
    return shared_problem(name).reference()


def dense(operator: Any) -> Tensor:
    """The operator's matrix in float64, one product for each column."""
    identity = torch.eye(operator.size, dtype=operator.dtype)
    return torch.stack([operator.matvec(column) for column in identity], dim=1).double()


def random_vector(operator: Any, seed: int = 0) -> Tensor:
    """A seeded normal vector for an operator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(operator.size, dtype=torch.float64, generator=generator).to(operator.dtype)


def random_vectors(operator: Any, count: int = 3) -> list[Tensor]:
    return [random_vector(operator, seed) for seed in range(count)]


def displacements(space: Any) -> Tensor:
    """What each coordinate moves the weights by: the columns are vec(P K + J Q) by rows, over all layers."""
    columns = []
    for direction in torch.eye(space.size, dtype=space.dtype):
        leaves, parts = space.to_leaves(direction), []
        for layer in space.layers:
            P, Q = space.bases[layer.name]
            parts.append((P @ leaves[f"{layer.name}.K"] + leaves[f"{layer.name}.J"] @ Q).flatten())
        columns.append(torch.cat(parts))
    return torch.stack(columns, dim=1)


def assert_matrix(operator: Any, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Assert that products with random vectors are those of the matrix, relative to the matrix times the vector."""
    for vector in random_vectors(operator):
        assert_close(operator.matvec(vector).double(), expected.double() @ vector.double(), tolerance)


def randomize(model: nn.Module, *, zero: bool = False, seed: int = 3, scale: float = 0.5) -> None:
    """Draw every factor from a normal distribution of that standard deviation; B is zero if asked for."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.data.copy_(0 * noise if zero and "_B" in key else scale * noise)


def change_gauge(pairs: list[Any], condition: float = 100.0) -> None:
    """Put (B R, R^-1 A) in place of (B, A), in float64, with its own R of that condition number for every pair."""
    for seed, pair in enumerate(pairs):
        A, B = (factor.double() for factor in pair.factors())
        A, B = gauge_transform(A, B, condition, seed)
        pair.A.data.copy_(A.reshape(pair.A.shape))
        pair.B.data.copy_(B.reshape(pair.B.shape))


def _samples(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, dtype=torch.float64, generator=generator), torch.randint(
        4, (size,), generator=generator
    )
