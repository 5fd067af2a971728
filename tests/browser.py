"""A headless Chromium without a network, for pages on disk; tests that need it are skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HERE = ("file:", "blob:", "data:")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


@contextmanager
def window(width: int, look: str = "light") -> Iterator[tuple[Page, list[str]]]:
    """An empty tab of this width, a telephone's where it is narrow, and what the browser complains of."""
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        phone = {"is_mobile": True, "has_touch": True} if width < 600 else {}
        size = {"width": width, "height": 800}
        context = browser.new_context(viewport=size, color_scheme=look, offline=True, **phone)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda request: None if request.url.startswith(HERE) else complaints.append(request.url))
        yield tab, complaints
        browser.close()


@contextmanager
def opened(page: Path, width: int, look: str = "light") -> Iterator[tuple[Page, list[str]]]:
    """A page with plots in such a window."""
    with window(width, look) as (tab, complaints):
        tab.goto(page.as_uri())
        tab.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
        yield tab, complaints
