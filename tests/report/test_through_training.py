"""Small multiples of what was measured on the way: whose values they are, and what is written of them."""

import csv
import io

import pytest

from tangora.report import render_page, write_study
from tangora.report.comparison.through_training import (
    measured_points,
    save_through_training,
    through_training_csv,
    through_training_section,
)
from tangora.report.statistics.judgement import judge
from tests.report.pages import Page
from tests.report.synthetic import make_comparison, make_record

STEPS = (0, 10, 20)


def points(recipe, seed):
    """A gradient that grows and shrinks, with a spread over layers, and energies where there is an adapter."""
    found = []
    for step, norm in zip(STEPS, (4.0, 8.0, 2.0), strict=True):
        rank = 3.0 + seed + step
        spread = {"_mean": rank, "_low": rank - 1, "_high": rank + 2}
        ranks = {f"gradient_effective_rank{end}": value for end, value in spread.items()}
        found.append(
            {"step": step, "gradient_norm": norm + seed, "gradient_effective_rank": rank}
            | ranks
            | ({"captured_energy": 0.25} if recipe != "full" else {})
        )
    return found


def curvature(scale, recipe="lora"):
    alignment = {"captured_energy": 0.9} if recipe != "full" else {}
    return [
        {"step": step, "loss": 1.0, "gradient_norm": 99.0, "weights_trace": -scale * step} | alignment
        for step in (0, 20)
    ]


@pytest.fixture(scope="module")
def comparison():
    return make_comparison(
        make_record(recipe, seed=seed, trajectory=points(recipe, seed), curvature=curvature(seed + 1, recipe))
        for recipe in ("full", "lora")
        for seed in (0, 1)
    )


def charts(judged, **options):
    return {chart.name: chart for chart in through_training_section(judged, **options).charts}


def lines(chart):
    """The traces that are lines, by the recipe that the key of the page knows."""
    found = {}
    for trace in chart.figure["data"]:
        if trace.get("fill") != "toself":
            found.setdefault(trace["meta"], []).append((trace["line"]["width"], trace["y"]))
    return found


def test_seeds_are_thin_and_their_mean_is_bold(comparison):
    found = lines(charts(judge(comparison))["through-training-gradient_norm"])
    assert set(found) == {"full", "lora"}
    for drawn in found.values():
        (thin, first), (_, second), (bold, mean) = drawn
        assert (first, second, mean) == ([4, 8, 2], [5, 9, 3], [4.5, 8.5, 2.5])
        assert thin < bold


def test_the_band_is_the_spread_over_layers(comparison):
    shown = charts(judge(comparison))
    band = next(
        trace
        for trace in shown["through-training-gradient_effective_rank"].figure["data"]
        if trace.get("fill") == "toself" and trace["meta"] == "lora"
    )
    assert band["y"] == [5.5, 15.5, 25.5, 22.5, 12.5, 2.5]
    assert all("fill" not in t for t in shown["through-training-gradient_norm"].figure["data"])


def test_methods_without_a_quantity_are_not_in_its_figure(comparison):
    shown = charts(judge(comparison))
    assert set(lines(shown["through-training-captured_energy"])) == {"lora"}
    assert "through-training-gradient_norm_A" not in shown


def test_points_of_the_curvature_stand_in_only_where_the_trajectory_has_none():
    both = make_record(trajectory=points("lora", 0), curvature=curvature(1))
    merged = measured_points(both)
    assert [point["gradient_norm"] for point in merged.values()] == [4.0, 8.0, 2.0]
    assert (merged[20]["weights_trace"], merged[20]["gradient_loss"]) == (-20, 1.0)
    alone = measured_points(make_record(curvature=curvature(1)))
    assert list(alone) == [0, 20]
    assert alone[0]["gradient_norm"] == 99.0
    assert "loss" not in alone[0]
    partly = measured_points(make_record(trajectory=[{"step": 10, "change": 1.0}], curvature=curvature(1)))
    assert list(partly) == [0, 10, 20]


def test_the_table_says_where_each_began_ended_and_turned(comparison):
    header, *rows = Page(render_page(comparison)).tables["through-training-table"]
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert cells["full"]["Gradient norm"].split("\n") == ["4.5 → 2.5", "8.5 at step 10"]
    assert cells["full"]["Captured energy κ"] == "–"
    assert cells["lora"]["Captured energy κ"] == "0.25 → 0.25"
    assert cells["lora"]["Trace over the weights"] == "0 → −30"


def test_csv_has_every_point(comparison):
    rows = list(csv.DictReader(io.StringIO(through_training_csv(judge(comparison)))))
    assert [(row["recipe"], row["seed"], row["step"]) for row in rows] == [
        (recipe, seed, str(step)) for recipe in ("full", "lora") for seed in "01" for step in STEPS
    ]
    assert {row["captured_energy"] for row in rows if row["recipe"] == "full"} == {""}
    assert all(float(row["learning_rate"]) == 1e-4 for row in rows)


def test_nothing_was_measured(tmp_path):
    judged = judge(make_comparison([make_record()]))
    assert through_training_section(judged) is None
    assert through_training_csv(judged) == ""
    assert save_through_training({"task": judged}, tmp_path / "picture.png") is None


def test_a_study_shows_every_measured_task(comparison, tmp_path):
    plain = make_comparison([make_record(seed=seed) for seed in (0, 1)])
    write_study({"one": comparison, "two": plain, "three": comparison}, tmp_path / "report.html", "S", "")
    page = Page((tmp_path / "report.html").read_text())
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert [name for name in ids if name.endswith("-gradient_norm")] == [
        "through-training-1-gradient_norm",
        "through-training-3-gradient_norm",
    ]
    assert (tmp_path / "through-training.png").stat().st_size > 0
