"""How results print themselves, their datasets and their figures: one table of all kinds, in both frameworks."""

from __future__ import annotations

import dataclasses
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from result_registry import IN_JAX, RESULTS, UNITS, Kit

import kpflow_dyn as kp
from kpflow_dyn import control
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._shown import COLUMNS, LINES, Shown, described, number, shares, sizes, span, type_name
from kpflow_dyn.models import ClosedLoop, Pendulum

pytestmark = pytest.mark.usefixtures("x64")

CASES = [("torch", name) for name in RESULTS] + [("jax", name) for name in IN_JAX]
DUMPS = re.compile(r"tensor\(|array\(|Array\(|<xarray|object at 0x|dtype=")


@cache
def kit(framework: str) -> Kit:
    return Kit(framework)


@cache
def result(framework: str, name: str) -> Any:
    with jax.enable_x64(True):
        return RESULTS[name](kit(framework))


@pytest.mark.parametrize(("framework", "name"), CASES)
def test_results_print_in_few_lines_and_keep_their_data(framework: str, name: str, tmp_path: Path) -> None:
    found = result(framework, name)
    check_text(found)
    if hasattr(found, "to_xarray"):
        check_dataset(found.to_xarray(), tmp_path / "found.nc")
    if hasattr(found, "plot") and framework == "torch":
        check_figure(found)


def check_text(found: Any) -> None:
    lines = repr(found).splitlines()
    assert 0 < len(lines) <= LINES and max(map(len, lines)) <= COLUMNS + 20
    assert not DUMPS.search(repr(found)) and not DUMPS.search(str(found))
    if isinstance(found, Shown):
        assert max(map(len, lines)) <= COLUMNS
        html = found._repr_html_()
        texts = re.findall("<pre [^>]*>(.*?)</pre>", html, re.DOTALL)
        assert html.count("<tr>") + sum(len(text.split("\n")) for text in texts) == len(lines) - 1
        assert "<script" not in html and "color" not in html


def check_dataset(dataset: xr.Dataset, path: Path) -> None:
    """No Python objects, and the same in a file."""
    assert all(dataset[variable].dtype != object for variable in dataset.variables)
    dataset.to_netcdf(path, engine="h5netcdf")
    xr.testing.assert_equal(xr.load_dataset(path, engine="h5netcdf"), dataset)


def check_figure(found: Any) -> None:
    """In the width of a column, with nothing outside of it."""
    with kp.figures.style("paper", columns=1):
        figure = found.plot()
    assert isinstance(figure, Figure) and figure.get_figwidth() == 3.5
    assert kp.figures.to_bytes(figure)  # which lays it out
    assert any(axes.has_data() or axes.texts for axes in figure.axes)
    page, inside = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert inside.x0 >= page.x0 - 1 and inside.x1 <= page.x1 + 1 and inside.y0 >= -1 and inside.y1 <= page.y1 + 1


NEITHER = {"discrete problem", "ode problem", "flow", "ode flow", "static flow", "output", "site", "operator", "space"}
NEITHER |= {"partial trace", "estimate", "rank estimate", "svds", "density", "rank bound", "contributions", "metric"}
NEITHER |= {"measure", "regulator", "margins", "cost", "sweep", "plant", "closed loop", "law"}
WITHOUT_FIGURE = {"learnability", "obstacles", "recording", "training"}


def test_what_holds_data_has_a_dataset_and_a_figure() -> None:
    found = {name: result("torch", name) for name in RESULTS}
    assert {name for name, one in found.items() if not hasattr(one, "to_xarray")} == NEITHER
    assert {name for name, one in found.items() if not hasattr(one, "plot")} == NEITHER | WITHOUT_FIGURE


def test_no_public_dataclass_that_holds_arrays_prints_them() -> None:
    """None of them has the repr that dataclasses write."""
    modules = [kp, kp.control, kp.dynamics, kp.gym, kp.tasks, kp.train, kp.solvers]
    public = [getattr(module, name) for module in modules for name in getattr(module, "__all__", [])]
    made = [one for one in public if dataclasses.is_dataclass(one) and hasattr(one.__repr__, "__wrapped__")]
    arrays = re.compile(r"Array|np\.ndarray|<class 'numpy\.ndarray'|list\[Array|tuple\[Modes")
    shown = {one: [str(field.type) for field in dataclasses.fields(one) if field.repr] for one in made}
    plain = {one.__name__ for one, types in shown.items() if any(map(arrays.match, types))}
    assert plain == {"Moments"}  # means of two or three moments


def test_states_keep_their_values_and_names() -> None:
    for framework in ("torch", "jax"):
        loop, cell = result(framework, "ode solution"), result(framework, "discrete solution")
        dataset = loop.to_xarray()
        np.testing.assert_array_equal(dataset.state, to_numpy(loop.state))
        np.testing.assert_array_equal(dataset.time, loop.t)
        assert dataset.unit.values.tolist() == ["angle", "angular_velocity"]
        assert dict(cell.to_xarray().sizes) == {"trial": 4, "time": 12, "unit": UNITS}
        modes = kp.modes(result(framework, "ode flow").ntk, "unit", k=2).to_xarray()
        assert modes.unit.values.tolist() == ["angle", "angular_velocity"]
        assert "unit" not in kp.modes(result(framework, "flow").ntk, "unit", k=2).to_xarray().coords


def test_datasets_have_the_numbers_of_their_objects() -> None:
    task, episodes = result("torch", "task"), result("torch", "episodes")
    dataset = task.to_xarray()
    np.testing.assert_array_equal(dataset.inputs, task.inputs)
    np.testing.assert_array_equal(dataset.targets, task.targets)
    assert dataset.time.attrs["units"] == "ms" and float(dataset.time[1]) == task.dt
    assert dataset.out.values.tolist() == list(task.outputs)
    np.testing.assert_array_equal(episodes.to_xarray().returns, episodes.returns)
    summary = result("torch", "summary")
    numbers = summary.to_xarray()
    for name, one in summary.numbers().items():
        assert float(numbers[name]) == one.value and numbers[name].attrs["stderr"] == one.stderr
    np.testing.assert_array_equal(numbers.temporal_mode, to_numpy(summary.temporal.vectors))
    forecast = result("torch", "forecast").to_xarray()
    np.testing.assert_array_equal(forecast.loss.sel(step=0), result("torch", "forecast").loss[0])
    gram = result("torch", "gramian")
    np.testing.assert_array_equal(gram.to_xarray().eigenvalues, gram.eigenvalues)
    compared = result("torch", "comparison")
    np.testing.assert_array_equal(compared.to_xarray().eigenvalues[1], to_numpy(compared.modes[1].values))


def test_labels_of_trials_are_coordinates() -> None:
    inputs = np.zeros((2, 3, 1))
    labels = {"word": np.array(["a", "bcd"], object), "place": np.arange(4.0).reshape(2, 2)}
    found = kp.tasks.TaskData(inputs, targets=np.array([[0, 1, -100], [1, 1, 0]]), labels=labels).to_xarray()
    assert found.label_word.values.tolist() == ["a", "bcd"] and found.label_place.dims == ("trial", "place_1")
    assert found.targets.dims == ("trial", "time") and "units" not in found.time.attrs


class Named(Shown):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def _shown(self) -> Any:
        return "<b>Title</b>", [("a & b", "1 < 2"), *(("row", "x" * 200) for _ in range(self.rows))]


def test_text_is_cut_and_html_escaped() -> None:
    few, many = Named(1), Named(40)
    assert repr(few).splitlines()[1:] == ["  a & b  1 < 2", f"  row    {'x' * 88}..."]
    assert len(str(few).splitlines()[-1]) == 209
    assert len(repr(many).splitlines()) == LINES and repr(many).endswith("... print() shows all 41 lines")
    assert len(str(many).splitlines()) == 42
    html = few._repr_html_()
    assert "&lt;b&gt;Title" in html and "1 &lt; 2" in html and "a &amp; b" in html


def test_lines_of_text_are_one_block_in_a_notebook() -> None:
    """Rows of a table are striped there, so that a text in them has a frame around each line."""
    rows = [("name", "value"), "error   rate", "a < b   0.5", ("next", "kp.obstacles")]
    html = type("Mixed", (Shown,), {"_shown": lambda self: ("Title", rows)})()._repr_html_()
    assert re.sub("<(pre|t[a-z]+) [^>]*>", r"<\1>", html) == (
        "<div><b>Title</b><table><tr><th>name</th><td>value</td></tr></table>"
        "<pre>error   rate\na &lt; b   0.5</pre><table><tr><th>next</th><td>kp.obstacles</td></tr></table></div>"
    )


def test_words_of_numbers_and_arrays() -> None:
    assert sizes(("trial", "unit"), torch.zeros(2, 3)) == "[trial 2, unit 3] float32 on cpu"
    assert sizes(("unit",), jax.numpy.zeros(3, "float32")) == "[unit 3] float32 on cpu"
    assert sizes(("unit",), np.zeros(3)) == "[unit 3] float64 on cpu"
    assert span(np.array([0.5])) == "0.5, one time" and span(np.linspace(0, 2, 5)) == "0 to 2, 5 times"
    assert number(1 - 2j) == "1-2i" and shares([0.5, 0.25, 0.02]) == "50 %, 25 %, 2 %"
    assert described({"a": np.zeros((2, 3))}) == "a [2, 3] float64 on cpu" and described(None) == "NoneType"


def test_types_have_the_name_of_their_library() -> None:
    solution = diffrax.diffeqsolve(diffrax.ODETerm(lambda t, y, _: -y), diffrax.Euler(), 0.0, 1.0, 0.1, 1.0)
    named = {
        "diffrax.Solution": solution,
        "torch.Tensor": torch.zeros(1),
        "jax.Array": jax.numpy.zeros(1),
        "numpy.ndarray": np.zeros(1),
        "torch.nn.GRU": torch.nn.GRU(1, 1),
        "equinox.nn.GRUCell": eqx.nn.GRUCell(1, 1, key=jax.random.key(0)),
        "DiscreteProblem": kp.DiscreteProblem,
        "dict": {},
    }
    assert {name: type_name(value) for name, value in named.items()} == {name: name for name in named}
    with pytest.raises(TypeError, match=r"got diffrax\.Solution"):
        kp.linearize(solution)


@pytest.mark.parametrize(("name", "columns", "width"), [("screen", 1, 4.8), ("paper", 1, 3.5), ("paper", 2, 7.2)])
def test_styles_set_the_width_and_stay_with_the_figure(name: str, columns: int, width: float) -> None:
    found = result("torch", "pca")
    with kp.figures.style(name, columns):
        figure = found.plot()
    assert figure.get_figwidth() == width and found.plot().get_figwidth() == 4.8
    sizes = {text.get_fontsize() for axes in figure.axes for text in (axes.xaxis.label, *axes.get_xticklabels())}
    assert sizes == {10.0 if name == "screen" else 7.5}
    pixels = int.from_bytes(kp.figures.to_bytes(figure)[16:20], "big")
    assert pixels == round(width * (300 if name == "paper" else 150))


def test_lines_are_scaled_with_letters() -> None:
    found = result("torch", "lyapunov")
    screen = found.plot()
    with kp.figures.style("paper"):
        paper = found.plot()
    for axes, other in zip(screen.axes, paper.axes, strict=True):
        for line, thin in zip(axes.lines, other.lines, strict=True):
            assert thin.get_linewidth() == pytest.approx(0.75 * line.get_linewidth())
            assert thin.get_markersize() == pytest.approx(0.75 * line.get_markersize())
    bars, thin_bars = (figure.axes[0].collections[0].get_linewidth()[0] for figure in (screen, paper))
    assert thin_bars == pytest.approx(0.75 * bars) and thin_bars > 1


def test_files_for_papers_have_letters_that_can_be_edited() -> None:
    with kp.figures.style("paper"):
        figure = result("torch", "pca").plot()
    pdf, svg = (kp.figures.to_bytes(figure, kind) for kind in ("pdf", "svg"))
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType
    assert b">Principal component</text>" in svg
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    assert b"</text>" in file.getvalue()


def test_unknown_styles_are_refused() -> None:
    with (
        pytest.raises(ValueError, match="style is 'journal', expected 'screen', 'paper' or 'talk'"),
        kp.figures.style("journal"),
    ):
        pass
    with pytest.raises(ValueError, match="columns is 3"), kp.figures.style("paper", 3):
        pass
    with pytest.raises(ValueError, match="columns is 2"), kp.figures.style("talk", 2):
        pass


def test_policies_with_a_memory_name_it() -> None:
    torch.manual_seed(0)
    loop = ClosedLoop(Pendulum(), torch.nn.GRUCell(2, 3).double(), every=0.1, readout=torch.nn.Linear(3, 1).double())
    solution = kp.solve(kp.ODEProblem(loop, torch.zeros(1, 2).double() + 0.1, 0.1 * np.arange(4)), "rk4")
    names = solution.to_xarray().unit.values.tolist()
    assert names[:3] == ["angle", "angular_velocity", "memory[0]"] and len(names) == solution.state.shape[2]


def test_long_texts_of_analyses_are_printed_whole() -> None:
    summary = result("torch", "summary")
    assert "applications" in str(summary) and len(str(summary).splitlines()) > LINES - 1
    assert repr(summary).splitlines()[3].startswith("  ntk            effective rank 7.")
    assert repr(control.lqr([[0.0]], [[1.0]], [[1.0]], [[1.0]])).splitlines()[1] == "  K            [1, 1]: 1"
