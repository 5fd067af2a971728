"""The plan of the package: what may import what, where frameworks are told apart, and how large things are."""

import ast
import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kpflow_dyn"
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
CONTRACT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]

BACKENDS = ("_arrays", "_backend", "_torch", "_jax")
OF_A_FRAMEWORK = {  # modules that define models of one framework, or read its files
    *(
        "_checkpoint.arrays",
        "_checkpoint.cells",
        "_checkpoint.keras",
        "_checkpoint.loading",
        "_checkpoint.modules",
        "_checkpoint.names",
    ),
    *("_checkpoint.networks", "_checkpoint.nonlinearity", "_checkpoint.objects", "_checkpoint.trees"),
    *("models._convert", "models._jax_hybrid", "models._torch_hybrid", "models._torch_models", "models.jax"),
    *("models._jax_discrete", "models._mjx", "models._motornet", "models._torch_discrete"),
    *("gym._jax_policy", "gym._networks", "gym._torch_policy"),
}
FRAMEWORKS = re.compile(r"\b(is_torch_array|is_jax_array|is_torch_module)\b|sys\.modules(\[|\.get\()\"(torch|jax)")
LINES = 150
MODULES = 12


def imports_of(name: str) -> set[tuple[str, str]]:
    """The modules that one imports, in functions and for type checkers too, each with the function it is in."""
    found = set()

    def visit(node: ast.AST, function: str) -> None:
        function = node.name if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.Import):
            found.update((alias.name, function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update((f"{node.module}.{alias.name}", function) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(TREES[name], "")
    return found


def module_of(imported: str) -> str:
    """The module of the package that an import reaches, "" for those of other packages."""
    while imported and imported not in FILES:
        imported = imported.rpartition(".")[0]
    return imported


def is_drawing(imported: str, function: str) -> bool:
    return function == "plot" and re.fullmatch(r"kpflow_dyn\.figures\._\w+", imported) is not None


GRAPH = {
    name: {module_of(to) for to, function in imports_of(name) if not is_drawing(to, function)} - {"", name}
    for name in FILES
}


def part(module: str) -> str:
    """The folder or file at the top of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def short(module: str) -> str:
    return module.removeprefix("kpflow_dyn.")


def layers() -> dict[str, int]:
    """The height of each part."""
    return {
        name.strip(" ()"): -depth for depth, layer in enumerate(CONTRACT["layers"]) for name in re.split(r"[|:]", layer)
    }


def test_modules_import_each_other_in_no_circle() -> None:
    assert_no_circle(GRAPH)


def test_folders_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name in FILES:
        graph.setdefault(part(name), set()).update({part(to) for to in GRAPH[name]} - {part(name), "kpflow_dyn"})
    assert_no_circle(graph)


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_each_layer_imports_only_those_below() -> None:
    height = layers()
    upwards = [
        f"{name} -> {to}"
        for name in FILES
        for to in GRAPH[name]
        if "kpflow_dyn" not in (name, to) and height[part(to)] > height[part(name)]
    ]
    assert not upwards


def test_results_import_figures_in_one_form() -> None:
    """`from kpflow_dyn.figures import _x as figures`, in `plot` alone, below the layer of the figures."""
    height = layers()
    others = [
        f"{name}.{function}: {to}"
        for name in FILES
        for to, function in imports_of(name)
        if to.startswith("kpflow_dyn.figures") and height.get(part(name), 0) < height["figures"]
        if not is_drawing(to, function)
    ]
    assert not others


def asks(name: str) -> bool:
    """Whether a module tells frameworks apart, or imports one; docstrings do not count."""
    imported = {to.partition(".")[0] for to, _ in imports_of(name)}
    return bool({"torch", "jax"} & imported or FRAMEWORKS.search(ast.unparse(WithoutDocstrings().visit(TREES[name]))))


class WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Pass() if is_text else node


def test_frameworks_are_told_apart_in_one_place() -> None:
    neutral = {short(name): name for name in FILES if part(name) not in BACKENDS}
    assert {name for name, whole in neutral.items() if name not in OF_A_FRAMEWORK and asks(whole)} == set()


def test_no_class_is_long() -> None:
    lengths = {
        f"{short(name)}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert not {name: length for name, length in lengths.items() if length > LINES}


def test_the_top_folder_is_read_at_a_glance() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MODULES
