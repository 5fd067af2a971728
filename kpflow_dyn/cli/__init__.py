"""The command line."""

from kpflow_dyn.cli.app import app

__all__ = ["app"]
