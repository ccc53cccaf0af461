"""Every code block of README and documentation does what it says.

Python is run as it stands; YAML and JSON go through the product's own readers; of shell every line
is held against the command that it calls, and run where that takes seconds. What needs an engine,
a network or more than a minute is named below with the test that runs it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from lcguard.agents.scenarios.load import load_hops
from lcguard.cli import app
from lcguard.commands.detector import DetectorRun
from lcguard.commands.loop_config import load_loop
from lcguard.commands.train import TrainRun
from lcguard.config import load_config
from lcguard.evaluation.plan import EvalConfig
from lcguard.evaluation.presets import preset
from lcguard.handoff.policy import parse_policy
from lcguard.server.settings import ServerSettings
from lcguard.strict_yaml import parse_yaml
from tests.docs.blocks import PAGES, Block, block, blocks, every_block
from tests.paths import ROOT

# Page, a part of the block -> the test that runs it, and takes it from the page for that.
ELSEWHERE = {
    ("docs/vllm.md", "GuardedLLM.build("): "tests/vllm/test_vllm_handoff_refused.py",
    ("docs/vllm.md", "OpenAI(base_url="): "tests/vllm/test_vllm_server.py",
    ("docs/vllm.md", "vllm.entrypoints.openai.api_server"): "tests/vllm/api_server.py",
    ("docs/guards.md", "smollm2:twin"): "tests/agents/test_models.py",
    ("docs/proxy.md", "PermissionDeniedError"): "tests/docs/test_blocks.py",
    ("docs/proxy.md", "lcguard.client"): "tests/server/test_client.py",
    ("docs/proxy.md", "responses.create("): "tests/server/test_responses.py",
    ("docs/proxy.md", "examples: project_names.jsonl"): "tests/training/test_own_examples.py",
    ("docs/proxy.md", "lcguard detect train --categories"): "tests/training/test_own_examples.py",
}

# Pages whose every block is run, and its output looked at, by a test of their own.
WHOLE = {"docs/first-hour.md": "tests/docs/test_first_hour.py"}

# Commands that are run here, in an empty folder; what they print is not looked at.
QUICK = (
    "--help",
    "config show",
    "config reference",
    "policy schema",
    "eval schema",
    "eval list --attacks",
    "eval list --guards",
    "eval list --presets",
    "models list",
    "keys new",
    "explain",
)

# Commands that are not: they need records, keys or minutes. The tests that run them on less.
HEAVY = {
    "demo": "tests/evaluation/test_evaluation_runner.py",
    "config check": "tests/server/test_proxy_commands.py",
    "doctor": "tests/test_doctor.py",
    "keys list": "tests/server/test_proxy_commands.py",
    "keys revoke": "tests/server/test_proxy_commands.py",
    "audit": "tests/server/test_proxy_commands.py",
    "policy check": "tests/test_cli.py",
    "serve": "tests/server/test_proxy_commands.py",
    "models prepare": "tests/agents/test_models.py",
    "eval run": "tests/evaluation/test_eval_tool.py",
    "eval resume": "tests/evaluation/test_eval_tool.py",
    "eval report": "tests/evaluation/test_eval_tool.py",
    "eval compare": "tests/evaluation/test_eval_tool.py",
    "eval record": "tests/evaluation/test_record.py",
    "eval list": "tests/evaluation/test_eval_tool.py",
    "train": "tests/training/test_training.py",
    "init": "tests/test_init_label.py",
    "label": "tests/test_init_label.py",
    "detect train": "tests/training/test_detect.py",
    "detect eval": "tests/training/test_detect.py",
    "loop": "tests/loop/test_loop_demo.py",
    "registry": "tests/loop/test_registry_commands.py",
}


def elsewhere(found: Block) -> bool:
    named = any(found.page == page and part in found.code for page, part in ELSEWHERE)
    return named or found.page in WHOLE


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    for found in blocks(page):
        assert found.language in ("python", "bash", "yaml", "json", "diff", "text"), found


@pytest.mark.parametrize(("page", "part"), ELSEWHERE)
def test_what_is_run_elsewhere_is_run_there(page: str, part: str) -> None:
    assert block(page, part)
    text = (ROOT / ELSEWHERE[page, part]).read_text()
    assert f'block("{page}", "{part}")' in text


@pytest.mark.parametrize("page", WHOLE)
def test_a_page_that_is_run_whole_is_run_there(page: str) -> None:
    assert f'PAGE = "{page}"' in (ROOT / WHOLE[page]).read_text()


RUN_HERE = [
    pytest.param(b, id=str(b), marks=[pytest.mark.slow] * (b.page == "docs/evaluation.md"))
    for b in every_block("python")
    if not elsewhere(b)
]


@pytest.mark.parametrize("found", RUN_HERE)
def test_python_runs_as_it_stands(
    found: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(found.code, str(found), "exec"), {"__name__": "__main__"})


def test_the_readmes_ten_lines_say_what_the_readme_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = block("README.md", "import lcguard")
    assert len(code.splitlines()) <= 12
    exec(compile(code, "README.md", "exec"), {})
    complaint, number = capsys.readouterr().out.splitlines()
    assert complaint == "chief complaint -> ['back pain', 'back pain', 'back pain']"
    assert number.startswith("SSN -> ['912-55-1029', ")
    assert number.count("912-55-1029") == 1


def test_the_proxys_client_is_the_example() -> None:
    """Which ``tests/server/test_proxy.py`` runs."""
    code = (ROOT / "examples" / "two_agents.py").read_text()
    assert code[code.index("import os") :] == block("docs/proxy.md", "PermissionDeniedError")


@pytest.mark.parametrize("name", ["langgraph", "agents_sdk", "ag2", "adk"])
def test_the_frameworks_lines_are_the_examples(name: str) -> None:
    """Which ``tests/server/test_proxy_roles.py`` runs, without them and with."""
    before, after = (
        (ROOT / "examples" / f"{name}_{kind}.py").read_text().splitlines(keepends=True)
        for kind in ("plain", "text")
    )
    lines = list(unified_diff(before, after, f"{name}_plain.py", f"{name}_text.py", n=0))
    assert block("docs/frameworks.md", f"+++ {name}_text.py") == "".join(lines).rstrip("\n") + "\n"
    assert sum(line.strip("\n") != "+" and line[0] == "+" for line in lines[2:]) <= 5


def read_policy(text: str, folder: Path) -> None:
    # heads are trained in tests/training/test_own_examples.py
    parse_policy(parse_yaml(text), folder=folder, untrained=True)


def read_as(schema: type[Any]) -> Callable[[str, Path], None]:
    def read(text: str, folder: Path) -> None:
        path = folder / "file.yaml"
        path.write_text(text)
        load_config(schema, path)

    return read


def read_loop(text: str, folder: Path) -> None:
    path = folder / "loop.yaml"
    path.write_text(text)
    load_loop(path)


YAML = {
    "docs/evaluation.md": read_as(EvalConfig),
    "docs/frameworks.md": read_policy,
    "docs/guards.md": read_as(DetectorRun),
    "docs/loop.md": read_loop,
    "docs/operations.md": read_as(ServerSettings),
    "docs/proxy.md": read_policy,
    "docs/training.md": read_as(TrainRun),
}


@pytest.mark.parametrize("found", every_block("yaml"), ids=str)
def test_yaml_is_read_by_its_own_reader(found: Block, tmp_path: Path) -> None:
    YAML[found.page](found.code, tmp_path)


@pytest.mark.parametrize("found", every_block("json"), ids=str)
def test_json_lines_are_records(found: Block, tmp_path: Path) -> None:
    assert found.page == "docs/training.md"
    path = tmp_path / "records.jsonl"
    path.write_text(found.code)
    assert load_hops("jsonl", path=path)


# -- shell


def commands(code: str) -> list[str]:
    """The lines of a shell block, continued ones as one, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for raw in lines if (line := re.sub(r"(^|\s)#.*", "", raw).strip())]


def parse(words: list[str]) -> None:
    """Holds a call of ``lcguard`` against its options and arguments, without calling anything."""
    command: Any = typer.main.get_command(app)
    name, context = "lcguard", None
    while words != ["--help"]:
        context = command.make_context(name, list(words), parent=context)
        if not hasattr(command, "commands"):
            return
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, command, words = command.resolve_command(context, rest)


def check_make(words: list[str]) -> None:
    """The target is there; CI's own calls are `make lint test`, and `make demo` is `demo` above."""
    makefile = (ROOT / "Makefile").read_text()
    for target in words:
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"


def check_script(words: list[str]) -> None:
    scripts = [w for w in words if w.startswith("scripts/")]
    assert all((ROOT / w).exists() for w in scripts), words


@pytest.mark.parametrize("found", [b for b in every_block("bash") if not elsewhere(b)], ids=str)
def test_shell_lines_call_what_there_is(
    found: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in commands(found.code):
        inner = re.fullmatch(r'eval "\$\((.*)\)"', line)
        name, *words = shlex.split(inner[1] if inner else line)
        if name == "lcguard":
            call_or_parse(words)
        elif name == "make":
            check_make(words)
        elif name in ("python", "accelerate"):
            check_script(words)
        else:
            assert line in (". .venv/bin/activate",), line


def call_or_parse(words: list[str]) -> None:
    called = " ".join(words)
    parse(words)
    if called.startswith(QUICK):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        return
    for prefix, command in (("", "eval run "), ("train-", "train ")):
        if called.startswith(command) and not Path(name := words[command.count(" ")]).suffix:
            assert preset(prefix + name).exists()
    (test,) = {HEAVY[name] for name in HEAVY if called.startswith(name)}
    assert (ROOT / test).exists()


def names(command: Any, before: str = "lcguard") -> list[str]:
    """Every command there is."""
    if not hasattr(command, "commands"):
        return [before]
    inner = command.commands.items()
    return [name for word, part in inner for name in names(part, f"{before} {word}")]


@pytest.mark.parametrize("name", names(typer.main.get_command(app)))
def test_every_command_is_documented(name: str) -> None:
    assert any(name in (ROOT / page).read_text() for page in PAGES)


def inline_commands() -> list[tuple[str, str]]:
    return [
        (page, found)
        for page in PAGES
        for found in re.findall(r"`(lcguard [^`\n]+)`", (ROOT / page).read_text())
    ]


@pytest.mark.parametrize(("page", "line"), inline_commands())
def test_commands_within_the_text_are_commands(page: str, line: str) -> None:
    try:
        parse(shlex.split(line)[1:])
    except Exception as error:
        # a command's name alone misses its arguments
        if type(error).__name__ != "MissingParameter":
            raise
