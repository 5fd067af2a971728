import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OF_PAGES = [
    f"report/{name}"
    for name in (
        "page.html.jinja",
        "page.css",
        "page.js",
        "rows.js",
        "vendored/plotly-cartesian.min.js",
        "vendored/LICENSE",
    )
]


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_is_light():
    heavy = ["torch", "jax", "matplotlib", "neurogym", "optax", "safetensors"]
    code = (
        "import sys, kpflow_dyn as kp; kp.models, kp.solvers, kp.tasks, kp.train, kp.Recorder\n"
        "kp.tasks.make_task('memorypro', trials=2)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert run("-c", code).strip() == "[]"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names in the wheel and in the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-d", str(folder))
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened, tarfile.open(archive) as source:
        return opened.namelist(), [name.partition("/")[2] for name in source.getnames()]


def test_the_wheel_holds_the_package_and_nothing_else(built):
    wheel, _ = built
    assert {re.sub(r"-.*\.", ".", name.split("/")[0]) for name in wheel} == {"kpflow_dyn", "kpflow_dyn.dist-info"}
    assert len(wheel) == len(set(wheel))
    for name in ("py.typed", "data/demo.safetensors", "models/_torch_models.py", "solvers/__init__.py", *OF_PAGES):
        assert f"kpflow_dyn/{name}" in wheel
    for name in ("LICENSE", "kpflow_dyn/report/vendored/LICENSE"):
        assert any(path.endswith(f"licenses/{name}") for path in wheel)


def test_the_source_archive_holds_each_file_once(built):
    _, source = built
    assert not [name for name in source if name.split("/")[0] in ("models", "solvers")]
    pages = [f"kpflow_dyn/{name}" for name in OF_PAGES]
    for name in ("kpflow_dyn/data/demo.safetensors", "tests/test_packaging.py", "LICENSE", "constraints.txt", *pages):
        assert name in source


@pytest.mark.parametrize("folder", ["models", "solvers"])
def test_root_links_lead_into_the_package(folder):
    if not (ROOT / ".git").exists() and not (ROOT / folder).exists():
        pytest.skip("a source archive has no links")
    assert (ROOT / folder).readlink() == Path("kpflow_dyn", folder)
    assert (ROOT / folder / "__init__.py").is_file()


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name.lower(): requirement for requirement in requirements}


def test_constraints_cover_every_direct_dependency():
    extras = [texts for name, texts in EXTRAS.items() if name != "zoo"]  # which has constraints of its own
    direct = [Requirement(text) for text in chain(PROJECT["dependencies"], *extras)]
    assert {requirement.name.lower() for requirement in direct} - {"kpflow-dyn"} <= set(constraints())


@pytest.mark.parametrize(
    ("name", "admitted", "refused"),
    [
        ("torch", ["2.11.0", "2.12.1", "2.13.0", "2.13.0+cpu"], ["2.10.0", "2.13.1", "2.14.0"]),
        ("jax", ["0.10.2", "0.11.0"], ["0.12"]),
    ],
)
def test_constraints_admit_the_supported_releases(name, admitted, refused):
    required = next(Requirement(text) for text in EXTRAS[name] if Requirement(text).name == name)
    both = required.specifier & constraints()[name].specifier
    assert list(both.filter(admitted + refused)) == admitted


def test_all_is_every_feature():
    (requirement,) = [Requirement(text) for text in EXTRAS["all"]]
    developers, large = {"all", "bench", "docs", "test", "lint", "zoo"}, {"arm", "dsa", "mujoco", "torchode"}
    assert requirement.extras == set(EXTRAS) - developers - large  # and those that pin old releases of other packages


def test_the_demo_network_is_small():
    assert (ROOT / "kpflow_dyn" / "data" / "demo.safetensors").stat().st_size < 500_000
