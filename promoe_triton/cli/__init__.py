"""The command line, `promoe-triton`."""

from promoe_triton.cli.commands import app, main

__all__ = ["app", "main"]
