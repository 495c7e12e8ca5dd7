"""The command `gatedffn`: one file a sub-command, heavy imports inside them."""

from gatedffn.cli.app import main

__all__ = ["main"]
