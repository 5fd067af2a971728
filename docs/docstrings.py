"""Text on the site: plain, with indented equations, in which A* is an adjoint and <a, b> an inner product.

`mkdocs.yml` names this file twice, as a hook of mkdocs and as an extension of griffe, which reads the package.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Alias, Extension, GriffeLoader, Module, Object
from markdown import Extension as MarkdownExtension
from markdown import Markdown
from markdown.inlinepatterns import SimpleTagInlineProcessor
from mkdocs.plugins import event_priority

from kpflow_dyn import _HOME

EMPHASIS = {"strong": r"(?<!\w)(\*\*)(\w[^*]*)\*\*(?!\w)", "em": r"(?<![\w\\)}*])(\*)(\w[^*]*)\*(?!\w)"}  # no J* and P*
LEFT_OUT = ("em_strong", "em_strong2", "html", "entity", "mkdocs-autorefs")  # the last: [trial, time][unit]
DOCTEST = re.compile(r"^(>>> .+(?:\n.+)*)", re.MULTILINE)  # one that no heading stands above


class PlainText(MarkdownExtension):
    """Markdown without HTML and references by name, which equations in plain text would be taken for.

    Emphasis begins before a word and behind none, as an adjoint's * stands behind its operator.
    """

    def extendMarkdown(self, md: Markdown) -> None:
        """Leave these rules out, and add emphasis."""
        md.preprocessors.deregister("html_block")
        for rule in LEFT_OUT:
            md.inlinePatterns.deregister(rule, strict=False)
        for priority, (tag, pattern) in enumerate(EMPHASIS.items()):
            md.inlinePatterns.register(SimpleTagInlineProcessor(pattern, tag), tag, 60 - priority)


class Docstrings(Extension):
    """Names are shown as users write them, and doctests as code."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        """Give the package its public names, which it imports when they are first asked for."""
        if pkg.name == "kpflow_dyn":
            for name, home in _HOME.items():
                pkg.set_member(name, Alias(name, f"kpflow_dyn.{home}.{name}"))

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Turn "Example:" into the section that griffe knows, and fence a doctest that stands alone."""
        if obj.docstring:
            headed = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\1\n```", headed)


@event_priority(-100)  # after the plugins
def on_config(config: Any) -> Any:
    """Called by mkdocs."""
    config.markdown_extensions.append(PlainText())
    return config
