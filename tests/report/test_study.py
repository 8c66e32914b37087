import csv
import json
import re

import pytest

from tangora._checks import InputError
from tangora.report import Published, formats, load_study, summarize, write_study
from tangora.report.comparison.differences import differences_figure
from tangora.report.comparison.study import tasks_verdict
from tangora.report.drawing.pictures import draw_picture
from tangora.report.statistics.judgement import judge
from tangora.report.statistics.tasks import matrix
from tests.report.pages import Page
from tests.report.synthetic import HOSTILE, make_comparison, make_record, realistic, save_comparison

NEAR = {"lora": 0.0, "tangent": 0.01, "dora": -0.01, "full": 0.02}


def task(title, tangent, metric="accuracy"):
    def records(recipe, quality, order):
        return [
            make_record(
                recipe,
                seed=seed,
                test=quality + 0.001 * above,
                metrics={split: {metric: quality + 0.001 * above} for split in ("validation", "test")},
            )
            for seed, above in enumerate(order)
        ]

    both = [*records("lora", 0.8, (0, 1, 2)), *records("tangent", tangent, (1, 0, 2))]
    return make_comparison(both, title=title, metric=metric)


def matrix_of(tasks):
    return matrix({name: judge(comparison) for name, comparison in tasks.items()})


@pytest.fixture(scope="module")
def study():
    # far apart, but for the last, of which the mean is the same
    return {"easy": task("An easy task", 0.9), "hard": task("A hard task", 0.7), "even": task("Even", 0.8)}


@pytest.fixture(scope="module")
def text(study, tmp_path_factory):
    return write_study(
        study, tmp_path_factory.mktemp("study") / "report.html", "Three tasks", "run it"
    ).read_text()


def test_wins_and_losses_are_words(text, study):
    header, *lines = Page(text).tables["results-table"]
    assert header == ["recipe", "mean rank", "easy", "hard", "even"]
    rows = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert rows["tangent"]["easy"].endswith("+0.1000 ▲ win")
    assert rows["tangent"]["hard"].endswith("−0.1000 ▼ loss")
    assert rows["tangent"]["even"].endswith("+0.0000 = tie")
    for name, comparison in study.items():
        for row in summarize(comparison):
            assert rows[row.recipe][name].split("\n")[0] == formats.metric(row.test)
    _, ours, theirs = Page(text).tables["pairs-table"]
    assert {ours[0]: ours[1:], theirs[0]: theirs[1:]} == {
        "lora": ["", "1 – 1 – 1"],
        "tangent": ["1 – 1 – 1", ""],
    }


def test_the_verdict_and_the_links(text, study):
    page = Page(text)
    shown = "".join(page.text)
    assert all(sentence in shown for sentence in tasks_verdict(matrix_of(study)))
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a" and "download" not in attrs]
    assert links == [f"{name}/report.html" for name in study]
    assert page.open == []


def test_costs_are_relative_to_lora(text):
    header, *lines = Page(text).tables["costs-table"]
    assert all(cell == "1.00" for line in lines for cell in line[1:])
    assert header == ["recipe", "time per run", "trainable parameters", "optimizer state"]


def test_picture_beside_it(study, tmp_path):
    written = []
    for name in ("a", "b"):
        write_study(study, tmp_path / name / "report.html", "Three tasks", "")
        written.append((tmp_path / name / "picture.png").read_bytes())
    assert written[0].startswith(b"\x89PNG")
    assert written[0] == written[1]


def test_picture_has_better_at_the_right(study):
    loss = task("Loss", 0.9, metric="loss").model_copy(update={"higher_is_better": False})
    tasks = {"loss": loss, "$5 exact": task("$5", 0.9, metric="exact_match")} | study
    axes = draw_picture(differences_figure(matrix_of(tasks))).get_axes()
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["tangent"]
    falling = {ax.get_title(): ax.get_xlim()[0] > ax.get_xlim()[1] for ax in axes}
    assert falling == {
        "Loss": True,
        r"\$5": False,
        "An easy task": False,
        "A hard task": False,
        "Even": False,
    }
    # no noise in these: a filled mark is a win or a loss
    filled = [ax.get_lines()[-1].get_markerfacecolor() != "white" for ax in axes]
    assert filled == [True, True, True, True, False]


def test_csv_beside_it(study, tmp_path):
    write_study(study, tmp_path / "report.html", "Three tasks", "")
    with (tmp_path / "study.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["task"], line["recipe"]) for line in lines if line["outcome"] == "win"] == [
        ("easy", "tangent")
    ]
    for line in lines:
        (row,) = [row for row in summarize(study[line["task"]]) if row.recipe == line["recipe"]]
        assert float(line["test"]) == row.test


def test_tasks_without_records_wait(study, tmp_path):
    waiting = make_comparison([], title="Later", missing=["a"])
    text = write_study(study | {"later": waiting}, tmp_path / "a.html", "Study", "").read_text()
    assert "later/report.html" not in text
    assert "0 runs are done, 1 or more are left" in text
    assert "later" not in Page(text).tables["results-table"][0]
    alone = write_study({"later": waiting}, tmp_path / "b.html", "Study", "").read_text()
    assert "No task has a record yet." in alone


def test_hostile_names_stay_text(tmp_path):
    comparison = make_comparison([make_record(HOSTILE), make_record("lora")], title=HOSTILE)
    text = write_study({"a": comparison}, tmp_path / "a.html", HOSTILE, HOSTILE).read_text()
    assert "<script>alert" not in text


def test_a_folder_gives_the_study_back(study, tmp_path):
    for name, comparison in study.items():
        save_comparison(comparison, tmp_path / name)
    first = write_study(study, tmp_path / "report.html", "Three tasks", "run it").read_bytes()
    comparisons, title, command = load_study(tmp_path)
    assert list(comparisons) == list(study)
    assert write_study(comparisons, tmp_path / "report.html", title, command).read_bytes() == first
    (tmp_path / "study.json").unlink()
    comparisons, title, command = load_study(tmp_path)
    assert (list(comparisons), title, command) == (sorted(study), tmp_path.name, "")


def test_a_folder_without_comparisons(tmp_path):
    with pytest.raises(InputError, match=r"no comparison\.json"):
        load_study(tmp_path)


def test_the_command_makes_all_pages_again(study, tmp_path, monkeypatch, capsys):
    from tangora import cli

    for name, comparison in study.items():
        save_comparison(comparison, tmp_path / name)
    save_comparison(make_comparison([], missing=["a"]), tmp_path / "later")
    monkeypatch.setattr("sys.argv", ["tangora", "report", str(tmp_path)])
    cli.main()
    assert "easy/report.html" in (tmp_path / "report.html").read_text()
    assert all((tmp_path / name / "report.html").exists() for name in study)
    assert "Against lora" in capsys.readouterr().out


def chart_data(text, name):
    found = re.search(rf'<script type="application/json" id="{name}-data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def test_differences_are_drawn_as_they_are(tmp_path):
    comparison = realistic()
    text = write_study({"a": comparison}, tmp_path / "report.html", "One", "").read_text()
    drawn = {trace["meta"]: trace for trace in chart_data(text, "differences-1")["data"]}
    duels = matrix_of({"a": comparison}).against_lora
    assert drawn.keys() == {duel.ours for duel in duels}
    for duel in duels:
        trace = drawn[duel.ours]
        assert trace["x"] == [pytest.approx(duel.difference)]
        low, high = duel.interval
        assert trace["error_x"]["array"] == [pytest.approx(high - duel.difference)]
        assert trace["error_x"]["arrayminus"] == [pytest.approx(duel.difference - low)]
        assert trace["marker"]["symbol"].endswith("-open") == (duel.outcome == "tie")


def test_one_recipe_far_off_does_not_hide_the_others(tmp_path):
    near = [make_record(name, seed=s, test=0.8 + d) for name, d in NEAR.items() for s in range(3)]
    far = [make_record("one-step", seed=s, test=0.2) for s in range(3)]
    study = {"a": make_comparison([*near, *far])}
    text = write_study(study, tmp_path / "report.html", "One", "").read_text()
    figure = chart_data(text, "differences-1")
    low, high = figure["layout"]["xaxis"]["range"]
    places = {trace["meta"]: trace for trace in figure["data"]}
    assert -0.2 < low < places["one-step"]["x"][0] < 0 < high < 0.2
    assert places["one-step"]["marker"]["symbol"].startswith("triangle-left")
    assert "one-step −0.6" in text


def test_without_a_baseline_nothing_is_drawn(tmp_path):
    study = {"a": make_comparison([make_record("tangent", seed=s) for s in range(2)])}
    assert len(write_study(study, tmp_path / "report.html", "One", "").read_text()) < 100_000


def test_published_results_of_all_tasks_are_one_table(tmp_path):
    def with_paper(title, column):
        results = {column: {"lora": 81.5, "tangent": 79}}
        return task(title, 0.81).model_copy(update={"paper": Published(source="a paper", results=results)})

    tasks = {"one": with_paper("One", "One"), "two": with_paper("Two", "Two"), "three": task("Three", 0.8)}
    page = Page(write_study(tasks, tmp_path / "report.html", "study", "").read_text())
    header, *lines = page.tables["published-table"]
    assert header == ["recipe", "One, published", "One, here", "Two, published", "Two, here"]
    assert lines == [["lora", "81.5", "80.1", "81.5", "80.1"], ["tangent", "79", "81.1", "79", "81.1"]]
    same = {"one": with_paper("One", "x"), "two": with_paper("Two", "x")}
    again = Page(write_study(same, tmp_path / "same.html", "study", "").read_text()).tables["published-table"]
    assert again[0] == ["recipe", "x, published", "x, here", "Two: x, published", "Two: x, here"]
    none = Page(write_study({"three": task("Three", 0.8)}, tmp_path / "none.html", "study", "").read_text())
    assert "published-table" not in none.tables
