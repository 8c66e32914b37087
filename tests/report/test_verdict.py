import pytest

from tangora.report import summarize, verdict
from tests.report.synthetic import diverged, make_comparison, make_record, realistic_rows


def sentences(records, **changes):
    found = verdict(summarize(make_comparison(records, **changes)))
    assert 2 <= len(found) <= 4
    assert all(sentence.endswith(".") for sentence in found)
    return found


def runs(recipe, values, rates=(1e-4, 2e-4, 4e-4)):
    """A sweep best in the middle, and there one run per value."""
    edges = [make_record(recipe, rate, validation=0.1) for rate in (rates[0], rates[2])]
    return edges + [make_record(recipe, rates[1], seed, test=value) for seed, value in enumerate(values)]


CLEAR = [0.90, 0.91, 0.92]
BETTER = [0.95, 0.961, 0.969]
NOISY = [0.85, 0.99, 0.92]


def test_a_clear_win():
    best, caution = sentences(runs("lora", CLEAR) + runs("tangent", BETTER))
    assert best == (
        "tangent has the best test accuracy, 0.9600 (95 % interval 0.9363 to 0.9837, 3 seeds); its difference "
        "from lora, +0.0500, is more than noise (95 % interval +0.0475 to +0.0525)."
    )
    assert caution == "Every chosen learning rate lies inside its grid, and no run diverged or failed."


def test_a_win_within_noise_is_no_win():
    best = sentences(runs("lora", CLEAR) + runs("tangent", NOISY))[0]
    assert "but its difference from lora, +0.0100, is within noise" in best


def test_a_win_that_does_not_stand_up_to_correction():
    records = runs("lora", CLEAR) + runs("tangent", [0.915, 0.935, 0.945])
    assert "is more than noise" in sentences(records)[0]
    others = [run for name in "abcdefgh" for run in runs(name, [0.91, 0.90, 0.92])]
    best = sentences(records + others)[0]
    assert best.startswith("tangent")
    assert "is within noise once corrected for the number of recipes (p = 0." in best


def test_one_seed_claims_nothing():
    found = sentences(runs("lora", [0.90]) + runs("tangent", [0.95]) + runs("full", [0.94]))
    assert "1 seed, no interval" in found[0]
    assert "cannot be told" in found[0]
    assert "one seed cannot tell that from noise" in found[1]


def test_lora_may_win():
    assert "worse by more than noise (−0.0500)" in sentences(runs("lora", BETTER) + runs("x", CLEAR))[0]
    assert "differs from it only within noise" in sentences(runs("lora", BETTER) + runs("x", NOISY))[0]
    assert "cannot be told" in sentences(runs("lora", [0.9]) + runs("x", [0.8]))[0]


def test_ties_are_ties():
    found = sentences(runs("lora", CLEAR) + runs("tangent", CLEAR))
    assert found[0].startswith("lora and tangent share the best test accuracy")


@pytest.mark.parametrize(
    ("second", "claim"),
    [
        (CLEAR, "does not overlap that of the next, b"),
        (NOISY, "overlaps that of the next, b"),
        ([0.8], "cannot be"),
    ],
)
def test_without_lora(second, claim):
    assert claim in sentences(runs("a", BETTER) + runs("b", second))[0]


def test_a_single_recipe():
    assert "no other recipe to compare" in sentences(runs("a", BETTER))[0]


def test_the_gap():
    found = sentences(runs("lora", CLEAR) + runs("full", BETTER) + runs("tangent", [0.93, 0.94, 0.951]))
    assert found[0].startswith("full has the best")
    assert found[1] == "Of the others, tangent is better than lora by more than noise."
    assert "better than lora by +0.0500" in found[2]
    assert "tangent closes 61 % (55 % to 67 %) of that gap" in found[2]


def test_a_gap_that_nothing_closes():
    found = sentences(runs("lora", CLEAR) + runs("full", BETTER) + runs("a", [0.89, 0.90, 0.911]))
    assert "a is worse than lora by more than noise" in found[1]
    assert "no other recipe closes any of that gap" in found[2]


def test_no_gap():
    assert "there is no gap to close" in sentences(runs("lora", BETTER) + runs("full", CLEAR))[1]
    assert "no share of that gap is given" in sentences(runs("lora", CLEAR) + runs("full", NOISY))[1]


def test_caution():
    records = [
        make_record("lora", 1e-4, validation=0.9),
        make_record("lora", 2e-4, validation=0.8),
        make_record("x", 1e-4),
        diverged("lora", 4e-4),
        make_record("x", 3e-4, status="failed", error="bug"),
        make_record("full", 1e-4, status="out_of_memory", error="too big"),
    ]
    caution = sentences(records)[-1]
    assert "lora (low end), whose best learning rate lies at its edge" in caution
    assert "of 6 runs, 1 diverged (lora), 1 ran out of memory (full) and 1 failed (x)" in caution
    assert "only one learning rate was tried for full" in sentences([make_record("full")])[-1]


def test_nothing_finished():
    found = sentences([diverged("lora", 1e-4), diverged("full", 1e-4)])
    assert found[0] == "No recipe has a test result, so nothing can be compared."
    assert "of 2 runs, 2 diverged (full and lora)" in found[1]


def test_realistic():
    assert len(verdict(realistic_rows())) == 4
