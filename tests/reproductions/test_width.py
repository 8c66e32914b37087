"""E6: changes of the output against dense formulas, exponents against estimates, nothing left behind."""

import json

import numpy as np
import pytest
import torch

from reproductions.width import QUICK, STARTS, TRAINERS, HiddenLayer, Settings, loglog_slope
from reproductions.width import run as run_width
from tangora import InputError
from tangora.experiments.values import validated

SIZES = {"inputs": 6, "outputs": 3, "num_examples": 5, "rank": 2, "alpha": 6.0}


def layer(width=12, readout="standard", seed=0):
    return HiddenLayer(width, Settings(readout=readout, **SIZES), seed)


def run(**changes):
    return run_width(Settings(**QUICK | changes), lambda _done, _total: None)


@pytest.fixture(scope="module")
def quick():
    return run()


def full_gradient(tested):
    """Gradient of the loss with respect to the square layer's weight, by autograd on a copy."""
    first, _, hidden, _, last = tested._plain
    W = hidden.weight.detach().clone().requires_grad_()
    x, y = tested._batch
    output = torch.tanh(torch.tanh(x @ first.weight.T) @ W.T) @ last.weight.T
    ((output - y).square().sum(-1).mean() / 2).backward()
    return W.grad


def rms(matrix):
    return float(matrix.square().mean().sqrt())


def test_full_descent_changes_the_output_by_the_gradient():
    tested = layer()
    (change,) = tested.changes(TRAINERS["full (SGD)"], "none", 0.1, 1)
    assert change == pytest.approx(0.1 * rms(tested.h @ full_gradient(tested).T), rel=1e-5)


def test_full_adam_changes_the_output_by_the_sign():
    tested = layer()
    (change,) = tested.changes(TRAINERS["full (Adam)"], "none", 0.1, 1)
    assert change == pytest.approx(0.1 * rms(tested.h @ full_gradient(tested).sign().T), rel=1e-3)


@pytest.mark.parametrize("start", STARTS)
def test_lora_pro_changes_the_output_by_the_projected_gradient(start):
    # a small step, so that what is beyond first order does not show; B = 0 has no such term at its first step
    tested, h = layer(), 1e-3
    (change,) = tested.changes(TRAINERS["LoRA-Pro (SGD)"], start, h, 1)
    tested.changes(TRAINERS["LoRA-Pro (SGD)"], start, 0.0, 1)  # back to the start
    hidden = tested._adapted.base_model.model[2]
    A, B = (getattr(hidden, f"lora_{x}")["default"].weight.detach() for x in "AB")
    g = full_gradient(tested)
    P_A = torch.linalg.pinv(A) @ A
    P_B = B @ torch.linalg.pinv(B)
    expected = rms(tested.h @ (P_B @ g + g @ P_A - P_B @ g @ P_A).T)
    assert change / h == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_method_leaves_nothing_behind(name):
    tested, trainer = layer(), TRAINERS[name]
    before = [parameter.clone() for parameter in tested._plain.parameters()]
    first = tested.changes(trainer, "orthogonal", 1e-3, 2)
    for other in TRAINERS.values():
        tested.changes(other, "plain", 1e-2, 1)
    assert tested.changes(trainer, "orthogonal", 1e-3, 2) == first
    assert all(map(torch.equal, tested._plain.parameters(), before))


def test_inputs_of_the_layer_are_of_order_one_at_every_width():
    sizes = [rms(layer(width).h) for width in (16, 64, 256)]
    assert min(sizes) > 0.4
    assert max(sizes) < 1


def test_a_step_that_cannot_be_taken_is_recorded_as_missing():
    changes = layer().changes(TRAINERS["LoRA-Pro (SGD)"], "orthogonal", 1e30, 4)
    assert len(changes) == 4
    assert not np.isfinite(changes[-1])


def test_slope_of_a_power_law_is_its_exponent():
    widths = [10, 100, 1000]
    sizes = np.array([[c * n**0.5 for n in widths] for c in (1, 2, 3)])
    slope = loglog_slope(widths, sizes)
    assert slope.mean == pytest.approx(0.5)
    assert slope.high - slope.low < 1e-9
    assert loglog_slope(widths, sizes[:1]).low is None
    sizes[1, 2] = np.nan
    assert loglog_slope(widths, sizes) is None


def test_interval_is_students():
    sizes = np.array([[1.0, 10.0], [1.0, 100.0], [1.0, 1000.0]])
    slope = loglog_slope([1, 10], sizes)
    assert slope.mean == pytest.approx(2)
    assert slope.high - slope.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-5)


def test_quick_run_has_the_expected_exponents(quick):
    assert [check.claim for check in quick.checks if not check.passed] == []


def test_a_mean_field_readout_lowers_exponents_without_moments_only(quick):
    result = run(readout="mean-field")
    assert [check.claim for check in result.checks if not check.passed] == []
    # against the standard readout's interval the same numbers fail
    by_claim = {check.claim.split(":")[0]: check for check in quick.checks}
    moved = {check.claim.split(":")[0]: check.value for check in result.checks}
    assert moved["full (SGD)"] < by_claim["full (SGD)"].low
    assert moved["full (Adam)"] > by_claim["full (Adam)"].low


def test_quick_run_is_deterministic(quick):
    assert json.dumps(run().data) == json.dumps(quick.data)


@pytest.mark.messages
def test_bad_settings_are_named():
    with pytest.raises(InputError, match=r"at least two different positive numbers; got \[64\]"):
        validated(Settings, {"widths": [64]})
    with pytest.raises(InputError, match="did you mean plain"):
        validated(Settings, {"starts": ["plian"]})
