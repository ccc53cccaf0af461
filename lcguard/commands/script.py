"""What every command and script has: the line it was called with, and how it ends on an error of
the user's making: in one line, with a non-zero exit."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def command_line() -> str:
    """As typed, for what a run writes about itself."""
    return shlex.join(["lcguard", *sys.argv[1:]])


def run_script(main: Callable[[Sequence[str] | None], int]) -> None:
    """Calls ``main`` with the command line and exits with what it returns."""
    try:
        sys.exit(main(None))
    except (ValueError, FileNotFoundError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
