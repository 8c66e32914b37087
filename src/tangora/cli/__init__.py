"""The command line."""

from tangora.cli.commands import app, main

__all__ = ["app", "main"]
