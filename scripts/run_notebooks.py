"""Runs the notebooks of the documentation; with ``--write`` keeps what they print.

python scripts/run_notebooks.py            # run; exit 1 where a cell fails or prints something else
python scripts/run_notebooks.py --write
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from lcguard.commands.script import run_script

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"


def run(path: Path) -> Any:
    """The notebook with the outputs of a run in an empty folder, and nothing of this machine."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, resources=resources).execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    for cell in notebook.cells:
        cell.metadata = {}
        # warnings of libraries are not the notebook's
        cell["outputs"] = [o for o in cell.get("outputs", ()) if o.get("name") != "stderr"]
        if cell.cell_type == "markdown":
            del cell["outputs"]
    return notebook


def printed(notebook: Any) -> list[str]:
    """The text of each cell's output: in how many pieces it comes hangs on the machine."""
    return [
        "".join(o.get("text") or o["data"]["text/plain"] for o in cell.get("outputs", ()))
        for cell in notebook.cells
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    changed = 0
    for path in sorted(FOLDER.glob("*.ipynb")):
        kept = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
        made = run(path)
        if printed(kept) != printed(made):
            changed += 1
            print(f"{path.name}: prints something else than it did")
        if args.write:
            nbformat.write(made, path)  # type: ignore[no-untyped-call]
    return int(changed > 0 and not args.write)


if __name__ == "__main__":
    run_script(main)
