"""Needed ranks and rank plans: against brute force, and through PEFT."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model
from torch import nn

from tangora import InputError, find_pairs
from tangora.diagnostics import LayerGradient, plan_ranks, required_rank
from tests.models import tiny_llama


def spectrum(m, n, values, energy=None):
    values = tuple(sorted(map(float, values), reverse=True))
    return LayerGradient(m, n, values, sum(v**2 for v in values) if energy is None else energy)


def captured(spectra, ranks):
    return sum(sum(v**2 for v in s.singular_values[: 2 * ranks[name]]) for name, s in spectra.items())


def price(spectra, ranks):
    return sum((s.m + s.n) * ranks[name] for name, s in spectra.items())


@st.composite
def problems(draw):
    spectra = {}
    for index in range(draw(st.integers(1, 3))):
        m, n = draw(st.integers(3, 6)), draw(st.integers(3, 6))
        numbers = st.floats(0, 4, allow_nan=False)
        values = draw(st.lists(numbers, min_size=min(m, n), max_size=min(m, n)))
        spectra[f"layer{index}"] = spectrum(m, n, values)
    return spectra, draw(st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_plans_against_every_possible_one(problem):
    spectra, budget_rank = problem
    plan = plan_ranks(spectra, budget_rank)
    uniform = dict.fromkeys(spectra, budget_rank)
    budget = price(spectra, uniform)
    assert plan.parameters == price(spectra, plan.ranks) <= budget == plan.budget
    assert captured(spectra, plan.ranks) >= captured(spectra, uniform) * (1 - 1e-12)
    choices = itertools.product(*(range(1, min(s.m, s.n) + 1) for s in spectra.values()))
    allowed = [dict(zip(spectra, choice, strict=True)) for choice in choices]
    best = max(captured(spectra, ranks) for ranks in allowed if price(spectra, ranks) <= budget)
    # the best gain of one more rank that the left-over parameters could not buy
    one_item = max(s.singular_values[0] ** 2 + s.singular_values[1] ** 2 for s in spectra.values())
    assert best - one_item - 1e-9 <= captured(spectra, plan.ranks) <= best + 1e-9


def test_equal_prices_are_planned_optimally():
    generator = torch.Generator().manual_seed(0)
    spectra = {f"{i}": spectrum(6, 6, (4 * torch.rand(6, generator=generator)).tolist()) for i in range(4)}
    plan = plan_ranks(spectra, 2)
    choices = itertools.product(range(1, 7), repeat=4)
    allowed = [dict(zip(spectra, c, strict=True)) for c in choices if sum(c) <= 8]
    best = max(captured(spectra, ranks) for ranks in allowed)
    assert captured(spectra, plan.ranks) == pytest.approx(best)
    total = sum(s.energy for s in spectra.values())
    assert plan.captured_energy == pytest.approx(best / total)
    assert plan.gain == pytest.approx((best - captured(spectra, dict.fromkeys(spectra, 2))) / total)


def test_limits():
    spectra = {"a": spectrum(20, 20, [9, 8, 7, 6, 5, 4, 3, 2]), "b": spectrum(20, 20, [0.1] * 8)}
    plan = plan_ranks(spectra, 2)
    assert plan.ranks == {"a": 3, "b": 1}
    assert plan.at_limit == ()
    plan = plan_ranks(spectra, 3)
    assert plan.ranks == {"a": 4, "b": 2}
    assert plan.at_limit == ("a",)  # four ranks use up all that is known
    assert plan_ranks(spectra, 3, max_rank=3).ranks == {"a": 3, "b": 3}
    assert plan_ranks(spectra, 2, min_rank=2).ranks == {"a": 2, "b": 2}


def test_layers_without_gradient_get_the_least():
    spectra = {"a": spectrum(8, 8, range(1, 9)), "b": spectrum(8, 8, [0.0] * 8)}
    assert plan_ranks(spectra, 2).ranks == {"a": 3, "b": 1}
    nothing = {"b": spectra["b"]}
    plan = plan_ranks(nothing, 2)
    assert (plan.ranks, plan.captured_energy, plan.rank_pattern) == ({"b": 2}, 0.0, {})


def test_a_plan_that_cannot_be_better_is_the_uniform_one():
    same = {name: spectrum(6, 6, [3, 2, 1, 1, 1, 1]) for name in "abc"}
    plan = plan_ranks(same, 2, alpha=4)
    assert (plan.ranks, plan.rank_pattern, plan.alpha_pattern) == (dict.fromkeys("abc", 2), {}, {})
    assert plan.gain == 0.0


@pytest.mark.parametrize(
    ("share", "energy", "expected"),
    [(0.5, 100.0, 1), (0.85, 100.0, 2), (0.93, 100.0, 2), (0.95, 100.0, None), (1.0, 93.0, 2)],
)
def test_required_rank(share, energy, expected):
    known = LayerGradient(10, 10, (8.0, 3.0, 4.0, 2.0), energy)  # 64, 73, 89, 93
    assert required_rank(known, share) == expected


def test_required_rank_at_the_edges():
    complete = spectrum(3, 5, [2, 1, 1])
    assert [required_rank(complete, share) for share in (0.5, 0.9, 1.0)] == [1, 2, 2]
    assert required_rank(spectrum(3, 3, [0, 0, 0]), 0.5) is None
    # three known values of many say nothing of rank 2, which would use four
    assert required_rank(LayerGradient(9, 9, (1.0, 1.0, 1.0), 4.0), 0.75) is None
    assert LayerGradient(9, 9, (1.0, 1.0, 1.0), 4.0).tail == pytest.approx(1.0)


class Names(nn.Module):
    """Layers whose names end alike: an unescaped or unbound pattern would hit several."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.xq = nn.Linear(8, 8)
        self.deep = nn.ModuleDict({"q": nn.Linear(8, 8), "deep": nn.ModuleDict({"q": nn.Linear(8, 8)})})
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(11)])

    def forward(self, x):
        return x


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("make", [Names, tiny_llama])
def test_peft_makes_exactly_the_planned_ranks(make, use_rslora):
    targets = ["q", "xq"] if make is Names else "all-linear"
    uniform = get_peft_model(make(), LoraConfig(r=2, target_modules=targets))
    names = [pair.name.removeprefix("base_model.model.") for pair in find_pairs(uniform)]
    generator = torch.Generator().manual_seed(0)
    draws = 4 * torch.rand(len(names), 8, generator=generator)
    spectra = {name: spectrum(8, 8, row.tolist()) for name, row in zip(names, draws, strict=True)}
    plan = plan_ranks(spectra, 2, alpha=5, use_rslora=use_rslora)
    assert len(set(plan.ranks.values())) > 2
    model = get_peft_model(make(), LoraConfig(**plan.config(), target_modules=targets))
    pairs = {pair.name.removeprefix("base_model.model."): pair for pair in find_pairs(model)}
    assert {name: pair.shape[2] for name, pair in pairs.items()} == plan.ranks
    scaling = 5 / (2**0.5 if use_rslora else 2)
    assert all(pair.scaling == pytest.approx(scaling) for pair in pairs.values())


@pytest.mark.messages
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (({}, 2), {}, "at least one layer"),
        (({"a": spectrum(4, 4, [1, 1, 1, 1])}, 0), {}, r"budget_rank must be a number in \[1, inf\); got 0"),
        (
            ({"a": spectrum(4, 9, [1, 1, 1, 1])}, 5),
            {},
            "budget_rank must be at most 4, the smaller side of layer a",
        ),
        (
            ({"a": spectrum(9, 9, [1, 1, 1, 1])}, 3),
            {},
            "4 singular values of layer a .* rank 2; rank 3 needs 6",
        ),
        (({"a": spectrum(9, 9, [1, 1, 1, 1])}, 2), {"max_rank": 3}, "rank 3 needs 6"),
        (({"a": spectrum(9, 9, [1, 1, 1, 1])}, 2), {"max_rank": 1}, "max_rank"),
        (
            ({"a": spectrum(9, 9, [1, 1, 1, 1])}, 2),
            {"min_rank": 3},
            "min_rank must be at most budget_rank, 2",
        ),
        (({"a": spectrum(9, 9, [1, 1, 1, 1])}, 2), {"alpha": 0}, "alpha"),
    ],
)
def test_bad_plans(arguments, options, message):
    with pytest.raises(InputError, match=message):
        plan_ranks(*arguments, **options)
