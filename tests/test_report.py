"""The page: complete, self-contained, and safe with whatever text a user brings; and as a browser shows it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from browser import needs_chromium, opened

import kpflow_dyn as kp
from kpflow_dyn._analyze import WORDS, analyze
from kpflow_dyn.report import page_of, read_results, summarize, with_error, write_report

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
    assert set(re.findall(r'(?:src|srcset|href)="([^"]*)"', own(page))) == {"data:,"}


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


def test_a_sweep_is_shown_with_its_failures(sweep: xr.Dataset) -> None:
    page = page_of(sweep)
    charts = {chart.name: chart for chart in page.charts}
    assert set(charts) == {"lines", "maps", "multiples"} and page.lead[0].startswith("11 of 12 points")
    along_units = charts["lines"].views[0, 0].data[1]
    assert along_units.x.tolist() == [4, 8, 16]
    np.testing.assert_allclose(along_units.y, [(4 + 5 + 8) / 3, 12.5, 24.5])
    (missing,) = page.tables[1].rows
    assert missing == ("g = 2.0, units = 4, seed = 1", "failed", f"ValueError: {EVIL}")
    assert EVIL not in page.to_html()


@needs_chromium
@pytest.mark.parametrize(("kind", "width"), [("dataset", 1280), ("track", 400), ("sweep", 1280), ("sweep", 400)])
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
        background = "getComputedStyle(document.body).backgroundColor"
        light = tab.evaluate(background)
        tab.click("#look")
        assert tab.evaluate(background) != light
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert complaints == []


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
    ],
)
def test_numbers_are_written_to_the_digits_that_their_error_leaves(value: float, stderr: float, text: str) -> None:
    assert with_error(value, stderr) == text
