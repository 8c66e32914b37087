"""ODELoRA against its reductions, dense references, the integrators' own low-rank schemes, and its orders."""

import copy
import functools
import math

import pytest
import torch

from reproductions.matrix_sensing.low_rank import (
    DenseForce,
    LowRank,
    Truncation,
    ksl_step,
    parallel_bug_step,
    projected_rk_step,
)
from tangora import InputError, LoRAPro, ODELoRA, find_pairs
from tangora.geometry.gauge import GAUGES, imbalance
from tangora.integrate import HEUN, RK4
from tangora.optim.ode_steps import SCHEMES
from tests.cases import combinations
from tests.optim.problems import (
    Quadratic,
    adamw_of_the_rest,
    backward,
    loss_of,
    outside_pairs,
    problem,
    same,
    trainable,
)
from tests.reference import dense
from tests.tolerances import assert_close

ORDERS = {
    "euler": 1,
    "heun": 2,
    "midpoint": 2,
    "bogacki_shampine": 3,
    "rk4": 4,
    "implicit_midpoint": 2,
    "projected_rk2": 2,
    "projected_rk4": 4,
    "ksl": 1,
    "bug": 1,
}
IN_FACTORS = ["euler", "heun", "midpoint", "bogacki_shampine", "rk4"]
EVALUATIONS = {name: order for name, order in ORDERS.items() if name != "implicit_midpoint"} | {"ksl": 3}


def closure_of(toy):
    """The closure of a `Quadratic`."""

    def closure():
        toy.set_gradients()
        return 0.5 * (toy.weights * (toy.W - toy.target) ** 2).sum()

    return closure


def singular(toy, smallest):
    """Give a toy balanced factors with one small singular value."""
    U, _, Vh = torch.linalg.svd((toy.B @ toy.A).detach(), full_matrices=False)
    r = len(toy.A)
    roots = torch.logspace(0, math.log10(smallest), r, dtype=U.dtype).sqrt()
    toy.B.data, toy.A.data = U[:, :r] * roots, roots[:, None] * Vh[:r]
    return toy


@functools.cache
def weights_after(scheme, steps, gauge="lyapunov", time=0.4):
    """The change of all weights at T, and how far the imbalance has drifted."""
    model, x, y = problem(seed=1, modules_to_save=None)
    optimizer = ODELoRA(model, lr=time / steps, scheme=scheme, gauge=gauge, guard=0.0, balance_start=False)
    pairs = find_pairs(model)
    before = [imbalance(*pair.factors()) for pair in pairs]
    for _ in range(steps):
        optimizer.step(lambda: backward(model, x, y))
    drift = [imbalance(*pair.factors()) - was for pair, was in zip(pairs, before, strict=True)]
    weights = torch.cat([pair.delta_weight().flatten() for pair in pairs])
    return weights, torch.cat([part.flatten() for part in drift]).norm().item()


@pytest.mark.parametrize("gauge", GAUGES)
def test_euler_is_lora_pro_without_moments_step_for_step(gauge):
    toy, twin = Quadratic(9, 6, 3, seed=2), Quadratic(9, 6, 3, seed=2)
    mine = ODELoRA(toy.model, lr=5e-2, scheme="euler", gauge=gauge, balance_start=False, guard=0.0)
    its = LoRAPro(twin.model, lr=5e-2, moments=None, gauge=gauge)
    for _ in range(20):
        toy.train(mine, 1)
        twin.train(its, 1)
        assert_close(toy.A.detach(), twin.A.detach(), 1e-12)
        assert_close(toy.B.detach(), twin.B.detach(), 1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_order_of_the_weights(scheme):
    """All schemes approach the same W(T), each at its order."""
    exact = weights_after("rk4", 20)[0]
    errors = [(weights_after(scheme, steps)[0] - exact).norm().item() for steps in (5, 10)]
    assert 0.75 < math.log2(errors[0] / errors[1]) / ORDERS[scheme] < 1.25, errors


@pytest.mark.parametrize("gauge", GAUGES)
def test_the_gauge_does_not_matter_for_the_weights(gauge):
    assert_close(weights_after("rk4", 10, gauge)[0], weights_after("rk4", 20)[0], 1e-5)


@pytest.mark.parametrize(
    ("scheme", "gauge"),
    combinations(IN_FACTORS, ["lyapunov", "sylvester"], quick=lambda scheme, gauge: gauge == "lyapunov"),
)
def test_order_of_the_balance_drift(scheme, gauge):
    drifts = [weights_after(scheme, steps, gauge)[1] for steps in (5, 10)]
    assert math.log2(drifts[0] / drifts[1]) > 0.75 * ORDERS[scheme], drifts


def test_implicit_midpoint_keeps_the_imbalance_and_the_other_gauges_do_not():
    assert weights_after("implicit_midpoint", 5)[1] < 1e-12
    assert weights_after("rk4", 20, "zero")[1] > 1e-3


@pytest.mark.parametrize("start", ["good", "zero B", "singular"])
@pytest.mark.parametrize("shape", [(9, 6, 3), (5, 8, 2), (4, 6, 4)])
def test_bug_is_the_svd_of_the_projected_step(shape, start):
    toy = Quadratic(*shape, seed=1, zero_B=start == "zero B")
    toy = singular(toy, 1e-8) if start == "singular" else toy
    optimizer = ODELoRA(toy.model, lr=0.3, scheme="bug", weight_decay=0.1)
    for _ in range(5):
        A, B, g = toy.A.detach().clone(), toy.B.detach().clone(), toy.gradient(toy.W)
        if (B @ A).norm() == 0:
            step = 0.3 * g @ torch.linalg.pinv(A) @ A  # P_T at B = 0 sees the rows of A only
        else:
            step = 0.3 * (dense.project(A, B, g) + 0.1 * toy.s * B @ A)
        toy.train(optimizer, 1)
        assert_close(toy.W, dense.truncated_svd(toy.s * B @ A - step, shape[2]))
        assert imbalance(toy.A.detach(), toy.B.detach()).norm() < 1e-3 * toy.B.norm() ** 2


@pytest.mark.parametrize("scheme", ["projected_rk2", "projected_rk4", "ksl", "bug"])
def test_low_rank_schemes_are_those_of_the_reproductions(scheme):
    toy = Quadratic(9, 6, 3, seed=4)
    Y = LowRank.from_factors(toy.A.detach(), toy.B.detach())
    optimizer = ODELoRA(toy.model, lr=0.2, scheme=scheme)

    def field(state):
        return tuple(DenseForce(-toy.gradient(toy.s * point.dense()) / toy.s) for point in state)

    steps = {
        "projected_rk2": lambda Y: projected_rk_step(field, (Y,), 0.2, HEUN),
        "projected_rk4": lambda Y: projected_rk_step(field, (Y,), 0.2, RK4),
        "ksl": lambda Y: ksl_step(field, (Y,), 0.2),
        "bug": lambda Y: parallel_bug_step(field, (Y,), 0.2, truncation=Truncation.fixed(3)),
    }
    for _ in range(5):
        (Y,) = steps[scheme](Y).state
        optimizer.step(closure_of(toy))
        assert_close(toy.W / toy.s, Y.dense())


@pytest.mark.parametrize("scheme", EVALUATIONS)
@pytest.mark.parametrize("zero_B", [False, True])
def test_number_of_gradients(scheme, zero_B):
    model, x, y = problem(zero_B=zero_B)
    optimizer = ODELoRA(model, lr=0.05, scheme=scheme)
    calls = []

    def closure():
        calls.append(loss_of(model, x, y).item())
        return backward(model, x, y)

    for step in range(1, 4):
        first = loss_of(model, x, y).item()
        assert optimizer.step(closure).item() == first  # the loss before the step, whatever the stages saw
        assert len(calls) == optimizer.evaluations == step * EVALUATIONS[scheme]
    assert loss_of(model, x, y).item() < calls[0]


@pytest.mark.parametrize("scheme", ["heun", "rk4", "implicit_midpoint", "ksl"])
def test_all_but_pairs_take_one_step_of_adamw_with_the_first_gradient(scheme):
    model, x, y = problem()
    optimizer = ODELoRA(model, lr=0.1, scheme=scheme, adamw_lr=1e-3, weight_decay=0.1)
    twin = copy.deepcopy(model)
    head = outside_pairs(twin)
    reference = adamw_of_the_rest(twin, lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        twin.load_state_dict(
            {**model.state_dict(), **{k: v for k, v in twin.state_dict().items() if "head" in k}}
        )
        backward(twin, x, y)
        reference.step()
        gradients = [p.grad.clone() for p in twin.parameters() if p.grad is not None]
        optimizer.step(lambda: backward(model, x, y))
        for a, b in zip(outside_pairs(model), head, strict=True):
            assert_close(a.detach(), b.detach(), 1e-12)
        left = [p.grad for p in model.parameters() if p.grad is not None]
        for a, b in zip(left, gradients, strict=True):  # gradients are left as the first stage's
            assert_close(a, b, 1e-10)


@pytest.mark.parametrize(
    ("scheme", "smallest"),
    combinations(IN_FACTORS, [0.0, 1e-10, 1e-6], quick=lambda scheme, _: scheme in {"euler", "rk4"}),
)
def test_small_singular_values_do_no_harm(scheme, smallest):
    toy, twin = (singular(Quadratic(20, 18, 4, seed=5), smallest or 1e-6) for _ in range(2))
    if not smallest:
        for each in (toy, twin):
            each.B.data[:, -1] = 0.0
    calm = ODELoRA(toy.model, lr=0.05, scheme=scheme)
    wild = ODELoRA(twin.model, lr=0.05, scheme=scheme, guard=0.0, balance_start=False)
    start = closure_of(toy)().item()
    for _ in range(20):
        calm.step(closure_of(toy))
    assert closure_of(toy)().item() < 0.8 * start
    if smallest == 1e-10:  # the negative control: in the factors such a step leaves every bound
        wild.step(closure_of(twin))
        assert not closure_of(twin)().item() < 1e3 * start


def test_a_learning_rate_of_zero_changes_nothing_and_the_start_is_balanced_after_it():
    model, x, y = problem(zero_B=True)
    optimizer = ODELoRA(model, lr=0.0, scheme="heun")
    before = trainable(model)
    optimizer.step(lambda: backward(model, x, y))
    for a, b in zip(before, trainable(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step(lambda: backward(model, x, y))
    for pair in find_pairs(model):
        A, B = pair.factors()
        assert B.norm() > 0
        assert imbalance(A, B).norm() < 1e-5 * B.norm() ** 2


def test_balance_start_and_rebalancing_leave_the_weights_alone():
    toys = [Quadratic(9, 6, 3, seed=6) for _ in range(3)]
    options = [{}, {"balance_start": False}, {"rebalance_every": 2}]
    for toy, option in zip(toys, options, strict=True):
        optimizer = ODELoRA(toy.model, lr=0.0, **option)
        W = toy.W
        for _ in range(2):
            optimizer.step(closure_of(toy))
        assert_close(toy.W, W, 1e-13)
    drifts = [imbalance(toy.A.detach(), toy.B.detach()).norm() for toy in toys]
    assert drifts[0] < 1e-12
    assert drifts[1] > 1
    assert drifts[2] < 1e-12


@pytest.mark.parametrize("every", [None, 3])
def test_rebalancing_removes_the_drift(every):
    toy = Quadratic(9, 6, 3, seed=6)
    optimizer = ODELoRA(toy.model, lr=0.1, scheme="euler", rebalance_every=every)
    for _ in range(6):
        optimizer.step(closure_of(toy))
    assert (imbalance(toy.A.detach(), toy.B.detach()).norm() < 1e-12) == (every is not None)


def rank_of(toy):
    zero = [(toy.B[:, j] == 0).all().item() and (toy.A[j] == 0).all().item() for j in range(len(toy.A))]
    return len(zero) - sum(zero)


def test_bug_finds_the_rank_and_lets_it_grow_again():
    toy = Quadratic(12, 10, 6, seed=7, zero_B=True)
    U, _, Vh = torch.linalg.svd(toy.target, full_matrices=False)
    toy.weights[:] = 1.0
    toy.target = U[:, :2] * 5 @ Vh[:2]
    optimizer = ODELoRA(toy.model, lr=0.5, scheme="bug", tolerance=1e-2)
    for _ in range(40):
        optimizer.step(closure_of(toy))
    assert rank_of(toy) == 2
    assert_close(toy.W, toy.target, 2e-2)
    seen = toy.B.grad[:, (toy.B == 0).all(0)]
    assert (seen == 0).all()
    # not orthogonal to what is there: directions that neither factor sees a part of stay invisible
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(k, 5, dtype=torch.float64, generator=generator) for k in (12, 10))
    toy.target = left @ right.T
    for _ in range(60):
        before = rank_of(toy)
        optimizer.step(closure_of(toy))
        assert rank_of(toy) <= 2 * before
    assert rank_of(toy) == 5
    assert_close(toy.W, toy.target, 4e-2)


@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_bug_cuts_no_more_than_its_tolerance(tolerance):
    toy = Quadratic(9, 8, 5, seed=8)
    A, B, g = toy.A.detach().clone(), toy.B.detach().clone(), toy.gradient(toy.W)
    whole = dense.truncated_svd(toy.s * B @ A - 0.1 * dense.project(A, B, g), 5)
    ODELoRA(toy.model, lr=0.1, scheme="bug", tolerance=tolerance).step(closure_of(toy))
    values = torch.linalg.svdvals(whole)
    lost = [values[k:].norm() / values.norm() for k in range(6)]
    assert rank_of(toy) == next(k for k, share in enumerate(lost) if share <= tolerance)
    assert (toy.W - whole).norm() <= tolerance * whole.norm() * (1 + 1e-9)


class Failing:
    """A closure whose gradient, or whose call, fails at its k-th evaluation."""

    def __init__(self, model, x, y, k, problem):
        self.parts, self.calls, self.k, self.problem = (model, x, y), 0, k, problem

    def __call__(self):
        self.calls += 1
        loss = backward(*self.parts)
        if self.calls == self.k and self.problem == "nan":
            find_pairs(self.parts[0])[1].A.grad[0, 0] = float("nan")
        if self.calls == self.k and self.problem == "huge":
            for p in self.parts[0].parameters():
                if p.grad is not None:
                    p.grad *= 1e300
        if self.calls == self.k and self.problem == "stop":
            raise KeyboardInterrupt
        return loss


@pytest.mark.messages
@pytest.mark.parametrize(
    ("scheme", "trouble"),
    [
        (scheme, trouble)
        for scheme in ("heun", "rk4", "projected_rk2", "implicit_midpoint", "ksl")
        for trouble in ("nan", "stop")
    ]
    + [("rk4", "huge"), ("ksl", "huge")],
)
def test_a_failing_stage_restores_everything_and_is_named(scheme, trouble):
    model, x, y = problem()
    optimizer = ODELoRA(model, lr=0.1, scheme=scheme)
    optimizer.step(lambda: backward(model, x, y))
    before, states = trainable(model), copy.deepcopy(optimizer.state_dict()["state"])
    backward(model, x, y)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    error = KeyboardInterrupt if trouble == "stop" else FloatingPointError
    where = {
        "nan": f"evaluation 2 of a step of {scheme}: .*two",
        "huge": f"evaluation [23] of a step of {scheme}",
    }
    with pytest.raises(error, match=where.get(trouble)):
        optimizer.step(Failing(model, x, y, 2, trouble))
    assert same(before, trainable(model))
    left = [p.grad for p in model.parameters() if p.grad is not None]
    assert same(gradients, left)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, states[index][key]) for key, value in state.items())
    optimizer.step(lambda: backward(model, x, y))  # and it goes on from there
    assert not torch.equal(before[0], trainable(model)[0])


def test_a_failing_stage_can_be_skipped():
    model, x, y = problem()
    optimizer = ODELoRA(model, lr=0.1, scheme="rk4", on_nonfinite="skip")
    before = trainable(model)
    assert optimizer.step(Failing(model, x, y, 3, "nan")).isfinite()
    assert same(before, trainable(model))
    assert optimizer.evaluations == 3


@pytest.mark.messages
def test_an_implicit_solve_that_does_not_converge_is_a_failure():
    toy = Quadratic(9, 6, 3, seed=9)
    optimizer = ODELoRA(toy.model, lr=30.0, scheme="implicit_midpoint", guard=0.0)
    before = toy.W
    with pytest.raises(FloatingPointError, match="implicit_midpoint"):
        optimizer.step(closure_of(toy))
    assert torch.equal(before, toy.W)


def test_groups_have_their_own_step_sizes_in_all_stages():
    """Two groups at one learning rate are one group."""
    (model, x, y), (twin, _, _) = problem(), problem()
    pairs = find_pairs(twin)
    groups = [{"pairs": pairs[:1], "lr": 0.1}, {"pairs": pairs[1:]}, {"params": outside_pairs(twin)}]
    one, other = ODELoRA(model, lr=0.1), ODELoRA(groups, lr=0.1)
    for _ in range(3):
        one.step(lambda: backward(model, x, y))
        other.step(lambda: backward(twin, x, y))
    for a, b in zip(trainable(model), trainable(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    other.param_groups[0]["lr"] = 0.0
    kept, moved = (pairs[k].delta_weight() for k in (0, 1))
    other.step(lambda: backward(twin, x, y))
    assert_close(pairs[0].delta_weight(), kept, 1e-12)
    assert (pairs[1].delta_weight() - moved).norm() > 1e-4


def test_replay_takes_the_place_of_the_closure():
    (model, x, y), (twin, _, _) = problem(), problem()
    one, other = ODELoRA(model, lr=0.1), ODELoRA(twin, lr=0.1)
    other.replay = lambda: backward(twin, x, y)
    for _ in range(2):
        one.step(lambda: backward(model, x, y))
        backward(twin, x, y)
        assert other.step() is None
    assert same(trainable(model), trainable(twin))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_multi_stage_state_dict_round_trip(scheme):
    model, x, y = problem(zero_B=True)
    optimizer = ODELoRA(model, lr=0.1, scheme=scheme)
    optimizer.step(lambda: backward(model, x, y))
    twin = copy.deepcopy(model)
    other = ODELoRA(twin, lr=0.3, scheme=scheme)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (twin, other)):
        its.step(lambda each=each: backward(each, x, y))
    assert same(trainable(model), trainable(twin))
    assert other.evaluations == optimizer.evaluations > 0
    assert copy.deepcopy(other).scheme == scheme


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zero_B", [False, True])
def test_low_precision(dtype, zero_B):
    model, x, y = problem(dtype=dtype, zero_B=zero_B)
    optimizer = ODELoRA(model, lr=0.1, scheme="heun")
    first = loss_of(model, x, y).item()
    for _ in range(20):
        optimizer.step(lambda: backward(model, x, y))
    assert loss_of(model, x, y).item() < 0.9 * first
    assert all(pair.A.dtype == dtype for pair in find_pairs(model))


@pytest.mark.messages
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "rk44"}, "scheme must be one of .*did you mean rk4"),
        ({"gauge": "none"}, "gauge must be one of"),
        ({"scheme": "heun", "tolerance": 0.1}, "tolerance must be 0 with scheme 'heun'"),
        ({"scheme": "bug", "tolerance": 1.0}, r"tolerance must be a number in \[0, 1\)"),
        ({"rebalance_every": 0}, "rebalance_every"),
        ({"guard": -1}, "guard"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        ODELoRA(problem()[0], lr=0.1, **options)


@pytest.mark.messages
def test_several_stages_need_a_closure():
    model, x, y = problem()
    backward(model, x, y)
    with pytest.raises(InputError, match=r"closure.*rk4"):
        ODELoRA(model, lr=0.1).step()
