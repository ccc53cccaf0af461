"""A bar for people, plain lines for CI."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress(
    console: Console, total: int
) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """Ways to say a line and to say how many units are done: a bar on a terminal, none in CI."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if not console.is_terminal or os.environ.get("CI"):
        yield say, lambda units: None
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("units"),
        TimeElapsedColumn(),
    )
    # No thread and no redirection: attacks run in forked children, which would inherit its locks.
    with Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task("units", total=total)
        yield say, lambda units: bar.update(task, completed=units, refresh=True)
