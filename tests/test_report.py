"""The page: complete, self-contained, and safe with whatever text a user brings."""

from __future__ import annotations

import re

import pytest
import torch
import xarray as xr

import kpflow_dyn as kp
from kpflow_dyn.analysis import WORDS, analyze
from kpflow_dyn.figures import FIGURES
from kpflow_dyn.report import CAPTIONS, render_figures, render_page, summarize, with_error

EVIL = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def dataset() -> xr.Dataset:
    torch.manual_seed(0)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(2, 4), torch.randn(3, 5, 2))))
    return analyze(flow, k=2).assign_attrs(title=EVIL, task=EVIL, warnings=f"{EVIL}\nsecond & last")


@pytest.fixture(scope="module")
def page(dataset: xr.Dataset) -> str:
    return render_page(dataset, render_figures(dataset))


def without_data(page: str) -> str:
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "DATA", page)


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    text = without_data(page)
    assert not re.findall(r"https?:|//\w|url\(|@import|<script|<link|<iframe", text)
    assert set(re.findall(r'(?:src|srcset|href)="([^"]*)"', text)) == {"DATA"}


def test_user_text_is_escaped(page: str) -> None:
    assert EVIL not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == 4  # <title>, <h1>, settings, warning
    assert "second &amp; last" in page


def test_every_number_figure_and_setting_is_there(page: str, dataset: xr.Dataset) -> None:
    assert set(CAPTIONS) == set(FIGURES)
    for name in FIGURES:
        assert f'<figure id="{name}">' in page
    assert page.count("data:image/png;base64,") == 2 * len(FIGURES)
    for name, number in summarize(dataset).items():
        assert WORDS[name][1] in page and number["text"] in page
    for fact in (kp.__version__, torch.__version__, "3 trials x 5 times x 4 units"):
        assert fact in page


def test_figures_are_png(dataset: xr.Dataset) -> None:
    for image in render_figures(dataset).values():
        assert image["light"].startswith(b"\x89PNG") and image["dark"].startswith(b"\x89PNG")
        assert image["light"] != image["dark"]


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
