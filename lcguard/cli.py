"""The command line: composition only."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Guards for the KV caches that LLM agents hand to each other.",
)
eval_app = typer.Typer(no_args_is_help=True, help="Measure what a guarded hop leaks.")
policy_app = typer.Typer(no_args_is_help=True, help="Check the YAML policy.")
app.add_typer(eval_app, name="eval")
app.add_typer(policy_app, name="policy")

Out = Annotated[Path, typer.Option("--out", help="Folder for results; resumed if it exists.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override, such as data.seed=3.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the first GPU by default.")]


def _command() -> str:
    return shlex.join(["lcguard", *sys.argv[1:]])


def _say(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, markup=False)


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=report["title"])
    for name in (
        "guard",
        "utility",
        "training-time ASR",
        "fresh ASR",
        "injection",
        "floor",
        "ceiling",
    ):
        table.add_column(name)
    for r in report["results"]:
        keys = ("utility", "asr_train", "asr_fresh", "asr_injection", "floor", "ceiling")
        table.add_row(r["guard"], *("-" if r[k] is None else f"{r[k]:.3f}" for k in keys))
    return table


def _evaluate(config: Any, out: Path, device: str | None) -> None:
    from lcguard.commands.compose import evaluate

    console = Console(stderr=True)
    report = evaluate(config, out, _command(), _say(console), device)
    Console().print(_table(report))
    console.print(f"report: {out / 'report.html'}, {out / 'report.json'}", markup=False)


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    sets: Sets = None,
    device: Device = None,
) -> None:
    """Nano agents hand over guarded KV; fresh attackers try to rebuild the secrets."""
    from lcguard.commands.compose import load_plan
    from lcguard.evaluation.plan import EvalConfig

    _evaluate(load_plan(EvalConfig, "demo", sets or [], None), out, device)


@eval_app.command("run")
def eval_run(
    config: Annotated[Path, typer.Argument(help="YAML, or the name of a preset such as main.")],
    out: Out = Path("runs/eval"),
    sets: Sets = None,
    data: Annotated[Path | None, typer.Option(help="Folder or file of the data.")] = None,
    device: Device = None,
) -> None:
    """Run an evaluation, or go on with one that was interrupted."""
    from lcguard.commands.compose import load_plan
    from lcguard.evaluation.plan import EvalConfig

    _evaluate(load_plan(EvalConfig, config, sets or [], data), out, device)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML, or the name of a preset such as gate.")],
    out: Out = Path("runs/guard"),
    sets: Sets = None,
    data: Annotated[Path | None, typer.Option(help="Folder or file of the data.")] = None,
    device: Device = None,
) -> None:
    """Train a guard, certify it, and write it to OUT/guard."""
    from lcguard.commands.compose import load_plan
    from lcguard.commands.train import TrainRun, run_training

    console = Console(stderr=True)
    run = load_plan(TrainRun, config, sets or [], data, prefix="train-")
    summary = run_training(run, out, _command(), _say(console), device)
    Console().print_json(data=summary)


@app.command()
def explain(
    text: Annotated[
        str | None, typer.Argument(help="A context; by default a generated one.")
    ] = None,
    guard: Annotated[str, typer.Option(help="Folder or nano:NAME.")] = "nano:gate",
    model: Annotated[str, typer.Option()] = "nano",
    forbid: Annotated[str, typer.Option(help="Comma-separated categories.")] = "",
    seed: Annotated[int, typer.Option(help="Which generated context.")] = 0,
) -> None:
    """Show a context with each token shaded by how much of it the guard withholds."""
    from lcguard.commands.explain import explain_text

    Console().print(explain_text(text, guard, model, forbid, seed))


@app.command()
def probe(
    model: Annotated[str | None, typer.Option(help="Folder, hub repository or nano.")] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Start vLLM on the model and try its KV pages.")
    ] = False,
) -> None:
    """Show what the installed vLLM, its KV pages and a model support, and why not."""
    from lcguard.vllm.probe import probe as look

    if model == "nano":
        from lcguard.agents.nano.load import model_path

        model = str(model_path())
    if engine and model is None:
        raise ValueError("--engine needs --model: the pages depend on it")
    found = look(model, engine)
    table = Table(show_header=False)
    for f in found:
        mark = {True: "yes", False: "NO", None: "-"}[f.ok]
        table.add_row(f.what, mark, f.detail)
    Console().print(table)
    if any(f.ok is False for f in found):
        raise typer.Exit(1)


@policy_app.command("check")
def policy_check(path: Path) -> None:
    """Check a policy file."""
    from lcguard.policy import load_policy

    policy = load_policy(path)
    typer.echo(f"{path.name}: {len(policy.edges)} edges, digest {policy.digest[:12]}")


@policy_app.command("schema")
def policy_schema() -> None:
    """Print the policy's JSON Schema."""
    from lcguard.policy import policy_schema as schema

    Console().print_json(data=schema())


def main() -> int:
    """Entry point: errors of the user's making end in one line and a non-zero exit."""
    try:
        app()
    except (ValueError, FileNotFoundError) as error:
        print(f"lcguard: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
