"""The page: complete, self-contained, and safe with whatever text a user brings; and as a browser shows it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import xarray as xr
from browser import needs_chromium, opened
from playwright.sync_api import Page
from plotly.offline import get_plotlyjs_version

import kpflow_dyn as kp
from kpflow_dyn._analyze import WORDS, analyze
from kpflow_dyn.report import page_of, read_results, summarize, with_error, write_report
from kpflow_dyn.report._learning_charts import _by_optimizer, _order

EVIL = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def dataset() -> xr.Dataset:
    torch.manual_seed(0)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(2, 4), torch.randn(3, 5, 2))))
    found = analyze(flow, k=2).assign_attrs(title=EVIL, task=EVIL, warnings=f"{EVIL}\nsecond & last")
    return found.assign_coords({"label_<img>": ("trial", np.arange(3.0))})


@pytest.fixture(scope="module")
def track() -> xr.Dataset:
    torch.manual_seed(0)
    cells = {step: torch.nn.GRUCell(2, 4) for step in (0, 10, 100)}
    values = {step: dict(cell.state_dict()) for step, cell in cells.items()}
    targets = torch.randn(3, 5, 4)
    return kp.track(lambda: torch.nn.GRUCell(2, 4), values, torch.randn(3, 5, 2), targets=targets, progress=False)


@pytest.fixture(scope="module")
def comparison() -> xr.Dataset:
    torch.manual_seed(0)
    x, right = torch.randn(3, 5, 2), torch.randint(2, (3, 5))
    flows = [kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(2, 4), x))) for _ in range(2)]
    outputs = [flow.output(torch.nn.Linear(4, 2), learn=True) for flow in flows]
    names = ("runs/1/a rather long name.safetensors", EVIL)
    return kp.compare(*outputs, k=3, target=right, loss="cross_entropy", names=names).to_xarray()


def numbers(g: float, units: int, seed: int) -> dict[str, float]:
    if (g, units, seed) == (2.0, 4, 1):
        raise ValueError(EVIL)
    return {"rank": g * units + seed, EVIL: g}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    over = {"g": [1.0, 2.0], "units": [4, 8, 16], "seed": [0, 1]}
    swept = kp.Sweep(numbers, over, tmp_path_factory.mktemp("sweep"))
    swept.run(progress=False)
    return swept.collect()


@pytest.fixture(scope="module")
def page(dataset: xr.Dataset) -> str:
    return page_of(dataset).to_html()


def own(page: str) -> str:
    """The page without the library that draws."""
    scripts = re.findall(r"<script>.*?</script>", page, re.DOTALL)
    return page.replace(max(scripts, key=len), "")


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert not re.findall(r"https?:|\burl\(|@import|<iframe", own(page))
    leads = set(re.findall(r'(?:src|srcset|href)="([^"]*)"', own(page)))
    assert {link for link in leads if not link.startswith("#")} == {"data:,"}


def test_user_text_is_escaped(page: str) -> None:
    assert EVIL not in page and "<img>" not in own(page)
    assert (
        page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 4
    )  # <title>, <h1>, settings, warning, choices
    assert "second &amp; last" in page


def test_every_number_figure_and_setting_is_there(page: str, dataset: xr.Dataset) -> None:
    for name in (
        "spectra",
        "effective_ranks",
        "temporal_modes",
        "spatial_modes",
        "trial_modes",
        "ntk_modes",
        "state_pca",
    ):
        assert f'<figure id="{name}"' in page
    for name, number in summarize(dataset).items():
        assert WORDS[name][1] in page and number["text"] in page
    for fact in (kp.__version__, torch.__version__, "3 trials x 5 times x 4 units"):
        assert fact in page


def test_the_views_hold_the_numbers_of_the_dataset(dataset: xr.Dataset) -> None:
    charts = {chart.name: chart for chart in page_of(dataset).charts}
    for mode in range(2):
        for trial in range(3):
            (shown,) = charts["ntk_modes"].views[mode, trial].data
            np.testing.assert_allclose(shown.z, dataset.ntk_mode.values[mode, trial].T, rtol=1e-6)
    for chart in charts.values():
        options = [range(len(choice.options)) for choice in chart.choices]
        assert set(chart.views) == set(itertools.product(*options))
        assert set(json.loads(chart.to_json())) == {",".join(map(str, key)) for key in chart.views}


def test_a_result_is_written_as_its_dataset(sweep: xr.Dataset, tmp_path: Path) -> None:
    class Result:
        def to_xarray(self) -> xr.Dataset:
            return sweep

    write_report(Result(), tmp_path / "page.html")
    assert page_of(sweep).title in (tmp_path / "page.html").read_text("utf-8")


def test_arrays_of_a_sweep_that_no_chart_shows_are_named(sweep: xr.Dataset) -> None:
    more = sweep.assign(curve=(("step", *sweep.status.dims), np.zeros((3, *sweep.status.shape))))
    assert page_of(more).lead[1].startswith("Not shown: curve [3].") and len(page_of(sweep).lead) == 1


def test_a_sweep_is_shown_with_its_failures(sweep: xr.Dataset) -> None:
    page = page_of(sweep)
    charts = {chart.name: chart for chart in page.charts}
    assert set(charts) == {"lines", "maps", "multiples"} and page.lead[0].startswith("11 of 12 points")
    along_units = charts["lines"].views[0, 0].data[1]
    assert along_units.x.tolist() == [4, 8, 16]
    np.testing.assert_allclose(along_units.y, [(4 + 5 + 8) / 3, 12.5, 24.5])
    (missing,) = page.tables[0].rows
    assert missing == ("g = 2.0, units = 4, seed = 1", "failed", f"ValueError: {EVIL}")
    assert EVIL not in page.to_html()


def test_the_library_that_draws_is_that_of_plotly_here() -> None:
    """The figures are plotly's of Python: they are drawn by the same major version of plotly.js, or a later one."""
    vendored = files("kpflow_dyn.report") / "vendored"
    head = vendored.joinpath("plotly-cartesian.min.js").read_text("utf-8")[:300]
    (version,) = re.findall(r"plotly\.js \(cartesian - minified\) v(\d+)\.", head)
    assert int(version) >= int(get_plotlyjs_version().partition(".")[0])
    assert "MIT" in head and "MIT License" in vendored.joinpath("LICENSE").read_text("utf-8")


def test_a_page_of_the_size_of_the_demo_is_small() -> None:
    """And a larger one: no chart holds more than a fixed count of numbers."""
    torch.manual_seed(0)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 64), torch.randn(32, 22, 3))))
    dataset = analyze(flow, k=8, samples=40)
    assert len(page_of(dataset).to_html()) < 2.3e6
    large = dataset.isel(trial=np.arange(96) % 32, trial_other=np.arange(96) % 32, time=np.arange(110) % 22)
    large = large.isel(unit=np.arange(256) % 64, unit_other=np.arange(256) % 64, time_other=np.arange(110) % 22)
    assert len(page_of(large).to_html()) < 3e6


def test_a_page_of_many_points_is_small() -> None:
    over = {"g": np.linspace(0.5, 2, 20), "units": 2 ** np.arange(10), "seed": np.arange(10)}
    shape = tuple(map(len, over.values()))
    rng = np.random.default_rng(0)
    numbers = {f"number_{i}": (tuple(over), rng.normal(size=shape)) for i in range(8)}
    status = {"done": True, "status": "done", "error": "", "seconds": 1.0}
    about = {name: (tuple(over), np.full(shape, value)) for name, value in status.items()}
    assert len(page_of(xr.Dataset(numbers | about, coords=over)).to_html()) < 3e6


def test_findings_say_what_the_figures_show(dataset: xr.Dataset, track: xr.Dataset, sweep: xr.Dataset) -> None:
    charts = {chart.name: chart for chart in page_of(dataset).charts}
    share = dataset.temporal_eigenvalue.values / dataset.temporal_eigenvalue.values.sum()
    assert f"Temporal mode 1 carries {100 * share[0]:.2g}%, mode 2 carries {100 * share[1]:.2g}%" in (
        charts["temporal_modes"].said()
    )
    rank = float(dataset.temporal_effective_rank)
    (said,) = [text for text in page_of(dataset).lead if "participation ratio" in text]
    assert f"first pattern in time carries {100 * share[0]:.2g}%" in said and f"ratio {rank:.3g} of 5" in said
    assert (
        page_of(sweep).charts[0].said()
        == "The mean of rank is least at units = 4 (5.67) and largest at units = 16 (24.5)."
    )
    assert "NTK: the full effective rank goes from" in page_of(track).charts[0].said()
    for found in (dataset, track, sweep):
        assert all(chart.said(*view) for chart in page_of(found).charts for view in chart.views)


def test_findings_follow_the_view(track: xr.Dataset, sweep: xr.Dataset) -> None:
    lines, maps, multiples = page_of(sweep).charts
    assert lines.choices[1].options == ("units", "g", "seed")
    assert lines.said(0, 1) == "The mean of rank is least at g = 1 (9.83) and largest at g = 2 (21.2)."
    assert f"The mean of {EVIL} is" in lines.said(1, 0) and f"The mean of {EVIL} is" in multiples.said(1, 0)
    assert "at seed = 1 and units = 16 (25)" in maps.said(0, maps.choices[1].options.index("seed and units"))
    charts = {chart.name: chart for chart in page_of(track).charts}
    last = track.alignment_last.sel(operator="K")[0]
    assert f"Alignment with the last checkpoint at the first one: K {float(last):.3g}" in charts["alignments"].said(1)
    assert "NTK: the temporal effective rank" in charts["ranks"].said(1)
    assert "Its alignment with the kernel goes from" in charts["target"].said(1)


def test_one_line_says_what_it_is_of(dataset: xr.Dataset, sweep: xr.Dataset) -> None:
    named = dataset.assign_attrs(task="neurogym:Task-v0")
    assert (
        page_of(named).about == f"RNNCell, 4 units · Task-v0, 3 trials, 5 times, seed 0 · kpflow_dyn {kp.__version__}"
    )
    tables = {"model": '{"name": "gru", "units": 8}', "task": '{"name": "memorypro"}', "seed": "0"}
    assert page_of(sweep.assign_attrs(tables)).about.startswith("gru · memorypro, seed 0 · ")
    assert "<li>units: 8</li>" in page_of(sweep.assign_attrs(tables)).to_html()


def saved(tab: Page, button: str) -> tuple[str, bytes]:
    """Name and content of the file that a button gives."""
    with tab.expect_download() as download:
        tab.click(button)
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


# Browsers stop pages that save many files in a row, so that these are looked at and not saved.
CAUGHT = """() => {
  window.caught = [];
  HTMLAnchorElement.prototype.click = async function () {
    const bytes = new Uint8Array(await (await fetch(this.href)).arrayBuffer());
    window.caught.push([this.download, Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")]);
  };
}"""


def check_files(tab: Page) -> None:
    """Each button gives a file of its kind."""
    tab.evaluate(CAUGHT)
    buttons = tab.query_selector_all("[data-kind]")
    assert len(buttons) == 3 * len(tab.query_selector_all("figure"))
    for button in buttons:
        button.click()
    tab.wait_for_function(f"window.caught.length === {len(buttons)}")
    files = {name: text.encode("latin-1") for name, text in tab.evaluate("window.caught")}
    assert len(files) == len(buttons)
    for name, content in files.items():
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") >= 1520
        elif name.endswith(".svg"):
            assert ElementTree.fromstring(content).findall(".//{http://www.w3.org/2000/svg}text")
        else:
            header, *rows = table(content)
            assert rows and {len(row) for row in rows} == {len(header)} and all(header)


def table(content: bytes) -> list[list[str]]:
    assert content.endswith(b"\r\n")
    return list(csv.reader(io.StringIO(content.decode("utf-8"), newline="")))


def check_modebars(tab: Page) -> None:
    """They come when one points at a figure, and lie on nothing else."""
    for figure in tab.query_selector_all("figure"):
        figure.query_selector(".nsewdrag").hover(force=True)
        bar = figure.query_selector(".modebar").bounding_box()
        assert bar["width"] > 50
        for other in figure.query_selector_all("h3, label, .tools button, .legend, .colorbar, .nsewdrag"):
            box = other.bounding_box()
            beside = box["x"] >= bar["x"] + bar["width"] or box["x"] + box["width"] <= bar["x"]
            assert beside or box["y"] >= bar["y"] + bar["height"] or box["y"] + box["height"] <= bar["y"]


CONTROLS = "document.querySelectorAll('a[href], select, button:not(.modebar-btn), summary')"
FOCUSED = "document.activeElement === document.body ? '' : (document.activeElement.dataset.place ?? 'other')"


def check_keyboard(tab: Page) -> None:
    """The Tab key comes to each control, the link to the results first; each has a name, and shows its focus."""
    tab.reload()
    tab.evaluate("for (const numbers of document.querySelectorAll('details')) numbers.open = true")
    count = tab.evaluate(f"[...{CONTROLS}].map((one, place) => (one.dataset.place = place)).length")
    reached, outlined = [], set()
    while (tab.keyboard.press("Tab"), place := tab.evaluate(FOCUSED))[1]:
        reached.append(place)
        outlined.add(tab.evaluate("getComputedStyle(document.activeElement).outlineStyle"))
        assert len(reached) < 20 * count
    assert {place for place in reached if place != "other"} == {str(place) for place in range(count)}
    assert reached[0] == "0" and "none" not in outlined
    names = tab.evaluate(
        f"[...{CONTROLS}].map((one) => one.ariaLabel || one.labels?.[0]?.textContent || one.textContent)"
    )
    assert all(name.strip() for name in names)


def check_structure(tab: Page) -> None:
    """Headings in order, ids once, and what describes a figure is there."""
    levels = tab.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) <= 1
    ids = tab.evaluate(
        "[...document.querySelectorAll('[id]')].filter((one) => !one.closest('svg')).map((one) => one.id)"
    )
    assert len(ids) == len(set(ids))
    for name in ("aria-labelledby", "aria-describedby"):
        used = tab.evaluate(f"[...document.querySelectorAll('[{name}]')].map((one) => one.getAttribute('{name}'))")
        assert used and set(used) <= set(ids)
    inside = tab.evaluate("[...document.querySelectorAll('nav a, .skip')].map((one) => one.hash.slice(1))")
    assert set(inside) <= set(ids)


CONTRASTS = """() => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (one) => {
    const color = parts(getComputedStyle(one).backgroundColor);
    return (color[3] ?? 1) > 0 || !one.parentElement ? color : behind(one.parentElement);
  };
  const texts = document.querySelectorAll("h1, h2, h3, p, a, label, select, button, summary, th, td, dt, dd");
  return [...texts].map((one) => {
    const [a, b] = [light(parts(getComputedStyle(one).color)), light(behind(one))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
}"""


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("kind", ["dataset", "track", "sweep", "comparison"])
def test_the_page_works_in_a_browser(kind: str, width: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write_report(request.getfixturevalue(kind), tmp_path / "page.html")
    with opened(tmp_path / "page.html", width) as (tab, complaints):
        charts = tab.query_selector_all("figure[data-height]")
        assert all(chart.query_selector(".main-svg") for chart in charts)
        for chart in charts:
            for choice in chart.query_selector_all("select"):
                before = chart.query_selector(".plot").inner_html()
                choice.select_option(index=len(choice.query_selector_all("option")) - 1)
                assert chart.query_selector(".plot").inner_html() != before
        check_files(tab)
        check_structure(tab)
        tab.evaluate("for (const numbers of document.querySelectorAll('details')) numbers.open = true")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        background = "getComputedStyle(document.body).backgroundColor"
        light = tab.evaluate(background)
        assert min(tab.evaluate(CONTRASTS)) >= 4.5
        tab.click("#look")
        assert tab.evaluate(background) != light and min(tab.evaluate(CONTRASTS)) >= 4.5
        if width > 600:
            check_modebars(tab)
            check_keyboard(tab)
        else:
            assert not tab.query_selector_all(".modebar-btn")
            wide = "[...document.querySelectorAll('.wide, .scroll')].filter((one) => one.scrollWidth > one.clientWidth)"
            assert set(tab.evaluate(f"{wide}.map((one) => one.tabIndex)")) <= {0}  # the arrow keys scroll it
        assert complaints == []


@needs_chromium
def test_files_hold_the_numbers_that_are_shown(dataset: xr.Dataset, sweep: xr.Dataset, tmp_path: Path) -> None:
    write_report(dataset.assign_attrs(title='A "network", of 4'), tmp_path / "analysis.html")
    write_report(sweep, tmp_path / "sweep.html")
    with opened(tmp_path / "analysis.html", 1280) as (tab, _):
        tab.select_option("#ntk_modes select >> nth=0", index=1)
        tab.select_option("#ntk_modes select >> nth=1", index=2)
        name, content = saved(tab, "#ntk_modes [data-kind=csv]")
        assert re.fullmatch(r"a-network-of-4_ntk-modes_mode-2_trial-2[\w-]*\.csv", name)
        header, *rows = table(content)
        assert header == ["Unit", "Time (step)", "Change of the state"]
        shown = np.array(rows, float)
        np.testing.assert_array_equal(shown[:5, 1], dataset.time)
        np.testing.assert_allclose(shown[:, 2].reshape(4, 5), dataset.ntk_mode.values[1, 2].T, rtol=1e-6)
        header, *rows = table(saved(tab, "#spectra [data-kind=csv]")[1])
        assert header == ["series", "Rank of the eigenvalue", "Eigenvalue", "residual"]
        shown = np.array([row[1:] for row in rows if row[0] == "NTK"], float)
        np.testing.assert_allclose(shown[:, 1], dataset.ntk_eigenvalue, rtol=1e-6)
        np.testing.assert_allclose(shown[:, 2], dataset.ntk_residual, rtol=1e-6)
        header, *rows = table(saved(tab, "#effective_ranks [data-kind=csv]")[1])
        assert header == ["series", "Effective rank", "Operator", "Effective rank: 2 standard errors", "of"]
        assert [row[2] for row in rows] == ["temporal", "spatial", "trial", "state", "core", "K", "NTK"]
        assert float(rows[0][1]) == pytest.approx(float(dataset.temporal_effective_rank), rel=1e-6)
        assert float(rows[0][3]) == pytest.approx(2 * dataset.temporal_effective_rank.attrs["stderr"], rel=1e-6)
        tab.click("#spectra summary")
        assert tab.locator("#spectra tbody tr").count() <= 20
        header, *rows = table(saved(tab, "#state_pca [data-kind=csv]")[1])
        assert rows[0][0] == "trial 0 (<img> 0)" and len(rows) == 15
    with opened(tmp_path / "sweep.html", 400) as (tab, _):
        header, *rows = table(saved(tab, "#lines [data-kind=csv]")[1])
        assert header == ["series", "units", "rank", "rank: down to the least", "rank: up to the largest"]
        assert [list(map(float, row[1:])) for row in rows if row[0] == "mean"][1:] == [
            [8, 12.5, 4.5, 4.5],
            [16, 24.5, 8.5, 8.5],
        ]
        header, *rows = table(saved(tab, "#multiples [data-kind=csv]")[1])
        assert header == ["series", "panel", "units", "rank"] and ["seed = 1", "g = 2", "8", "17"] in rows
        assert ["seed = 1", "g = 2", "4", ""] in rows  # the point that failed
        tab.select_option("#lines select >> nth=0", index=1)
        header, *rows = table(saved(tab, "#lines [data-kind=csv]")[1])
        assert header[2] == EVIL


TICKS = ".//*[@class='ytick']/{http://www.w3.org/2000/svg}text"


@needs_chromium
def test_a_picture_shows_what_the_reader_sees(sweep: xr.Dataset, tmp_path: Path) -> None:
    """The part that was zoomed to and the lines that are not hidden, also in the other look; another view is whole."""
    write_report(sweep, tmp_path / "page.html")
    with opened(tmp_path / "page.html", 1280) as (tab, complaints):

        def ticks() -> list[float]:
            drawing = ElementTree.fromstring(saved(tab, "#lines [data-kind=svg]")[1])
            return [float(one.text or "nan") for one in drawing.findall(TICKS)]

        whole, rows = ticks(), len(table(saved(tab, "#lines [data-kind=csv]")[1]))
        finding = tab.inner_text("#lines .finding")
        tab.locator("#lines .nsewdrag").scroll_into_view_if_needed()
        area = tab.locator("#lines .nsewdrag").bounding_box()
        assert area
        x, y = area["x"] + 5, area["y"] + area["height"] / 2
        tab.mouse.move(x, y)
        tab.mouse.down()
        tab.mouse.move(x + area["width"] / 2, y + 60, steps=5)
        tab.mouse.up()
        zoomed = ticks()
        assert max(zoomed) - min(zoomed) < (max(whole) - min(whole)) / 2
        tab.click("#look")
        assert ticks() == zoomed and len(table(saved(tab, "#lines [data-kind=csv]")[1])) == rows
        tab.click("#lines .legendtoggle >> nth=0")
        tab.wait_for_function("document.querySelector('#lines .plot').data[0].visible === 'legendonly'")
        drawing = saved(tab, "#lines [data-kind=svg]")[1]
        assert drawing.count(b'class="trace scatter') == 1
        assert tab.inner_text("#lines .finding") == finding
        tab.select_option("#lines select >> nth=1", label="seed")
        assert "at seed = " in tab.inner_text("#lines .finding")
        tab.select_option("#lines select >> nth=1", label="units")
        assert ticks() == whole and complaints == []


CUT = """() => [...document.querySelectorAll('.plot')].flatMap((plot) => {
  const frame = plot.querySelector('.main-svg').getBoundingClientRect();
  return [...plot.querySelectorAll('.main-svg text')].filter((text) => {
    const box = text.getBoundingClientRect();
    const inside = box.left > frame.left - 1 && box.right < frame.right + 1 && box.bottom < frame.bottom + 1;
    return box.width && !inside;
  }).map((text) => text.textContent);
})"""
LOOK = "document.documentElement.dataset.look"


@needs_chromium
def test_a_page_on_paper(dataset: xr.Dataset, tmp_path: Path) -> None:
    """Light, and no text of a figure is cut off; the screen is then as before."""
    write_report(dataset, tmp_path / "page.html")
    with opened(tmp_path / "page.html", 1280, "dark") as (tab, complaints):
        heights = "JSON.stringify([...document.querySelectorAll('figure')].map((one) => one.clientHeight))"
        screen = tab.evaluate(heights)
        tab.evaluate(f"addEventListener('beforeprint', () => {{ window.cut = ({CUT})(); window.paper = {LOOK}; }})")
        assert tab.pdf(format="A4").startswith(b"%PDF")
        assert tab.evaluate("window.paper") == "light" and tab.evaluate("window.cut") == []
        tab.wait_for_function(f"{heights} === '{screen}'")
        assert tab.evaluate(LOOK) == "dark" and tab.evaluate(CUT) == [] and complaints == []


def test_a_comparison_under_a_loss_says_of_what_its_kernel_is(comparison: xr.Dataset) -> None:
    page = page_of(comparison)
    meanings = {row[0]: row[-1] for table in page.tables for row in table.rows}
    for number in ("Effective rank", "Alignment"):
        assert meanings[f"{number} of NTK"].startswith("of the outputs under the loss")
        assert meanings[f"{number} of K"].startswith("of the states") and meanings[f"{number} of P"].startswith(
            "of the s"
        )
    assert "K and P compare unit i of one network with unit i of the other" in page.tables[1].note
    assert "Most of the NTK of the outputs, under the loss, lies in" in page.charts[0].said()


def test_a_loss_that_is_never_halved_or_late() -> None:
    parts = xr.Dataset({"part_half": ("part", [np.inf])}, {"part": ["everything"]}, {"followed": 2000.0})
    under = "Gradient descent under the kernel as it is now "
    never, late = _order(parts), _order(parts.assign(part_half=("part", [np.nan])))
    assert never.startswith(f"{under}leaves the loss above its half for ever; training changes the kernel, and may")
    assert late.startswith(f"{under}would halve the loss later than tau = 2000 (tau = learning rate x steps); ")


def test_where_a_loss_rises_again_the_page_says_when_it_is_low_for_good() -> None:
    of_fractions = {f"optimizer_{name}": ("fraction", [10.0, 20.0, 184.0]) for name in ("steps", "earliest", "latest")}
    of_parts = {f"optimizer_{name}": ("part", [value]) for name, value in {"half": 10.2, "tenth": np.nan}.items()}
    coordinates = {"fraction": [0.5, 0.2, 0.1], "part": ["everything"], "step": [0, 300]}
    said = _by_optimizer(
        xr.Dataset(of_fractions | of_parts, coordinates, {"optimizer": "adam (lr 0.1)", "optimizer_road": "so"})
    )
    assert "first brings it to 50% after 10 steps (10 to 10), 20%" in said
    assert "10% after 184 steps (184 to 184; for good not within 300)" in said


def test_a_comparison_of_kernels_of_one_mode_says_so(comparison: xr.Dataset) -> None:
    said = "Nearly all of each kernel is in one mode"
    ranks = comparison.effective_rank
    for rank, there in ((1.01418, True), (3.0, False)):
        page = page_of(comparison.assign(effective_rank=ranks * 0 + rank, effective_rank_stderr=ranks * 0 + 1.2e-6))
        assert (said in page.lead[0]) == there
    assert "3" in page.tables[0].rows[2]
    shown = page_of(comparison.assign(effective_rank=ranks * 0 + 1.01418, effective_rank_stderr=ranks * 0 + 1.2e-6))
    assert ("1.014", "1.014") in [row[1:3] for row in shown.tables[0].rows]


NEAR = [1.00001, 1.00002, 1.00003]
FAR = [1e9 + 1, 1e9 + 2, 1e9 + 3]  # of one value each in single precision


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """A sweep over values that differ in their last digits, with names that the page has uses for."""
    swept = kp.Sweep(
        lambda **at: {"gain": sum(at.values())}, {"series": NEAR, "panel": FAR}, tmp_path_factory.mktemp("s")
    )
    swept.run(progress=False)
    return swept.collect()


def test_labels_tell_the_values_of_an_axis_apart(near: xr.Dataset) -> None:
    charts = {chart.name: chart for chart in page_of(near).charts}
    trace = charts["maps"].views[0, 0].data[0]
    assert list(trace.x) == [f"{value:.6g}" for value in NEAR] and list(trace.y) == [f"{value:.10g}" for value in FAR]
    assert "series = 1.00003" in charts["lines"].said() and "panel = 1000000003" in charts["maps"].said()
    layout = charts["multiples"].views[0, 0].layout
    assert [layout[f"xaxis{i}"].title.text for i in (1, 2, 3)] == [f"panel = {value:.10g}" for value in FAR]


@needs_chromium
def test_files_tell_the_values_of_an_axis_apart(near: xr.Dataset, tmp_path: Path) -> None:
    write_report(near, tmp_path / "near.html")
    with opened(tmp_path / "near.html", 1280) as (tab, _):
        header, *rows = table(saved(tab, "#lines [data-kind=csv]")[1])
        assert header[:3] == ["series", "series (2)", "gain"]
        assert [float(row[1]) for row in rows if row[0] == "mean"] == NEAR
        tab.click("#lines summary")
        tab.wait_for_selector("#lines tbody tr")
        shown = {text.split("\t")[1] for text in tab.locator("#lines tbody tr").all_inner_texts()}
        assert shown == {f"{value}" for value in NEAR}
        header, *rows = table(saved(tab, "#maps [data-kind=csv]")[1])
        assert {row[header.index("series")] for row in rows} == {f"{value}" for value in NEAR}
        header, *rows = table(saved(tab, "#multiples [data-kind=csv]")[1])
        assert header == ["series", "panel", "series (2)", "gain"] and len({tuple(row[1:3]) for row in rows}) == 9


def test_a_page_of_what_lies_on_disk(dataset: xr.Dataset, tmp_path: Path) -> None:
    dataset.to_netcdf(tmp_path / "results.nc", engine="h5netcdf")
    write_report(tmp_path, tmp_path / "page.html")
    assert "Modes of the NTK" in (tmp_path / "page.html").read_text("utf-8")


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no results; expected results\.nc, track\.nc"):
        read_results(tmp_path)
    (tmp_path / "track.nc").write_text("no numbers")
    with pytest.raises(ValueError, match="cannot be read as a NetCDF file"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="no page is known for a dataset of nothing"):
        page_of(xr.Dataset())


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (34.04, 0.4839, "34.04 ± 0.48"),
        (8125.8581, 0.0, "8126"),
        (45126.0, 419.0, "45126 ± 419"),
        (620159.0, 1023.0, "(6.202 ± 0.010)e5"),
        (0.07907, 0.0003, "0.07907 ± 0.00030"),
        (1.5e-7, 2e-9, "(1.500 ± 0.020)e-7"),
        (0.0, 0.0, "0"),
        (0.25978512, 4.9e-13, "0.2598"),
        (1.0, np.nan, "1 ± unknown"),
        (1.0, np.inf, "1 ± unknown"),
        (0.0, np.nan, "0 ± unknown"),
        (np.nan, 0.1, "not known"),
        (np.nan, np.nan, "not known"),
        (-np.inf, 0.1, "-inf"),
    ],
)
def test_numbers_are_written_to_the_digits_that_their_error_leaves(value: float, stderr: float, text: str) -> None:
    assert with_error(value, stderr) == text
