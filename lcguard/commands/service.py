"""The proxy's command groups: ``lcguard policy``, ``keys``, ``audit``, ``config`` and ``serve``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

Role = Literal["agent", "auditor", "admin"]
STATE = Path(".lcguard")
State = Annotated[Path, typer.Option("--dir", help="State folder of the server.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override, such as port=9000.")]
Config = Annotated[
    Path | None, typer.Option("--config", help="YAML; server.yaml of the state folder by default.")
]

Json = Annotated[bool, typer.Option("--json", help="For machines.")]

policy_app = typer.Typer(no_args_is_help=True, help="Check the YAML policy.")
keys_app = typer.Typer(no_args_is_help=True, help="Make, list and take back API keys.")
audit_app = typer.Typer(no_args_is_help=True, help="Check and read the audit.")
config_app = typer.Typer(no_args_is_help=True, help="Check the server's configuration.")


def serve(
    state: State = STATE,
    config: Config = None,
    upstream: Annotated[
        str | None, typer.Option(help="URL of a running vLLM with the connector.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name (lcguard models list), folder or repository.")
    ] = None,
    host: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option()] = None,
    sets: Sets = None,
) -> None:
    """Start vLLM and the proxy before it, or the proxy alone with --upstream."""
    from lcguard.commands.serve import load_settings
    from lcguard.commands.serve import serve as run

    options = {"engine.model": model, "host": host, "port": port}
    given = [f"{k}={v}" for k, v in options.items() if v is not None]
    settings = load_settings(state, config, [*(sets or []), *given], upstream)
    code = run(state, settings, Console(stderr=True))
    if code:
        raise typer.Exit(code)


def doctor(
    state: State = STATE, config: Config = None, sets: Sets = None, as_json: Json = False
) -> None:
    """Check installation, deployment and a running server; exit 1 where something fails."""
    from lcguard.commands.doctor import report

    console = Console(soft_wrap=True, highlight=False, markup=False)
    if not report(state, config, sets or [], as_json, console.print):
        raise typer.Exit(1)


@keys_app.command("new")
def keys_new(
    agents: Annotated[list[str], typer.Argument(help="Names of the agents, a key for each.")],
    state: State = STATE,
    tenant: Annotated[str, typer.Option()] = "default",
    role: Annotated[Role, typer.Option(help="Admins operate, auditors read.")] = "agent",
    expires: Annotated[
        datetime | None, typer.Option(help="UTC.", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])
    ] = None,
    models: Annotated[list[str] | None, typer.Option("--model", help="Only this model.")] = None,
    requests_per_min: Annotated[int | None, typer.Option()] = None,
    tokens_per_min: Annotated[int | None, typer.Option()] = None,
    concurrency: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Print a new key for each agent, as lines for a shell; it is stored as a hash alone."""
    from datetime import UTC

    from lcguard.commands.keys import new_key
    from lcguard.server.limits.key_limits import Limits

    limits = Limits(requests_per_min, tokens_per_min, concurrency)
    for agent in agents:
        text = new_key(
            state / "keys.yaml",
            agent,
            tenant,
            role,
            expires_at=expires.replace(tzinfo=UTC) if expires else None,
            models=models,
            limits=limits,
        )
        name = "".join(c if c.isalnum() else "_" for c in agent).upper()
        typer.echo(f"export {name}_KEY={text}")


@keys_app.command("list")
def keys_list(state: State = STATE) -> None:
    """Show whose keys there are."""
    from lcguard.commands.keys import key_table, listing

    Console().print(key_table(listing(state / "keys.yaml")))


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(help="From keys list.")], state: State = STATE
) -> None:
    """Take a key back; a running server refuses it within a second."""
    from lcguard.commands.keys import revoke

    found = revoke(state / "keys.yaml", key_id)
    typer.echo(f"revoked {found.id} of {found.tenant}/{found.agent}")


@config_app.command("check")
def config_check(state: State = STATE, config: Config = None, sets: Sets = None) -> None:
    """Check server.yaml, keys and policy as the server would."""
    from lcguard.commands.check_deployment import policy_report
    from lcguard.commands.serve import check_exposure, load_settings
    from lcguard.server.access.keyring import load_keys

    settings = load_settings(state, config, sets or [], None)
    check_exposure(settings)
    n = len(load_keys(settings.keys).keys)
    rules, advice = policy_report(settings)
    for line in advice:
        typer.echo(line, err=True)
    typer.echo(f"settings: good\nkeys: {n}\npolicy: {rules}")


@config_app.command("show")
def config_show(state: State = STATE, config: Config = None, sets: Sets = None) -> None:
    """Print all options with their values."""
    from lcguard.commands.serve import load_settings
    from lcguard.config import dump_config

    typer.echo(dump_config(load_settings(state, config, sets or [], None)), nl=False)


@config_app.command("reference")
def config_reference() -> None:
    """Print every option with its type, its default and what it does, in Markdown."""
    from lcguard.commands.config_reference import page

    typer.echo(page(), nl=False)


@audit_app.command("verify")
def audit_verify(
    state: State = STATE,
    head: Annotated[
        str | None, typer.Option(help="A head printed earlier: its row must still be there.")
    ] = None,
    at_least: Annotated[int | None, typer.Option(help="Rows that there were once.")] = None,
    config: Config = None,
) -> None:
    """Find altered or missing rows; exit 1 where there are any."""
    from lcguard.commands.audit import verify_command
    from lcguard.commands.serve import load_settings, state_key

    settings = load_settings(state, config, [], None)
    code = verify_command(
        settings.database, state_key(state, make=False), head, at_least, typer.echo
    )
    if code:
        raise typer.Exit(code)


@audit_app.command("show")
def audit_show(
    state: State = STATE,
    last: Annotated[int, typer.Option(help="How many rows.")] = 50,
    tenant: Annotated[str | None, typer.Option()] = None,
    event: Annotated[str | None, typer.Option()] = None,
    request_id: Annotated[str | None, typer.Option()] = None,
    handle: Annotated[str | None, typer.Option()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    config: Config = None,
) -> None:
    """Print the last rows, oldest first."""
    from lcguard.commands.audit import show_command
    from lcguard.commands.serve import load_settings

    show_command(
        load_settings(state, config, [], None).database,
        last=last,
        tenant=tenant,
        event=event,
        request_id=request_id,
        handle=handle,
        as_json=as_json,
        say=typer.echo,
    )


@policy_app.command("check")
def policy_check(
    path: Path,
    explain: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="SOURCE AUDIENCE", help="Say which edge decides this hop, and why."),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="API keys, to find edges of no agent; keys.yaml beside it by default."),
    ] = None,
) -> None:
    """Check a policy file; edges that can never match are warned of."""
    from lcguard.commands.policy import check_command

    check_command(path, explain, keys, typer.echo, lambda text: typer.echo(text, err=True))


@policy_app.command("schema")
def policy_schema() -> None:
    """Print the policy's JSON Schema."""
    from lcguard.handoff.policy import policy_schema as schema

    Console().print_json(data=schema())
