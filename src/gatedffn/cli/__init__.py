"""The command `gatedffn`: one file a sub-command, heavy imports inside them."""

import io
import sys


def main() -> None:
    """Runs the command; without the packages it needs it says how to install them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without our signs shows question marks rather than an error.
            stream.reconfigure(errors="replace")
    try:
        from gatedffn.cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.stderr.write(f"gatedffn: no {error.name} here: pip install 'gatedffn[cli]'\n")
        sys.exit(2)
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)
