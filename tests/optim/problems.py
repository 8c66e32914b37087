"""Small PEFT models whose loss and gradients are known in closed form or cheap to differentiate."""

import copy

import torch
from peft import PeftModel
from torch import Tensor, nn

from tangora import LoRAPro, ODELoRA, PreconditionedAdamW, TangentAdam, TangentMuon, find_pairs
from tangora.optim import LoRAMuon, LoRARITE, PoLoRA
from tests.cases import gauge_transform
from tests.models import with_lora
from tests.tolerances import assert_close

OPTIMIZERS = {
    "lora-pro-weight": lambda model, **kw: LoRAPro(model, **{"lr": 1e-2, **kw}),
    "lora-pro-factor": lambda model, **kw: LoRAPro(model, **{"lr": 1e-2, "moments": "factor", **kw}),
    "lora-pro-sgd": lambda model, **kw: LoRAPro(model, **{"lr": 0.1, "moments": None, **kw}),
    "lora-pro-auto": lambda model, **kw: LoRAPro(model, **{"lr": 1e-2, "retraction": "auto", **kw}),
    "tangent": lambda model, **kw: TangentAdam(model, **{"lr": 1e-2, **kw}),
    "tangent-svd": lambda model, **kw: TangentAdam(model, **{"lr": 1e-2, "retraction": "svd", **kw}),
    "tangent-muon": lambda model, **kw: TangentMuon(
        model, **{"lr": 1e-2, "adamw_lr": kw.get("lr", 1e-2), **kw}
    ),
    "lora-muon": lambda model, **kw: LoRAMuon(model, **{"lr": 0.1, "adamw_lr": kw.get("lr", 1e-2), **kw}),
    "polora": lambda model, **kw: PoLoRA(model, **{"lr": 0.1, "adamw_lr": kw.get("lr", 1e-2), **kw}),
    "lora-rite": lambda model, **kw: LoRARITE(model, **{"lr": 1e-2, **kw}),
    "odelora-euler": lambda model, **kw: ODELoRA(model, **{"lr": 0.1, "scheme": "euler", **kw}),
    "odelora-bug": lambda model, **kw: ODELoRA(
        model, **{"lr": 0.1, "scheme": "bug", "tolerance": 1e-3, **kw}
    ),
    "p-lora": lambda model, **kw: PreconditionedAdamW(model, **{"lr": 1e-2, "damping": 1e-2, **kw}),
}
"""Every optimizer of the project that the battery must cover."""


class TwoLayers(nn.Module):
    """Two equal layers, one different, and a head without an adapter."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.one = nn.Linear(6, 6, bias=False, dtype=dtype)
        self.two = nn.Linear(6, 6, bias=False, dtype=dtype)
        self.three = nn.Linear(6, 4, bias=False, dtype=dtype)
        self.head = nn.Linear(4, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(torch.tanh(self.two(torch.tanh(self.one(x))))))


def problem(
    seed: int = 0, *, dtype: torch.dtype = torch.float64, zero_B: bool = False, **config
) -> tuple[PeftModel, Tensor, Tensor]:
    """Return a model with LoRA on three layers and a trained head, inputs and targets."""
    torch.manual_seed(seed)
    options = {"target_modules": ["one", "two", "three"], "modules_to_save": ["head"]}
    model = with_lora(TwoLayers(dtype), **{**options, **config})
    for name, parameter in model.named_parameters():
        if "lora_" in name and not (zero_B and "lora_B" in name):
            parameter.data = (0.3 * torch.randn(parameter.shape, dtype=torch.float64)).to(dtype)
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    return model, x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    loss = loss_of(model, x, y)
    loss.backward()
    return loss


def adamw_of_the_rest(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return torch's AdamW on everything that is trained outside pairs, without decay of biases."""
    rest = outside_pairs(model)
    weights, biases = [p for p in rest if p.dim() > 1], [p for p in rest if p.dim() == 1]
    assert weights
    assert biases
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr, weight_decay=weight_decay)


def trainable(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def outside_pairs(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]


class Training:
    """A model of three adapted layers with one batch, and an optimizer made by its name in `OPTIMIZERS`."""

    def __init__(self, name: str, *, of: tuple | None = None, groups=None, **options):
        self.model, self.x, self.y = problem() if of is None else of
        self.pairs = find_pairs(self.model)
        self.optimizer = OPTIMIZERS[name](self.model if groups is None else groups(self), **options)

    def backward(self) -> Tensor:
        return backward(self.model, self.x, self.y)

    def step(self, times: int = 1) -> "Training":
        for _ in range(times):
            self.backward()
            self.optimizer.step()
        return self

    def loss(self) -> float:
        return loss_of(self.model, self.x, self.y).item()

    def parameters(self) -> list[Tensor]:
        return trainable(self.model)

    def copy(self) -> "Training":
        return copy.deepcopy(self)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_near(one: Training, other: Training, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


class Quadratic:
    """One layer with loss |W - target|^2 / 2 weighted, whose dense gradient is known: for reference comparisons."""

    def __init__(self, m: int, n: int, r: int, seed: int, *, alpha: float = 3.0, zero_B: bool = False):
        generator = torch.Generator().manual_seed(seed)
        self.layer = nn.Linear(n, m, bias=False, dtype=torch.float64)
        self.model = with_lora(nn.Sequential(self.layer), r=r, lora_alpha=alpha, target_modules=["0"])
        self.adapted = self.model.base_model.model[0]
        self.A = self.adapted.lora_A["default"].weight
        self.B = self.adapted.lora_B["default"].weight
        self.s = self.adapted.scaling["default"]
        self.target = torch.randn(m, n, dtype=torch.float64, generator=generator)
        self.weights = 0.2 + torch.rand(m, n, dtype=torch.float64, generator=generator)
        self.A.data = torch.randn(r, n, dtype=torch.float64, generator=generator)
        self.B.data = (0 if zero_B else 1) * torch.randn(m, r, dtype=torch.float64, generator=generator)

    def gradient(self, W: Tensor) -> Tensor:
        """Dense gradient with respect to W = s B A (the frozen weight is not part of the problem)."""
        return self.weights * (W - self.target)

    @property
    def W(self) -> Tensor:
        return (self.s * self.B @ self.A).detach()

    def set_gradients(self, scale: float = 1.0) -> None:
        g = scale * self.gradient(self.W)
        self.A.grad = self.s * self.B.detach().T @ g
        self.B.grad = self.s * g @ self.A.detach().T

    def train(self, optimizer: torch.optim.Optimizer, steps: int, scale: float = 1.0) -> Tensor:
        """Take steps on gradients times a scale, and return the weight."""
        for _ in range(steps):
            self.set_gradients(scale)
            optimizer.step()
        return self.W

    def change_gauge(self, condition: float | None, seed: int = 1) -> "Quadratic":
        """Split the same weight into other factors, unless the condition is None."""
        if condition:
            self.A.data, self.B.data = gauge_transform(self.A.data, self.B.data, condition, seed)
        return self


def assert_follows(toy, optimizer, reference, steps: int, tolerance: float, *, factors: bool = True) -> None:
    """Compare the weight with a dense reference's after every step, and its factors too."""
    for _ in range(steps):
        toy.train(optimizer, 1)
        reference.step(toy.gradient(reference.W))
        assert_close(toy.W, reference.W, tolerance)
        if factors and hasattr(reference, "A"):
            assert_close(toy.A.detach(), reference.A, tolerance)
            assert_close(toy.B.detach(), reference.B, tolerance)


def assert_stays_balanced(toy: Quadratic, optimizer: torch.optim.Optimizer, steps: int = 60) -> None:
    """Train, and compare the factors' size with the least that their product allows: balanced factors'."""
    r = toy.A.shape[0]
    for _ in range(steps):
        toy.train(optimizer, 1)
        size = toy.A.detach().square().sum() + toy.B.detach().square().sum()
        least = 2 * torch.linalg.matrix_norm(toy.B.detach() @ toy.A.detach(), ord="nuc")
        assert size <= 2 * r**0.5 * least
