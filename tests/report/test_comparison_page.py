import csv
import io
import json
from base64 import b64decode

import pytest

from tangora._checks import InputError
from tangora._names import MODELS
from tangora.report import (
    Published,
    TimeSplit,
    formats,
    recommendation,
    recommendation_sentence,
    render_page,
    verdict,
    write_csv,
    write_page,
)
from tangora.report.comparison.costs import busy_sentences
from tangora.report.comparison.learning_rates import rate_verdict, robustness
from tangora.report.comparison.published import published_section
from tangora.report.comparison.speed import speed_verdict, speeds
from tangora.report.layout import packed_plotly
from tangora.report.run_records import Forgetting, MachineLoad
from tangora.report.setup_facts import setup_facts
from tangora.report.statistics.judgement import judge
from tests.report.pages import Page
from tests.report.synthetic import (
    diverged,
    make_comparison,
    make_record,
    realistic,
    realistic_judged,
    realistic_rows,
)


@pytest.fixture(scope="module")
def text():
    return render_page(realistic())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_table_shows_the_summary(page):
    header, *lines, untrained = page.tables["results-table"]
    rows = realistic_rows()
    assert untrained[:2] == ["zero-shot", formats.metric(0.2)]  # what its runs measured before training
    assert [line[0] for line in lines] == [row.recipe for row in rows]
    for line, row in zip(lines, rows, strict=True):
        cells = dict(zip(header, line, strict=True))
        assert cells["test accuracy"] == f"{formats.metric(row.test)}\n{formats.interval(row.interval)}"
        difference = cells["vs lora"].split("\n")
        assert difference[0] == formats.difference(row.difference)
        if row.difference is not None:
            assert difference[1] == formats.interval(row.difference_interval, sign=True)
            assert difference[2] == formats.p_value(row.p_corrected)
        assert cells["vs full"].split("\n")[0] == formats.difference(row.versus_full)
        assert cells["gap closed"].split("\n")[0] == formats.share(row.gap_closed)
        assert cells["learning rate"].split()[0] == formats.learning_rate(row.learning_rate)


def test_costs_have_a_table_of_their_own(page):
    header, *lines = page.tables["costs-table"]
    assert "peak memory" not in header  # not measured by any run
    for line, row in zip(lines, realistic_rows(), strict=True):
        cells = dict(zip(header, line, strict=True))
        seconds, step = cells["time per run"].split("\n"), cells["optimizer step"].split("\n")
        assert seconds[0] == formats.seconds(row.seconds)
        assert step[0] == formats.milliseconds(row.step_milliseconds)
        assert cells["trained"] == formats.count(row.trainable_parameters)


def test_speed_and_robustness(page):
    judged = realistic_judged()
    header, *lines = page.tables["speed-table"]
    for line, item in zip(lines, speeds(judged).values(), strict=True):
        cells = dict(zip(header, line, strict=True))
        assert cells["optimizer steps"] == ("–" if item.steps is None else f"{item.steps:.0f}")
        assert cells["time"] == formats.seconds(item.seconds)
        assert cells["seeds that reach it"] == f"{item.num_reached} of {item.num_seeds}"
    _, *lines = page.tables["robustness-table"]
    found = robustness(judged)
    assert [line[0] for line in lines] == list(found)
    assert {line[0]: line[-1].split("\n")[0] for line in lines} == {r: i.tripled for r, i in found.items()}
    shown = "".join(page.text)
    for sentence in [*speed_verdict(speeds(judged)), *rate_verdict(found)]:
        assert sentence in shown


def test_forgetting_is_shown_when_it_was_measured():
    def record(seed, after):
        return make_record(seed=seed, forgetting=Forgetting(before=2.0, after=after, num_texts=8))

    assert "forgetting-table" not in render_page(realistic())
    page = Page(render_page(make_comparison([record(0, 2.5), record(1, 2.7)])))
    assert page.tables["forgetting-table"][1][:2] == ["lora", "2.0000"]
    assert page.tables["forgetting-table"][1][3].startswith("0.6000\n")


def test_judged_answers_are_shown():
    def record(seed, score):
        made = make_record(seed=seed)
        return made.model_copy(update={"metrics": made.metrics | {"answers": {"judged": score}}})

    assert "answers-table" not in render_page(realistic())
    page = Page(render_page(make_comparison([record(0, 5.5), record(1, 6.5)])))
    assert page.tables["answers-table"][1][0] == "lora"
    assert page.tables["answers-table"][1][1].startswith("6.0000\n")
    assert page.tables["answers-table"][1][2] == "2"


def test_what_was_measured_on_the_way_is_drawn():
    points = [
        {"step": 0, "captured_energy": 0.1, "effective_rank": 1.0},
        {"step": 4, "captured_energy": 0.5, "effective_rank": 2.5},
    ]
    page = Page(
        render_page(make_comparison([make_record(seed=seed, trajectory=points) for seed in range(2)]))
    )
    figures = {attrs["id"]: attrs for _, attrs in page.tags if attrs.get("class") == "plot"}
    assert "0.5" in figures["through-training-captured_energy"]["aria-label"]
    assert "2.5" in figures["alignment-effective_rank"]["aria-label"]
    assert "alignment-cosine" not in figures


def test_what_is_missing_is_said_first(page):
    assert "or more remain" not in "".join(page.text)
    text = render_page(make_comparison([make_record()], missing=["a", "b"]))
    assert text.index("1 run is done, 2 or more remain") < text.index("Verdict")


def test_trouble_is_grouped_with_its_reason(page):
    _, *lines = page.tables["trouble-table"]
    assert [line[:3] for line in lines] == [["lora-pro", "diverged", "1"], ["dora", "failed", "1"]]
    assert lines[1][-1] == "RuntimeError: out of memory"
    records = [make_record(seed=s, status="out_of_memory", error="too big") for s in range(3)]
    _, line = Page(render_page(make_comparison(records))).tables["trouble-table"]
    assert line == ["lora", "out of memory", "3", "1e-4", "0, 1, 2", "too big"]


def downloads(page):
    links = {attrs["download"]: attrs["href"] for tag, attrs in page.tags if tag == "a"}
    return {
        name: list(csv.DictReader(io.StringIO(b64decode(link.split(",")[1]).decode())))
        for name, link in links.items()
    }


def test_downloads_are_the_unrounded_numbers(page, tmp_path):
    files = downloads(page)
    written = write_csv(realistic_rows(), tmp_path / "summary.csv").read_text()
    assert files["summary.csv"] == list(csv.DictReader(io.StringIO(written)))
    records = {record.id: record for record in realistic().records}
    assert {line["id"] for line in files["runs.csv"]} == set(records)
    for line in files["runs.csv"]:
        test = records[line["id"]].metrics.get("test", {}).get("accuracy")
        assert line["test_accuracy"] == ("" if test is None else str(test))


def test_the_verdict_comes_first(text):
    places = [text.index(part) for part in (verdict(realistic_rows())[0], "results-table", "runs-table")]
    assert places == sorted(places)


def test_what_was_compared_comes_before_anything_else():
    settings = {
        "model": "smollm2-135m", "data": "reviews.csv", "steps": 12, "batch_size": 4, "accumulate": 2, "rank": 3,
        "alpha": 6.0, "num_train": None, "report_to": None,
    }  # fmt: skip
    sizes = {"train": 70, "validation": 20, "test": 30}
    records = [make_record(seed=seed, num_examples=sizes) for seed in range(2)]
    comparison = make_comparison(records, settings=settings)
    text = render_page(comparison)
    facts = dict(setup_facts(comparison))
    assert facts == {
        "model": f"smollm2-135m ({MODELS['smollm2-135m']})",
        "data": "reviews.csv",
        "examples": "70 training, 20 validation, 30 test",
        "steps": "12",
        "batch size": "4 × 2",
        "rank": "3",
        "alpha": "6",
        "seeds": "2",
    }  # fmt: skip
    assert all(text.index(f"<dd>{value}</dd>") < text.index("Verdict") for value in facts.values())
    assert "<dd>null</dd>" not in text
    assert "SmolLM2-135M-Instruct, dequantized from Q4_1" in facts["model"]
    own = make_comparison([make_record(model_description="made at home")], settings={"model": "x"})
    assert dict(setup_facts(own))["model"] == "x (made at home)"


def test_older_records_know_their_sizes_in_part():
    assert dict(setup_facts(realistic()))["examples"] == "200 test"
    assert dict(setup_facts(make_comparison([make_record()], settings={}))) == {"seeds": "1"}


def test_the_recommendation_stands_with_the_verdict(text):
    sentence = recommendation_sentence(recommendation(realistic()))
    assert text.index("Verdict") < text.index(sentence) < text.index("results-table")


def loaded(before, after, processors=2, seed=0):
    return make_record(seed=seed, load=MachineLoad(before=before, after=after, processors=processors))


def warnings(*records):
    return busy_sentences(judge(make_comparison(records)).runs)


def test_a_busy_machine_is_said():
    (sentence,) = warnings(loaded(0.2, 1.9), loaded(5.25, 3.0, seed=1))
    assert "during 1 of 2 runs" in sentence
    assert "up to 5.2 on 2 processors" in sentence
    assert sentence in render_page(make_comparison([loaded(0.2, 1.9), loaded(5.25, 3.0, seed=1)]))
    assert warnings(loaded(0.2, 2.1), loaded(30.0, 60.0, 64, seed=1), make_record(seed=2)) == []


def test_very_different_times_of_equal_runs_are_said():
    def run(seed, seconds):
        time = TimeSplit(start=0, forward_backward=seconds, optimizer=0, evaluation=0)
        return make_record("lora-ga", seed=seed, time=time)

    (sentence,) = warnings(run(0, 7.8), run(1, 21.0), run(2, 76.0))
    assert "lora-ga (7.8 s to 1 min 16 s)" in sentence
    assert warnings(run(0, 7.0), run(1, 8.0), run(2, 13.0)) == []
    assert warnings(run(0, 7.0)) == []


def test_dotted_is_explained_only_where_something_is_dotted(text):
    assert "Dotted line:" in text
    assert "Dotted line:" not in render_page(make_comparison([make_record()]))


def test_one_learning_rate_each_is_no_sweep():
    page = Page(render_page(make_comparison([make_record(), make_record("full")])))
    assert "robustness-table" not in page.tables
    one = [
        make_record("full"),
        *(make_record("lora", rate, validation=v) for rate, v in ((1e-4, 0.5), (3e-4, 0.9))),
    ]
    page = Page(render_page(make_comparison([*one, make_record("lora", 1e-3, validation=0.5)])))
    rows = {line[0]: line[1:] for line in page.tables["robustness-table"][1:]}
    assert rows["full"][1:3] == ["1e-4, the only rate tried", "–"]
    assert rows["lora"][1:3] == ["3e-4 only", "–"]


def test_every_run_is_listed_with_its_error(page):
    _, *lines = page.tables["runs-table"]
    assert len(lines) == len(realistic().records)
    (failed,) = [line for line in lines if line[4] == "failed"]
    assert "RuntimeError: out of memory" in failed[-1]
    assert "Traceback" in failed[-1]
    assert sum(line[5] == "yes" for line in lines) == sum(row.num_seeds for row in realistic_rows())


def test_figures_are_there(page):
    described = {attrs["id"]: attrs["aria-label"] for _, attrs in page.tags if attrs.get("class") == "plot"}
    assert list(described) == ["pareto-seconds", "pareto-trained", "pareto-state", "loss", "sweep", "time"]
    figures = [json.loads(script) for script in page.scripts[: len(described)]]
    assert all(figure["data"] for figure in figures)
    assert "full 1e-4" in described["sweep"]


def test_a_hostile_metric_stays_text():
    metric = "<b>m</b>"
    record = make_record(metrics={"validation": {metric: 0.5}, "test": {metric: 0.5}})
    assert metric not in render_page(make_comparison([record], metric=metric)).replace(packed_plotly(), "")


@pytest.mark.parametrize(
    "records",
    [[make_record()], [diverged("lora", 1e-4)], [make_record(versions={}, commit=None, settings={})]],
)
def test_little_is_enough(records):
    assert Page(render_page(make_comparison(records, settings={}))).open == []


def test_a_long_error_is_cut_but_kept():
    error = "x" * 500
    text = render_page(make_comparison([make_record(), make_record("full", status="failed", error=error)]))
    assert "x" * 120 + "…" in text
    assert error in text


def test_nothing_is_written_without_records(tmp_path):
    with pytest.raises(InputError):
        write_page(make_comparison([]), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


PAPER = {
    "source": "arXiv:0000.00000, table 1",
    "results": {"MRPC": {"lora": 68.38, "lora-pro": 86.6, "adalora": 68.14}, "average": {"lora": 82.08}},
    "notes": ["One learning rate for all."],
}


def test_published_results_stand_beside_ours_and_change_nothing_else(text):
    comparison = realistic().model_copy(update={"paper": Published(**PAPER)})
    written = render_page(comparison)
    page, before = Page(written), Page(text)
    header, *lines = page.tables["published-table"]
    assert header == ["recipe", "MRPC, published", "MRPC, here", "average, published"]
    ours = {row.recipe: f"{100 * row.test:.4g}" for row in realistic_rows() if row.test is not None}
    assert lines == [
        ["lora", "68.38", ours["lora"], "82.08"],
        ["lora-pro", "86.6", ours["lora-pro"], formats.MISSING],
        ["adalora", "68.14", formats.MISSING, formats.MISSING],
    ]
    for said in (PAPER["source"], *PAPER["notes"], "another setting"):
        assert said in written
    assert {name: table for name, table in page.tables.items() if name != "published-table"} == before.tables
    assert verdict(judge(comparison).rows) == verdict(realistic_rows())
    assert "published-table" not in before.tables


def test_published_losses_are_not_in_percent():
    comparison = realistic().model_copy(
        update={"paper": Published(source="x", results={"GSM8K": {"lora": 0.5}}), "metric": "loss"}
    )
    (section,) = [published_section([comparison])]
    assert section is not None
    assert section.table is not None
    (row,) = section.table.rows
    losses = {each.recipe: each.test for each in judge(comparison).rows}
    assert row[2].value == losses["lora"]
    assert published_section([realistic()]) is None
