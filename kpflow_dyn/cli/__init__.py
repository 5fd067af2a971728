"""The command line."""

from kpflow_dyn.cli._app import app

__all__ = ["app"]
