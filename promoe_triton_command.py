"""The entry point `promoe-triton`. Outside the package, so that Ctrl-C is answered while that is imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exit with 130 where it is interrupted, even during the seconds its imports take."""
    try:
        from promoe_triton.cli import main as run

        run()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
