"""What every command and script has: the line it was called with, and how it ends on an error of
the user's making: in one line, with a non-zero exit."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


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


def script_parser(
    doc: str | None, **options: float | str | tuple[float | str, str]
) -> argparse.ArgumentParser:
    """A script's arguments, described by the first line of its docstring: ``--out`` for its report,
    and one for each of ``options``: its default, or that with a help text."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    for name, given in options.items():
        default, text = given if isinstance(given, tuple) else (given, None)
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default, help=text)
    parser.add_argument("--out", type=Path, help="where the report is written, as JSON")
    return parser


def write_report(
    args: argparse.Namespace, title: str, command: str, found: Mapping[str, Any]
) -> None:
    """What a script found, with what it ran on, to ``args.out`` where that is given."""
    from lcguard.evaluation.manifest import run_manifest  # with torch, which not all scripts need

    if args.out is not None:
        seeds = [args.seed] if "seed" in args else []
        run = run_manifest(command, seeds, vars(args) | {"out": None})
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"title": title, **found, **run}, indent=1) + "\n")
