"""The pages of the documentation: their Python runs, their links lead somewhere, and no public name is missing."""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
import runpy
import subprocess
import sys
import threading
import tomllib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import pytest
from browser import needs_chromium, window
from code_blocks import ROOT, python_blocks, run

import kpflow_dyn as kp

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT) for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
WITH_CODE = [page for page in PAGES if page != Path("README.md") and python_blocks(ROOT / page)]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?[^)]*\)")
"""A path, or none, and an anchor in it."""
IN_WEB = re.compile(r"https?://[a-z0-9.-]+\.[a-z]{2,}(/[\w./~%#?=&:+-]*)?")
MAPS = [DOCS / "architecture.md", ROOT / "CONTRIBUTING.md"]
PLACE = re.compile(r"`([\w./]+(?:\.\w+|/))`(?::\s((?:(?:,\s|,?\sor\s|,?\sand\s)?`\w[\w.]*`)+))?")
"""A path, and names in it."""


@pytest.mark.parametrize("page", WITH_CODE, ids=str)
def test_python_runs(page: Path) -> None:
    assert run(*python_blocks(ROOT / page))


@pytest.mark.parametrize("page", [*PAGES, Path("CHANGELOG.md")], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL))
    assert [link for link, _ in links if "://" in link and not IN_WEB.fullmatch(link)] == []
    inside = [(target_of(page, link), anchor) for link, anchor in links if "://" not in link]
    assert [target for target, _ in inside if not target.exists()] == []
    assert [pair for pair in inside if pair[1] and pair[1] not in anchors(pair[0])] == []


def target_of(page: Path, link: str) -> Path:
    """The file that a link of a page means: of a notebook the page that it is made of."""
    target = (ROOT / page).parent / link if link else ROOT / page
    return target.with_suffix(".md") if target.suffix == ".ipynb" else target


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_a_broken_link_would_be_noticed() -> None:
    assert "p-how-kicks-travel" in anchors(DOCS / "theory.md") and "nonsense" not in anchors(DOCS / "theory.md")
    assert not IN_WEB.fullmatch("https://localhost") and IN_WEB.fullmatch("https://arxiv.org/abs/2605.08746")


def test_sources_of_docstrings_are_there() -> None:
    """`Source: docs/theory.md, "Estimates".` names a page and a heading of it."""
    texts = [path.read_text("utf-8") for path in (ROOT / "kpflow_dyn").rglob("*.py")]
    named = {pair for text in texts for pair in re.findall(r'(docs/[\w/]+\.md)(?:, "([^"]+)")?', text)}
    assert len(named) > 10
    assert [place for place, title in named if title and f"# {title}\n" not in ROOT.joinpath(place).read_text()] == []
    assert [place for place, _ in named if not (ROOT / place).exists()] == []


SOUGHT = {
    "loss": "report", "Adam": "learning", "plateau": "learning", "memory": "gpu", "fixed point": "dynamics",
    "controllability": "controller", "learning rate": "numbers", "GPU": "gpu", "out of memory": "gpu",
    "slow": "scaling", "NaN": "sweep", "checkpoint": "report", "neurogym": "training", "Lyapunov": "dynamics",
    "seed": "theory", "stiff": "neural_ode", "units of tau": "numbers", "wrong": "limits", "gradient": "torch_rnn",
}  # fmt: skip
"""Words that users look for, and the page that answers them."""


@pytest.mark.parametrize("word", SOUGHT)
def test_the_list_of_words_leads_to_a_page(word: str) -> None:
    page = (DOCS / "words.md").read_text("utf-8")
    rows = [row for row in re.findall(r"^\| (.+) \| (.+) \|$", page, re.MULTILINE) if word.lower() in row[0].lower()]
    assert any(f"{SOUGHT[word]}.md" in see for _, see in rows)


def test_pages_show_what_their_code_makes() -> None:
    """Each figure of the gallery and the tutorials is there, small, and made by the block above it."""
    drawing = runpy.run_path(str(DOCS / "figures.py"))
    for page in (DOCS / name for name in drawing["PAGES"]):
        text = page.read_text("utf-8")
        blocks = list(drawing["SHOWN"].finditer(text))
        made = [block["image"] for block in blocks if block["image"]]
        assert made == re.findall(r"!\[[^]]*\]\(([^)]+)\)", text) != []
        assert all(re.search(r"^figure(,.*)? = ", block["code"], re.MULTILINE) for block in blocks if block["image"])
        assert all("```text" not in block["output"].strip()[3:] for block in blocks if block["output"])
        assert [name for name in made if page.parent.joinpath(name).stat().st_size > 100_000] == []


def test_each_picture_is_shown() -> None:
    pages = "\n".join((ROOT / page).read_text("utf-8") for page in PAGES)
    assert [path.name for path in DOCS.glob("images/*") if f"images/{path.name})" not in pages] == []


def test_tutorials_become_notebooks() -> None:
    pytest.importorskip("jupytext", reason="needs the extra docs")
    notebook = runpy.run_path(str(DOCS / "notebooks.py"))["notebook"]
    for page in DOCS.glob("tutorials/*.md"):
        cells = json.loads(notebook(page.read_text("utf-8")))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        assert code == [block.rstrip("\n") for block in python_blocks(page)]
        assert "Output" not in "".join(line for cell in cells for line in cell["source"])


def test_every_public_name_is_in_the_reference() -> None:
    names = [name for page in DOCS.glob("reference/*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    documented = [pkgutil.resolve_name(name) for name in names]
    assert len(set(names)) == len(names)
    assert [name for name, value in public().items() if not any(value is other for other in documented)] == []


def public() -> dict[str, Any]:
    """What has a name in kpflow_dyn or in one of its public modules."""
    modules = {name: value for name in kp.__all__ if isinstance(value := getattr(kp, name), ModuleType)}
    found = {name: getattr(kp, name) for name in kp.__all__ if name not in modules}
    for home, module in modules.items():
        found |= {f"{home}.{name}": getattr(module, name) for name in names_of(module)}
    return found


def names_of(module: ModuleType) -> list[str]:
    own = (
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    )
    return getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]


def test_a_missing_name_would_be_noticed() -> None:
    assert {"eigs", "regularizers.trace", "tasks.MemoryPro", "learning_rules.bptt", "train.fit"} <= set(public())


@pytest.mark.parametrize("page", MAPS, ids=lambda page: page.name)
def test_the_maps_name_what_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    assert [name for name in re.findall(r"`((?:kp|kpflow_dyn)\.[\w.]+)[`(]", text) if not is_there(name)] == []
    found = [(place, names) for place, names in PLACE.findall(text) if "/" in place or place.endswith(".py")]
    assert [place for place, _ in found if path_of(place) is None] == []
    pairs = [(place, name) for place, names in found for name in re.findall(r"[`.](\w+)", names)]
    assert len(pairs) > 20 and [pair for pair in pairs if not holds(*pair)] == []


def is_there(name: str) -> bool:
    try:
        pkgutil.resolve_name(re.sub(r"^kp\.", "kpflow_dyn.", name))
    except (AttributeError, ImportError):
        return False
    return True


def path_of(place: str) -> Path | None:
    """A path as the maps write it: from the package, or from the root."""
    return next((base / place for base in (ROOT / "kpflow_dyn", ROOT) if (base / place).exists()), None)


def holds(place: str, name: str) -> bool:
    """Whether a file defines a name: a function, a class or a constant, at the top or in a class."""
    path = path_of(place)
    return path is not None and bool(re.search(rf"^ *((def|class) {name}\b|{name}(:.*)? = )", path.read_text(), re.M))


def test_what_is_gone_would_be_noticed() -> None:
    assert is_there("kp.solvers.Dense") and not is_there("kp.solvers.Sparse") and not is_there("kp.nonsense")
    assert holds("_solve.py", "solve") and not holds("_solve.py", "solv") and not holds("_solves.py", "solve")


def test_the_map_has_every_layer() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    parts = set(re.findall(r"\w+", " ".join(contract["layers"])))
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", MAPS[0].read_text("utf-8"), re.M)
    assert sorted(rows) == sorted(parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in DOCS.glob("images/theory_*.png")))
def test_figures_are_drawn_and_small(name: str) -> None:
    drawn = runpy.run_path(str(DOCS / "figures.py"))["DRAWN"]
    assert drawn[name.removeprefix("theory_")](None).axes
    assert DOCS.joinpath("images", f"{name}.png").stat().st_size < 100_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.mark.slow
@needs_chromium
def test_the_search_finds_users_words(site: Path) -> None:
    """The page that answers a word is among the first three that the search shows."""
    handler, found = partial(Quiet, directory=str(site)), {}
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, window(1280) as (tab, _):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab.context.set_offline(False)
        for word in SOUGHT:
            tab.goto(f"http://127.0.0.1:{server.server_port}/index.html?q={quote(word)}")
            tab.wait_for_selector(".md-search-result__item")
            items = "[...document.querySelectorAll('.md-search-result__item')].slice(0, 3)"
            paths = tab.evaluate(f"{items}.map((one) => new URL(one.querySelector('a').href).pathname)")
            found[word] = [Path(path).stem for path in paths]
        server.shutdown()
    assert {word: pages for word, pages in found.items() if SOUGHT[word] not in pages} == {}


@pytest.mark.slow
def test_equations_of_docstrings_are_plain_text(site: Path) -> None:
    page = site.joinpath("reference", "numbers.html").read_text("utf-8")
    for text in ("A = J J* with fewer parameters", "G = J*J on the parameters", "&lt;q, A q&gt; / &lt;q, q&gt;"):
        assert text in page


@pytest.mark.slow
def test_adjoints_are_no_emphasis(site: Path) -> None:
    theory, scaling = (site.joinpath(name).read_text("utf-8") for name in ("theory.html", "scaling.html"))
    assert "h NTK" in theory and "J* = " in theory and "<em>" not in theory
    assert "<strong>ntk.mv</strong>" in scaling and "<em>linearize, flops</em>" in scaling


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_pages_need_no_network_and_fit(site: Path, width: int) -> None:
    """No request but for files, nothing on the console, and no page that is wider than its window."""
    with window(width) as (tab, complaints):
        for page in sorted(set(site.rglob("*.html")) - {site / "404.html"}):  # that one is for a server's root
            tab.goto(page.as_uri())
            if tab.evaluate("document.documentElement.scrollWidth") > width:
                complaints.append(f"{page.name} is wider than {width}")
    assert complaints == []
