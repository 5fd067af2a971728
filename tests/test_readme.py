"""What the README shows must run as it stands."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from code_blocks import ROOT, python_blocks, run

import kpflow_dyn as kp

README = ROOT / "README.md"


def test_the_twelve_lines(capsys):
    (block,) = python_blocks(README)
    run(block)
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"```text\n(.*?)```", README.read_text(), re.DOTALL)
    for line in filter(None, shown.splitlines()):
        assert _words(line) in _words(printed), line


def _words(text: str) -> str:
    """Without numbers, whose last digits differ from machine to machine."""
    return " ".join(re.sub(r"[-+±]? ?\d[\d.,e+-]*", "#", text).split())


CALL = re.compile(r"`(kp\.[\w.]+(?:\(.*?\))?)`")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_calls_in_tables_fit_the_functions(page: str) -> None:
    """Each name is there, and takes what it is given; `...` in parentheses stands for more."""
    rows = [line for line in (ROOT / page).read_text("utf-8").splitlines() if line.startswith("|")]
    calls = [ast.parse(text, mode="eval").body for row in rows for text in CALL.findall(row)]
    assert len(calls) > 15
    for call in calls:
        named = call.func if isinstance(call, ast.Call) else call
        function = eval(ast.unparse(named), {"kp": kp})
        if isinstance(call, ast.Call):
            given = [argument for argument in call.args if ast.unparse(argument) != "..."]
            signature = inspect.signature(function)
            bind = signature.bind if len(given) == len(call.args) else signature.bind_partial
            bind(*given, **{str(keyword.arg): keyword.value for keyword in call.keywords})


def test_it_is_read_in_three_minutes():
    assert len(README.read_text().splitlines()) <= 150
