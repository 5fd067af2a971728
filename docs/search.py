"""The words of `words.md` lead the search to the sections that they name; `mkdocs.yml` names this file as a hook."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROW = re.compile(r"^\| (.+?) \| (.+) \|$", re.MULTILINE)
PLACE = re.compile(r"\]\(([\w/]+)\.md(#[\w-]+)?\)")


def words_of(page: str) -> dict[str, list[str]]:
    """The words of a page of words, by the place in the site that their row links to."""
    found = defaultdict(list)
    for words, see in ROW.findall(page):
        for path, anchor in PLACE.findall(see):
            found[f"{path}.html{anchor}"] += words.split(", ")
    return dict(found)


@event_priority(-100)  # after the plugin that writes the index
def on_post_build(config: Any) -> None:
    """Called by mkdocs: its search finds tags before titles and texts."""
    path = Path(config.site_dir, "search", "search_index.json")
    words = words_of(Path(config.docs_dir, "words.md").read_text("utf-8"))
    index = json.loads(path.read_text("utf-8"))
    for entry in index["docs"]:
        entry["tags"] = words.pop(entry["location"], [])
    if words:
        raise ValueError(f"words.md names places that are not there: {', '.join(words)}")
    path.write_text(json.dumps(index, separators=(",", ":")), "utf-8")
