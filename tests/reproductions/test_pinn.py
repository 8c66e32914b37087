"""E5: residuals and reference solutions against formulas, runs that fail as well as runs that do not, records."""

import json
import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from reproductions.pinn import QUICK, Settings
from reproductions.pinn import run as run_pinn
from reproductions.pinn.equations import (
    ALLEN_CAHN,
    CONVECTION,
    EQUATIONS,
    PERIOD,
    VISCOSITY,
    collocation,
    solve,
)
from reproductions.pinn.found import Found, figures_of, findings_of, mean_error, ranges, table_of
from reproductions.pinn.network import PeriodicMLP, field_on, pretrained
from reproductions.pinn.runs import METHODS, Budget, Run, Sweep, adapted, first_powers, rate, run, sweep
from tangora import InputError, find_pairs
from tangora.experiments.values import validated
from tests.tolerances import assert_close

SMALL = {**QUICK, "evaluations": 4, "pretrain_steps": 40, "pretrain_polish": 40}
BUDGET = Budget(evaluations=8, num_points=32, rank=2)


def small(**changes):
    return validated(Settings, SMALL | changes)


def silent(_done, _total):
    pass


@pytest.fixture(scope="module")
def problem():
    sizes = {"width": 16, "depth": 3, "num_points": 48, "adam_steps": 40, "lbfgs_steps": 40}
    return pretrained("convection", 1.0, 2.0, **sizes)


def points(num=50):
    return collocation(num, torch.Generator().manual_seed(3), torch.float64)


def test_residual_of_the_convection_formula_vanishes():
    x, t = points()
    residual = CONVECTION.residual(lambda x, t: torch.sin(x - 7.0 * t), x, t, 7.0)
    assert residual.abs().max() < 1e-13
    wrong = CONVECTION.residual(lambda x, t: torch.sin(x - 7.0 * t), x, t, 6.0)
    assert_close(wrong.detach(), -torch.cos(x - 7.0 * t), 1e-12)


def test_residuals_of_allen_cahn_formulas_vanish():
    x, t = points()
    # a front stands still where diffusion and reaction balance
    width = math.sqrt(2 * VISCOSITY / 3.0)
    residual = ALLEN_CAHN.residual(lambda x, t: torch.tanh((x - 3.0) / width) + 0 * t, x, t, 3.0)
    assert residual.abs().max() < 1e-11
    # without space, u = exp(ct) / sqrt(exp(2ct) + 3) solves u_t = c (u - u^3)
    grows = ALLEN_CAHN.residual(lambda x, t: (2 * t).exp() / ((4 * t).exp() + 3).sqrt() + 0 * x**2, x, t, 2.0)
    assert grows.abs().max() < 1e-13


def test_residual_of_a_network_against_finite_differences():
    model = PeriodicMLP(ALLEN_CAHN, 8, 2, seed=0, dtype=torch.float64)
    x, t = points(10)
    h = 1e-4
    with torch.no_grad():
        u_t = (model(x, t + h) - model(x, t - h)) / (2 * h)
        u_xx = (model(x + h, t) - 2 * model(x, t) + model(x - h, t)) / h**2
        u = model(x, t)
    expected = u_t - VISCOSITY * u_xx - 1.5 * (u - u**3)
    assert_close(ALLEN_CAHN.residual(model, x, t, 1.5).detach(), expected, 1e-5)


@pytest.mark.parametrize("equation", EQUATIONS.values(), ids=list(EQUATIONS))
def test_network_meets_boundary_and_initial_condition(equation):
    model = PeriodicMLP(equation, 8, 2, seed=1, dtype=torch.float64)
    x, t = points(20)
    with torch.no_grad():
        assert_close(model(x, t), model(x + PERIOD, t), 1e-12)
        assert_close(model(x, torch.zeros_like(t)), equation.initial(x), 1e-15)
        assert (model(x, t) - equation.initial(x)).abs().max() > 1e-3


def test_solver_against_the_formula():
    solution = solve(CONVECTION, 5.0)
    t, x = torch.meshgrid(solution.t, solution.x, indexing="ij")
    assert solution.error_of(torch.sin(x - 5.0 * t)) < 1e-8


def test_solver_is_converged():
    fine = solve(ALLEN_CAHN, 3.0)
    assert solve(ALLEN_CAHN, 3.0, num_modes=128).error_of(fine.u) < 1e-5
    # negative control: 16 points do not resolve the layers
    assert solve(ALLEN_CAHN, 3.0, num_x=16, num_modes=16).error_of(fine.u[:, ::4]) > 1e-4
    # the energy of Allen-Cahn falls
    u_x = torch.fft.irfft(1j * torch.arange(33) * torch.fft.rfft(fine.u), 64)
    energy = (VISCOSITY / 2 * u_x**2 + 3.0 / 4 * (fine.u**2 - 1) ** 2).mean(1)
    assert (energy.diff() < 1e-12).all()


def test_adapters_begin_at_the_pretrained_network(problem):
    before = field_on(problem.model, problem.solution)
    for name in ("full (Adam)", "LoRA", "ODELoRA RK4"):
        model = adapted(problem, METHODS[name], 2, seed=0)
        assert_close(field_on(model, problem.solution), before, 1e-5)
    assert isinstance(model, PeftModel)
    assert [pair.shape for pair in find_pairs(model)] == [(16, 16, 2)] * 2


def test_methods_share_the_budget_and_leave_the_network_alone(problem):
    before = [p.clone() for p in problem.model.parameters()]
    for method in METHODS.values():
        done = run(problem, method, rate(method.center - 1), BUDGET, seed=0)
        assert done.evaluations == 8, method.name
        assert len(done.losses) == 8 // method.gradients_per_step
        assert done.status == "better", method.name
        assert done.errors[-1] == (8, done.error)
    assert all(torch.equal(p, q) for p, q in zip(before, problem.model.parameters(), strict=True))


@pytest.mark.parametrize("name", list(METHODS))
def test_runs_that_diverge_are_reported(problem, name):
    done = run(problem, METHODS[name], 1e6, BUDGET._replace(evaluations=16), seed=0)
    assert done.status != "better"
    if done.status == "diverged":
        assert done.reason
        assert done.error == done.held_out == math.inf
        assert done.field is None
    assert done.evaluations <= 16


def test_descent_with_a_huge_rate_diverges(problem):
    assert run(problem, METHODS["full (descent)"], 1e6, BUDGET, seed=0).status == "diverged"


def test_a_seed_repeats_itself(problem):
    method = METHODS["LoRA (orthogonal start)"]
    first, again, other = (run(problem, method, 1e-2, BUDGET, seed=seed) for seed in (5, 5, 6))
    assert first.losses == again.losses
    assert first.error == again.error
    assert first.losses != other.losses


def fake(power, error, *, name="LoRA", status=None):
    begin = 0.5
    status = status or ("better" if error < begin else "worse")
    return Run(name, rate(power), 0, status, "", 4, (1.0,), ((0, begin), (4, error)), error, error, None, 0.1)


def test_ranges_of_a_sweep(problem):
    errors = {-3: 0.4, -2.5: 0.15, -2: 0.1, -1.5: 0.11, -1: 0.3, -0.5: math.inf}
    runs = tuple(
        fake(power, error, status="diverged" if math.isinf(error) else None)
        for power, error in errors.items()
    )
    of_method = Sweep(METHODS["LoRA"], runs, (runs[2],))
    found = ranges(of_method, 0.06)
    assert (found.stable, found.headroom, found.near_best) == (2.0, 1.0, 1.0)
    assert found.censored  # the smallest rate still helps
    assert found.useful == 0.5
    assert ranges(of_method, 0.04).useful is None
    assert Found(problem, [of_method]).target == 0.1
    lost = tuple(replace(done, status="diverged", error=math.inf) for done in runs)
    none = ranges(Sweep(METHODS["LoRA"], lost, (lost[0],)), 0.1)
    assert (none.stable, none.headroom, none.near_best, none.censored) == (0.0, 0.0, 0.0, False)
    assert none.useful is None


def test_sweep_goes_on_at_its_edges(problem, monkeypatch):
    def scripted(_problem, method, lr, _budget, seed):
        power = math.log10(lr)
        error = 0.01 + 0.1 * abs(power + 4) if power < -1.9 else math.inf
        return replace(fake(power, min(error, 9.0), name=method.name), seed=seed, rate=lr)

    monkeypatch.setattr("reproductions.pinn.runs.run", scripted)
    counted = []
    method = METHODS["LoRA"]
    done = sweep(
        problem, method, BUDGET, (0, 1), num_rates=3, max_rates=20, after_run=lambda: counted.append(1)
    )
    assert first_powers(method, 3) == [-2.5, -2.0, -1.5]
    assert [run.rate for run in done.runs] == [rate(-4.5 + i / 2) for i in range(7)]
    assert done.best[0].rate == rate(-4.0)
    assert [run.seed for run in done.best] == [0, 1]
    assert len(counted) == len(done.runs) + 1


def test_lost_seeds_are_named_and_not_averaged_away(problem):
    good, bad = fake(-2, 0.1), replace(fake(-2, math.inf), status="diverged", seed=1)
    lost = Sweep(METHODS["LoRA"], (good,), (good, bad))
    kept = Sweep(METHODS["P-LoRA"], (good,), (good, good))
    assert mean_error(lost) == math.inf
    found = Found(problem, [lost, kept])
    sentences = findings_of(found)
    assert "P-LoRA ends with the smallest error" in sentences[0]
    assert "at the best rate: LoRA (1)" in sentences[-1]
    made = table_of(found)
    assert [row[0] for row in made.rows] == ["P-LoRA", "LoRA"]
    assert made.rows[1][2] == "diverged"
    for figure in figures_of([found])[:2]:
        assert {"LoRA", "P-LoRA"} <= {series.name for series in figure.panels[0].series}


def test_quick_run_is_complete_and_repeats_itself():
    heard = []
    settings = small(
        methods=("full (Adam)", "LoRA", "ODELoRA RK4"), seeds=(0, 1), pretrain_steps=5, pretrain_polish=5
    )
    result = run_pinn(settings, lambda *seen: heard.append(seen))
    assert [table.title.split(",")[0] for table in result.tables] == ["convection", "allen-cahn"]
    assert {row[0] for row in result.tables[0].rows} == set(settings.methods)
    names = ["pinn-rates", "pinn-training", "pinn-convection", "pinn-allen-cahn"]
    assert [figure.name for figure in result.figures] == names
    assert len(result.checks) == 8
    assert heard[-1][0] == heard[-1][1] == len(heard)
    assert json.loads(json.dumps(result.data, allow_nan=False)) == result.data
    runs = result.data["convection"]["methods"]["ODELoRA RK4"]
    assert len(runs["best"]) == 2
    assert runs["start"] == "orthogonal"
    again = run_pinn(settings, silent)
    assert again.data == result.data
    assert again.findings == result.findings


@pytest.mark.messages
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problems": {"heat": (1, 2)}}, "problems must be one of convection, allen-cahn; got 'heat'"),
        ({"methods": ("lora",)}, "methods must be one of"),
        ({"evaluations": 3}, "evaluations"),
        ({"depth": 1}, "depth"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(InputError, match=message):
        small(**changes)
