"""Hook of mkdocs: gives the API reference a copy of the sources in which every folder is a package.

``lcguard/agents``, ``lcguard/attacks`` and ``lcguard/server`` are links to folders that must have
no ``__init__.py`` (see docs/architecture.md), and Griffe reads no such folder inside a package.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_COPY = tempfile.TemporaryDirectory(prefix="lcguard-docs-")  # removed when mkdocs ends


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: Any) -> None:
    """Called by mkdocs before it builds."""
    package = Path(config.config_file_path).parent / "lcguard"
    copy = Path(_COPY.name) / "lcguard"
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(package, copy, ignore=ignore, dirs_exist_ok=True)
    for folder in [copy, *(p for p in copy.rglob("*") if p.is_dir())]:
        (folder / "__init__.py").touch()
    handlers = config.plugins["mkdocstrings"].config.handlers
    handlers["python"]["paths"] = [_COPY.name]
