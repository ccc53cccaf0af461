"""The command group ``lcguard loop``: from a leak to a retrained guard, step by step or at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lcguard.commands.registry import STATE, Root, State, open_registry
from lcguard.commands.script import command_line, existing, resumable
from lcguard.tracking import Tracker

if TYPE_CHECKING:
    from lcguard.commands.loop_config import LoopConfig

loop_app = typer.Typer(help="From a leak that canaries found to a retrained guard.")
Out = Annotated[Path, typer.Option("--out", help="The round's folder; resumed if it exists.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML; see lcguard loop config.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override, such as limit=0.1.")]
Where = Annotated[
    str | None,
    typer.Option("--database", help="What the canaries found; the database of --dir by default."),
]
Policy = Annotated[
    Path | None, typer.Option(help="The proxy's policy; policy.yaml of --dir if it is there.")
]
Data = Annotated[Path | None, typer.Option(help="New labelled records, as JSONL.")]
Mlflow = Annotated[
    str | None,
    typer.Option(
        "--mlflow",
        envvar="LCGUARD_MLFLOW",
        metavar="URI",
        help="MLflow server that gets a copy of configuration and figures.",
    ),
]
ROUND = Path("runs/round")


@loop_app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    demo: Annotated[
        bool,
        typer.Option("--demo", help="A leak, its repair and two attempts to undo it, on nano."),
    ] = False,
    out: Out = Path("runs/loop"),
) -> None:
    """From a leak that canaries found to a retrained guard."""
    if context.invoked_subcommand is not None:
        return
    if not demo:
        typer.echo(context.get_help())
        raise typer.Exit
    from lcguard.commands.loop_demo import DemoConfig, summary_table
    from lcguard.commands.loop_demo import demo as run

    console = Console(stderr=True)
    with resumable(command_line()):
        log = run(DemoConfig(), out, _say(console))
    Console(width=160).print(summary_table(log))
    console.print(f"log: {log.path}", markup=False)


@loop_app.command("config")
def show_config(config: Config = None, sets: Sets = None) -> None:
    """Print all options with their values."""
    from lcguard.config import dump_config

    typer.echo(dump_config(_load(config, sets)), nl=False)


@loop_app.command("init")
def init(
    guard: Annotated[str, typer.Argument(help="The guard that is served today.")],
    accept: Annotated[
        str, typer.Option(help="Why it is taken though nothing on its card speaks for it.")
    ] = "",
    registry: Root = None,
    state: State = STATE,
) -> None:
    """Make a registry of the guard that is served today."""
    from lcguard.commands.loop_round import begin

    opened = open_registry(registry, state, make_key=True)
    version = begin(opened, guard, accept)
    typer.echo(f"{version.name} is live: serve it with --set engine.guards.NAME={opened.folder}")


@loop_app.command("collect")
def collect(
    out: Out = ROUND,
    database: Where = None,
    policy: Policy = None,
    data: Data = None,
    registry: Root = None,
    state: State = STATE,
    config: Config = None,
    sets: Sets = None,
) -> None:
    """Read what canaries found, and make the records to learn it from."""
    from lcguard.commands.loop_collect import collect as run

    leak = run(
        _load(config, sets),
        open_registry(registry, state),
        out,
        database=_database(state, database),
        policy=_in(state, policy, "policy.yaml"),
        data=existing(data),
        say=_say(Console(stderr=True)),
    )
    what = f"{leak.version} leaks {', '.join(leak.categories)}" if leak.edges else "no leak"
    typer.echo(f"{what}; {leak.hard_records} records to learn from")


@loop_app.command("train")
def train(
    out: Out = ROUND,
    registry: Root = None,
    state: State = STATE,
    config: Config = None,
    sets: Sets = None,
    mlflow: Mlflow = None,
) -> None:
    """Train a candidate on from the live guard."""
    from lcguard.commands.loop_train import train as run

    opened, say = open_registry(registry, state), _say(Console(stderr=True))
    tracker = Tracker.open(mlflow)
    with resumable(command_line()):
        trained = run(_load(config, sets), opened, out, command_line(), say=say, tracker=tracker)
    typer.echo(f"{out}/candidate/guard" if trained else "nothing to learn")


@loop_app.command("judge")
def judge(
    out: Out = ROUND,
    guard: Annotated[Path | None, typer.Option(help="Another one than the candidate.")] = None,
    registry: Root = None,
    state: State = STATE,
    config: Config = None,
    sets: Sets = None,
    mlflow: Mlflow = None,
) -> None:
    """Measure the candidate with fresh attackers; exit 3 where it is refused."""
    from lcguard.commands.loop_collect import LEAK, read_leak
    from lcguard.commands.loop_judge import judge as run

    if guard is None and (out / LEAK).exists() and not read_leak(out).needed:
        typer.echo("nothing to judge")
        return
    opened, say = open_registry(registry, state), _say(Console(stderr=True))
    plan, tracker = _load(config, sets), Tracker.open(mlflow)
    with resumable(command_line()):
        found = run(plan, opened, out, command_line(), guard=guard, say=say, tracker=tracker)
    word = "accepted" if found.judgement.accepted else "refused"
    typer.echo(f"{word}: {found.judgement.reason}")
    if not found.judgement.accepted:
        raise typer.Exit(3)


@loop_app.command("promote")
def promote(out: Out = ROUND, registry: Root = None, state: State = STATE) -> None:
    """Take what was judged into the registry, and make it live where it was accepted."""
    from lcguard.commands.loop_collect import LEAK, read_leak
    from lcguard.commands.loop_judge import promote as run

    if (out / LEAK).exists() and not read_leak(out).needed:
        typer.echo("nothing to promote")
        return
    opened = open_registry(registry, state)
    name = run(opened, out)
    typer.echo(f"{name or 'nothing'} was taken in, {opened.state.live or 'nothing'} is live")


@loop_app.command("run")
def run_all(
    out: Out = ROUND,
    database: Where = None,
    policy: Policy = None,
    data: Data = None,
    registry: Root = None,
    state: State = STATE,
    config: Config = None,
    sets: Sets = None,
    mlflow: Mlflow = None,
) -> None:
    """All four steps; exit 3 where the candidate is refused."""
    from lcguard.commands.loop_round import LOG, LoopLog, run_round

    say = _say(Console(stderr=True))
    opened, tracker = open_registry(registry, state), Tracker.open(mlflow)
    with resumable(command_line()):
        ended = run_round(
            _load(config, sets),
            opened,
            out,
            LoopLog(out / LOG, typer.echo),
            command_line(),
            database=_database(state, database),
            policy=_in(state, policy, "policy.yaml"),
            data=existing(data),
            say=say,
            tracker=tracker,
        )
    if ended == "kept":
        raise typer.Exit(3)


@loop_app.command("watch")
def watch(
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 5.0,
    once: Annotated[
        bool, typer.Option("--once", help="One look; exit 3 where it rolls back.")
    ] = False,
    database: Where = None,
    registry: Root = None,
    state: State = STATE,
    config: Config = None,
    sets: Sets = None,
) -> None:
    """Roll back by itself where canaries show that the live guard leaks."""
    from lcguard.commands.loop_watch import Watched, watch_once
    from lcguard.commands.loop_watch import watch as run

    opened, limit = open_registry(registry, state), _load(config, sets).limit
    path = _database(state, database)
    if path is None:
        raise ValueError(f"{state} has no database: give --database, or --dir of the proxy's state")

    def tell(found: Watched) -> None:
        typer.echo(f"{found.action}: {found.version} is live; {found.why}")

    if not once:
        with resumable(command_line()):
            run(opened, path, limit, every, tell)
    found = watch_once(opened, path, limit)
    tell(found)
    if found.action != "none":
        raise typer.Exit(3)


@loop_app.command("shadow")
def shadow(
    guard: Annotated[Path, typer.Argument(help="Folder of the candidate.")],
    out: Annotated[Path, typer.Option("--out", help="Where shadow.json goes.")] = Path(
        "runs/shadow"
    ),
    registry: Root = None,
    state: State = STATE,
    config: Config = None,
    sets: Sets = None,
) -> None:
    """Guard planted records with a candidate beside the live guard, and compare."""
    from lcguard.agents.backends.hf import load_backend
    from lcguard.commands.loop_shadow import shadow as run
    from lcguard.guards.frozen import FrozenGuard

    opened, found = open_registry(registry, state), _load(config, sets)
    backend = load_backend(found.model)
    candidate = FrozenGuard.from_pretrained(
        guard, model_digest=backend.digest, shape=backend.source.shape
    )
    live = opened.load(opened.state.live_version)
    for line in run(found, backend, live, candidate, out).lines():
        typer.echo(line)


def _load(config: Path | None, sets: list[str] | None) -> LoopConfig:
    from lcguard.commands.loop_config import load_loop

    return load_loop(config, sets or [])


def _database(state: Path, given: str | None) -> str | None:
    """What is given, or the one that the proxy of this state folder has, if it is there."""
    from lcguard.commands.serve import load_settings
    from lcguard.server.database.place import is_server

    if given is not None or not state.is_dir():
        return given
    own = load_settings(state, None, [], None).database
    return own if is_server(own) or Path(own).exists() else None


def _in(state: Path, given: Path | None, name: str) -> Path | None:
    """What was given, or the file of that name in the state folder, if it is there."""
    if given is not None:
        return existing(given)
    return state / name if (state / name).exists() else None


def _say(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
