"""Who may import whom, read off the graph of all imports, those inside functions included."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Room -> rooms that it may import, its own beside them. `core` are the modules of lcguard/ itself.
MAY_IMPORT = {
    "core": set(),
    "guards": {"core"},
    "store": {"core"},
    "ops": {"core", "guards"},
    "training": {"core", "guards"},
    "handoff": {"core", "store"},
    "text": {"core", "handoff"},
    "integrations": {"core", "handoff", "text"},
    "vllm": {"core", "guards", "handoff", "ops", "store"},
    "agents": {"core", "handoff", "store", "training"},
    "attacks": {"core", "guards", "training"},
    "evaluation": {"agents", "attacks", "core", "guards", "training"},
    "server": {"core", "evaluation", "guards", "handoff", "store", "text"},
}
MAY_IMPORT["commands"] = set(MAY_IMPORT)

# Package from outside -> who may import it.
OUTSIDE = {
    "torch": set(MAY_IMPORT) - {"handoff", "integrations", "server", "text"},
    "transformers": set(MAY_IMPORT)
    - {"guards", "handoff", "integrations", "ops", "store", "text", "training"},
    "vllm": {"vllm", "agents", "commands"},
    "triton": {"ops"},
    "fastapi": {"server"},
    "starlette": {"server", "vllm"},
    "uvicorn": {"server", "commands"},
    "psycopg": {"server"},
    "ag2": {"integrations"},
    "google": {"integrations"},
    "langgraph": {"integrations"},
    "langchain_core": {"integrations"},
}

GRAPH = """
import json, sys
import grimp
graph = grimp.build_graph(
    "lcguard", cache_dir=None, exclude_type_checking_imports=True, include_external_packages=True
)
print(json.dumps({m: sorted(graph.find_modules_directly_imported_by(m)) for m in graph.modules}))
"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Module -> modules that it imports.

    Of a copy: grimp reads neither links nor folders without ``__init__.py``. In a process of its
    own, where the copy is what ``lcguard`` means.
    """
    copy = tmp_path_factory.mktemp("graph")
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "lcguard", copy / "lcguard", ignore=ignore)
    for folder, _, _ in os.walk(copy / "lcguard"):
        Path(folder, "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", GRAPH],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    assert sum(name.startswith("lcguard.") for name in found) > 200
    assert {f"lcguard.{room}" for room in MAY_IMPORT if room != "core"} <= set(found)
    return found


def room_of(module: str) -> str:
    """Its room; ``""`` for a module from outside."""
    parts = module.split(".")
    if parts[0] != "lcguard":
        return ""
    if parts[1:] in (["cli"], ["__main__"]):
        return "commands"
    in_room = len(parts) > 2 or (len(parts) == 2 and (ROOT / "lcguard" / parts[1]).is_dir())
    return parts[1] if in_room else "core"


def test_no_circle(graph: dict[str, list[str]]) -> None:
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in graph.get(module, ()):
                walk(name, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def violations(module: str, names: list[str]) -> list[str]:
    room, wrong = room_of(module), []
    for name in names if room else ():
        other = room_of(name)
        may = MAY_IMPORT[room] | {room} if other else OUTSIDE.get(name, {room})
        if (other or room) not in may:
            wrong.append(f"{module} ({room}) imports {name}")
    return wrong


def test_rooms_import_what_they_may(graph: dict[str, list[str]]) -> None:
    rooms = {room_of(name) for name in graph} - {""}
    assert rooms == set(MAY_IMPORT), "every folder of lcguard/ has a row in the table"
    wrong = [line for module, names in graph.items() for line in violations(module, names)]
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize(
    ("module", "name", "allowed"),
    [
        ("lcguard.rope", "lcguard.handoff.keys", False),
        ("lcguard.store.base", "lcguard.agents", False),
        ("lcguard.guards.gate", "lcguard.agents.nano.model", False),
        ("lcguard.handoff.gatekeeper", "lcguard.vllm.errors", False),
        ("lcguard.handoff.gatekeeper", "torch", False),
        ("lcguard.agents.leakage", "lcguard.attacks.base", False),
        ("lcguard.agents.leakage", "lcguard.protocols", True),
        ("lcguard.server.app", "lcguard.vllm", False),
        ("lcguard.server.app", "lcguard.attacks.base", False),
        ("lcguard.server.app", "vllm", False),
        ("lcguard.text.guard", "lcguard.server.errors", False),
        ("lcguard.text.guard", "torch", False),
        ("lcguard.vllm.llm", "vllm", True),
        ("lcguard.cli", "lcguard.attacks", True),
    ],
)
def test_import_rules_bite(module: str, name: str, allowed: bool) -> None:
    assert (not violations(module, [name])) is allowed


# These find what they load by name, so that the graph does not see it.
LOADERS = {
    "lcguard/__init__.py",
    "lcguard/attacks/base.py",
    "lcguard/guards/__init__.py",
    "lcguard/store/redis.py",
}


def test_no_other_module_imports_by_name() -> None:
    found = set()
    for folder, _, files in os.walk(ROOT / "lcguard", followlinks=True):
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py":
                calls = [n for n in ast.walk(ast.parse(path.read_text())) if type(n) is ast.Call]
                names = {ast.unparse(call.func).rsplit(".", 1)[-1] for call in calls}
                if names & {"import_module", "__import__"}:
                    found.add(path.relative_to(ROOT).as_posix())
    assert found == LOADERS


def modules(package: str) -> list[str]:
    names = (p.relative_to(ROOT).with_suffix("") for p in (ROOT / package).rglob("*.py"))
    return [".".join(name.parts).removesuffix(".__init__") for name in names]


@pytest.mark.parametrize(
    "names",
    [
        modules("lcguard/handoff"),
        modules("lcguard/text"),
        ["lcguard.manifest"],
        ["lcguard.store.line"],
    ],
)
def test_the_rules_of_a_hop_load_no_model(names: list[str]) -> None:
    """Checking a policy, a grant or a manifest does not take the seconds that torch takes."""
    code = f"import sys, {', '.join(names)}\nprint(sorted({set(OUTSIDE)} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_proxy_loads_no_detector_before_an_edge_has_one() -> None:
    """With what reads its model it takes 230 MiB of every proxy."""
    detector = "lcguard.commands.text_detector"
    code = f"import sys, lcguard.commands.serve\nprint({detector!r} in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_proxy_that_checked_its_model_has_none_of_its_code() -> None:
    """Which the check imports, in a process of its own."""
    code = (
        "import sys\n"
        "from lcguard.agents.nano.load import model_path\n"
        "from lcguard.commands.serve import _checked\n"
        "_checked(str(model_path()), {'gate': 'nano:gate'}, True)\n"
        "print([n for n in sys.modules if n.startswith('transformers.models.qwen3.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"LCGUARD_KEY": "5a" * 32},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    bad = subprocess.run(
        [sys.executable, "-c", code.replace("'nano:gate'", "'./nowhere'")],
        cwd=ROOT,
        env=os.environ | {"LCGUARD_KEY": "5a" * 32},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "StartError: guards.gate: guard './nowhere' is not a folder" in bad.stderr
