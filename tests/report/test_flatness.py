"""The table of end points of a comparison: flatness next to the generalisation gap, and what must be said with it."""

import json

import pytest

from tangora.curvature.space_curvature import SpaceCurvature
from tangora.report import load_record, render_page, save_json
from tangora.report.comparison.end_points import (
    flatness_section,
    flatness_sentences,
    flatness_table,
    has_flatness,
    rich_flatness,
)
from tangora.report.run_records import Flatness
from tangora.report.statistics.judgement import judge
from tests.report.pages import Page, in_terminal
from tests.report.synthetic import make_comparison, make_record, realistic

SEEDS = (0, 1, 2)


def space(largest, trace=10.0):
    return SpaceCurvature(100, largest, residual=0.01, trace=trace, trace_error=0.1, products=20)


def flat(seed=0, *, lora=True, gap=0.1, **changes):
    spaces = {"weights": space(2.0 + seed)}
    if lora:
        spaces |= {"tangent": space(1.0 + seed), "factors": space(500.0 + seed)}
    values = {
        "train_loss": 0.2,
        "test_loss": 0.2 + gap + 0.01 * seed,
        "num_examples": 32,
        "spaces": spaces,
        "radius": 0.05,
        "rise": 0.03,
        "products": 60,
        "seconds": 9.0,
    }
    return Flatness(**values | changes)


def comparison():
    runs = [make_record("lora", 1e-4, seed, flatness=flat(seed)) for seed in SEEDS]
    runs += [make_record("full", 1e-4, seed, flatness=flat(seed, lora=False, gap=0.4)) for seed in SEEDS]
    other = flat(0, spaces={"weights": space(1e6)})
    runs.append(make_record("lora", 1e-2, 0, validation=0.5, flatness=other))  # not the chosen rate
    return make_comparison(runs)


def cells_of(found):
    table = flatness_table(judge(found))
    rows = [[list(cell.lines) for cell in row] for row in table.rows]
    return {row[0][0]: dict(zip(table.headers, row, strict=True)) for row in rows}


def section(found):
    return flatness_section(judge(found))


def test_the_gap_is_test_minus_train():
    assert flat(gap=0.25).gap == pytest.approx(0.25)
    assert flat(gap=-0.25).gap == pytest.approx(-0.25)


def test_means_and_intervals_over_the_seeds_of_the_judged_runs():
    cells = cells_of(comparison())
    assert list(cells) == ["full", "lora"]
    assert cells["lora"]["λ max, weights"] == ["3", "0.516 to 5.48"]
    assert cells["lora"]["λ max, tangent"] == ["2", "−0.484 to 4.48"]
    assert cells["lora"]["generalisation gap"][0] == "0.11"
    assert cells["full"]["generalisation gap"][0] == "0.41"
    assert cells["full"]["λ max, tangent"] == ["–"]
    assert cells["full"]["λ max, factors"] == ["–"]
    one = make_comparison([make_record("lora", 1e-4, 0, flatness=flat())])
    assert cells_of(one)["lora"]["λ max, weights"] == ["2"]  # one seed leaves nothing to resample


def test_factors_stand_last_and_with_the_sentence():
    shown = section(comparison())
    assert shown.table.headers[-2:] == ["λ max, factors", "trace, factors"]
    assert any("not to be compared between the rows" in note for note in shown.notes)
    whole = make_comparison([make_record("full", 1e-4, 0, flatness=flat(lora=False))])
    assert not any("factors" in name or "tangent" in name for name in section(whole).table.headers)
    assert not any("compared" in note for note in section(whole).notes)


def test_the_page_has_the_table_only_where_it_was_measured():
    shown = Page(render_page(comparison()))
    assert shown.open == []
    assert [row[0] for row in shown.tables["flatness-table"]] == ["recipe", "full", "lora"]
    assert "not to be compared" in "".join(shown.text)
    assert "flatness-gap" in {attrs.get("id") for _, attrs in shown.tags}
    assert "flatness-table" not in Page(render_page(realistic())).tables
    assert not has_flatness(realistic())


def test_what_was_not_measured_is_said():
    missing = flat(spaces={}, radius=None, rise=None, missing="DoRA detaches its norm")
    found = make_comparison([make_record("dora", 1e-4, 0, flatness=missing)])
    assert cells_of(found)["dora"]["generalisation gap"] == ["0.1"]
    assert "Not measured: DoRA detaches its norm." in section(found).notes
    assert Page(render_page(found)).open == []


def test_one_run_in_words():
    assert flatness_sentences(flat()) == [
        "Over the weights the largest curvature is 2 and the trace 10.",
        "In the tangent space the largest curvature is 1 and the trace 10.",
    ]
    assert flatness_sentences(flat(missing="why")) == ["Curvature was not measured: why."]


def test_one_mark_for_each_judged_run():
    found = comparison()
    points = {trace["name"]: trace["x"] for trace in section(found).charts[0].figure["data"]}
    assert points == {"full": [2.0, 3.0, 4.0], "lora": [2.0, 3.0, 4.0]}


def test_terminal():
    shown = in_terminal(rich_flatness(judge(comparison())))
    assert "factors" not in shown
    assert "0.11" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_old_records_still_load(tmp_path):
    path = save_json(make_record(flatness=flat()), tmp_path / "new.json")
    assert load_record(path).flatness == flat()
    content = json.loads(path.read_text())
    for found in content["flatness"]["spaces"].values():
        found["largest"] = found.pop("top_eigenvalue")
    path.write_text(json.dumps(content))
    assert load_record(path).flatness == flat()
    del content["flatness"]
    path.write_text(json.dumps(content))
    assert load_record(path).flatness is None
