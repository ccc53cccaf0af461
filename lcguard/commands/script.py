"""What every command and script has: the line it was called with, and how it ends on an error of
the user's making: in one line, with a non-zero exit."""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def command_line() -> str:
    """As typed, for what a run writes about itself."""
    return shlex.join(["lcguard", *sys.argv[1:]])


def one_line(error: Exception) -> str:
    """What is said of an error of the user's making, or of the machine's."""
    full = isinstance(error, OSError) and error.errno in _FULL
    text = " ".join(str(error).split())
    if not full:
        return text
    return f"{text}: make room and run the same command again; what was done is kept"


_STOPPED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def resumable(again: str) -> Iterator[None]:
    """Ctrl-C within it ends in one line that says how to go on, and exit code 130; a process of it
    that was killed, as Linux does where memory is full, in another and exit code 1."""
    owner, asked = os.getpid(), False

    def stop(sig: int, frame: Any) -> None:
        nonlocal asked
        if os.getpid() != owner:
            os._exit(_STOPPED)  # a forked fit: its parent says it
        asked = True
        for child in multiprocessing.active_children():
            child.terminate()  # or the end of its fit would be waited for
        raise KeyboardInterrupt

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        # In a callback of a fork, for one, Python drops what a signal's handler raises: raised once
        # more, when this, where it would be dropped too, is over.
        if isinstance(found.exc_value, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        else:
            hook(found)

    before = {sig: signal.signal(sig, stop) for sig in (signal.SIGINT, signal.SIGALRM)}
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        yield
    except (KeyboardInterrupt, BrokenProcessPool) as error:
        if asked or isinstance(error, KeyboardInterrupt):
            print(f"\nlcguard: stopped; resume with: {again}", file=sys.stderr, flush=True)
            sys.exit(_STOPPED)
        print(
            "lcguard: a process of this run was killed, most likely because memory was full; what "
            f"was done is kept; resume with: {again}",
            file=sys.stderr,
        )
        sys.exit(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for sig, handler in before.items():
            signal.signal(sig, handler)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Around a whole command: one that ``resumable`` stopped ends here. What it had open is closed
    by then; taking libraries apart, as Python would, takes seconds that somebody waits for."""
    try:
        yield
    except SystemExit as ended:
        if ended.code != _STOPPED:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_STOPPED)


def existing(data: Path | None) -> Path | None:
    """What ``--data`` names, also for a source that would not look at it.

    Raises ``ValueError`` where it does not exist: whoever gave it meant it.
    """
    if data is not None and not data.exists():
        raise ValueError(f"--data {data} does not exist: give a folder or file, or leave it out")
    return data


def run_script(main: Callable[[Sequence[str] | None], int]) -> None:
    """Calls ``main`` with the command line and exits with what it returns."""
    try:
        sys.exit(main(None))
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
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
        seeds = [args.seed] if "seed" in args else list(range(getattr(args, "seeds", 0)))
        run = run_manifest(command, seeds, vars(args) | {"out": None})
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"title": title, **found, **run}, indent=1) + "\n")
