"""What every optimizer of the project promises. A new one is added to OPTIMIZERS and must pass unchanged."""

import copy
import gc
import io
import pickle

import pytest
import torch
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
