"""The page that one looks at: one HTML file of an analysis, a track, a comparison or a sweep, without other files.

    write_report(dataset, "page.html")        # in the shell: kpflow-dyn report PATH

Figures are interactive, by plotly; the page is light or dark as the reader's system is, or as a button says.
"""

from kpflow_dyn._shown import with_error
from kpflow_dyn.report._numbers import settings, summarize, versions
from kpflow_dyn.report._page import Page, Table
from kpflow_dyn.report._pages import page_of
from kpflow_dyn.report._sources import read_results, write_report

__all__ = ["Page", "Table", "page_of", "read_results", "settings", "summarize", "versions", "with_error"]
__all__ += ["write_report"]
