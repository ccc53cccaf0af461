"""The command group ``lcguard registry``: a deployment's guards, and which of them is live."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from lcguard.guards.registry import Registry, RegistryState

registry_app = typer.Typer(no_args_is_help=True, help="Guards by version, and which is live.")
STATE = Path(".lcguard")
Root = Annotated[
    Path | None, typer.Option("--registry", help="Its folder; `guards` in --dir by default.")
]
State = Annotated[Path, typer.Option("--dir", help="State folder of the server: key, leakage.")]
Why = Annotated[str, typer.Option("--why", help="For the record.")]
Name = Annotated[str, typer.Argument(help="From registry list.")]


def open_registry(root: Path | None, state: Path, make_key: bool = False) -> Registry:
    """The registry of a deployment, with its key: ``LCGUARD_KEY``, or that of the state folder.

    Raises ``ValueError`` where there is none, unless it is to be made.
    """
    from lcguard.commands.serve import state_key
    from lcguard.guards.registry import Registry

    if make_key and "LCGUARD_KEY" not in os.environ:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Registry(root or state / "guards", state_key(state, make=make_key))


@registry_app.command("list")
def list_versions(registry: Root = None, state: State = STATE) -> None:
    """Versions with their digests, where they come from and how they were judged."""
    Console().print(version_table(open_registry(registry, state).state))


@registry_app.command("add")
def add(
    guard: Annotated[str, typer.Argument(help="Folder, or MODEL:NAME.")],
    accept: Annotated[str, typer.Option(help="Why it may be promoted though no round judged it.")],
    registry: Root = None,
    state: State = STATE,
) -> None:
    """Take a guard in on your own word; a round's candidate comes in by itself."""
    from lcguard.guards.registry import Judgement
    from lcguard.guards.shipped import guard_folder

    opened = open_registry(registry, state, make_key=True)
    judgement = Judgement(accepted=True, reason=f"by hand: {accept}")
    typer.echo(opened.add(Path(guard_folder(guard)), judgement).name)


@registry_app.command("promote")
def promote(
    version: Name, why: Why = "by hand", registry: Root = None, state: State = STATE
) -> None:
    """Make a version live; running servers take it over by themselves."""
    open_registry(registry, state).promote(version, why)
    typer.echo(f"{version} is live")


@registry_app.command("rollback")
def rollback(why: Why = "by hand", registry: Root = None, state: State = STATE) -> None:
    """Withdraw the live version, and go back to the one before."""
    typer.echo(f"{open_registry(registry, state).rollback(why).name} is live")


@registry_app.command("verify")
def verify(registry: Root = None, state: State = STATE) -> None:
    """Hold every version against what was signed; exit 1 where something was altered."""
    opened = open_registry(registry, state)
    found = opened.state
    wrong = opened.verify()
    for line in wrong:
        typer.echo(line, err=True)
    if wrong:
        raise typer.Exit(1)
    typer.echo(
        f"{len(found.versions)} versions as they were signed, live {found.live or 'none'}, "
        f"change {found.serial}"
    )


def version_table(state: RegistryState) -> Table:
    """One line a version, and what happened to it last."""
    table = Table("version", "state", "digest", "from", "judged", "since")
    last = {e.version: e for e in state.events}
    for v in state.versions:
        parent = state.of_digest(v.parent)
        table.add_row(
            v.name,
            state.standing(v),
            v.digest[:12],
            parent.name if parent else v.parent[:12] or "-",
            v.withdrawn or v.judgement.reason,
            last[v.name].at,
        )
    return table
