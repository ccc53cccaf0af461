"""Where figures come from: code, packages, hardware, seeds and hashes of one run.

The keys are those of the report, so ``{**run_manifest(...), "results": [...]}`` is a report. Host
names, user names, machine paths and credentials stay out: a report is meant to be published.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lcguard.evaluation.hashing import digest

PACKAGES = (
    "lcguard",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "scikit-learn",
    "matplotlib",
    "pydantic",
    "triton",
    "vllm",
)

_ROOT = Path(__file__).resolve().parents[1]
_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"]+", re.IGNORECASE)
_FOLDERS = re.compile(r"(?<![\w.)\]-])(?:~[\w.-]*|[A-Za-z]:)?[/\\](?:[^\s/\\=,;:'\"]+[/\\])*")
_PLACEHOLDER = re.compile(r"^[\w.=-]*\[(?:hidden|url)\]$")
_CREDENTIAL = re.compile(r"token(?!s|iz)|key|secret|passw|credential", re.IGNORECASE)


def run_manifest(command: str | Sequence[str], seeds: Sequence[int], config: Any) -> dict[str, Any]:
    """What a reader needs to repeat a run.

    Args:
        command: the command line, as text or as ``sys.argv``.
        seeds: every seed the run used.
        config: the resolved configuration; only its sha256 is kept.

    Raises ``ValueError`` where ``config`` has no canonical JSON.
    """
    return {
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": clean_command(command),
        "seeds": [int(s) for s in seeds],
        "git": _git(),
        "python": platform.python_version(),
        "packages": _packages(),
        "hardware": _hardware(),
        "hashes": {"config": digest(config), "source": _source_hash()},
    }


def clean_command(command: str | Sequence[str]) -> str:
    """The command without URLs, absolute folders and the values of credential options."""
    words = shlex.split(command) if isinstance(command, str) else [str(w) for w in command]
    shown: list[str] = []
    hide_next = False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = bool(_CREDENTIAL.search(name)) and (name.startswith("-") or bool(equals))
        if hide_next and not word.startswith("--"):
            word = "[hidden]"
        elif secret and equals:
            word = f"{name}=[hidden]"
        hide_next = secret and not equals
        shown.append(_FOLDERS.sub("", _URL.sub("[url]", word)))
    return " ".join(w if _PLACEHOLDER.search(w) else shlex.quote(w) for w in shown)


def _git() -> dict[str, Any]:
    """Revision of the checkout that holds this file; None outside one."""
    try:
        # An install inside somebody else's checkout must not report that checkout's revision.
        _run_git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
        revision = _run_git("rev-parse", "HEAD").strip()
        dirty = bool(_run_git("status", "--porcelain", "--", ":(top)*.py").strip())
    except (OSError, subprocess.SubprocessError):
        return {"revision": None, "dirty": None}
    return {"revision": revision, "dirty": dirty}


def _run_git(*args: str) -> str:
    done = subprocess.run(
        ["git", *args], cwd=_ROOT, check=True, capture_output=True, text=True, timeout=20
    )
    return done.stdout


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    gpus: list[dict[str, Any]] = []
    try:
        import torch

        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory_gib = round(properties.total_memory / 2**30, 1)
            gpus.append({"name": properties.name, "memory_gib": memory_gib})
    except (ImportError, RuntimeError):
        gpus = []  # a broken driver is no reason to lose the report
    return {
        "cpu": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": gpus or None,
    }


def _cpu_name() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _source_hash() -> str:
    """Sha256 over the package's Python files: says more than a revision where git is dirty."""
    total = hashlib.sha256()
    # The rooms are symbolic links in a checkout, and rglob does not walk into those.
    folders = [_ROOT, *(_ROOT / room for room in ("agents", "attacks", "server"))]
    files = {path for folder in folders for path in folder.rglob("*.py")}
    for path in sorted(files, key=lambda p: p.relative_to(_ROOT).as_posix()):
        total.update(path.relative_to(_ROOT).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
