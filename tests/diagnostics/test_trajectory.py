"""Whole models on their way: against the weights that their layers act with, and gradients of plain autograd."""

import copy
import json
import random
from dataclasses import asdict

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from tangora import InputError, initialize
from tangora.diagnostics import (
    Reference,
    Trajectory,
    find_tracks,
    fingerprint,
    gradient_reading,
    write_snapshot,
)
from tangora.diagnostics.gradient_views import gradient_views, weight_views
from tests.diagnostics.models import (
    adapted,
    bert,
    causal_batches,
    classifier_batches,
    dense_gradients,
    gpt2,
    moved,
)
from tests.reference import trajectory as dense

KINDS = ["lora", "offset", "dora", "dora-offset", "gpt2", "full", "full-gpt2"]


def model_of(kind):
    """Return a model and the names to follow in it."""
    base = gpt2() if "gpt2" in kind else bert()
    if kind.startswith("full"):
        names = ("attn.c_attn", "mlp.c_fc", "wte") if "gpt2" in kind else ("query", "dense")
        return base, [name for name, _ in base.named_modules() if name.endswith(names)]
    options = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True} if kind == "gpt2" else {}
    model = adapted(base, use_dora="dora" in kind, **options)
    if "offset" in kind:
        initialize(model, "orthogonal")
    return model, None


def step(model, size, seed):
    """Move whatever is trained, magnitudes too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(size * noise)


@torch.no_grad()
def weights(model, tracks):
    """Read each layer's weight off what it does to the unit vectors."""
    modules = dict(model.named_modules())
    model.eval()
    found = []
    for track in tracks:
        layer, (_, n) = modules[getattr(track, "pair", track).name], track.shape
        if "wte" in track.name:
            found.append(layer(torch.arange(n)).T.clone())
            continue
        eye = torch.eye(n, dtype=torch.float64)
        found.append((layer(eye) - layer(torch.zeros_like(eye))).T.clone())
    model.train()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.1, 1e-6])
def test_path_and_change_are_those_of_the_acting_weights(kind, size):
    model, names = model_of(kind)
    tracks = find_tracks(model, names)
    trajectory = Trajectory(model, tracks)
    base = weights(model, tracks)  # all these starts leave the model as it was
    path = [base]
    trajectory.begin()
    for number in range(3):
        step(model, size, number)
        trajectory.advance()
        path.append(weights(model, tracks))
    point = trajectory.measure(3)
    rel = 1e-9 if size > 1e-3 else 1e-6  # the reference subtracts dense weights
    assert point.totals.path_length == pytest.approx(dense.whole_path_length(path), rel=rel)
    ends = torch.cat([(now - first).flatten() for now, first in zip(path[-1], base, strict=True)])
    assert point.totals.change == pytest.approx(float(ends.norm()), rel=rel)
    assert list(point.layers) == [track.name for track in tracks]
    for index, layer in enumerate(point.layers.values()):
        own = [each[index] for each in path]
        assert layer.path_length == pytest.approx(dense.path_length(own), rel=rel)
        assert layer.change == pytest.approx(float((own[-1] - own[0]).norm()), rel=rel)
        assert layer.path_length >= layer.change * (1 - 1e-9)  # no way is shorter than straight
    assert (point.totals.imbalance is None) == kind.startswith("full")


@pytest.mark.parametrize("kind", ["lora", "offset", "dora", "full"])
def test_distance_to_full_fine_tuning(kind, tmp_path):
    whole, names = model_of("full")
    names = [track.name for track in find_tracks(adapted(bert()))]
    tracks = find_tracks(whole, names)
    base = fingerprint(tracks)
    first = weights(whole, tracks)
    step(whole, 0.05, 7)
    write_snapshot(tmp_path / "snapshots", 2, tracks, base)
    full = weights(whole, tracks)

    model, own_names = model_of(kind)
    own = find_tracks(model, names if kind == "full" else None)
    reference = Reference(tmp_path)
    reference.check_layers(own)
    trajectory = Trajectory(model, own, reference=reference)
    trajectory.begin()
    start = trajectory.measure(0).totals
    assert (start.distance, start.relative_distance, start.cosine) == (0.0, None, None)
    step(model, 0.05, 8)
    point = trajectory.measure(2)
    now = weights(model, own)

    def flat(parts):
        return torch.cat([part.flatten() for part in parts])

    expected = dense.compare(flat(now), flat(first), flat(full))
    totals = point.totals
    assert (totals.distance, totals.relative_distance, totals.cosine) == pytest.approx(expected, rel=1e-6)
    for index, layer in enumerate(point.layers.values()):
        expected = dense.compare(now[index], first[index], full[index])
        found = layer.distance, layer.relative_distance, layer.cosine
        assert found == pytest.approx(expected, rel=1e-6)
    if kind == "full":  # full fine-tuning on the same way
        same = model_of("full")[0]
        followed = Trajectory(same, find_tracks(same, names), reference=reference)
        followed.begin()
        step(same, 0.05, 7)
        totals = followed.measure(2).totals
        assert totals.distance == pytest.approx(0.0, abs=1e-12)
        assert totals.cosine == pytest.approx(1.0)


SHAPE = "gradient_stable_rank", "gradient_effective_rank", "reachable_energy"


@pytest.mark.parametrize("task", ["bert", "gpt2"])
def test_views_of_the_gradient(task):
    options = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True} if task == "gpt2" else {}
    model = moved(adapted(bert() if task == "bert" else gpt2(), **options))
    batches = classifier_batches() if task == "bert" else causal_batches()
    tracks = find_tracks(model)
    views, loss = gradient_views(model, [track.pair for track in tracks], batches)
    trajectory = Trajectory(model, tracks, batches=batches)
    trajectory.begin()
    point = trajectory.measure(0)
    assert point.gradient_loss == pytest.approx(loss)
    gradients = dense_gradients(model, batches)
    rel = 1e-6 if task == "bert" else 1e-4  # transformers takes causal losses in float32
    energy = missed = 0.0
    for track in tracks:
        A, B = track.pair.factors()
        g = gradients[track.name]
        left, right, kappa, epsilon = dense.gradient_view(A, B, g, 2)
        found = point.layers[track.name]
        assert found.captured_energy == pytest.approx(kappa, rel=rel)
        assert found.alignment_error == pytest.approx(epsilon, rel=rel)
        assert found.gradient_norm == pytest.approx(float(g.norm()), rel=rel)
        shape = tuple(getattr(found, key) for key in SHAPE)
        assert shape == pytest.approx(dense.gradient_shape(g, 2), rel=rel)
        factors = float((3 * B.T @ g).norm()), float((3 * g @ A.T).norm())  # scaling 6 / 2
        assert (found.gradient_norm_A, found.gradient_norm_B) == pytest.approx(factors, rel=rel)
        # the leading subspace is as accurate as the sketch: rank 2 + 8 of 16 at two power iterations
        assert (found.left_angle, found.mean_left_angle) == pytest.approx(
            (float(left.max()), float(left.mean())), abs=0.05
        )
        assert (found.right_angle, found.mean_right_angle) == pytest.approx(
            (float(right.max()), float(right.mean())), abs=0.05
        )
        energy, missed = energy + float(g.square().sum()), missed + epsilon**2
    assert point.totals.captured_energy == pytest.approx(1 - missed / energy, rel=rel)
    assert point.totals.alignment_error == pytest.approx(missed**0.5, rel=rel)
    assert point.totals.left_angle == max(layer.left_angle for layer in point.layers.values())


@pytest.mark.parametrize("kind", ["lora", "offset", "dora", "dora-offset"])
def test_gradients_of_factors_are_those_of_autograd(kind):
    model, _ = model_of(kind)
    step(model, 0.1, 3)
    batches = classifier_batches()
    tracks = find_tracks(model)
    point = Trajectory(model, tracks, batches=batches).measure(0)
    model.eval()
    size = sum(len(batch["labels"]) for batch in batches)
    loss = sum(len(batch["labels"]) * model(**batch).loss for batch in batches) / size
    for side in "AB":
        factors = [getattr(track.pair, side) for track in tracks]
        norms = [float(each.norm()) for each in torch.autograd.grad(loss, factors, retain_graph=True)]
        found = [getattr(layer, f"gradient_norm_{side}") for layer in point.layers.values()]
        assert found == pytest.approx(norms, rel=1e-8)
        total = getattr(point.totals, f"gradient_norm_{side}")
        assert total == pytest.approx(float(torch.tensor(norms).norm()), rel=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_same_weights_have_the_same_gradient_with_and_without_adapters(family):
    base, options, batches = bert(), {}, classifier_batches()
    if family == "gpt2":  # transposed weights
        base, options, batches = (
            gpt2(),
            {"task_type": "CAUSAL_LM", "fan_in_fan_out": True},
            causal_batches(),
        )
    whole = copy.deepcopy(base)
    model = moved(adapted(base, **options))
    tracks = find_tracks(model)
    names = [track.name for track in tracks]
    own = Trajectory(model, tracks, batches=batches).measure(0)
    merged = dict(whole.named_modules())
    with torch.no_grad():
        for track, weight in zip(tracks, weights(model, tracks), strict=True):
            stored = merged[track.name].weight
            stored.copy_(weight.T if isinstance(merged[track.name], Conv1D) else weight)
    followed = Trajectory(whole, find_tracks(whole, names), batches=batches, rank=2)
    full = followed.measure(0)
    rel = 1e-8 if family == "bert" else 1e-4  # transformers takes causal losses in float32
    assert full.gradient_loss == pytest.approx(own.gradient_loss, rel=rel)
    for key in ("gradient_norm", *SHAPE):
        assert getattr(full.totals, key) == pytest.approx(getattr(own.totals, key), rel=rel)
        for name in names:
            assert getattr(full.layers[name], key) == pytest.approx(getattr(own.layers[name], key), rel=rel)
    nothing = "captured_energy", "alignment_error", "gradient_norm_A", "gradient_norm_B", "left_angle"
    assert all(getattr(full.totals, key) is None for key in nothing)


def test_gradients_too_large_to_be_formed_are_estimated(monkeypatch):
    batches = classifier_batches()
    exact, sketched = (views_with_limit(batches, monkeypatch, limit) for limit in (2**30, 1))
    for name, view in sketched.items():
        assert view.effective_rank is None
        assert view.stable_rank == pytest.approx(exact[name].stable_rank, rel=0.1)
        assert view.reachable == pytest.approx(exact[name].reachable, rel=0.05)


def views_with_limit(batches, monkeypatch, limit):
    monkeypatch.setattr(gradient_reading, "_EXACT_LIMIT", limit)
    model, names = model_of("full")
    return weight_views(model, find_tracks(model, names), batches, rank=2)[0]


def test_the_aligned_start_has_no_angle_and_the_plain_one_no_columns():
    batches = classifier_batches()
    plain, aligned = adapted(bert()), adapted(bert())
    initialize(aligned, "lora-one", batches)
    at_base, _ = gradient_views(plain, [track.pair for track in find_tracks(plain)], batches)
    assert all(view.left is None and view.right is not None for view in at_base.values())
    # LoRA-One's start is a small step along the leading subspaces of the gradient it was made from
    views, _ = gradient_views(aligned, [track.pair for track in find_tracks(aligned)], batches)
    assert sum(view.left.mean for view in views.values()) / len(views) < 20
    assert sum(view.right.mean for view in at_base.values()) / len(views) > 45


def test_factors_of_a_balanced_start():
    model = adapted(bert())
    initialize(model, "lora-one", classifier_batches())
    trajectory = Trajectory(model, find_tracks(model))
    trajectory.begin()
    totals = trajectory.measure(0).totals
    assert totals.imbalance == pytest.approx(0.0, abs=1e-7)
    assert totals.relative_imbalance < 1e-5
    assert totals.change > 0  # this start moves the weight
    assert totals.path_length == 0
    assert 1 <= totals.effective_rank <= 2
    assert totals.condition_A >= 1
    plain = adapted(bert())
    trajectory = Trajectory(plain, find_tracks(plain))
    trajectory.begin()
    totals = trajectory.measure(0).totals
    assert (totals.change, totals.effective_rank, totals.relative_imbalance) == (0.0, 0.0, 1.0)
    assert totals.condition_B is None


@pytest.mark.messages
def test_measuring_leaves_no_trace():
    model = moved(adapted(bert(), lora_dropout=0.1))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    model.get_submodule("base_model.model.bert.embeddings").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    trajectory = Trajectory(model, find_tracks(model), batches=classifier_batches())
    trajectory.begin()
    trajectory.advance()
    trajectory.measure(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_a_path_goes_on_from_its_state():
    model, _ = model_of("lora")
    whole = Trajectory(model, find_tracks(model))
    whole.begin()
    step(model, 0.1, 0)
    whole.advance()
    resumed = Trajectory(model, find_tracks(model))
    resumed.begin(json.loads(json.dumps(whole.state())))
    step(model, 0.1, 1)
    for trajectory in (whole, resumed):
        trajectory.advance()
    assert asdict(resumed.measure(2)) == asdict(whole.measure(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_snapshots_hold_the_named_weights_only(tmp_path, dtype):
    model, names = model_of("full")
    model.to(dtype)
    tracks = find_tracks(model, names)
    path = write_snapshot(tmp_path / "snapshots", 10, tracks, fingerprint(tracks))
    assert path.name == "step-000010.safetensors"
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == sorted(names)
        assert all(file.get_tensor(name).dtype == dtype for name in names)
    assert path.stat().st_size < 2000 + sum(m * n for m, n in (t.shape for t in tracks)) * dtype.itemsize
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    # adapters on the same base have the same fingerprint
    like = model_of("full")[0].to(dtype)
    targets = [name.rsplit(".", 1)[-1] for name in names]
    peft = get_peft_model(like, LoraConfig(target_modules=sorted(set(targets))))
    shared = [track for track in find_tracks(peft) if track.name in names]
    assert fingerprint(shared) == fingerprint(tracks)


@pytest.mark.messages
def test_references_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match="holds no snapshots: it must be the output of tangora train"):
        Reference(tmp_path)
    model, _ = model_of("lora")
    own = find_tracks(model)
    names = [track.name for track in own]
    whole = find_tracks(model_of("full")[0], names)
    write_snapshot(tmp_path / "snapshots", 4, whole, fingerprint(whole))
    reference = Reference(tmp_path)
    reference.check_layers(own)
    reference.check_steps([0, 4])
    with pytest.raises(InputError, match="has no snapshot of step 2, but of 4: measure_every and steps must"):
        reference.check_steps([0, 2, 4])
    with pytest.raises(InputError, match="target_modules must be the same there"):
        reference.check_layers(own[1:])
    write_snapshot(tmp_path / "few" / "snapshots", 4, whole[1:], fingerprint(whole[1:]))
    with pytest.raises(InputError, match=f"has no layer {names[0]}: target_modules"):
        Reference(tmp_path / "few").check_layers(own)
    other = find_tracks(scaled(model_of("full")[0]), names)
    write_snapshot(tmp_path / "other" / "snapshots", 4, other, fingerprint(other))
    with pytest.raises(InputError, match="is of another model: its base weights differ"):
        Reference(tmp_path / "other").check_layers(own)


def scaled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    return model


@pytest.mark.messages
@pytest.mark.filterwarnings("ignore")
def test_models_whose_motion_cannot_be_followed():
    config = AdaLoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", total_step=9)
    with pytest.raises(InputError, match="has no plain pair"):
        find_tracks(get_peft_model(bert(), config))
    with pytest.raises(InputError, match="changed the base weights"):
        find_tracks(adapted(bert().float(), init_lora_weights="pissa"))
    with pytest.raises(InputError, match="names must be layers with a weight; got 'head'"):
        find_tracks(bert(), ["head"])
