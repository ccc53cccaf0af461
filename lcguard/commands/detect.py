"""``lcguard detect``: find what a policy forbids, and say how well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from lcguard.atomic_file import replace_file
from lcguard.commands.script import command_line, existing
from lcguard.nearest import unknown

detect_app = typer.Typer(no_args_is_help=True, help="Find what a policy forbids, and say how well.")


@detect_app.command("train")
def train(
    config: Annotated[
        Path | None, typer.Argument(help="YAML, or the name of a preset; not for own categories.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the guard (runs/detect), or the head.")
    ] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Override a key.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A quarter of records and steps: served by name alone.")
    ] = False,
    categories: Annotated[
        Path | None, typer.Option(help="Policy: a head for each of its categories with examples.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Of a category of your own.")
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(help="Labelled texts of the category, JSONL.")
    ] = None,
) -> None:
    """Train guard ``twin``'s detector on labelled records, or what finds categories of your own."""
    if categories or name or examples:
        if config is not None or quick:
            raise ValueError("a configuration and --quick are not for categories of your own")
        for folder in _train_heads(categories, name or [], examples, out, sets or []):
            typer.echo(folder)
        return
    if config is None:
        raise ValueError(
            "nothing to train: name a configuration, or --categories POLICY, or --name NAME "
            "--examples FILE"
        )
    from lcguard.commands.detector import DetectorRun, quickened, train_detector
    from lcguard.evaluation.presets import load_plan

    out = out or Path("runs/detect")
    run = load_plan(DetectorRun, config, sets or [], None, "detect-")
    run = quickened(run) if quick else run
    train_detector(run, out, command_line(), Console(stderr=True).print)
    typer.echo(out / "guard")


def _train_heads(
    policy: Path | None, names: list[str], examples: Path | None, out: Path | None, sets: list[str]
) -> list[Path]:
    """The folders of the heads. Raises ``ValueError`` for options that do not go together."""
    from lcguard.category_head import default_folder
    from lcguard.commands.category_detector import train_category, train_policy
    from lcguard.config import load_config
    from lcguard.training.fit_head import HeadConfig

    config = load_config(HeadConfig, None, sets)
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if policy is not None:
        if examples is not None or out is not None:
            raise ValueError("--examples and --out stand in the policy: leave them out")
        return train_policy(policy, names, config, say)
    if examples is None or len(names) != 1:
        raise ValueError("give one --name and --examples FILE, or --categories POLICY")
    return [train_category(names[0], examples, out or default_folder(examples), config, say)]


@detect_app.command("eval")
def evaluate(
    source: Annotated[str, typer.Option(help="agentleak, privacylens, magpie, generator, jsonl.")],
    out: Annotated[Path, typer.Option("--out", help="JSON file for the figures.")],
    data: Annotated[Path | None, typer.Option(help="Folder or file of the source.")] = None,
    model: Annotated[
        str, typer.Option(help="Read this model's KV; none: the text, as `detect: lcguard` does.")
    ] = "",
    guard: Annotated[
        str,
        typer.Option(help="A guard's folder, or MODEL:NAME; none: smollm2:twin, of text :text."),
    ] = "",
    against: Annotated[
        Literal["presidio"] | None, typer.Option(help="Measure this beside it.")
    ] = None,
    records: Annotated[int, typer.Option(help="Records at most; 0: all there are.")] = 0,
    seed: Annotated[int, typer.Option(help="Which records, and which are generated.")] = 1000,
) -> None:
    """Measure how many forbidden values are found whole, and what else is touched."""
    from lcguard.agents.scenarios.load import SOURCES
    from lcguard.commands.detector import measure_detector
    from lcguard.evaluation.plan import DataConfig

    if source not in SOURCES:
        raise ValueError(unknown("source", source, SOURCES))
    n = records or (300 if source == "generator" else 0)
    guard = guard or ("smollm2:twin" if model else "smollm2:text")
    config = DataConfig(source, str(existing(data) or ""), seed, 0, n)
    figures = measure_detector(config, model, guard, against, command_line())
    replace_file(out, (json.dumps(figures, indent=1, default=str) + "\n").encode())
    Console().print(_line("found", figures), highlight=False)
    if against:
        Console().print(_line(against, figures[against]), highlight=False)


def _line(name: str, f: dict[str, Any]) -> str:
    touched = "-" if f["task_touched"] is None else f"{f['task_touched']:.3f}"
    share = "-" if f["recall"] is None else f"{f['recall']:.3f}"
    return (
        f"{name}: {f['found']} of {f['total']} values ({share}, at least {f['recall_lower']:.3f} "
        f"at {f['level']:.0%}); task spans touched {touched}; tokens flagged "
        f"{f['tokens_flagged']:.3f}"
    )
