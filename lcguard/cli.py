"""The command line: composition only."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lcguard import __version__
from lcguard.commands import detect, loop, models, registry, service
from lcguard.commands.script import command_line, ending_at_once, existing, one_line, resumable
from lcguard.tracking import Tracker

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
eval_app = typer.Typer(no_args_is_help=True, help="Measure what a guarded hop leaks.")
app.add_typer(eval_app, name="eval")
app.add_typer(models.models_app, name="models")
app.add_typer(detect.detect_app, name="detect")
app.add_typer(loop.loop_app, name="loop")
app.add_typer(registry.registry_app, name="registry")
app.add_typer(service.policy_app, name="policy")
app.add_typer(service.keys_app, name="keys")
app.add_typer(service.audit_app, name="audit")
app.add_typer(service.config_app, name="config")
app.command("serve")(service.serve)
app.command("doctor")(service.doctor)

Out = Annotated[Path, typer.Option("--out", help="Folder for results; resumed if it exists.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override, such as data.seed=3.")]
FailIf = Annotated[
    list[str] | None,
    typer.Option("--fail-if", help="Exit with 3 where true, such as 'gate.asr_upper>0.05'."),
]
Quick = Annotated[
    bool,
    typer.Option("--quick", help="Few records and steps: shows that it runs, judges nothing."),
]
Folder = Annotated[Path, typer.Argument(help="A run's folder.")]
Executor = Annotated[str, typer.Option(help="Where attacks run: local or ray; same figures.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the first GPU by default.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lcguard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """Guards for the KV caches that LLM agents hand to each other."""


def _table_console() -> Console:
    """Standard output; wide where it is no terminal, so that no figure in a log is cut."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=160)


def _say(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)


def _evaluate(
    config: Any,
    out: Path,
    device: str | None,
    fail_if: Sequence[str] = (),
    executor: str = "local",
    mlflow: str | None = None,
) -> None:
    from lcguard.commands.evaluation import rendered, run

    console = Console(stderr=True)
    tracker = Tracker.open(mlflow)
    more = ["--executor", executor] if executor != "local" else []
    more += ["--mlflow", mlflow] if mlflow else []
    with resumable(shlex.join(["lcguard", "eval", "resume", str(out), *more])):
        code = run(
            config,
            out,
            command_line(),
            console,
            device=device,
            fail_if=fail_if,
            executor=executor,
            tracker=tracker,
        )
    _table_console().print(rendered(out, "table"))
    console.print(f"report: {out / 'report.html'}, {out / 'report.json'}", markup=False)
    if code:
        raise typer.Exit(code)


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    sets: Sets = None,
    quick: Quick = False,
    device: Device = None,
) -> None:
    """Nano agents hand over guarded KV; fresh attackers try to rebuild the secrets."""
    from lcguard.commands.evaluation import load

    _evaluate(load(Path("demo"), sets or [], None, quick=quick), out, device)


@eval_app.command("run")
def eval_run(
    config: Annotated[Path, typer.Argument(help="YAML, or the name of a preset such as main.")],
    out: Out = Path("runs/eval"),
    sets: Sets = None,
    data: Annotated[Path | None, typer.Option(help="Folder or file of the data.")] = None,
    fail_if: FailIf = None,
    stress: Annotated[
        bool, typer.Option("--stress", help="Ten times the attack steps, wider, more probes.")
    ] = False,
    quick: Quick = False,
    executor: Executor = "local",
    device: Device = None,
    mlflow: loop.Mlflow = None,
) -> None:
    """Run an evaluation, or go on with one that was interrupted."""
    from lcguard.commands.evaluation import load

    plan = load(config, sets or [], existing(data), stress, quick)
    _evaluate(plan, out, device, fail_if or [], executor, mlflow)


@eval_app.command("resume")
def eval_resume(
    folder: Folder,
    fail_if: FailIf = None,
    executor: Executor = "local",
    device: Device = None,
    mlflow: loop.Mlflow = None,
) -> None:
    """Go on with a run that was interrupted, as it was started."""
    from lcguard.evaluation.folder import RunFolder

    plan = RunFolder(folder).config()
    _evaluate(plan, folder, device, fail_if or [], executor, mlflow)


@eval_app.command("report")
def eval_report(
    folder: Folder,
    form: Annotated[str, typer.Option("--format", help="table, md, json or html.")] = "table",
    stored: Annotated[
        bool, typer.Option("--stored", help="Keep the figures of report.json; load no model.")
    ] = False,
    fail_if: FailIf = None,
    device: Device = None,
) -> None:
    """Write a finished run's report again and print it; nothing is fitted."""
    from lcguard.commands.evaluation import judge, read_conditions, rendered, rerender

    console = Console(stderr=True)
    conditions = read_conditions(fail_if or [])
    report = rerender(folder, form, device, stored)
    text = rendered(folder, form)
    if isinstance(text, str):
        typer.echo(text)
    else:
        _table_console().print(text)
    code = judge(report, conditions, console)
    if code:
        raise typer.Exit(code)


@eval_app.command("compare")
def eval_compare(
    first: Annotated[Path, typer.Argument(help="A run's folder or report.json.")],
    second: Annotated[Path, typer.Argument(help="The one to hold against it.")],
    threshold: Annotated[float, typer.Option(help="A move up to this is no news.")] = 0.05,
    force: Annotated[bool, typer.Option("--force", help="Even on other records.")] = False,
    fail_on_regression: Annotated[
        bool, typer.Option("--fail-on-regression", help="Exit with 3 where a figure got worse.")
    ] = False,
) -> None:
    """Two runs side by side, guard by guard."""
    from lcguard.commands.evaluation import comparison_table
    from lcguard.evaluation.compare import compare, read_report

    found = compare(read_report(first), read_report(second), threshold, force)
    _table_console().print(comparison_table(found))
    console, worse = Console(stderr=True), found.regressions()
    for line in [f"differs: {d}" for d in found.differences] + [f"worse: {w}" for w in worse]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if worse and fail_on_regression:
        raise typer.Exit(3)


@eval_app.command("record")
def eval_record(
    folder: Folder,
    guard: Annotated[str, typer.Argument(help="The guard's name in that run.")],
    card: Annotated[Path, typer.Argument(help="Folder of the guard that was measured.")],
) -> None:
    """Write what a run measured of a guard onto its card, which servers read."""
    from lcguard.commands.record import record

    found = record(folder, guard, card)
    typer.echo(f"{card}: {found['verdict']}: {found['reason']}")


@eval_app.command("certify")
def eval_certify(
    guard: Annotated[str, typer.Argument(help="A guard's folder, or MODEL:NAME.")],
    sets: Sets = None,
    data: Annotated[Path | None, typer.Option(help="Folder or file of the data.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON of the certificate.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Write it onto the guard's card.")] = False,
    device: Device = None,
) -> None:
    """Bound what any attacker recovers of a guard's segments, on held-out records."""
    from lcguard.commands.certify import certify_guard
    from lcguard.commands.train_summary import ceiling_lines

    found = certify_guard(guard, sets or [], existing(data), command_line(), out, card, device)
    for line in ceiling_lines(found):
        typer.echo(line)


@eval_app.command("schema")
def eval_schema() -> None:
    """Print the JSON Schema of report.json."""
    from lcguard.evaluation.results import report_schema

    Console().print_json(data=report_schema())


@eval_app.command("list")
def eval_list(
    runs: Annotated[Path, typer.Option(help="Where runs are.")] = Path("runs"),
    attacks: Annotated[bool, typer.Option("--attacks", help="Registered attacks.")] = False,
    guards: Annotated[bool, typer.Option("--guards", help="Registered guards.")] = False,
    presets: Annotated[bool, typer.Option("--presets", help="Shipped presets.")] = False,
) -> None:
    """Show the runs there are, or what an evaluation can be made of."""
    from lcguard.commands import inventory

    console = _table_console()
    if not (attacks or guards or presets):
        console.print(inventory.run_table(inventory.find_runs(runs), runs))
    if attacks:
        console.print(inventory.attack_table())
    if guards:
        console.print(inventory.guard_table())
    if presets:
        console.print(inventory.preset_table())
    broken = list(inventory.broken_plugins()) if attacks else []
    for line in broken:
        typer.echo(line, err=True)
    if broken:
        raise typer.Exit(1)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML, or the name of a preset such as gate.")],
    out: Out = Path("runs/guard"),
    sets: Sets = None,
    data: Annotated[Path | None, typer.Option(help="Folder or file of the data.")] = None,
    device: Device = None,
    mlflow: loop.Mlflow = None,
) -> None:
    """Train a guard, certify it, and write it to OUT/guard."""
    from lcguard.commands.train import TrainRun, run_training
    from lcguard.commands.train_summary import lines
    from lcguard.evaluation.presets import load_plan

    console = Console(stderr=True)
    run = load_plan(TrainRun, config, sets or [], existing(data), prefix="train-")
    say, tracker = _say(console), Tracker.open(mlflow)
    with resumable(command_line()):
        summary = run_training(run, out, command_line(), say, device, tracker)
    for line in lines(summary, out):
        typer.echo(line)


@app.command()
def init(
    model: Annotated[str, typer.Option(help="Name (lcguard models list), folder or repository.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where the files go.")] = Path(),
) -> None:
    """Write policy, server and training configuration for a model, with what they will take."""
    from lcguard.commands.init import init as make

    make(model, folder, typer.echo)


@app.command()
def label(
    texts: Annotated[Path, typer.Argument(help="A text a line, or JSONL with `text`.")],
    out: Annotated[Path, typer.Option("--out", help="JSONL for training and evaluation.")],
    detectors: Annotated[
        list[str] | None,
        typer.Option("--detector", help="presidio, MODEL:NAME or a guard's folder; repeatable."),
    ] = None,
    model: Annotated[str, typer.Option(help="Of a guard's folder.")] = "smollm2",
) -> None:
    """Pre-annotate texts with what detectors find in them; a person checks the spans."""
    from lcguard.commands.label import label as run

    run(texts, out, detectors or ["smollm2:twin"], model, typer.echo)


@app.command()
def explain(
    text: Annotated[
        str | None, typer.Argument(help="A context; by default a generated one.")
    ] = None,
    guard: Annotated[str, typer.Option(help="Folder or nano:NAME.")] = "nano:gate",
    model: Annotated[str, typer.Option()] = "nano",
    forbid: Annotated[str, typer.Option(help="Categories with commas, all or none.")] = "all",
    seed: Annotated[int, typer.Option(help="Which generated context.")] = 0,
) -> None:
    """Show a context with each token shaded by how much of it the guard withholds."""
    from lcguard.commands.explain import explain_text

    console = Console()
    plain = console.color_system is None
    shown = explain_text(text, guard, model, forbid, seed, plain)
    console.print(shown, highlight=False, soft_wrap=plain)


@app.command()
def probe(
    model: Annotated[str | None, typer.Option(help="Folder, hub repository or nano.")] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Start vLLM on the model and try its KV pages.")
    ] = False,
) -> None:
    """Show what the installed vLLM, its KV pages and a model support, and why not."""
    from lcguard.vllm.probe import probe as look

    if model is not None:
        from lcguard.agents.models import model_location

        model = model_location(model, lambda text: typer.echo(text, err=True))
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


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning of ours without the place in the code that found it."""
    if category.__module__.startswith("lcguard."):
        return f"lcguard: warning: {message}\n"
    return _FORMAT(message, category, filename, lineno, line)


_FORMAT = warnings.formatwarning


def main() -> int:
    """Entry point: errors of the user's making end in one line and a non-zero exit."""
    warnings.formatwarning = _one_line
    try:
        with ending_at_once():
            app()
    except (ValueError, OSError) as error:
        print(f"lcguard: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
