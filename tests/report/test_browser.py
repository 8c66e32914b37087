"""The pages in a real browser: what they show, without a network, on a phone, in the dark, on paper, by keyboard."""

import csv
import shutil
import time
from importlib.util import find_spec

import pytest

from tangora.report import MemoryUse, StepRecord, render_page, summarize, write_csv, write_page, write_study
from tests.report.synthetic import diverged, make_comparison, make_record, realistic, realistic_rows

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="needs playwright"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_page(realistic(), tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(browser):
    """Open a page; at the end, fail on whatever it complained of or asked the network for."""
    contexts, complaints = [], []

    def open_page(path, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url == path.as_uri() or complaints.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def draw_all(page):
    """Wait until every figure is there, without scrolling to it."""
    for _ in range(600):
        if page.evaluate("[...document.querySelectorAll('.plot')].every((plot) => plot.data)"):
            return
        page.wait_for_timeout(100)
    pytest.fail("not every figure was drawn")


def draw(page, name):
    """Wait until one figure is there."""
    page.locator(f"#{name}").scroll_into_view_if_needed()
    page.locator(f"#{name} .main-svg").first.wait_for()


def visible_rows(page, table="runs-table"):
    lines = f"[...document.querySelectorAll('#{table} tbody tr')].filter((row) => !row.hidden)"
    return page.evaluate(f"{lines}.map((row) => [...row.cells].map((cell) => cell.innerText.trim()))")


def test_all_figures_in_light_in_dark_and_on_a_phone(opened, file):
    page = opened(file, viewport={"width": 1000, "height": 600})
    assert page.evaluate("typeof Plotly") == "undefined"  # nothing is drawn before it is near
    draw_all(page)
    assert page.locator(".plot .main-svg").count() >= page.locator(".plot").count() >= 6
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert min(contrasts(page)) >= 4.5
    page.set_viewport_size({"width": 375, "height": 700})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") == 375  # it scrolls in one direction


def test_a_table_wider_than_its_place_says_so(opened, file):
    page = opened(file, viewport={"width": 375, "height": 700})
    wide = page.locator(".scroll[data-wide]").filter(has=page.locator("#results-table"))
    wide.wait_for()
    page.set_viewport_size({"width": 1300, "height": 700})
    wide.wait_for(state="detached")


def test_four_small_figures_stand_two_by_two(opened, tmp_path):
    memory = MemoryUse(peak_bytes=9_000_000, optimizer_state_bytes=2_000_000, adapter_bytes=1_000_000)
    records = [make_record("full", memory=memory), make_record("lora", test=0.8, memory=memory)]
    page = opened(
        write_page(make_comparison(records), tmp_path / "report.html"),
        viewport={"width": 1300, "height": 700},
    )
    lefts = page.evaluate(
        "[...document.querySelectorAll('.panels > div')].map((panel) => panel.getBoundingClientRect().left)"
    )
    assert len(lefts) == 4
    assert (lefts[0], lefts[1]) == (lefts[2], lefts[3])


def contrasts(page):
    colors = page.evaluate(
        "['.verdict p', '.notes li', '#results-table td', '#results-table small', '.plot .xtick text']"
        ".map((name) => document.querySelector(name)).map((e) => e.closest('svg') ? getComputedStyle(e).fill :"
        " getComputedStyle(e).color)"
    )
    ground = page.evaluate("getComputedStyle(document.querySelector('section')).backgroundColor")
    return [contrast(color, ground) for color in colors]


def contrast(*colors):
    """The ratio of WCAG 2.1."""

    def luminance(color):
        channels = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, colors))
    return (light + 0.05) / (dark + 0.05)


def test_numbers_are_those_of_the_records(opened, file):
    page = opened(file)
    rows = {row.recipe: row for row in realistic_rows()}
    shown = visible_rows(page, "results-table")
    shown = [line for line in shown if line[0] != "zero-shot"]  # which no statistic has
    assert [line[0] for line in shown] == list(rows)
    assert [float(line[1].split()[0]) for line in shown] == pytest.approx(
        [row.test for row in rows.values()], abs=6e-5
    )
    draw(page, "pareto-seconds")
    drawn = page.evaluate(
        "document.getElementById('pareto-seconds').data.filter((t) => t.meta).map((t) => [t.meta, t.x[0], t.y[0]])"
    )
    assert {name: (x, y) for name, x, y in drawn} == {n: (r.seconds, r.test) for n, r in rows.items()}


def test_filters(opened, file):
    page, records = opened(file), realistic().records
    assert page.locator("output").inner_text() == f"{len(records)} of {len(records)} shown"
    page.get_by_label("recipe", exact=True).select_option("dora")
    assert {line[0] for line in visible_rows(page)} == {"dora"}
    page.get_by_label("status").select_option("failed")
    assert [line[4] for line in visible_rows(page)] == ["failed"]
    page.get_by_role("button", name="show all").click()
    page.wait_for_timeout(50)
    assert len(visible_rows(page)) == len(records)
    page.get_by_label("stage").select_option("final")
    assert len(visible_rows(page)) == sum(record.stage == "final" for record in records)
    page.get_by_label("stage").select_option("")
    page.get_by_label("text").fill("out of MEMORY dora")  # words of a run, in any order
    assert len(visible_rows(page)) == 1
    page.get_by_label("text").fill("no such words")
    assert page.locator("output").inner_text() == f"0 of {len(records)} shown"


def test_sorting_by_keyboard(opened, file):
    page = opened(file)
    heading = page.locator("#runs-table").get_by_role("button", name="test accuracy")
    heading.focus()
    page.keyboard.press("Enter")
    shown = [line[7] for line in visible_rows(page)]
    known = [float(text) for text in shown if text != "–"]
    assert known == sorted(known)
    assert shown[len(known) :] == ["–"] * (len(shown) - len(known))  # what is missing comes last, both ways
    page.keyboard.press("Enter")
    assert [float(line[7]) for line in visible_rows(page)[: len(known)]] == known[::-1]
    assert page.locator("#runs-table th[aria-sort]").get_attribute("aria-sort") == "descending"


def test_a_recipe_is_hidden_in_all_figures(opened, file):
    page = opened(file)
    key = page.locator(".key").first.get_by_role("button", name="tangent")
    key.focus()
    page.keyboard.press("Space")
    assert key.get_attribute("aria-pressed") == "false"
    draw(page, "loss")
    traces = "document.getElementById('loss').data.filter((trace) => trace.meta === 'tangent')"
    assert page.evaluate(f"{traces}.map((trace) => trace.visible)") == [False, False]
    key.press("Space")
    page.wait_for_timeout(200)
    assert page.evaluate(f"{traces}.map((trace) => trace.visible)") == [True, True]


def test_downloads(opened, file, tmp_path):
    page = opened(file)
    with page.expect_download() as download:
        page.get_by_role("link", name="summary.csv").click()
    download.value.save_as(tmp_path / "got.csv")
    assert (tmp_path / "got.csv").read_bytes() == write_csv(
        realistic_rows(), tmp_path / "own.csv"
    ).read_bytes()
    with page.expect_download() as download:
        page.get_by_role("link", name="runs.csv").click()
    download.value.save_as(tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open(newline="") as lines:
        assert len(list(csv.DictReader(lines))) == len(realistic().records)


def test_paper(opened, file):
    page = opened(file)
    assert page.pdf().startswith(b"%PDF")
    page.emulate_media(media="print")
    assert not page.locator("form.filters").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.querySelectorAll('details:not([open]):not(.run)').length") == 0


def test_without_scripts_all_tables_are_there(opened, file):
    page = opened(file, java_script_enabled=False)
    assert page.locator("#runs-table tbody tr").count() == len(realistic().records)
    assert page.locator("#results-table").is_visible()
    assert not page.locator("form.filters").is_visible()


def test_what_a_screen_reader_is_told(opened, file):
    page = opened(file)
    for name in ("results", "costs", "speed", "robustness", "runs"):
        table = page.locator(f"#{name}-table")
        assert table.locator("caption").inner_text()
        assert table.locator("thead th").count() == table.locator("thead th[scope=col]").count()
        assert table.locator("tbody tr").count() == table.locator("tbody th[scope=row]").count()
    for plot in page.locator(".plot").all():
        assert plot.get_attribute("role") == "img"
        assert len(plot.get_attribute("aria-label")) > 20


def test_the_page_over_several_tasks(opened, tmp_path):
    comparisons = {"one": realistic(), "two": realistic(), "later": make_comparison([], missing=["a"])}
    write_page(realistic(), tmp_path / "one" / "report.html")
    page = opened(write_study(comparisons, tmp_path / "report.html", "Tasks", "run it"))
    assert len(visible_rows(page, "results-table")) == len(realistic_rows())
    page.locator("#results-table").get_by_role("button", name="two").click()
    assert page.locator("#results-table th[aria-sort]").inner_text().startswith("two")
    draw_all(page)
    assert page.locator("#differences-1 .scatterlayer .trace").count() == len(realistic_rows()) - 1


def many_runs():
    """500 runs of ten recipes, each of 1000 recorded steps."""
    history = [StepRecord(step=s, loss=2 / s**0.3, learning_rate=1e-4, grad_norm=1.0) for s in range(1, 1001)]
    recipes = ["full", "lora", *(f"method-{number}" for number in range(8))]
    records = [
        make_record(
            recipe,
            1e-5 * 2**rate,
            seed,
            validation=0.9 - 0.01 * abs(rate - 4),
            test=0.9 + 0.001 * seed,
            history=history,
        )
        if rate < 9
        else diverged(recipe, 1e-5 * 2**rate, seed)
        for recipe in recipes
        for rate in range(10)
        for seed in range(5)
    ]
    return make_comparison(records)


def test_five_hundred_runs_open_quickly(opened, tmp_path, capsys):
    comparison = many_runs()
    path = tmp_path / "report.html"
    start = time.perf_counter()
    path.write_text(render_page(comparison), encoding="utf-8")
    made = time.perf_counter() - start
    page = opened(path)
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    start = time.perf_counter()
    page.get_by_label("recipe", exact=True).select_option("lora")
    assert len(visible_rows(page)) == 50
    filtered = time.perf_counter() - start
    results = [line for line in visible_rows(page, "results-table") if line[0] != "zero-shot"]
    assert len(results) == len(summarize(comparison)) == 10
    with capsys.disabled():
        print(
            f"\n500 runs: {path.stat().st_size / 1e6:.2f} MB, made in {made:.1f} s, first content after "
            f"{painted:.0f} ms, filtered in {1000 * filtered:.0f} ms"
        )
