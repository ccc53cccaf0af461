"""What ``scripts/record_vllm.py`` read of vLLM's versions, the tested and the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lcguard.vllm import READ_VERSIONS, TESTED_VERSIONS

FOLDER = Path(__file__).parent / "recorded"


def record_of(version: str) -> dict[str, Any]:
    """Raises ``OSError`` for a version that was not recorded."""
    text = (FOLDER / f"vllm-{version}.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


RECORDS = tuple(map(record_of, (*TESTED_VERSIONS, *READ_VERSIONS)))


def fields_of(record: dict[str, Any], kind: str) -> set[str]:
    """Of all models of a kind, see ``lcguard.vllm.interface.MODELS``."""
    return {name for fields in record["models"][kind].values() for name in fields}
