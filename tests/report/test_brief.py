"""The four facts that begin a report: recipe, learning rate, gain over LoRA, cost."""

from tangora.report.comparison.brief import brief
from tangora.report.comparison.comparison_page import render_page
from tangora.report.comparison.recommendation import recommend
from tangora.report.run_records import MachineLoad, MemoryUse, TimeSplit
from tangora.report.statistics.judgement import judge
from tests.report.synthetic import diverged, make_comparison, make_record
from tests.report.test_verdict import BETTER, CLEAR, NOISY, runs


def facts(*records):
    judged = judge(make_comparison([run for group in records for run in group]))
    return dict(brief(judged, recommend(judged)))


def costing(seconds, peak=400_000_000, **changes):
    time = TimeSplit(start=1.0, forward_backward=seconds - 1.0, optimizer=0.0, evaluation=0.0)
    memory = MemoryUse(peak_bytes=peak, optimizer_state_bytes=2_000_000, adapter_bytes=1)
    return {"time": time, "memory": memory} | changes


def test_a_significant_gain_and_what_it_costs():
    found = facts(
        runs("lora", CLEAR, **costing(10)), runs("tangent", BETTER, **costing(15, peak=800_000_000))
    )
    assert found == {
        "Recipe": "tangent",
        "Learning rate": "2e-4",
        "Gain over lora": "+0.0500, significant",
        "Cost": "15.0 s per run (1.5 × lora's), 800 MB peak memory (2 × lora's), "
        "2.0 MB optimizer state (1 × lora's)",
    }


def test_lora_itself_is_compared_with_nothing():
    found = facts(runs("lora", CLEAR, **costing(10)), runs("slow", NOISY, **costing(20)))
    assert found["Recipe"] == "lora"
    assert found["Gain over lora"].startswith("none")
    assert found["Cost"] == "10.0 s per run, 400 MB peak memory, 2.0 MB optimizer state"


def test_a_difference_that_is_noise_is_not_called_a_gain():
    found = facts(runs("lora", CLEAR, **costing(20)), runs("fast", NOISY, **costing(10)))
    assert (found["Recipe"], found["Gain over lora"]) == ("fast", "+0.0100, not significant")


def test_reservations():
    one_seed = facts([make_record("lora", 1e-4), make_record("x", 1e-4, test=0.95, validation=0.95)])
    assert one_seed["Recipe"].startswith("x, on validation data")
    assert "one seed cannot separate" in one_seed["Gain over lora"]
    single_rate = facts(
        *[[make_record(name, seed=seed, test=0.9 + 0.01 * seed) for seed in range(3)] for name in "ab"]
    )
    assert "few learning rates" in single_rate["Recipe"]
    assert "Gain over lora" not in single_rate
    at_edge = facts([make_record("lora", rate, validation=rate * 1e3) for rate in (1e-4, 2e-4)])
    assert "high end" in at_edge["Learning rate"]


def test_times_of_a_busy_machine_are_left_out():
    load = MachineLoad(before=9.0, after=9.0, processors=2)
    found = facts(runs("lora", CLEAR, **costing(10, load=load)), runs("x", BETTER, **costing(20, load=load)))
    assert "per run" not in found["Cost"]
    assert "peak memory" in found["Cost"]


def test_the_page_begins_with_them():
    comparison = make_comparison([*runs("lora", CLEAR), *runs("tangent", BETTER)])
    judged = judge(comparison)
    page = render_page(comparison)
    for name, value in brief(judged, recommend(judged)):
        assert page.index(f"<dt>{name}</dt>") < page.index("results-table")
        assert f"<dd>{value}</dd>" in page.replace("&#39;", "'")
    assert (
        brief(*(lambda found: (found, recommend(found)))(judge(make_comparison([diverged("lora", 1e-4)]))))
        == []
    )
