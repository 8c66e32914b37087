"""What every optimizer of the project promises. A new one is added to OPTIMIZERS and must pass unchanged."""

import copy
import gc
import io
import pickle

import pytest
import torch
from peft import LoraConfig
from torch import nn

from tangora import InputError, find_pairs
from tests.optim.problems import OPTIMIZERS, adamw_of_the_rest, backward, loss_of, problem, trainable

pytestmark = pytest.mark.filterwarnings("ignore:step .* changes A of")
every = pytest.mark.parametrize("name", OPTIMIZERS)


@every
def test_converges(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    first = loss_of(model, x, y).item()
    for _ in range(60):
        backward(model, x, y)
        optimizer.step()
    assert loss_of(model, x, y).item() < 0.5 * first


@every
def test_converges_from_b_equal_zero(name):
    model, x, y = problem(zero_B=True)
    optimizer = OPTIMIZERS[name](model)
    first = loss_of(model, x, y).item()
    for _ in range(60):
        backward(model, x, y)
        optimizer.step()
    assert loss_of(model, x, y).item() < 0.5 * first


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeps_dtypes_and_computes_in_float32(name, dtype):
    model, x, y = problem(dtype=dtype)
    optimizer = OPTIMIZERS[name](model)
    dtypes = [p.dtype for p in model.parameters()]
    for _ in range(3):
        backward(model, x, y)
        optimizer.step()
    assert [p.dtype for p in model.parameters()] == dtypes
    assert all(p.isfinite().all() for p in model.parameters())
    for pair in find_pairs(model):
        for parameter in (pair.A, pair.B):
            assert all(v.dtype == torch.float32 for v in optimizer.state[parameter].values())


@every
@pytest.mark.parametrize("scale", [1e-30, 1e-38, 0.0])
def test_tiny_gradients_leave_everything_finite(name, scale):
    model, x, y = problem(dtype=torch.float32)
    optimizer = OPTIMIZERS[name](model)
    for _ in range(3):
        backward(model, x, y)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(v.isfinite().all() for state in optimizer.state.values() for v in state.values())


def weights_after_a_step(name, steps=2):
    model, x, y = problem(dtype=torch.float32)
    optimizer = OPTIMIZERS[name](model)
    for _ in range(steps):
        with torch.autocast("cpu", enabled=False):
            backward(model, x, y)
        optimizer.step()
    return trainable(model)


@every
def test_a_step_does_not_depend_on_autocast(name):
    expected = weights_after_a_step(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weights_after_a_step(name)
    assert all(map(torch.equal, found, expected))


@every
@pytest.mark.parametrize("change", [{"lr": float("nan")}, {"lr": -1.0}, {"lr": 1.0, "weight_decay": 1.0}])
def test_options_that_are_out_of_range_later_are_refused_before_the_step(name, change):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    before = trainable(model)
    optimizer.param_groups[0].update(change)
    with pytest.raises(InputError):
        optimizer.step()
    assert all(map(torch.equal, trainable(model), before))


def storages(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def alive(model):
    gc.collect()
    known = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    return sum(storages([*known, *(p.grad for p in model.parameters() if p.grad is not None)]).values())


@every
def test_holds_nothing_but_its_state_between_steps(name):
    model, x, y = problem()
    backward(model, x, y)
    before = alive(model)
    optimizer = OPTIMIZERS[name](model)
    made = alive(model)
    optimizer.step()
    after = alive(model)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert made == after == before + sum(storages(states).values())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_dict_round_trip_continues_bit_for_bit(name, dtype):
    model, x, y = problem(dtype=dtype)
    optimizer = OPTIMIZERS[name](model)
    for _ in range(3):
        backward(model, x, y)
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    twin = copy.deepcopy(model)
    buffer.seek(0)
    other = OPTIMIZERS[name](twin)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(3):
        for each, its in ((model, optimizer), (twin, other)):
            backward(each, x, y)
            its.step()
    assert all(torch.equal(a, b) for a, b in zip(trainable(model), trainable(twin), strict=True))
    saved, loaded = optimizer.state_dict()["state"], other.state_dict()["state"]
    for index in saved:
        assert {k: v.dtype for k, v in saved[index].items()} == {k: v.dtype for k, v in loaded[index].items()}


@every
def test_loading_a_state_does_not_share_memory_with_it(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    backward(model, x, y)
    optimizer.step()
    for index, state in kept["state"].items():
        for key, value in state.items():
            assert torch.equal(saved["state"][index][key], value)


@every
def test_state_is_shaped_like_its_parameter(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    optimizer.step()
    for pair in find_pairs(model):
        m, n, r = pair.shape
        for parameter, long in ((pair.A, n), (pair.B, m)):
            for key, value in optimizer.state[parameter].items():
                allowed = {(), tuple(parameter.shape), (long,)}
                if name in ("lora-pro-weight", "lora-pro-auto"):
                    allowed.add((m, n))
                if name == "lora-rite":
                    allowed.add((r, r))
                assert tuple(value.shape) in allowed, key


@every
def test_schedulers_and_zero_learning_rate(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    backward(model, x, y)
    optimizer.step()
    schedule.step()
    before = [s * B @ A for s, A, B in ((p.scaling, p.A, p.B) for p in find_pairs(model))]
    backward(model, x, y)
    optimizer.step()
    after = [s * B @ A for s, A, B in ((p.scaling, p.A, p.B) for p in find_pairs(model))]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(before, after, strict=True))


@every
def test_two_groups_have_their_own_options(name):
    model, x, y = problem()
    pairs = find_pairs(model)
    groups = [{"pairs": pairs[:1], "lr": 0.0}, {"pairs": pairs[1:], "lr": 1e-2}]
    optimizer = OPTIMIZERS[name](groups, lr=1e-2)
    before = [(p.B @ p.A).detach().clone() for p in pairs]
    head = [p.detach().clone() for n, p in model.named_parameters() if "head" in n]
    backward(model, x, y)
    optimizer.step()
    moved = [(b - p.B @ p.A).abs().max().item() for b, p in zip(before, pairs, strict=True)]
    assert moved[0] < 1e-14
    assert min(moved[1:]) > 1e-6
    assert all(
        torch.equal(a, p)
        for a, p in zip(head, (p for n, p in model.named_parameters() if "head" in n), strict=True)
    )


@every
def test_a_group_of_one_equals_its_place_in_a_stack(name):
    (model, x, y), (twin, _, _) = problem(), problem()
    together = OPTIMIZERS[name](model)
    pairs = find_pairs(twin)
    rest = [p for n, p in twin.named_parameters() if p.requires_grad and "lora_" not in n]
    apart = OPTIMIZERS[name]([*({"pairs": [pair]} for pair in pairs), {"params": rest}])
    for _ in range(3):
        for each, its in ((model, together), (twin, apart)):
            backward(each, x, y)
            its.step()
    for a, b in zip(trainable(model), trainable(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every
def test_accumulation_equals_one_big_batch(name):
    (model, x, y), (twin, _, _) = problem(), problem()
    one, other = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    for _ in range(3):
        backward(model, x, y)
        one.step()
        twin.zero_grad()
        for part in (slice(0, 8), slice(8, 16)):
            (loss_of(twin, x[part], y[part]) / 2).backward()
        other.step()
    for a, b in zip(trainable(model), trainable(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@every
def test_closure_is_called_once_and_its_loss_returned(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    calls = []

    def closure():
        calls.append(1)
        return backward(model, x, y)

    expected = loss_of(model, x, y).item()
    assert optimizer.step(closure).item() == expected
    assert len(calls) == 1
    assert loss_of(model, x, y).item() != expected


@every
def test_gradients_are_left_alone(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every
def test_deep_copy_is_independent_and_continues(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    for each, its in ((model, optimizer), (twin, other)):
        backward(each, x, y)
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(trainable(model), trainable(twin), strict=True))
    kept = trainable(twin)
    backward(model, x, y)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, trainable(twin), strict=True))


@every
def test_state_can_be_pickled(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    optimizer.step()
    state = optimizer.state_dict()
    back = pickle.loads(pickle.dumps(state))
    assert back["param_groups"] == state["param_groups"]


@every
def test_a_state_replaced_from_outside_is_used(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    for state in other.state.values():  # what offloading tools do
        for key, value in state.items():
            state[key] = value.clone()
    for each, its in ((model, optimizer), (twin, other)):
        backward(each, x, y)
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(trainable(model), trainable(twin), strict=True))


@every
def test_scaling_is_read_at_every_step(name):
    model, x, y = problem()
    pair = find_pairs(model)[0]
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    optimizer.step()
    pair.layer.scaling["default"] = 0.0  # switched off: g_A = g_B = 0 and no step is possible
    before = pair.A.detach().clone()
    backward(model, x, y)
    optimizer.step()
    assert torch.equal(pair.A, before)
    pair.layer.scaling["default"] = 2.0
    backward(model, x, y)
    optimizer.step()
    assert not torch.equal(pair.A, before)


@every
def test_a_pair_with_one_missing_gradient_takes_no_step(name):
    model, x, y = problem()
    pairs = find_pairs(model)
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    pairs[1].B.grad = None
    before = [(p.A.detach().clone(), p.B.detach().clone()) for p in pairs]
    with pytest.warns(match="two"):
        optimizer.step()
    assert torch.equal(before[1][0], pairs[1].A)
    assert torch.equal(before[1][1], pairs[1].B)
    assert not torch.equal(before[0][1], pairs[0].B)
    backward(model, x, y)  # and the stack of unequal age goes on
    optimizer.step()
    assert not torch.equal(before[1][1], pairs[1].B)


@every
def test_the_rest_is_stepped_by_adamw(name):
    model, x, y = problem()
    twin = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model, lr=1e-2, weight_decay=0.1)
    head = [p for n, p in twin.named_parameters() if p.requires_grad and "lora_" not in n]
    reference = adamw_of_the_rest(twin, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        backward(model, x, y)
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = q.grad
        optimizer.step()
        reference.step()
    mine = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    for a, b in zip(mine, head, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@every
@pytest.mark.messages
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradients_raise_with_the_layer_and_change_nothing(name, bad):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    find_pairs(model)[1].A.grad[0, 0] = bad
    before = trainable(model)
    with pytest.raises(FloatingPointError, match="two"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))
    head = next(p for n, p in model.named_parameters() if p.requires_grad and "head" in n)
    backward(model, x, y)
    head.grad.fill_(bad)
    with pytest.raises(FloatingPointError, match="head"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))


@every
def test_nonfinite_gradients_can_be_skipped(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model, on_nonfinite="skip")
    backward(model, x, y)
    find_pairs(model)[0].B.grad[0, 0] = float("nan")
    before = trainable(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))
    backward(model, x, y)
    optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))


@every
def test_huge_finite_gradients_are_not_mistaken_for_nonfinite_ones(name):
    model, x, y = problem(dtype=torch.float32)
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    head = next(p for n, p in model.named_parameters() if p.requires_grad and "head" in n)
    head.grad.fill_(3e38)  # the sum overflows, the entries do not
    optimizer.step()


@every
def test_grad_scaler_skips_the_step_and_raises_nothing(name):
    model, x, y = problem(dtype=torch.float32)
    optimizer = OPTIMIZERS[name](model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    model.zero_grad()
    scaler.scale(loss_of(model, x, y)).backward()
    find_pairs(model)[0].B.grad[0, 0] = float("inf")
    before = trainable(model)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))
    model.zero_grad()
    scaler.scale(loss_of(model, x, y)).backward()
    scaler.step(optimizer)
    assert not all(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))


@every
def test_works_after_clipping(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@every
@pytest.mark.messages
def test_bad_options_are_named(name):
    model, _, _ = problem()
    with pytest.raises(InputError, match=r"lr must be a number in \[0, inf\); got -1"):
        OPTIMIZERS[name](model, lr=-1.0)
    with pytest.raises(InputError, match=r"betas\[1\]"):
        OPTIMIZERS[name](model, betas=(0.9, 1.0))
    with pytest.raises(InputError, match="weight_decay"):
        OPTIMIZERS[name](model, weight_decay=-0.1)
    with pytest.raises(InputError, match="on_nonfinite must be one of raise, skip"):
        OPTIMIZERS[name](model, on_nonfinite="ignore")


@every
@pytest.mark.messages
def test_what_is_no_lora_model_is_refused(name):
    with pytest.raises(InputError, match="found no trainable LoRA pair"):
        OPTIMIZERS[name](nn.Linear(3, 3))
    with pytest.raises(InputError, match="got Parameters"):
        OPTIMIZERS[name](list(nn.Linear(3, 3).parameters()))
    with pytest.raises(InputError, match="got nothing"):
        OPTIMIZERS[name]([])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_above_the_size_of_a_layer_train(name):
    model, x, y = problem(r=9)  # layers of 6 x 6 and 6 x 4
    optimizer = OPTIMIZERS[name](model)
    first = backward(model, x, y).item()
    for _ in range(20):
        optimizer.step()
        last = backward(model, x, y).item()
    assert last < first
    assert all(parameter.isfinite().all() for parameter in trainable(model))


# ------------------------------------------------------------------ groups, names, hooks and options as in torch


@every
@pytest.mark.messages
def test_a_refused_group_leaves_the_optimizer_as_it_was(name):
    model, x, y = problem()
    pairs = find_pairs(model)
    optimizer = OPTIMIZERS[name](pairs[:2])
    for bad in (
        {"pairs": pairs[2:], "lr": -1.0},
        {"pairs": pairs[:1]},
        {"params": [torch.ones(2) * 2.0, "x"]},
    ):
        with pytest.raises((InputError, ValueError, TypeError)):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == 1
        assert len(optimizer.state_dict()["state"]) == 4
    before = pairs[0].B.detach().clone()
    backward(model, x, y)
    optimizer.step()
    assert not torch.equal(before, pairs[0].B)


@every
def test_a_learning_rate_may_be_a_tensor(name):
    (model, x, y), (twin, _, _) = problem(), problem()
    one, other = (
        OPTIMIZERS[name](model, lr=1e-2),
        OPTIMIZERS[name](twin, lr=torch.tensor(1e-2, dtype=torch.float64)),
    )
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (one, other)]
    for _ in range(3):
        for each, its, schedule in ((model, one, schedules[0]), (twin, other, schedules[1])):
            backward(each, x, y)
            its.step()
            schedule.step()
    assert isinstance(other.param_groups[0]["lr"], torch.Tensor)
    for a, b in zip(trainable(model), trainable(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@every
def test_maximize_climbs_as_far_as_descending_the_negative_loss(name):
    (model, x, y), (twin, _, _) = problem(), problem()
    one, other = OPTIMIZERS[name](model, maximize=True), OPTIMIZERS[name](twin)
    first = loss_of(model, x, y).item()
    for _ in range(3):
        backward(model, x, y)
        one.step()
        twin.zero_grad()
        (-loss_of(twin, x, y)).backward()
        other.step()
    assert loss_of(model, x, y).item() > first
    for a, b in zip(trainable(model), trainable(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@every
@pytest.mark.parametrize("foreach", [True, False])
def test_stacking_is_a_matter_of_speed(name, foreach):
    (model, x, y), (twin, _, _) = problem(), problem()
    one, other = OPTIMIZERS[name](model, foreach=None), OPTIMIZERS[name](twin, foreach=foreach)
    for _ in range(3):
        for each, its in ((model, one), (twin, other)):
            backward(each, x, y)
            its.step()
    for a, b in zip(trainable(model), trainable(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every
def test_step_hooks_run_around_the_step(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    seen = []

    def look(when):
        return lambda its, args, kwargs: seen.append(
            (when, its is optimizer, find_pairs(model)[0].B.detach().clone())
        )

    removable = optimizer.register_step_pre_hook(look("before"))
    optimizer.register_step_post_hook(look("after"))
    backward(model, x, y)
    optimizer.step()
    assert [(when, its) for when, its, _ in seen] == [("before", True), ("after", True)]
    assert not torch.equal(seen[0][2], seen[1][2])
    removable.remove()
    optimizer.step()
    assert [when for when, _, _ in seen[2:]] == ["after"]


@every
def test_state_dict_hooks_run(name):
    model, _, _ = problem()
    optimizer = OPTIMIZERS[name](model)
    optimizer.register_state_dict_post_hook(lambda its, state: {**state, "own": 1})
    loaded = []
    optimizer.register_load_state_dict_post_hook(loaded.append)
    state = optimizer.state_dict()
    assert state.pop("own") == 1
    optimizer.load_state_dict(state)
    assert loaded == [optimizer]


@every
def test_named_parameters_in_groups(name):
    model, x, y = problem()
    head = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    optimizer = OPTIMIZERS[name]([{"params": head}, {"pairs": find_pairs(model)}])
    names = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert [names[key] for key in group["param_names"]] == [*group["params"]]
    backward(model, x, y)
    head[0][1].grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=head[0][0].replace(".", r"\.")):
        optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[1]["param_names"] == optimizer.param_groups[1]["param_names"]
    backward(twin, x, y)
    other.step()


@every
def test_biases_and_norms_do_not_decay(name):
    model, _, _ = problem()
    optimizer = OPTIMIZERS[name](model, weight_decay=0.1)
    of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert of[id(parameter)] == (0.0 if "bias" in key else 0.1), key


@every
def test_repr_shows_options_and_no_tensor(name):
    model, _, _ = problem()
    shown = repr(OPTIMIZERS[name](model))
    assert "weight_decay: 0.0" in shown
    assert "tensor(" not in shown.lower()
    assert len(shown) < 2000


# ------------------------------------------------------------------ states


@every
def test_states_exist_before_the_first_step(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    shapes = {
        index: {key: (value.shape, value.dtype) for key, value in state.items()}
        for index, state in optimizer.state_dict()["state"].items()
    }
    assert len(shapes) == sum(p.requires_grad for p in model.parameters())
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    backward(model, x, y)
    optimizer.step()
    after = optimizer.state_dict()["state"]
    assert shapes == {
        index: {key: (value.shape, value.dtype) for key, value in state.items()}
        for index, state in after.items()
    }


@every
@pytest.mark.parametrize(
    ("saved", "loaded"), [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)]
)
def test_a_state_loads_into_another_dtype(name, saved, loaded):
    (model, x, y), (twin, x2, y2) = problem(dtype=saved), problem(dtype=loaded)
    optimizer, other = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    backward(model, x, y)
    optimizer.step()
    expected = {k: {n: v.dtype for n, v in s.items()} for k, s in other.state_dict()["state"].items()}
    other.load_state_dict(optimizer.state_dict())
    found = other.state_dict()["state"]
    assert {k: {n: v.dtype for n, v in s.items()} for k, s in found.items()} == expected
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if expected[index][key] != torch.bfloat16:
                assert torch.equal(found[index][key], value.to(expected[index][key]))
    backward(twin, x2, y2)
    other.step()


@every
def test_counters_stay_on_the_cpu_after_loading(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    optimizer.step()
    state = optimizer.state_dict()
    for entry in state["state"].values():  # what map_location does with every tensor
        entry["step"] = entry["step"].double()
    optimizer.load_state_dict(state)
    for pair in find_pairs(model):
        assert optimizer.state[pair.A]["step"].device.type == "cpu"
        assert optimizer.state[pair.A]["step"].dtype == torch.float32
        assert optimizer.state[pair.A]["step"] == 1


@every
@pytest.mark.messages
def test_a_state_of_another_adapter_is_refused(name):
    (model, x, y), (twin, _, _) = problem(), problem(r=4)
    optimizer, other = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    backward(model, x, y)
    optimizer.step()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InputError, match="rank"):
        other.load_state_dict(optimizer.state_dict())
    after = other.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())


@every
@pytest.mark.messages
def test_a_state_of_another_optimizer_is_refused(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    sgd = torch.optim.SGD(list(optimizer.param_groups), lr=0.1, momentum=0.9)
    backward(model, x, y)
    sgd.step()
    with pytest.raises(InputError, match="momentum_buffer"):
        optimizer.load_state_dict(sgd.state_dict())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_changes_its_dtype_takes_its_states_along(name, dtype):
    model, x, y = problem(dtype=torch.float32)
    optimizer = OPTIMIZERS[name](model)
    backward(model, x, y)
    optimizer.step()
    model.to(dtype)
    backward(model, x.to(dtype), y.to(dtype))
    optimizer.step()
    assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())
    assert all(optimizer.state[pair.A]["step"] == 2 for pair in find_pairs(model))


# ------------------------------------------------------------------ group["params"] is the truth


def masters(optimizer):
    """Put float32 copies in the place of all parameters, as DeepSpeed and Apex do; returns (copy, original)."""
    swapped = []
    for group in optimizer.param_groups:
        for index, original in enumerate(group["params"]):
            copied = nn.Parameter(original.detach().clone().float())
            group["params"][index] = copied
            swapped.append((copied, original))
    return swapped


@every
@pytest.mark.parametrize("steps_before", [0, 2])
def test_parameters_put_in_place_of_others_are_stepped_with_their_states(name, steps_before):
    (model, x, y), (twin, _, _) = problem(dtype=torch.float32), problem(dtype=torch.float32)
    optimizer, plain = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    for _ in range(steps_before):
        for each, its in ((model, optimizer), (twin, plain)):
            backward(each, x, y)
            its.step()
    swapped = masters(optimizer)
    for _ in range(3):
        backward(model, x, y)
        for copied, original in swapped:
            copied.grad = None if original.grad is None else original.grad.clone()
        optimizer.step()
        with torch.no_grad():
            for copied, original in swapped:
                original.copy_(copied)
        backward(twin, x, y)
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(trainable(model), trainable(twin), strict=True))
    assert {id(p) for p in optimizer.state} == {id(copied) for copied, _ in swapped}
    saved = optimizer.state_dict()["state"]
    assert all(int(saved[index]["step"]) == steps_before + 3 for index in saved)


@every
@pytest.mark.messages
@pytest.mark.parametrize(
    "how", ["one flat vector", "a vector for each", "one is missing", "flattened in place"]
)
def test_flattened_parameters_are_refused(name, how):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    group = optimizer.param_groups[0]
    flat = [nn.Parameter(p.detach().flatten()) for p in group["params"]]
    if how == "one flat vector":
        group["params"] = [nn.Parameter(torch.cat([*map(torch.Tensor.detach, flat)]))]
    elif how == "a vector for each":
        group["params"] = flat
    elif how == "one is missing":
        group["params"] = group["params"][:-1]
    else:
        for parameter in group["params"]:
            parameter.grad = None
            parameter.data = parameter.data.flatten()
    for parameter in group["params"]:
        parameter.grad = torch.zeros_like(parameter)
    for call in (optimizer.step, optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        with pytest.raises(InputError, match="ZeRO"):
            call()


# ------------------------------------------------------------------ nothing trains nothing without a word


@every
@pytest.mark.messages
def test_another_adapter_switched_on(name):
    model, x, y = problem()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False))
    optimizer = OPTIMIZERS[name](model)
    model.set_adapter("second")
    backward(model, x, y)
    with pytest.raises(InputError, match="second"):
        optimizer.step()
    model.set_adapter("default")
    backward(model, x, y)
    optimizer.step()


@every
@pytest.mark.messages
def test_an_adapter_added_later_is_named_once(name):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    model.add_adapter("later", LoraConfig(r=2, target_modules=["head.modules_to_save.default", "one"]))
    backward(model, x, y)
    optimizer.step()  # it is not active
    model.base_model.set_adapter(["default", "later"])
    backward(model, x, y)
    with pytest.warns(UserWarning, match="later"):
        optimizer.step()
    optimizer.step()  # once


@every
@pytest.mark.messages
@pytest.mark.parametrize("cause", ["disabled", "merged", "frozen", "replaced"])
def test_a_step_without_any_gradient_says_why(name, cause):
    model, x, y = problem()
    optimizer = OPTIMIZERS[name](model)
    if cause == "disabled":
        model.base_model.disable_adapter_layers()
    elif cause == "merged":
        model.merge_adapter()
    elif cause == "frozen":
        for pair in find_pairs(model):
            pair.A.requires_grad_(False)
            pair.B.requires_grad_(False)
    else:
        for pair in find_pairs(model):
            holder = pair.layer.lora_A["default"]
            holder.weight = nn.Parameter(holder.weight.detach().clone())
            holder = pair.layer.lora_B["default"]
            holder.weight = nn.Parameter(holder.weight.detach().clone())
    if cause != "disabled":  # then no gradient exists at all
        backward(model, x, y)
    with pytest.raises(InputError, match={"replaced": "fully_shard"}.get(cause, cause)):
        optimizer.step()


@every
@pytest.mark.messages
def test_a_step_before_the_first_backward_is_named_once(name):
    model, _, _ = problem()
    optimizer = OPTIMIZERS[name](model)
    before = trainable(model)
    with pytest.warns(UserWarning, match="backward"):
        optimizer.step()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))


@every
@pytest.mark.messages
@pytest.mark.parametrize("letter", ["A", "B"])
def test_one_frozen_factor(name, letter):
    model, x, y = problem()
    pairs = find_pairs(model)
    getattr(pairs[0], letter).requires_grad_(False)
    other = pairs[0].B if letter == "A" else pairs[0].A
    for params in (model, pairs):  # AdamW takes the factor that can be trained
        with pytest.warns(UserWarning, match=f"factor {letter} is frozen in .*one"):
            optimizer = OPTIMIZERS[name](params)
        before = other.detach().clone()
        backward(model, x, y)
        optimizer.step()
        assert not torch.equal(before, other)
    optimizer = OPTIMIZERS[name](pairs[1:])
    getattr(pairs[1], letter).requires_grad_(False)  # after the optimizer was made
    backward(model, x, y)
    with pytest.raises(InputError, match=f"factor {letter} of .*two was frozen"):
        optimizer.step()
    for pair in pairs:
        getattr(pair, letter).requires_grad_(False)
    for params in (model, pairs, [{"pairs": pairs}]):
        with pytest.raises(InputError, match=f"factor {letter} is frozen in .*one.*two.*three"):
            OPTIMIZERS[name](params)


@every
@pytest.mark.messages
def test_a_frozen_adapter_is_named(name):
    model, _, _ = problem()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="'default' are frozen"):
        OPTIMIZERS[name](model)
