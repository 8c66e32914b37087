"""The command line."""

from tangora.cli import commands, pages  # noqa: F401  # they register themselves, in this order
from tangora.cli.app import app, main

__all__ = ["app", "main"]
