"""Records what this package touches of a vLLM, read from its source: for the tests that hold
``lcguard.vllm`` and the proxy's contract against versions which cannot all be installed here.

python scripts/record_vllm.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl
python scripts/record_vllm.py .venv/lib/python3.11/site-packages --version 0.32.0 --check

Takes a wheel, or a folder with the package. Nothing of vLLM is imported: its wheels need torch, and
most of them a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcguard.commands.script import run_script
from lcguard.vllm.interface import BASES, MODELS, STRUCTS, USED, WRAPPED
from scripts.vllm_source import Source, imports_of

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "vllm" / "recorded"


def recorded(source: Source, version: str) -> dict[str, Any]:
    """Of one version, as JSON."""
    touched = imports_of(ROOT / "lcguard" / "vllm")
    return {
        "version": version,
        "connector": {
            name: parameters
            for base in BASES
            for name, parameters in source.methods(base).items()
            if not name.startswith("_")
        },
        "wrapped": {name: source.parameters(name) for name in WRAPPED},
        "imports": [name for name in touched if source.has(name)],
        "attributes": {
            name: sorted(set(wanted) & source.attributes(name)) for name, wanted in USED.items()
        },
        "structs": {name: source.fields(name, private=True) for name in STRUCTS},
        "models": {
            kind: {name: source.fields(name) for name in names} for kind, names in MODELS.items()
        },
        "routes": source.routes(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="wheel, or folder with the package vllm")
    parser.add_argument("--version", help="default: from the wheel's name")
    parser.add_argument("--check", action="store_true", help="exit 1 where the record differs")
    args = parser.parse_args(argv)
    named = re.match(r"vllm(?:_cpu)?-([0-9.]+)", args.source.name)
    version = args.version or (named[1] if named else "")
    if not version:
        raise ValueError(f"{args.source} names no version: give --version")
    place = FOLDER / f"vllm-{version}.json"
    text = json.dumps(recorded(Source(args.source), version), indent=1) + "\n"
    if args.check:
        return int(place.read_text(encoding="utf-8") != text)
    place.parent.mkdir(exist_ok=True)
    place.write_text(text, encoding="utf-8")
    print(place)
    return 0


if __name__ == "__main__":
    run_script(main)
