"""Each tutorial as a notebook beside its page; `mkdocs.yml` names this file as a hook."""

from __future__ import annotations

import re
from typing import Any

import jupytext
from mkdocs.structure.files import File

SHOWN = re.compile(r'```text title="Output"\n.*?```\n|!\[[^]]*\]\([^)]*\)\n', re.DOTALL)
"""What a page shows of a run; a notebook shows its own."""
LINK = re.compile(r"\[([^]]+)\]\((?!https?:)[^)]*\)")
"""Links to other pages, which are not there beside a notebook."""


def notebook(page: str) -> str:
    """The JSON of a notebook with the text and the code of a page."""
    commands = page.replace("```sh\n", "```\n")  # text of a notebook, no cells
    pieces = re.split(r"(```.*?```)", SHOWN.sub("", commands), flags=re.DOTALL)
    pieces[::2] = [LINK.sub(r"\1", text) for text in pieces[::2]]  # between blocks of code
    return jupytext.writes(jupytext.reads("".join(pieces), "md"), "ipynb")


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs."""
    for page in [file for file in files if file.src_uri.startswith("tutorials/") and file.src_uri.endswith(".md")]:
        uri = page.src_uri.removesuffix(".md") + ".ipynb"
        files.append(File.generated(config, uri, content=notebook(page.content_string)))
    return files
