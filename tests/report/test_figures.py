import html
import math

import numpy as np
import pytest

from tangora.recipes import recipes
from tangora.report import (
    EvaluationRecord,
    StepRecord,
    TimeSplit,
    save_picture,
    summarize,
)
from tangora.report.comparison.costs import COSTS, front, pareto_panel, time_figure
from tangora.report.comparison.curves import evaluation_curves, loss_curves, loss_panel, smooth
from tangora.report.comparison.learning_rates import rate_ticks, sweep_panel
from tangora.report.drawing.charts import panel_figure
from tangora.report.drawing.panels import Figure, Panel, Series, Style, recipe_styles
from tangora.report.drawing.pictures import draw_picture
from tangora.report.statistics.judgement import judge
from tests.report.synthetic import (
    HOSTILE,
    diverged,
    make_comparison,
    make_record,
    realistic,
    realistic_judged,
    realistic_rows,
)


def history(losses, start=1):
    return [StepRecord(step=start + i, loss=loss, learning_rate=1e-4) for i, loss in enumerate(losses)]


def loss_figure(judged):
    return panel_figure(loss_panel("", loss_curves(judged)), {})


def sweep_figure(judged):
    return panel_figure(sweep_panel(judged), {})


def pareto_figure(rows, cost):
    return panel_figure(pareto_panel(rows, cost), {})


def curves(records):
    return loss_curves(judge(make_comparison(records)))


def test_every_recipe_looks_different():
    styles = recipe_styles(["lora", "full", *(f"method {index}" for index in range(30))])
    assert len({(style.color, style.dash) for style in styles.values()}) == 32
    assert recipe_styles(["b", "a"]) == recipe_styles(["a", "b"])


def test_one_colour_per_recipe_in_every_figure():
    judged, rows = realistic_judged(), realistic_rows()
    styles = recipe_styles(row.recipe for row in rows)
    for figure in (loss_figure(judged), sweep_figure(judged)):
        named = {trace.name: trace.line for trace in figure.data if trace.name}
        assert {name: line.color for name, line in named.items()} == {n: s.color for n, s in styles.items()}
        assert {name: line.dash for name, line in named.items()} == {n: s.dash for n, s in styles.items()}
    bars = [bar for bar in time_figure(rows).data if not bar.showlegend]
    assert len(bars) == 4 * len(rows)
    assert all(bar.marker.color == styles[bar.y[0]].color for bar in bars)


def test_loss_curve_is_the_mean_over_seeds():
    (curve,) = curves(
        [
            make_record(seed=0, history=history([3.0, 2.0, 1.0])),
            make_record(seed=1, history=history([4.0, 3.0, 2.0, 9.0])),  # one step more: not shared
        ]
    )
    assert (curve.x, curve.y) == ((1, 2, 3), (3.5, 2.5, 1.5))
    assert (curve.low, curve.high) == ((3.0, 2.0, 1.0), (4.0, 3.0, 2.0))


def test_no_curve_without_shared_steps_or_finished_runs():
    records = [
        make_record(seed=0, history=history([3.0])),
        make_record(seed=1, history=history([3.0], start=2)),
        diverged("full", 1e-4),
    ]
    assert curves(records) == []


def test_smoothing_keeps_lines_and_their_length():
    constant = np.full(200, 2.0)
    assert smooth(constant) == pytest.approx(constant)
    line = np.arange(200.0)
    assert smooth(line)[10:-10] == pytest.approx(line[10:-10])
    assert smooth(np.arange(5.0)).tolist() == [0, 1, 2, 3, 4]
    assert smooth(np.arange(0.0)).size == 0


def test_raw_losses_are_on_hover():
    judged = realistic_judged()
    curve = loss_curves(judged)[0]
    line = next(trace for trace in loss_figure(judged).data if trace.name == curve.name)
    assert list(line.customdata) == pytest.approx(curve.data, rel=1e-4)
    assert list(line.y) == pytest.approx(curve.y, rel=1e-4) != curve.data


def test_long_curves_are_thinned_to_their_ends():
    (curve,) = curves([make_record(history=history([1 / step for step in range(1, 2001)]))])
    assert len(curve.x) == 300
    assert (curve.x[0], curve.x[-1]) == (1, 2000)
    assert curve.data == [1 / step for step in curve.x]
    assert np.diff(curve.x).max() <= 7


def test_evaluations_need_two_points():
    def evaluated(seed, losses):
        entries = [EvaluationRecord(step=10 * i, metrics={"loss": loss}) for i, loss in enumerate(losses)]
        return make_record(seed=seed, evaluations=entries)

    judged = judge(make_comparison([evaluated(0, [3.0, 1.0]), evaluated(1, [5.0, 2.0])]))
    (curve,) = evaluation_curves(judged, "loss")
    assert (curve.y, curve.high) == ((4.0, 1.5), (5.0, 2.0))
    assert evaluation_curves(judged, "accuracy") == []
    assert evaluation_curves(judge(make_comparison([evaluated(0, [3.0])])), "loss") == []


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_nothing_beats_the_front(higher_is_better):
    def record(recipe, seconds, test):
        time = TimeSplit(start=0, forward_backward=seconds, optimizer=0, evaluation=0)
        return make_record(recipe, id=recipe, test=test if higher_is_better else 1 - test, time=time)

    comparison = make_comparison(
        [
            record("cheap", 1, 0.5),
            record("best", 9, 0.9),
            record("expensive", 9, 0.8),
            record("worse", 2, 0.4),
            record("twin", 1, 0.5),
        ],
        higher_is_better=higher_is_better,
    )
    rows, cost = summarize(comparison), COSTS[0]
    assert [row.recipe for row in front(rows, cost)] == ["cheap", "twin", "best"]
    drawn = {trace.meta: (trace.x[0], trace.y[0]) for trace in pareto_figure(rows, cost).data if trace.meta}
    assert drawn == {row.recipe: (row.seconds, row.test) for row in rows}
    assert front(rows, COSTS[1]) == []  # memory was not measured
    assert [trace.line.dash for trace in pareto_figure(rows, cost).data if trace.mode == "lines"] == ["dot"]
    alone = summarize(
        make_comparison([record("best", 1, 0.9), record("worse", 2, 0.4)], higher_is_better=True)
    )
    if higher_is_better:
        assert not [trace for trace in pareto_figure(alone, cost).data if trace.mode == "lines"]


def test_sweep_marks_chosen_and_diverged():
    comparison, rows = realistic(), realistic_rows()
    figure = sweep_figure(realistic_judged())
    assert figure.layout.xaxis.type == "log"
    rings = {trace.legendgroup: trace.x[0] for trace in figure.data if trace.marker.symbol == "circle-open"}
    assert rings == {row.recipe: row.learning_rate for row in rows}
    (cross,) = [trace for trace in figure.data if trace.marker.symbol == "x-thin"]
    assert (cross.legendgroup, cross.x) == ("lora-pro", (8e-4,))
    assert cross.y[0] == min(
        record.metrics["validation"]["accuracy"] for record in comparison.records if record.metrics
    )


def test_ticks_stay_readable():
    assert rate_ticks([1e-4, 3e-4]) == [1e-4, 3e-4]
    assert rate_ticks(np.geomspace(2e-6, 3e-3, 20).tolist()) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    assert rate_ticks([]) == []


def test_time_bars_add_up():
    rows = realistic_rows()
    bars = [bar for bar in time_figure(rows).data if not bar.showlegend]
    lengths = {row.recipe: sum(bar.x[0] for bar in bars if bar.y[0] == row.recipe) for row in rows}
    assert lengths == {row.recipe: pytest.approx(row.time.total) for row in rows}


def test_hostile_names_are_text():
    judged = judge(make_comparison([make_record(HOSTILE)]))
    for figure in (loss_figure(judged), sweep_figure(judged)):
        (name,) = {trace.name for trace in figure.data if trace.name}
        assert "<script" not in name
        assert html.unescape(name).replace("\N{ZERO WIDTH SPACE}", "") == HOSTILE


@pytest.mark.parametrize(
    "records",
    [
        [make_record()],
        [diverged("lora", 1e-4), diverged("full", 1e-4)],
        [make_record(history=[], evaluations=[])],
        [make_record(HOSTILE), make_record("_hidden"), make_record("$x_$")],
        [make_record(history=history([1.0, math.nan, 2.0]))],
    ],
)
def test_pictures_of_odd_comparisons(tmp_path, records):
    comparison = make_comparison(records, title="costs $5 and $6")
    first = save_picture(comparison, tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    judged = judge(comparison)
    assert loss_figure(judged).to_json()
    assert sweep_figure(judged).to_json()
    assert time_figure(judged.rows).to_json()


def test_the_same_picture_twice(tmp_path):
    comparison = make_comparison([make_record(), make_record("full")])
    paths = [save_picture(comparison, tmp_path / name) for name in ("a.png", "b.png")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_known_recipes_look_the_same_whatever_they_are_compared_with():
    names = [entry.name for entry in recipes()]
    together = recipe_styles(names)
    assert len(set(together.values())) == len(names)
    for name in names:
        assert recipe_styles([name]) == {name: together[name]}
    # an unknown one never takes the style of a known one beside it
    mixed = recipe_styles([*names, *(f"own {index}" for index in range(20))])
    assert len(set(mixed.values())) == len(names) + 20
    assert together.items() <= mixed.items()
    assert together["full"].color == together["lora"].color
    assert together["full"].dash != together["lora"].dash
    assert together["full"].marker != together["lora"].marker


@pytest.mark.parametrize(
    ("ends", "step"), [((1, 3), 1), ((0, 10), 2), ((1, 15), 5), ((0, 120), 20), ((5, 5), 1)]
)
def test_axes_that_count_have_whole_ticks(ends, step):
    panel = Panel("", "number", "", [Series("a", ends, (0.5, 1.5))], xwhole=True)
    axis = panel_figure(panel, {"a": Style("#000000", "solid", "circle")}).layout.xaxis
    assert (axis.tick0, axis.dtick) == (0, step)
    (axes,) = draw_picture(Figure("f", "", "", [panel])).axes
    assert all(tick == int(tick) for tick in axes.get_xticks())
