"""How cost grows: its fits, the page that rows make, and that a run goes on where it was stopped. Nothing is timed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from code_blocks import ROOT

import kpflow_dyn as kp


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scaling
    import scaling_page

    for name in ("scaling", "scaling_page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return scaling, scaling_page


def rows_of(scaling: ModuleType) -> dict[str, dict]:
    """Of a machine without any overhead, at 100 Gflop/s."""
    found = {}
    for name, (_, size) in scaling.points().items():
        applications = {"ntk.mv": size.probes, "eigs": 60, "summary": 100}
        seconds = {work: size.flops(work, applications.get(work, 1)) / 1e11 for work in scaling.WORKS}
        MiB = {work: 4 * size.returned(work) / 2**20 for work in scaling.WORKS[1:]}
        found[name] = {"seconds": seconds, "MiB": MiB, "applications": applications, "rate": 1e11}
    return found


def test_exponents_are_those_of_the_costs(modules: tuple[ModuleType, ModuleType]) -> None:
    scaling, page = modules
    rows = rows_of(scaling)
    for axis in scaling.FACTORS:
        for work in scaling.WORKS:
            fitted = page.exponent(axis, page.seconds("jax", work, rows))
            assert fitted == pytest.approx(page.exponent(axis, page.floor("torch", work, rows)), abs=1e-12)
    assert page.exponent("times", page.seconds("torch", "ntk.mv", rows)) == pytest.approx(1)
    assert page.exponent("probes", page.memory("torch", "ntk.mv", rows)) == pytest.approx(1)
    assert 1.7 < page.exponent("units", page.seconds("torch", "ntk.mv", rows)) < 2
    assert page.exponent("times", page.seconds("torch", "ntk.mv", {})) is None


def test_sizes_go_over_a_factor_of_32(modules: tuple[ModuleType, ModuleType]) -> None:
    for axis, sizes in modules[0].FACTORS.items():
        assert getattr(sizes[-1], axis) == 32 * getattr(sizes[0], axis)


def test_flops_and_parameters_are_those_of_the_cell(modules: tuple[ModuleType, ModuleType]) -> None:
    """Biases count as inputs."""
    size = modules[0].Size(trials=2, times=3, units=5, inputs=7, probes=1)
    cell, x, q = modules[0].cell_in("torch", size)
    assert sum(p.numel() for p in cell.parameters()) == size.parameters
    ntk = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).ntk
    assert ntk.mv(q).shape == q.shape and q.numel() == size.returned("ntk.mv")
    uses = 2 * 3 * (4 * 15 * 5 + 2 * 15 * (7 + 2))  # rows; products with W_hh; with W_ih and the biases
    assert size.flops("ntk.mv") == 2 * uses


def test_a_run_goes_on_where_it_was_stopped(
    modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scaling, _ = modules
    file, asked, names = tmp_path / "rows.json", [], list(scaling.points())[:3]

    def stopped_at(last: str | None, failing: str = "") -> None:
        def row(name: str) -> dict:
            if name == last:
                raise KeyboardInterrupt
            if name == failing:
                raise RuntimeError("out of memory")
            asked.append(name)
            return {"seconds": {}}

        monkeypatch.setattr(scaling, "in_its_process", row)

    stopped_at(names[2])
    with pytest.raises(KeyboardInterrupt):
        scaling.run(names, file, again=False)
    assert list(json.loads(file.read_text())) == names[:2]
    stopped_at(None, failing=names[2])
    assert list(scaling.run(names, file, again=False)) == names[:2]
    stopped_at(None)
    assert list(scaling.run(names, file, again=False)) == asked == names
    scaling.run(names, file, again=True)
    assert asked == names * 2


def test_one_step_on_paper(modules: tuple[ModuleType, ModuleType]) -> None:
    """Of one probe through a tanh RNN: 8 B T n^2 flops at 0.8 x 67 Tflop/s, and W of 400 MB in 20,000 steps."""
    _, page = modules
    parts = page.application(page.MACHINES[0], 1, 2, 1)
    assert parts["products"] == pytest.approx(8 * 1e3 * 1e4 * 1e8 / (0.8 * 67e12))
    assert parts["reading W"] == pytest.approx(20_000 * 4e8 / 3.35e12)
    assert parts["exchange"] == 0 and parts["host"] == pytest.approx(2 * 3 * 4e11 / 64e9)
    assert parts["together"] == pytest.approx(parts["products"])
    many = page.application(page.MACHINES[2], 1, 2, 1)
    assert many["exchange"] == pytest.approx(2 * 511 / 512 * 4e8 / 50e9) and many["host"] == 0
    assert many["together"] == pytest.approx(many["products"] / 2 + many["reading W"] + many["exchange"])


def test_the_page_is_that_of_the_rows(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    scaling, page = modules
    written = (ROOT / "docs" / "scaling.md").read_text()
    assert page.text(json.loads(scaling.ROWS.read_text())) == written
    page.write(rows_of(scaling), tmp_path / "scaling.md")
    figures = re.findall(r"\((images/\w+\.png)\)", (tmp_path / "scaling.md").read_text())
    assert len(figures) == 2 and all((tmp_path / figure).stat().st_size > 1e4 for figure in figures)
