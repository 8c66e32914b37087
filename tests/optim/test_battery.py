"""What every optimizer of the project promises. A new one is added to OPTIMIZERS and must pass unchanged."""

import copy
import gc
import inspect
import io
import pickle

import pytest
import torch
from peft import LoraConfig
from torch import nn

from tangora import InputError
from tests.optim.problems import (
    OPTIMIZERS,
    Training,
    adamw_of_the_rest,
    assert_near,
    loss_of,
    outside_pairs,
    problem,
    same,
)

pytestmark = pytest.mark.filterwarnings("ignore:step .* changes A of")
every = pytest.mark.parametrize("name", OPTIMIZERS)
# what the common base class does, whatever the step: one method that steps layer by layer, one that steps all at once
both_bases = pytest.mark.parametrize("name", ["tangent", "odelora-bug"])


@every
@pytest.mark.parametrize("zero_B", [False, True])
def test_converges(name, zero_B):
    run = Training(name, of=problem(zero_B=zero_B))
    first = run.loss()
    assert run.step(40).loss() < 0.7 * first


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeps_dtypes_and_computes_in_float32(name, dtype):
    run = Training(name, of=problem(dtype=dtype))
    dtypes = [p.dtype for p in run.model.parameters()]
    run.step(3)
    assert [p.dtype for p in run.model.parameters()] == dtypes
    assert all(p.isfinite().all() for p in run.parameters())
    for pair in run.pairs:
        for parameter in (pair.A, pair.B):
            assert all(v.dtype == torch.float32 for v in run.optimizer.state[parameter].values())


@every
@pytest.mark.parametrize("scale", [1e-30, 1e-38, 0.0])
def test_tiny_gradients_leave_everything_finite(name, scale):
    run = Training(name, of=problem(dtype=torch.float32))
    for _ in range(3):
        run.backward()
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        run.optimizer.step()
    assert all(p.isfinite().all() for p in run.parameters())
    assert all(v.isfinite().all() for state in run.optimizer.state.values() for v in state.values())


@every
def test_a_step_does_not_depend_on_autocast(name):
    plain, cast = (Training(name, of=problem(dtype=torch.float32)) for _ in range(2))
    plain.step(2)
    for _ in range(2):
        cast.backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast.optimizer.step()
    assert same(plain.parameters(), cast.parameters())


@both_bases
@pytest.mark.parametrize("change", [{"lr": float("nan")}, {"lr": -1.0}, {"lr": 1.0, "weight_decay": 1.0}])
def test_options_that_are_out_of_range_later_are_refused_before_the_step(name, change):
    run = Training(name)
    before = run.parameters()
    run.optimizer.param_groups[0].update(change)
    with pytest.raises(InputError):
        run.step()
    assert same(run.parameters(), before)


def storages(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def alive(model):
    gc.collect()
    known = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    return sum(storages([*known, *(p.grad for p in model.parameters() if p.grad is not None)]).values())


@every
def test_holds_nothing_but_its_state_between_steps(name):
    run = Training(name)
    run.backward()
    del run.optimizer
    before = alive(run.model)
    optimizer = OPTIMIZERS[name](run.model)
    made = alive(run.model)
    optimizer.step()
    after = alive(run.model)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert made == after == before + sum(storages(states).values())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_dict_round_trip_continues_bit_for_bit(name, dtype):
    run = Training(name, of=problem(dtype=dtype)).step(3)
    buffer = io.BytesIO()
    torch.save(run.optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = Training(name, of=(copy.deepcopy(run.model), run.x, run.y))
    twin.optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(run.step(3).parameters(), twin.step(3).parameters())
    saved, loaded = run.optimizer.state_dict()["state"], twin.optimizer.state_dict()["state"]
    for index in saved:
        assert {k: v.dtype for k, v in saved[index].items()} == {k: v.dtype for k, v in loaded[index].items()}


@every
def test_loading_a_state_does_not_share_memory_with_it(name):
    run = Training(name).step()
    saved = copy.deepcopy(run.optimizer.state_dict())
    kept = copy.deepcopy(saved)
    run.optimizer.load_state_dict(saved)
    run.step()
    for index, state in kept["state"].items():
        for key, value in state.items():
            assert torch.equal(saved["state"][index][key], value)


@every
def test_state_is_shaped_like_its_parameter(name):
    run = Training(name).step()
    for pair in run.pairs:
        m, n, r = pair.shape
        of_the_method = {"lora-pro-weight": (m, n), "lora-pro-auto": (m, n), "lora-rite": (r, r)}
        for parameter, long in ((pair.A, n), (pair.B, m)):
            allowed = {(), tuple(parameter.shape), (long,), of_the_method.get(name)}
            for key, value in run.optimizer.state[parameter].items():
                assert tuple(value.shape) in allowed, key


@every
def test_schedulers_and_zero_learning_rate(name):
    run = Training(name)
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0 if step == 0 else 0.0)
    run.step()
    schedule.step()
    before = [pair.delta_weight() for pair in run.pairs]
    run.step()
    for was, pair in zip(before, run.pairs, strict=True):
        torch.testing.assert_close(pair.delta_weight(), was, rtol=0, atol=1e-12)


@every
def test_two_groups_have_their_own_options(name):
    run = Training(
        name,
        groups=lambda run: [{"pairs": run.pairs[:1], "lr": 0.0}, {"pairs": run.pairs[1:], "lr": 1e-2}],
        lr=1e-2,
    )
    before = [pair.delta_weight() for pair in run.pairs]
    head = [p.detach().clone() for p in outside_pairs(run.model)]
    run.step()
    moved = [float((was - p.delta_weight()).abs().max()) for was, p in zip(before, run.pairs, strict=True)]
    assert moved[0] < 3e-14
    assert min(moved[1:]) > 3e-6
    assert same(head, outside_pairs(run.model))


@every
def test_a_group_of_one_equals_its_place_in_a_stack(name):
    apart = Training(
        name,
        groups=lambda run: [*({"pairs": [pair]} for pair in run.pairs), {"params": outside_pairs(run.model)}],
    )
    assert_near(Training(name).step(3), apart.step(3))


@every
def test_stacking_is_a_matter_of_speed(name):
    assert_near(Training(name, foreach=None).step(3), Training(name, foreach=False).step(3))


@every
def test_accumulation_equals_one_big_batch(name):
    whole, parts = Training(name).step(3), Training(name)
    for _ in range(3):
        parts.model.zero_grad()
        for part in (slice(0, 8), slice(8, 16)):
            (loss_of(parts.model, parts.x[part], parts.y[part]) / 2).backward()
        parts.optimizer.step()
    assert_near(whole, parts, rtol=1e-7, atol=1e-9)


@every
def test_closure_is_called_once_and_its_loss_returned(name):
    run, calls = Training(name), []

    def closure():
        calls.append(1)
        return run.backward()

    expected = run.loss()
    assert run.optimizer.step(closure).item() == expected
    assert len(calls) == 1
    assert run.loss() != expected


@every
def test_gradients_are_left_alone(name):
    run = Training(name)
    run.backward()
    before = [p.grad.clone() for p in run.model.parameters() if p.grad is not None]
    run.optimizer.step()
    assert same(before, [p.grad for p in run.model.parameters() if p.grad is not None])


@every
def test_deep_copy_is_independent_and_continues(name):
    run = Training(name).step()
    twin = run.copy()
    assert same(run.step().parameters(), twin.step().parameters())
    kept = twin.parameters()
    run.step()
    assert same(kept, twin.parameters())


@every
def test_state_can_be_pickled(name):
    state = Training(name).step().optimizer.state_dict()
    assert pickle.loads(pickle.dumps(state))["param_groups"] == state["param_groups"]


@every
def test_a_state_replaced_from_outside_is_used(name):
    run = Training(name).step()
    twin = run.copy()
    for state in twin.optimizer.state.values():  # what offloading tools do
        for key, value in state.items():
            state[key] = value.clone()
    assert same(run.step().parameters(), twin.step().parameters())


@every
def test_scaling_is_read_at_every_step(name):
    run = Training(name).step()
    pair = run.pairs[0]
    pair.layer.scaling["default"] = 0.0  # switched off: g_A = g_B = 0 and no step is possible
    before = pair.A.detach().clone()
    run.step()
    assert torch.equal(pair.A, before)
    pair.layer.scaling["default"] = 2.0
    run.step()
    assert not torch.equal(pair.A, before)


@every
def test_a_pair_with_one_missing_gradient_takes_no_step(name):
    run = Training(name)
    run.backward()
    run.pairs[1].B.grad = None
    before = [(p.A.detach().clone(), p.B.detach().clone()) for p in run.pairs]
    with pytest.warns(match="two"):
        run.optimizer.step()
    assert same([*before[1]], [run.pairs[1].A, run.pairs[1].B])
    assert not torch.equal(before[0][1], run.pairs[0].B)
    run.step()  # and the stack of unequal age goes on
    assert not torch.equal(before[1][1], run.pairs[1].B)


@every
def test_the_rest_is_stepped_by_adamw(name):
    run = Training(name, lr=1e-2, weight_decay=0.1)
    twin = copy.deepcopy(run.model)
    reference = adamw_of_the_rest(twin, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        run.backward()
        for p, q in zip(twin.parameters(), run.model.parameters(), strict=True):
            p.grad = q.grad
        run.optimizer.step()
        reference.step()
    for a, b in zip(outside_pairs(run.model), outside_pairs(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@every
@pytest.mark.messages
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradients_raise_with_the_layer_and_change_nothing(name, bad):
    run = Training(name)
    before = run.parameters()
    for where, parameter in (("two", run.pairs[1].A), ("head", outside_pairs(run.model)[0])):
        run.backward()
        parameter.grad.fill_(bad)
        with pytest.raises(FloatingPointError, match=where):
            run.optimizer.step()
        assert same(before, run.parameters())


@every
def test_nonfinite_gradients_can_be_skipped(name):
    run = Training(name, on_nonfinite="skip")
    before = run.parameters()
    run.backward()
    run.pairs[0].B.grad[0, 0] = float("nan")
    run.optimizer.step()
    assert same(before, run.parameters())
    assert not same(before, run.step().parameters())


@both_bases
def test_huge_finite_gradients_are_not_mistaken_for_nonfinite_ones(name):
    run = Training(name, of=problem(dtype=torch.float32))
    run.backward()
    outside_pairs(run.model)[0].grad.fill_(3e38)  # the sum overflows, the entries do not
    run.optimizer.step()


@both_bases
def test_grad_scaler_skips_the_step_and_raises_nothing(name):
    run = Training(name, of=problem(dtype=torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = run.parameters()
    for bad in (True, False):
        run.model.zero_grad()
        scaler.scale(loss_of(run.model, run.x, run.y)).backward()
        if bad:
            run.pairs[0].B.grad[0, 0] = float("inf")
        scaler.step(run.optimizer)
        scaler.update()
        assert same(before, run.parameters()) == bad


@every
@pytest.mark.messages
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be a number in \[0, inf\); got -1"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of raise, skip"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(InputError, match=message):
        Training(name, **options)


@every
@pytest.mark.messages
def test_options_are_those_of_the_signature(name):
    run = Training(name)
    kind = type(run.optimizer)
    known = inspect.signature(kind).parameters
    assert {"betas", "eps", "weight_decay", "maximize", "foreach", "on_nonfinite"} <= known.keys()
    for unknown in {"bogus", "own", "adamw_lr"} - known.keys():
        with pytest.raises(TypeError, match=f"{kind.__name__}.*{unknown}"):
            kind(run.model, lr=1e-3, **{unknown: 0.1})


@every
@pytest.mark.messages
def test_what_is_no_lora_model_is_refused(name):
    layer = nn.Linear(3, 3)
    for params, message in (
        (layer, "found no trainable LoRA pair"),
        (list(layer.parameters()), "Parameters"),
        ([], "nothing"),
    ):
        with pytest.raises(InputError, match=message):
            OPTIMIZERS[name](params)


@every
def test_ranks_above_the_size_of_a_layer_train(name):
    run = Training(name, of=problem(r=9))  # layers of 6 x 6 and 6 x 4
    first = run.loss()
    assert run.step(8).loss() < first
    assert all(parameter.isfinite().all() for parameter in run.parameters())


# ------------------------------------------------------------------ groups, names, hooks and options as in torch


@both_bases
@pytest.mark.messages
def test_a_refused_group_leaves_the_optimizer_as_it_was(name):
    run = Training(name, groups=lambda run: run.pairs[:2])
    for bad in (
        {"pairs": run.pairs[2:], "lr": -1.0},
        {"pairs": run.pairs[:1]},
        {"params": [torch.ones(2) * 2.0, "x"]},
    ):
        with pytest.raises((InputError, ValueError, TypeError)):
            run.optimizer.add_param_group(bad)
        assert len(run.optimizer.param_groups) == 1
        assert len(run.optimizer.state_dict()["state"]) == 4
    before = run.pairs[0].B.detach().clone()
    run.step()
    assert not torch.equal(before, run.pairs[0].B)


@every
def test_a_learning_rate_may_be_a_tensor(name):
    runs = [Training(name, lr=1e-2), Training(name, lr=torch.tensor(1e-2, dtype=torch.float64))]
    for run in runs:
        schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
        for _ in range(3):
            run.step()
            schedule.step()
    assert isinstance(runs[1].optimizer.param_groups[0]["lr"], torch.Tensor)
    assert_near(*runs, rtol=1e-12, atol=1e-14)


@every
def test_maximize_climbs_as_far_as_descending_the_negative_loss(name):
    climbing, descending = Training(name, maximize=True), Training(name)
    first = climbing.loss()
    assert climbing.step(3).loss() > first
    for _ in range(3):
        descending.model.zero_grad()
        (-loss_of(descending.model, descending.x, descending.y)).backward()
        descending.optimizer.step()
    assert_near(climbing, descending, rtol=1e-12, atol=1e-14)


@both_bases
def test_step_hooks_run_around_the_step(name):
    run, seen = Training(name), []

    def look(when):
        return lambda its, args, kwargs: seen.append(
            (when, its is run.optimizer, run.pairs[0].B.detach().clone())
        )

    removable = run.optimizer.register_step_pre_hook(look("before"))
    run.optimizer.register_step_post_hook(look("after"))
    run.step()
    assert [(when, its) for when, its, _ in seen] == [("before", True), ("after", True)]
    assert not torch.equal(seen[0][2], seen[1][2])
    removable.remove()
    run.step()
    assert [when for when, _, _ in seen[2:]] == ["after"]


@both_bases
def test_state_dict_hooks_run(name):
    optimizer, loaded = Training(name).optimizer, []
    optimizer.register_state_dict_post_hook(lambda its, state: {**state, "own": 1})
    optimizer.register_load_state_dict_post_hook(loaded.append)
    state = optimizer.state_dict()
    assert state.pop("own") == 1
    optimizer.load_state_dict(state)
    assert loaded == [optimizer]


@both_bases
def test_named_parameters_in_groups(name):
    of = problem()
    head = [(n, p) for n, p in of[0].named_parameters() if p.requires_grad and "lora_" not in n]
    run = Training(name, of=of, groups=lambda run: [{"params": head}, {"pairs": run.pairs}])
    names = dict(run.model.named_parameters())
    for group in run.optimizer.param_groups:
        assert [names[key] for key in group["param_names"]] == [*group["params"]]
    run.backward()
    head[0][1].grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=head[0][0].replace(".", r"\.")):
        run.optimizer.step()
    twin = run.copy()
    twin.optimizer.load_state_dict(run.optimizer.state_dict())
    assert twin.optimizer.param_groups[1]["param_names"] == run.optimizer.param_groups[1]["param_names"]
    twin.step()


@both_bases
def test_biases_and_norms_do_not_decay(name):
    run = Training(name, weight_decay=0.1)
    of = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    for key, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            assert of[id(parameter)] == (0.0 if "bias" in key else 0.1), key


@every
def test_repr_shows_options_and_no_tensor(name):
    shown = repr(Training(name).optimizer)
    assert "weight_decay: 0.0" in shown
    assert "tensor(" not in shown.lower()
    assert len(shown) < 2000


# ------------------------------------------------------------------ states


@every
def test_states_exist_before_the_first_step(name):
    run = Training(name)

    def shapes():
        states = run.optimizer.state_dict()["state"]
        return {i: {key: (value.shape, value.dtype) for key, value in s.items()} for i, s in states.items()}

    before = shapes()
    assert len(before) == len(run.parameters())
    assert all(not value.any() for state in run.optimizer.state.values() for value in state.values())
    run.step()
    assert before == shapes()


@every
@pytest.mark.parametrize(
    ("saved", "loaded"), [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)]
)
def test_a_state_loads_into_another_dtype(name, saved, loaded):
    run, other = Training(name, of=problem(dtype=saved)).step(), Training(name, of=problem(dtype=loaded))

    def dtypes():
        states = other.optimizer.state_dict()["state"]
        return {i: {key: value.dtype for key, value in s.items()} for i, s in states.items()}

    expected = dtypes()
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    assert dtypes() == expected
    found = other.optimizer.state_dict()["state"]
    for index, state in run.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if expected[index][key] != torch.bfloat16:
                assert torch.equal(found[index][key], value.to(expected[index][key]))
    other.step()


@both_bases
def test_counters_stay_on_the_cpu_after_loading(name):
    run = Training(name).step()
    state = run.optimizer.state_dict()
    for entry in state["state"].values():  # what map_location does with every tensor
        entry["step"] = entry["step"].double()
    run.optimizer.load_state_dict(state)
    for pair in run.pairs:
        counter = run.optimizer.state[pair.A]["step"]
        assert (counter.device.type, counter.dtype, counter.item()) == ("cpu", torch.float32, 1)


@every
@pytest.mark.messages
def test_a_state_of_another_adapter_is_refused(name):
    run, other = Training(name).step(), Training(name, of=problem(r=4))
    before = copy.deepcopy(other.optimizer.state_dict())
    with pytest.raises(InputError, match="rank"):
        other.optimizer.load_state_dict(run.optimizer.state_dict())
    after = other.optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())


@every
@pytest.mark.messages
def test_a_state_of_another_optimizer_is_refused(name):
    run = Training(name)
    sgd = torch.optim.SGD(list(run.optimizer.param_groups), lr=0.1, momentum=0.9)
    run.backward()
    sgd.step()
    with pytest.raises(InputError, match="momentum_buffer"):
        run.optimizer.load_state_dict(sgd.state_dict())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_changes_its_dtype_takes_its_states_along(name, dtype):
    run = Training(name, of=problem(dtype=torch.float32)).step()
    run.model.to(dtype)
    run.x, run.y = run.x.to(dtype), run.y.to(dtype)
    run.step()
    assert all(p.isfinite().all() and p.dtype == dtype for p in run.parameters())
    assert all(run.optimizer.state[pair.A]["step"] == 2 for pair in run.pairs)


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
def test_parameters_put_in_place_of_others_are_stepped_with_their_states(name):
    run, plain = (Training(name, of=problem(dtype=torch.float32)).step(2) for _ in range(2))
    swapped = masters(run.optimizer)
    for _ in range(3):
        run.backward()
        for copied, original in swapped:
            copied.grad = None if original.grad is None else original.grad.clone()
        run.optimizer.step()
        with torch.no_grad():
            for copied, original in swapped:
                original.copy_(copied)
    assert same(run.parameters(), plain.step(3).parameters())
    assert {id(p) for p in run.optimizer.state} == {id(copied) for copied, _ in swapped}
    saved = run.optimizer.state_dict()["state"]
    assert all(int(saved[index]["step"]) == 2 + 3 for index in saved)


@both_bases
@pytest.mark.messages
@pytest.mark.parametrize(
    "how", ["one flat vector", "a vector for each", "one is missing", "flattened in place"]
)
def test_flattened_parameters_are_refused(name, how):
    run = Training(name)
    run.backward()
    group = run.optimizer.param_groups[0]
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
    for call in (run.optimizer.step, run.optimizer.state_dict, lambda: run.optimizer.load_state_dict({})):
        with pytest.raises(InputError, match="ZeRO"):
            call()


# ------------------------------------------------------------------ nothing trains nothing without a word


@both_bases
@pytest.mark.messages
def test_another_adapter_switched_on(name):
    of = problem()
    of[0].add_adapter("second", LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False))
    run = Training(name, of=of)
    run.model.set_adapter("second")
    with pytest.raises(InputError, match="second"):
        run.step()
    run.model.set_adapter("default")
    run.step()


@both_bases
@pytest.mark.messages
def test_an_adapter_added_later_is_named_once(name):
    run = Training(name)
    run.model.add_adapter("later", LoraConfig(r=2, target_modules=["head.modules_to_save.default", "one"]))
    run.step()  # it is not active
    run.model.base_model.set_adapter(["default", "later"])
    with pytest.warns(UserWarning, match="later"):
        run.step()
    run.optimizer.step()  # once


@both_bases
@pytest.mark.messages
@pytest.mark.parametrize("cause", ["disabled", "merged", "frozen", "replaced"])
def test_a_step_without_any_gradient_says_why(name, cause):
    run = Training(name)
    if cause == "disabled":
        run.model.base_model.disable_adapter_layers()
    elif cause == "merged":
        run.model.merge_adapter()
    elif cause == "frozen":
        for pair in run.pairs:
            pair.A.requires_grad_(False)
            pair.B.requires_grad_(False)
    else:
        for pair in run.pairs:
            for held in (pair.layer.lora_A["default"], pair.layer.lora_B["default"]):
                held.weight = nn.Parameter(held.weight.detach().clone())
    if cause != "disabled":  # then no gradient exists at all
        run.backward()
    with pytest.raises(InputError, match={"replaced": "fully_shard"}.get(cause, cause)):
        run.optimizer.step()


@both_bases
@pytest.mark.messages
def test_a_step_before_the_first_backward_is_named_once(name):
    run = Training(name)
    before = run.parameters()
    with pytest.warns(UserWarning, match="backward"):
        run.optimizer.step()
    run.optimizer.step()
    assert same(before, run.parameters())


@both_bases
@pytest.mark.messages
@pytest.mark.parametrize("letter", ["A", "B"])
def test_one_frozen_factor(name, letter):
    run = Training(name)
    pairs = run.pairs
    getattr(pairs[0], letter).requires_grad_(False)
    other = pairs[0].B if letter == "A" else pairs[0].A
    for params in (run.model, pairs):  # AdamW takes the factor that can be trained
        with pytest.warns(UserWarning, match=f"factor {letter} is frozen in .*one"):
            run.optimizer = OPTIMIZERS[name](params)
        before = other.detach().clone()
        run.step()
        assert not torch.equal(before, other)
    run.optimizer = OPTIMIZERS[name](pairs[1:])
    getattr(pairs[1], letter).requires_grad_(False)  # after the optimizer was made
    with pytest.raises(InputError, match=f"factor {letter} of .*two was frozen"):
        run.step()
    for pair in pairs:
        getattr(pair, letter).requires_grad_(False)
    for params in (run.model, pairs, [{"pairs": pairs}]):
        with pytest.raises(InputError, match=f"factor {letter} is frozen in .*one.*two.*three"):
            OPTIMIZERS[name](params)


@both_bases
@pytest.mark.messages
def test_a_frozen_adapter_is_named(name):
    model, _, _ = problem()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="'default' are frozen"):
        OPTIMIZERS[name](model)
