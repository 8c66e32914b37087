"""What a GPU does: fast branches without looking, one reading of all doubts, and a second step where there are some.

On a CPU looking costs nothing, so nothing is guessed there; these tests make it guess, and count what a GPU would wait
for: numbers read back, and decompositions that it does matrix by matrix.
"""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from tangora import InputError, LoRAPro, TangentAdam, TangentMuon, find_pairs
from tangora.geometry.gauge import factor_velocity
from tangora.geometry.guess import doubt, guessing
from tangora.geometry.tangent import Cotangent, coordinates, frame, project
from tangora.optim import layerwise
from tangora.optim.tangent_adam import TangentMoments, tangent_adam_step
from tangora.optim.tangent_muon import tangent_muon_step
from tests.models import randomize, with_lora
from tests.optim.problems import OPTIMIZERS, Training, assert_near, problem

GUESSING = [name for name in OPTIMIZERS if not name.startswith("odelora")]
STEADY = {
    "tangent": lambda model: TangentAdam(model, lr=1e-4),
    "tangent-muon": lambda model: TangentMuon(model, lr=1e-4),
    "lora-pro": lambda model: LoRAPro(model, lr=1e-4),
    "lora-pro-factor": lambda model: LoRAPro(model, lr=1e-4, moments="factor", gauge="lyapunov"),
}
READS = {"_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero"}
INPUTS = torch.randn(64, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LAPACK = {"linalg_cholesky_ex", "linalg_solve_triangular"}


class Counted(TorchDispatchMode):
    """Counts what a GPU would be waited for, and the decompositions."""

    def __init__(self):
        super().__init__()
        self.reads, self.decompositions = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        indices = args[1] if name in {"index", "index_put", "index_put_", "_index_put_impl_"} else ()
        # float32 is the dtype of the step counters, which are on the CPU wherever the model is
        is_counter = name == "_local_scalar_dense" and args[0].dtype == torch.float32
        if (name in READS and not is_counter) or any(
            i is not None and i.dtype == torch.bool for i in indices
        ):
            self.reads[name] += 1
        if ("linalg_" in name and "norm" not in name) or "cholesky" in name or "svd" in name or name == "qr":
            self.decompositions[name.removeprefix("_")] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def looked(monkeypatch):
    """Every stack is guessed, as on a GPU; counts the steps that were taken by looking."""
    steps = Counter()
    step_one = layerwise.LayerwiseOptimizer._step_one

    def counted(self, gathered):
        steps[gathered.stack.pairs[0].shape] += 1
        step_one(self, gathered)

    monkeypatch.setattr(layerwise, "_waiting_costs", lambda device: True)
    monkeypatch.setattr(layerwise.LayerwiseOptimizer, "_step_one", counted)
    return steps


def model_of_two_shapes() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(24, 32), nn.Linear(32, 24)]
    return randomize(with_lora(nn.Sequential(*layers, *copy.deepcopy(layers)).double(), r=4), scale=0.3)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(INPUTS.to(next(model.parameters()).device)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("config", [{}, {"r": 8}, {"zero_B": True}, {"dtype": torch.float32}])
@pytest.mark.parametrize("name", GUESSING)
def test_guessing_takes_the_same_steps(name, config, monkeypatch):
    looking, guessed = (Training(name, of=problem(**config)) for _ in range(2))
    looking.step(8)
    monkeypatch.setattr(layerwise, "_waiting_costs", lambda device: True)
    guessed.step(8)
    if config.get("dtype") is torch.float32:
        assert_near(looking, guessed, rtol=1e-3, atol=1e-4)
    else:
        assert_near(looking, guessed)


def test_moments_as_wide_as_the_rank(monkeypatch):
    models = []
    for guess in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(4, 6, dtype=torch.float64)
        models.append(randomize(with_lora(nn.Sequential(layer), r=4, target_modules=["0"])))
        monkeypatch.setattr(layerwise, "_waiting_costs", lambda device, guess=guess: guess)
        optimizer = LoRAPro(models[-1], lr=1e-3)
        for number in range(6):
            optimizer.zero_grad()
            models[-1](INPUTS[:, :4] + number).square().mean().backward()
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", STEADY)
def test_a_step_waits_twice_and_decomposes_nothing(name, looked):
    model = model_of_two_shapes()
    optimizer = STEADY[name](model)
    for _ in range(5):
        step(model, optimizer)
    looked.clear()
    optimizer.zero_grad()
    model(INPUTS.to(next(model.parameters()).device)).square().mean().backward()
    with Counted() as counted:
        optimizer.step()
    assert not looked
    assert counted.reads.total() <= 2
    assert counted.decompositions.keys() <= LAPACK


@pytest.mark.parametrize("name", STEADY)
def test_only_doubtful_stacks_are_stepped_again(name, looked):
    model = model_of_two_shapes()
    optimizer = STEADY[name](model)
    for _ in range(5):
        step(model, optimizer)
    looked.clear()
    with torch.no_grad():  # the adapter of one layer falls to rank 3
        find_pairs(model)[1].A[0] = 0
    before = {pair.name: pair.B.clone() for pair in find_pairs(model)}
    step(model, optimizer)
    assert looked == {find_pairs(model)[1].shape: 1}
    assert all(not torch.equal(pair.B, before[pair.name]) for pair in find_pairs(model))
    assert {int(optimizer.state[pair.A]["step"]) for pair in find_pairs(model)} == {6}


def cotangent(seed: int) -> Cotangent:
    generator = torch.Generator().manual_seed(seed)
    sizes = (2, 4, 24), (2, 32, 4)
    return Cotangent(*(torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes))


(A, B), GRADIENT = cotangent(0), cotangent(1)
ROWS, COLUMNS = GRADIENT.B.square().mean(-1), GRADIENT.A.square().mean(-2)
COMMON = {"step_size": 1e-4, "decay": 1.0, "retraction": "auto", "stored": torch.float64}


def tangent(momentum: Cotangent):
    moments = TangentMoments(momentum, ROWS, COLUMNS)
    return tangent_adam_step(A, B, GRADIENT, moments, correction=0.5, betas=(0.9, 0.999), eps=1e-8, **COMMON)


def tangent_muon(momentum: Cotangent):
    return tangent_muon_step(A, B, GRADIENT, momentum, beta=0.9, nesterov=True, iterations=1, **COMMON)


def lora_pro(momentum: Cotangent):
    at = frame(A, B)
    return factor_velocity(A, B, at, project(at, coordinates(at, momentum)), "sylvester")


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6 compiles no context managers")
@pytest.mark.messages  # wrapped in checks they do not compile
@pytest.mark.parametrize("pure", [tangent, tangent_muon, lora_pro])
def test_pure_steps_compile_whole(pure):
    def guessed(momentum):
        with guessing():
            return pure(momentum), doubt()

    torch._dynamo.reset()
    found = torch.compile(guessed, backend="eager", fullgraph=True)(cotangent(2))
    torch.testing.assert_close(found, guessed(cotangent(2)))
    assert not found[1]


@pytest.mark.messages
@pytest.mark.parametrize("name", STEADY)
def test_compiled_steps_are_the_same_and_compile_once(name):
    models = [model_of_two_shapes() for _ in range(2)]
    plain, compiled = (STEADY[name](model) for model in models)
    torch._dynamo.reset()
    compiled.compile(backend="eager")
    for number in range(9):
        for optimizer in (plain, compiled):
            optimizer.param_groups[0]["lr"] = 1e-4 * 0.9**number
        step(models[0], plain)
        with torch._dynamo.config.patch(error_on_recompile=number > 4):
            step(models[1], compiled)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert compiled._compiled
    again = copy.deepcopy(compiled)
    assert again._compiled == {}
    assert again._compiled is not layerwise.LayerwiseOptimizer._compiled


@pytest.mark.parametrize(
    "name", ["lora-muon", "polora", "lora-rite", "p-lora", "tangent-svd", "lora-pro-auto"]
)
def test_optimizers_without_steps_that_compile_refuse_to(name):
    with pytest.raises(InputError, match="cannot be compiled"):
        OPTIMIZERS[name](model_of_two_shapes()).compile()


@pytest.mark.messages
def test_an_old_torch_is_named(monkeypatch):
    optimizer = OPTIMIZERS["tangent-muon"](model_of_two_shapes())
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
    with pytest.raises(InputError, match=r"needs torch 2\.7"):
        optimizer.compile()
