"""``lcguard models``: the models that go by a name, and making their folders."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lcguard.agents.models import NAMED
from lcguard.nearest import unknown

models_app = typer.Typer(no_args_is_help=True, help="Models that go by a name of ours.")


@models_app.command("list")
def list_models() -> None:
    """Names, what they stand for, and where their folders are."""
    table = Table("name", "model", "state", "folder")
    for model in NAMED.values():
        state = "ready" if model.ready() else "lcguard models prepare " + model.name
        table.add_row(model.name, model.what, state, str(model.folder()))
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


@models_app.command("prepare")
def prepare(name: Annotated[str, typer.Argument(help="A name of `lcguard models list`.")]) -> None:
    """Make a model's folder in the cache, where it is not there already; prints it."""
    if name not in NAMED:
        raise ValueError(unknown("model", name, NAMED))
    errors = Console(stderr=True)
    folder = NAMED[name].prepare(lambda text: errors.print(text, highlight=False, markup=False))
    typer.echo(folder)
